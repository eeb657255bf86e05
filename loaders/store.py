"""The cache of volumes: one uncompressed array per volume, read by memory map.

Each volume lies in the cache once, in its file's own dtype, C order, as `<key>.npy` with
`<key>.json` beside it; the key is a hash of the source's bytes and of the geometry part of the
preprocessing. Files appear by rename, array first and JSON last, so a volume with a JSON is whole.
Reading casts and normalizes in one go; changing the intensity mapping rebuilds nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loaders.preprocess import (
    PERCENTILES,
    Preprocess,
    from_store_grid,
    statistics,
    to_store_grid,
)
from loaders.readers import BrokenVolume, Volume, Volumes4D, num_items, read_volume
from loaders.splits import Subject, names_of

FORMAT = 1  # part of every key: raise it when what lies in the cache changes its meaning
NUM_POINTS = 1024  # foreground voxels remembered for the samplers
OPEN_VOLUMES = 128  # maps held open: 10,000 volumes must not need 10,000 file descriptors
QUICK = (0.0, 0.5, 1.0, 2.0, 5.0, 50.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)


@dataclass(frozen=True)
class Entry:
    """What a read needs to know about one volume."""

    subject: Subject
    key: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    start: int
    spacing_mm: tuple[float, float, float]
    # Of clip(stored * gain + bias, low, high), one value a channel.
    gain: np.ndarray
    bias: np.ndarray
    low: np.ndarray
    high: np.ndarray


class VolumeStore:
    """Volumes on disk as normalized float32 arrays; made by `VolumeStore.build`.

    Example:
        >>> store = VolumeStore.build(["a.nii.gz", "b.nii.gz"], "cache", Preprocess())
        >>> x = store.read(0)                                   # (C, X, Y, Z)
        >>> patch = store.read(0, (slice(0, 64), slice(0, 64), slice(0, 64)))
        >>> volume = store.undo(0, x)                           # original grid and intensities
    """

    def __init__(self, entries: Sequence[Entry], cache_dir: Path, preprocess: Preprocess,
                 skipped: Sequence[tuple[str, str, str]] = ()):  # fmt: skip
        self.entries = list(entries)
        self.cache_dir = Path(cache_dir)
        self.preprocess = preprocess
        self.skipped = list(skipped)  # (id, path, reason) of broken volumes
        self.array = lru_cache(OPEN_VOLUMES)(self._open)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "array"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.array = lru_cache(OPEN_VOLUMES)(self._open)

    @property
    def ids(self) -> list[str]:
        """Names of the volumes, in the store's order."""
        return [entry.subject.id for entry in self.entries]

    @property
    def num_channels(self) -> int:
        """Channels of every volume."""
        return self.entries[0].shape[0]

    @property
    def data_range(self) -> tuple[float, float]:
        """Lowest and highest value that `read` can return."""
        if self.preprocess.intensity == "unit":
            return 0.0, 1.0
        if self.preprocess.intensity == "symmetric":
            return -1.0, 1.0
        return (
            float(min(entry.low.min() for entry in self.entries)),
            float(max(entry.high.max() for entry in self.entries)),
        )

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(C, X, Y, Z) of a volume on the store's grid."""
        return self.entries[index].shape

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """Voxel size on the store's grid in millimeters."""
        return self.entries[index].spacing_mm

    def labels(self, index: int) -> dict[str, str]:
        """Return the manifest's further columns of a volume."""
        return self.entries[index].subject.labels

    def meta(self, index: int) -> dict[str, Any]:
        """Return what is known about a volume: affine, statistics, source and how to undo."""
        entry = self.entries[index]
        meta = json.loads((self.cache_dir / f"{entry.key}.json").read_text())
        return meta | {
            "id": entry.subject.id,
            "paths": [str(path) for path in entry.subject.paths],
            "labels": dict(entry.subject.labels),
            "spacing_mm": list(entry.spacing_mm),
            "preprocess": self.preprocess.to_dict(),
        }

    def subset(self, ids: Sequence[str]) -> VolumeStore:
        """Return a store of these volumes, in this order; unknown ids are left out as skipped."""
        by_id = {entry.subject.id: entry for entry in self.entries}
        skipped = {row[0] for row in self.skipped}
        missing = [id for id in ids if id not in by_id and id not in skipped]
        if missing:
            raise ValueError(f"no volume {missing[0]!r} in the data: the split is of other data")
        chosen = [by_id[id] for id in ids if id in by_id]
        return VolumeStore(chosen, self.cache_dir, self.preprocess, self.skipped)

    def read(self, index: int, slices: Sequence[slice] | None = None) -> np.ndarray:
        """Return normalized float32 voxels.

        Args:
            index: Which volume.
            slices: One slice per spatial axis (X, Y, Z); None for the whole volume.

        Returns:
            (C, *shape of the slices).
        """
        entry = self.entries[index]
        if slices is None:
            slices = (slice(None),) * 3
        shape = (len(range(*s.indices(n))) for s, n in zip(slices, entry.shape[1:], strict=True))
        out = np.empty((entry.shape[0], *shape), np.float32)
        self.read_into(index, slices, out)
        return out

    def read_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read as `read` into a float32 buffer (C, *shape of the slices)."""
        entry = self.entries[index]
        source = self.array(index)[(slice(None), *slices)]
        for channel in range(len(source)):
            target = out[channel]
            np.multiply(source[channel], entry.gain[channel], out=target, casting="unsafe")
            target += entry.bias[channel]
            np.clip(target, entry.low[channel], entry.high[channel], out=target)

    def _open(self, index: int) -> np.ndarray:
        """Map the stored numbers of a volume (C, X, Y, Z)."""
        entry = self.entries[index]
        descriptor = os.open(self.cache_dir / f"{entry.key}.npy", os.O_RDONLY)
        try:
            buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        flat = np.frombuffer(buffer, entry.dtype, num_items(entry.shape), entry.start)
        return flat.reshape(entry.shape)

    def undo(self, index: int, x: np.ndarray) -> Volume:
        """Invert the preprocessing: original intensities, grid and affine.

        What was clipped stays clipped; outside a foreground crop stands the lowest intensity.

        Args:
            index: Which volume `x` is of.
            x: Normalized (C, X, Y, Z) on the store's grid; channels may differ in number.

        Returns:
            Float32 intensities on the grid of the source file.
        """
        entry = self.entries[index]
        if tuple(x.shape[1:]) != tuple(entry.shape[1:]):
            raise ValueError(
                f"{entry.subject.id}: got {x.shape[1:]}, its store grid is {entry.shape[1:]}"
            )
        return undo(x, self.undo_record(index))

    def undo_record(self, index: int) -> dict[str, Any]:
        """Return all that the function `undo` needs for a volume, JSON-able, without the cache."""
        entry, meta = self.entries[index], self.meta(index)
        return {
            "gain": [float(v) for v in entry.gain],
            "bias": [float(v) for v in entry.bias],
            "scale": meta["scale"],
            "offset": meta["offset"],
            "affine": meta["affine"],
            "geometry": meta["undo"],
            "background": meta["statistics"][0]["min"],
        }

    def foreground_points(self, index: int) -> np.ndarray:
        """Return up to 1024 random foreground voxels (N, 3) of a volume."""
        return np.load(self.cache_dir / f"{self.entries[index].key}.points.npy")

    def write_skipped(self, folder: str | Path) -> None:
        """Write skipped.csv (id, path, reason) into a folder, if anything was skipped."""
        if self.skipped:
            import csv

            with open(Path(folder) / "skipped.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("id", "path", "reason"), *self.skipped])

    @classmethod
    def build(
        cls,
        subjects_or_paths: Sequence[Subject | str | Path],
        cache_dir: str | Path,
        preprocess: Preprocess | None = None,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        nan: Literal["error", "fill"] = "error",
        volumes_4d: Volumes4D = "error",
        threads: int | None = None,
        progress: bool = True,
    ) -> VolumeStore:
        """Bring every volume into the cache, each once, and open them.

        Any number of processes may build into one cache: one works, the others wait for it. What
        is already there is used; a cache that cannot be written to is fine if nothing is missing.

        Args:
            subjects_or_paths: Subjects of `find_subjects`, or paths.
            cache_dir: Folder of the cache; shared by runs and data sets.
            preprocess: What is done to each volume; None for the defaults.
            on_error: raise at the first broken file, or skip: list it and go on.
            nan: error refuses volumes with NaN or infinity; fill puts their lowest intensity.
            volumes_4d: error, channels or first, for 4D files.
            threads: Volumes built at once; None for one per core, 8 at most.
            progress: Show a bar on a terminal.
        """
        subjects = as_subjects(subjects_or_paths)
        preprocess = preprocess or Preprocess()
        cache_dir = Path(cache_dir).expanduser()
        builder = Builder(cache_dir, preprocess, nan, volumes_4d)
        known = builder.recall(subjects)
        missing = [subject for subject in subjects if subject.id not in known]
        skipped = []
        if missing:
            try:
                cache_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{cache_dir}: {error.strerror} (data.cache_dir)") from error
            with exclusive(cache_dir):
                known |= builder.recall(missing)  # another process may have built them by now
                missing = [subject for subject in missing if subject.id not in known]
                made, skipped = builder.build_all(missing, on_error, threads, progress)
                known |= made
        for id, path, reason in skipped:
            print(f"skipped {id}: {path}: {reason}", file=sys.stderr)
        if skipped:
            print(f"{len(skipped)} of {len(subjects)} volumes skipped", file=sys.stderr)
        if not known:
            raise ValueError(f"none of the {len(subjects)} volumes can be read")
        entries = [
            open_entry(subject, known[subject.id], cache_dir, preprocess)
            for subject in subjects
            if subject.id in known
        ]
        channels = {entry.shape[0] for entry in entries}
        if len(channels) > 1:
            odd = next(entry for entry in entries if entry.shape[0] != entries[0].shape[0])
            raise ValueError(
                f"{odd.subject.paths[0]}: has {odd.shape[0]} channels, "
                f"{entries[0].subject.paths[0]} has {entries[0].shape[0]}"
            )
        return cls(entries, cache_dir, preprocess, skipped)


def undo(x: np.ndarray, record: dict[str, Any]) -> Volume:
    """Invert the preprocessing of a volume whose cache may be gone.

    Args:
        x: Normalized (C, X, Y, Z) on the store's grid; channels may differ in number.
        record: What `VolumeStore.undo_record` returned.
    """
    x = np.asarray(x, np.float32)
    data = np.empty_like(x)
    for channel in range(len(x)):
        which = min(channel, len(record["gain"]) - 1)
        stored = (x[channel] - np.float64(record["bias"][which])) / record["gain"][which]
        data[channel] = stored * record["scale"][which] + record["offset"][which]
    volume = Volume(data, np.array(record["affine"]))
    return from_store_grid(volume, record["geometry"], record["background"])


def as_subjects(subjects_or_paths: Sequence[Subject | str | Path]) -> list[Subject]:
    """Return subjects; paths are named relative to the folder that holds them all."""
    items = list(subjects_or_paths)
    if not items:
        raise ValueError("no volumes given")
    if all(isinstance(item, Subject) for item in items):
        return items
    paths = [Path(os.path.abspath(item)) for item in items]
    base = Path(os.path.commonpath([path.parent for path in paths]))
    return [Subject(id, (path,)) for id, path in zip(names_of(paths, base), paths, strict=True)]


def open_entry(
    subject: Subject, meta: dict[str, Any], cache_dir: Path, preprocess: Preprocess
) -> Entry:
    """Derive from a sidecar what a read needs."""
    mappings = []
    for channel, stats in enumerate(meta["statistics"]):

        def quantile(percent: float, channel=channel, stats=stats) -> float:
            if str(percent) in stats["percentiles"]:
                return stats["percentiles"][str(percent)]
            table = np.load(cache_dir / f"{meta['key']}.quantiles.npy")
            return float(table[channel][np.searchsorted(PERCENTILES, round(percent, 2) - 1e-6)])

        gain, bias, low, high = preprocess.mapping(stats, quantile)
        scale, offset = meta["scale"][channel], meta["offset"][channel]
        mappings.append((gain * scale, gain * offset + bias, low, high))
        if stats["max"] * gain + bias <= low or stats["min"] * gain + bias >= high:
            raise BrokenVolume(
                subject.paths[0],
                f"intensities {stats['min']:g} to {stats['max']:g} lie outside window_hu "
                f"{preprocess.window_hu}: are they Hounsfield units?",
            )
    return Entry(
        subject,
        meta["key"],
        tuple(meta["shape"]),
        np.dtype(meta["dtype"]),
        meta["start"],
        tuple(meta["spacing_mm"]),
        *(np.array(column, np.float32) for column in zip(*mappings, strict=True)),
    )


# --------------------------------------------------------------------------------------------------
# Building.


class Builder:
    """Brings volumes into a cache.

    Args:
        cache_dir: The cache.
        preprocess: Its geometry decides what is stored.
        nan: error or fill.
        volumes_4d: error, channels or first.
    """

    def __init__(self, cache_dir: Path, preprocess: Preprocess, nan: str, volumes_4d: Volumes4D):
        self.cache_dir, self.preprocess = cache_dir, preprocess
        self.nan, self.volumes_4d = nan, volumes_4d
        self.recipe = json.dumps([FORMAT, preprocess.geometry(), nan, volumes_4d], sort_keys=True)
        self.digests: dict[str, list] = {}

    def recall(self, subjects: Sequence[Subject]) -> dict[str, dict[str, Any]]:
        """Return the sidecars of the volumes that lie in the cache whole and up to date."""
        if not self.cache_dir.is_dir():
            return {}
        try:
            self.digests |= json.loads((self.cache_dir / "sources.json").read_text())
        except FileNotFoundError:
            return {}
        found = {}
        for subject in subjects:
            if all(self.remembered(path) for path in subject.paths):
                meta = self.sidecar(self.key(subject))
                if meta is not None:
                    found[subject.id] = meta
        return found

    def remembered(self, path: Path) -> bool:
        """Whether the digest of a file is known and its size and time are still the same."""
        known = self.digests.get(os.path.abspath(path))
        return known is not None and known[:-1] == stamp(path)

    def key(self, subject: Subject) -> str:
        """Name of a volume in the cache: a hash of its bytes and of the geometry."""
        parts = []
        for path in subject.paths:
            if not self.remembered(path):
                before = stamp(path)
                self.digests[os.path.abspath(path)] = [*before, digest(path)]
            parts.append(self.digests[os.path.abspath(path)][-1])
        text = "\n".join([self.recipe, *parts])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def sidecar(self, key: str) -> dict[str, Any] | None:
        """Read a sidecar; None where the volume is missing or torn."""
        try:
            meta = json.loads((self.cache_dir / f"{key}.json").read_text())
            if os.path.getsize(self.cache_dir / f"{key}.npy") == meta["num_bytes"]:
                return meta
        except (FileNotFoundError, ValueError, KeyError):
            pass  # not built, or torn by a crash of the machine: it is built again
        return None

    def build_all(
        self, subjects: Sequence[Subject], on_error: str, threads: int | None, progress: bool
    ) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str, str]]]:
        """Build volumes in parallel; return their sidecars and the (id, path, reason) skipped."""
        made, skipped = {}, []
        threads = threads or min(8, len(os.sched_getaffinity(0)))
        for leftover in self.cache_dir.glob(".*.part"):  # we hold the lock: their maker is dead
            leftover.unlink(missing_ok=True)
        pool = ThreadPoolExecutor(threads, "store")
        try:
            tasks = [(subject, pool.submit(self.build_one, subject)) for subject in subjects]
            for subject, task in progress_bar(tasks, "caching volumes", progress):
                try:
                    made[subject.id] = task.result()
                except BrokenVolume as error:
                    if on_error == "raise":
                        raise
                    skipped.append((subject.id, error.path, error.reason))
        finally:
            pool.shutdown(cancel_futures=True)
            self.write("sources.json", json.dumps(self.digests).encode())
        return made, skipped

    def build_one(self, subject: Subject) -> dict[str, Any]:
        """Read, check, preprocess and store one volume."""
        volume = read_subject(subject, self.volumes_4d)
        volume = storable(volume, subject.paths[0], self.nan)
        key = self.key(subject)
        if (meta := self.sidecar(key)) is not None:  # the same bytes under another name
            return meta
        channels = len(volume.data)
        scale = np.full(channels, volume.scale)
        offset = np.full(channels, volume.offset)
        stats, tables = [], []
        for channel in range(channels):
            found, table = statistics(
                volume.data[channel], float(scale[channel]), float(offset[channel])
            )
            if found["min"] == found["max"]:
                raise BrokenVolume(subject.paths[0], f"all voxels are {found['min']:g}")
            quick = np.searchsorted(PERCENTILES, np.array(QUICK) - 1e-6)
            found["percentiles"] = {
                str(p): float(table[i]) for p, i in zip(QUICK, quick, strict=True)
            }
            stats.append(found)
            tables.append(table)
        threshold = (stats[0]["foreground_threshold"] - offset[0]) / scale[0]
        stored, undo = to_store_grid(volume, self.preprocess, threshold)
        data = stored.data
        header = npy_header(data)
        meta = {
            "key": key,
            "shape": list(data.shape),
            "dtype": data.dtype.str,
            "start": len(header),
            "num_bytes": len(header) + data.nbytes,
            "affine": stored.affine.tolist(),
            "spacing_mm": list(stored.spacing_mm),
            "scale": [float(s) for s in scale],
            "offset": [float(o) for o in offset],
            "statistics": stats,
            "undo": undo,
        }
        points = foreground_points(data[0], threshold, scale[0] > 0, int(key[:8], 16))
        self.write(f"{key}.points.npy", npy_header(points), points)
        table = np.array(tables)
        self.write(f"{key}.quantiles.npy", npy_header(table), table)
        self.write(f"{key}.npy", header, data)
        self.write(f"{key}.json", json.dumps(meta).encode())
        return meta

    def write(self, name: str, header: bytes, data: np.ndarray | None = None) -> None:
        """Write a file so that it appears whole or not at all."""
        temporary = self.cache_dir / f".{name}.{os.getpid()}.part"
        try:
            with open(temporary, "wb") as file:
                file.write(header)
                for part in () if data is None else data.reshape(-1, *data.shape[-2:]):
                    file.write(np.ascontiguousarray(part).data)
            os.replace(temporary, self.cache_dir / name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"{self.cache_dir}: disk full while writing the cache: make room or set "
                    f"data.cache_dir to another disk; what is whole stays and is used again"
                ) from error
            raise ValueError(f"{self.cache_dir}: {error.strerror} (data.cache_dir)") from error
        finally:
            temporary.unlink(missing_ok=True)


def read_subject(subject: Subject, volumes_4d: Volumes4D) -> Volume:
    """Read the files of a subject; several become channels and must share one grid."""
    volumes = [read_volume(path, volumes_4d) for path in subject.paths]
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


def storable(volume: Volume, path: Path, nan: str) -> Volume:
    """Return native byte order and at most 4 bytes a voxel; NaN and infinity as the policy says."""
    data = volume.data
    kind, size = data.dtype.kind, data.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # what overflows float32 is told below
            data = data.astype(np.float32, copy=False)
        finite = np.isfinite(data)
        if not finite.all():
            bad = data.size - int(finite.sum())
            if nan == "error" or not finite.any():
                raise BrokenVolume(
                    path, f"{bad} voxels are NaN or infinite: set data.nan to fill to allow it"
                )
            data = np.where(finite, data, data[finite].min())
    elif kind == "b":
        data = data.view(np.uint8)
    elif size == 8 or (kind == "u" and size == 4):
        low, high = int(data.min()), int(data.max())
        fits = low >= -(2**31) and high < 2**31
        data = data.astype(np.int32 if fits else np.float32)
    data = data.astype(data.dtype.newbyteorder("="), copy=False)
    return Volume(data, volume.affine, volume.scale, volume.offset)


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


def npy_header(data: np.ndarray) -> bytes:
    """Return the header of a C-order .npy file for an array in any layout."""
    import io

    from numpy.lib import format as npy

    buffer = io.BytesIO()
    fields = {"descr": data.dtype.str, "fortran_order": False, "shape": tuple(data.shape)}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def stamp(path: Path) -> list:
    """Size and time of a file, or of all files of a DICOM folder: changed files are seen by it."""
    try:
        if path.is_dir():
            found = [[e.name, e.stat().st_size, e.stat().st_mtime_ns] for e in os.scandir(path)]
            return sorted(found)
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    except OSError as error:
        raise BrokenVolume(path, error.strerror) from error


def digest(path: Path) -> str:
    """Hash of a file's bytes, with those of a detached header's voxels or of a whole folder."""
    hasher = hashlib.blake2b(digest_size=16)
    files = [path]
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.is_file())
    elif path.suffix.lower() in (".hdr", ".mhd", ".nhdr"):
        files = sorted(p for p in path.parent.iterdir() if p.stem == path.stem and p.is_file())
    for file in files:
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


def progress_bar(tasks: list, title: str, show: bool) -> Iterator:
    """Iterate with a bar on a terminal, silently elsewhere."""
    if not (show and sys.stderr.isatty()):
        yield from tasks
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(tasks, title, console=Console(stderr=True), transient=True)
