"""Which voxels count of a volume that stays where it is, told patch by patch.

A mask that is a store stays where it is, too; one that is a small file is kept in the cache, on a
grid of its own. Nearest neighbors bring a box of it to the volume's grid, with the numbers that
`masks.read_weights` has for a volume that is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.masks import as_weights, refuse_other_size, table_of
from loaders.readers import (
    Beside,
    BrokenVolume,
    InPlace,
    Reading,
    View,
    Volume,
    describe,
    finite,
    has_place,
    is_store,
    mirrored,
    read_header,
    read_volume,
    times_of,
    view_of,
)
from loaders.texts import Record, misfit

MOST = 2**23  # voxels of a mask, or map of labels, that is read whole
STRAIGHT = 0.1  # voxels that an axis of a mask may stray from that of its volume
TOLERANCE = 0.01  # by which a mask's voxels may be larger than the volume's


class Numbers(Protocol):
    """An array (1, X, Y, Z), or what gives one where it is sliced."""

    def __getitem__(self, box: tuple[slice, ...], /) -> np.ndarray: ...


@dataclass(frozen=True)
class Mask:
    """A mask on its own grid.

    Args:
        path: Its file or store.
        source: Its voxels, or how its store is seen.
        size: Of its grid, X, Y, Z.
        affine: Of its grid; that of its image where one of the two has no place in space.
        table: Weight of each value, see `masks.as_weights`.
    """

    path: Path
    source: Volume | View
    size: Sequence[int]
    affine: np.ndarray
    table: dict[float, float] | None

    def on(self, affine: np.ndarray, shape: Sequence[int]) -> OnGrid:
        """Return its weights on a grid of voxels, `shape` (X, Y, Z)."""
        source = self.source.open() if isinstance(self.source, View) else self.source
        return OnGrid(source, self.size, self.path, self.matrix(affine, shape), self.table)

    def matrix(self, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return index on a grid to index on its own, each axis along one other (4 x 4)."""
        matrix = np.linalg.solve(self.affine, affine)
        steps = np.abs(matrix[:3, :3])
        alone = steps == steps.max(axis=0)
        stray = (np.where(alone, 0, steps) * np.array(shape)).sum(axis=1).max()
        if (alone.sum(axis=0) > 1).any() or (alone.sum(axis=1) > 1).any() or stray > STRAIGHT:
            raise BrokenVolume(
                self.path,
                "lies oblique to its image, which stays where it is: --data.in_place false copies",
            )
        matrix[:3, :3] = np.where(alone, matrix[:3, :3], 0)
        return matrix


class OnGrid:
    """Weights of a mask, seen on the grid of its volume.

    Args:
        source: Values of the mask on its own grid.
        size: Of that, X, Y, Z.
        path: Its file, for messages.
        matrix: Index on the volume's grid to index on its own.
        table: Weight of each value, see `masks.as_weights`.
    """

    def __init__(
        self,
        source: Numbers,
        size: Sequence[int],
        path: Path,
        matrix: np.ndarray,
        table: dict[float, float] | None,
    ):
        self.source, self.size, self.path = source, size, path
        self.matrix, self.table = matrix, table
        self.axes = np.abs(matrix[:3, :3]).argmax(axis=0).tolist()  # its own, of each of X, Y, Z

    def at(self, places: Sequence[np.ndarray]) -> np.ndarray:
        """Return weights (1, X, Y, Z) of voxels; beyond the mask its value is 0.

        Args:
            places: Index along each axis of the volume.
        """
        box, taken, inside = [slice(0, 0)] * 3, [], []
        for number, (own, place) in enumerate(zip(self.axes, places, strict=True)):
            there = self.matrix[own, number] * place + self.matrix[own, 3]
            index = np.floor(there + 0.5 + 1e-6).astype(np.int64)  # as `masks.nearest`
            held = (index >= 0) & (index < self.size[own])
            low = int(index[held].min(initial=self.size[own]))
            box[own] = slice(low, int(index[held].max(initial=low - 1)) + 1)
            taken.append(index[held] - low)
            inside.append(held)
        values = np.zeros((1, *map(len, places)), np.float32)
        if all(map(len, taken)):
            data = self.source[(slice(0, 1), *box)].transpose(0, *(1 + own for own in self.axes))
            values[np.ix_([True], *inside)] = data[np.ix_([0], *taken)]
        return as_weights(self.path, values, self.table)


