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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from loaders.compressed import compress
from loaders.counted import Counted, Counts
from loaders.in_place import (
    Found,
    Sample,
    find_in_place,
    fitted,
    needs_copy,
    small_label_map,
    stays,
)
from loaders.masks import hide, nearest, read_weights, table_of
from loaders.preprocess import (
    Preprocess,
    Record,
    Statistics,
    by_rules,
    is_foreground,
    label_to_store_grid,
    statistics,
    to_store_grid,
)
from loaders.readers import (
    SLICES,
    ZARR,
    Boxes,
    BrokenVolume,
    Cut,
    Image,
    Look,
    MissingFile,
    Reading,
    View,
    Volume,
    as_store,
    beside,
    check_one_grid,
    describe,
    has_place,
    holds_dicom,
    is_store,
    is_there,
    num_items,
    ras_axes,
    read_volume,
    revision,
    split_series,
    url_of,
    view_written,
    volume_suffix,
    write_volume,
)
from loaders.series import at_time, by_file
from loaders.streamed import is_streamed, streamed
from loaders.subjects import Subject
from loaders.texts import misfit, read_json
from loaders.whole import sweep, whole_file, write_text

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
Result = TypeVar("Result")
Used = TypeVar("Used")

FORMAT = 1  # part of every key: raise it when what lies in the cache changes its meaning
# The same for what is read from DICOM: 2 has the rescale and the position of each slice.
DICOM_FORMAT = "dicom 2"
# Backups pass over such a folder, and so do we: https://bford.info/cachedir
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Volumes as vae3d keeps them.\n"
OF_STORES = ("in_place", "level", "channels", "time_point")  # options that no other volume knows
LINE_EVERY_S = 30.0  # in a log, while volumes are cached
SLAB, ROWS = 2**26, 32  # bytes of a volume that are written at a time, and its least rows
NUM_POINTS = 1024  # voxels remembered for the samplers


