"""Label maps: read onto the grid of their volume, and voxels drawn of each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders.foreground import NUM_POINTS
from loaders.in_place import small_label_map
from loaders.masks import nearest
from loaders.preprocess import label_to_store_grid
from loaders.readers import BrokenVolume, Cut, Volume, has_place, read_volume
from loaders.subjects import Subject


def draw_labels(subject: Subject, record: dict[str, Any], seed: int) -> dict[int, np.ndarray]:
    """Draw up to NUM_POINTS voxels (N, 3) of each label, on the grid of the store.

    Args:
        subject: Whose label map.
        record: How its volume came to the store's grid.
        seed: Of the draw.
    """
    values = labels_of(subject, record)
    rng = np.random.default_rng(seed)
    found = {}
    for name in np.unique(values):
        points = np.argwhere(values == name)
        found[int(name)] = points[rng.permutation(len(points))[:NUM_POINTS]].astype(np.int32)
    return found


def labels_of(subject: Subject, record: dict[str, Any]) -> np.ndarray:
    """Return the label map of a subject (X, Y, Z) on the grid of the store, its padding apart.

    Args:
        subject: Whose label map.
        record: How its volume came to the store's grid.
    """
    shape, affine = tuple(record["source_shape"]), np.array(record["source_affine"])
    cut = Cut.of(record["cut"]) if "cut" in record else None
    grid = Volume(np.broadcast_to(np.uint8(0), (1, *shape)), affine, cut=cut)
    return label_to_store_grid(read_label_map(subject, grid), record).data[0]


def draw_labels_in_place(
    path: Path, shape: Sequence[int], affine: np.ndarray, seed: int
) -> dict[int, np.ndarray]:
    """Draw as `draw_labels` for a volume that stays where it is, from a level that is small enough.

    Args:
        path: Label map, a store or a file of that size; its affine says where it lies.
        shape: Of the volume.
        affine: Of the volume.
        seed: Of the draw.
    """
    label = whole_numbers(small_label_map(path), path)
    values, rng = label.data[0], np.random.default_rng(seed)
    to_volume = np.linalg.solve(affine, label.affine)
    found = {}
    for name in np.unique(values):
        places = rng.permutation(np.flatnonzero(values == name))[:NUM_POINTS]
        points = np.stack([*np.unravel_index(places, values.shape), np.ones_like(places)])
        moved = np.rint((to_volume @ points)[:3].T).astype(np.int32)
        found[int(name)] = moved[((moved >= 0) & (moved < np.array(shape))).all(axis=1)]
    return found


def label_map_of(subject: Subject) -> Path:
    """Return the file of a subject's label map, which has to be named."""
    if subject.label_map is None:
        raise ValueError(f"the manifest has no label map (column label_map) for {subject.id}")
    return subject.label_map


def read_label_map(subject: Subject, grid: Volume) -> Volume:
    """Read the label map of a subject onto the grid of its volume.

    The affines say where it lies; if one of the two has no place in space, it is taken voxel by
    voxel, so the shapes of the files must be the same.
    """
    shape, affine = grid.data.shape[1:], grid.affine
    shape_of_file, affine_of_file = grid.file_grid
    path = label_map_of(subject)
    label = whole_numbers(read_volume(path), path)
    if has_place(path, label.affine) and has_place(subject.paths[0], affine_of_file):
        return on_grid(label, shape, affine, path)
    if label.data.shape[1:] != shape_of_file:
        raise BrokenVolume(
            path,
            f"is {label.data.shape[1:]} voxels, its volume {shape_of_file}, and not both say where "
            f"they lie: give a label map of that shape, or one with an affine (NIfTI)",
        )
    return nearest(Volume(label.data, affine_of_file), shape, affine)


def whole_numbers(label: Volume, path: Path) -> Volume:
    """Return a label map of whole numbers; anything else is no label map."""
    if len(label.data) != 1:
        raise BrokenVolume(path, f"has {len(label.data)} channels: a label map has one")
    values = label.data
    if values.dtype.kind == "f" or (label.scale, label.offset) != (1, 0):
        values = values * np.float64(label.scale) + label.offset
        odd = values[values != np.rint(values)]  # NaN too
        if odd.size:
            raise BrokenVolume(
                path, f"holds {odd[0]:g}, no whole number: a label map is wanted, no probabilities"
            )
        values = values.astype(np.int32)
    return Volume(values, label.affine)


def on_grid(label: Volume, shape: tuple[int, ...], affine: np.ndarray, path: Path) -> Volume:
    """Bring a label map to another grid: nearest voxel, 0 beyond the map, which has to be there."""
    moved = nearest(label, shape, affine)
    if not moved.data.any():
        everywhere = replace(label, data=np.ones_like(label.data, np.uint8))
        if not nearest(everywhere, shape, affine).data.any():
            raise BrokenVolume(
                path, "lies beside its volume in space: is it the map of another one?"
            )
    return moved
