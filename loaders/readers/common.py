"""What all readers share: a volume, an error that names a file, and the bytes of the voxels.

A reader parses the header, says where the voxels lie, and `read_voxels` fetches them. Nothing is
allocated before the header's claim is held against the bytes on disk, and a compressed stream is
read to its end and checked, so a damaged file is a `BrokenVolume` with its reason, never zeros.
"""

from __future__ import annotations

import bz2
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

# ITK, DICOM, NRRD and MetaImage count millimeters towards left and posterior; we count in RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Deflate cannot expand more than 1032-fold; an image with any content stays far below.
MAX_EXPANSION = 800
LARGE = 64 * 2**20
CHUNK = 2**18

NaN = Literal["error", "fill", "mask"]
Volumes4D = Literal["error", "channels", "first", "samples"]


@dataclass(frozen=True)
class Reading:
    """How files are read where more than one answer is right.

    Args:
        nan: NaN or infinite voxels: error, fill (with the volume's lowest intensity) or mask (they
            are filled and count nothing).
        volumes_4d: 4D files: error, channels (each volume a channel), first, or samples (each time
            point is a volume of its own, all of one person).
        mask: Which voxels count: a manifest column of files, or a pattern beside the image, such as
            `{name}_mask.nii.gz`. Its values are weights; what is 0 is neither seen nor counted.
        mask_weights: Weights of the values of masks, e.g. {0: 0.1, 1: 1}; null for the values.
    """

    nan: NaN = "error"
    volumes_4d: Volumes4D = "error"
    mask: str | None = None
    mask_weights: dict[int, float] | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Reading:
        """Take from a record what it tells; what it does not know has its default."""
        return cls(**{name: told[name] for name in cls.names() if name in told})

    def masked(self, mask: str | None) -> Reading:
        """Return it with other masks, `trained` for its own."""
        return self if mask == "trained" else replace(self, mask=mask, mask_weights=None)


READING = Reading()


class BrokenVolume(ValueError):
    """A file that cannot be trusted; the message is one line with the file and the reason.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str):
        self.path, self.reason = str(path), " ".join(str(reason).split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type[BrokenVolume], tuple[str, str]]:
        return type(self), (self.path, self.reason)


@dataclass
class Volume:
    """A volume as its file holds it; intensity = data * scale + offset.

    Args:
        data: Stored numbers (C, X, Y, Z) in the file's own dtype.
        affine: 4x4, voxel index -> RAS+ millimeters.
        scale: Slope from stored numbers to intensities.
        offset: Intercept from stored numbers to intensities.
        weights: How much each voxel counts, (1, X, Y, Z); None for all alike.
    """

    data: np.ndarray
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    scale: float = 1.0
    offset: float = 0.0
    weights: np.ndarray | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths along X, Y, Z in millimeters."""
        x, y, z = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    def intensities(self) -> np.ndarray:
        """Return `data * scale + offset` as float32 (C, X, Y, Z)."""
        if self.scale == 1 and self.offset == 0:
            return self.data.astype(np.float32)
        return (self.data * np.float64(self.scale) + self.offset).astype(np.float32)


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
    if codec is None:
        if start < 0 or start + claimed > on_disk:
            raise BrokenVolume(
                path, f"header claims {start + claimed} bytes but the file holds {on_disk}"
            )
        if on_disk - start - claimed > trailing:
            extra = on_disk - start - claimed
            raise BrokenVolume(path, f"file holds {extra} bytes more than its header claims")
        return np.memmap(path, dtype, "r", start, (count,))
    if claimed > max(LARGE, on_disk * MAX_EXPANSION):
        raise BrokenVolume(
            path,
            f"header claims {claimed} bytes but the {codec} stream of {on_disk} bytes cannot hold "
            f"an image of that size",
        )
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
