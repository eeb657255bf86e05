"""Numbers that judge drawn volumes: how far they are from real ones, how varied, and how copied.

All of it is on rows of float64, a volume each (features of a network, voxels, latents): no network
and no file here. Every number means something only beside the same number of real volumes against
real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

DRAWS = 20  # splits of the real volumes that a floor is the mean of
BINS = 4096  # of a histogram
COUNTED = 200  # volumes of which every way of sharing ranks out is counted
RESAMPLED = 1000  # bootstrap draws of an interval
AGAIN = 25  # bootstrap draws within each of the splits
Rows = np.ndarray  # (N, D)
Measured = Mapping[str, float | np.ndarray]  # a number, or what its mean over volumes is


def kernel(a: Rows, b: Rows) -> Rows:
    """The cubic kernel (x y / d + 1)^3 of Binkowski et al. 2018 (KID)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(a: Rows, b: Rows) -> float:
    """Squared maximum mean discrepancy, unbiased: 0 on average where both are of one kind."""
    counts = [np.ones((1, len(rows))) for rows in (a, b)]
    return float(_discrepancies(a, b, counts[0], counts[1])[0])


def kernel_interval(a: Rows, b: Rows, seed: int = 0, part: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of `kernel_distance`: volumes of both sides drawn again and again."""
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLED) for x in (a, b)]
    values = _discrepancies(a, b, counts[0], counts[1])
    low, high = np.nanquantile(values, [(1 - part) / 2, (1 + part) / 2])
    return float(low), float(high)


def _discrepancies(a: Rows, b: Rows, m: Rows, n: Rows) -> Rows:
    """Unbiased discrepancies with volume i taken `m[:, i]` and `n[:, i]` times.

    A volume that is drawn twice makes no pair with itself, as it makes none when it is drawn once.
    """

    def within(x: Rows, count: Rows) -> Rows:
        k = kernel(x, x)
        np.fill_diagonal(k, 0)
        count = count.astype(float)
        pairs = count.sum(1) ** 2 - (count**2).sum(1)
        total = np.einsum("ri,ij,rj->r", count, k, count, optimize=True)
        return np.divide(total, pairs, out=np.full(len(count), math.nan), where=pairs > 0)

    cross = np.einsum("ri,ij,rj->r", m.astype(float), kernel(a, b), n.astype(float), optimize=True)
    return within(a, m) + within(b, n) - 2 * cross / (m.sum(1) * n.sum(1))


def frechet(a: Rows, b: Rows) -> float:
    """Fréchet distance of Gaussians fitted to both (Heusel et al. 2017); biased upwards, by 1/n."""
    centered = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    # The trace of (Ca Cb)^(1/2) is the sum of the singular values of A B', in N numbers, not D.
    shared = np.linalg.svd(centered[0] @ centered[1].T, compute_uv=False).sum()
    spread = sum((x**2).sum() for x in centered)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * shared)


def neighborhoods(real: Rows, drawn: Rows, k: int) -> dict[str, np.ndarray]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        real: Rows of real volumes.
        drawn: Rows of samples.
        k: The ball round a row reaches to its k-th neighbor of the same side.

    Returns:
        What each number is the mean of: a value a sample for precision and density, a value a real
        volume for recall and coverage.
    """

    def reach(rows: Rows) -> Rows:
        return np.sort(distances(rows, rows), axis=1)[:, k]  # column 0 is the row itself

    apart, of_real, of_drawn = distances(real, drawn), reach(real), reach(drawn)
    inside = apart < of_real[:, None]
    return {
        "precision": inside.any(0).astype(float),
        "recall": (apart < of_drawn[None]).any(1).astype(float),
        "density": inside.sum(0) / k,
        "coverage": (apart.min(1) < of_real).astype(float),
    }


def distances(a: Rows, b: Rows) -> Rows:
    """Euclidean distances of each row of one side from each of the other."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def histograms(*sides: Rows) -> tuple[list[Rows], float]:
    """Histograms of each row of some sides over one range, in parts of a row, and a bin's width."""
    low, high = min(x.min() for x in sides), max(x.max() for x in sides)
    span = (low, high if high > low else low + 1)
    counts = [
        np.stack([np.histogram(row, BINS, span)[0] / len(row) for row in side]) for side in sides
    ]
    return counts, float(span[1] - span[0]) / BINS


def histogram_distance(a: Rows, b: Rows, width: float) -> float:
    """1-Wasserstein distance of all intensities of each side: the area between distributions.

    Args:
        a: Rows of `histograms`.
        b: The same of the other side.
        width: Of a bin.
    """
    return float(np.abs(np.cumsum(a.mean(0) - b.mean(0))).sum() * width)


def nearest(rows: Rows, training: Rows) -> tuple[Rows, Rows]:
    """Index of the training volume next to each row, and how far: 1 - correlation."""

    def unit(x: Rows) -> Rows:
        x = x - x.mean(1, keepdims=True)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    apart = 1 - unit(rows) @ unit(training).T
    return apart.argmin(1), apart.min(1)


def closer(drawn: Rows, unseen: Rows) -> float:
    """P-value of samples lying closer to training volumes than unseen volumes do.

    The one-sided rank-sum test, exact: the part of all ways of sharing the ranks out that gives the
    samples a sum as small. Equal values share their mean rank. Of hundreds of volumes, whose ways
    are too many to count, by the normal distribution that the sum then has.

    Args:
        drawn: Distance of each sample from its nearest training volume.
        unseen: The same of volumes held out from training.
    """
    values = np.concatenate((drawn, unseen))
    ranks = np.array([(values < v).sum() * 2 + (values == v).sum() + 1 for v in values])  # twice
    n, total = len(drawn), len(ranks)
    if total > COUNTED:
        spread = math.sqrt(n * ranks.var() * (total - n) / (total - 1))
        z = (ranks[:n].sum() + 1 - n * (total + 1)) / max(spread, 1e-12)
        return 0.5 * math.erfc(-z / math.sqrt(2))
    ways = np.zeros((len(drawn) + 1, ranks.sum() + 1))  # by how many ranks, and by their sum
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    of_samples = ways[len(drawn)]
    return float(of_samples[: ranks[: len(drawn)].sum() + 1].sum() / of_samples.sum())


def pairs_interval(pairs: Rows, values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of a mean over pairs of volumes: the volumes are drawn again and again.

    Args:
        pairs: `(P, 2)` numbers of the volumes of each pair.
        values: `(P,)`.
        seed: Of the draws.
    """
    count = int(pairs.max()) + 1
    often = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLED)
    weight = (often[:, pairs[:, 0]] * often[:, pairs[:, 1]]).astype(float)
    total = weight.sum(1)
    means = (weight @ values)[total > 0] / total[total > 0]
    return quantiles(means if len(means) else values)


def quantiles(values: np.ndarray | list[float]) -> tuple[float, float]:
    """Between which 95 % of some values lie."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def holding(value: float, drawn: list[float]) -> list[float]:
    """Between which 95 % of bootstrap draws lie, and the number itself, which may be 0.996 of 1."""
    low, high = quantiles(drawn)
    return [min(low, value), max(high, value)]


def floored(
    measure: Callable[[Rows, Rows], Measured],
    drawn: Rows,
    real: Rows,
    seed: int = 0,
    again: bool = False,
) -> dict[str, dict]:
    """Numbers of samples against real volumes, each beside that of real ones against real ones.

    Both are of as many volumes a side, since such numbers depend on how many; means over draws of
    which. `low` and `high` are where the floors of 95 % of the draws lie, `interval` is the 95 %
    bootstrap interval of the number, over draws and within each: of what is a mean over volumes
    these are drawn again, with the neighborhoods as they are.

    Args:
        measure: Numbers of `(real, other)`.
        drawn: Rows of samples.
        real: Rows of real volumes, 4 or more.
        seed: Of the draws.
        again: Draw the volumes of both sides again for single numbers too. Without it these have no
            interval: where distances within a side count, volumes that are drawn twice shrink it.
    """
    rng = np.random.default_rng(seed)
    redraw = np.random.default_rng([seed, 1])
    count = min(len(drawn), len(real) // 2)
    values: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    spread: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        order, chosen = rng.permutation(len(real)), rng.permutation(len(drawn))[:count]
        one, other = real[order[:count]], real[order[count : 2 * count]]
        found, floor = measure(one, drawn[chosen]), measure(one, other)
        for name in found:
            values.setdefault(name, []).append(float(np.mean(found[name])))
            floors.setdefault(name, []).append(float(np.mean(floor[name])))
            parts = found[name]
            if isinstance(parts, np.ndarray):
                picked = redraw.integers(len(parts), size=(AGAIN, len(parts)))
                spread.setdefault(name, []).extend(parts[picked].mean(1).tolist())
        for _ in range(AGAIN if again else 0):
            left, right = redraw.integers(count, size=(2, count))
            for name, value in measure(one[left], drawn[chosen][right]).items():
                spread.setdefault(name, []).append(float(np.mean(value)))
    return {
        name: {
            "value": float(np.mean(of)),
            **({"interval": holding(float(np.mean(of)), spread[name])} if name in spread else {}),
            "floor": float(np.mean(floors[name])),
            **dict(zip(("low", "high"), quantiles(floors[name]), strict=True)),
            "volumes": count,
        }
        for name, of in values.items()
    }
