"""PNG and JPEG."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loaders.readers.common import LARGE, MAX_EXPANSION, READING, BrokenVolume, Reading, Volume


def read_picture(path: Path, reading: Reading = READING) -> Volume:
    """PNG or JPEG -> (C, X, Y, 1), X to the right and Y down; colors become channels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max(LARGE, os.path.getsize(path) * MAX_EXPANSION):
                raise BrokenVolume(path, f"header claims {width} x {height} pixels")
            picture = image.convert("RGB") if image.mode == "P" else image
            data = np.asarray(picture)  # (Y, X) or (Y, X, C)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise BrokenVolume(path, f"damaged picture ({error})") from error
    if data.ndim == 2:
        data = data[..., None]
    return Volume(np.ascontiguousarray(data.transpose(2, 1, 0))[..., None])  # (C, X, Y, 1)