class Builder:
    """Brings volumes into a cache.

    Args:
        cache_dir: The cache.
        preprocess: Its geometry decides what is stored.
        reading: How the files are read.
        backend: npy, blosc2 or zarr.
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
        chosen = reading.chosen()  # options that came later: caches older than they stay valid
        apart = (
            "nan",
            "volumes_4d",
            "stacks",
            "missing",
            "mask",
            "mask_weights",
            *OF_STORES,
        )  # told already, or by the files
        later = {k: v for k, v in chosen.items() if k not in apart}
        recipe += [later] if later else []
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.digests: dict[str, list] = {}
        self.images: dict[Path, Image] = {}

    def recall(self, subjects: Sequence[Subject]) -> dict[str, dict[str, Any]]:
        """Return the sidecars of the volumes that lie in the cache whole and up to date."""
        if not self.cache_dir.is_dir():
            return {}
        try:
            known = read_json(self.cache_dir / "sources.json")
        except (FileNotFoundError, ValueError):  # torn by a crash of the machine
            return {}
        if misfit(known, {str: [([int], str)]}) is None:
            self.digests |= known
        found = {}
        for subject in subjects:
            if all(self.remembered(path) for path in self.files(subject)):
                meta = self.sidecar(self.key(subject))
                if meta is not None:
                    self.check_channels(subject, meta["shape"][0])
                    found[subject.id] = meta
        return found

    def check_channels(self, subject: Subject, channels: int) -> None:
        """Refuse a volume that the model cannot take."""
        given = channels * self.num_slices
        if self.in_channels not in (None, given):
            hint = color_hint(subject, {given, self.in_channels})
            raise ValueError(f"{subject.paths[0]}: {other_channels(given, self.in_channels)}{hint}")

    def files(self, subject: Subject) -> list[Path]:
        """Paths that a subject is read from; a missing one is among them where that is an error."""
        missing = missing_files(subject) if self.reading.missing == "zero" else []
        return [path for path in sources(subject) if path not in missing]

    def remembered(self, path: Path) -> bool:
        """Whether the digest of a file is known and its size and time are still the same."""
        if as_store(path, self.reading):
            try:
                self.image(path)
            except BrokenVolume:  # told when it is built
                return False
            return True
        if self.reading.of_stores():  # told when it is read
            return False
        path, _ = split_series(path)
        known = self.digests.get(os.path.abspath(path))
        try:
            return known is not None and known[:-1] == stamp(path)
        except BrokenVolume:  # gone since: told when it is built
            return False

    def image(self, path: Path) -> Image:
        """What a store says of itself; it is asked once, which may be over a network."""
        if path not in self.images:
            self.images[path] = describe(path)
        return self.images[path]

    def key(self, subject: Subject) -> str:
        """Name of a volume in the cache: a hash of its bytes, its mask's, and of the geometry.

        Of a store it is where it lies, its metadata, and what is read of it.
        """
        parts = []
        present = self.files(subject)
        for given in sources(subject):
            if given not in present:
                parts.append("missing")
                continue
            if as_store(given, self.reading):
                options = {name: getattr(self.reading, name) for name in OF_STORES}
                parts.append(f"store {self.image(given).version} {json.dumps(options)}")
                continue
            path, series = split_series(given)
            if not self.remembered(path):
                before = stamp(path)
                self.digests[os.path.abspath(path)] = [*before, digest(path)]
            parts.append(self.digests[os.path.abspath(path)][-1] + revision(path))
            parts += [DICOM_FORMAT] if holds_dicom(path) else []
            parts += [series] if series else []
        if subject.mask:
            table = table_of(subject.mask, self.reading)
            parts.append(f"masked {sorted((table or {}).items())}" + " objects" * (table == {}))
        if subject.time:
            parts.append(f"time point {subject.time.number} of {subject.time.count}")
        text = "\n".join([self.recipe, *parts])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def sidecar(self, key: str) -> dict[str, Any] | None:
        """Read a sidecar; None where the volume is missing or torn, or measured by old rules."""
        try:
            meta = read_json(self.cache_dir / f"{key}.json")
            if not is_sidecar(meta):
                return None
            measured = self.preprocess.rules == 1 or all("robust" in s for s in meta["statistics"])
            parts = (meta, meta.get("mask"), meta.get("counts", {}).get("mask"))
            arrays = [part for part in parts if part and "views" not in part]
            sizes = [num_bytes(self.cache_dir / part["file"]) for part in arrays]
            if measured and sizes == [part["num_bytes"] for part in arrays]:
                return meta
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not built, or torn by a crash of the machine: it is built again
        return None

    def fetch(
        self, subjects: Sequence[Subject], on_error: str, threads: int | None, progress: bool
    ) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str, str]]]:
        """Bring what is missing into the cache, one process at a time.

        Returns:
            Sidecars by id, and the (id, path, reason) of what was skipped.
        """
        known = self.recall(subjects)
        missing = [subject for subject in subjects if subject.id not in known]
        if not missing:
            return known, []
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.cache_dir}: {error.strerror} (data.cache_dir)") from error
        with exclusive(self.cache_dir):
            known |= self.recall(missing)  # another process may have built them by now
            missing = [subject for subject in missing if subject.id not in known]
            made, skipped = self.build_all(missing, on_error, threads, progress)
        return known | made, skipped

    def build_all(
        self, subjects: Sequence[Subject], on_error: str, threads: int | None, progress: bool
    ) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str, str]]]:
        """Build volumes in parallel; return their sidecars and the (id, path, reason) skipped."""
        made, skipped = {}, []
        threads = threads or num_threads()
        sweep(self.cache_dir)  # we hold the lock: their makers are dead
        pool = ThreadPoolExecutor(threads, "store")
        try:
            groups = by_file(subjects)
            tasks = [pool.submit(self.build_each, group) for group in groups]
            watched = progress_bar(tasks, "caching volumes", progress)
            for group, task in zip(groups, watched, strict=True):
                for subject, found in zip(group, task.result(), strict=True):
                    if not isinstance(found, BrokenVolume):
                        made[subject.id] = found
                        continue
                    left_out = isinstance(found, MissingFile) and self.reading.missing == "skip"
                    if on_error == "raise" and not left_out:
                        raise with_remedy(found, len(subjects)) from found
                    skipped.append((subject.id, found.path, found.reason))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.write_digests()  # who is asked to stop may not have the time for those in hand
            pool.shutdown()
            self.write_digests()
        return made, skipped

    def build_each(self, group: Sequence[Subject]) -> list[Record | BrokenVolume]:
        """Read the files of subjects that share them, once, and store what is made of them."""
        if stays(group[0], self.reading):
            return each(group, self.refer)
        if is_streamed(group[0], self.reading) and self.backend != "blosc2":
            return each(group, self.stream)
        return read_each(group, self.reading, self.build_one)

    def refer(self, subject: Subject) -> Record:
        """Store what is known of a volume that stays where it is, all but its voxels."""
        found = self.find(subject, self.reading, self.preprocess)
        key = self.key(subject)
        if (meta := self.sidecar(key)) is not None:
            return meta
        meta, sample, tables = self.measure(subject, found)
        bounds, lowest = self.foreground(meta)
        found = fitted(found, sample, bounds, self.preprocess)
        header = found.header
        meta |= in_place([replace(view, fill=min(lowest)) for view in found.views])
        meta |= told_of(key, header, header.affine, found.record)
        if isinstance(found.levels[0], Counted):
            meta["counts"] = asdict(self.counts(key, found, lowest))
        points = foreground_points(sample.data[0], *bounds, True, int(key[:8], 16))
        whole = sample.to_volume(points, found.levels[0].shape[1:])
        low, _ = found.record.get("crop", ([0, 0, 0], None))
        self.write_sidecar(meta, whole - np.array(low, np.int32), tables)
        return meta

    def stream(self, subject: Subject) -> Record:
        """Copy a volume that would fill the memory, piece by piece."""
        turned = Preprocess(orient_ras=self.preprocess.orient_ras)
        found = self.find(subject, replace(self.reading, in_place=True), turned)
        key = self.key(subject)
        if (meta := self.sidecar(key)) is not None:
            return meta
        meta, sample, tables = self.measure(subject, found)
        bounds, lowest = self.foreground(meta)
        made = streamed(found, sample, bounds, lowest, self.preprocess)
        meta |= told_of(key, found.header, made.data.affine, made.record)
        if made.weights is not None:
            meta["mask"] = self.write_array(f"{key}.mask", made.weights)
        points = foreground_points(sample.data[0], *bounds, True, int(key[:8], 16))
        sample = replace(sample, step=made.step)
        low = np.array(made.data.low, np.int32)
        inside = sample.to_volume(points, made.grid) - low
        meta |= self.write_array(key, made.data)
        self.write_sidecar(meta, inside, tables)
        return meta

    def find(self, subject: Subject, reading: Reading, preprocess: Preprocess) -> Found:
        """Open a volume where it lies."""
        require_files(subject, reading)
        found = find_in_place(subject, reading, preprocess)
        self.check_channels(subject, found.levels[0].shape[0])
        return found

    def measure(self, subject: Subject, found: Found) -> tuple[Record, Sample, list[np.ndarray]]:
        """Measure a sample of a volume, and hide in it what does not count."""
        sample, path = found.sample(), subject.paths[0]
        sample = replace(sample, volume=storable(sample.volume, path, self.reading.nan))
        stats, tables = measured(sample.volume, path, sample.drawn)
        count = len(stats)
        meta = {"scale": [1.0] * count, "offset": [0.0] * count, "statistics": stats}
        return meta, sample, tables

    def foreground(self, meta: Record) -> tuple[tuple[float, float | None], list[float]]:
        """Return the bounds of the foreground, and the lowest intensity of each channel."""
        bounds = foreground_bounds(meta, self.preprocess.rules)
        return bounds, [one["min"] for one in meta["statistics"]]

    def counts(self, key: str, found: Found, lowest: list[float]) -> Counts:
        """Return what tells which voxels count; a mask that is a file is kept in the cache."""
        counts, mask = Counts(self.reading.nan, lowest), found.mask
        if mask is None:
            return counts
        if isinstance(mask.source, View):
            opened = in_place([mask.source])
        else:
            opened = self.write_array(f"{key}.mask", mask.source)
        matrix = mask.matrix(found.header.affine, found.header.data.shape[1:]).tolist()
        table = None if mask.table is None else [*mask.table.items()]
        return replace(counts, path=str(mask.path), mask=opened, matrix=matrix, table=table)

    def write_digests(self) -> None:
        """Remember which bytes the source files hold, while others may still be added."""
        if self.digests:
            write_text(self.cache_dir / "CACHEDIR.TAG", TAG)
            write_whole(self.cache_dir / "sources.json", json.dumps(dict(self.digests)).encode())

    def build_one(self, subject: Subject, volume: Volume) -> dict[str, Any]:
        """Check, preprocess and store one volume, as it was read."""
        notes = list(volume.notes)
        self.check_channels(subject, len(volume.data))
        volume = storable(volume, subject.paths[0], self.reading.nan)
        key = self.key(subject)
        if (meta := self.sidecar(key)) is not None:  # the same bytes under another name
            return meta
        stats, tables = measured(volume, subject.paths[0])
        meta = {
            "scale": [float(volume.scale)] * len(stats),
            "offset": [float(volume.offset)] * len(stats),
            "statistics": stats,
        }
        main = main_channel(meta)
        beyond = foreground_bounds(meta, self.preprocess.rules)
        stored, undo = to_store_grid(volume, self.preprocess, *beyond)
        data = stored.data
        meta |= {
            "key": key,
            "affine": stored.affine.tolist(),
            "spacing_mm": list(stored.spacing_mm),
            "undo": undo,
            "notes": notes,
            "look": asdict(volume.look),
        }
        if volume.weights is not None:
            mask = stored_weights(Volume(volume.weights, volume.affine), undo, data.shape[1:])
            weights = Volume(mask, stored.affine, look=volume.look)
            meta["mask"] = None if (mask == 1).all() else self.write_array(f"{key}.mask", weights)
        points = foreground_points(data[main], *beyond, volume.scale > 0, int(key[:8], 16))
        meta |= self.write_array(key, replace(stored, look=volume.look))
        self.write_sidecar(meta, points, tables)
        return meta

    def write_sidecar(self, meta: Record, points: np.ndarray, tables: Sequence[np.ndarray]) -> None:
        """Write what is known of a volume whose array is there, the sidecar itself last."""
        key = meta["key"]
        path = self.cache_dir / points_file(key, self.preprocess.rules)
        write_whole(path, npy_header(points.shape, points.dtype), [points])
        table = np.concatenate(np.stack(tables, axis=1))  # all voxels' first, then foregrounds'
        file = self.cache_dir / f"{key}.quantiles.npy"
        write_whole(file, npy_header(table.shape, table.dtype), [table])
        write_whole(self.cache_dir / f"{key}.json", json.dumps(meta).encode())

    def write_array(self, name: str, volume: Boxes) -> dict[str, str | int | list[int]]:
        """Write the stored numbers of a volume as the backend does; return what opens them."""
        if self.backend == "zarr":
            return self.write_store(name, volume)
        size, body = 0, rows_of(volume)
        if self.backend == "blosc2":
            data = in_c_order(volume[(slice(None),) * 4])
            file, content, body = f"{name}.b2nd", compress(data), iter(())
        else:
            size = num_items(tuple(volume.shape)) * volume.dtype.itemsize
            file, content = f"{name}.npy", npy_header(volume.shape, volume.dtype)
        write_whole(self.cache_dir / file, content, body)
        return {
            "file": file,
            "shape": list(volume.shape),
            "dtype": volume.dtype.str,
            "start": len(content),
            "num_bytes": len(content) + size,
        }

    def write_store(self, name: str, volume: Boxes) -> dict[str, str | int | list[int]]:
        """Write the stored numbers of a volume as OME-Zarr, its axes straight."""
        path, straight = self.cache_dir / f"{name}.ome{ZARR}", volume
        if isinstance(volume, Volume):
            affine = straightened(volume.affine)
            straight = replace(volume, affine=affine, scale=1.0, offset=0.0)
        try:
            write_volume(path, straight)
        except (BrokenVolume, OSError) as error:  # a fault of the disk, not of the volume
            raise ValueError(f"{error} (data.cache_dir)") from error
        array = view_written(path, volume.shape[0]).open()
        return {
            "file": path.name,
            "shape": list(array.shape),
            "dtype": array.dtype.str,
            "start": 0,
            "num_bytes": num_bytes(path),
            "chunks": list(array.chunks),
            "lead": list(array.lead),
        }


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


def told_of(key: str, volume: Volume, affine: np.ndarray, undo: Record) -> Record:
    """Return what a sidecar tells of a volume that was not read whole.

    Args:
        key: Its name.
        volume: What its metadata say.
        affine: On the store's grid.
        undo: What undoes its preprocessing.
    """
    spacing = Volume(volume.data, affine).spacing_mm
    return {
        "key": key,
        "affine": affine.tolist(),
        "spacing_mm": list(spacing),
        "undo": undo,
        "notes": list(volume.notes),
        "look": asdict(volume.look),
    }


def in_place(views: Sequence[View]) -> Record:
    """Return what opens an array that stays where it is."""
    array = beside(views)
    return {
        "file": str(views[0].place),
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "start": 0,
        "num_bytes": 0,
        "views": [asdict(view) for view in views],
        "chunks": list(array.chunks),
        "lead": list(array.lead),
    }


def fits_in_place(record: Record) -> bool:
    """Whether what opens an array is sound as far as it is read in chunks."""
    views = record.get("views", [])
    if not isinstance(views, list) or not all(map(View.fits, views)):
        return False
    return not ({"views", "chunks"} & record.keys() and misfit(record, IN_CHUNKS))


def measured(
    volume: Volume, path: Path, drawn: str = ""
) -> tuple[list[Statistics], list[np.ndarray]]:
    """Return statistics and quantiles of each channel's voxels that count, as `statistics` does.

    Args:
        volume: The voxels.
        path: The file, for the message.
        drawn: Which part of it they are; empty for all.
    """
    counts = slice(None) if volume.weights is None else volume.weights[0] > 0
    stats, tables = [], []
    for number, channel in enumerate(volume.data):
        found, table = statistics(channel[counts], float(volume.scale), float(volume.offset))
        if number in volume.missing:
            found["missing"] = True
        elif found["min"] == found["max"]:
            lacking = "; a level small enough is measured whole (or choose a part, data.region)"
            raise BrokenVolume(
                path, f"all voxels{drawn} are {found['min']:g}{lacking if drawn else ''}"
            )
        stats.append(found)
        tables.append(table)
    return stats, tables


def straightened(affine: np.ndarray) -> np.ndarray:
    """Return an affine whose axes run along those of the body, as OME-Zarr knows them alone."""
    axes, flips = ras_axes(affine)
    straight = np.eye(4)
    straight[:3, :3] = 0
    for row, (column, flip) in enumerate(zip(axes, flips, strict=True)):
        size = float(np.linalg.norm(affine[:3, column]))
        straight[row, column] = -size if flip else size
    straight[:3, 3] = affine[:3, 3]
    return straight


def sources(subject: Subject) -> list[Path]:
    """Return the files that a volume is made of."""
    return [*subject.paths, subject.mask] if subject.mask else list(subject.paths)


def stored_weights(weights: Volume, undo: dict, shape: tuple[int, ...]) -> np.ndarray:
    """Bring weights (1, X, Y, Z) from the source's grid to the store's; padding counts 0."""
    data = label_to_store_grid(weights, undo).data
    pads = [(0, n - m) for n, m in zip(shape, data.shape[1:], strict=True)]
    return np.pad(data, [(0, 0), *pads])


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


def other_channels(given: int, taken: int | None) -> str:
    """Say that a volume has other channels than the model takes, and what can be done."""
    return (
        f"gives {given} channels, the model takes {taken}: give it other volumes, or train one with"
        f" --model.in_channels {given}"
    )


def color_hint(subject: Subject, channels: set[int | None]) -> str:
    """What makes gray and colored pictures alike, to be said where these are such."""
    pictures = channels == {1, 3} and volume_suffix(subject.paths[0]) in SLICES
    return "; --data.color gray or rgb makes pictures alike" if pictures else ""


def missing_files(subject: Subject) -> list[Path]:
    """Files that a subject lacks while others are there; a link that leads nowhere is broken."""
    lacking = [path for path in subject.paths if not (is_there(path) or path.is_symlink())]
    return lacking if len(lacking) < len(subject.paths) else []


def read_subject(subject: Subject, reading: Reading) -> Volume:
    """Read the files of a subject, all time points of them, and its mask."""
    volume = read_channels(subject, reading)
    if subject.mask is None:
        return volume
    times = subject.time.count if subject.time else 1
    return replace(volume, weights=read_weights(subject.mask, volume, times, reading))


def read_channels(subject: Subject, reading: Reading) -> Volume:
    """Read the files of a subject; several become channels and must share one grid."""
    missing = missing_files(subject)
    if missing and reading.missing != "zero":
        raise lacks(subject, missing[0])
    present = [path for path in subject.paths if path not in missing]
    read = dict(zip(present, (read_volume(path, reading) for path in present), strict=True))
    check_one_grid(read)
    first = read[present[0]]
    if len(subject.paths) == 1:
        return first
    times = subject.time.count if subject.time else 1
    nothing = replace(first, data=np.zeros_like(first.data[:times]), notes=())
    return stacked([read.get(path, nothing) for path in subject.paths], nothing)


def require_files(subject: Subject, reading: Reading) -> None:
    """Refuse a volume that stays where it is and lacks one of its files."""
    missing = missing_files(subject)
    if missing and reading.missing == "zero":
        raise BrokenVolume(missing[0], f"is missing; its volume {needs_copy('data.missing zero')}")
    if missing:
        raise lacks(subject, missing[0])


def with_remedy(error: BrokenVolume, count: int) -> BrokenVolume:
    """Name the option that leaves a broken volume out, where it is one of several."""
    if count < 2 or isinstance(error, MissingFile):  # that names its own
        return error
    reason = f"{error.reason}; --data.on_error skip leaves such volumes out"
    return BrokenVolume(error.path, reason)


def lacks(subject: Subject, path: Path) -> MissingFile:
    """Say that a subject lacks one of its files, and what can be done."""
    number = subject.paths.index(path) + 1
    return MissingFile(
        path,
        f"{subject.id} lacks this file, its {number}. of {len(subject.paths)}: --data.missing skip "
        f"leaves such subjects out, zero gives a channel of zeros",
    )


def stacked(volumes: list[Volume], nothing: Volume) -> Volume:
    """Stack volumes of one grid as channels; `nothing` stands for a missing one."""
    first, missing, channels = volumes[0], [], 0
    named = tuple(channel for volume in volumes for channel in volume.look.channels)
    look = replace(first.look, channels=named)
    for volume in volumes:
        missing += [channels] if volume is nothing else []
        channels += len(volume.data)
    kinds = {(volume.data.dtype, volume.scale, volume.offset) for volume in volumes}
    notes = tuple({note: None for volume in volumes for note in volume.notes})
    if len(kinds) > 1:  # one array needs one dtype and scale
        data = np.concatenate([volume.intensities() for volume in volumes])
        one = replace(first, data=data, scale=1.0, offset=0.0)
        return replace(one, missing=tuple(missing), notes=notes, look=look)
    data = np.concatenate([volume.data for volume in volumes])
    return replace(first, data=data, missing=tuple(missing), notes=notes, look=look)


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
    return each(group, lambda subject: use(subject, at_time(whole, subject.time)))


def each(group: Sequence[Subject], use: Callable[[Subject], Used]) -> list[Used | BrokenVolume]:
    """Return what came of each subject, or the error that it ended with."""
    found: list[Used | BrokenVolume] = []
    for subject in group:
        try:
            found.append(use(subject))
        except BrokenVolume as error:
            if subject.time:
                reason = f"time point {subject.time.number}: {error.reason}"
                error = BrokenVolume(error.path, reason)
            found.append(error)
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


def main_channel(meta: dict[str, Any]) -> int:
    """Return the first channel whose file was there: that of the foreground."""
    return next(c for c, stats in enumerate(meta["statistics"]) if not stats.get("missing"))


def foreground_bounds(meta: dict[str, Any], rules: int) -> tuple[float, float | None]:
    """Return threshold and limit of the foreground in stored numbers, from a sidecar.

    It is that of `main_channel`. Beyond the limit voxels are hot and no foreground; it is None
    where there is none.
    """
    main = main_channel(meta)
    stats = by_rules(meta["statistics"][main], rules)
    scale, offset = meta["scale"][main], meta["offset"][main]
    limit = stats.get("foreground_limit")
    threshold = (stats["foreground_threshold"] - offset) / scale
    return threshold, None if limit is None else (limit - offset) / scale


def points_file(key: str, rules: int) -> str:
    """Name of the file with a volume's foreground points, found by these rules."""
    return f"{key}.points.npy" if rules == 1 else f"{key}.points-{rules}.npy"


