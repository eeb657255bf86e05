"""TIFF images and stacks; the only importer of tifffile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loaders.readers.common import (
    LARGE,
    MAX_EXPANSION,
    READING,
    BrokenVolume,
    Reading,
    Volume,
    num_items,
    require_number,
    to_channels_first,
)

if TYPE_CHECKING:
    import tifffile


def read_tiff(path: Path, reading: Reading = READING) -> Volume:
    """A TIFF image or multi-page stack; voxel size from ImageJ or OME metadata where present."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"{path}: TIFF needs `pip install 'vae3d[formats]'`") from error

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            axes, shape = series.axes, series.shape
            require_number(path, series.dtype)
            stored = sum(sum(page.databytecounts) for page in series.pages if page is not None)
            if num_items(shape) * series.dtype.itemsize > max(LARGE, stored * MAX_EXPANSION):
                raise BrokenVolume(path, f"header claims the shape {shape}")
            if max(end for page in series.pages if page is not None
                   for end in map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
                   ) > os.path.getsize(path):  # fmt: skip
                raise BrokenVolume(path, "truncated: a page lies behind the end of the file")
            spacing = tiff_spacing_mm(tiff)
            data = series.asarray()
    except (tifffile.TiffFileError, IndexError, RuntimeError) as error:
        raise BrokenVolume(path, f"damaged TIFF ({error})") from error
    names = axes.replace("S", "C").replace("I", "Z").replace("Q", "Z")
    if len(set(names)) != len(names) or not set(names) <= set("XYZCT"):
        raise BrokenVolume(path, f"TIFF axes {axes} are not understood")
    for name in "XYZ":
        if name not in names:
            names, data = names + name, data[..., None]
    order = [names.index(name) for name in "XYZ"]
    others = [i for i in range(data.ndim) if i not in order]
    if reading.volumes_4d == "samples":  # time before channels
        others.sort(key=lambda i: names[i] != "T")
    data = data.transpose(*order, *others)
    leave = (
        "channels" if "S" in axes and data.shape[2] == 1 else reading.volumes_4d
    )  # a color picture
    return Volume(to_channels_first(path, data, leave), np.diag([*spacing, 1.0]))


def tiff_time_points(path: Path) -> int:
    """Length of the axis T, 1 where there is none; no page is decoded."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True)).get("T", 1)
    except (tifffile.TiffFileError, IndexError, RuntimeError) as error:
        raise BrokenVolume(path, f"damaged TIFF ({error})") from error


def tiff_spacing_mm(tiff: tifffile.TiffFile) -> tuple[float, float, float]:
    """Voxel size in millimeters from ImageJ (resolution tags, spacing) or OME; 1 mm if unknown."""
    units = {"micron": 1e-3, "um": 1e-3, "\u00b5m": 1e-3, "mm": 1.0, "cm": 10.0, "nm": 1e-6}
    if tiff.ome_metadata is not None:
        from xml.etree import ElementTree

        elements = ElementTree.fromstring(tiff.ome_metadata).iter()
        pixels = next(element for element in elements if element.tag.endswith("Pixels")).attrib
        # OME counts in micrometers where it names no unit.
        x, y, z = (
            float(pixels[f"PhysicalSize{axis}"])
            * units.get(pixels.get(f"PhysicalSize{axis}Unit", "um"), 1.0)
            if f"PhysicalSize{axis}" in pixels
            else 1.0
            for axis in "XYZ"
        )
        return x, y, z
    if tiff.is_imagej:
        metadata, tags = tiff.imagej_metadata or {}, tiff.pages.first.tags
        unit = units.get(metadata.get("unit", "").encode().decode("unicode_escape"))
        if unit is not None and "XResolution" in tags:
            per_unit = [tags[name].value for name in ("XResolution", "YResolution")]
            x, y = (float(d) / float(n) * unit if n else 1.0 for n, d in per_unit)
            return x, y, float(metadata.get("spacing", 1.0)) * unit
    return 1.0, 1.0, 1.0
