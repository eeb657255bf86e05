"""Volumes that stay where they are: what a patch needs is read out of them when it does.

Turned axes are views, another voxel size is another level of the store, several files are channels
beside each other, and a mask is read where the patch lies. What would need a copy is refused by
name. Statistics come from the coarsest level that suffices, else from blocks drawn over the volume;
both are measured once and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loaders.counted import MOST, Counted, Mask, find_mask, small
from loaders.foreground import foreground_box
from loaders.preprocess import Preprocess, to_store_grid
from loaders.readers import (
    Beside,
    BrokenVolume,
    Image,
    InPlace,
    Reading,
    View,
    Volume,
    beside,
    check_one_grid,
    describe,
    is_store,
    look_of_view,
    ras_axes,
    shifted,
    url_of,
    view_of,
)
from loaders.subjects import Subject
from loaders.texts import Record

ENOUGH = 2**20  # voxels that statistics are taken of, at most MOST
BLOCKS, SIDE = 64, 32  # drawn where there is no level of that size
DRAWS, SEED = 16, 0  # how often at most, and from which seed
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
        volume: Blocks beside each other along X, (C, blocks * x, y, z), with their weights.
        corners: Of the blocks, on the grid they were read from, (blocks, 3).
        step: Voxels of the volume for one of that grid, along each axis.
    """

    volume: Volume
    corners: np.ndarray
    step: np.ndarray

    @property
    def data(self) -> np.ndarray:
        """Its numbers."""
        return self.volume.data

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
        views: The arrays of its files, whose channels follow each other.
        header: What their metadata say, voxels all zero.
        record: What undoes its preprocessing.
        levels: It, and the coarser ones.
        mask: Which voxels count; None for all alike.
    """

    views: tuple[View, ...]
    header: Volume
    record: Record
    levels: tuple[InPlace | Beside | Counted, ...]
    mask: Mask | None

    @property
    def name(self) -> str:
        """Where its first array lies."""
        return str(self.views[0].place)

    def sample(self) -> Sample:
        """Read the coarsest level that suffices, or blocks of it where that is too large.

        Blocks are drawn again while all that counts is alike, as in the padding of mosaics.
        """
        finest = self.levels[0]
        chosen = next((one for one in self.levels[::-1] if size_of(one) >= ENOUGH), finest)
        step = np.array(finest.shape[1:]) / chosen.shape[1:]
        if size_of(chosen) <= MOST:
            return Sample(read_box(chosen, (slice(None),) * 3), np.zeros((1, 3), int), step)
        rng = np.random.default_rng(SEED)
        for _ in range(DRAWS):
            volume, corners = drawn_blocks(chosen, rng)
            if volume.weights is not None:
                values = volume.data[:, volume.weights[0] > 0]
            else:
                values = volume.data.reshape(len(volume.data), -1)
            if (values != values[:, :1]).any(axis=1).all():
                break
        if not values.size:
            lacking = f"in {DRAWS * BLOCKS} blocks drawn at random; a level small enough is"
            raise BrokenVolume(self.name, f"no voxel counts {lacking} looked at whole")
        return Sample(volume, corners, step)


def read_box(array: InPlace | Beside | Counted, box: Sequence[slice]) -> Volume:
    """Read a box (X, Y, Z) as its store holds it, and how much its voxels count."""
    if isinstance(array, Counted):
        return Volume(array.array[(slice(None), *box)], weights=array.weights(box))
    return Volume(array[(slice(None), *box)])


def drawn_blocks(
    chosen: InPlace | Beside | Counted, rng: np.random.Generator
) -> tuple[Volume, np.ndarray]:
    """Read blocks of a volume that lie anywhere in it, beside each other along X; and where."""
    shape, chunks = np.array(chosen.shape[1:]), np.array(chosen.chunks)
    side = np.minimum(np.minimum(shape, chunks), SIDE)
    corners = rng.integers(0, shape - side + 1, (BLOCKS, 3))
    # Moved to lie in one chunk, where there is a whole one.
    lead = np.array(chosen.lead)
    start = (corners + lead) // chunks * chunks - lead
    corners = np.minimum(np.minimum(corners, start + chunks - side), shape - side)
    corners = np.maximum(corners, 0)
    blocks = [read_box(chosen, [*map(slice, corner, corner + side)]) for corner in corners]
    weights = [one.weights for one in blocks if one.weights is not None]
    return Volume(
        np.concatenate([one.data for one in blocks], axis=1),
        weights=np.concatenate(weights, axis=1) if weights else None,
    ), corners


def size_of(array: InPlace | Beside | Counted) -> int:
    """Voxels of one channel."""
    return int(np.prod(array.shape[1:], dtype=float))


def stays(subject: Subject, reading: Reading) -> bool:
    """Whether a volume is read where it lies."""
    return reading.in_place and any(map(is_store, subject.paths))


@dataclass(frozen=True)
class Piece:
    """A level of one of a volume's files, turned as it will be read.

    Args:
        view: Its array.
        header: What the metadata say of it, voxels all zero.
        record: What turns it back.
        affine: Of the whole level as it is stored.
    """

    view: View
    header: Volume
    record: Record
    affine: np.ndarray


def find_in_place(subject: Subject, reading: Reading, preprocess: Preprocess) -> Found:
    """Open a volume where it lies; `BrokenVolume` for what would need a copy.

    Args:
        subject: The volume.
        reading: Chooses level, channels and time.
        preprocess: What is done to it.
    """
    refuse_copies(subject)
    files = [pieces_of(path, subject, reading, preprocess) for path in subject.paths]
    check_one_grid({path: file[0].header for path, file in zip(subject.paths, files, strict=True)})
    rows = [row for row in zip(*files, strict=False) if are_alike(row)]
    mask, first = None, rows[0][0]
    if subject.mask is not None:
        mask = find_mask(subject.mask, first.view, first.affine, subject.paths[0], reading)
    levels = [opened(row, mask, reading.nan) for row in rows]
    headers = [piece.header for piece in rows[0]]
    named = tuple(channel for header in headers for channel in header.look.channels)
    header = replace(
        headers[0],
        data=np.broadcast_to(np.zeros((), levels[0].dtype), levels[0].shape),
        notes=tuple({note: None for header in headers for note in header.notes}),
        look=replace(headers[0].look, channels=named),
    )
    nan = "keep" if isinstance(levels[0], Counted) else reading.nan
    views = tuple(replace(piece.view, nan=nan) for piece in rows[0])
    return Found(views, header, first.record, tuple(levels), mask)


def opened(row: Sequence[Piece], mask: Mask | None, nan: str) -> InPlace | Beside | Counted:
    """Open a level, and what tells which of its voxels count."""
    array, grid = beside([piece.view for piece in row]), row[0].header
    if mask is None and not (nan == "mask" and array.dtype.kind == "f"):
        return array
    kept = beside([replace(piece.view, nan="keep") for piece in row])
    on = mask.on(grid.affine, grid.data.shape[1:]) if mask else None
    return Counted(kept, on, nan, (), str(row[0].view.place))


def pieces_of(
    path: Path, subject: Subject, reading: Reading, preprocess: Preprocess
) -> list[Piece]:
    """Open the level of a file that is read, and those that are coarser."""
    image = describe(path)
    turned = ras_axes(image.levels[0].affine)[0] if preprocess.orient_ras else [0, 1, 2]
    sizes = [tuple(level.spacing_mm[axis] for axis in turned) for level in image.levels]
    level = level_of(sizes, reading.level, preprocess.spacing_mm, url_of(path) or str(path))
    time = subject.time.number if subject.time else None
    finest = view_of(image, level, reading, time)
    found = []
    for number, view in enumerate([finest, *coarser(image, level, finest, reading, time)], level):
        read = look_of_view(image, view)
        stored, record = to_store_grid(read, Preprocess(orient_ras=preprocess.orient_ras))
        if "axes" in record:
            view = view.turned(record["axes"], record["flips"])
        header = replace(stored, notes=read.notes, look=read.look)
        found.append(Piece(view, header, record, image.levels[number].affine))
    return found


def are_alike(row: Sequence[Piece]) -> bool:
    """Whether a level has the same size in all files."""
    return len({piece.header.data.shape[1:] for piece in row}) == 1


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
    views, header, record = found.views, found.header, dict(found.record)
    shape = found.levels[0].shape[1:]
    if preprocess.crop_foreground:
        margin = preprocess.crop_margin_mm / np.array(header.spacing_mm)
        first, last = crop_box(found.name, sample, bounds, sample.step, shape, margin)
        record |= {"crop": [first, last], "crop_from": list(shape)}
        views = tuple(view.cropped(first, last) for view in views)
        header = cut_to(header, first, last)
    if preprocess.pad_to_multiple > 1:
        record["pad_from"] = list(header.data.shape[1:])
        pads = tuple(-n % preprocess.pad_to_multiple for n in record["pad_from"])
        views = tuple(replace(view, pads=pads) for view in views)
    return replace(found, views=views, header=header, record=record)


def crop_box(
    name: str,
    sample: Sample,
    bounds: Bounds,
    step: np.ndarray,
    shape: Sequence[int],
    margin: np.ndarray,
) -> tuple[list[int], list[int]]:
    """Return the corners of the box of the foreground, of a coarser level drawn outward.

    Args:
        name: Of the volume.
        sample: What stands for it.
        bounds: Foreground threshold in stored numbers, and the limit beyond which voxels are hot.
        step: Voxels of the volume for one of the sample's.
        shape: Of the volume.
        margin: Voxels that are kept around the box, rounded up.
    """
    if sample.drawn:
        lacking = f"crop_foreground without a level of at most {MOST} voxels"
        raise BrokenVolume(name, needs_copy(lacking))
    low, high = foreground_box(Volume(sample.data), *bounds, 0.0)
    first = np.maximum(np.floor(low * step) - np.ceil(margin), 0).astype(int)
    last = np.minimum(np.ceil(high * step) + np.ceil(margin), shape).astype(int)
    return first.tolist(), last.tolist()


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


def refuse_copies(subject: Subject) -> None:
    """Refuse files that do not all stay where they are."""
    copied = [path for path in subject.paths if not is_store(path)]
    if copied:
        name = url_of(copied[0]) or str(copied[0])
        raise BrokenVolume(name, f"is copied, another file of {subject.id} {needs_copy('that')}")


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
        return small(path, "a map of labels")
    image = describe(path)
    for number, level in enumerate(image.levels):
        opened = view_of(image, number, Reading(volumes_4d="first")).open()
        if size_of(opened) <= MOST:
            return Volume(opened[(slice(None),) * 4], level.affine)
    raise BrokenVolume(path, f"has no level of at most {MOST} voxels to draw labels from")