def foreground_points(
    data: np.ndarray, threshold: float, limit: float | None, rising: bool, seed: int
) -> np.ndarray:
    """Draw up to NUM_POINTS foreground voxels, (N, 3) int32; at random, reproducibly."""
    rng = np.random.default_rng(seed)
    tries = rng.integers(0, data.shape, (NUM_POINTS * 16, 3))
    hits = tries[is_foreground(data[tuple(tries.T)], threshold, limit, rising)][:NUM_POINTS]
    if len(hits) < NUM_POINTS // 16:  # a small object: look at every voxel
        hits = np.argwhere(is_foreground(data, threshold, limit, rising))
        hits = hits[rng.permutation(len(hits))[:NUM_POINTS]]
    return hits.astype(np.int32)


def draw_labels(subject: Subject, record: dict[str, Any], seed: int) -> dict[int, np.ndarray]:
    """Draw up to NUM_POINTS voxels (N, 3) of each label, on the grid of the store.

    Args:
        subject: Whose label map.
        record: How its volume came to the store's grid.
        seed: Of the draw.
    """
    values = labels_of(subject, record)
    rng = np.random.default_rng(seed)
    found = {}
    for name in np.unique(values):
        points = np.argwhere(values == name)
        found[int(name)] = points[rng.permutation(len(points))[:NUM_POINTS]].astype(np.int32)
    return found


