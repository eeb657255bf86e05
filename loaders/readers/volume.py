"""A volume in memory, its place in space and in its file, and the errors that name a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from loaders.texts import misfit

# ITK, DICOM, NRRD and MetaImage count millimeters towards left and posterior; we count in RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SLAB = 64 * 2**20  # bytes of a volume that are written at a time
URL = re.compile(r"([a-z][a-z0-9+-]+):/+(.*)", re.DOTALL)


def url_of(path: Path | str) -> str | None:
    """Return the URL that a path stands for (`Path` makes one of its two slashes), else None."""
    found = URL.fullmatch(str(path))
    if found is None:
        return None
    return f"{found[1]}:{'///' if found[1] == 'file' else '//'}{found[2]}"


class BrokenVolume(ValueError):
    """A file that cannot be trusted; the message is one line with the file and the reason.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str):
        self.path, self.reason = url_of(path) or str(path), " ".join(str(reason).split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type[BrokenVolume], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class MissingFile(BrokenVolume):
    """One of a subject's files is not there, others are."""


# Of lengths in files, as `Look` has them; pixels of no known size count as 1 mm.
UNIT_MM = {"mm": 1.0, "um": 1e-3, "nm": 1e-6, "px": 1.0}


@dataclass(frozen=True)
class Look:
    """What a file knows of how people see its volume.

    Args:
        space: body (the affine says where right, front and head are), picture (rows run down, as on
            a screen; no place in a body) or array (neither).
        unit: Of lengths in the file: mm, um or nm, and px where it knows no size.
        channels: Name and color (`rrggbb`) of each channel, empty where the file does not say;
            no entries where it does not even call them channels.
    """

    space: Literal["body", "picture", "array"] = "body"
    unit: str = "mm"
    channels: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def fits(record: object) -> bool:
        """Whether `of` can take it."""
        shape = {"space": str, "unit": str, "channels": [[str]]}
        if not isinstance(record, dict) or misfit(record, shape) or record.keys() != shape.keys():
            return False
        known = record["space"] in ("body", "picture", "array") and record["unit"] in UNIT_MM
        return known and all(len(channel) == 2 for channel in record["channels"])

    @classmethod
    def of(cls, record: dict) -> Look:
        """Take it from plain values, as JSON holds them."""
        return cls(**{**record, "channels": tuple(map(tuple, record["channels"]))})


RGB: tuple[tuple[str, str], ...] = (("red", "ff0000"), ("green", "00ff00"), ("blue", "0000ff"))
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """Where a volume lay in that of its file, of which `data.region` is a part.

    Args:
        corner: Its first voxel.
        shape: Voxels of the file's volume along X, Y, Z.
    """

    corner: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def fits(record: object) -> bool:
        """Whether `of` can take it."""
        return misfit(record, {"corner": [int], "shape": [int]}) is None

    @classmethod
    def of(cls, record: dict) -> Cut:
        """Take it from plain values, as JSON holds them."""
        return cls(tuple(record["corner"]), tuple(record["shape"]))


@dataclass
class Volume:
    """A volume as its file holds it; intensity = data * scale + offset.

    Args:
        data: Stored numbers (C, X, Y, Z) in the file's own dtype.
        affine: 4x4, voxel index -> RAS+ millimeters.
        scale: Slope from stored numbers to intensities.
        offset: Intercept from stored numbers to intensities.
        notes: What the reader had to assume, each to be said after the file's name.
        missing: Channels whose file was not there: all zeros.
        weights: How much each voxel counts, (1, X, Y, Z); None for all alike.
        look: How people see it.
        cut: Where it lay in a larger one; None for all that its file holds.
    """

    data: np.ndarray
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    scale: float = 1.0
    offset: float = 0.0
    notes: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    weights: np.ndarray | None = None
    look: Look = Look()
    cut: Cut | None = None

    @property
    def file_grid(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape and affine of the volume that this one is a part of."""
        if self.cut is None:
            return self.data.shape[1:], self.affine
        return self.cut.shape, shifted(self.affine, [-n for n in self.cut.corner])

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths along X, Y, Z in millimeters."""
        x, y, z = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, X, Y, Z)."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the stored numbers."""
        return self.data.dtype

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Return the stored numbers of a box."""
        return self.data[box]

    def intensities(self) -> np.ndarray:
        """Return `data * scale + offset` as float32 (C, X, Y, Z)."""
        if self.scale == 1 and self.offset == 0:
            return self.data.astype(np.float32)
        return (self.data * np.float64(self.scale) + self.offset).astype(np.float32)


def shifted(affine: np.ndarray, corner: Sequence[int]) -> np.ndarray:
    """Return the affine of a grid that begins at another voxel."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.array(corner, float)
    return moved


def box_of(path: Path | str, shape: Sequence[int], region: Sequence[Sequence[int]]) -> Box:
    """Return a region as pairs; `BrokenVolume` where a volume of that shape does not hold it."""
    if any(stop > n for n, (_, stop) in zip(shape, region, strict=True)):
        size = " x ".join(map(str, shape))
        raise BrokenVolume(path, f"has {size} voxels, which data.region {list(region)} leaves")
    return tuple((start, stop) for start, stop in region)


def cut_out(path: Path, volume: Volume, region: Sequence[Sequence[int]]) -> Volume:
    """Return a part of a volume, a view in its place in space."""
    shape = volume.data.shape[1:]
    box = box_of(path, shape, region)
    corner = tuple(start for start, _ in box)
    data = volume.data[(slice(None), *(slice(*pair) for pair in box))]
    affine = shifted(volume.affine, corner)
    return replace(volume, data=data, affine=affine, cut=Cut(corner, shape))


class Boxes(Protocol):
    """A volume that is written piece by piece: a `Volume`, or one computed where it is sliced."""

    scale: float
    offset: float
    affine: np.ndarray
    look: Look

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, X, Y, Z)."""

    @property
    def dtype(self) -> np.dtype:
        """Of what slicing gives."""

    def __getitem__(self, box: tuple[slice, ...], /) -> np.ndarray: ...


def is_rgb(volume: Boxes) -> bool:
    """Whether a volume is what programs show as colors."""
    return volume.look.channels == RGB and volume.dtype in (np.uint8, np.uint16)


def slabs(volume: Boxes, channel: int) -> Iterator[np.ndarray]:
    """Numbers (X, Y, slices) of a channel, as many slices at a time as take little memory."""
    _, x, y, z = volume.shape
    step = max(1, SLAB // (x * y * volume.dtype.itemsize))
    for low in range(0, z, step):
        box = slice(channel, channel + 1), slice(None), slice(None), slice(low, min(low + step, z))
        yield volume[box][0]


def is_singular(affine: np.ndarray) -> bool:
    """Whether voxels have no volume: measured by that of a box with the same edges, in any unit."""
    edges = affine[:3, :3]
    box = np.prod(np.linalg.norm(edges, axis=0))
    return bool(box == 0 or abs(np.linalg.det(edges)) < 1e-6 * box)


def same_grid(
    shape: Sequence[int], affine: np.ndarray, other_shape: Sequence[int], other: np.ndarray,
    voxels: float = 0.1,
) -> bool:  # fmt: skip
    """Whether two grids have one shape and place: their corners agree within this part of a voxel.

    Measured in voxels, what is nothing for a head is not taken for nothing under a microscope.
    """
    if list(shape) != list(other_shape):
        return False
    corners = np.array([[*corner, 1.0] for corner in np.ndindex(2, 2, 2)]).T
    corners[:3] *= np.array(shape)[:, None] - 1
    moved = np.linalg.solve(affine, other @ corners)
    return bool(np.abs(moved - corners).max() <= voxels)


def check_one_grid(volumes: dict[Path, Volume]) -> None:
    """Refuse files of one subject that do not share a grid."""
    (path, first), *others = volumes.items()
    for other, volume in others:
        shapes = first.data.shape[1:], volume.data.shape[1:]
        if not same_grid(shapes[0], first.affine, shapes[1], volume.affine):
            raise BrokenVolume(other, f"does not share the grid of {path}")


def num_items(shape: tuple[int, ...]) -> int:
    """Product in Python integers: a lying header must not overflow."""
    count = 1
    for n in shape:
        count *= int(n)
    return count
