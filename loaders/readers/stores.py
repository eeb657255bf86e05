"""Volumes in stores: (C, X, Y, Z) as a view of an array that stays where it is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loaders.readers.arrays import CACHE_GB, Place
from loaders.readers.axes import luminance
from loaders.readers.ngff import Image, describe
from loaders.readers.options import Reading
from loaders.readers.volume import RGB, Box, BrokenVolume, Cut, Volume, box_of, shifted
from loaders.readers.voxels import are_headers_alone
from loaders.texts import misfit

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class View:
    """How an array becomes a volume (C, X, Y, Z).

    Args:
        place: Where the array lies.
        axes: A letter of TCXYZ for each of its axes.
        time: Which time point.
        channels: Which channels; one that is told several times is read once for each.
        box: First voxel and the one behind the last along each of XYZ; None for the whole.
        order: The axis of XYZ that lies along each axis of the volume.
        flips: Whether it runs the other way.
        pads: Voxels that the volume has beyond the far end of each axis, reflected.
        nan: What becomes of NaN and infinity: error, fill or keep.
        fill: What stands in their place; None for the lowest that was read with them.
        gray: Whether the channels are red, green and blue of which gray is made.
    """

    place: Place
    axes: str
    time: int
    channels: tuple[int, ...]
    box: Box | None = None
    order: tuple[int, ...] = (0, 1, 2)
    flips: tuple[bool, ...] = (False, False, False)
    pads: tuple[int, ...] = (0, 0, 0)
    nan: str = "error"
    fill: float | None = None
    gray: bool = False

    @property
    def as_rgb(self) -> bool:
        """Whether one channel is taken for red, green and blue alike."""
        return len(self.channels) == 3 and len(set(self.channels)) == 1

    @staticmethod
    def fits(record: object) -> bool:
        """Whether `of` can take it."""
        shape = {
            "place": {"driver": str, "where": str, "name": str},
            "axes": str, "time": int, "channels": [int], "order": [int], "flips": [bool],
            "pads": [int], "box": ([[int]], None), "nan": str, "fill": (float, None),
            "gray": bool,
        }  # fmt: skip
        return (
            isinstance(record, dict) and record.keys() == shape.keys() and not misfit(record, shape)
        )

    @classmethod
    def of(cls, record: dict) -> View:
        """Take it from plain values, as JSON holds them."""
        lists = {name: tuple(record[name]) for name in ("channels", "order", "flips", "pads")}
        box = record["box"] and tuple(map(tuple, record["box"]))
        return cls(**{**record, **lists, "box": box, "place": Place(**record["place"])})

    def turned(self, order: Sequence[int], flips: Sequence[bool]) -> View:
        """Return the view with its axes turned, as `preprocess.orient` does with voxels."""
        return replace(
            self,
            order=tuple(self.order[axis] for axis in order),
            flips=tuple(bool(flip) for flip in flips),
        )

    def cropped(self, low: Sequence[int], high: Sequence[int]) -> View:
        """Return the view of a box of the volume, from `low` to the voxel before `high`."""
        box = dict(zip(self.order, self.open().box, strict=True))
        for axis, flip, a, b in zip(self.order, self.flips, low, high, strict=True):
            start, stop = box[axis]
            box[axis] = (stop - b, stop - a) if flip else (start + a, start + b)
        return replace(self, box=tuple(box[axis] for axis in range(3)))

    def open(self, cache_gb: float = CACHE_GB) -> InPlace:
        """Open the array."""
        return InPlace(self, cache_gb)


class InPlace:
    """An array that is indexed like a volume (C, X, Y, Z); any thread may read it.

    Args:
        view: Which array, and how it is seen.
        cache_gb: See `Place.open`.

    Attributes:
        chunks: Voxels that are read at once, along X, Y, Z.
        lead: Voxels of the first chunk that lie before the volume.
    """

    def __init__(self, view: View, cache_gb: float = CACHE_GB):
        self.view, self.array = view, view.place.open(cache_gb)
        axes = view.axes
        if len(axes) != len(self.array.shape):
            count = len(self.array.shape)
            raise BrokenVolume(str(view.place), f"has {count} axes, its metadata name {axes}")
        sizes = dict(zip(axes, self.array.shape, strict=True))
        steps = dict(zip(axes, self.array.chunks, strict=True))
        for letter, wanted in (("T", (view.time,)), ("C", view.channels)):
            if max(wanted) >= sizes.get(letter, 1):
                kind = {"T": "time point", "C": "channel"}[letter]
                have = sizes.get(letter, 1)
                raise BrokenVolume(
                    str(view.place), f"has {have} {kind}s, {kind} {max(wanted)} is asked for"
                )
        self.whole = tuple(sizes.get(letter, 1) for letter in "XYZ")
        box = dict(zip("XYZ", view.box or [(0, n) for n in self.whole], strict=True))
        self.letters = tuple("XYZ"[axis] for axis in view.order)
        self.box = tuple(box[letter] for letter in self.letters)
        self.held = tuple(stop - start for start, stop in self.box)
        x, y, z = (n + pad for n, pad in zip(self.held, view.pads, strict=True))
        self.shape: Shape = (1 if view.gray else len(view.channels), x, y, z)
        self.chunks = tuple(steps.get(letter, 1) for letter in self.letters)
        known = zip(self.box, view.flips, self.chunks, strict=True)
        self.lead = tuple((-stop if flip else start) % size for (start, stop), flip, size in known)
        self.dtype = stored_dtype(self.array.dtype)

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Read the chunks that a box touches."""
        ranges = [range(*one.indices(n)) for one, n in zip(slices, self.shape, strict=True)]
        held = zip(ranges[1:], self.held, strict=True)
        if any(wanted.stop > n for wanted, n in held):
            return self.reflected(slices[0], ranges[1:])
        seen = self.view.channels
        picked = seen if self.view.gray else [seen[c] for c in ranges[0]]
        parts = [self.read(slice(run[0], run[-1] + 1), ranges[1:]) for run in consecutive(picked)]
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.view.gray:
            data = luminance(data.transpose(1, 2, 3, 0))[..., 0][None]
        view, data = self.view, data.astype(self.dtype, copy=False)
        return finite(data, view.nan, view.fill, str(view.place), ranges[1:])

    def reflected(self, channels: slice, ranges: Sequence[range]) -> np.ndarray:
        """Read a box that leaves what is held, which is reflected at its far ends."""
        places = [mirrored(wanted, n) for wanted, n in zip(ranges, self.held, strict=True)]
        lows = [int(place.min(initial=n)) for place, n in zip(places, self.held, strict=True)]
        box = [slice(low, int(place.max(initial=-1)) + 1)
               for low, place in zip(lows, places, strict=True)]  # fmt: skip
        data = self[(channels, *box)]
        for axis, (place, low) in enumerate(zip(places, lows, strict=True), start=1):
            data = data.take(place - low, axis)
        return data

    def read(self, channels: slice, ranges: Sequence[range]) -> np.ndarray:
        """Read neighboring channels in a box of the view."""
        index: dict[str, int | slice] = {"T": self.view.time, "C": channels}
        seen = zip(self.letters, ranges, self.view.flips, self.box, strict=True)
        for letter, inside, flip, (first, end) in seen:
            low, high = inside.start, max(inside.start, inside.stop)
            ends = (end - high, end - low) if flip else (first + low, first + high)
            index[letter] = slice(*ends)
        data = self.array.read(tuple(index[letter] for letter in self.view.axes))
        axes = self.view.axes.replace("T", "")
        for letter in "CXYZ":
            if letter not in axes:
                axes, data = axes + letter, data[..., None]
        data = data.transpose([axes.index(letter) for letter in ("C", *self.letters)])
        flipped = tuple(1 + axis for axis, flip in enumerate(self.view.flips) if flip)
        return np.ascontiguousarray(np.flip(data, flipped)) if flipped else data


