"""Files of microscopes (LIF, ND2, CZI) through the readers of bioio."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path

import numpy as np

from loaders.readers.axes import from_axes
from loaders.readers.options import READING, Reading
from loaders.readers.units import Sizes, millimeters, shown_unit, spacing_mm
from loaders.readers.volume import BrokenVolume, Look, Volume, num_items
from loaders.readers.voxels import LARGE, MAX_EXPANSION

UNNAMED = re.compile(r"^Channel:\d+:\d+$")  # bioio's name of a channel without one
EXTRAS = {".lif": "bio", ".nd2": "bio", ".czi": "czi"}


def read_bio(path: Path, reading: Reading = READING) -> Volume:
    """The first image of a LIF, ND2 or CZI file."""
    suffix = path.suffix.lower()
    package = f"bioio_{suffix[1:]}"
    try:
        reader_class = import_module(package).Reader
    except ImportError as error:
        license = " (bioio-czi, under the GPL)" if suffix == ".czi" else ""
        remedy = f"`pip install 'vae3d[{EXTRAS[suffix]}]'`{license}"
        raise BrokenVolume(path, f"{suffix[1:].upper()} needs {remedy}") from error
    try:
        file = reader_class(str(path))
        axes, shape, itemsize = file.dims.order, file.shape, file.dtype.itemsize
        if num_items(shape) * itemsize > max(LARGE, os.path.getsize(path) * MAX_EXPANSION):
            raise BrokenVolume(path, f"header claims the shape {shape}")
        units = {axis: getattr(file.dimension_properties, axis).unit for axis in "XYZ"}
        told = {axis: getattr(file.physical_pixel_sizes, axis) for axis in "XYZ"}
        data, count = np.asarray(file.data), len(file.scenes)
        names = [UNNAMED.sub("", str(name)) for name in file.channel_names or ()]
    except BrokenVolume:
        raise
    except Exception as error:  # nobody lists what these libraries raise over a damaged file
        reason = f"{package} cannot read it ({type(error).__name__}: {error})"
        raise BrokenVolume(path, reason) from error
    if "M" in axes:
        if shape[axes.index("M")] > 1:
            raise BrokenVolume(path, f"is a mosaic of {shape[axes.index('M')]} tiles: stitch them")
        data, axes = data.squeeze(axes.index("M")), axes.replace("M", "")
    sizes = in_millimeters(path, told, units)
    spacing, notes = spacing_mm(sizes, shape[axes.index("Z")])
    if count > 1:
        notes = (*notes, f"holds {count} images, of which the first is read")
    look = Look("picture", sizes[2], tuple((name, "") for name in names))
    data = from_axes(path, data, axes, reading)
    return Volume(data, np.diag([*spacing, 1.0]), notes=notes, look=look)


def in_millimeters(
    path: Path, told: dict[str, float | None], units: dict[str, object]
) -> Sizes:  # fmt: skip
    """Voxel sizes as bioio tells them, in micrometers where it names no unit."""
    sizes, shown = {}, None
    for axis, size in told.items():
        unit = millimeters(path, str(units[axis] or "micrometer"), {})
        if size and unit is not None:
            sizes[axis] = abs(size) * unit  # against the direction of the stage it is negative
            shown = shown or unit
    return sizes, next(iter(sizes.values()), 1.0), shown_unit(shown)
