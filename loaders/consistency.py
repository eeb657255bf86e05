"""Whether the volumes of a data set go together: asked once, before anything is cached.

What a header tells is asked of headers; formats that tell nothing before they are read whole
(DICOM, TIFF, pictures) are held against the others in the pass that reads them, which is the one
that caches. `vae3d check-data` and every command that builds a cache say the same lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loaders.assemble import (
    color_hint,
    each,
    lacks,
    missing_files,
    note_lines,
    other_channels,
    read_each,
    require_files,
    storable,
    with_remedy,
)
from loaders.build import measured
from loaders.flat import flat_faults
from loaders.in_place import find_in_place, stays
from loaders.intensities import intensity_lines
from loaders.label_maps import read_label_map
from loaders.preprocess import Preprocess
from loaders.progress import num_threads, progress_bar
from loaders.readers import (
    READING,
    BrokenVolume,
    MissingFile,
    Reading,
    Volume,
    check_one_grid,
    is_there,
    ras_axes,
    read_header,
)  # fmt: skip
from loaders.series import by_file
from loaders.splits import Split
from loaders.statistics import Statistics
from loaders.streamed import is_streamed
from loaders.subjects import Subject

UNEVEN = 1.5  # spacings that differ by more than this factor are told


@dataclass(frozen=True)
class Facts:
    """What is known of one volume without its voxels.

    Args:
        shape: Voxels along X, Y, Z as stored.
        channels: Channels.
        spacing_mm: Voxel size in millimeters.
        dtype: Of the stored numbers.
        orientation: Where the stored axes run, for example RAS or LPI.
    """

    shape: tuple[int, int, int]
    channels: int
    spacing_mm: tuple[float, float, float]
    dtype: str
    orientation: str

    @property
    def dims(self) -> int:
        """3 for a volume, 2 for a picture: one voxel thick."""
        return 3 if min(self.shape) > 1 else 2

    @classmethod
    def of(cls, volume: Volume, channels: int | None = None) -> Facts:
        """Describe a volume; its voxels are not looked at."""
        count, x, y, z = volume.data.shape
        axes, flips = ras_axes(volume.affine)
        letters = {axis: "RASLPI"[to + 3 * flips[to]] for to, axis in enumerate(axes)}
        orientation = "".join(letters[axis] for axis in range(3))
        dtype = volume.data.dtype.name
        return cls((x, y, z), channels or count, volume.spacing_mm, dtype, orientation)

    @classmethod
    def of_record(cls, meta: Mapping[str, Any]) -> Facts:
        """Describe the source of a volume that lies in the cache; see `VolumeStore.meta`."""
        shape = meta["shape"][0], *meta["undo"]["source_shape"]
        data = np.broadcast_to(np.zeros((), meta["dtype"]), shape)
        return cls.of(Volume(data, np.array(meta["undo"]["source_affine"])))


@dataclass
class Survey:
    """A data set as it will be trained on, and what there is to say of it.

    Args:
        subjects: The volumes that are used.
        split: Ids of train, val and test.
        lines: What is told, whatever comes of it.
        reading: How the files are read.
        preprocess: What will be made of them.
        on_error: With skip, broken files are no fault: they are left out.
        in_channels: Channels that the model takes; None for any.
        num_slices: Neighboring slices that become channels.
        spatial_dims: 3 for volumes, 2 for slices; None where nobody says.
        root: What the user named.
        facts: Of the volumes that are known, by id.
        faults: Why training would not begin; each names a file.
    """

    subjects: list[Subject]
    split: Split
    lines: list[str] = field(default_factory=list)
    reading: Reading = READING
    preprocess: Preprocess = field(default_factory=Preprocess)
    on_error: Literal["raise", "skip"] = "raise"
    in_channels: int | None = None
    num_slices: int = 1
    spatial_dims: int | None = None
    root: str = ""
    facts: dict[str, Facts] = field(default_factory=dict)
    faults: list[BrokenVolume] = field(default_factory=list)

    def ask_headers(self) -> None:
        """Hold the headers of all files against each other."""
        groups = by_file(self.subjects)
        with ThreadPoolExecutor(num_threads()) as pool:
            asked = zip(
                groups, pool.map(self.header_of, (group[0] for group in groups)), strict=True
            )
            pairs = [(s, answer) for group, answer in asked for s in group]
        answers = [answer for _, answer in pairs]
        self.facts = {s.id: answer for s, answer in pairs if isinstance(answer, Facts)}
        broken = [answer for answer in answers if isinstance(answer, BrokenVolume)]
        faults = [with_remedy(f, len(answers)) for f in broken if not self.left_out(f)]
        self.faults = faults + self.wrong_channels() + self.flat()
        self.lines += self.describe()
        lacking = [s for s in self.subjects if missing_files(s)]
        if lacking and self.reading.missing != "error":
            how = "are left out" if self.reading.missing == "skip" else "get a channel of zeros"
            first = lacking[0].id
            self.lines.append(f"missing: {len(lacking)} subjects lack a file and {how}: {first}")
        if untold := answers.count(None):
            self.lines.append(
                f"volumes: {untold} of {len(answers)} are of formats whose headers tell too "
                f"little; they are held against the others as they are read"
            )

    def header_of(self, subject: Subject) -> Facts | BrokenVolume | None:
        """Return what the headers of a subject tell, be it that they are broken."""
        try:
            return facts_of(subject, self.reading)
        except BrokenVolume as error:
            return error

    def left_out(self, fault: BrokenVolume) -> bool:
        """Whether training goes on without such a volume."""
        skip = isinstance(fault, MissingFile) and self.reading.missing == "skip"
        return skip or self.on_error == "skip"

    def add(self, found: Mapping[str, Facts]) -> list[str]:
        """Add what reading has told of volumes whose headers do not; return the lines on it."""
        if not found.keys() - self.facts.keys():
            return []
        self.facts = {**found, **self.facts}  # of two, the header's: reading may change the dtype
        lines = self.describe()
        self.lines += lines
        return lines

    def wrong_channels(self) -> list[BrokenVolume]:
        """Name the volumes whose channels are not those of the model or of the others."""
        channels = {id: facts.channels for id, facts in self.facts.items()}
        return wrong_channels(self.subjects, channels, self.in_channels, self.num_slices)

    def flat(self) -> list[BrokenVolume]:
        """Name a volume that is one voxel thick where that is not meant."""
        if self.spatial_dims is None:
            return []
        thickness = {id: min(facts.shape) for id, facts in self.facts.items()}
        return flat_faults(self.subjects, thickness, self.spatial_dims, self.root)

    def describe(self) -> list[str]:
        """Describe the known volumes in a line, and what the preprocessing leaves uneven."""
        known = [(s.id, self.facts[s.id]) for s in self.subjects if s.id in self.facts]
        if not known:
            return []
        facts = [f for _, f in known]
        shape = " x ".join(span([f.shape[axis] for f in facts]) for axis in range(3))
        spacing = " x ".join(span([f.spacing_mm[axis] for f in facts]) for axis in range(3))
        channels = span([f.channels for f in facts])
        words = [f"{shape} voxels of {spacing} mm", f"{channels} channel{'s' * (channels != '1')}"]
        orientations = Counter(f.orientation for f in facts)
        words += [counted(Counter(f.dtype for f in facts)), counted(orientations)]
        lines = [f"volumes: {'; '.join(words)}"]
        lines += self.uneven_spacing(known)
        if len(orientations) > 1 and not self.preprocess.orient_ras:
            lines.append(
                f"orientation: {counted(orientations)}; --data.preprocess.orient_ras true makes "
                f"it one"
            )
        return lines

    def uneven_spacing(self, known: Sequence[tuple[str, Facts]]) -> list[str]:
        """Tell of the axis along which voxel sizes differ most, where nothing makes them one."""
        if self.preprocess.spacing_mm is not None:
            return []
        ends = []
        for axis, name in enumerate("XYZ"):
            sizes = {id: f.spacing_mm[axis] for id, f in known}
            low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            told = f"{sizes[low]:.4g} mm ({low}) to {sizes[high]:.4g} mm ({high}) along {name}"
            ends.append((sizes[high] / sizes[low], told))
        ratio, told = max(ends)
        remedy = "--data.preprocess.spacing_mm makes it one"
        return [f"spacing: {told}; {remedy}"] if ratio > UNEVEN else []

    def read_voxels(self, labels: bool = False, threads: int | None = None) -> list[BrokenVolume]:
        """Read every volume and label map to its end, in parallel, and settle the faults.

        Args:
            labels: Whether the label maps are used, so that a broken one is a fault.
            threads: Files read at once; None for one per core, 8 at most.

        Returns:
            What is broken but no fault, since training leaves it out or does not use it.
        """
        groups = by_file(self.subjects)
        with ThreadPoolExecutor(threads or num_threads()) as pool:
            tasks = [pool.submit(self.check_each, group) for group in groups]
            done = [task.result() for task in progress_bar(tasks, "checking", show=True)]
        checked = {
            s.id: one if isinstance(one, Checked) else Checked(fault=one)
            for group, each in zip(groups, done, strict=True)
            for s, one in zip(group, each, strict=True)
        }
        found = [checked[s.id] for s in self.subjects]
        broken = [one.fault for one in found if one.fault is not None]
        maps = [one.label_fault for one in found if one.label_fault is not None]
        whole = [
            (s.paths[0], one)
            for s, one in zip(self.subjects, found, strict=True)
            if one.facts is not None
        ]
        self.lines += note_lines([(path, one.notes) for path, one in whole])
        self.lines += intensity_lines(
            [(str(path), one.statistics) for path, one in whole], self.preprocess
        )
        self.add({id: one.facts for id, one in checked.items() if one.facts is not None})
        self.faults = [with_remedy(f, len(found)) for f in broken if not self.left_out(f)]
        self.faults += self.wrong_channels() + self.flat()
        if labels:
            unmapped = [s for s in self.subjects if s.label_map is None]
            self.faults += maps + missing_label_maps(unmapped)
        return [f for f in broken if self.left_out(f)] + (not labels) * maps

    def check_each(self, group: Sequence[Subject]) -> list[Checked | BrokenVolume]:
        """Read the volumes of one file to their end; a sample of what stays or is too large."""
        if stays(group[0], self.reading):
            return each(group, partial(check_in_place, self.reading, self.preprocess))
        if is_streamed(group[0], self.reading):
            reading = replace(self.reading, in_place=True)
            preprocess = Preprocess(orient_ras=self.preprocess.orient_ras)
            return each(group, partial(check_in_place, reading, preprocess))
        return read_each(group, self.reading, partial(check_volume, self.reading))

    def to_dict(self) -> dict[str, object]:
        """Return plain data, for JSON."""
        part_of = {id: name for name, ids in self.split.items() for id in ids}
        volumes = {}
        for s in self.subjects:
            about = vars(self.facts[s.id]) if s.id in self.facts else {}
            paths = [str(path) for path in s.paths]
            volumes[s.id] = {"paths": paths, "split": part_of.get(s.id), **about}
        return {
            "consistent": not self.faults,
            "persons": len({s.person for s in self.subjects}),
            "volumes": volumes,
            "lines": self.lines,
            "faults": [{"path": fault.path, "reason": fault.reason} for fault in self.faults],
        }


def refuse(faults: Sequence[BrokenVolume], say: Callable[[str], None]) -> None:
    """Raise where there are faults, after a line on each of several."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        for fault in faults:
            say(str(fault))
        raise ValueError(f"{faults[0]} ({len(faults)} volumes do not fit, all listed above)")


