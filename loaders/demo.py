"""Brain-like volumes to try everything on, made from the MNI152 maps inside the nilearn wheel.

Each "subject" is the MNI152 T1 template, warped by a random affine and a smooth elastic field, with
its own tissue contrast, bias field and noise. The same arguments give the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from loaders.readers import Volume, read_volume, write_volume
from loaders.whole import write_text

FIELD_OF_VIEW_MM = (160.0, 192.0, 168.0)
CENTER_MM = (0.0, -18.0, 6.0)  # middle of the brain in MNI coordinates
MAPS = ("t1", "gm", "wm")


def write_demo(
    folder: str | Path, num_subjects: int = 24, spacing_mm: float = 2.0, seed: int = 0
) -> list[Path]:
    """Write the demo volumes, `sub-01_T1w.nii.gz` and so on; what is there whole is kept.

    Args:
        folder: Where to; made if missing.
        num_subjects: How many volumes.
        spacing_mm: Voxel size in millimeters.
        seed: Another seed gives other subjects.

    Returns:
        Paths of the volumes.
    """
    if num_subjects < 1 or spacing_mm <= 0 or seed < 0:
        raise ValueError("demo data need num_subjects >= 1, spacing_mm > 0 and seed >= 0")
    folder = Path(folder)
    recipe = {"num_subjects": num_subjects, "spacing_mm": spacing_mm, "seed": seed, "version": 1}
    paths = [folder / f"sub-{number:02d}_T1w.nii.gz" for number in range(1, num_subjects + 1)]
    done = folder / "demo.json"
    if done.is_file() and all(path.is_file() for path in paths):
        known = json.loads(done.read_text())
        sizes = [path.stat().st_size for path in paths]
        if known == recipe | {"sizes": sizes}:
            return paths
    template = load_template()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(
            lambda number: make_subject(template, spacing_mm, [seed, number]), range(len(paths))
        )
        for path, volume in zip(paths, made, strict=True):
            write_volume(path, volume)
    sizes = [path.stat().st_size for path in paths]
    write_text(done, json.dumps(recipe | {"sizes": sizes}, indent=2) + "\n")
    return paths


def load_template() -> Volume:
    """Return T1, grey- and white-matter maps as channels in [0, 1], smoothed for sampling."""
    from scipy import ndimage

    found = importlib.util.find_spec("nilearn")
    if found is None or not found.submodule_search_locations:
        raise ValueError("demo data need nilearn: pip install 'vae3d[demo]'")
    data = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    volumes = [
        read_volume(data / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz") for name in MAPS
    ]
    maps = [
        ndimage.gaussian_filter(volume.data[0].astype(np.float32) / 255, 0.6) for volume in volumes
    ]
    return Volume(np.stack(maps), volumes[0].affine)


def make_subject(template: Volume, spacing_mm: float, key: list[int]) -> Volume:
    """Return one subject, int16 intensities of about 0 to 1000, on a grid of its own."""
    from scipy import ndimage

    rng = np.random.default_rng(key)
    shape = tuple(round(size / spacing_mm) for size in FIELD_OF_VIEW_MM)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = CENTER_MM - spacing_mm * (np.array(shape) - 1) / 2

    def smooth_field(knots: int, sd: float) -> np.ndarray:
        field = rng.normal(0, sd, (knots,) * 3)
        for n in shape:  # cubic splines are separable: each axis in turn moves to the end
            spline = ndimage.zoom(
                np.eye(knots), (n / knots, 1), order=3, grid_mode=True, mode="mirror"
            )
            field = np.tensordot(field, spline, (0, 1))
        return field

    # Voxel -> MNI millimeters -> warped millimeters -> template voxel.
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij"))
    millimeters = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3][:, None, None, None]
    angles, scales = rng.normal(0, 0.07, 3), rng.normal(1, 0.04, 3)
    shears, shift = rng.normal(0, 0.03, 3), rng.normal(0, 1.5, 3)
    matrix = rotation(angles) @ np.diag(scales)
    matrix[np.triu_indices(3, 1)] += shears
    middle = np.array(CENTER_MM)
    warped = np.tensordot(matrix, millimeters - middle[:, None, None, None], 1)
    warped += (middle + shift)[:, None, None, None]
    warped += np.stack([smooth_field(6, 3.5) for _ in range(3)])
    back = np.linalg.inv(template.affine)
    where = np.tensordot(back[:3, :3], warped, 1) + back[:3, 3][:, None, None, None]
    t1, gray, white = (ndimage.map_coordinates(m, where, order=1) for m in template.data)

    contrast = rng.normal((0.45, 0.16, 0.40), (0.05, 0.05, 0.05))
    signal = contrast[0] * t1 + contrast[1] * gray + contrast[2] * white
    signal *= np.exp(smooth_field(4, 0.12))
    noise = rng.uniform(0.008, 0.02)
    # Magnitude images have Rician noise: real and imaginary part are Gaussian.
    signal = np.hypot(signal + rng.normal(0, noise, shape), rng.normal(0, noise, shape))
    gain = rng.uniform(600, 1000)
    return Volume(np.rint(signal * gain).astype(np.int16)[None], affine)


def rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation about X, then Y, then Z by these angles in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix
