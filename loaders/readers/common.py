"""What all readers share: a volume, an error that names a file, and the bytes of the voxels.

A reader parses the header, says where the voxels lie, and `read_voxels` fetches them. Nothing is
allocated before the header's claim is held against the bytes on disk, and a compressed stream is
read to its end and checked, so a damaged file is a `BrokenVolume` with its reason, never zeros.
"""

from __future__ import annotations

import bz2
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol, cast, get_args, get_origin, get_type_hints

import numpy as np

from loaders.texts import misfit

# ITK, DICOM, NRRD and MetaImage count millimeters towards left and posterior; we count in RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Deflate cannot expand more than 1032-fold; an image with any content stays far below.
MAX_EXPANSION = 800
LARGE = 64 * 2**20
CHUNK = 2**18
LFS, POINTER = b"version https://git-lfs", "is a Git LFS pointer: run `git lfs pull`"
SLAB = 64 * 2**20  # bytes of a volume that are written at a time

NaN = Literal["error", "fill", "mask"]
Volumes4D = Literal["error", "channels", "first", "samples"]
Color = Literal["error", "gray", "rgb"]
Stacks = Literal["files", "folder"]


class Tally:
    """Counts what the threads of a process have read.

    Attributes:
        num_bytes: So far.
    """

    def __init__(self) -> None:
        self.num_bytes, self.lock = 0, Lock()

    def add(self, num_bytes: int) -> None:
        """Count some more."""
        with self.lock:
            self.num_bytes += num_bytes


FETCHED = Tally()  # of HDF5 and TIFF that stay where they are; tensorstore counts its own


@dataclass(frozen=True)
class Dicom:
    """How DICOM slices become a volume where their headers leave a choice.

    Args:
        tolerance_mm: How far a slice may lie off the even grid of its volume in millimeters; a
            quarter of the distance of slices at most.
        gaps: Slices that are missing or unevenly spaced: error, resample (interpolate between
            neighbors) or longest (keep the longest part without a gap).
        series: Folders that hold several series: error, largest (the one with most slices) or all
            (each is a volume, named by its description).
    """

    tolerance_mm: float = 0.1
    gaps: Literal["error", "resample", "longest"] = "error"
    series: Literal["error", "largest", "all"] = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance_mm < math.inf:
            raise ValueError(f"data.dicom.tolerance_mm is {self.tolerance_mm}: use 0 or more")
        if self.gaps not in ("error", "resample", "longest"):
            raise ValueError(f"data.dicom.gaps is {self.gaps!r}: use error, resample or longest")
        if self.series not in ("error", "largest", "all"):
            raise ValueError(f"data.dicom.series is {self.series!r}: use error, largest or all")


@dataclass(frozen=True)
class Reading:
    """How files are read where more than one answer is right.

    Args:
        nan: NaN or infinite voxels: error, fill (with the volume's lowest intensity) or mask (they
            are filled and count nothing).
        volumes_4d: 4D files: error, channels (each volume a channel), first, or samples (each time
            point is a volume of its own, all of one person).
        dicom: Tolerance, gaps and several series of DICOM.
        color: Pictures: all gray, all rgb, or as they are, and a mixture is an error.
        stacks: TIFF and PNG slices: files (each is one image), or a folder of them is one volume.
        missing: A subject that lacks one of its files: error, skip, or zero (channels of zeros).
        mask: Which voxels count: a manifest column of files, or a pattern beside the image, such as
            `{name}_mask.nii.gz`. Its values are weights; what is 0 is neither seen nor counted.
        mask_weights: Weights of the values of masks, e.g. {0: 0.1, 1: 1}; null for the values.
        in_place: Whether zarr, HDF5 and large TIFF stay where they are and patches are read out of
            them; else they are copied into the cache like other files.
        level: Of zarr and TIFF with several sizes: which, from 0, the finest; null for the one
            whose voxels are `preprocess.spacing_mm`, else 0.
        channels: Of what stays: which channels, by number or name; null for all.
        time_point: Of what stays: which time point, from 0; null for what `volumes_4d` says.
        region: Part of each volume that is read, [[x0, x1], [y0, y1], [z0, z1]] in voxels of its
            file (of the level), x1 apart; null for the whole.
    """

    nan: NaN = "error"
    volumes_4d: Volumes4D = "error"
    dicom: Dicom = field(default_factory=Dicom)
    color: Color = "error"
    stacks: Stacks = "files"
    missing: Literal["error", "skip", "zero"] = "error"
    mask: str | None = None
    mask_weights: dict[int, float] | None = None
    in_place: bool = True
    level: int | None = None
    channels: list[int | str] | None = None
    time_point: int | None = None
    region: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.region is not None and not is_box(self.region):
            raise ValueError(
                f"data.region is {self.region!r}: give [[x0, x1], [y0, y1], [z0, z1]] in voxels, "
                f"each from 0 on and the first below the second"
            )
        for name, kinds in get_type_hints(type(self)).items():
            value, literal = getattr(self, name), get_origin(kinds) is Literal
            if literal and value not in get_args(kinds):
                raise ValueError(f"data.{name} is {value!r}: use {', '.join(get_args(kinds))}")
        if not isinstance(self.mask, str | None) or not isinstance(self.mask_weights, dict | None):
            raise ValueError(f"data.mask is {self.mask!r} with weights {self.mask_weights!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Reading:
        """Take from a record what it tells; what it does not know has its default."""
        known = {name: told[name] for name in cls.names() if name in told}
        if isinstance(known.get("dicom"), Mapping):  # a record holds plain values
            try:
                known["dicom"] = Dicom(**known["dicom"])
            except TypeError as error:
                raise ValueError(f"data.dicom is damaged ({error})") from error
        return cls(**known)

    def chosen(self) -> dict[str, object]:
        """Return, as plain values, the options that are not at their defaults."""
        default = asdict(Reading())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def of_stores(self) -> list[str]:
        """Return the options that choose a part of a store, and of no other file."""
        names = ("level", "channels", "time_point")
        return [name for name in names if getattr(self, name) is not None]

    def masked(self, mask: str | None) -> Reading:
        """Return it with other masks, `trained` for its own."""
        return self if mask == "trained" else replace(self, mask=mask, mask_weights=None)


READING = Reading()


def is_box(region: Sequence[Sequence[int]]) -> bool:
    """Whether it is three pairs of whole numbers from 0 on, each rising."""
    try:
        (x0, x1), (y0, y1), (z0, z1) = region
    except (TypeError, ValueError):
        return False
    ends = (x0, x1, y0, y1, z0, z1)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in ends)
    return whole and 0 <= x0 < x1 and 0 <= y0 < y1 and 0 <= z0 < z1


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


# --------------------------------------------------------------------------------------------------
# Bytes: every voxel of every format passes through `read_voxels`.


def inflaters() -> tuple[Callable, tuple[type[Exception], ...]]:
    """Return the class that inflates, and its errors: isal's, 2.5 times as fast, where it is there.

    Both check the CRC and the length in the trailer.
    """
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.decompressobj, (zlib.error, OSError)
    error = cast(type[Exception], isal_zlib.error)  # its stub says an instance
    return isal_zlib.decompressobj, (error, zlib.error, OSError)


def decompressed(path: Path, codec: str, start: int = 0) -> Iterator[bytes]:
    """Yield the decompressed chunks of a gzip, zlib or bzip2 stream and check it to its end."""
    inflate, errors = inflaters()
    new = {
        "gzip": lambda: inflate(wbits=31),
        "zlib": lambda: inflate(wbits=15),
        "bzip2": bz2.BZ2Decompressor,
    }[codec]
    with open(path, "rb") as file:
        file.seek(start)
        stream, rest = new(), file.read(CHUNK)
        while rest:
            try:
                chunk = stream.decompress(rest)  # a bit flip ends here, at the trailer at last
            except errors as error:
                raise BrokenVolume(path, f"damaged {codec} stream ({error})") from error
            if chunk:
                yield chunk
            rest = file.read(CHUNK)
            if stream.eof:
                rest = (stream.unused_data + rest).lstrip(b"\0")  # tapes pad with zeros
                if rest:
                    stream = new()  # a further gzip member
        if not stream.eof:
            raise BrokenVolume(path, f"truncated {codec} stream")


