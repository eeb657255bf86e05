"""What a data set is like: grid, intensities and foreground, measured on some of its volumes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np

from loaders.assemble import read_subject, storable
from loaders.in_place import Found, find_in_place, stays
from loaders.preprocess import RULES, Preprocess
from loaders.progress import num_threads, progress_bar
from loaders.readers import BrokenVolume, Reading, ras_axes
from loaders.statistics import PERCENTILES, by_rules, statistics
from loaders.subjects import Subject

MEASURED = 32  # volumes that are read; medians over them hardly move after that
THIN = 4  # an axis of fewer voxels than this is one that a 3D network has nothing to learn along
AIR_HU = (-1100.0, -900.0)  # air is -1000, and with noise and calibration not exactly so
AIR_PERCENT = 1.0  # so much of it shows that -1000 is air; outside the scanner's circle lies -2000


@dataclass(frozen=True)
class ChannelFacts:
    """Intensities of a channel: of one volume, or medians over several.

    Args:
        lowest: Lowest intensity; of several volumes the lowest of all.
        highest: Highest intensity.
        low: 0.5th percentile.
        middle: 50th percentile.
        high: 99.5th percentile.
        foreground: Share of the voxels above Otsu's threshold.
        whole_numbers: Intensities are whole numbers.
        hounsfield: Whole numbers with air at -1000, as CT has.
    """

    lowest: float
    highest: float
    low: float
    middle: float
    high: float
    foreground: float
    whole_numbers: bool
    hounsfield: bool

    @classmethod
    def of(cls, data: np.ndarray, scale: float, offset: float) -> ChannelFacts:
        """Measure the stored numbers (X, Y, Z) of one channel."""
        found, tables = statistics(data, scale, offset)
        of_all = tables[0]  # of all voxels; the other row is of the foreground
        low, middle, high = np.interp((0.5, 50.0, 99.5), PERCENTILES, of_all).tolist()
        below, up_to = np.interp(AIR_HU, of_all, PERCENTILES).tolist()
        whole = all(float(n).is_integer() for n in (scale, offset)) and are_whole(data)
        air = AIR_HU[0] <= found["min"] <= AIR_HU[1] or up_to - below >= AIR_PERCENT
        return cls(
            lowest=found["min"],
            highest=found["max"],
            low=low,
            middle=middle,
            high=high,
            foreground=by_rules(found, RULES)["foreground_fraction"],
            whole_numbers=whole,
            hounsfield=whole and air and high > 0,
        )

    @classmethod
    def over(cls, several: Sequence[ChannelFacts]) -> ChannelFacts:
        """The same channel over several volumes."""

        def all_of(name: str) -> list[float]:
            return [getattr(one, name) for one in several]

        return cls(
            lowest=min(all_of("lowest")),
            highest=max(all_of("highest")),
            whole_numbers=all(all_of("whole_numbers")),
            hounsfield=2 * sum(all_of("hounsfield")) > len(several),
            low=median(all_of("low")),
            middle=median(all_of("middle")),
            high=median(all_of("high")),
            foreground=median(all_of("foreground")),
        )

    def __str__(self) -> str:
        kind = "HU-like" if self.hounsfield else "whole numbers" if self.whole_numbers else "floats"
        return (
            f"{self.lowest:.6g} to {self.highest:.6g}, {kind}; percentiles 0.5, 50, 99.5: "
            f"{self.low:.6g}, {self.middle:.6g}, {self.high:.6g}; foreground {self.foreground:.2g}"
        )


@dataclass(frozen=True)
class VolumeFacts:
    """What is measured of one volume, axes turned to RAS+.

    Args:
        shape: Voxels along X, Y, Z.
        spacing_mm: Voxel size along X, Y, Z in millimeters.
        channels: Each channel's intensities.
        holes: Some voxels are NaN or infinite.
    """

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    channels: tuple[ChannelFacts, ...]
    holes: bool

    @classmethod
    def of(cls, subject: Subject) -> VolumeFacts:
        """Read and measure a volume; raises `BrokenVolume` as building the cache would."""
        if stays(subject, Reading()):
            first = Reading(nan="fill", volumes_4d="first")
            return cls.of_store(find_in_place(subject, first, Preprocess()))
        read = read_subject(subject, Reading(nan="fill", volumes_4d="channels"))
        holes = read.data.dtype.kind == "f" and not np.isfinite(read.data).all()
        volume = storable(read, subject.paths[0], "fill")
        axes, _ = ras_axes(volume.affine)
        channels = tuple(
            ChannelFacts.of(data, float(volume.scale), float(volume.offset)) for data in volume.data
        )
        for channel in channels:
            if channel.lowest == channel.highest:
                raise BrokenVolume(subject.paths[0], f"all voxels are {channel.lowest:g}")
        return cls(
            shape=tuple(volume.data.shape[1 + axis] for axis in axes),
            spacing_mm=tuple(volume.spacing_mm[axis] for axis in axes),
            channels=channels,
            holes=holes,
        )

    @classmethod
    def of_store(cls, found: Found) -> VolumeFacts:
        """Measure a sample of a volume that stays where it is."""
        channels = tuple(ChannelFacts.of(data, 1.0, 0.0) for data in found.sample().data)
        shape, spacing_mm = found.header.data.shape[1:], found.header.spacing_mm
        return cls(shape, spacing_mm, channels, holes=False)


@dataclass(frozen=True)
class Fingerprint:
    """Facts of a data set, axes turned to RAS+; numbers are medians over the volumes measured.

    Args:
        num_volumes: Volumes of the data set.
        num_measured: Volumes that were read, broken ones apart.
        broken: Those that cannot be read, and why.
        num_others: Volumes measured that have another number of channels than most; their
            intensities are left out.
        several_in_a_file: Channels come from one file each, as 4D files and colors do.
        shape: Voxels along X, Y, Z.
        size_mm: Field of view along X, Y, Z in millimeters.
        spacing_mm: Voxel size along X, Y, Z in millimeters.
        spread: Largest spacing over the smallest, per axis.
        channels: Each channel's intensities.
        holes: Some voxels are NaN or infinite.
    """

    num_volumes: int
    num_measured: int
    broken: tuple[BrokenVolume, ...]
    num_others: int
    several_in_a_file: bool
    shape: tuple[int, ...]
    size_mm: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    spread: tuple[float, ...]
    channels: tuple[ChannelFacts, ...]
    holes: bool

    @property
    def thinnest(self) -> int:
        """The axis with the fewest voxels; the last of several."""
        return min(reversed(range(3)), key=lambda axis: self.shape[axis])

    @property
    def spatial_dims(self) -> int:
        """2 for pictures and for stacks of a few slices, else 3."""
        return 2 if self.shape[self.thinnest] < THIN else 3

    @property
    def kept_axes(self) -> tuple[int, ...]:
        """Axes that a network sees: all, or but for the thinnest in 2D."""
        return tuple(a for a in range(3) if self.spatial_dims == 3 or a != self.thinnest)

    @property
    def anisotropy(self) -> float:
        """Largest voxel edge over the smallest, of the axes that a network sees."""
        seen = [self.spacing_mm[axis] for axis in self.kept_axes]
        return max(seen) / min(seen)

    @property
    def foreground(self) -> float:
        """Share of the voxels that are foreground in the channel that has most of it."""
        return max(channel.foreground for channel in self.channels)

    def lines(self) -> list[str]:
        """The facts as a table, a line each."""
        spread = max(self.spread)
        same = "the same in all" if spread < 1.01 else f"varies {spread:.3g}-fold"
        others = f" ({self.num_others} volumes have another number)" * bool(self.num_others)
        rows = {
            "volumes": f"{self.num_volumes} ({self.num_measured} measured, "
            f"{len(self.broken)} of them broken)",
            "dimensions": f"{self.spatial_dims}",
            "shape": f"{times(self.shape)} (median, axes as RAS+)",
            "spacing_mm": f"{times(self.spacing_mm)} (median; {same})",
            "anisotropy": f"{self.anisotropy:.3g}",
            "channels": f"{len(self.channels)}{others}",
        }
        rows |= {f"channel {number}": str(facts) for number, facts in enumerate(self.channels)}
        if self.holes:
            rows["NaN, infinite"] = "in some voxels"
        rows |= {f"broken {n}": str(error) for n, error in enumerate(self.broken, start=1)}
        return [f"{name:<14}{fact}" for name, fact in rows.items()]


def measure(subjects: Sequence[Subject], most: int = MEASURED, seed: int = 0) -> Fingerprint:
    """Measure a data set on some of its volumes, each read once; no more at a time than in caching.

    Args:
        subjects: The volumes.
        most: Read at most this many, drawn at random.
        seed: Another seed draws others.

    Raises:
        BrokenVolume: The first of them, where none can be read.

    Example:
        >>> measure(find_subjects("data/demo")).spacing_mm  # doctest: +SKIP
        (2.0, 2.0, 2.0)
    """
    if most < 1:
        raise ValueError(f"{most} volumes cannot be measured: give 1 or more")
    chosen = sorted(random.Random(seed).sample(range(len(subjects)), min(most, len(subjects))))
    found: list[VolumeFacts] = []
    broken: list[BrokenVolume] = []
    with ThreadPoolExecutor(num_threads()) as pool:
        tasks = [pool.submit(VolumeFacts.of, subjects[number]) for number in chosen]
        for task in progress_bar(tasks, "measuring", show=True):
            try:
                found.append(task.result())
            except BrokenVolume as error:
                broken.append(error)
    if not found:
        raise broken[0]
    (usual, count), *_ = Counter(len(one.channels) for one in found).most_common()
    alike = [one for one in found if len(one.channels) == usual]
    shapes, spacings = (np.array([getattr(v, n) for v in found]) for n in ("shape", "spacing_mm"))
    return Fingerprint(
        num_volumes=len(subjects),
        num_measured=len(chosen),
        broken=tuple(broken),
        num_others=len(found) - count,
        several_in_a_file=usual > len(subjects[chosen[0]].paths),
        shape=tuple(round(n) for n in np.median(shapes, 0).tolist()),
        size_mm=tuple(np.median(shapes * spacings, 0).tolist()),
        spacing_mm=tuple(np.median(spacings, 0).tolist()),
        spread=tuple((spacings.max(0) / spacings.min(0)).tolist()),
        channels=tuple(map(ChannelFacts.over, zip(*(one.channels for one in alike), strict=True))),
        holes=any(one.holes for one in found),
    )


def are_whole(data: np.ndarray, most: int = 2**16) -> bool:
    """Whether stored numbers are whole, asked of some that are spread over the volume."""
    if data.dtype.kind != "f":
        return True
    some = data.ravel(order="K")[:: max(data.size // most, 1)]
    return bool((some == np.rint(some)).all())


def times(sizes: Sequence[float]) -> str:
    """Sizes as `64 x 64 x 32`."""
    return " x ".join(f"{n:.6g}" for n in sizes)
