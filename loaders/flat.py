"""Pictures among volumes, and pictures for a network of volumes: refused with the remedy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from loaders.readers import PICTURES, SLICES, BrokenVolume, volume_suffix
from loaders.subjects import Subject


def flat_faults(
    subjects: Sequence[Subject], thickness: Mapping[str, int], spatial_dims: int, root: str
) -> list[BrokenVolume]:
    """Say what is wrong with volumes that are one voxel thick, if anything.

    A network of volumes learns nothing from a picture. One of slices takes pictures and volumes,
    but not a picture that happens to lie beside the volumes of a folder.

    Args:
        subjects: The volumes.
        thickness: Voxels along the thinnest axis by id, of those of which it is known; that of
            pictures is known from their names.
        spatial_dims: 3 for a network of volumes, 2 for one of slices.
        root: What the user named: a folder, or the files by a glob or a manifest.

    Returns:
        The fault, naming the first such file, or nothing.
    """
    pictures = {s.id for s in subjects if volume_suffix(s.paths[0]) in PICTURES}
    flat = [s for s in subjects if thickness.get(s.id) == 1 or s.id in pictures]
    deep = [s for s in subjects if thickness.get(s.id, 1) > 1]
    if spatial_dims == 2:
        named = not os.path.isdir(os.path.expanduser(root))
        flat = [s for s in flat if s.id in pictures and deep and not named]
    if not flat:
        return []
    name = "name the volumes alone, by a glob or a manifest (data.root)"
    if spatial_dims == 2:
        return [BrokenVolume(flat[0].paths[0], f"is a picture among {len(deep)} volumes: {name}")]
    remedies = [name] if len(flat) < len(subjects) else []
    remedies.append("train on slices (--model.spatial_dims 2)")
    folders = Counter(s.paths[0].parent for s in flat if volume_suffix(s.paths[0]) in SLICES)
    if max(folders.values(), default=0) > 1:
        remedies.append("make each folder of slices a volume (--data.stacks folder)")
    reason = f"is one voxel thick, as {len(flat)} of {len(subjects)} are, and the model takes 3D"
    return [BrokenVolume(flat[0].paths[0], f"{reason}: {', or '.join(remedies)}")]
