"""Pictures of volumes: three planes, scroll-throughs, PNG, GIF, MP4 (only importer of imageio).

Volumes are `(C, X, Y, Z)` or `(C, X, Y)` arrays on the store's grid; a `Layout` says which way
their axes go in a picture, and what may be written on it: sides of a body only where the file knows
them, lengths in its unit. Every picture shows the columns input | recon | error; the error is
`recon - input` on a fixed scale that is printed in the picture, so pictures of two steps or two
runs can be compared. Panels keep true proportions: a voxel of 1 x 1 x 5 mm is drawn five times as
tall as wide.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loaders.layout import Layout
from loaders.readers.volume import RGB
from loaders.whole import whole_file

COLUMNS = ("input", "recon", "error")
BACKGROUND = (11, 12, 16)
TEXT = (235, 237, 242)
FAINT = (139, 145, 158)
GAP = 10  # pixels between panels
NARROW = 150  # pixels of a column at least: its labels and scale stand side by side
FOOT = 24
# Error colors from -scale to +scale: ice, blue, background, orange, sand.
ERROR_COLORS = np.array(
    [(196, 236, 255), (52, 140, 226), BACKGROUND, (230, 96, 30), (255, 230, 150)], np.float32
)


Row = tuple[tuple[int, ...], str, int, int]  # channels, plane, axis that it cuts, slice


class View(TypedDict, total=False):
    """How a pair of volumes is drawn, see `three_planes`."""

    error_scale: float
    window_hu: tuple[float, float] | None
    title: str
    layout: Layout | None


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
    layout: Layout | None = None,
    panel_px: int = 240,
) -> np.ndarray:
    """Three planes of input, recon and error in one picture; the one plane of a 2D image.

    The slices go through the center of mass of the input, so they meet the anatomy and not air.
    Each gray channel has its own rows; channels with colors are merged, and each is shown alone in
    the first plane.

    Args:
        x: Input, `(C, X, Y, Z)` or `(C, X, Y)`.
        recon: Reconstruction, same shape.
        spacing_mm: Voxel size per axis in mm; None means cubic voxels.
        data_range: Intensities drawn black and white.
        error_scale: End of the error's color scale, as a part of `data_range`.
        window_hu: HU of `data_range`'s ends (CT); the scale is then printed in HU.
        title: Text above the panels, such as the case and its PSNR.
        layout: Which way is up, and what the file knows; see `VolumeStore.layout`.
        panel_px: Longest side of the largest panel in pixels.

    Returns:
        uint8 picture `(H, W, 3)`, even height and width.
    """
    scene = _Scene(x, recon, spacing_mm, data_range, error_scale, window_hu, panel_px, layout)
    rows = [
        (channels, plane, axis, scene.center[axis])
        for channels in scene.groups
        for plane, axis in scene.planes
    ]
    rows += [((c,), *scene.planes[0], scene.center[scene.planes[0][1]]) for c in scene.alone]
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
    layout: Layout | None = None,
    panel_px: int = 200,
) -> list[np.ndarray]:
    """Frames that scroll through a volume slice by slice; a 2D pair blinks input, recon.

    Args:
        x: Input, `(C, X, Y, Z)` or `(C, X, Y)`.
        recon: Reconstruction, same shape.
        spacing_mm: Voxel size per axis in mm; None means cubic voxels.
        data_range: Intensities drawn black and white.
        columns: Which of input, recon, error to show side by side.
        axis: Axis of the layout to scroll along; 2 gives axial slices.
        max_frames: Longer volumes are shown in even steps.
        error_scale: End of the error's color scale, as a part of `data_range`.
        window_hu: HU of `data_range`'s ends (CT).
        title: Text above the panels.
        layout: Which way is up, and what the file knows.
        panel_px: Longest side of a panel in pixels.

    Returns:
        uint8 frames `(H, W, 3)`, all of one size, even height and width.
    """
    scene = _Scene(x, recon, spacing_mm, data_range, error_scale, window_hu, panel_px, layout, axis)
    if scene.flat:
        rows = [(channels, *scene.planes[0], 0) for channels in scene.groups]
        return [scene.draw(rows, (c,), title) for c in columns if c != "error"]
    plane = next(name for name, cut in scene.planes if cut == axis)
    count = scene.shape[axis]
    picks = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
    return [
        scene.draw([(channels, plane, axis, int(i)) for channels in scene.groups], columns, title)
        for i in picks
    ]


class _Scene:
    """A pair of volumes with everything needed to draw any of its planes.

    `panel_px` is the longest side of the largest plane; of those that cut the axis `cut` if given.
    """

    def __init__(self, x: np.ndarray, recon: np.ndarray, spacing_mm: Sequence[float] | None,
                 data_range: tuple[float, float], error_scale: float,
                 window_hu: tuple[float, float] | None, panel_px: int,
                 layout: Layout | None = None, cut: int = 3):  # fmt: skip
        x, recon = (np.asarray(v, dtype=np.float32) for v in (x, recon))
        if x.shape != recon.shape or x.ndim not in (3, 4):
            raise ValueError(
                "x and recon must share one shape (C, X, Y, Z) or (C, X, Y); "
                f"got {x.shape} and {recon.shape}"
            )
        self.layout = layout or Layout()
        self.x, self.recon = self.layout.arranged(x), self.layout.arranged(recon)
        self.shape = self.x.shape[1:]
        self.spacing = self.layout.spacing(spacing_mm)
        self.lo, self.hi = map(float, data_range)
        self.error = error_scale * (self.hi - self.lo)
        self.window_hu = window_hu
        self.planes = self.layout.planes(self.shape)
        self.flat = 1 in self.shape
        cut = self.planes[0][1] if self.flat else cut
        extents = [n * s for n, s in zip(self.shape, self.spacing, strict=True)]
        self.px_per_unit = panel_px / max(e for axis, e in enumerate(extents) if axis != cut)
        colored = tuple(c for c in range(len(self.x)) if self.layout.color(c))
        grays = [(c,) for c in range(len(self.x)) if c not in colored]
        self.groups = [colored, *grays] if colored else grays
        named = [self.layout.channels[c] for c in colored]
        self.alone = () if tuple(named) == RGB else colored  # nobody asks for the red of a photo

    @cached_property
    def center(self) -> tuple[int, ...]:
        """Voxel at the center of mass of the input; clips, which show all slices, never ask."""
        a, b, c = center_of_mass(self.x - self.lo)
        return a, b, c

    def panel(self, column: str, channels: tuple[int, ...], axis: int, index: int) -> np.ndarray:
        """One slice in color at true proportions, the right way up: uint8 (h, w, 3).

        The error of merged channels is that of the one which is furthest off.
        """
        x, recon = (np.take(v, index, 1 + axis)[list(channels)] for v in (self.x, self.recon))
        size = self.panel_size(axis)
        if column == "error":
            off = recon - x
            worst = np.take_along_axis(off, np.abs(off).argmax(0, keepdims=True), 0)[0]
            return error_colors(resize(self.layout.upright(worst / self.error), size))
        grays = ((x if column == "input" else recon) - self.lo) / (self.hi - self.lo)
        planes = [resize(self.layout.upright(gray), size) for gray in grays]
        return merged(planes, [self.layout.color(c) for c in channels])

    def panel_size(self, axis: int) -> tuple[int, int]:
        """Width and height in pixels of a plane that cuts `axis`."""
        a, b = (i for i in range(3) if i != axis)
        width, height = (self.shape[i] * self.spacing[i] * self.px_per_unit for i in (a, b))
        return max(2, round(width)), max(2, round(height))

    def draw(self, rows: Sequence[Row], columns: Sequence[str], title: str) -> np.ndarray:
        """Rows (channel, plane, axis, index) under the column names, the scales at the foot."""
        sizes = [self.panel_size(axis) for _, _, axis, _ in rows]
        width = max(NARROW, *(w for w, _ in sizes))
        top = GAP + (24 if title else 0) + 20
        height = top + sum(h + GAP for _, h in sizes) + FOOT
        wide = max(len(columns) * (width + GAP), round(font(15).getlength(title)) + GAP)
        canvas = Image.new("RGB", even(GAP + wide, height), BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        if title:
            pen.text((GAP, GAP - 2), title, TEXT, font(15))
        lefts = [GAP + k * (width + GAP) for k in range(len(columns))]
        for left, column in zip(lefts, columns, strict=True):
            pen.text((left, top - 19), column, TEXT, font(13))
        y = top
        for row, (w, h) in zip(rows, sizes, strict=True):
            channels, _, axis, index = row
            for left, column in zip(lefts, columns, strict=True):
                panel = Image.fromarray(self.panel(column, channels, axis, index))
                canvas.paste(panel, (left + (width - w) // 2, y))
            self._label(pen, (GAP, y, width, h), w, row)
            y += h + GAP
        self._foot(canvas, y - GAP + 5, dict(zip(columns, lefts, strict=True)), width)
        return np.asarray(canvas)

    def _label(
        self, pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], w: int, row: Row
    ) -> None:
        """Plane, slice, channels and sides of the body on the first panel of a row."""
        (x, y, width, h), (channels, plane, axis, index) = box, row
        letters = self.layout.sides(plane)
        told = [] if self.flat and not any(letters) else [plane]
        told += [] if self.flat else [f"{'xyz'[axis]} {index}"]
        told += ["R on the left"] if letters == ("R", "L") else []
        left = x + max(4, min((width - w) // 2 + 4, width - 150))
        parts = [("  ".join(told), TEXT)] if told else []
        if len(self.x) > 1 and (len(channels) == 1 or self.alone):
            parts += [(self.layout.name(c), self._ink(c)) for c in channels]
        for part, color in parts:
            pen.text((left, y + 3), part, color, font(11), stroke_width=1, stroke_fill=0)
            left += round(font(11).getlength(part)) + 10
        if h >= 40:  # below the line of text
            edges = x + (width - w) // 2 + 4, x + (width + w) // 2 - 12
            for letter, at in zip(letters, edges, strict=True):
                pen.text((at, y + h // 2), letter, FAINT, font(11), stroke_width=1, stroke_fill=0)

    def _ink(self, channel: int) -> tuple[int, int, int]:
        """Color of a channel's name, bright enough to be read."""
        color = self.layout.color(channel)
        r, g, b = (128 + v // 2 for v in bytes.fromhex(color)) if color else TEXT
        return r, g, b

    def _foot(self, canvas: Image.Image, y: int, lefts: dict[str, int], width: int) -> None:
        """Gray window under the first column, ruler under the recon, error scale under its own."""
        pen, unit = ImageDraw.Draw(canvas), " HU" if self.window_hu else ""
        lo, hi = self.window_hu or (self.lo, self.hi)
        error = self.error * (hi - lo) / (self.hi - self.lo)
        ramp = np.repeat(np.linspace(0, 1, 56, dtype=np.float32)[None], 8, axis=0)
        grays = [left for name, left in lefts.items() if name != "error"]
        gray = grays[0]
        end = color_scale(canvas, (gray, y), gray_colors(ramp), f"{lo:.4g}", f"{hi:.4g}{unit}")
        length = round_length(width / self.px_per_unit / 4)
        x1 = grays[-1] + width
        x0 = x1 - length * self.px_per_unit
        text = f"{length:g} {self.layout.look.unit}"
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
        **view: `error_scale`, `window_hu`, `title` and `layout` of `three_planes`.

    Returns:
        Paths by kind: png, gif, mp4; with `separate` also input_gif, input_mp4 and so on.
    """
    folder, stem = Path(folder), case_stem(case)
    folder.mkdir(parents=True, exist_ok=True)
    pair, layout = (x, recon, spacing_mm, data_range), view.get("layout")
    paths = {"png": write_png(folder / f"{stem}.png", three_planes(*pair, **view))}
    fps = 2.0 if 1 in np.shape(x)[1:] or np.ndim(x) == 3 else 12.0
    clips = {"": COLUMNS, "input_": ("input",), "recon_": ("recon",)}
    for prefix, columns in clips.items():
        if prefix and not separate:
            continue
        frames = scroll_frames(*pair, columns=columns, **view)
        name = f"{stem}.{prefix[:-1]}" if prefix else stem
        palette = own_palette(frames) if layout and any(c for _, c in layout.channels) else None
        paths[f"{prefix}gif"] = write_gif(folder / f"{name}.gif", frames, fps, palette)
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


def write_gif(
    path: Path | str,
    frames: Iterable[np.ndarray],
    fps: float = 12.0,
    palette: Image.Image | None = None,
) -> Path:
    """Write uint8 frames `(H, W, 3)` as a GIF that loops forever, one palette for all frames.

    By Pillow itself: imageio, which calls it, would search for a palette again in every frame.
    """
    colors, dither = palette or gray_palette(), Image.Dither.NONE
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


def merged(planes: Sequence[np.ndarray], colors: Sequence[str]) -> np.ndarray:
    """Planes (h, w) in [0, 1], each in its color (`rrggbb`, empty for gray), as one picture."""
    total = np.zeros((*planes[0].shape, 3), np.float32)
    for plane, color in zip(planes, colors, strict=True):
        share = np.frombuffer(bytes.fromhex(color or "ffffff"), np.uint8) / np.float32(255)
        total += np.clip(np.nan_to_num(plane), 0, 1)[..., None] * share
    return (np.clip(total, 0, 1) * 255).round().astype(np.uint8)


def own_palette(frames: Sequence[np.ndarray]) -> Image.Image:
    """One palette for all frames of colored channels: one each would flicker."""
    some = np.concatenate(frames[:: max(1, len(frames) // 4)])
    return Image.fromarray(some).quantize(256)


@lru_cache
def gray_palette() -> Image.Image:
    """Grays and error colors."""
    grays = gray_colors(np.linspace(0, 1, 175))
    errors = _error_table()[np.linspace(0, 255, 80).round().astype(int)]
    holder = Image.new("P", (1, 1))
    holder.putpalette(np.concatenate([grays, [BACKGROUND], errors]).astype(np.uint8).tobytes())
    return holder


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
    first, *others = profiles = [np.zeros(n) for n in x.shape[1:]]
    for row in range(len(first)):  # volumes may be large
        mass = np.clip(np.nan_to_num(x[:, row]), 0, None).sum(axis=0, dtype=np.float64)
        first[row] = mass.sum()
        for axis, profile in enumerate(others):
            profile += mass.sum(axis=tuple(i for i in range(mass.ndim) if i != axis))
    if not (total := first.sum()) > 0:
        return tuple(len(profile) // 2 for profile in profiles)
    return tuple(round(float(profile @ np.arange(len(profile)) / total)) for profile in profiles)


def even(width: int, height: int) -> tuple[int, int]:
    """H.264 with yuv420p stores color at half size: both sides must be even."""
    return width + width % 2, height + height % 2


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that pictures look the same on every machine."""
    return ImageFont.load_default(size)
