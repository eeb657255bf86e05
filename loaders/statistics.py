"""What is measured of a channel when a volume is built: quantiles, and the foreground."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loaders.texts import Record

# Percentiles that are measured when a volume is built: steps of 0.1, in the tails of 0.01.
PERCENTILES = np.unique(
    np.round(np.r_[np.arange(0, 1, 0.01), np.arange(1, 99, 0.1), np.arange(99, 100.005, 0.01)], 2)
)
Statistics = Record  # of one channel, see `statistics`
# Percentiles that lie in the sidecar itself.
QUICK = (
    *(0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 70.0, 80.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0),
)
HOT = 1e-4  # part of the voxels at either end that may be anything, and their least number
MANY_HOT = 16
HOT_RANGES = 4


def statistics(data: np.ndarray, scale: float, offset: float) -> tuple[Statistics, np.ndarray]:
    """Measure one channel (X, Y, Z) of stored numbers.

    Returns:
        The statistics in intensities, and the quantiles (2, N) at `PERCENTILES`: of all voxels, and
        of the foreground. Foreground are the voxels above Otsu's threshold; under `robust` stands
        what is found where hot and cold voxels count no more than those beside them in rank, see
        `by_rules`.
    """
    ranked = Ranked.of(data, scale, offset)
    values, counts = ranked.histogram()
    mean = float((values * counts).sum() / ranked.total)
    quantiles = ranked.quantiles(0, ranked.total)
    robust, (start, stop) = robust_foreground(ranked)
    of_foreground = ranked.quantiles(start, stop)
    return {
        "min": float(quantiles[0]),
        "max": float(quantiles[-1]),
        "mean": mean,
        "std": math.sqrt(float(((values - mean) ** 2 * counts).sum() / ranked.total)),
        **foreground(values, counts),
        "percentiles": quick(quantiles),
        "robust": {**robust, "foreground_percentiles": quick(of_foreground)},
    }, np.stack([quantiles, of_foreground])


def by_rules(stats: Statistics, rules: int) -> Statistics:
    """Return a channel's statistics with the foreground that these rules find."""
    return {**stats, **stats["robust"]} if rules > 1 else stats


def quick(quantiles: np.ndarray) -> dict[str, float]:
    """Return the quantiles that lie in the sidecar itself, by percent."""
    where = np.searchsorted(PERCENTILES, np.array(QUICK) - 1e-6)
    return {str(p): float(quantiles[i]) for p, i in zip(QUICK, where, strict=True)}


def foreground(values: np.ndarray, counts: np.ndarray) -> Statistics:
    """Return Otsu's threshold and what lies above it."""
    threshold = otsu(values, counts)
    values, counts, total = values[values > threshold], counts[values > threshold], counts.sum()
    weight = max(float(counts.sum()), 1.0)
    mean = float((values * counts).sum() / weight) if len(values) else threshold
    return {
        "foreground_threshold": threshold,
        "foreground_mean": mean,
        "foreground_std": math.sqrt(float(((values - mean) ** 2 * counts).sum() / weight)),
        "foreground_fraction": float(counts.sum() / total),
    }


