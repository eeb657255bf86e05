"""The cache of volumes: one uncompressed array per volume, read by memory map.

Of a volume that stays where it is, zarr, HDF5 or large TIFF, the cache holds all but the array.

Each volume lies in the cache once, in its file's own dtype, C order, as `<key>.npy` with
`<key>.json` beside it; the key is a hash of the source's bytes and of the geometry part of the
preprocessing. Files appear by rename, array first and JSON last, so a volume with a JSON is whole.
Reading casts and normalizes in one go; changing the intensity mapping rebuilds nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from loaders.assemble import note_lines
from loaders.build import Builder
from loaders.cached import exclusive, write_whole
from loaders.compressed import CompressedArray
from loaders.consistency import Facts, Survey, refuse, wrong_channels
from loaders.counted import Counted, Counts
from loaders.find import Say, find_subjects
from loaders.foreground import foreground_bounds, foreground_points, main_channel, points_file
from loaders.intensities import intensity_lines
from loaders.label_maps import draw_labels, draw_labels_in_place, label_map_of, labels_of
from loaders.layout import Layout, look_of
from loaders.preprocess import Preprocess
from loaders.readers import (
    CACHE_GB,
    READING,
    ZARR,
    Beside,
    BrokenVolume,
    InPlace,
    Reading,
    View,
    Volume,
    beside,
    num_items,
    url_of,
    view_written,
)
from loaders.series import time_points
from loaders.statistics import PERCENTILES, by_rules
from loaders.subjects import Subject, names_of
from loaders.undo import format_of, undo
from loaders.versions import version_of

DRAWN = 2  # how voxels of labels are drawn: raise it when that changes
MOST_AT_ONCE, PART = 2**27, 256  # voxels of a volume that stays where it is, see `part`
OPEN_VOLUMES = 128  # maps held open: 10,000 volumes must not need 10,000 file descriptors


Opened = np.ndarray | CompressedArray | InPlace | Beside


@dataclass(frozen=True)
class Stored:
    """An array (C, X, Y, Z) in the cache."""

    file: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    start: int
    views: tuple[View, ...] = ()  # of arrays that stay where they are, channels beside each other
    chunks: tuple[int, ...] | None = None  # voxels of zarr and such that are read at once
    lead: tuple[int, ...] | None = None  # voxels of its first chunk that lie before it
    cache_gb: float = 0.0

    @classmethod
    def of(cls, record: dict[str, Any], cache_gb: float = 0.0) -> Stored:
        """Take what `Builder.write_array` or `in_place.refer` returned."""
        shape, dtype = tuple(record["shape"]), np.dtype(record["dtype"])
        stored = cls(record["file"], shape, dtype, record["start"])
        if "chunks" not in record:
            return stored
        chunks, lead = tuple(record["chunks"]), tuple(record["lead"])
        views = tuple(map(View.of, record.get("views", ())))
        return replace(stored, views=views, chunks=chunks, lead=lead, cache_gb=cache_gb)

    def open(self, cache_dir: Path) -> Opened:
        """Map its numbers."""
        if self.views:
            return beside(self.views, self.cache_gb)
        path = cache_dir / self.file
        if path.suffix == ".b2nd":
            return CompressedArray(path)
        if path.suffix == ZARR:
            return view_written(path, self.shape[0]).open(self.cache_gb)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        flat = np.frombuffer(buffer, self.dtype, num_items(self.shape), self.start)
        return np.asarray(Unlocked(flat)).reshape(self.shape)


@dataclass(frozen=True)
class Entry:
    """What a read needs to know about one volume."""

    subject: Subject
    key: str
    voxels: Stored
    spacing_mm: tuple[float, float, float]
    # Of clip(stored * gain + bias, low, high), one value a channel.
    gain: np.ndarray
    bias: np.ndarray
    low: np.ndarray
    high: np.ndarray
    raw: bool  # the mapping changes nothing
    lowest: np.ndarray  # of the normalized volume
    highest: np.ndarray
    masked: bool  # whether it was said which voxels count
    mask: Stored | None  # their weights, of a volume that stays where it is on a grid of its own
    counts: Counts | None  # which voxels of such a volume count; None for all

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, X, Y, Z)."""
        return self.voxels.shape


