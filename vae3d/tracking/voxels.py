"""Volumes for the report's viewer: input and reconstruction at 8 bits of the window, as JavaScript.

A page that lies on a disk may not read other files, but it may run them: so a volume is a script
that hands itself to the page, `vae3dVolume({...})`, and what is between the brackets is JSON.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.layout import Layout
from loaders.whole import write_text
from vae3d.tracking.media import ERROR_COLORS, case_stem, center_of_mass

SUFFIX = ".view.js"
CALL = "vae3dVolume("
SMALL = 160**3  # voxels of all channels together: a page holds it, training does not wait for it


def voxels_file(folder: Path, case: str) -> Path:
    """Where the volume of a case lies."""
    return folder / f"{case_stem(case)}{SUFFIX}"


def write_voxels(
    folder: Path,
    case: str,
    x: np.ndarray,
    recon: np.ndarray,
    spacing_mm: Sequence[float] | None,
    ranges: Sequence[tuple[float, float]],
    *,
    layout: Layout | None = None,
    window_hu: tuple[float, float] | None = None,
    error_scale: float = 0.2,
) -> Path:
    """Write a volume and its reconstruction for the viewer.

    Args:
        folder: Where to; made when missing.
        case: The volume's id.
        x: Input, `(C, X, Y, Z)` or `(C, X, Y)`.
        recon: Reconstruction, same shape.
        spacing_mm: Voxel size per axis in mm.
        ranges: Intensities of each channel that become 0 and 255.
        layout: Which way is up, and what the file knows.
        window_hu: HU of the ranges' ends (CT).
        error_scale: End of the error's color scale at first, as a part of the range.
    """
    layout = layout or Layout()
    pair = [layout.arranged(np.asarray(v)) for v in (x, recon)]
    shape = pair[0].shape
    planes = layout.planes(shape[1:])
    lows = np.array([low for low, _ in ranges]).reshape(-1, 1, 1, 1)
    about = {
        "case": case,
        "shape": shape,
        "spacing": layout.spacing(spacing_mm),
        "unit": layout.look.unit,
        "ranges": [window_hu or ends for ends in ranges],
        "values": "HU" if window_hu else "",
        "names": [layout.name(c) for c in range(shape[0])],
        "colors": [layout.color(c) for c in range(shape[0])],
        "planes": planes,
        "body": layout.look.space == "body",
        "mirrored": layout.mirrored,
        "downward": layout.downward,
        "center": center_of_mass(pair[0] - lows),
        "errorScale": error_scale,
        "errorColors": ERROR_COLORS.tolist(),
    }
    texts = dict(zip(("input", "recon"), (packed(v, ranges) for v in pair), strict=True))
    content = json.dumps(about | texts, separators=(",", ":")).replace("<", "\\u003c")
    folder.mkdir(parents=True, exist_ok=True)
    return write_text(voxels_file(folder, case), f"{CALL}{content})\n")


def eight_bits(volume: np.ndarray, ranges: Sequence[tuple[float, float]]) -> np.ndarray:
    """Volume (C, X, Y, Z) as uint8, each channel's range as 0 to 255."""
    out = np.empty(volume.shape, np.uint8)
    for channel, (low, high) in enumerate(ranges):
        for row, plane in enumerate(volume[channel]):  # volumes may be large
            scaled = (plane.astype(np.float32) - low) * (255 / (high - low))
            out[channel, row] = np.rint(np.clip(np.nan_to_num(scaled), 0, 255))
    return out


def packed(volume: np.ndarray, ranges: Sequence[tuple[float, float]]) -> str:
    """Bytes of the volume in C order, deflated, as text."""
    raw = eight_bits(volume, ranges).tobytes()
    return base64.b64encode(zlib.compress(raw, 3)).decode()


def read_voxels_json(path: Path) -> str:
    """Return the JSON of a volume's script."""
    return path.read_text("utf-8").strip().removeprefix(CALL).removesuffix(")")