def robust_foreground(ranked: Ranked) -> tuple[Statistics, tuple[int, int]]:
    """Find the foreground whatever a few voxels say, and the ranks between which it lies.

    The outermost voxels at either end count as what stands beside them in rank. Those that lie
    further out by several times that range are hot and no foreground (a detector element, a spike).
    """
    ends = min(max(round(HOT * ranked.total), MANY_HOT), ranked.total // 20)
    low, high = ranked.at(ends), ranked.at(ranked.total - 1 - ends)
    if low == high:  # less than that is no background: it has to be what was looked for
        ends, limit = 0, None
    else:
        limit = high + HOT_RANGES * (high - low)
    found = foreground(*ranked.histogram(ends))
    stop = ranked.total if limit is None else ranked.up_to(limit)
    hot = {"foreground_limit": limit, "hot_voxels": ranked.total - stop}
    start = ranked.total - round(found["foreground_fraction"] * ranked.total)
    return found | hot, (min(start, stop - 1), stop)


@dataclass
class Ranked:
    """A channel's voxels in the order of their intensities.

    Args:
        values: Stored numbers, those of the lowest intensity first.
        cumulated: Voxels up to each value; None where each stands for itself.
        scale: Slope from stored numbers to intensities.
        offset: Intercept.
    """

    values: np.ndarray
    cumulated: np.ndarray | None
    scale: float
    offset: float

    @classmethod
    def of(cls, data: np.ndarray, scale: float, offset: float) -> Ranked:
        """Count integers; sort what has too many values to be counted."""
        low, high = data.min(), data.max()
        if data.dtype.kind in "iu" and int(high) - int(low) < 2**17:
            counts = count_integers(data, int(low), int(high))
            present = np.flatnonzero(counts)[:: 1 if scale > 0 else -1]
            return cls(present + int(low), np.cumsum(counts[present]), scale, offset)
        values = np.sort(data.ravel(order="K"))  # in the order of memory, whatever the axes
        return cls(values[:: 1 if scale > 0 else -1], None, scale, offset)

    @property
    def total(self) -> int:
        """Number of voxels."""
        return len(self.values) if self.cumulated is None else int(self.cumulated[-1])

    def intensities(self, values: np.ndarray) -> np.ndarray:
        """Return the intensities of stored numbers."""
        return values.astype(np.float64) * self.scale + self.offset

    def stored(self, ranks: np.ndarray) -> np.ndarray:
        """Return the stored numbers of the voxels with these ranks, from 0."""
        if self.cumulated is not None:
            ranks = np.searchsorted(self.cumulated, ranks, "right")
        return self.values[ranks.astype(np.intp)]

    def at(self, rank: int) -> float:
        """Return the intensity of the voxel with this rank, from 0."""
        return float(self.intensities(self.stored(np.array([rank])))[0])

    def up_to(self, limit: float) -> int:
        """Return how many voxels lie at or below an intensity."""

        def beyond(place: int) -> bool:
            return float(self.intensities(self.values[place : place + 1])[0]) > limit

        place = bisect_left(range(len(self.values)), True, key=beyond)
        if self.cumulated is None:
            return place
        return int(self.cumulated[place - 1]) if place else 0

    def quantiles(self, start: int, stop: int) -> np.ndarray:
        """Return the quantiles at `PERCENTILES` of the ranks from start to stop, as numpy's."""
        position = start + PERCENTILES / 100 * (stop - 1 - start)
        lower, upper = (self.intensities(self.stored(end(position))) for end in (np.floor, np.ceil))
        return lower + (upper - lower) * (position - np.floor(position))

    def histogram(self, ends: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return intensities in rising order and how many voxels have each.

        Sorted voxels fall into 4096 fine bins.

        Args:
            ends: So many voxels at either end count as what stands beside them in rank.
        """
        if self.cumulated is None:
            values, counts = binned(self.values[ends : self.total - ends], self.scale > 0)
        else:
            inner = np.clip(self.cumulated, ends, self.total - ends)
            counts = np.diff(inner, prepend=ends)
            values, counts = self.values[counts > 0], counts[counts > 0]
        counts[0] += ends
        counts[-1] += ends
        return self.intensities(values), counts


def count_integers(data: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return how often each integer from low to high occurs."""
    flat = data.ravel(order="K")  # in the order of memory, whatever the axes
    counts = np.zeros(high - low + 1, np.int64)
    for start in range(0, flat.size, 2**17):
        part = np.subtract(flat[start : start + 2**17], low, dtype=np.intp)
        counts += np.bincount(part, minlength=len(counts))
    return counts


def binned(values: np.ndarray, rising: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of sorted numbers in 4096 equal bins, and how many fall into each."""
    values = values if rising else values[::-1]
    edges = np.linspace(float(values[0]), float(values[-1]), 4097)[:-1]
    # The least numbers of the dtype that reach them; else numpy copies all values as float64.
    least = (np.ceil(edges) if values.dtype.kind in "iu" else edges).astype(values.dtype)
    least = np.where(least < edges, np.nextafter(least, np.inf), least).astype(values.dtype)
    firsts = np.unique(np.searchsorted(values, least))
    stops = np.append(firsts[1:], len(values))
    means = [float(values[a:b].mean(dtype=np.float64)) for a, b in zip(firsts, stops, strict=True)]
    order = slice(None, None, 1 if rising else -1)
    return np.array(means)[order], (stops - firsts)[order]


def otsu(values: np.ndarray, counts: np.ndarray) -> float:
    """Return the threshold with the largest variance between the two classes (Otsu 1979)."""
    if len(values) < 2:
        return float(values[0])
    weight = np.cumsum(counts)[:-1].astype(np.float64)
    total, mass = float(counts.sum()), np.cumsum(values * counts)
    below, above = mass[:-1] / weight, (mass[-1] - mass[:-1]) / (total - weight)
    return float(values[np.argmax(weight * (total - weight) * (below - above) ** 2)])


def quick_quantile(stats: Statistics) -> Callable[..., float]:
    """Return `quantile` of `Normalization.clip`, interpolated between what lies in a sidecar."""

    def quantile(percent: float, of_foreground: bool = False) -> float:
        known = stats["foreground_percentiles" if of_foreground else "percentiles"]
        return float(np.interp(percent, [float(p) for p in known], list(known.values())))

    return quantile
