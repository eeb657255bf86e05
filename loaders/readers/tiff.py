"""TIFF images and stacks, and the tiles of those that stay where they are.

The only importer of tifffile.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from loaders.readers import remote
from loaders.readers.axes import from_axes
from loaders.readers.options import READING, Reading
from loaders.readers.units import Sizes, millimeters, shown_unit, spacing_mm
from loaders.readers.volume import (
    RGB,
    UNIT_MM,
    Boxes,
    BrokenVolume,
    Look,
    Volume,
    is_rgb,
    num_items,
    slabs,
    url_of,
)
from loaders.readers.voxels import FETCHED, LARGE, MAX_EXPANSION, are_headers_alone, require_number
from loaders.whole import whole_file

if TYPE_CHECKING:
    import tifffile

Channels = tuple[tuple[str, str], ...]  # name and color of each, see `Look`
TIFF = (".tif", ".tiff")
MOST_OF_CLASSIC = 2**31  # bytes; beyond, BigTIFF
ALL_OF_CLASSIC = 2**32  # what classic TIFF can point to; ImageJ writes more behind one page
# How a place in the file, a count and one of a page's tags are packed.
CLASSIC, BIG = ("I", "H", "HHI4s"), ("Q", "Q", "HHQ8s")
COMPRESSION, TILE_WIDTH, SMALLER_PAGES = 259, 322, 330
MOST_TAGS = 2**16
PAGES_KEPT = 256  # of so many it is remembered where their tiles lie
COPIED = "--data.in_place false copies it into the cache"
# Millimeters of what OME calls otherwise than pint: line, typographic point, astronomical unit.
OME_UNITS = {"li": 25.4 / 12, "pt": 25.4 / 72, "ua": 149597870700e3}


def read_tiff(path: Path, reading: Reading = READING) -> Volume:
    """A TIFF image or multi-page stack; voxel size from ImageJ or OME metadata where present."""
    check_lists(path)
    with damage_told(path), require_tifffile(path).TiffFile(path) as tiff:
        series = tiff.series[0]
        check_pages(path, series)
        axes, data = series.axes, decoded(path, series)
        alpha, sizes = alphas(series), sizes_of(path, tiff)
        count, channels = len(tiff.series), channels_of(tiff, series)
    if alpha and "S" in axes:
        data = data.take(range(data.shape[axes.index("S")] - alpha), axes.index("S"))
    data = from_axes(path, data, axes.replace("I", "Z").replace("Q", "Z"), reading)
    spacing, notes = spacing_mm(sizes, data.shape[3])
    notes = (*notes, *others(count))
    colored = "S" in axes or reading.color == "rgb"
    look = Look("picture", sizes[2], RGB if colored and len(data) == 3 else channels)
    return Volume(data, np.diag([*spacing, 1.0]), notes=notes, look=look)


def write_tiff(path: Path, volume: Boxes) -> None:
    """Write OME-TIFF, plane by plane: X to the right, Y down, voxel sizes in the volume's unit.

    Three channels that are red, green and blue of 8 or 16 bits become colors, as viewers know them.
    """
    tifffile = require_tifffile(path)
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
    with damage_told(path), require_tifffile(path).TiffFile(path) as tiff:
        return dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True)).get("T", 1)


def require_tifffile(path: Path | str) -> ModuleType:
    """Import tifffile, or say how to get it."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"{path}: TIFF needs `pip install 'vae3d[formats]'`") from error
    return tifffile


@contextmanager
def damage_told(path: Path | str) -> Iterator[None]:
    """Make one line of what is wrong with a TIFF."""
    try:
        yield
    except BrokenVolume:
        raise
    except (require_tifffile(path).TiffFileError, IndexError, RuntimeError) as error:
        raise BrokenVolume(path, f"damaged TIFF ({error})") from error


def alphas(series: tifffile.TiffPageSeries) -> int:
    """How many of the samples of a pixel tell of its opacity."""
    return sum(kind in (1, 2) for kind in series.keyframe.extrasamples)


def others(count: int) -> tuple[str, ...]:
    """Tell that a file holds more images than the one that is read."""
    return (f"holds {count} images, of which the first is read",) if count > 1 else ()


def decoded(path: Path, series: tifffile.TiffPageSeries) -> np.ndarray:
    """Voxels of a series; what decompresses them may be missing here."""
    if are_headers_alone():
        return np.broadcast_to(np.zeros((), series.dtype), series.shape)
    try:
        return series.asarray()
    except (ImportError, ValueError) as error:
        if lacking := codec_lacking(series.keyframe, error):
            raise BrokenVolume(path, lacking) from error
        raise