class Beside:
    """Arrays of one grid, the channels of each after those of the one before; see `InPlace`.

    What tells of chunks is of the first.

    Args:
        arrays: Of volumes of one shape.
    """

    def __init__(self, arrays: Sequence[InPlace]):
        self.arrays, first = arrays, arrays[0]
        self.chunks, self.lead, self.held = first.chunks, first.lead, first.held
        _, x, y, z = first.shape
        self.shape: Shape = (sum(one.shape[0] for one in arrays), x, y, z)
        kinds = {one.dtype for one in arrays}
        self.dtype = first.dtype if len(kinds) == 1 else np.dtype(np.float32)

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Read the chunks that a box touches, of each array."""
        low, high, _ = slices[0].indices(self.shape[0])
        parts, start = [], 0
        for array in self.arrays:
            inside = slice(max(low - start, 0), max(high - start, 0))
            if low < start + array.shape[0] and high > start:
                parts.append(array[(inside, *slices[1:])].astype(self.dtype, copy=False))
            start += array.shape[0]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def beside(views: Sequence[View], cache_gb: float = CACHE_GB) -> InPlace | Beside:
    """Open views of one grid as channels of one volume."""
    arrays = [view.open(cache_gb) for view in views]
    return arrays[0] if len(arrays) == 1 else Beside(arrays)


def mirrored(wanted: range, n: int) -> np.ndarray:
    """Return where voxels lie of which those beyond the n-th are reflected, as `np.pad` does."""
    place = np.array(wanted) % max(2 * (n - 1), 1)
    return np.where(place < n, place, 2 * (n - 1) - place)


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """At most 4 bytes a voxel, and native: what `build.storable` makes of voxels it has seen."""
    if dtype.kind == "f" or dtype.itemsize == 8 or (dtype.kind == "u" and dtype.itemsize == 4):
        return np.dtype(np.float32)
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def consecutive(numbers: Sequence[int]) -> list[list[int]]:
    """Cut numbers into runs of neighbors."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in groups]


