"""Which voxels of a volume are foreground, by its statistics, and some of them for the samplers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from loaders.readers import Volume
from loaders.statistics import by_rules

NUM_POINTS = 1024  # voxels remembered for the samplers


def is_foreground(
    values: np.ndarray, threshold: float, limit: float | None, rising: bool
) -> np.ndarray:
    """Return which stored numbers are foreground: beyond the threshold, and not hot.

    Args:
        values: Stored numbers.
        threshold: In stored numbers.
        limit: Stored number beyond which a voxel is hot; None for none.
        rising: Whether intensities rise with stored numbers.
    """
    found = values > threshold if rising else values < threshold
    if limit is not None:
        found &= values <= limit if rising else values >= limit
    return found


def foreground_box(
    volume: Volume, threshold: float, limit: float | None, margin_mm: float
) -> tuple[list[int], list[int]]:
    """Return the corners (low, high) of the box of foreground plus a margin, in voxels."""
    data = volume.data[0]
    mask = is_foreground(data, threshold, limit, volume.scale > 0)
    low, high = [], []
    for axis, (n, size) in enumerate(zip(data.shape, volume.spacing_mm, strict=True)):
        hit = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        margin = math.ceil(margin_mm / size)
        low.append(max(0, int(hit[0]) - margin) if len(hit) else 0)
        high.append(min(n, int(hit[-1]) + 1 + margin) if len(hit) else n)
    return low, high


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
