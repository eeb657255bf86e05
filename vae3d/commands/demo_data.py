"""`vae3d demo-data DIR`: a small data set of brain-like volumes, without a network."""

from __future__ import annotations


def demo_data(
    folder: str, /, num_subjects: int = 24, spacing_mm: float = 2.0, seed: int = 0
) -> None:
    """Write brain-like volumes warped from the MNI152 maps; the same command, the same bytes.

    Args:
        folder: Where to; what is there whole is kept.
        num_subjects: How many volumes.
        spacing_mm: Voxel size in millimeters.
        seed: Another seed gives other subjects.
    """
    from loaders.demo import write_demo

    paths = write_demo(folder, num_subjects, spacing_mm, seed)
    print(f"{len(paths)} volumes in {folder}")