class VolumeStore:
    """Volumes on disk as normalized float32 arrays; made by `VolumeStore.build`.

    Example:
        >>> store = VolumeStore.build("folder", "cache", Preprocess())
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
        shapes = [entry.shape[1:] for entry in self.entries]
        self.spatial_shapes: np.ndarray = np.array(shapes, int).reshape(-1, 3)
        self._map()

    def _map(self) -> None:
        """Prepare the maps of the volumes and their masks, which are opened when read."""
        self.array = lru_cache(OPEN_VOLUMES)(self._open)
        self.mask_array = lru_cache(OPEN_VOLUMES)(self._open_mask)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("array", "mask_array")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._map()

    @property
    def ids(self) -> list[str]:
        """Names of the volumes, in the store's order."""
        return [entry.subject.id for entry in self.entries]

    @property
    def num_channels(self) -> int:
        """Channels of each volume."""
        return self.entries[0].shape[0]

    @property
    def channel_ranges(self) -> list[tuple[float, float]]:
        """Range of what `read` returns of each channel.

        It is (0, 1), (-1, 1), or for zscore and raw measured on the volumes; by the first rules
        over all channels together.
        """
        known = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0)}
        lowest = np.min([entry.lowest for entry in self.entries], axis=0)
        highest = np.max([entry.highest for entry in self.entries], axis=0)
        if self.preprocess.rules == 1:
            lowest[:], highest[:] = lowest.min(), highest.max()
        return [
            known.get(self.preprocess.channel(c).intensity, (float(lowest[c]), float(highest[c])))
            for c in range(self.num_channels)
        ]

    @property
    def data_range(self) -> tuple[float, float]:
        """Range of what `read` returns, over all channels."""
        lows, highs = zip(*self.channel_ranges, strict=True)
        return min(lows), max(highs)

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels, else their numbers."""
        return [self.preprocess.name(c) for c in range(self.num_channels)]

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(C, X, Y, Z) of a volume on the store's grid."""
        return self.entries[index].shape

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """Voxel size on the store's grid in millimeters."""
        return self.entries[index].spacing_mm

    def chunks(self, index: int) -> tuple[int, ...] | None:
        """Voxels of a volume that are read at once; None where each is as near as any other."""
        return self.entries[index].voxels.chunks

    def lead(self, index: int) -> tuple[int, ...] | None:
        """Voxels of a volume's first chunk that lie before its first voxel."""
        return self.entries[index].voxels.lead

    def layout(self, index: int) -> Layout:
        """Return how a volume on the store's grid is shown to people."""
        meta, names = self.meta(index), self.preprocess.channels
        look = look_of(meta, self.entries[index].subject.paths[0])
        return Layout.of(look, np.array(meta["affine"]), meta["undo"], self.num_channels, names)

    def labels(self, index: int) -> dict[str, str]:
        """Return the manifest's further columns of a volume."""
        return self.entries[index].subject.labels

    def meta(self, index: int) -> dict[str, Any]:
        """Return what is known about a volume: affine, statistics, source and how to undo."""
        entry, rules = self.entries[index], self.preprocess.rules
        meta = json.loads((self.cache_dir / f"{entry.key}.json").read_text())
        return meta | {
            "statistics": [by_rules(stats, rules) for stats in meta["statistics"]],
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
        out = np.empty((entry.shape[0], *self._sizes(index, slices)), np.float32)
        self.read_into(index, slices, out)
        return out

    def _sizes(self, index: int, slices: Sequence[slice]) -> list[int]:
        """Voxels of a box along each axis."""
        shape = self.shape(index)[1:]
        return [len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True)]

    def part(self, index: int) -> tuple[slice, ...]:
        """Return what stands for a volume where the whole would fill the memory, slices (X, Y, Z).

        Of a volume that stays where it is and has more than `MOST_AT_ONCE` voxels it is up to
        `PART` voxels along each axis around the middle of its foreground, the same each time; of
        any other the whole.
        """
        shape = self.shape(index)[1:]
        if self.chunks(index) is None or num_items(shape) <= MOST_AT_ONCE:
            return (slice(None),) * 3
        points = self.foreground_points(index)
        middle = np.median(points, axis=0) if len(points) else np.array(shape) / 2
        size = np.minimum(shape, PART)
        low = np.clip(middle.astype(int) - size // 2, 0, np.array(shape) - size)
        return tuple(slice(a, a + n) for a, n in zip(low.tolist(), size.tolist(), strict=True))

    def read_unclipped(self, index: int) -> np.ndarray:
        """Return a volume as `read` does, but with what lies beyond the window as it is."""
        return self.unclipped(index).read(0)

    def unclipped(self, index: int) -> VolumeStore:
        """Return a store of one volume, read with what lies beyond the window as it is."""
        entry = self.entries[index]
        free = replace(entry, low=np.full_like(entry.low, -inf), high=np.full_like(entry.high, inf))
        return VolumeStore([free], self.cache_dir, self.preprocess)

    def read_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read as `read` into a float32 buffer (C, *shape of the slices)."""
        entry = self.entries[index]
        source = self.array(index)[(slice(None), *slices)]
        read = read_by_torch if torch.get_num_threads() == 1 else read_by_numpy
        if entry.raw:
            read(out, source)
            return
        for channel in range(len(out)):  # one at a time, it stays in the processor's cache
            mapping = [float(v[channel]) for v in (entry.gain, entry.bias, entry.low, entry.high)]
            read(out[channel], source[channel], mapping)

    def _open(self, index: int) -> Opened | Counted:
        """Map the stored numbers of a volume (C, X, Y, Z)."""
        entry = self.entries[index]
        array = entry.voxels.open(self.cache_dir)
        if entry.counts is None or not isinstance(array, InPlace | Beside):
            return array
        return entry.counts.over(array, self.mask_array(index), entry.voxels.file)

    def _open_mask(self, index: int) -> Opened | None:
        """Map the weights of a volume's voxels (1, X, Y, Z); None where all are 1."""
        mask = self.entries[index].mask
        return mask.open(self.cache_dir) if mask else None

    @property
    def num_weights(self) -> int:
        """Channels of what `read_weights_into` reads; 0 where every voxel counts alike."""
        return int(any(entry.masked for entry in self.entries))

    def read_weights_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read how much voxels count into a float32 buffer (1, *shape of the slices)."""
        array = self.array(index)
        if isinstance(array, Counted):
            out[...] = array.weights(slices)
        else:
            weights = self.mask_array(index)
            out[...] = 1 if weights is None else weights[(slice(None), *slices)]

    def seen(self, index: int, slices: Sequence[slice] | None = None) -> np.ndarray | None:
        """Return which voxels (X, Y, Z) count at all; None where nothing was said of that."""
        return self.seen_in(index, slices or (slice(None),) * 3) if self.num_weights else None

    def seen_in(self, index: int, slices: Sequence[slice]) -> np.ndarray:
        """Return which voxels of a box count at all."""
        weights = np.empty([1, *self._sizes(index, slices)], np.float32)
        self.read_weights_into(index, slices, weights)
        return weights[0] > 0

    def undo(self, index: int, x: np.ndarray | torch.Tensor) -> Volume:
        """Invert the preprocessing: original intensities (HU of CT), grid and affine.

        What was clipped stays clipped; outside a foreground crop stands each channel's lowest
        intensity.

        Args:
            index: Which volume `x` is of.
            x: Normalized (C, X, Y, Z) on the store's grid, an array or a tensor of any device;
                channels may differ in number.

        Returns:
            Float32 intensities on the grid of the source file.

        Example:
            >>> write_volume("recon.nii.gz", store.undo(0, recon))  # doctest: +SKIP
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
            "look": asdict(look_of(meta, entry.subject.paths[0])),
            "file": {"format": format_of(entry.subject.paths[0]), "dtype": entry.voxels.dtype.str},
            "background": [
                meta["statistics"][0 if self.preprocess.rules == 1 else channel]["min"]
                for channel in range(len(entry.gain))
            ],
        }

    def foreground_points(self, index: int) -> np.ndarray:
        """Return up to 1024 random foreground voxels (N, 3) of a volume.

        They lie in the cache, unless it was filled by other rules; then they are drawn now.
        """
        key, rules = self.entries[index].key, self.preprocess.rules
        path = self.cache_dir / points_file(key, rules)
        if path.is_file():
            return np.load(path)
        meta = self.meta(index)
        main = main_channel(meta)
        data = np.asarray(self.array(index)[(slice(main, main + 1), *(slice(None),) * 3)])[0]
        bounds = foreground_bounds(meta, rules)
        return foreground_points(data, *bounds, meta["scale"][main] > 0, int(key[:8], 16))

    def label_points(self, index: int) -> dict[int, np.ndarray]:
        """Return up to 1024 random voxels (N, 3) of each label of a volume's label map.

        The map is the file in the manifest's column `label_map`; its affine says where it lies on
        the volume. It is read once and what was drawn is kept in the cache.
        """
        entry = self.entries[index]
        path = label_map_of(entry.subject)
        version = hashlib.blake2b(f"{DRAWN} {path} {version_of(path)}".encode(), digest_size=6)
        name = f"{entry.key}.label-{version.hexdigest()}.npz"
        if not (self.cache_dir / name).is_file():
            meta = self.meta(index)
            seed = int(entry.key[:8], 16)
            if entry.voxels.views:
                affine = np.array(meta["affine"])
                found = draw_labels_in_place(path, entry.shape[1:], affine, seed)
            else:
                found = draw_labels(entry.subject, meta["undo"], seed)
            buffer = io.BytesIO()
            arrays: dict[str, Any] = {str(label): points for label, points in found.items()}
            np.savez(buffer, **arrays)  # Any: one of its keywords is a flag, no array
            with exclusive(self.cache_dir):
                write_whole(self.cache_dir / name, buffer.getvalue())
        with np.load(self.cache_dir / name) as archive:
            return {int(label): archive[label] for label in archive.files}

    def label_map(self, index: int) -> np.ndarray | None:
        """Return the label of each voxel (X, Y, Z) of a volume; None where it has no label map.

        The file is read each time; what `pad_to_multiple` added has label 0.
        """
        subject = self.entries[index].subject
        if subject.label_map is None:
            return None
        labels = labels_of(subject, self.meta(index)["undo"])
        sizes = zip(self.shape(index)[1:], labels.shape, strict=True)
        return np.pad(labels, [(0, n - m) for n, m in sizes])

    def write_skipped(self, folder: str | Path) -> None:
        """Write skipped.csv (id, path, reason) into a folder, if anything was skipped."""
        if self.skipped:
            import csv

            with open(Path(folder) / "skipped.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("id", "path", "reason"), *self.skipped])

    @classmethod
    def build(
        cls,
        volumes: str | Path | Sequence[Subject | str | Path],
        cache_dir: str | Path | None = None,
        preprocess: Preprocess | None = None,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        reading: Reading = READING,
        backend: Literal["npy", "blosc2", "zarr"] = "npy",
        threads: int | None = None,
        progress: bool = True,
        in_channels: int | None = None,
        num_slices: int = 1,
        say: Callable[[str], None] | None = None,
        survey: Survey | None = None,
        cache_gb: float = CACHE_GB,
    ) -> VolumeStore:
        """Bring every volume into the cache, each once, and open them.

        Any number of processes may build into one cache: one works, the others wait for it. What
        is already there is used; a cache that cannot be written to is fine if nothing is missing.

        Args:
            volumes: A folder (searched below), glob or manifest; or subjects of `find_subjects`; or
                paths.
            cache_dir: Folder of the cache, shared by runs and data sets; None for $VAE3D_CACHE or
                else ~/.cache/vae3d.
            preprocess: What is done to each volume; None for the defaults.
            on_error: raise at the first broken file, or skip: list it and go on.
            reading: How the files are read.
            backend: npy; blosc2 for half the disk space at a fifth of the speed; zarr for sharded
                OME-Zarr, which is read in chunks.
            threads: Volumes built at once; None for one per core, 8 at most.
            progress: Show a bar on a terminal, now and then a line in a log.
            in_channels: Channels that the model takes; another number is refused before anything is
                cached. None takes any.
            num_slices: Neighboring slices that become channels.
            say: Takes lines on whether the volumes go together, asked of their headers before
                anything is cached; None asks nothing and tells on stderr what reading found, and
                `silent` is for who follows another that has told.
            survey: What is known of the volumes; None for nothing.
            cache_gb: Gigabytes of decoded chunks that a process keeps of volumes that stay where
                they are.
        """
        preprocess = preprocess or Preprocess()
        tell, asks = say or partial(print, file=sys.stderr), say is not None and say is not silent
        subjects = as_subjects(volumes, reading, tell)
        if survey is None:
            how = (reading, preprocess, on_error, in_channels, num_slices)
            survey = Survey(subjects, {}, [], *how)
        if asks:
            told = len(survey.lines)
            survey.ask_headers()
            for line in survey.lines[told:]:
                tell(line)
            refuse(survey.faults, tell)
        cache_dir = Path(cache_dir or os.environ.get("VAE3D_CACHE") or "~/.cache/vae3d")
        cache_dir = cache_dir.expanduser()
        builder = Builder(cache_dir, preprocess, reading, backend, in_channels, num_slices)
        known, skipped = builder.fetch(subjects, on_error, threads, progress)
        for id, path, reason in skipped if say is not silent else ():
            print(f"skipped {id}: {path}: {reason}", file=sys.stderr)
        if skipped and say is not silent:
            print(f"{len(skipped)} of {len(subjects)} volumes skipped", file=sys.stderr)
        if not known:
            raise ValueError(f"none of the {len(subjects)} volumes can be read")
        opened = [subject for subject in subjects if subject.id in known]
        entries = [open_entry(s, known[s.id], cache_dir, preprocess, cache_gb) for s in opened]
        measured = [(str(s.paths[0]), known[s.id]["statistics"]) for s in opened]
        # Caches of before have no notes.
        lines = note_lines([(s.paths[0], known[s.id].get("notes", ())) for s in opened])
        lines += intensity_lines(measured, preprocess)
        if asks:
            untold = known.keys() - survey.facts.keys()
            lines += survey.add({id: Facts.of_record(known[id]) for id in untold})
        for line in lines:
            tell(line)
        channels = {id: meta["shape"][0] for id, meta in known.items()}
        refuse(wrong_channels(subjects, channels), tell)
        return cls(entries, cache_dir, preprocess, skipped)


def silent(_line: str) -> None:
    """Say nothing: what there is to tell was told by another."""


class Unlocked:
    """Read-only memory that numpy takes for writable, since torch warns of any other.

    A private writable map would do, but systems refuse one that is larger than their memory. Who
    writes to it all the same is ended by the system.

    Args:
        array: A contiguous array; it is kept alive.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def read_by_numpy(out: np.ndarray, stored: np.ndarray, mapping: Sequence[float] = ()) -> None:
    """Cast stored numbers, and map them to clip(stored * gain + bias, low, high)."""
    np.copyto(out, stored, casting="unsafe")
    if mapping:
        gain, bias, low, high = mapping
        out *= gain
        if bias:
            out += bias
        np.clip(out, low, high, out=out)


def read_by_torch(out: np.ndarray, stored: np.ndarray, mapping: Sequence[float] = ()) -> None:
    """Do the same faster, to the bit; only where torch starts no threads of its own.

    Threads read ahead already: a team of torch's for each of them would fight for the cores.
    """
    x = torch.from_numpy(out).copy_(torch.from_numpy(stored))
    if mapping:
        gain, bias, low, high = mapping
        x.mul_(gain)
        if bias:
            x.add_(bias)
        x.clamp_(low, high)


def as_subjects(
    volumes: str | Path | Sequence[Subject | str | Path], reading: Reading, say: Say
) -> list[Subject]:
    """Return subjects; paths are named relative to the folder that holds them all."""
    if isinstance(volumes, (str, Path)):
        return find_subjects(volumes, reading, say=say)
    items = list(volumes)
    if not items:
        raise ValueError("no volumes given")
    subjects = [item for item in items if isinstance(item, Subject)]
    given = [item for item in items if not isinstance(item, Subject)]
    if not given:
        return subjects
    if subjects:
        raise ValueError(f"give subjects or paths, not both: {given[0]} is a path")
    places = [Path(os.path.abspath(path)) for path in given]  # of a URL for its name alone
    base = Path(os.path.commonpath([place.parent for place in places]))
    pairs = zip(given, places, strict=True)
    paths = [Path(path) if url_of(path) else place for path, place in pairs]
    named = zip(names_of(places, base), paths, strict=True)
    return list(time_points((Subject(id, (path,)) for id, path in named), reading))


def open_entry(
    subject: Subject,
    meta: dict[str, Any],
    cache_dir: Path,
    preprocess: Preprocess,
    cache_gb: float = CACHE_GB,
) -> Entry:
    """Derive from a sidecar what a read needs."""
    preprocess.check_channels(len(meta["statistics"]), subject.paths[0])
    mappings, ranges = [], []
    for channel, measured in enumerate(meta["statistics"]):
        if measured.get("missing"):  # its file was not there: zeros, whatever the normalization
            mappings.append((1.0, 0.0, 0.0, 0.0))
            ranges.append(np.zeros(2))
            continue
        stats = by_rules(measured, preprocess.rules)
        quantile = partial(quantile_of, meta, cache_dir, channel)
        gain, bias, low, high = preprocess.mapping(stats, quantile, channel)
        scale, offset = meta["scale"][channel], meta["offset"][channel]
        mappings.append((gain * scale, gain * offset + bias, low, high))
        ends = np.array([stats["min"], stats["max"]]) * gain + bias
        ranges.append(np.clip(ends, low, high))
        if ends[1] <= low or ends[0] >= high:
            raise BrokenVolume(
                subject.paths[0],
                f"intensities {stats['min']:g} to {stats['max']:g} lie outside window_hu "
                f"{preprocess.channel(channel).window_hu}: are they Hounsfield units?",
            )
    mask = meta.get("mask") or meta.get("counts", {}).get("mask")
    columns = np.array(mappings, np.float32).T
    lowest, highest = np.array(ranges).T
    return Entry(
        subject, meta["key"], Stored.of(meta, cache_gb), tuple(meta["spacing_mm"]),
        columns[0], columns[1], columns[2], columns[3],
        raw=all(mapping == (1.0, 0.0, -np.inf, np.inf) for mapping in mappings),
        lowest=lowest,
        highest=highest,
        masked=bool({"mask", "counts"} & meta.keys()),
        mask=Stored.of(mask, cache_gb) if mask else None,
        counts=Counts(**meta["counts"]) if "counts" in meta else None,
    )  # fmt: skip


def quantile_of(
    meta: dict[str, Any], cache_dir: Path, channel: int, percent: float, foreground: bool = False
) -> float:
    """Return a percentile of a channel of a volume in the cache: of all voxels, or foreground."""
    stats = meta["statistics"][channel]
    quick = stats["robust"]["foreground_percentiles"] if foreground else stats["percentiles"]
    if str(percent) in quick:
        return quick[str(percent)]
    table = np.load(cache_dir / f"{meta['key']}.quantiles.npy")
    row = channel + len(meta["statistics"]) * foreground
    return float(table[row][np.searchsorted(PERCENTILES, round(percent, 2) - 1e-6)])