def labels_of(subject: Subject, record: dict[str, Any]) -> np.ndarray:
    """Return the label map of a subject (X, Y, Z) on the grid of the store, its padding apart.

    Args:
        subject: Whose label map.
        record: How its volume came to the store's grid.
    """
    shape, affine = tuple(record["source_shape"]), np.array(record["source_affine"])
    cut = Cut.of(record["cut"]) if "cut" in record else None
    grid = Volume(np.broadcast_to(np.uint8(0), (1, *shape)), affine, cut=cut)
    return label_to_store_grid(read_label_map(subject, grid), record).data[0]


def draw_labels_in_place(
    path: Path, shape: Sequence[int], affine: np.ndarray, seed: int
) -> dict[int, np.ndarray]:
    """Draw as `draw_labels` for a volume that stays where it is, from a level that is small enough.

    Args:
        path: Label map, a store or a file of that size; its affine says where it lies.
        shape: Of the volume.
        affine: Of the volume.
        seed: Of the draw.
    """
    label = whole_numbers(small_label_map(path), path)
    values, rng = label.data[0], np.random.default_rng(seed)
    to_volume = np.linalg.solve(affine, label.affine)
    found = {}
    for name in np.unique(values):
        places = rng.permutation(np.flatnonzero(values == name))[:NUM_POINTS]
        points = np.stack([*np.unravel_index(places, values.shape), np.ones_like(places)])
        moved = np.rint((to_volume @ points)[:3].T).astype(np.int32)
        found[int(name)] = moved[((moved >= 0) & (moved < np.array(shape))).all(axis=1)]
    return found


