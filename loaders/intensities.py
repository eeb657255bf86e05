"""What is odd about the intensities of volumes, a line for each kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loaders.preprocess import RULES, Normalization, Preprocess
from loaders.statistics import Statistics, by_rules, quick_quantile

MOST_CLIPPED = 0.005  # part of the foreground; more is told
LEAST_FOREGROUND = 0.001  # part of the volume; less is told


def clip_loss(stats: Statistics, normalization: Normalization) -> float:
    """Return which part of a channel's foreground is clipped, from its statistics.

    Args:
        stats: As `statistics` returned them, or from a sidecar.
        normalization: What is done to the channel.
    """
    stats = by_rules(stats, RULES)
    low, high = normalization.clip(stats, quick_quantile(stats))
    percent = np.array([float(p) for p in stats["foreground_percentiles"]])
    values = np.array(list(stats["foreground_percentiles"].values()))
    above = percent_above(high, percent, values)
    return (above + percent_above(-low, 100 - percent[::-1], -values[::-1])) / 100


def percent_above(limit: float, percent: np.ndarray, values: np.ndarray) -> float:
    """Return how many percent lie above a limit, where `values` are the quantiles at `percent`."""
    place = int(np.searchsorted(values, limit, "right"))
    if place in (0, len(values)):
        return 0.0 if place else 100.0
    part = (limit - values[place - 1]) / (values[place] - values[place - 1])
    return float(100 - percent[place - 1] - part * (percent[place] - percent[place - 1]))


Volumes = Sequence[tuple[str, Sequence[Statistics]]]  # name, and statistics of the channels
Found = list[tuple[str, str]]  # name, and what is told of it


def intensity_lines(volumes: Volumes, preprocess: Preprocess) -> list[str]:
    """Say what is odd about the intensities of volumes, a line for each kind.

    Args:
        volumes: Name or path of each, and the statistics of its channels; those of a cache that is
            older than the rules say less, those of zeros for a missing file nothing.
        preprocess: What is done to them.
    """
    clipped: Found = []
    small: Found = []
    hot: Found = []
    for name, channels in volumes:
        for number, stats in enumerate(channels):
            if "robust" not in stats or stats.get("missing"):
                continue
            of = f"channel {preprocess.name(number)} " if len(channels) > 1 else ""
            loss = clip_loss(stats, preprocess.channel(number))
            fraction, hottest = (stats["robust"][k] for k in ("foreground_fraction", "hot_voxels"))
            clipped += [(name, f"{of}{100 * loss:.3g} %")] if loss > MOST_CLIPPED else []
            small += [(name, f"{of}{100 * fraction:.3g} %")] if fraction < LEAST_FOREGROUND else []
            hot += [(name, f"{of}{hottest} voxels")] if hottest else []
    kinds = [
        (f"more than {100 * MOST_CLIPPED:g} % of the foreground is lost to the clip in", clipped,
         ": see data.preprocess.percentiles_of, percentiles and window_hu"),
        (f"the foreground is less than {100 * LEAST_FOREGROUND:g} % of", small,
         ": crop_foreground, zscore and ForegroundCorners rest on it"),
        ("hot voxels, far beyond all others, in", hot, ": they are not taken for foreground"),
    ]  # fmt: skip
    return not_hounsfield(volumes, preprocess) + [
        f"{what} {listed(found, len(volumes))}{remedy}" for what, found, remedy in kinds if found
    ]


def not_hounsfield(volumes: Volumes, preprocess: Preprocess) -> list[str]:
    """Say where a window in HU meets volumes without a single voxel below 0 HU.

    Air and fat lie below 0: such volumes were most likely never rescaled to HU, or are no CT.
    """
    odd = []
    for name, channels in volumes:
        for number, stats in enumerate(channels):
            window = preprocess.channel(number).window_hu
            if window and window[0] < 0 <= stats["min"] and not stats.get("missing"):
                odd.append((name, f"from {stats['min']:g}"))
    return [
        f"no voxel lies below 0 in {listed(odd, len(volumes))}, though window_hu is "
        f"{preprocess.window_hu}: are the intensities Hounsfield units?"
    ] * bool(odd)


def listed(found: Found, total: int, most: int = 5) -> str:
    """Say how many volumes, and which: name and value of the first few."""
    count = len({name for name, _ in found})
    named = ", ".join(f"{name} {value}" for name, value in found[:most])
    return f"{count} of {total} volumes ({named}{', ...' if len(found) > most else ''})"