def codec_lacking(page: tifffile.TiffPage, error: Exception) -> str | None:
    """Say which codec is not there, where that is what an error means."""
    if not isinstance(error, ImportError) and "imagecodecs" not in str(error):
        return None
    codec = require_tifffile("").COMPRESSION(page.compression).name
    return f"is compressed by {codec}: `pip install 'vae3d[formats]'` brings imagecodecs"


def sizes_of(path: Path, tiff: tifffile.TiffFile) -> Sizes:
    """Voxel sizes, as OME or ImageJ tell them."""
    return ome_sizes(path, tiff) if tiff.ome_metadata else imagej_sizes(path, tiff)


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


# --------------------------------------------------------------------------------------------------
# Where it lies: each tile, or strip, is read and decoded when a patch touches it.


def is_tiff(path: Path | str) -> bool:
    """Whether a path, or a URL, names a TIFF."""
    return str(path).lower().endswith(TIFF)


def is_tiff_store(path: Path | str) -> bool:
    """Whether a TIFF is read where it lies: large, in tiles or uncompressed; or tiled at levels.

    Large is BigTIFF, and what is longer than classic TIFF can point to.
    """
    if not is_tiff(path):
        return False
    try:
        status = os.stat(path)
    except OSError:  # told when it is read
        return False
    regular = stat.S_ISREG(status.st_mode)
    return regular and stays(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(2**14)
def stays(path: str, size: int, _time: int) -> bool:
    """Ask the tags of the first page, without tifffile: of each file of a folder."""
    try:
        version, order, tag, entries = next(tag_lists(path))
    except (OSError, LookupError, struct.error, StopIteration):  # told when it is read
        return False
    tags = {
        code: struct.unpack(f"{order}H", value[:2])[0]
        for code, _, _, value in struct.iter_unpack(f"{order}{tag}", entries)
    }
    large = version == 43 or size > ALL_OF_CLASSIC
    if TILE_WIDTH in tags:
        return large or SMALLER_PAGES in tags
    return large and tags.get(COMPRESSION, 1) == 1


def tag_lists(path: Path | str) -> Iterator[tuple[int, str, str, bytes]]:
    """Yield each page's list of tags: the version of TIFF, byte order, packing of a tag, all tags.

    Raises:
        LookupError: It is no TIFF.
        struct.error: It ends too early.
    """
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}[head[:2]]
        version = struct.unpack(f"{order}H", head[2:4])[0]
        offset, count, tag = {42: CLASSIC, 43: BIG}[version]
        (at,) = struct.unpack_from(f"{order}{offset}", head, 8 if version == 43 else 4)
        seen: set[int] = set()
        while at and at not in seen:
            seen.add(at)
            file.seek(at)
            (number,) = struct.unpack(f"{order}{count}", file.read(struct.calcsize(f"={count}")))
            entries = file.read(min(number, MOST_TAGS) * struct.calcsize(f"={tag}"))
            yield version, order, tag, entries
            (at,) = struct.unpack(f"{order}{offset}", file.read(struct.calcsize(f"={offset}")))


def check_lists(path: Path | str) -> None:
    """Refuse a file that ends before its last page, which tifffile passes over."""
    try:
        for _ in tag_lists(path):
            pass
    except struct.error as error:
        reason = "truncated: the lists of its pages lead behind the end of the file"
        raise BrokenVolume(path, reason) from error
    except LookupError:  # of a kind that tifffile knows, or tells of
        pass


