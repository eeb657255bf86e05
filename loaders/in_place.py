"""Volumes that stay where they are: what a patch needs is read out of them when it does.

Turned axes are views, another voxel size is another level of the store. What would need a copy is
refused by name. Statistics come from the coarsest level that suffices, else from blocks drawn over
the volume; both are measured once and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loaders.preprocess import Preprocess, Record, foreground_box, to_store_grid
from loaders.readers import (
    BrokenVolume,
    Image,
    InPlace,
    Reading,
    View,
    Volume,
    describe,
    is_store,
    look_of_view,
    ras_axes,
    read_header,
    read_volume,
    shifted,
    url_of,
    view_of,
)
from loaders.subjects import Subject

ENOUGH, MOST = 2**20, 2**23  # voxels that statistics are taken of
BLOCKS, SIDE = 64, 32  # drawn where there is no level of that size
Bounds = tuple[float, float | None]
TOLERANCE = 0.01  # by which a level's voxel size may miss the one asked for
REMEDY = (
    "--data.in_place false copies it into the cache, with --data.store zarr as sharded OME-Zarr; "
    "`vae3d prepare` does so ahead of training"
)


@dataclass(frozen=True)
class Sample:
    """Voxels of a volume that stand for all of them.

    Args:
        data: Blocks beside each other along X, (C, blocks * x, y, z).
        corners: Of the blocks, on the grid they were read from, (blocks, 3).
        step: Voxels of the volume for one of that grid, along each axis.
    """

    data: np.ndarray
    corners: np.ndarray
    step: np.ndarray

    @property
    def drawn(self) -> str:
        """Which part of the volume it is, in words; empty for a whole level."""
        count = len(self.corners)
        return f" of {count} blocks drawn at random" if count > 1 else ""

    def to_volume(self, points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return where voxels (N, 3) of `data` lie in the volume."""
        side = self.data.shape[1] // len(self.corners)
        block, inside = points[:, 0] // side, points.copy()
        inside[:, 0] %= side
        place = (self.corners[block] + inside + 0.5) * self.step
        return np.minimum(place, np.array(shape) - 1).astype(np.int32)


@dataclass(frozen=True)
class Found:
    """A volume that stays where it is, on the store's grid.

    Args:
        view: Its array.
        header: What its metadata say, voxels all zero.
        record: What undoes its preprocessing.
        levels: It, and the coarser ones.
    """

    view: View
    header: Volume
    record: Record
    levels: tuple[InPlace, ...]

    def sample(self, seed: int) -> Sample:
        """Read the coarsest level that suffices, or blocks of it where that is too large."""
        finest = self.levels[0]
        chosen = next((one for one in self.levels[::-1] if size_of(one) >= ENOUGH), finest)
        step = np.array(finest.shape[1:]) / chosen.shape[1:]
        if size_of(chosen) <= MOST:
            return Sample(chosen[(slice(None),) * 4], np.zeros((1, 3), int), step)
        rng = np.random.default_rng(seed)
        shape, chunks = np.array(chosen.shape[1:]), np.array(chosen.chunks)
        side = np.minimum(np.minimum(shape, chunks), SIDE)
        corners = rng.integers(0, shape - side + 1, (BLOCKS, 3))
        # Moved to lie in one chunk, where there is a whole one.
        lead = np.array(chosen.lead)
        start = (corners + lead) // chunks * chunks - lead
        corners = np.minimum(np.minimum(corners, start + chunks - side), shape - side)
        corners = np.maximum(corners, 0)
        boxes = [tuple(map(slice, corner, corner + side)) for corner in corners]
        blocks = [chosen[(slice(None), *box)] for box in boxes]
        return Sample(np.concatenate(blocks, axis=1), corners, step)


def size_of(array: InPlace) -> int:
    """Voxels of one channel."""
    return int(np.prod(array.shape[1:], dtype=float))


def stays(subject: Subject, reading: Reading) -> bool:
    """Whether a volume is read where it lies."""
    return reading.in_place and any(map(is_store, subject.paths))


def find_in_place(subject: Subject, reading: Reading, preprocess: Preprocess) -> Found:
    """Open a volume where it lies; `BrokenVolume` for what would need a copy.

    Args:
        subject: The volume.
        reading: Chooses level, channels and time.
        preprocess: What is done to it.
    """
    path = subject.paths[0]
    name = url_of(path) or str(path)
    refuse_copies(subject, reading, preprocess, name)
    image = describe(path)
    turned = ras_axes(image.levels[0].affine)[0] if preprocess.orient_ras else [0, 1, 2]
    sizes = [tuple(level.spacing_mm[axis] for axis in turned) for level in image.levels]
    level = level_of(sizes, reading.level, preprocess.spacing_mm, name)
    time = subject.time.number if subject.time else None
    first = view_of(image, level, reading, time)
    views = [first, *coarser(image, level, first, reading, time)]
    header = look_of_view(image, views[0])
    if reading.nan == "mask" and header.data.dtype.kind == "f":
        raise BrokenVolume(name, needs_copy("data.nan mask"))
    turning = Preprocess(orient_ras=preprocess.orient_ras)
    stored, record = to_store_grid(header, turning)
    if "axes" in record:
        views = [view.turned(record["axes"], record["flips"]) for view in views]
    stored = replace(stored, notes=header.notes, look=header.look)
    return Found(views[0], stored, record, tuple(view.open() for view in views))


