"""Axes as files have them, brought to (C, X, Y, Z)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.readers.options import Reading, Volumes4D
from loaders.readers.volume import BrokenVolume


def to_channels_first(path: Path, data: np.ndarray, volumes_4d: Volumes4D) -> np.ndarray:
    """(X, Y[, Z[, T or C ...]]) -> (C, X, Y, Z); more than one volume needs the user's leave.

    The fourth axis runs fastest over the channels: of a series of T volumes, `[t::T]` are those of
    time point t.
    """
    shape = data.shape + (1,) * (3 - data.ndim)
    data = data.reshape(*shape[:3], -1, order="F")  # (X, Y, Z, T)
    if data.shape[3] > 1 and volumes_4d == "error":
        size = "x".join(map(str, shape))
        raise BrokenVolume(
            path, f"is 4D ({size}): set volumes_4d to samples, channels or first to allow it"
        )
    if volumes_4d == "first":
        data = data[..., :1]
    return np.moveaxis(data, 3, 0)  # (C, X, Y, Z)


def from_axes(path: Path, data: np.ndarray, axes: str, reading: Reading) -> np.ndarray:
    """Bring named axes to (C, X, Y, Z).

    Args:
        path: The file, for the message.
        data: The voxels.
        axes: A letter an axis: X, Y, Z, C (channels), T (times), S (red, green, blue).
        reading: What becomes of colors and times.
    """
    if len(set(axes)) != len(axes) or not set(axes) <= set("XYZCTS"):
        raise BrokenVolume(path, f"axes {axes} are not understood")
    for name in "XYZ":
        if name not in axes:
            axes, data = axes + name, data[..., None]
    colors = "S" in axes
    if colors:
        data, axes = np.moveaxis(data, axes.index("S"), -1), axes.replace("S", "") + "S"
        if reading.color == "gray" and data.shape[-1] == 3:
            data = luminance(data)
    order = [axes.index(name) for name in "XYZ"]
    others = [i for i in range(data.ndim) if i not in order]
    times = 1
    if reading.volumes_4d == "samples":  # time before channels
        others.sort(key=lambda i: axes[i] != "T")
        times = data.shape[axes.index("T")] if "T" in axes else 1
    data = data.transpose(*order, *others)
    picture = colors and data.shape[2] == 1  # whose colors are channels without further leave
    data = to_channels_first(path, data, "channels" if picture else reading.volumes_4d)
    gray = len(data) == times
    return np.tile(data, (3, 1, 1, 1)) if reading.color == "rgb" and gray else data


def luminance(colors: np.ndarray) -> np.ndarray:
    """Gray (..., 1) of red, green and blue (..., 3), weighted by ITU-R BT.601 as Pillow does."""
    gray = colors @ np.array([[0.299], [0.587], [0.114]])
    return (np.rint(gray) if colors.dtype.kind in "iu" else gray).astype(colors.dtype)
