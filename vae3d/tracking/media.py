"""Pictures of volumes: three planes, scroll-throughs, PNG, GIF, MP4 (only importer of imageio).

Volumes are `(C, X, Y, Z)` or `(C, X, Y)` arrays in RAS+ order. Every picture shows the columns
input | recon | error; the error is `recon - input` on a fixed scale that is printed in the picture,
so pictures of two steps or two runs can be compared. Panels keep true proportions: a voxel of
1 x 1 x 5 mm is drawn five times as tall as wide.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loaders.whole import whole_file

COLUMNS = ("input", "recon", "error")
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))  # name, axis that the plane cuts

BACKGROUND = (11, 12, 16)
TEXT = (235, 237, 242)
FAINT = (139, 145, 158)
# Left and right of the picture.
SIDES = {"axial": "LR", "coronal": "LR", "sagittal": "PA", "image": "  "}
GAP = 10  # pixels between panels
FOOT = 24
# Error colors from -scale to +scale: ice, blue, background, orange, sand.
ERROR_COLORS = np.array(
    [(196, 236, 255), (52, 140, 226), BACKGROUND, (230, 96, 30), (255, 230, 150)], np.float32
)


Row = tuple[int, str, int, int]  # channel, plane, axis that it cuts, slice


class View(TypedDict, total=False):
    """How a pair of volumes is drawn, see `three_planes`."""

    error_scale: float
    window_hu: tuple[float, float] | None
    title: str


def in_one_range(
    ranges: Sequence[tuple[float, float]], x: np.ndarray, recon: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Return a pair of volumes and the range to draw it in.

    Args:
        ranges: Of each channel; where they differ, the volumes are returned in parts of them.
        x: (C, X, Y, Z) or (C, X, Y).
        recon: Its reconstruction.
    """
    if len(set(ranges)) == 1:
        return x, recon, ranges[0]
    lo, hi = np.array(ranges, np.float32).T.reshape(2, -1, *[1] * (x.ndim - 1))
    return (x - lo) / (hi - lo), (recon - lo) / (hi - lo), (0.0, 1.0)


def three_planes(
    x: np.ndarray,
    recon: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    data_range: tuple[float, float] = (0.0, 1.0),
    *,
    error_scale: float = 0.2,
    window_hu: tuple[float, float] | None = None,
    title: str = "",
    panel_px: int = 240,
) -> np.ndarray:
    """Axial, coronal and sagittal slice of input, recon and error in one picture.

    The slices go through the center of mass of the input, so they meet the anatomy and not air.

    Args:
        x: Input, `(C, X, Y, Z)` or `(C, X, Y)`; one row of panels per channel and plane.
        recon: Reconstruction, same shape.
        spacing_mm: Voxel size per axis in mm; None means cubic voxels.
        data_range: Intensities drawn black and white.
        error_scale: End of the error's color scale, as a part of `data_range`.
        window_hu: HU of `data_range`'s ends (CT); the scale is then printed in HU.
        title: Text above the panels, such as the case and its PSNR.
        panel_px: Longest side of the largest panel in pixels.

    Returns:
        uint8 picture `(H, W, 3)`, even height and width.
    """
    scene = _Scene(x, recon, spacing_mm, data_range, error_scale, window_hu, panel_px)
    rows = [
        (channel, plane, axis, scene.center[axis])
        for channel in range(len(scene.x))
        for plane, axis in scene.planes
    ]
    return scene.draw(rows, COLUMNS, title)


def scroll_frames(
    x: np.ndarray,
    recon: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    data_range: tuple[float, float] = (0.0, 1.0),
    *,
    columns: Sequence[str] = COLUMNS,
    axis: int = 2,
    max_frames: int = 60,
    error_scale: float = 0.2,
    window_hu: tuple[float, float] | None = None,
    title: str = "",
    panel_px: int = 200,
) -> list[np.ndarray]:
    """Frames that scroll through a volume slice by slice; a 2D pair blinks input, recon.

    Args:
        x: Input, `(C, X, Y, Z)` or `(C, X, Y)`.
        recon: Reconstruction, same shape.
        spacing_mm: Voxel size per axis in mm; None means cubic voxels.
        data_range: Intensities drawn black and white.
        columns: Which of input, recon, error to show side by side.
        axis: Spatial axis to scroll along; 2 gives axial slices.
        max_frames: Longer volumes are shown in even steps.
        error_scale: End of the error's color scale, as a part of `data_range`.
        window_hu: HU of `data_range`'s ends (CT).
        title: Text above the panels.
        panel_px: Longest side of a panel in pixels.

    Returns:
        uint8 frames `(H, W, 3)`, all of one size, even height and width.
    """
    scene = _Scene(x, recon, spacing_mm, data_range, error_scale, window_hu, panel_px, axis)
    if len(scene.shape) == 2:
        rows = [(channel, "image", 2, 0) for channel in range(len(scene.x))]
        return [scene.draw(rows, (c,), title) for c in columns if c != "error"]
    plane = next(name for name, cut in PLANES if cut == axis)
    count = scene.shape[axis]
    picks = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
    return [
        scene.draw([(c, plane, axis, int(i)) for c in range(len(scene.x))], columns, title)
        for i in picks
    ]


