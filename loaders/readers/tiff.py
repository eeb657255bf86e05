"""TIFF images and stacks; the only importer of tifffile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from loaders.readers.common import (
    LARGE,
    MAX_EXPANSION,
    READING,
    RGB,
    UNIT_MM,
    Boxes,
    BrokenVolume,
    Look,
    Reading,
    Volume,
    are_headers_alone,
    from_axes,
    is_rgb,
    num_items,
    require_number,
    slabs,
)
from loaders.readers.units import Sizes, millimeters, shown_unit, spacing_mm
from loaders.whole import whole_file

if TYPE_CHECKING:
    import tifffile

Channels = tuple[tuple[str, str], ...]  # name and color of each, see `Look`
MOST_OF_CLASSIC = 2**31  # bytes; beyond, BigTIFF
# Millimeters of what OME calls otherwise than pint: line, typographic point, astronomical unit.
OME_UNITS = {"li": 25.4 / 12, "pt": 25.4 / 72, "ua": 149597870700e3}


def read_tiff(path: Path, reading: Reading = READING) -> Volume:
    """A TIFF image or multi-page stack; voxel size from ImageJ or OME metadata where present."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"{path}: TIFF needs `pip install 'vae3d[formats]'`") from error

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            check_pages(path, series)
            axes, data = series.axes, decoded(path, series)
            alpha = sum(kind in (1, 2) for kind in series.keyframe.extrasamples)
            sizes = ome_sizes(path, tiff) if tiff.ome_metadata else imagej_sizes(path, tiff)
            count, channels = len(tiff.series), channels_of(tiff, series)
    except (tifffile.TiffFileError, IndexError, RuntimeError) as error:
        raise BrokenVolume(path, f"damaged TIFF ({error})") from error
    if alpha and "S" in axes:
        data = data.take(range(data.shape[axes.index("S")] - alpha), axes.index("S"))
    data = from_axes(path, data, axes.replace("I", "Z").replace("Q", "Z"), reading)
    spacing, notes = spacing_mm(sizes, data.shape[3])
    if count > 1:
        notes = (*notes, f"holds {count} images, of which the first is read")
    colored = "S" in axes or reading.color == "rgb"
    look = Look("picture", sizes[2], RGB if colored and len(data) == 3 else channels)
    return Volume(data, np.diag([*spacing, 1.0]), notes=notes, look=look)


def write_tiff(path: Path, volume: Boxes) -> None:
    """Write OME-TIFF, plane by plane: X to the right, Y down, voxel sizes in the volume's unit.

    Three channels that are red, green and blue of 8 or 16 bits become colors, as viewers know them.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"{path}: TIFF needs `pip install 'vae3d[formats]'`") from error

    count, x, y, z = volume.shape
    look, colored = volume.look, is_rgb(volume)
    axes = "ZYXS" if colored else "CZYX" if count > 1 else "ZYX"
    told: dict[str, object] = {"axes": axes}
    if look.unit != "px":
        for axis, size in zip("XYZ", np.linalg.norm(volume.affine[:3, :3], axis=0), strict=True):
            told[f"PhysicalSize{axis}"] = float(size) / UNIT_MM[look.unit]
            told[f"PhysicalSize{axis}Unit"] = {"um": "\u00b5m"}.get(look.unit, look.unit)
    if len(look.channels) == count > 1 and not colored:
        names, colors = zip(*look.channels, strict=True)
        told["Channel"] = {"Name": list(names), "Color": [signed_color(color) for color in colors]}
    sizes = {"C": count, "Z": z, "Y": y, "X": x, "S": 3}
    shape = tuple(sizes[axis] for axis in axes)
    with (
        whole_file(path) as temporary,
        tifffile.TiffWriter(
            temporary, ome=True, bigtiff=num_items(shape) * volume.dtype.itemsize > MOST_OF_CLASSIC
        ) as tiff,
    ):
        tiff.write(
            planes(volume, colored),
            shape=shape,
            dtype=volume.dtype,
            photometric="rgb" if colored else "minisblack",
            metadata=told,
        )


def planes(volume: Boxes, colored: bool) -> Iterator[np.ndarray]:
    """The planes (Y, X[, 3]) of a volume, those of a channel after those of the one before."""
    if colored:
        for several in zip(*(slabs(volume, channel) for channel in range(3)), strict=True):
            yield from np.stack(several, axis=-1).transpose(2, 1, 0, 3)
        return
    for channel in range(volume.shape[0]):
        for slab in slabs(volume, channel):
            yield from slab.transpose(2, 1, 0)


def signed_color(color: str) -> int:
    """Red, green, blue and alpha in one signed number, as OME counts them; white is no choice."""
    number = int((color or "ffffff") + "ff", 16)
    return number - 2**32 if number >= 2**31 else number


def channels_of(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Channels:
    """Name and color of each channel of a stack, as OME and ImageJ tell them."""
    count = dict(zip(series.axes, series.shape, strict=True)).get("C", 1)
    if tiff.ome_metadata:
        elements = ElementTree.fromstring(tiff.ome_metadata).iter()
        pixels = next((element for element in elements if element.tag.endswith("Pixels")), ())
        told = [element.attrib for element in pixels if element.tag.endswith("Channel")]
        named = [(one.get("Name", ""), ome_color(one.get("Color"))) for one in told]
    else:
        imagej = (tiff.imagej_metadata or {}) if tiff.is_imagej else {}
        tables = imagej.get("LUTs") if imagej.get("mode") in ("composite", "color") else None
        named = [("", bytes(table[:, -1].tolist()).hex()) for table in tables or ()]
    return tuple(named if len(named) == count else [("", "")] * count)


def ome_color(text: str | None) -> str:
    """Color of red, green, blue and alpha in one signed number; white is no choice of anybody."""
    color = "" if text is None else f"{int(text) & 0xFFFFFFFF:08x}"[:6]
    return "" if color in ("ffffff", "000000") else color


def check_pages(path: Path, series: tifffile.TiffPageSeries) -> None:
    """Hold what the header claims against the bytes of all pages, before memory is taken."""
    require_number(path, series.dtype)
    pages = [page for page in series.pages if page is not None]
    if lacking := len(series.pages) - len(pages):  # tifffile would read them as zeros
        raise BrokenVolume(path, f"{lacking} of its pages are in other files, which are not there")
    stored = sum(sum(page.databytecounts) for page in pages)
    if num_items(series.shape) * series.dtype.itemsize > max(LARGE, stored * MAX_EXPANSION):
        raise BrokenVolume(path, f"header claims the shape {series.shape}")
    for page in pages:
        ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends, default=0) > page.parent.filehandle.size:
            raise BrokenVolume(path, "truncated: a page lies behind the end of the file")


def tiff_time_points(path: Path) -> int:
    """Length of the axis T, 1 where there is none; no page is decoded."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True)).get("T", 1)
    except (tifffile.TiffFileError, IndexError, RuntimeError) as error:
        raise BrokenVolume(path, f"damaged TIFF ({error})") from error