_headers_alone: ContextVar[bool] = ContextVar("headers_alone", default=False)


@contextmanager
def headers_alone() -> Iterator[None]:
    """Let `read_voxels` return zeros that take no memory: what headers claim, in no time."""
    token = _headers_alone.set(True)
    try:
        yield
    finally:
        _headers_alone.reset(token)


def are_headers_alone() -> bool:
    """Whether a reader that fetches voxels itself is to return zeros instead."""
    return _headers_alone.get()


def read_voxels(
    path: Path,
    dtype: np.dtype,
    count: int,
    *,
    start: int = 0,
    codec: str | None = None,
    stream_start: int = 0,
    trailing: int = 2**16,
) -> np.ndarray:
    """Read `count` items of `dtype` after the header's claim is held against the bytes on disk.

    Args:
        path: File that holds the voxels.
        dtype: Stored dtype with its byte order.
        count: Number of items that the header claims.
        start: Bytes before the voxels, counted after decompression.
        codec: None, gzip, zlib or bzip2.
        stream_start: Bytes of the file before the compressed stream.
        trailing: Bytes behind the voxels that are tolerated; more say that the header lies.

    Returns:
        One-dimensional array; a read-only map of the file where it is not compressed.
    """
    claimed, on_disk = count * dtype.itemsize, os.path.getsize(path)
    if count <= 0:
        raise BrokenVolume(path, "header claims no voxels")
    claim = np.broadcast_to(np.zeros((), dtype.newbyteorder("=")), count)
    if codec is None:
        if start < 0 or start + claimed > on_disk:
            raise BrokenVolume(
                path, f"header claims {start + claimed} bytes but the file holds {on_disk}"
            )
        if on_disk - start - claimed > trailing:
            extra = on_disk - start - claimed
            raise BrokenVolume(path, f"file holds {extra} bytes more than its header claims")
        return claim if _headers_alone.get() else np.memmap(path, dtype, "r", start, (count,))
    if claimed > max(LARGE, on_disk * MAX_EXPANSION):
        raise BrokenVolume(
            path,
            f"header claims {claimed} bytes but the {codec} stream of {on_disk} bytes cannot hold "
            f"an image of that size",
        )
    if _headers_alone.get():
        return claim
    if codec == "gzip" and (length_in_trailer(path) - start - claimed) % 2**32 > trailing:
        # Cut short, lying, or made of several members: count before memory is taken.
        held = 0
        for chunk in decompressed(path, codec, stream_start):
            held += len(chunk)
            if held > start + claimed + trailing:
                break
        refuse_length(path, held - start, claimed, trailing)
    # Pages of np.empty are committed as they are filled: a lying header costs what the file holds.
    out = np.empty(claimed, np.uint8)
    view, position = out.data, -start
    for chunk in decompressed(path, codec, stream_start):
        low, high = max(position, 0), min(position + len(chunk), claimed)
        if low < high:
            view[low:high] = chunk[low - position : high - position]
        position += len(chunk)
        if position > claimed + trailing:
            break
    refuse_length(path, position, claimed, trailing)
    return out.view(dtype)


def refuse_length(path: Path, held: int, claimed: int, trailing: int) -> None:
    """Raise unless a stream holds the voxels that its header claims, and little more."""
    if held > claimed + trailing:
        raise BrokenVolume(path, f"stream holds more than the {claimed} bytes of its header")
    if held < claimed:
        raise BrokenVolume(path, f"header claims {claimed} bytes but the stream holds {held}")


