"""The bytes of voxels: those of every format pass through `read_voxels`.

A reader parses the header, says where the voxels lie, and `read_voxels` fetches them. Nothing is
allocated before the header's claim is held against the bytes on disk, and a compressed stream is
read to its end and checked, so a damaged file is a `BrokenVolume` with its reason, never zeros.
"""

from __future__ import annotations

import bz2
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np

from loaders.readers.volume import BrokenVolume

# Deflate cannot expand more than 1032-fold; an image with any content stays far below.
MAX_EXPANSION = 800
LARGE = 64 * 2**20
CHUNK = 2**18
LFS, POINTER = b"version https://git-lfs", "is a Git LFS pointer: run `git lfs pull`"


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


def split_series(path: Path) -> tuple[Path, str | None]:
    """Take `folder#1.2.3`, one DICOM series of a folder that holds several, apart.

    Returns:
        Folder and UID of the series; the path itself and None where it names a file or a folder.
    """
    folder, mark, series = str(path).rpartition("#")
    if mark and series and not os.path.lexists(path) and os.path.isdir(folder):
        return Path(folder), series
    return path, None


def require_number(path: Path, dtype: np.dtype, name: str = "") -> None:
    """Raise unless one voxel is one real number that numpy computes with."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise BrokenVolume(
            path, f"voxels are {name or dtype} (RGB, complex or structured): convert to one number"
        )
