"""Filling the cache: read, check, preprocess and store each volume once, whatever else runs.

A volume's key is a hash of its source's bytes and of the recipe. Files appear by rename, the
sidecar last, so a volume with a sidecar is whole; one process builds and the others wait.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from loaders.compressed import compress
from loaders.masks import hide, read_weights
from loaders.preprocess import (
    PERCENTILES,
    Preprocess,
    label_to_store_grid,
    statistics,
    to_store_grid,
)
from loaders.readers import BrokenVolume, Reading, Volume, read_volume
from loaders.series import at_time, by_file
from loaders.subjects import Subject
from loaders.whole import sweep, whole_file

Task = TypeVar("Task")
Used = TypeVar("Used")

FORMAT = 1  # part of every key: raise it when what lies in the cache changes its meaning
NUM_POINTS = 1024  # voxels remembered for the samplers
QUICK = (0.0, 0.5, 1.0, 2.0, 5.0, 50.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)


class Builder:
    """Brings volumes into a cache.

    Args:
        cache_dir: The cache.
        preprocess: Its geometry decides what is stored.
        reading: How the files are read.
        backend: npy or blosc2.
        in_channels: Channels that the model takes; another number is refused before anything is
            stored. None takes any.
        num_slices: Neighboring slices that become channels.
    """

    def __init__(
        self,
        cache_dir: Path,
        preprocess: Preprocess,
        reading: Reading,
        backend: str = "npy",
        in_channels: int | None = None,
        num_slices: int = 1,
    ):
        self.cache_dir, self.preprocess = cache_dir, preprocess
        self.in_channels, self.num_slices = in_channels, num_slices
        self.reading, self.backend = reading, backend
        recipe = [FORMAT, preprocess.geometry(), reading.nan, reading.volumes_4d, backend]
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.digests: dict[str, list] = {}

    def recall(self, subjects: Sequence[Subject]) -> dict[str, dict[str, Any]]:
        """Return the sidecars of the volumes that lie in the cache whole and up to date."""
        if not self.cache_dir.is_dir():
            return {}
        try:
            self.digests |= json.loads((self.cache_dir / "sources.json").read_text())
        except (FileNotFoundError, ValueError, RecursionError):  # torn by a crash of the machine
            return {}
        found = {}
        for subject in subjects:
            if all(self.remembered(path) for path in sources(subject)):
                meta = self.sidecar(self.key(subject))
                if meta is not None:
                    self.check_channels(subject, meta["shape"][0])
                    found[subject.id] = meta
        return found

    def check_channels(self, subject: Subject, channels: int) -> None:
        """Refuse a volume that the model cannot take."""
        given = channels * self.num_slices
        if self.in_channels not in (None, given):
            raise ValueError(
                f"{subject.paths[0]}: gives {given} channels, the model takes {self.in_channels}:"
                f" --model.in_channels {given}"
            )

    def remembered(self, path: Path) -> bool:
        """Whether the digest of a file is known and its size and time are still the same."""
        known = self.digests.get(os.path.abspath(path))
        try:
            return known is not None and known[:-1] == stamp(path)
        except BrokenVolume:  # gone since: told when it is built
            return False

    def key(self, subject: Subject) -> str:
        """Name of a volume in the cache: a hash of its bytes, its mask's, and of the geometry."""
        parts = []
        for path in sources(subject):
            if not self.remembered(path):
                before = stamp(path)
                self.digests[os.path.abspath(path)] = [*before, digest(path)]
            parts.append(self.digests[os.path.abspath(path)][-1])
        if subject.mask:
            weights = (self.reading.mask_weights or {}).items()
            parts.append(f"masked {sorted((float(k), float(v)) for k, v in weights)}")
        if subject.time:
            parts.append(f"time point {subject.time.number} of {subject.time.count}")
        text = "\n".join([self.recipe, *parts])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def sidecar(self, key: str) -> dict[str, Any] | None:
        """Read a sidecar; None where the volume is missing or torn."""
        try:
            meta = json.loads((self.cache_dir / f"{key}.json").read_text())
            arrays = [part for part in (meta, meta.get("mask")) if part]
            sizes = [os.path.getsize(self.cache_dir / part["file"]) for part in arrays]
            if sizes == [part["num_bytes"] for part in arrays]:
                return meta
        except (FileNotFoundError, ValueError, KeyError, RecursionError):
            pass  # not built, or torn by a crash of the machine: it is built again
        return None

    def build_all(
        self, subjects: Sequence[Subject], on_error: str, threads: int | None, progress: bool
    ) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str, str]]]:
        """Build volumes in parallel; return their sidecars and the (id, path, reason) skipped."""
        made, skipped = {}, []
        threads = threads or num_threads()
        sweep(self.cache_dir)  # we hold the lock: their makers are dead
        pool = ThreadPoolExecutor(threads, "store")
        try:
            tasks = [
                (group, pool.submit(read_each, group, self.reading, self.build_one))
                for group in by_file(subjects)
            ]
            for group, task in progress_bar(tasks, "caching volumes", progress):
                for subject, found in zip(group, task.result(), strict=True):
                    if not isinstance(found, BrokenVolume):
                        made[subject.id] = found
                    elif on_error == "raise":
                        hint = "; --data.on_error skip leaves such volumes out"
                        hint *= len(subjects) > 1
                        raise BrokenVolume(found.path, found.reason + hint) from found
                    else:
                        skipped.append((subject.id, found.path, found.reason))
        finally:
            pool.shutdown(cancel_futures=True)
            write_whole(self.cache_dir / "sources.json", json.dumps(self.digests).encode())
        return made, skipped

    def build_one(self, subject: Subject, volume: Volume) -> dict[str, Any]:
        """Check, preprocess and store one volume, as it was read."""
        self.check_channels(subject, len(volume.data))
        volume = storable(volume, subject.paths[0], self.reading.nan)
        key = self.key(subject)
        if (meta := self.sidecar(key)) is not None:  # the same bytes under another name
            return meta
        counts = slice(None) if volume.weights is None else volume.weights[0] > 0
        channels = len(volume.data)
        scale = np.full(channels, volume.scale)
        offset = np.full(channels, volume.offset)
        stats, tables = [], []
        for channel in range(channels):
            found, table = statistics(
                volume.data[channel][counts], float(scale[channel]), float(offset[channel])
            )
            if found["min"] == found["max"]:
                raise BrokenVolume(subject.paths[0], f"all voxels are {found['min']:g}")
            quick = np.searchsorted(PERCENTILES, np.array(QUICK) - 1e-6)
            percentiles = {str(p): float(table[i]) for p, i in zip(QUICK, quick, strict=True)}
            stats.append({**found, "percentiles": percentiles})
            tables.append(table)
        threshold = (stats[0]["foreground_threshold"] - offset[0]) / scale[0]
        stored, undo = to_store_grid(volume, self.preprocess, threshold)
        data = stored.data
        meta = {
            "key": key,
            "affine": stored.affine.tolist(),
            "spacing_mm": list(stored.spacing_mm),
            "scale": [float(s) for s in scale],
            "offset": [float(o) for o in offset],
            "statistics": stats,
            "undo": undo,
        }
        if volume.weights is not None:
            mask = stored_weights(Volume(volume.weights, volume.affine), undo, data.shape[1:])
            meta["mask"] = None if (mask == 1).all() else self.write_array(f"{key}.mask", mask)
        points = foreground_points(data[0], threshold, scale[0] > 0, int(key[:8], 16))
        write_whole(self.cache_dir / f"{key}.points.npy", npy_header(points), points)
        table = np.array(tables)
        write_whole(self.cache_dir / f"{key}.quantiles.npy", npy_header(table), table)
        meta |= self.write_array(key, data)
        write_whole(self.cache_dir / f"{key}.json", json.dumps(meta).encode())
        return meta

    def write_array(self, name: str, data: np.ndarray) -> dict[str, str | int | list[int]]:
        """Write an array (C, X, Y, Z) as the backend does; return what opens it."""
        if self.backend == "blosc2":
            file, content, body = f"{name}.b2nd", compress(in_c_order(data)), None
        else:
            file, content, body = f"{name}.npy", npy_header(data), data
        write_whole(self.cache_dir / file, content, body)
        return {
            "file": file,
            "shape": list(data.shape),
            "dtype": data.dtype.str,
            "start": len(content),
            "num_bytes": len(content) + (data.nbytes if body is not None else 0),
        }


