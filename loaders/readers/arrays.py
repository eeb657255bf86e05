"""Arrays that are read piece by piece where they lie; the only importer of tensorstore.

Zarr (versions 2 and 3, shards too) is read by tensorstore, on disk, from S3, Google's buckets or
the web: a read fetches the chunks that it touches, at once, and tries again where the network
fails; behind other URLs by zarr-python, see `remote`. HDF5 is read by h5py, tiles of TIFF by
`tiff`, through tensorstore's cache of chunks.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from loaders.readers import remote
from loaders.readers.tiff import Tiles, is_tiff_store
from loaders.readers.volume import BrokenVolume, url_of
from loaders.readers.voxels import FETCHED, require_number

if TYPE_CHECKING:
    import h5py
    import tensorstore

SCHEMES = ("s3", "gs", "http", "https")  # that tensorstore knows
HDF5 = (".h5", ".hdf5", ".hdf", ".ims")
ZARR = ".zarr"
OPEN_FILES = 128  # of TIFF that are kept open
CACHE_GB = 1.0  # chunks kept by a process, where nobody says how many
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "5s"}  # half a minute in all
# What readers raise for a store that is damaged, gone, forbidden or written by codecs unknown here.
ERRORS = (ValueError, OSError, LookupError, NotImplementedError, RuntimeError, TypeError)

# A server that says nothing for so long is one that failed; tensorstore's own patience has no end.
PATIENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}

LINE = 64  # bytes of a cache line
# Held while something is made that threads share: two that ask at once would get a cache each.
SHARING = RLock()

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Traffic:
    """What was read of volumes that stay where they are.

    Args:
        num_bytes: From disk or network, as stored; of HDF5, and of TIFF that is not compressed, the
            decoded ones.
        hits: Chunks that were still in memory.
        misses: Chunks that were not.
    """

    num_bytes: int = 0
    hits: int = 0
    misses: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Both together."""
        misses = self.misses + other.misses
        return Traffic(self.num_bytes + other.num_bytes, self.hits + other.hits, misses)

    def __sub__(self, before: Traffic) -> Traffic:
        """What came since."""
        misses = self.misses - before.misses
        return Traffic(self.num_bytes - before.num_bytes, self.hits - before.hits, misses)


def traffic() -> Traffic:
    """All that this process has read so far."""
    tensorstore = sys.modules.get("tensorstore")
    others = FETCHED.num_bytes
    if tensorstore is None:
        return Traffic(others)
    found = {"bytes_read": others, "hit_count": 0, "miss_count": 0}
    for place in ("kvstore", "cache"):
        for one in tensorstore.experimental_collect_matching_metrics(f"/tensorstore/{place}/"):
            name = one["name"].rpartition("/")[2]
            if name in found:
                found[name] += sum(value["value"] for value in one["values"])
    return Traffic(*found.values())


def scheme_of(url: str) -> str:
    """Return what stands before the colon of a URL."""
    return url.partition(":")[0]


def split_dataset(path: Path | str) -> tuple[Path, str] | None:
    """Take `file.h5:/path/of/dataset` apart, of a URL too; None for what is not such."""
    file, mark, name = str(path).rpartition(":/")
    if mark and file.lower().endswith(HDF5):
        return Path(file), name
    return None


def is_store(path: Path | str) -> bool:
    """Whether a path names an array or image that can be read in place.

    Its name tells, of a TIFF the tags of its first page.
    """
    parts = Path(path).parts
    folder = any(part.lower().endswith(ZARR) for part in parts)
    named = folder or url_of(path) is not None or split_dataset(path) is not None
    return named or is_tiff_store(path)


@dataclass(frozen=True)
class Place:
    """Where an array lies.

    Args:
        driver: zarr (version 2), zarr3, hdf5 or tiff.
        where: Folder, URL or file.
        name: Path of the array in it, of a TIFF its level; empty where it is the folder itself.
    """

    driver: str
    where: str
    name: str = ""

    def __str__(self) -> str:
        if self.driver == "hdf5":
            return f"{self.where}:/{self.name}"
        return f"{self.where}/{self.name}" if self.name else self.where

    def open(self, cache_gb: float = CACHE_GB) -> Array:
        """Open it; `BrokenVolume` where that cannot be.

        Args:
            cache_gb: Gigabytes of decoded chunks of zarr and TIFF that a process keeps, of all
                arrays together.
        """
        kind: type[Array] = ZarrArray
        if self.driver == "hdf5":
            kind = Hdf5Array
        elif self.driver == "tiff":
            kind = TiffArray
        elif (url := url_of(self.where)) and scheme_of(url) not in SCHEMES:
            kind = RemoteArray
        try:
            found = kind(self, cache_gb)
        except BrokenVolume:
            raise
        except ERRORS as error:
            raise BrokenVolume(str(self), f"cannot be opened: {reason(error)}") from error
        require_number(Path(str(self)), found.dtype)
        return found


