"""Filling the cache: read, check, preprocess and store each volume once, whatever else runs.

A volume's key is a hash of its source's bytes and of the recipe. Files appear by rename, the
sidecar last, so a volume with a sidecar is whole; one process builds and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders.assemble import (
    color_hint,
    each,
    missing_files,
    other_channels,
    read_each,
    require_files,
    sources,
    storable,
    with_remedy,
)
from loaders.cached import (
    exclusive,
    in_c_order,
    is_sidecar,
    npy_header,
    num_bytes,
    rows_of,
    write_whole,
)
from loaders.compressed import compress
from loaders.counted import Counted, Counts
from loaders.foreground import foreground_bounds, foreground_points, main_channel, points_file
from loaders.in_place import (
    Found,
    Sample,
    find_in_place,
    fitted,
    stays,
)
from loaders.masks import table_of
from loaders.preprocess import Preprocess, label_to_store_grid, to_store_grid
from loaders.progress import num_threads, progress_bar
from loaders.readers import (
    ZARR,
    Boxes,
    BrokenVolume,
    Image,
    MissingFile,
    Reading,
    View,
    Volume,
    as_store,
    beside,
    describe,
    holds_dicom,
    num_items,
    ras_axes,
    revision,
    split_series,
    view_written,
    write_volume,
)
from loaders.series import by_file
from loaders.statistics import Statistics, statistics
from loaders.streamed import is_streamed, streamed
from loaders.subjects import Subject
from loaders.texts import Record, misfit, read_json
from loaders.versions import digest, stamp
from loaders.whole import sweep, write_text

FORMAT = 1  # part of every key: raise it when what lies in the cache changes its meaning
# The same for what is read from DICOM: 2 has the rescale and the position of each slice.
DICOM_FORMAT = "dicom 2"
# Backups pass over such a folder, and so do we: https://bford.info/cachedir
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Volumes as vae3d keeps them.\n"
OF_STORES = ("in_place", "level", "channels", "time_point")  # options that no other volume knows


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


def stored_weights(weights: Volume, undo: dict, shape: tuple[int, ...]) -> np.ndarray:
    """Bring weights (1, X, Y, Z) from the source's grid to the store's; padding counts 0."""
    data = label_to_store_grid(weights, undo).data
    pads = [(0, n - m) for n, m in zip(shape, data.shape[1:], strict=True)]
    return np.pad(data, [(0, 0), *pads])