def sources(subject: Subject) -> list[Path]:
    """Return the files that a volume is made of."""
    return [*subject.paths, subject.mask] if subject.mask else list(subject.paths)


def stored_weights(weights: Volume, undo: dict, shape: tuple[int, ...]) -> np.ndarray:
    """Bring weights (1, X, Y, Z) from the source's grid to the store's; padding counts 0."""
    data = label_to_store_grid(weights, undo).data
    pads = [(0, n - m) for n, m in zip(shape, data.shape[1:], strict=True)]
    return np.pad(data, [(0, 0), *pads])


def write_whole(path: Path, header: bytes, data: np.ndarray | None = None) -> None:
    """Write a file of the cache so that it appears whole or not at all.

    Args:
        path: Target.
        header: First bytes.
        data: Array in any layout, written in C order.
    """
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            file.write(header)
            if data is not None:
                file.write(in_c_order(data).data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise ValueError(
                f"{path.parent}: disk full while writing the cache: make room or set "
                f"data.cache_dir to another disk; what is whole stays and is used again"
            ) from error
        raise ValueError(f"{path.parent}: {error.strerror} (data.cache_dir)") from error


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


def read_subject(subject: Subject, reading: Reading) -> Volume:
    """Read the files of a subject, all time points of them, and its mask."""
    volume = read_channels(subject, reading)
    if subject.mask is None:
        return volume
    times = subject.time.count if subject.time else 1
    return replace(volume, weights=read_weights(subject.mask, volume, times, reading))


def read_channels(subject: Subject, reading: Reading) -> Volume:
    """Read the files of a subject; several become channels and must share one grid."""
    volumes = [read_volume(path, reading) for path in subject.paths]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, volume in zip(subject.paths[1:], volumes[1:], strict=True):
        same = volume.data.shape[1:] == first.data.shape[1:]
        if not same or not np.allclose(volume.affine, first.affine, atol=1e-3):
            raise BrokenVolume(path, f"does not share the grid of {subject.paths[0]}")
    kinds = {(volume.data.dtype, volume.scale, volume.offset) for volume in volumes}
    if len(kinds) > 1:  # one array needs one dtype and scale
        return Volume(np.concatenate([v.intensities() for v in volumes]), first.affine)
    data = np.concatenate([volume.data for volume in volumes])
    return Volume(data, first.affine, first.scale, first.offset)


def read_each(
    group: Sequence[Subject], reading: Reading, use: Callable[[Subject, Volume], Used]
) -> list[Used | BrokenVolume]:
    """Read the files of subjects that share them, once, and use the volume of each in turn.

    Returns:
        What `use` returned for each subject, or the error that it, or reading, ended with.
    """
    try:
        whole = read_subject(group[0], reading)
    except BrokenVolume as error:
        return [error] * len(group)
    found: list[Used | BrokenVolume] = []
    for subject in group:
        try:
            found.append(use(subject, at_time(whole, subject.time)))
        except BrokenVolume as error:
            at = f"time point {subject.time.number}: " if subject.time else ""
            found.append(BrokenVolume(error.path, at + error.reason))
    return found


def storable(volume: Volume, path: Path, nan: str) -> Volume:
    """Return at most 4 bytes a voxel; NaN, infinity and what does not count as the policy says."""
    data, weights = volume.data, volume.weights
    kind, size = data.dtype.kind, data.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # what overflows float32 is told below
            data = data.astype(np.float32, copy=False)
    if nan == "mask":
        sound = np.isfinite(data).all(0, keepdims=True)
        weights = sound.astype(np.uint8) if weights is None else weights * sound
    if weights is not None:
        data = hide(data, weights, volume.scale > 0, path)
    if kind == "f":
        finite = np.isfinite(data)
        if not finite.all():
            bad = data.size - int(finite.sum())
            if bad == data.size:  # as float32; those of the file are not all, see `read_volume`
                raise BrokenVolume(path, "all voxels are beyond the range of float32")
            if nan == "error":
                raise BrokenVolume(
                    path,
                    f"{bad} voxels are NaN or infinite: set data.nan to fill or to mask",
                )
            data = np.where(finite, data, data[finite].min())
    elif kind == "b":
        data = data.view(np.uint8)
    elif size == 8 or (kind == "u" and size == 4):
        low, high = int(data.min()), int(data.max())
        fits = low >= -(2**31) and high < 2**31
        data = data.astype(np.int32 if fits else np.float32)
    return replace(volume, data=data, weights=weights)


def foreground_points(
    data: np.ndarray, threshold: float, above: bool, seed: int
) -> np.ndarray:  # fmt: skip
    """Draw up to NUM_POINTS voxels beyond the threshold, (N, 3) int32; at random, reproducibly."""
    rng = np.random.default_rng(seed)
    tries = rng.integers(0, data.shape, (NUM_POINTS * 16, 3))
    values = data[tuple(tries.T)]
    hits = tries[values > threshold if above else values < threshold][:NUM_POINTS]
    if len(hits) < NUM_POINTS // 16:  # a small object: look at every voxel
        hits = np.argwhere(data > threshold if above else data < threshold)
        hits = hits[rng.permutation(len(hits))[:NUM_POINTS]]
    return hits.astype(np.int32)


def draw_labels(
    label: Volume, record: dict[str, Any], path: Path, seed: int
) -> dict[int, np.ndarray]:
    """Draw up to NUM_POINTS voxels (N, 3) of each label, on the grid of the store."""
    if list(label.data.shape[1:]) != record["source_shape"]:
        raise BrokenVolume(path, f"label map is not on its volume's grid {record['source_shape']}")
    values = label_to_store_grid(label, record).data[0]
    rng = np.random.default_rng(seed)
    found = {}
    for name in np.unique(values):
        points = np.argwhere(values == name)
        found[int(name)] = points[rng.permutation(len(points))[:NUM_POINTS]].astype(np.int32)
    return found


def npy_header(data: np.ndarray) -> bytes:
    """Return the header of a C-order .npy file for an array in any layout."""
    from numpy.lib import format as npy

    buffer = io.BytesIO()
    fields = {"descr": data.dtype.str, "fortran_order": False, "shape": tuple(data.shape)}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def files_of(path: Path) -> list[Path]:
    """Return the files a volume is read from: a DICOM folder's, or a header's and its voxels'."""
    if path.is_dir():
        return sorted(child for child in path.iterdir() if child.is_file())
    if path.suffix.lower() in (".hdr", ".mhd", ".nhdr"):
        stem = path.name[: -len(path.suffix)] + "."
        return sorted(child for child in path.parent.iterdir() if child.name.startswith(stem))
    return [path]


def stamp(path: Path) -> list:
    """Size and time of the files of a volume: a changed file is noticed by it."""
    try:
        statuses = [os.stat(file) for file in files_of(path)]
    except OSError as error:
        raise BrokenVolume(path, error.strerror or str(error)) from error
    return [[status.st_size, status.st_mtime_ns] for status in statuses]


def digest(path: Path) -> str:
    """Hash of the bytes of all files of a volume."""
    hasher = hashlib.sha256()  # twice as fast as blake2b where the processor knows it
    for file in files_of(path):
        with open(file, "rb") as stream:
            while chunk := stream.read(2**20):
                hasher.update(chunk)
    return hasher.hexdigest()


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


def num_threads() -> int:
    """Return how many volumes to read at once: one per core that is ours, 8 at most."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def progress_bar(tasks: list[Task], title: str, show: bool) -> Iterator[Task]:
    """Iterate with a bar on a terminal, silently elsewhere."""
    if not (show and sys.stderr.isatty()):
        yield from tasks
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(tasks, title, console=Console(stderr=True), transient=True)