class ZarrArray:
    """A zarr array.

    Args:
        place: Where it lies.
        cache_gb: See `Place.open`.
    """

    def __init__(self, place: Place, cache_gb: float):
        ts = require_tensorstore(place.where)
        spec = {
            "driver": place.driver,
            "kvstore": key_value_store(str(place)),
            # What an open file holds is not asked for again at each read.
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        self.place = place
        with SHARING:
            shared = context(cache_gb)
        self.array: tensorstore.TensorStore = ts.open(
            spec, read=True, open=True, context=shared
        ).result()
        self.shape: tuple[int, ...] = tuple(self.array.shape)
        self.dtype = np.dtype(self.array.dtype.numpy_dtype)
        self.chunks: tuple[int, ...] = tuple(self.array.chunk_layout.read_chunk.shape)

    def read(self, index: Index) -> np.ndarray:
        """Read what an index of numbers and slices names."""
        return read_chunks(self.place, self.array[index])


def read_chunks(place: Place, wanted: tensorstore.TensorStore) -> np.ndarray:
    """Read a part of an array of tensorstore's."""
    try:
        out = spread(wanted.shape, np.dtype(wanted.dtype.numpy_dtype))
        require_tensorstore(place.where).array(out).write(wanted).result()
    except ERRORS as error:
        raise BrokenVolume(str(place), f"cannot be read: {reason(error)}") from error
    return out


def spread(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory for an array whose planes, along its last two axes, lie an odd number of cache lines
    apart.

    Axes come as Z, Y, X and patches are X, Y, Z: who goes along Z meets one line of each plane, and
    where planes are powers of two apart, as those of 64 x 64, the cache has room for few of these.
    A patch of 64^3 uint16 is turned in 0.24 ms, out of planes that follow each other in 1.04.
    """
    plane = math.prod(shape[-2:])
    lines = -(-plane * dtype.itemsize // LINE) | 1
    planes = np.empty((*shape[:-2], lines * LINE // dtype.itemsize), dtype)
    return planes[..., :plane].reshape(shape)


class RemoteArray:
    """A zarr array behind a URL that tensorstore does not know; without a cache of chunks."""

    def __init__(self, place: Place, _cache_gb: float):
        self.place = place
        self.array = remote.array(str(place))
        self.shape, self.chunks = tuple(self.array.shape), tuple(self.array.chunks)
        self.dtype = np.dtype(self.array.dtype)

    def read(self, index: Index) -> np.ndarray:
        """Read what an index of numbers and slices names."""
        with remote.telling(str(self.place)):
            return np.asarray(self.array[index])


class Hdf5Array:
    """A dataset of an HDF5 file, see `ZarrArray`; HDF5 keeps a small chunk cache of its own."""

    def __init__(self, place: Place, _cache_gb: float):
        self.place = place
        self.dataset = hdf5_dataset(Path(place.where), place.name)
        self.shape: tuple[int, ...] = tuple(self.dataset.shape)
        self.dtype = np.dtype(self.dataset.dtype)
        self.chunks: tuple[int, ...] = tuple(self.dataset.chunks or self.shape)

    def read(self, index: Index) -> np.ndarray:
        """Read what an index of numbers and slices names."""
        try:
            found = np.asarray(self.dataset[index])
        except ERRORS as error:
            raise BrokenVolume(str(self.place), f"cannot be read: {reason(error)}") from error
        FETCHED.add(found.nbytes)
        return found


class TiffArray:
    """One of the sizes of a TIFF, see `ZarrArray`: its tiles are kept like chunks of zarr."""

    def __init__(self, place: Place, cache_gb: float):
        self.place, version = place, version_of_file(place.where)
        with SHARING:
            self.tiles = tiles_of(place.where, int(place.name), version)
            if self.tiles.whole is None:
                self.array = in_chunks(self.tiles, cache_gb)
        self.shape, self.dtype = self.tiles.shape, self.tiles.dtype
        self.chunks = self.shape if self.tiles.whole is not None else self.tiles.chunks

    def read(self, index: Index) -> np.ndarray:
        """Read what an index of numbers and slices names."""
        if self.tiles.whole is not None:
            found = np.array(self.tiles.whole[index], self.dtype.newbyteorder("="))
            FETCHED.add(found.nbytes)
            return found
        return read_chunks(self.place, self.array[index])


@lru_cache(OPEN_FILES)
def tiles_of(file: str, level: int, _version: str) -> Tiles:
    """Open one of the sizes of a TIFF, once as long as the file stays as it is."""
    return Tiles(file, level)


@lru_cache(OPEN_FILES)
def in_chunks(tiles: Tiles, cache_gb: float) -> tensorstore.TensorStore:
    """Return the array of which tiles are the chunks; they go through the cache of all chunks."""
    ts = require_tensorstore(tiles.file)

    def read(domain: tensorstore.IndexDomain, out: np.ndarray, _how: object) -> None:
        out[...] = tiles.tile(domain.origin, out.shape)

    return ts.virtual_chunked(
        read,
        dtype=tiles.dtype.newbyteorder("="),
        shape=tiles.shape,
        chunk_layout=ts.ChunkLayout(read_chunk_shape=tiles.chunks),
        context=context(cache_gb),
    )


def version_of_file(where: str) -> str:
    """Return what changes whenever a file does."""
    if url := url_of(where):
        return remote.version_of(url)
    status = os.stat(where)
    return f"{status.st_size} {status.st_mtime_ns}"


Array = ZarrArray | RemoteArray | Hdf5Array | TiffArray


def hdf5_dataset(file: Path, name: str) -> h5py.Dataset:
    """Open a dataset; what the file holds instead is told."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{file}: HDF5 needs `pip install 'vae3d[zarr]'`") from error

    try:
        url = url_of(file)
        opened = h5py.File(remote.opened(url) if url else file, "r")
    except OSError as error:
        why = error.strerror or "is not HDF5, or damaged"
        raise BrokenVolume(file, str(why)) from error
    found = opened.get(name) if name else None
    if isinstance(found, h5py.Dataset):
        return found
    names: list[str] = []
    opened.visititems(
        lambda key, node: names.append(key) if isinstance(node, h5py.Dataset) else None
    )
    opened.close()
    there = ", ".join(f"{file.name}:/{key}" for key in names[:5]) or "none"
    raise BrokenVolume(f"{url or file}:/{name}", f"no such dataset; those of the file are {there}")


@lru_cache
def context(cache_gb: float) -> tensorstore.Context:
    """What all arrays of a process share: the cache of their chunks, and how often they retry."""
    return require_tensorstore("zarr").Context({
        "cache_pool": {"total_bytes_limit": round(cache_gb * 1e9)},
        "s3_request_retries": RETRIES,
        "gcs_request_retries": RETRIES,
        "http_request_retries": RETRIES,
    })  # fmt: skip


def key_value_store(where: str) -> dict[str, object] | str:
    """Return what tensorstore calls a folder or URL; another S3 server is `$AWS_ENDPOINT_URL`."""
    url = url_of(where)
    if url is None:
        return {"driver": "file", "path": f"{os.path.abspath(where)}/"}
    scheme, _, rest = url.partition("://")
    if scheme != "s3":
        return f"{url.rstrip('/')}/"
    bucket, _, path = rest.partition("/")
    spec: dict[str, object] = {"driver": "s3", "bucket": bucket, "path": f"{path.rstrip('/')}/"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if remote.unsigned():
        spec["aws_credentials"] = {"type": "anonymous"}
    elif os.environ.get("AWS_ACCESS_KEY_ID"):  # else all places are tried, and those told that fail
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def read_keys(where: str, keys: Sequence[str]) -> dict[str, tuple[bytes, str]]:
    """Return those small files of a folder or URL that exist, each with a mark of its version."""
    url = url_of(where)
    if url is None:
        files = {key: Path(where, key) for key in keys}
        there = {key: file for key, file in files.items() if file.is_file()}
        return {k: (file.read_bytes(), str(file.stat().st_mtime_ns)) for k, file in there.items()}
    if scheme_of(url) not in SCHEMES:
        return remote.read_files(url, keys)
    ts = require_tensorstore(where)
    try:
        store = ts.KvStore.open(key_value_store(where), context=context(CACHE_GB)).result()
        asked = {key: store.read(key) for key in keys}
        found = {key: one.result() for key, one in asked.items()}
    except ERRORS as error:
        why = f"cannot be read: {reason(error)}{remote.remedy(url, error)}"
        raise BrokenVolume(url, why) from error
    return {
        key: (bytes(one.value), one.stamp.generation.hex())
        for key, one in found.items()
        if one.state == "value"
    }


def reason(error: Exception) -> str:
    """Return what went wrong without where in a library's sources it did."""
    text = re.split(r" \[(?:source locations|tensorstore_spec|http_response_body)=", str(error))[0]
    return " ".join(text.split()) or type(error).__name__


def require_tensorstore(path: str) -> ModuleType:
    """Import tensorstore, or say how to get it."""
    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)
    try:
        import tensorstore
    except ImportError as error:
        raise ValueError(f"{path}: is read by tensorstore: `pip install 'vae3d[zarr]'`") from error
    return tensorstore
