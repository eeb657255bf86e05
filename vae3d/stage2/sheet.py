"""Contact sheets of drawn volumes: one row per source, one column per sample, three planes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    panel_px: int = 110,
) -> np.ndarray:
    """Axial, coronal and sagittal middle slice, one above the other, uint8 `(h, w, 3)`.

    Args:
        volume: `(C, X, Y, Z)`, or `(C, X, Y)` for its one plane; the first channel is shown.
        spacing_mm: Voxel size per axis in mm.
        data_range: Intensities drawn black and white.
        panel_px: Longest side of the largest panel in pixels.
    """
    volume = volume[0]
    px_per_mm = panel_px / max(n * mm for n, mm in zip(volume.shape, spacing_mm, strict=False))
    if volume.ndim == 2:
        return _panel(volume, spacing_mm[:2], data_range, px_per_mm)
    panels = []
    for axis in (2, 1, 0):
        plane = np.take(volume, volume.shape[axis] // 2, axis)
        others = [spacing_mm[i] for i in range(3) if i != axis]
        panels.append(_panel(plane, others, data_range, px_per_mm))
    width = max(p.shape[1] for p in panels)
    column = np.empty((sum(p.shape[0] + 4 for p in panels), width, 3), np.uint8)
    column[:] = BACKGROUND
    top = 0
    for panel in panels:
        left = (width - panel.shape[1]) // 2
        column[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
        top += panel.shape[0] + 4
    return column


def scroll(
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    data_range: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    panel_px: int = 200,
    max_frames: int = 60,
) -> list[np.ndarray]:
    """Axial slices of one volume from low to high as frames; a 2D image is one frame.

    Args:
        volume: `(C, X, Y, Z)` or `(C, X, Y)`; the first channel is shown.
        spacing_mm: Voxel size per axis in mm.
        data_range: Intensities drawn black and white.
        title: Text above the slice.
        panel_px: Longest side of a slice in pixels.
        max_frames: Longer volumes are shown in even steps.
    """
    planes = volume[0][..., None] if volume.ndim == 3 else volume[0]
    count = planes.shape[-1]
    picks = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
    px_per_mm = panel_px / max(n * mm for n, mm in zip(planes.shape[:2], spacing_mm, strict=False))
    frames = []
    for index in picks:
        panel = _panel(planes[..., index], spacing_mm[:2], data_range, px_per_mm)
        frame = Image.new("RGB", even(panel.shape[1], panel.shape[0] + TITLE), BACKGROUND)
        frame.paste(Image.fromarray(panel), (0, TITLE))
        ImageDraw.Draw(frame).text((4, 3), f"{title}  z={index}", FAINT, font(11))
        frames.append(np.asarray(frame))
    return frames


def _panel(
    plane: np.ndarray, spacing: Sequence[float], ends: tuple[float, float], px_per_mm: float
) -> np.ndarray:
    """A plane in true proportions, uint8 `(h, w, 3)`."""
    low, high = ends
    width, height = (
        max(2, round(n * mm * px_per_mm)) for n, mm in zip(plane.shape, spacing, strict=True)
    )
    values = (Layout().upright(plane.astype(np.float32)) - low) / (high - low)
    return gray_colors(resize(values, (width, height)))
