"""Contact sheets of drawn volumes: one row per source, one column per sample, three planes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from PIL import Image, ImageDraw

from loaders.layout import Layout
from vae3d.tracking.media import (
    BACKGROUND,
    FAINT,
    GAP,
    TEXT,
    even,
    font,
    gray_colors,
    resize,
)

TITLE = 20  # pixels above a row
RANGES = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0)}  # by the intensity of preprocessing


class View(TypedDict):
    """How a volume is drawn, see `three_slices`."""

    spacing_mm: Sequence[float]
    data_range: tuple[float, float]
    layout: Layout


def view_of(x: np.ndarray, header: dict, radiological: bool = False) -> View:
    """How a volume that was decoded from a latent is drawn, in the model's range.

    Args:
        x: `(C, X, Y, Z)` or `(C, X, Y)`; with z-scores the range is that of the first channel.
        header: Of a latent on the same grid.
        radiological: Draw bodies with their right on the left.
    """
    steps = zip(header["spacing_mm"], header["factor"], strict=False)
    own = (float(x[0].min()), float(x[0].max()))
    return {
        "spacing_mm": [step / factor for step, factor in steps],
        "data_range": RANGES.get(header.get("intensity", "unit"), own),
        "layout": Layout.of_record(header["source"]["undo"]).read_by(radiological),
    }


def contact_sheet(rows: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """Lay pictures out, one row each title.

    Args:
        rows: Pictures of `three_slices`, uint8 `(h, w, 3)`, by the title of their row.

    Returns:
        uint8 picture `(H, W, 3)`.
    """
    pictures = [picture for row in rows.values() for picture in row]
    width = max(p.shape[1] for p in pictures) + GAP
    height = max(p.shape[0] for p in pictures) + TITLE + GAP
    most = max(len(row) for row in rows.values())
    canvas = Image.new("RGB", even(GAP + most * width, len(rows) * height), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, (title, row) in enumerate(rows.items()):
        top = number * height
        pen.text((GAP, top + 3), title, TEXT, font(13))
        for place, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture), (GAP + place * width, top + TITLE))
    return np.asarray(canvas)


def three_slices(
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    data_range: tuple[float, float] = (0.0, 1.0),
    layout: Layout | None = None,
    panel_px: int = 110,
) -> np.ndarray:
    """The middle planes, one above the other, uint8 `(h, w, 3)`; the one plane of a 2D image.

    Args:
        volume: `(C, X, Y, Z)` or `(C, X, Y)`; each channel has its own column.
        spacing_mm: Voxel size per axis in mm.
        data_range: Intensities drawn black and white.
        layout: Which way is up; see `Layout.of_record`.
        panel_px: Longest side of the largest panel in pixels.
    """
    layout = layout or Layout()
    columns = [
        _planes(layout.arranged(volume[c : c + 1])[0], spacing_mm, data_range, layout, panel_px)
        for c in range(len(volume))
    ]
    gap = np.empty((len(columns[0]), GAP // 2, 3), np.uint8)
    gap[:] = BACKGROUND
    return np.concatenate([part for column in columns for part in (gap, column)][1:], axis=1)


def _planes(
    x: np.ndarray, spacing_mm: Sequence[float], data_range: tuple[float, float], layout: Layout,
    panel_px: int,
) -> np.ndarray:  # fmt: skip
    """The middle planes of one channel `(X, Y, Z)`, one above the other."""
    sizes, planes = layout.spacing(spacing_mm), layout.planes(x.shape)
    shown = {i for _, axis in planes for i in range(3) if i != axis}
    scale = panel_px / max(x.shape[i] * sizes[i] for i in shown)
    panels = [
        _panel(x.take(x.shape[axis] // 2, axis), axis, sizes, data_range, scale, layout)
        for _, axis in planes
    ]
    width = max(p.shape[1] for p in panels)
    column = np.empty((sum(p.shape[0] + 4 for p in panels), width, 3), np.uint8)
    column[:] = BACKGROUND
    top = 0
    for panel in panels:
        left = (width - panel.shape[1]) // 2
        column[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
        top += panel.shape[0] + 4
    return column[: top - 4]


def scroll(
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    data_range: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    layout: Layout | None = None,
    panel_px: int = 200,
    max_frames: int = 60,
) -> list[np.ndarray]:
    """Slices of one volume along z from low to high as frames; a 2D image is one frame.

    Args:
        volume: `(C, X, Y, Z)` or `(C, X, Y)`; the first channel is shown.
        spacing_mm: Voxel size per axis in mm.
        data_range: Intensities drawn black and white.
        title: Text above the slice.
        layout: Which way is up.
        panel_px: Longest side of a slice in pixels.
        max_frames: Longer volumes are shown in even steps.
    """
    layout = layout or Layout()
    x, sizes = layout.arranged(volume[:1])[0], layout.spacing(spacing_mm)
    (_, cut), *_ = layout.planes(x.shape)
    count = x.shape[cut]
    picks = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
    scale = panel_px / max(x.shape[i] * sizes[i] for i in range(3) if i != cut)
    frames = []
    for index in picks:
        panel = _panel(x.take(index, cut), cut, sizes, data_range, scale, layout)
        frame = Image.new("RGB", even(panel.shape[1], panel.shape[0] + TITLE), BACKGROUND)
        frame.paste(Image.fromarray(panel), (0, TITLE))
        place = f"  {'xyz'[cut]}={index}" if count > 1 else ""
        ImageDraw.Draw(frame).text((4, 3), f"{title}{place}", FAINT, font(11))
        frames.append(np.asarray(frame))
    return frames


def _panel(
    plane: np.ndarray, cut: int, sizes: Sequence[float], ends: tuple[float, float], scale: float,
    layout: Layout,
) -> np.ndarray:  # fmt: skip
    """A plane across the axis `cut` in true proportions, uint8 `(h, w, 3)`."""
    low, high = ends
    along = [size for axis, size in enumerate(sizes) if axis != cut]
    width, height = (
        max(2, round(n * size * scale)) for n, size in zip(plane.shape, along, strict=True)
    )
    values = (layout.upright(plane.astype(np.float32)) - low) / (high - low)
    return gray_colors(resize(values, (width, height)))