def facts_of(subject: Subject, reading: Reading = READING) -> Facts | None:
    """Ask the headers of a subject's files.

    Args:
        subject: Whose files.
        reading: How they are read.

    Returns:
        The facts; None where a format tells nothing before it is read whole.

    Raises:
        BrokenVolume: For what the headers alone give away.

    Example:
        >>> facts_of(subject) or Facts.of(read_subject(subject, READING))
    """
    missing = missing_files(subject)
    if missing and reading.missing != "zero":
        raise lacks(subject, missing[0])
    found: dict[Path, Volume] = {}
    for path in subject.paths:
        if path not in missing:
            header = read_header(path, reading)
            if header is None:
                return None
            found[path] = header
    check_one_grid(found)
    channels = sum(len(found[path].data) if path in found else 1 for path in subject.paths)
    channels //= subject.time.count if subject.time else 1
    return Facts.of(next(iter(found.values())), channels)


def missing_label_maps(subjects: Sequence[Subject]) -> list[BrokenVolume]:
    """Name the volumes that a sampler by labels cannot sample: their map is not there."""
    faults = []
    for s in subjects:
        if s.label_map is None:
            faults.append(BrokenVolume(s.paths[0], f"{s.id} has no label map (column label_map)"))
        elif not is_there(s.label_map):
            faults.append(BrokenVolume(s.label_map, f"no such file (column label_map of {s.id})"))
    return faults


