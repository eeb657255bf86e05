"""Masks: which voxels of a volume count, and how much.

A mask's values are weights, on any grid: nearest neighbors bring it to the volume's by the affines,
and what lies beyond it counts 0. A voxel of weight 0 is as if it were not there: the lowest
intensity that counts stands in its place before anything is measured or resampled, so whatever its
file holds there, no statistic, no network and no term of a loss sees it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loaders.manifest import located
from loaders.readers import (
    ZARR,
    BrokenVolume,
    Reading,
    Volume,
    describe,
    has_place,
    is_store,
    is_there,
    read_volume,
    same_grid,
    volume_suffix,
)
from loaders.subjects import Subject


def with_masks(subjects: list[Subject], mask: str | None, root: Path) -> list[Subject]:
    """Give each subject its mask; files that are the mask of another are no subjects.

    Args:
        subjects: What was found.
        mask: Manifest column, or pattern with `{name}`, the image's name without its suffix; None
            for no masks.
        root: The folder, or the manifest, whose folder the column's paths are relative to.
    """
    if mask is None:
        return subjects
    if "{name}" not in mask and not any(mask in subject.labels for subject in subjects):
        raise ValueError(
            f"data.mask is {mask!r}: neither a column of a manifest nor a pattern with {{name}}, "
            "for example '{name}_mask.nii.gz'"
        )
    paths = {subject.id: mask_of(subject, mask, root) for subject in subjects}
    taken = {os.path.abspath(path) for path in paths.values() if path and is_there(path)}
    subjects = [s for s in subjects if os.path.abspath(s.paths[0]) not in taken]
    if not subjects:
        raise ValueError(f"{root}: holds masks alone, no image (data.root, data.mask {mask!r})")
    for subject in subjects:
        path = paths[subject.id]
        if path is None or not is_there(path):
            where = f"{path} does not exist" if path else "the column is empty"
            raise ValueError(f"{subject.id} has no mask: {where} (data.mask {mask!r})")
    return [replace(subject, mask=paths[subject.id]) for subject in subjects]


def with_label_maps(subjects: list[Subject], labels: str | None, root: Path) -> list[Subject]:
    """Give subjects their label maps; files that are the map of another are no subjects.

    Args:
        subjects: What was found; who has no map, such as the healthy, stays without.
        labels: Manifest column, or pattern with `{name}`; None for the manifest's `label_map`.
        root: The folder, or the manifest, whose folder the column's paths are relative to.
    """
    places = {s.id: s.label_map if labels is None else mask_of(s, labels, root) for s in subjects}
    found = {id: path for id, path in places.items() if path and is_there(path)}
    taken = {os.path.abspath(path) for path in found.values()}
    for id, path in places.items() if "{name}" not in (labels or "") else ():
        if path and id not in found:
            column = f"column {labels or 'label_map'} of {id}"
            raise BrokenVolume(path, f"no such file ({column}); name it, or leave that empty")
    if labels is None:
        return subjects
    if not found:
        raise ValueError(
            f"--labels {labels}: no volume in {root} has such a label map; give a "
            "column of a manifest or a pattern, for example '{name}_seg.nii.gz'"
        )
    return [
        replace(s, labels={**s.labels, "label_map": str(found[s.id])}) if s.id in found else s
        for s in subjects
        if os.path.abspath(s.paths[0]) not in taken
    ]


def mask_of(subject: Subject, mask: str, root: Path) -> Path | None:
    """Where the mask of a subject should lie; None where the manifest does not say."""
    image = subject.paths[0]
    if "{name}" in mask:
        store = image.name.lower().endswith(ZARR)
        suffix = ZARR if store else "" if image.is_dir() else volume_suffix(image) or ""
        name = image.name[: len(image.name) - len(suffix)]
        return image.parent / mask.replace("{name}", name.removesuffix(".ome") if suffix else name)
    entry = subject.labels.get(mask)
    return located(entry, root, subject.id) if entry else None


def read_weights(path: Path, image: Volume, times: int, reading: Reading) -> np.ndarray:
    """Read a mask onto the grid of its image.

    Args:
        path: The mask.
        image: Its image, as read.
        times: Time points of the image; the mask has as many, or one for all.
        reading: Says what the values of masks weigh.

    Returns:
        Weights (1 or times, X, Y, Z), uint8 where they fit.
    """
    mask = read_volume(path, Reading(volumes_4d="samples"))
    if len(mask.data) not in (1, times):
        raise BrokenVolume(path, f"is a mask of {len(mask.data)} volumes: give one, or {times}")
    shape, affine = image.file_grid
    if not has_place(path, mask.affine):
        mask = replace(mask, affine=affine)
    refuse_other_size(path, mask.data.shape[1:], mask.affine, shape, affine)
    values = nearest(mask, image.data.shape[1:], image.affine).intensities()
    return compact(as_weights(path, values, table_of(path, reading)))


def refuse_other_size(
    path: Path,
    size: Sequence[int],
    own: np.ndarray,
    shape: Sequence[int],
    affine: np.ndarray,
) -> None:
    """Refuse a mask that lies where its image does and has another size."""
    place = np.abs(np.linalg.solve(affine, own) - np.eye(4)).max()  # in voxels
    if tuple(size) != tuple(shape) and place < 0.1:
        sizes = ["x".join(map(str, one)) for one in (size, shape)]
        raise BrokenVolume(path, f"is {sizes[0]}, its image {sizes[1]} at the same place")


def table_of(path: Path, reading: Reading) -> dict[float, float] | None:
    """Return the weights of a mask's values, see `as_weights`.

    OME's label images hold numbers of objects, whose sizes weigh nothing.
    """
    if reading.mask_weights:
        return {float(k): float(v) for k, v in reading.mask_weights.items()}
    return {} if is_store(path) and describe(path).objects else None


def as_weights(path: Path, values: np.ndarray, table: dict[float, float] | None) -> np.ndarray:
    """Return what the values of a mask weigh.

    Args:
        path: The mask, for messages.
        values: Of it.
        table: Weight of each value; empty where all but 0 weigh 1, None where values are weights.
    """
    if table:
        values = weighed(path, values, table)
    elif table is not None:
        values = (values != 0).astype(np.float32)
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0):
        raise BrokenVolume(path, "weights of a mask are finite and at least 0")
    return values


def weighed(path: Path, values: np.ndarray, weights: dict[float, float]) -> np.ndarray:
    """Replace each value of a mask by its weight."""
    found, which = np.unique(values, return_inverse=True)
    unknown = [value for value in found.tolist() if value not in weights]
    if unknown:
        raise BrokenVolume(path, f"holds {unknown[0]:g}, which data.mask_weights does not name")
    table = np.array([weights[value] for value in found.tolist()], np.float32)
    return table[which].reshape(values.shape)


def compact(weights: np.ndarray) -> np.ndarray:
    """Return weights in one byte each where that changes none."""
    small = weights.astype(np.uint8) if weights.max() < 256 else weights
    return small if np.array_equal(small, weights) else weights


def hide(data: np.ndarray, weights: np.ndarray, rising: bool, path: Path) -> np.ndarray:
    """Put the lowest intensity that counts in the place of voxels that do not.

    Args:
        data: Stored numbers (C, X, Y, Z).
        weights: (1, X, Y, Z).
        rising: Whether intensities rise with the stored numbers.
        path: The file, for the message.
    """
    seen = weights[0] > 0
    if not seen.any():
        raise BrokenVolume(path, "no voxel counts: its mask is 0 wherever the volume is")
    if seen.all():
        return data
    data = data.copy(order="K")
    for channel in data:
        values = channel[seen]
        values = values[np.isfinite(values)]
        if len(values):
            channel[~seen] = values.min() if rising else values.max()
    return data


def nearest(volume: Volume, shape: tuple[int, ...], affine: np.ndarray) -> Volume:
    """Bring a volume to another grid by nearest neighbors; 0 outside its own.

    Args:
        volume: On any grid.
        shape: Spatial shape of the other grid.
        affine: Of the other grid, voxel to RAS+ millimeters.
    """
    if same_grid(volume.data.shape[1:], volume.affine, shape, affine):
        return replace(volume, affine=affine)
    to_own = np.linalg.inv(volume.affine) @ affine
    out = np.zeros((len(volume.data), *shape), volume.data.dtype)
    y, z = np.meshgrid(*map(np.arange, shape[1:]), indexing="ij")
    sizes = np.array(volume.data.shape[1:])[:, None, None]
    for x in range(shape[0]):  # a plane at a time: the places of all voxels would fill the memory
        place = np.tensordot(to_own[:3], np.stack([np.full_like(y, x), y, z, np.ones_like(y)]), 1)
        index = np.floor(place + 0.5 + 1e-6).astype(np.int64)
        inside = ((index >= 0) & (index < sizes)).all(0)
        out[:, x][:, inside] = volume.data[(slice(None), *index[:, inside])]
    return Volume(out, affine, volume.scale, volume.offset)