def length_in_trailer(path: Path) -> int:
    """Return what the end of a gzip stream says of its length, in bytes modulo 2^32."""
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def head(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file, decompressed where it is a gzip stream."""
    with open(path, "rb") as file:
        magic = file.read(2)
    if magic != b"\x1f\x8b":
        with open(path, "rb") as file:
            return file.read(num_bytes)
    with gzip.open(path) as file:
        return file.read(num_bytes)


def codec_of(path: Path) -> str | None:
    """Return gzip where the file's name says so and its first bytes agree, else None."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if path.suffix.lower() in (".gz", ".mgz") and not is_gzip:
        raise BrokenVolume(path, "is not a gzip stream")
    return "gzip" if is_gzip else None


def to_channels_first(path: Path, data: np.ndarray, volumes_4d: Volumes4D) -> np.ndarray:
    """(X, Y[, Z[, T or C ...]]) -> (C, X, Y, Z); more than one volume needs the user's leave.

    The fourth axis runs fastest over the channels: of a series of T volumes, `[t::T]` are those of
    time point t.
    """
    shape = data.shape + (1,) * (3 - data.ndim)
    data = data.reshape(*shape[:3], -1, order="F")  # (X, Y, Z, T)
    if data.shape[3] > 1 and volumes_4d == "error":
        size = "x".join(map(str, shape))
        raise BrokenVolume(
            path, f"is 4D ({size}): set volumes_4d to samples, channels or first to allow it"
        )
    if volumes_4d == "first":
        data = data[..., :1]
    return np.moveaxis(data, 3, 0)  # (C, X, Y, Z)


def split_series(path: Path) -> tuple[Path, str | None]:
    """Take `folder#1.2.3`, one DICOM series of a folder that holds several, apart.

    Returns:
        Folder and UID of the series; the path itself and None where it names a file or a folder.
    """
    folder, mark, series = str(path).rpartition("#")
    if mark and series and not os.path.lexists(path) and os.path.isdir(folder):
        return Path(folder), series
    return path, None


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


def from_axes(path: Path, data: np.ndarray, axes: str, reading: Reading) -> np.ndarray:
    """Bring named axes to (C, X, Y, Z).

    Args:
        path: The file, for the message.
        data: The voxels.
        axes: A letter an axis: X, Y, Z, C (channels), T (times), S (red, green, blue).
        reading: What becomes of colors and times.
    """
    if len(set(axes)) != len(axes) or not set(axes) <= set("XYZCTS"):
        raise BrokenVolume(path, f"axes {axes} are not understood")
    for name in "XYZ":
        if name not in axes:
            axes, data = axes + name, data[..., None]
    colors = "S" in axes
    if colors:
        data, axes = np.moveaxis(data, axes.index("S"), -1), axes.replace("S", "") + "S"
        if reading.color == "gray" and data.shape[-1] == 3:
            data = luminance(data)
    order = [axes.index(name) for name in "XYZ"]
    others = [i for i in range(data.ndim) if i not in order]
    times = 1
    if reading.volumes_4d == "samples":  # time before channels
        others.sort(key=lambda i: axes[i] != "T")
        times = data.shape[axes.index("T")] if "T" in axes else 1
    data = data.transpose(*order, *others)
    picture = colors and data.shape[2] == 1  # whose colors are channels without further leave
    data = to_channels_first(path, data, "channels" if picture else reading.volumes_4d)
    gray = len(data) == times
    return np.tile(data, (3, 1, 1, 1)) if reading.color == "rgb" and gray else data


def luminance(colors: np.ndarray) -> np.ndarray:
    """Gray (..., 1) of red, green and blue (..., 3), weighted by ITU-R BT.601 as Pillow does."""
    gray = colors @ np.array([[0.299], [0.587], [0.114]])
    return (np.rint(gray) if colors.dtype.kind in "iu" else gray).astype(colors.dtype)


def require_number(path: Path, dtype: np.dtype, name: str = "") -> None:
    """Raise unless one voxel is one real number that numpy computes with."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise BrokenVolume(
            path, f"voxels are {name or dtype} (RGB, complex or structured): convert to one number"
        )


def num_items(shape: tuple[int, ...]) -> int:
    """Product in Python integers: a lying header must not overflow."""
    count = 1
    for n in shape:
        count *= int(n)
    return count