def decoded(path: Path, series: tifffile.TiffPageSeries) -> np.ndarray:
    """Voxels of a series; what decompresses them may be missing here."""
    from tifffile import COMPRESSION

    if are_headers_alone():
        return np.broadcast_to(np.zeros((), series.dtype), series.shape)
    try:
        return series.asarray()
    except (ImportError, ValueError) as error:
        if isinstance(error, ValueError) and "imagecodecs" not in str(error):
            raise
        codec = COMPRESSION(series.keyframe.compression).name
        raise BrokenVolume(
            path, f"is compressed by {codec}: `pip install 'vae3d[formats]'` brings imagecodecs"
        ) from error


def ome_sizes(path: Path, tiff: tifffile.TiffFile) -> Sizes:
    """Voxel sizes of the first image in OME's XML; an axis that lacks one is like the others."""
    try:
        elements = ElementTree.fromstring(tiff.ome_metadata or "").iter()
    except ElementTree.ParseError as error:
        raise BrokenVolume(path, f"its OME metadata is not XML ({error})") from error
    pixels = next((element for element in elements if element.tag.endswith("Pixels")), None)
    told = {} if pixels is None else pixels.attrib
    sizes, shown = {}, None
    for axis in "XYZ":
        # OME counts in micrometers where it names no unit.
        unit = millimeters(path, told.get(f"PhysicalSize{axis}Unit", "\u00b5m"), OME_UNITS)
        size = float(told.get(f"PhysicalSize{axis}", 0))
        if unit is not None and size > 0:  # some write 0 for what they do not know
            sizes[axis] = size * unit
            shown = shown or unit
    return sizes, next(iter(sizes.values()), 1.0), shown_unit(shown)


def imagej_sizes(path: Path, tiff: tifffile.TiffFile) -> Sizes:
    """Voxel sizes as ImageJ writes them: pixels per unit in tags, and it leaves out what is 1."""
    told = (tiff.imagej_metadata or {}) if tiff.is_imagej else {}
    # Beyond ASCII it writes escapes, others write Latin-1.
    name = str(told.get("unit", "")).encode("latin-1", "backslashreplace").decode("unicode_escape")
    unit = millimeters(path, name, {})
    if unit is None:
        return {}, 1.0, "px"
    sizes = {"Z": float(told["spacing"]) * unit} if told.get("spacing") else {}
    for axis in "XY":
        tag = tiff.pages.first.tags.get(f"{axis}Resolution")
        if tag is not None and all(tag.value):
            pixels, units = tag.value
            sizes[axis] = units / pixels * unit
    return sizes, unit, shown_unit(unit)