def span(values: Sequence[float]) -> str:
    """Write the range of numbers, or the one that all are."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}-{high}"


def counted(kinds: Counter[str]) -> str:
    """Write kinds with their numbers, or the one that there is."""
    several = len(kinds) > 1
    return ", ".join(f"{count} {kind}" if several else kind for kind, count in kinds.most_common())


def wrong_channels(
    subjects: Sequence[Subject],
    channels: Mapping[str, int],
    in_channels: int | None = None,
    num_slices: int = 1,
) -> list[BrokenVolume]:
    """Name the volumes whose channels are not those of the model, or else of most volumes.

    Args:
        subjects: The volumes.
        channels: Of those that are known, by id.
        in_channels: Channels that the model takes; None for what most volumes have.
        num_slices: Neighboring slices that become channels.
    """
    known = [s for s in subjects if s.id in channels]
    counts = Counter(channels[s.id] for s in known)
    if not counts:
        return []
    usual = counts.most_common(1)[0][0]
    if len(counts) == 1:
        given = usual * num_slices
        if in_channels in (None, given):
            return []
        return [BrokenVolume(known[0].paths[0], other_channels(given, in_channels))]
    wanted, others = usual, f"{counts[usual]} others have {usual}"
    if in_channels is not None:
        wanted, others = in_channels // num_slices, f"the model takes {in_channels}"
    others += color_hint(known[0], set(counts))
    return [
        BrokenVolume(s.paths[0], f"{s.id} has {channels[s.id]} channels, {others}")
        for s in known
        if channels[s.id] != wanted
    ]


@dataclass
class Checked:
    """One volume after it was read to its end.

    Args:
        facts: What it is; None where it is broken.
        fault: What is wrong with it, or None.
        label_fault: What is wrong with its label map, or None.
        notes: What its reader had to assume.
        statistics: Of the intensities of each channel.
    """

    facts: Facts | None = None
    fault: BrokenVolume | None = None
    label_fault: BrokenVolume | None = None
    notes: tuple[str, ...] = ()
    statistics: Sequence[Statistics] = ()


def check_in_place(reading: Reading, preprocess: Preprocess, subject: Subject) -> Checked:
    """Look at a sample of a volume that stays where it is."""
    require_files(subject, reading)
    found = find_in_place(subject, reading, preprocess)
    sample = found.sample()
    volume = storable(sample.volume, subject.paths[0], reading.nan)
    stats, _ = measured(volume, subject.paths[0], sample.drawn)
    return Checked(Facts.of(found.header), notes=found.header.notes, statistics=stats)


def check_volume(reading: Reading, subject: Subject, read: Volume) -> Checked:
    """Look at all voxels of a volume that was read, and read its label map."""
    volume = storable(read, subject.paths[0], reading.nan)
    stats, _ = measured(volume, subject.paths[0])
    try:
        if subject.label_map is not None:
            read_label_map(subject, volume)
    except BrokenVolume as error:
        return Checked(Facts.of(volume), None, error, read.notes, stats)
    return Checked(Facts.of(volume), notes=read.notes, statistics=stats)
