"""PNG and JPEG."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loaders.readers.axes import luminance
from loaders.readers.options import READING, Reading
from loaders.readers.volume import RGB, Boxes, BrokenVolume, Look, Volume
from loaders.readers.voxels import LARGE, MAX_EXPANSION
from loaders.whole import whole_file

GRAYS = ("1", "L", "I", "F")  # and I;16 and its like; all other modes hold colors


def read_picture(path: Path, reading: Reading = READING) -> Volume:
    """PNG or JPEG -> (C, X, Y, 1), X to the right and Y down as shown; colors become channels."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max(LARGE, os.path.getsize(path) * MAX_EXPANSION):
                raise BrokenVolume(path, f"header claims {width} x {height} pixels")
            # Pillow keeps half of the bits of colors; its tiles name what lies in the file.
            halved = image.mode != "I;16" and any(";16" in str(tile[3]) for tile in image.tile)
            upright = ImageOps.exif_transpose(image)
            mode = "L" if upright.mode == "LA" else upright.mode  # alpha is no data
            if mode not in GRAYS and not mode.startswith("I;16"):
                mode = "RGB"
            data = np.asarray(upright if mode == upright.mode else upright.convert(mode))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenVolume(path, f"damaged picture ({error})") from error
    data = data.reshape(*data.shape[:2], -1)  # (Y, X, C)
    if reading.color == "gray" and data.shape[2] == 3:
        data = luminance(data)
    if reading.color == "rgb" and data.shape[2] == 1:
        data = np.repeat(data, 3, axis=2)
    notes = ("has 16 bits a color, of which 8 are read: save it as TIFF to keep them",) * halved
    data = np.ascontiguousarray(data.transpose(2, 1, 0))[..., None]  # (C, X, Y, 1)
    look = Look("picture", "px", RGB if len(data) == 3 else ())
    return Volume(data, notes=notes, look=look)


def write_picture(path: Path, volume: Boxes) -> None:
    """Write PNG, gray or colored: X to the right and Y down; integers of 16 bits at most."""
    from PIL import Image

    count, x, y, z = volume.shape
    if z > 1 or count not in (1, 3) or volume.dtype.kind not in "biu":
        raise ValueError(
            f"{path}: a volume {(count, x, y, z)} of {volume.dtype} is no picture: write it as TIFF"
        )
    data = volume[(slice(None),) * 4][..., 0].transpose(2, 1, 0)  # (Y, X, C)
    deep = volume.dtype not in (np.uint8, np.bool_)
    if deep and count == 3:
        raise ValueError(f"{path}: PNG of colors has 8 bits here: write it as TIFF")
    data = data.clip(0, 2**16 - 1).astype(np.uint16) if deep else data.astype(np.uint8)
    with whole_file(path) as temporary:
        Image.fromarray(data[..., 0] if count == 1 else data).save(temporary)