class Counted:
    """A volume that stays where it is, of which some voxels do not count.

    These have the lowest intensity that counts, of the sample that was measured, so whatever lies
    there is not seen.

    Args:
        array: The volume, NaN kept.
        mask: How much its voxels count; None for all alike.
        nan: What becomes of NaN and infinity: error, fill, or mask: they do not count.
        lowest: Of each channel; none for who only asks for weights.
        name: Of the volume, for messages.
    """

    def __init__(
        self,
        array: InPlace | Beside,
        mask: OnGrid | None,
        nan: str,
        lowest: Sequence[float],
        name: str,
    ):
        self.array, self.mask, self.nan, self.lowest, self.name = array, mask, nan, lowest, name
        self.shape, self.dtype, self.held = array.shape, array.dtype, array.held
        self.chunks, self.lead = array.chunks, array.lead

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Read a box; what does not count is hidden, also where it is reflected into padding."""
        whole = self.array[(slice(None), *box[1:])]
        ranges = self.ranges(box[1:])
        places = [mirrored(one, n) for one, n in zip(ranges, self.held, strict=True)]
        seen = self.counts(places, whole)[0] > 0
        lowest = np.array(self.lowest, whole.dtype).reshape(-1, 1, 1, 1)
        data = np.where(seen, whole, lowest)[box[0]]
        return finite(data, self.nan, lowest.min(), self.name, ranges)

    def weights(self, slices: Sequence[slice]) -> np.ndarray:
        """Return how much the voxels of a box count, (1, X, Y, Z); padding counts 0."""
        ranges = self.ranges(slices)
        holes = self.nan == "mask" and self.dtype.kind == "f"
        data = self.array[(slice(None), *slices)] if holes else None
        weights = self.counts([np.array(one) for one in ranges], data)
        for axis, (one, n) in enumerate(zip(ranges, self.held, strict=True), start=1):
            weights.swapaxes(0, axis)[max(n - one.start, 0) :] = 0
        return weights

    def counts(self, places: Sequence[np.ndarray], data: np.ndarray | None) -> np.ndarray:
        """Return weights (1, X, Y, Z) of voxels, of which `data` are the numbers."""
        if self.mask is None:
            weights = np.ones((1, *map(len, places)), np.float32)
        else:
            weights = self.mask.at(places)
        if self.nan == "mask" and data is not None and data.dtype.kind == "f":
            weights = weights * np.isfinite(data).all(0, keepdims=True)
        return weights

    def ranges(self, slices: Sequence[slice]) -> list[range]:
        """Return the voxels of a box along each axis."""
        return [range(*one.indices(n)) for one, n in zip(slices, self.shape[1:], strict=True)]


def find_mask(path: Path, view: View, affine: np.ndarray, image: Path, reading: Reading) -> Mask:
    """Open a mask beside an image that stays where it is.

    A store's level is the coarsest whose voxels are no larger than those of the image. Where one of
    the two has no place in space, it is taken voxel by voxel.

    Args:
        path: The mask.
        view: Of the image.
        affine: Of all that its file holds.
        image: Its file.
        reading: Says what the values of masks weigh.
    """
    shape, table, placed = view.open().whole, table_of(path, reading), has_place(image, affine)
    source: Volume | View
    if is_store(path):
        source, own = mask_in_place(path, view, affine, placed)
        count, *size = source.open().shape
    else:
        volume = small(path, "a mask")
        source, own = Volume(volume.intensities()), volume.affine
        count, *size = volume.shape
    if count != 1:
        raise BrokenVolume(path, f"is a mask of {count} volumes: give one")
    own = own if placed and has_place(path, own) else affine
    refuse_other_size(path, size, own, shape, affine)
    return Mask(path, source, size, own, table)


def mask_in_place(
    path: Path, view: View, affine: np.ndarray, placed: bool
) -> tuple[View, np.ndarray]:
    """Open the level of a store that goes with an image, and its affine.

    Args:
        path: The mask.
        view: Of the image.
        affine: Of all that its file holds.
        placed: Whether the image has a place in space.
    """
    image, time = describe(path), view.time if "T" in view.axes else None
    times = times_of(image, Reading(volumes_4d="samples"))
    if times > 1 and time is None:
        raise BrokenVolume(path, f"is a mask of {times} time points, its image has one")
    grids = [level.affine for level in image.levels]
    views = [
        replace(view_of(image, n, Reading(), time if times > 1 else None), nan="keep")
        for n in range(len(grids))
    ]
    if placed and has_place(path, grids[0]):
        number = level_for(affine, grids)
    else:
        sizes, shape = [one.open().whole for one in views], view.open().whole
        number = sizes.index(shape) if shape in sizes else 0
    return views[number], grids[number]


def level_for(affine: np.ndarray, grids: Sequence[np.ndarray]) -> int:
    """Return the coarsest level whose voxels are no larger than a grid's, else the finest."""
    steps = [np.abs(np.linalg.solve(grid, affine)[:3, :3]).max(axis=0) for grid in grids]
    fine = [number for number, step in enumerate(steps) if (step > 1 - TOLERANCE).all()]
    return max(fine, default=0)


def small(path: Path, what: str) -> Volume:
    """Read a file that is no larger than what statistics are taken of."""
    header = read_header(path)
    if header is None or np.prod(header.data.shape[1:], dtype=float) > MOST:
        reason = f"tells no size of at most {MOST} voxels, as {what} of a volume that stays"
        raise BrokenVolume(path, f"{reason} where it is has to: make it a store")
    return read_volume(path)


@dataclass(frozen=True)
class Counts:
    """What the cache knows of the voxels that count, see `Counted`.

    Args:
        nan: What becomes of NaN and infinity.
        lowest: Intensity of each channel that stands where nothing counts.
        path: The mask's file.
        mask: What opens the mask on its own grid, see `store.Stored`; None for none.
        matrix: Index of a voxel to index on that grid, 4 x 4.
        table: Values and their weights, see `masks.as_weights`.
    """

    nan: str
    lowest: Sequence[float]
    path: str = ""
    mask: Record | None = None
    matrix: Sequence[Sequence[float]] = ()
    table: Sequence[tuple[float, float]] | None = None

    @staticmethod
    def fits(record: object) -> bool:
        """Whether it can be made of it."""
        shape = {"nan": str, "lowest": [float], "path": str, "matrix": [[float]],
                 "table": ([[float]], None)}  # fmt: skip
        return isinstance(record, dict) and not misfit(record, shape) and "mask" in record

    def over(self, array: InPlace | Beside, mask: Numbers | None, name: str) -> Counted:
        """Return a volume of which these voxels count.

        Args:
            array: The volume.
            mask: Opened.
            name: Of the volume, for messages.
        """
        table = None if self.table is None else dict(self.table)
        on = None
        if self.mask is not None and mask is not None:
            size = self.mask["shape"][1:]
            on = OnGrid(mask, size, Path(self.path), np.array(self.matrix), table)
        return Counted(array, on, self.nan, self.lowest, name)