def fitted(found: Found, sample: Sample, bounds: Bounds, preprocess: Preprocess) -> Found:
    """Cut a volume to its foreground, and pad it, as `to_store_grid` does with what is copied.

    Args:
        found: The volume.
        sample: What stands for it.
        bounds: Foreground threshold in stored numbers, and the limit beyond which voxels are hot.
        preprocess: What is done to it.

    Raises:
        BrokenVolume: It has no level small enough to look for the foreground in.
    """
    view, header, record = found.view, found.header, dict(found.record)
    shape = found.levels[0].shape[1:]
    if preprocess.crop_foreground:
        if sample.drawn:
            lacking = f"crop_foreground without a level of at most {MOST} voxels"
            raise BrokenVolume(str(view.place), needs_copy(lacking))
        low, high = foreground_box(Volume(sample.data), *bounds, 0.0)
        margin = np.ceil(preprocess.crop_margin_mm / np.array(header.spacing_mm))
        # Of a coarser level, outward.
        first = np.maximum(np.floor(low * sample.step) - margin, 0).astype(int).tolist()
        last = np.minimum(np.ceil(high * sample.step) + margin, shape).astype(int).tolist()
        record |= {"crop": [first, last], "crop_from": list(shape)}
        view, header = view.cropped(first, last), cut_to(header, first, last)
    if preprocess.pad_to_multiple > 1:
        record["pad_from"] = list(header.data.shape[1:])
        pads = tuple(-n % preprocess.pad_to_multiple for n in record["pad_from"])
        view = replace(view, pads=pads)
    return replace(found, view=view, header=header, record=record)


def cut_to(header: Volume, low: Sequence[int], high: Sequence[int]) -> Volume:
    """Return what is known of a part of a volume."""
    data = header.data[(slice(None), *map(slice, low, high))]
    return replace(header, data=data, affine=shifted(header.affine, low))


def coarser(image: Image, level: int, view: View, reading: Reading, time: int | None) -> list[View]:
    """Return the same part of the levels that are coarser than that of a view."""
    anywhere = replace(reading, region=None)
    rest = [view_of(image, n, anywhere, time) for n in range(level + 1, len(image.levels))]
    if view.box is None:
        return rest
    whole, found = np.array(view.open().whole), []
    low, high = np.array(view.box).T
    for one in rest:
        sizes = np.array(one.open().whole)
        start, stop = low * sizes // whole, -(-high * sizes // whole)
        box = tuple(zip(start.tolist(), stop.tolist(), strict=True))
        found.append(replace(one, box=box))
    return found


def refuse_copies(subject: Subject, reading: Reading, preprocess: Preprocess, name: str) -> None:
    """Refuse what no view of an array can be."""
    asked = {
        "several files as channels": len(subject.paths) > 1,
        "data.mask": subject.mask is not None,
        f"data.color {reading.color}": reading.color != "error",
    }
    for what, wanted in asked.items():
        if wanted:
            raise BrokenVolume(name, needs_copy(what))


def needs_copy(what: str) -> str:
    """Say that something cannot be done in place, and the way out."""
    return f"stays where it is, which {what} does not allow: {REMEDY}"


def level_of(
    sizes: Sequence[tuple[float, ...]],
    level: int | None,
    spacing_mm: tuple[float, float, float] | None,
    name: str,
) -> int:
    """Return which level is read.

    Args:
        sizes: Voxel sizes of the levels, turned as they will be.
        level: What the user wants; None for what fits.
        spacing_mm: Voxel size that is asked for; None for any.
        name: Of the store.
    """
    if level is None and spacing_mm is None:
        return 0
    candidates = range(len(sizes)) if level is None else [level]
    if level is not None and level >= len(sizes):
        have = f"has {len(sizes)} levels, level {level} is asked for (data.level)"
        raise BrokenVolume(name, f"{have}; they count from 0")
    for number in candidates:
        if spacing_mm is None or np.allclose(sizes[number], spacing_mm, rtol=TOLERANCE):
            return number
    there = "; ".join(" x ".join(f"{s:.4g}" for s in sizes[number]) for number in candidates)
    wanted = " x ".join(f"{s:.4g}" for s in spacing_mm or ())
    raise BrokenVolume(
        name, needs_copy(f"spacing_mm {wanted} (its levels have {there} mm and none is resampled)")
    )


def small_label_map(path: Path) -> Volume:
    """Read the finest level of a label map that is no larger than what statistics are taken of."""
    if not is_store(path):
        header = read_header(path)
        if header is None or np.prod(header.data.shape[1:], dtype=float) > MOST:
            lacking = f"tells no size of at most {MOST} voxels to draw labels from: make it a store"
            raise BrokenVolume(path, lacking)
        return read_volume(path)
    image = describe(path)
    for number, level in enumerate(image.levels):
        opened = view_of(image, number, Reading(volumes_4d="first")).open()
        if size_of(opened) <= MOST:
            return Volume(opened[(slice(None),) * 4], level.affine)
    raise BrokenVolume(path, f"has no level of at most {MOST} voxels to draw labels from")