class Tiles:
    """One of the sizes of the first image of a TIFF, tile by tile, or strip by strip.

    Any thread may read it.

    Args:
        file: The file, or its URL.
        level: Which size, from 0, the finest.

    Attributes:
        levels: Shapes of all sizes, along the axes.
        axes: A letter for each axis, as tifffile names them.
        shape: Along these.
        dtype: Of the voxels.
        chunks: Shape of a tile.
        about: What the file tells of its image.
        whole: A map of all voxels where they lie one after the other, uncompressed; else None.
    """

    def __init__(self, file: str, level: int):
        self.file, self.lock = file, Lock()
        url = url_of(file)
        if url is None:
            check_lists(file)
        with damage_told(file):
            tiff = require_tifffile(file).TiffFile(remote.opened(url) if url else file)
            first = tiff.series[0]
            self.series, self.key = first.levels[level], first.levels[level].keyframe
            self.about = About.of(Path(file), tiff, first)
            require_number(Path(file), self.series.dtype)
        self.levels = [tuple(one.shape) for one in first.levels]
        self.axes, self.shape = self.series.axes, self.levels[level]
        self.dtype = self.series.dtype
        inner = self.key.shape
        self.lead = len(self.shape) - len(inner)
        if self.shape[self.lead :] != inner or self.series.transform is not None:
            raise BrokenVolume(file, f"its pages are no planes of its image: {COPIED}")
        self.tile_shape = ((1,) * len(inner) + self.key.chunks)[-len(inner) :]
        self.chunks = (*[1] * self.lead, *map(min, self.tile_shape, inner))
        apart = url or self.series.is_multifile
        self.whole = None if apart else self.mapped(tiff.byteorder)
        if self.whole is None and num_items(self.tile_shape) * self.dtype.itemsize > LARGE:
            size = " x ".join(map(str, self.tile_shape))
            raise BrokenVolume(file, f"is in pieces of {size} voxels, each read whole: {COPIED}")
        self.page = lru_cache(PAGES_KEPT)(self._page)

    def mapped(self, byteorder: str) -> np.ndarray | None:
        """Map the voxels where they lie one after the other, as they are."""
        start = self.series.dataoffset
        if start is None:
            return None
        size = num_items(self.shape) * self.dtype.itemsize
        held = os.path.getsize(self.file)
        if start + size > held:
            short = f"header claims {start + size} bytes but the file holds {held}"
            raise BrokenVolume(self.file, short)
        return np.memmap(self.file, self.dtype.newbyteorder(byteorder), "r", start, self.shape)

    def _page(self, number: int) -> tifffile.TiffPage | tifffile.TiffFrame:
        """Find where the tiles of a page lie."""
        with self.lock:
            page = self.series[number]
            if page is None:
                raise ValueError(f"page {number} is in another file, which is not there")
            return page

    def fetch(self, page: tifffile.TiffPage | tifffile.TiffFrame, number: int) -> bytes | None:
        """Read the bytes of a tile; None where none were written."""
        if number >= len(page.dataoffsets):
            return None
        start, count = page.dataoffsets[number], page.databytecounts[number]
        if not (start and count):
            return None
        if url := url_of(self.file):
            data = remote.part(url, start, count)
        else:
            handle = page.parent.filehandle  # a set of files has several
            with self.lock:
                handle.open()
                handle.seek(start)
                data = handle.read(min(count, LARGE))
        if len(data) < count:
            raise ValueError(f"holds {len(data)} of its {count} bytes")
        FETCHED.add(count)
        return data

    def tile(self, corner: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Read and decode a tile.

        Args:
            corner: Its first voxel.
            shape: Voxels of it that lie in the image.

        Raises:
            ValueError: It cannot be read, and why.
        """
        lead = self.lead
        page_number = int(np.ravel_multi_index(corner[:lead], self.shape[:lead])) if lead else 0
        place = [at // n for at, n in zip(corner[lead:], self.tile_shape, strict=True)]
        number = int(np.ravel_multi_index(place, self.key.chunked))
        try:
            page = self.page(page_number)
            data = self.fetch(page, number)
            if data is None:
                return np.full(shape, self.key.nodata, self.dtype)
            tables = {name: found for name in ("jpegtables", "jpegheader")
                      if (found := getattr(page, name, None)) is not None}  # fmt: skip
            found = self.key.decode(data, number, **tables)[0]
        except Exception as error:  # each codec has errors of its own
            why = codec_lacking(self.key, error) or str(error) or type(error).__name__
            raise ValueError(f"tile {number} of page {page_number}: {why}") from error
        # It has depth, length, width and samples, of which the page lacks some.
        found = found if self.key.imagedepth > 1 else found[0]
        found = found if self.key.axes.endswith("S") else found[..., 0]
        inside = found[tuple(map(slice, shape[len(shape) - found.ndim :]))]
        return inside.reshape(shape)


@dataclass(frozen=True)
class About:
    """What a TIFF tells of its image.

    Args:
        sizes: Voxel sizes.
        channels: Name and color of each.
        alpha: Samples at the end that tell of opacity.
        images: How many the file holds.
    """

    sizes: Sizes
    channels: Channels
    alpha: int
    images: int

    @classmethod
    def of(cls, path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> About:
        """Ask the metadata of an open file."""
        alpha, sizes = alphas(series), sizes_of(path, tiff)
        return cls(sizes, channels_of(tiff, series), alpha, len(tiff.series))
