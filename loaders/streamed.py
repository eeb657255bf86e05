"""Copies of stores that are larger than memory, made piece by piece as they are written.

What is measured is measured as of a volume that stays where it is, then each piece is turned,
resampled, cut and padded on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loaders.counted import Counted
from loaders.in_place import Bounds, Found, Sample, crop_box, size_of
from loaders.preprocess import WHOLE, Preprocess, Resampled, resampled_grid
from loaders.readers import (
    Beside,
    Boxes,
    BrokenVolume,
    InPlace,
    Reading,
    Volume,
    describe,
    is_store,
    mirrored,
    shifted,
    view_of,
)
from loaders.subjects import Subject
from loaders.texts import Record


class Source:
    """An array where it lies, or how much its voxels count, as a volume.

    Args:
        array: The array.
        header: What is known of its volume.
        weights: Whether it is asked for weights.
    """

    scale, offset = 1.0, 0.0

    def __init__(self, array: InPlace | Beside | Counted, header: Volume, weights: bool = False):
        self.array, self.affine, self.look, self.weights = (
            array,
            header.affine,
            header.look,
            weights,
        )
        self.shape: tuple[int, ...] = (1, *array.shape[1:]) if weights else array.shape
        self.dtype = np.dtype(np.float32) if weights else array.dtype

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Read a box."""
        if self.weights and isinstance(self.array, Counted):
            return self.array.weights(box[1:])
        return self.array[box]


class Part:
    """A box of a volume, padded at the far ends, computed where it is sliced.

    Args:
        source: The volume.
        low: First voxel of the box.
        held: Its voxels along each axis.
        pads: Voxels beyond them.
        reflected: Whether these are reflected; else they are 0.
    """

    scale, offset = 1.0, 0.0

    def __init__(
        self,
        source: Boxes,
        low: Sequence[int],
        held: Sequence[int],
        pads: Sequence[int],
        reflected: bool,
    ):
        self.source, self.low, self.held, self.reflected = source, low, held, reflected
        self.affine, self.look, self.dtype = shifted(source.affine, low), source.look, source.dtype
        sizes = [n + pad for n, pad in zip(held, pads, strict=True)]
        self.shape: tuple[int, ...] = (source.shape[0], *sizes)

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Compute a box."""
        wanted = [range(*one.indices(n)) for one, n in zip(box[1:], self.shape[1:], strict=True)]
        places = [mirrored(one, n) for one, n in zip(wanted, self.held, strict=True)]
        first = [int(place.min()) for place in places]
        ends = zip(places, first, self.low, strict=True)
        there = [slice(a + low, int(place.max()) + 1 + low) for place, a, low in ends]
        data = self.source[(box[0], *there)]
        for axis, (one, n) in enumerate(zip(wanted, self.held, strict=True)):
            if one.stop > n:
                data = data.take(places[axis] - first[axis], 1 + axis)
                if not self.reflected:
                    data.swapaxes(0, 1 + axis)[max(n - one.start, 0) :] = 0
        return data


def is_streamed(subject: Subject, reading: Reading) -> bool:
    """Whether a volume is copied piece by piece: of stores that would fill the memory."""
    if reading.in_place or not all(map(is_store, subject.paths)):
        return False
    try:
        image = describe(subject.paths[0])
        view = view_of(image, reading.level or 0, as_first(reading))
    except BrokenVolume:  # told when it is read, if it cannot be
        return False
    return size_of(view.open()) > WHOLE


def as_first(reading: Reading) -> Reading:
    """Return it for the first time point alone, whose size is that of all."""
    return replace(reading, volumes_4d="first", time_point=reading.time_point or 0)


@dataclass(frozen=True)
class Streamed:
    """A volume on the store's grid, computed where it is sliced.

    Args:
        data: Its numbers.
        weights: How much its voxels count; None for all alike.
        record: What undoes its preprocessing.
        step: Voxels of its grid, before the crop, for one of the sample's.
        grid: Voxels of that grid.
    """

    data: Part
    weights: Part | None
    record: Record
    step: np.ndarray
    grid: tuple[int, ...]


def streamed(
    found: Found, sample: Sample, bounds: Bounds, lowest: list[float], preprocess: Preprocess
) -> Streamed:
    """Prepare a volume as `to_store_grid` does, from a sample of it.

    Args:
        found: The volume where it lies, turned.
        sample: What stands for it.
        bounds: Foreground threshold in stored numbers, and the limit beyond which voxels are hot.
        lowest: Intensity of each channel where nothing counts.
        preprocess: What is done to it.
    """
    header, record = found.header, dict(found.record)
    array, counted = found.levels[0], None
    if isinstance(array, Counted):
        array = counted = Counted(array.array, array.mask, array.nan, lowest, array.name)
    sources: list[Boxes] = [Source(array, header)]
    if counted is not None:
        sources.append(Source(counted, header, weights=True))
    shape, step = array.shape[1:], sample.step
    if preprocess.spacing_mm is not None:
        grid, affine = resampled_grid(header, preprocess.spacing_mm)
        record["oriented_grid"] = [list(shape), header.affine.tolist()]
        record["resampled_grid"] = [list(grid), affine.tolist()]
        sources = [Resampled(one, grid, affine, label=n > 0) for n, one in enumerate(sources)]
        shape, step = grid, step * grid / np.array(shape)
    low, high = [0, 0, 0], list(shape)
    if preprocess.crop_foreground:
        spacing = np.linalg.norm(sources[0].affine[:3, :3], axis=0)
        margin = preprocess.crop_margin_mm / spacing
        low, high = crop_box(found.name, sample, bounds, step, shape, margin)
        record |= {"crop": [low, high], "crop_from": list(shape)}
    held = [b - a for a, b in zip(low, high, strict=True)]
    pads = [-n % preprocess.pad_to_multiple for n in held]
    if preprocess.pad_to_multiple > 1:
        record["pad_from"] = held
    data, *weights = (Part(one, low, held, pads, n == 0) for n, one in enumerate(sources))
    return Streamed(data, weights[0] if weights else None, record, step, tuple(shape))