class _Scene:
    """A pair of volumes with everything needed to draw any of its planes.

    `panel_px` is the longest side of the largest plane; of those that cut the axis `cut` if given.
    """

    def __init__(self, x: np.ndarray, recon: np.ndarray, spacing_mm: Sequence[float] | None,
                 data_range: tuple[float, float], error_scale: float,
                 window_hu: tuple[float, float] | None, panel_px: int, cut: int = 3):  # fmt: skip
        self.x, self.recon = (np.asarray(v, dtype=np.float32) for v in (x, recon))
        if self.x.shape != self.recon.shape or self.x.ndim not in (3, 4):
            raise ValueError(
                "x and recon must share one shape (C, X, Y, Z) or (C, X, Y); "
                f"got {self.x.shape} and {self.recon.shape}"
            )
        self.shape = self.x.shape[1:]
        spacing = (1.0,) * len(self.shape) if spacing_mm is None else spacing_mm
        self.spacing = tuple(map(float, spacing))[: len(self.shape)]
        self.lo, self.hi = map(float, data_range)
        self.error = error_scale * (self.hi - self.lo)
        self.window_hu = window_hu
        self.planes = PLANES if len(self.shape) == 3 else (("image", 2),)
        extents = [n * s for n, s in zip(self.shape, self.spacing, strict=True)]
        self.px_per_mm = panel_px / max(mm for axis, mm in enumerate(extents) if axis != cut)

    @cached_property
    def center(self) -> tuple[int, ...]:
        """Voxel at the center of mass of the input; clips, which show all slices, never ask."""
        return (*center_of_mass(self.x - self.lo), 0)[:3]

    def panel(self, column: str, channel: int, axis: int, index: int) -> np.ndarray:
        """One slice in color at true proportions, anterior and superior up: uint8 (h, w, 3)."""
        x, recon = (self._cut(v[channel], axis, index) for v in (self.x, self.recon))
        size = self.panel_size(axis)
        if column == "error":
            return error_colors(resize(upright((recon - x) / self.error), size))
        gray = ((x if column == "input" else recon) - self.lo) / (self.hi - self.lo)
        return gray_colors(resize(upright(gray), size))

    def _cut(self, volume: np.ndarray, axis: int, index: int) -> np.ndarray:
        return volume if volume.ndim == 2 else np.take(volume, index, axis)

    def panel_size(self, axis: int) -> tuple[int, int]:
        """Width and height in pixels of a plane that cuts `axis`."""
        a, b = (i for i in range(3) if i != axis) if len(self.shape) == 3 else (0, 1)
        width, height = (self.shape[i] * self.spacing[i] * self.px_per_mm for i in (a, b))
        return max(2, round(width)), max(2, round(height))

    def draw(self, rows: Sequence[Row], columns: Sequence[str], title: str) -> np.ndarray:
        """Rows (channel, plane, axis, index) under the column names, the scales at the foot."""
        sizes = [self.panel_size(axis) for _, _, axis, _ in rows]
        width = max(w for w, _ in sizes)
        top = GAP + (24 if title else 0) + 20
        height = top + sum(h + GAP for _, h in sizes) + FOOT
        canvas = Image.new("RGB", even(GAP + len(columns) * (width + GAP), height), BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        if title:
            pen.text((GAP, GAP - 2), title, TEXT, font(15))
        lefts = [GAP + k * (width + GAP) for k in range(len(columns))]
        for left, column in zip(lefts, columns, strict=True):
            pen.text((left, top - 19), column, TEXT, font(13))
        y = top
        for row, (w, h) in zip(rows, sizes, strict=True):
            channel, _, axis, index = row
            for left, column in zip(lefts, columns, strict=True):
                panel = Image.fromarray(self.panel(column, channel, axis, index))
                canvas.paste(panel, (left + (width - w) // 2, y))
            self._label(pen, (GAP + (width - w) // 2, y, w, h), row)
            y += h + GAP
        self._foot(canvas, y - GAP + 5, dict(zip(columns, lefts, strict=True)), width)
        return np.asarray(canvas)

    def _label(self, pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], row: Row) -> None:
        """Plane, slice and patient sides on the first panel of a row."""
        (x, y, w, h), (channel, plane, axis, index) = box, row
        parts = [] if plane == "image" else [f"{plane}  {'xyz'[axis]} {index}"]
        parts += [f"channel {channel}"] if len(self.x) > 1 else []
        pen.text((x + 4, y + 3), "  ".join(parts), TEXT, font(11), stroke_width=1, stroke_fill=0)
        for side, at in zip(SIDES[plane], (x + 4, x + w - 12), strict=True):
            pen.text((at, y + h // 2 - 7), side, FAINT, font(11), stroke_width=1, stroke_fill=0)

    def _foot(self, canvas: Image.Image, y: int, lefts: dict[str, int], width: int) -> None:
        """Gray window and ruler under the first column, error scale under its own."""
        pen, unit = ImageDraw.Draw(canvas), " HU" if self.window_hu else ""
        lo, hi = self.window_hu or (self.lo, self.hi)
        error = self.error * (hi - lo) / (self.hi - self.lo)
        ramp = np.repeat(np.linspace(0, 1, 56, dtype=np.float32)[None], 8, axis=0)
        gray = next(left for name, left in lefts.items() if name != "error")
        end = color_scale(canvas, (gray, y), gray_colors(ramp), f"{lo:.4g}", f"{hi:.4g}{unit}")
        mm = round_length(width / self.px_per_mm / 4)
        x1 = gray + width
        x0 = x1 - mm * self.px_per_mm
        text = f"{mm:g} mm" if mm >= 0.1 else f"{mm * 1000:g} um"
        text_x = x0 - 6 - pen.textlength(text, font(11))
        if text_x > end + 8:  # a narrow panel has no room for both
            pen.text((text_x, y), text, FAINT, font(11))
            pen.line([(x0, y + 7), (x1, y + 7)], FAINT, 2)
        if "error" in lefts:
            ends = (f"{-error:.3g}", f"+{error:.3g}{unit}")
            color_scale(canvas, (lefts["error"], y), error_colors(2 * ramp - 1), *ends)


def save_views(
    folder: Path | str,
    case: str,
    x: np.ndarray,
    recon: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    data_range: tuple[float, float] = (0.0, 1.0),
    *,
    separate: bool = False,
    **view: Unpack[View],
) -> dict[str, Path]:
    """Write `<case>.png` (three planes), `<case>.gif` and `<case>.mp4` (scroll-throughs).

    Args:
        folder: Where to; made when missing.
        case: The volume's id; characters that a file name cannot hold are percent-encoded, so two
            volumes never share a file.
        x: Input, `(C, X, Y, Z)` or `(C, X, Y)`.
        recon: Reconstruction, same shape.
        spacing_mm: Voxel size per axis in mm.
        data_range: Intensities drawn black and white.
        separate: Also write scroll-throughs of the input alone and of the recon alone.
        **view: `error_scale`, `window_hu` and `title` of `three_planes`.

    Returns:
        Paths by kind: png, gif, mp4; with `separate` also input_gif, input_mp4 and so on.
    """
    folder, stem = Path(folder), case_stem(case)
    folder.mkdir(parents=True, exist_ok=True)
    pair = (x, recon, spacing_mm, data_range)
    paths = {"png": write_png(folder / f"{stem}.png", three_planes(*pair, **view))}
    fps = 12.0 if np.ndim(x) == 4 else 2.0
    clips = {"": COLUMNS, "input_": ("input",), "recon_": ("recon",)}
    for prefix, columns in clips.items():
        if prefix and not separate:
            continue
        frames = scroll_frames(*pair, columns=columns, **view)
        name = f"{stem}.{prefix[:-1]}" if prefix else stem
        paths[f"{prefix}gif"] = write_gif(folder / f"{name}.gif", frames, fps)
        paths[f"{prefix}mp4"] = write_mp4(folder / f"{name}.mp4", frames, fps)
    return paths


def case_stem(case: str) -> str:
    """File name of a volume's id: reversible, so that two ids never share a name."""
    return re.sub(r"[^\w\-. ]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), str(case))


def write_png(path: Path | str, image: np.ndarray) -> Path:
    """Write a uint8 picture `(H, W, 3)`.

    By Pillow itself: imageio closes the file once more when it is gone, and where the disk is full
    prints a traceback of that.
    """
    return _replace(path, Image.fromarray(image).save)


def write_gif(path: Path | str, frames: Iterable[np.ndarray], fps: float = 12.0) -> Path:
    """Write uint8 frames `(H, W, 3)` as a GIF that loops forever, one palette for all frames.

    By Pillow itself: imageio, which calls it, would search for a palette again in every frame.
    """
    colors, dither = gif_palette(), Image.Dither.NONE
    few = [Image.fromarray(f).quantize(palette=colors, dither=dither) for f in frames]
    how = {"save_all": True, "append_images": few[1:], "duration": 1000 / fps, "loop": 0}
    return _replace(path, lambda temporary: few[0].save(temporary, "GIF", **how))


def write_mp4(path: Path | str, frames: Iterable[np.ndarray], fps: float = 12.0) -> Path:
    """Write uint8 frames `(H, W, 3)` of even height and width as H.264 that browsers play."""
    from imageio import v2 as imageio

    def write(temporary: Path) -> None:
        mp4 = imageio.get_writer(
            temporary,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,  # never rescale
            # One thread: the cores belong to the training.
            output_params=["-crf", "20", "-movflags", "+faststart", "-threads", "1"],
        )
        try:
            for frame in frames:
                mp4.append_data(frame)
        finally:
            mp4.close()

    return _replace(path, write)


def _replace(path: Path | str, write: Callable[[Path], object]) -> Path:
    """A reader, or a kill, never meets a half-written file."""
    with whole_file(path) as temporary:
        write(temporary)
    return Path(path)


def gray_colors(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] -> uint8 (h, w, 3); NaN is black."""
    levels = np.clip(np.nan_to_num(values), 0, 1) * 255
    return np.repeat(levels.round().astype(np.uint8)[..., None], 3, axis=-1)


def error_colors(values: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] -> uint8 (h, w, 3): blue too low, orange too high, NaN as zero."""
    levels = (np.clip(np.nan_to_num(values), -1, 1) + 1) / 2 * 255
    return _error_table()[levels.round().astype(np.uint8)]


@lru_cache
def _error_table() -> np.ndarray:
    position = np.linspace(0, len(ERROR_COLORS) - 1, 256)
    anchors = np.arange(len(ERROR_COLORS))
    channels = [np.interp(position, anchors, ERROR_COLORS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@lru_cache
def gif_palette() -> Image.Image:
    """One for all frames, grays and error colors: adaptive ones would flicker."""
    grays = gray_colors(np.linspace(0, 1, 175))
    errors = _error_table()[np.linspace(0, 255, 80).round().astype(int)]
    holder = Image.new("P", (1, 1))
    holder.putpalette(np.concatenate([grays, [BACKGROUND], errors]).astype(np.uint8).tobytes())
    return holder


def upright(plane: np.ndarray) -> np.ndarray:
    """A plane (first axis, second axis) as a picture: first axis to the right, second axis up."""
    return np.ascontiguousarray(plane.T[::-1])


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample float32 (h, w) to `size` = (width, height)."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def color_scale(
    canvas: Image.Image, corner: tuple[int, int], colors: np.ndarray, low: str, high: str
) -> int:
    """Draw `low [colors] high` from `corner`; returns where it ends."""
    pen = ImageDraw.Draw(canvas)
    x, y = corner
    pen.text((x, y), low, FAINT, font(11))
    x += int(pen.textlength(low, font(11))) + 6
    canvas.paste(Image.fromarray(colors), (x, y + 3))
    x += colors.shape[1] + 6
    pen.text((x, y), high, FAINT, font(11))
    return x + int(pen.textlength(high, font(11)))


def round_length(mm: float) -> float:
    """The largest of 1, 2, 5 x 10^k that is not above `mm`."""
    power = 10.0 ** math.floor(math.log10(mm))
    return max(step * power for step in (1, 2, 5) if step * power <= mm * (1 + 1e-9))


def center_of_mass(x: np.ndarray) -> tuple[int, ...]:
    """Voxel at the intensity-weighted center of `(C, *spatial)`; the middle when x is flat."""
    mass = np.clip(np.nan_to_num(x), 0, None).sum(axis=0)
    center = []
    for axis, n in enumerate(mass.shape):
        profile = mass.sum(axis=tuple(i for i in range(mass.ndim) if i != axis), dtype=np.float64)
        total = profile.sum()
        center.append(round(float(profile @ np.arange(n) / total)) if total > 0 else n // 2)
    return tuple(center)


def even(width: int, height: int) -> tuple[int, int]:
    """H.264 with yuv420p stores color at half size: both sides must be even."""
    return width + width % 2, height + height % 2


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that pictures look the same on every machine."""
    return ImageFont.load_default(size)
