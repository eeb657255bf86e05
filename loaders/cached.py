"""Files of the cache: what they hold, and how they appear whole."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loaders.counted import Counts
from loaders.readers import Boxes, Cut, Look, View, Volume
from loaders.readers.volume import SLAB
from loaders.texts import Record, misfit
from loaders.whole import whole_file

# What a sidecar holds; see `loaders.texts.misfit`. By `ALIKE` one value a channel.
ALIKE = ("scale", "offset", "statistics")
ROBUST = {"hot_voxels": int, "foreground_fraction": float, "foreground_percentiles": {str: float}}
MEASURED = {
    **{name: float for name in ("min", "max", "foreground_threshold", "foreground_mean")},
    "foreground_std": float,
    "percentiles": {str: float},
}
SIDECAR = {
    "key": str,
    "scale": [float],
    "offset": [float],
    "statistics": [MEASURED],
    "affine": [[float]],
    "spacing_mm": [float],
    "undo": {"source_shape": [int], "source_affine": [[float]]},
    "file": str,
    "shape": [int],
    "dtype": str,
    "start": int,
    "num_bytes": int,
}
IN_CHUNKS = {"chunks": [int], "lead": [int]}  # and of a volume that is read in chunks
ROWS = 32  # of a volume are written at a time, or as many as `SLAB` bytes have


def num_bytes(path: Path) -> int:
    """Size of an array in the cache; of a folder, which appears whole, that of its metadata."""
    return os.path.getsize(path / "zarr.json" if path.is_dir() else path)


def is_sidecar(meta: object) -> bool:
    """Whether what a file held is all that a volume in the cache needs, whoever wrote it."""
    if not isinstance(meta, dict) or misfit(meta, SIDECAR):
        return False
    channels = {len(meta[name]) for name in ALIKE} | {meta["shape"][0]}
    robust = [stats["robust"] for stats in meta["statistics"] if "robust" in stats]
    if not all(stats["percentiles"] for stats in meta["statistics"]):
        return False
    if not fits_in_place(meta):
        return False
    if "counts" in meta and not (
        Counts.fits(meta["counts"]) and fits_in_place(meta["counts"]["mask"] or {})
    ):
        return False
    if "cut" in meta["undo"] and not Cut.fits(meta["undo"]["cut"]):
        return False
    if "look" in meta and not Look.fits(meta["look"]):  # which old ones lack
        return False
    return len(channels) == 1 and not (
        misfit(robust, [ROBUST]) or misfit(meta.get("notes", []), [str])
    )


def fits_in_place(record: Record) -> bool:
    """Whether what opens an array is sound as far as it is read in chunks."""
    views = record.get("views", [])
    if not isinstance(views, list) or not all(map(View.fits, views)):
        return False
    return not ({"views", "chunks"} & record.keys() and misfit(record, IN_CHUNKS))


def write_whole(path: Path, header: bytes, arrays: Iterable[np.ndarray] = ()) -> None:
    """Write a file of the cache so that it appears whole or not at all.

    Args:
        path: Target.
        header: First bytes.
        arrays: In any layout, written in C order.
    """
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            file.write(header)
            for data in arrays:
                file.write(in_c_order(data).data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise ValueError(
                f"{path.parent}: disk full while writing the cache: make room or set "
                f"data.cache_dir to another disk; what is whole stays and is used again"
            ) from error
        raise ValueError(f"{path.parent}: {error.strerror} (data.cache_dir)") from error


def rows_of(volume: Boxes) -> Iterator[np.ndarray]:
    """Compute a volume in C order, as many rows at a time as take little memory."""
    if isinstance(volume, Volume):
        yield volume.data
        return
    count, x, y, z = volume.shape
    step = max(ROWS, SLAB // (y * z * volume.dtype.itemsize))
    for channel in range(count):
        for low in range(0, x, step):
            rows = slice(low, min(low + step, x))
            yield volume[(slice(channel, channel + 1), rows, slice(None), slice(None))]


def in_c_order(data: np.ndarray) -> np.ndarray:
    """Return an array (..., X, Y, Z) in C order, turned plane by plane inside the caches.

    Files run along X; turning a volume at once would touch a cache line for each voxel.
    """
    if data.flags.c_contiguous or data.ndim < 3:
        return np.ascontiguousarray(data)
    out = np.empty(data.shape, data.dtype)
    # Along the axis between the fastest of the source and the fastest of the target.
    fastest = min(range(data.ndim - 3, data.ndim), key=lambda axis: abs(data.strides[axis]))
    between = -3 if fastest == data.ndim - 2 else -2
    source, target = np.moveaxis(data, between, 0), np.moveaxis(out, between, 0)
    for number in range(len(source)):
        target[number] = source[number].copy(order="K")
    return out


def npy_header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    """Return the header of a C-order .npy file."""
    from numpy.lib import format as npy

    buffer = io.BytesIO()
    fields = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@contextmanager
def exclusive(cache_dir: Path) -> Iterator[None]:
    """Hold the cache's lock; it ends with its process, so a killed build blocks nobody."""
    try:
        import fcntl
    except ImportError:  # Windows: files still appear whole; two builds may do the same work
        yield
        return
    try:
        file = open(cache_dir / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"{cache_dir}: volumes are missing and the cache is not writable ({error.strerror}): "
            f"run `vae3d prepare` with write access or set data.cache_dir"
        ) from error
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print(f"waiting for another process that fills {cache_dir}", file=sys.stderr)
                    told = True
                time.sleep(0.1)
            except OSError:  # a file system without locks: same as on Windows
                break
        yield