def note_lines(notes: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """Return what readers had to assume, once for all volumes of which it is true.

    Args:
        notes: File and notes of each volume.
    """
    paths: dict[str, list[Path]] = {}
    for path, note in ((path, note) for path, of_volume in notes for note in of_volume):
        paths.setdefault(note, []).append(path)
    return [
        f"{url_of(of[0]) or of[0]}: {note} ({len(of)} of {len(notes)} volumes)"
        for note, of in paths.items()
    ]


def label_map_of(subject: Subject) -> Path:
    """Return the file of a subject's label map, which has to be named."""
    if subject.label_map is None:
        raise ValueError(f"the manifest has no label map (column label_map) for {subject.id}")
    return subject.label_map


def read_label_map(subject: Subject, grid: Volume) -> Volume:
    """Read the label map of a subject onto the grid of its volume.

    The affines say where it lies; if one of the two has no place in space, it is taken voxel by
    voxel, so the shapes of the files must be the same.
    """
    shape, affine = grid.data.shape[1:], grid.affine
    shape_of_file, affine_of_file = grid.file_grid
    path = label_map_of(subject)
    label = whole_numbers(read_volume(path), path)
    if has_place(path, label.affine) and has_place(subject.paths[0], affine_of_file):
        return on_grid(label, shape, affine, path)
    if label.data.shape[1:] != shape_of_file:
        raise BrokenVolume(
            path,
            f"is {label.data.shape[1:]} voxels, its volume {shape_of_file}, and not both say where "
            f"they lie: give a label map of that shape, or one with an affine (NIfTI)",
        )
    return nearest(Volume(label.data, affine_of_file), shape, affine)


def whole_numbers(label: Volume, path: Path) -> Volume:
    """Return a label map of whole numbers; anything else is no label map."""
    if len(label.data) != 1:
        raise BrokenVolume(path, f"has {len(label.data)} channels: a label map has one")
    values = label.data
    if values.dtype.kind == "f" or (label.scale, label.offset) != (1, 0):
        values = values * np.float64(label.scale) + label.offset
        odd = values[values != np.rint(values)]  # NaN too
        if odd.size:
            raise BrokenVolume(
                path, f"holds {odd[0]:g}, no whole number: a label map is wanted, no probabilities"
            )
        values = values.astype(np.int32)
    return Volume(values, label.affine)


def on_grid(label: Volume, shape: tuple[int, ...], affine: np.ndarray, path: Path) -> Volume:
    """Bring a label map to another grid: nearest voxel, 0 beyond the map, which has to be there."""
    moved = nearest(label, shape, affine)
    if not moved.data.any():
        everywhere = replace(label, data=np.ones_like(label.data, np.uint8))
        if not nearest(everywhere, shape, affine).data.any():
            raise BrokenVolume(
                path, "lies beside its volume in space: is it the map of another one?"
            )
    return moved


def npy_header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    """Return the header of a C-order .npy file."""
    from numpy.lib import format as npy

    buffer = io.BytesIO()
    fields = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def files_of(path: Path) -> list[Path]:
    """Return the files a volume is read from: a DICOM folder's, or a header's and its voxels'."""
    path, _ = split_series(path)
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


def version_of(path: Path) -> list:
    """What tells that a volume has changed: a store's metadata, or its files' sizes and times."""
    return [describe(path).version] if is_store(path) else stamp(path)


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


def progress_bar(
    tasks: list[Future[Result]], title: str, show: bool
) -> Iterator[Future[Result]]:  # fmt: skip
    """Iterate over tasks as they end, with a bar on a terminal and now and then a line in a log."""
    if not show:
        yield from tasks
    elif not sys.stderr.isatty():
        yield from with_lines(tasks, title)
    else:
        from rich.console import Console
        from rich.progress import track

        yield from track(tasks, title, console=Console(stderr=True), transient=True)


def with_lines(tasks: list[Future[Result]], title: str) -> Iterator[Future[Result]]:
    """Iterate over tasks and say every `LINE_EVERY_S` how far they are; quick ones say nothing."""
    begun = told = time.monotonic()
    for task in tasks:
        ended = False
        while not ended:
            pause = max(0.0, told + LINE_EVERY_S - time.monotonic())
            ended = not wait([task], timeout=pause).not_done
            now = time.monotonic()
            if now - told >= LINE_EVERY_S:
                told = now
                done = sum(one.done() for one in tasks)
                per_volume = (now - begun) / max(done, 1)
                left = f", {per_volume * (len(tasks) - done) / 60:.0f} min left" if done else ""
                line = f"{title}: {done} of {len(tasks)} after {(now - begun) / 60:.1f} min"
                print(line + left, file=sys.stderr, flush=True)
        yield task