def finite(
    data: np.ndarray, nan: str, lowest: float | None, name: str, ranges: Sequence[range]
) -> np.ndarray:
    """Hold voxels to `data.nan`: filled, or an error that says where.

    Args:
        data: Voxels of a box.
        nan: The option.
        lowest: What fills; None for the lowest of the box.
        name: Of the volume, for messages.
        ranges: The box.
    """
    if data.dtype.kind != "f" or nan == "keep" or (sound := np.isfinite(data)).all():
        return data
    if nan != "fill":
        box = ", ".join(f"[{r.start}, {r.stop}]" for r in ranges)
        raise BrokenVolume(
            name, f"voxels in {box} are NaN or infinite: set data.nan to fill or to mask"
        )
    if lowest is None:
        lowest = data[sound].min() if sound.any() else 0.0
    return np.where(sound, data, np.float32(lowest))


def times_of(image: Image, reading: Reading) -> int:
    """How many samples a store is: its time points, where each is one."""
    if "T" not in image.axes or reading.time_point is not None or reading.volumes_4d != "samples":
        return 1
    return image.levels[0].place.open().shape[image.axes.index("T")]


def view_of(image: Image, level: int, reading: Reading, time: int | None = None) -> View:
    """Return how a level of an image is seen as its metadata and the options say.

    Args:
        image: What its metadata tell.
        level: Which of its sizes.
        reading: Chooses channels and time.
        time: The time point of a sample; None where a store is one sample.
    """
    name = image.path
    if level >= len(image.levels):
        have = f"has {len(image.levels)} levels, level {level} is asked for (data.level)"
        raise BrokenVolume(name, f"{have}; they count from 0")
    place = image.levels[level].place
    shape = dict(zip(image.axes, place.open().shape, strict=False))
    times = shape.get("T", 1)
    if time is None:
        time = reading.time_point
    if time is None and times > 1 and reading.volumes_4d != "first":
        how = "choose one by data.time_point, or set data.volumes_4d to first or samples"
        raise BrokenVolume(name, f"has {times} time points: {how}")
    channels = chosen(image, count := shape.get("C", 1) - image.alpha, reading)
    if reading.color == "rgb" and len(channels) == 1:
        channels *= 3
    gray = reading.color == "gray" and channels == (0, 1, 2) and is_colored(image, count)
    sizes = [shape.get(letter, 1) for letter in "XYZ"]
    box = box_of(name, sizes, reading.region) if reading.region is not None else None
    return View(place, image.axes, time or 0, channels, box, nan=reading.nan, gray=gray)


def is_colored(image: Image, count: int) -> bool:
    """Whether the channels of an image are red, green and blue."""
    told = [color for _, color in image.look.channels[:3]]
    return count == 3 and told == [color for _, color in RGB]


def chosen(image: Image, count: int, reading: Reading) -> tuple[int, ...]:
    """Return the channels that are read, by number or by the name that the metadata give them."""
    if reading.channels is None:
        return tuple(range(count))
    names = [label for label, _ in image.look.channels]
    found = []
    for wanted in map(str, reading.channels):
        number = names.index(wanted) if wanted in names else None
        number = int(wanted) if number is None and wanted.isdigit() else number
        if number is None or number >= count:
            have = f"{count} channels" + (f" ({', '.join(names)})" if any(names) else "")
            raise BrokenVolume(image.path, f"has {have}, none is {wanted} (data.channels)")
        found.append(number)
    return tuple(found)


def view_written(folder: Path, channels: int) -> View:
    """Return the finest level of a store as `write_ome_zarr` writes it."""
    place = Place("zarr3", os.path.abspath(folder), "0")
    return View(place, "CZYX", 0, tuple(range(channels)), nan="keep")


def look_of_view(image: Image, view: View) -> Volume:
    """Return what the metadata say of a view, its voxels all zero and without memory."""
    opened = view.open()
    level = next(one for one in image.levels if one.place == view.place)
    named = image.look.channels
    names = () if view.gray else tuple(named[c] for c in view.channels if c < len(named))
    look = replace(image.look, channels=RGB if view.as_rgb else names)
    data = np.broadcast_to(np.zeros((), opened.dtype), opened.shape)
    header = Volume(data, level.affine, notes=image.notes, look=look)
    if view.box is None:
        return header
    corner = tuple(start for start, _ in view.box)
    return replace(header, affine=shifted(level.affine, corner), cut=Cut(corner, opened.whole))


def read_store(path: Path, reading: Reading) -> Volume:
    """An image in a store, read whole; time points one after the other within each channel."""
    image = describe(path)
    count = times_of(image, reading)
    level = reading.level or 0
    views = [view_of(image, level, reading, time if count > 1 else None) for time in range(count)]
    header = look_of_view(image, views[0])
    if are_headers_alone():
        channels, *grid = header.data.shape
        zero = header.data[:1, :1, :1, :1]
        return replace(header, data=np.broadcast_to(zero, (channels * count, *grid)))
    whole = (slice(None),) * 4
    read = [replace(view, nan="keep").open()[whole] for view in views]  # see `build.storable`
    data = np.stack(read, axis=1).reshape(-1, *read[0].shape[1:])
    return replace(header, data=data)
