"""One DICOM file: its header, the planes that it holds and their numbers; may import pydicom.

pydicom reads the headers, and each plane (`Plane`) says where it lies in the patient, where its
numbers lie on disk, and what they mean: slope and intercept are its own. Numbers that are not
compressed are read as those of any format; compressed ones are decoded by GDCM, in SimpleITK,
which this is the only file to import.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from loaders.readers.volume import BrokenVolume, Look, num_items
from loaders.readers.voxels import LARGE, MAX_EXPANSION, read_voxels

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# What we read of a header: meaning and place of a plane, and how its numbers are written.
HEADER = [
    *("SOPClassUID", "Modality", "SeriesInstanceUID", "SeriesDescription", "ProtocolName"),
    *("SeriesNumber", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient"),
    *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "GridFrameOffsetVector", "DetectorInformationSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "RescaleSlope"),
    *("RescaleIntercept", "DoseGridScaling", "ModalityLUTSequence", "SegmentationType"),
    "PatientID",
]
LAYOUT = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
]
FLOATS, PIXELS = (0x7FE00008, 0x7FE00009), 0x7FE00010  # tags of the elements with the numbers
# Objects that hold an image though their class does not say so.
IMAGES = ("RT Dose", "Segmentation", "Label Map Segmentation", "Parametric Map")
UNNAMED = "unnamed"  # a series without a UID
# Where MONOCHROME1 says that low numbers are white, and numbers have no unit that forbids to turn.
PROJECTIONS = ("CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA")


@dataclass(frozen=True)
class Pixels:
    """Where the numbers of a file lie, and how they are written.

    Args:
        file: The file.
        start: Byte at which they begin.
        compressed: Whether they are.
        dtype: Of the stored numbers.
        shape: Frames, rows and columns.
        bits: Bits allocated, bits stored and the high bit.
        colors: Whether they are colors, or their numbers in a palette.
    """

    file: Path
    start: int
    compressed: bool
    dtype: np.dtype
    shape: tuple[int, int, int]
    bits: tuple[int, int, int]
    colors: bool

    def read(self) -> np.ndarray:
        """Return the stored numbers (frames, rows, columns)."""
        if self.colors:  # a capture beside a series does no harm: it is told when it is read
            raise BrokenVolume(self.file, "holds colors (RGB): convert it to one number per voxel")
        allocated, stored, high = self.bits
        count = num_items(self.shape)
        if allocated == 1:
            raw = read_voxels(
                self.file, np.dtype("u1"), -(-count // 8), start=self.start, trailing=2**22
            )
            return np.unpackbits(raw, bitorder="little")[:count].reshape(self.shape)
        if self.compressed:
            data = decoded(self)
        else:
            raw = read_voxels(self.file, self.dtype, count, start=self.start, trailing=2**22)
            data = raw.reshape(self.shape)
        if stored < allocated and self.dtype.kind in "iu":  # other bits are overlays, or nothing
            data = (data << (allocated - 1 - high)) >> (allocated - stored)
        return data


@dataclass(frozen=True)
class Plane:
    """One image plane.

    Args:
        pixels: The numbers of its file.
        index: Its place among the file's frames.
        series: UID of its series.
        name: What the series is called, safe as a file name.
        order: Orders planes at one position: numbers of the instance and of the frame.
        position: Center of the first pixel in millimeters (LPS); None where it is not told.
        edges: (3, 2), steps to the next column and to the next row in millimeters (LPS).
        thickness: Millimeters to the next plane, as the header says.
        slope: intensity = stored * slope + intercept.
        intercept: See slope.
        lut: Header whose table gives the intensities instead; None for nearly all.
        segment: Number of the segment that a plane of a binary segmentation shows; 0 for images.
        look: Whether it lies in a body, as X-rays do not, and whether its pixels have a size.
    """

    pixels: Pixels
    index: int
    series: str
    name: str
    order: tuple[int, int]
    position: np.ndarray | None
    edges: np.ndarray
    thickness: float
    slope: float
    intercept: float
    lut: Dataset | None
    segment: int
    look: Look

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self.pixels.file


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's magic word at byte 128."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def object_name(path: Path) -> str | None:
    """Return what a DICOM file holds that is no image, 'RT Structure Set'; None for an image.

    The class stands in the first bytes; only one that the standard does not know takes a look at
    the header.
    """
    from pydicom.uid import UID

    with open(path, "rb") as file:
        told = re.search(rb"\x02\x00\x02\x00UI..([0-9.]+)", file.read(1024)[132:], re.DOTALL)
    if told is None:
        return None  # damaged, which is told when it is read
    uid = UID(told[1].decode())
    if uid.name == uid:
        return None if holds_image(path) else f"private object {uid}"
    name = uid.name.removesuffix(" Storage")
    return None if "Image" in name or name in IMAGES else name


def holds_image(path: Path) -> bool:
    """Whether the header of a file tells the size of an image."""
    try:
        return "Rows" in header_of(path)[0]
    except BrokenVolume:
        return True  # which is told when it is read


def header_of(path: Path) -> tuple[Dataset, int]:
    """Return a file's header, what we need of it, and the byte at which its pixels begin.

    The bytes in front of the pixels are the element's tag and length.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with open(path, "rb") as file:
        if DeflatedExplicitVRLittleEndian.encode() in file.read(1024):
            raise BrokenVolume(path, "is a deflated DICOM file: convert it, for example by dcmconv")
        file.seek(0)
        try:
            header = dcmread(
                file, stop_before_pixels=True, force=True, specific_tags=[*HEADER, *LAYOUT]
            )
        except (
            InvalidDicomError, EOFError, ValueError, KeyError, AttributeError, TypeError,
            NotImplementedError, OverflowError, RecursionError, struct.error,
        ) as error:  # fmt: skip
            raise BrokenVolume(path, f"damaged DICOM file ({error})") from error
        return header, file.tell()


def planes_of(path: Path, required: bool = False) -> list[Plane]:
    """Return the planes of a file; none for an object without an image, unless one is required."""
    try:
        header, end = header_of(path)
        if "Rows" not in header or "Columns" not in header:
            if required:
                raise BrokenVolume(path, "holds no DICOM image")
            return []
        pixels = pixels_of(path, header, end)
        frames = range(pixels.shape[0])
        if "PerFrameFunctionalGroupsSequence" in header:
            return [plane_of(header, pixels, index) for index in frames]
        return in_a_row(plane_of(header, pixels, 0), header, len(frames))
    except BrokenVolume:
        raise
    except (ValueError, TypeError, IndexError, AttributeError, KeyError, struct.error) as error:
        raise BrokenVolume(path, f"bad DICOM header ({error})") from error


def pixels_of(path: Path, header: Dataset, end: int) -> Pixels:
    """Say where the numbers lie.

    Args:
        path: The file.
        header: Its header.
        end: Byte at which that ends and the element of the pixels begins.
    """
    colors = int(header.get("SamplesPerPixel") or 1) > 1
    colors = colors or header.get("PhotometricInterpretation") == "PALETTE COLOR"
    bits = bits_of(path, header)
    implicit, little = header.original_encoding
    with open(path, "rb") as file:
        file.seek(end)
        start = file.read(12)
    group, element = struct.unpack("<HH" if little else ">HH", start[:4].ljust(4, b"\0"))
    tag = group << 16 | element
    if tag != PIXELS and tag not in FLOATS:
        raise BrokenVolume(path, "holds no pixels: the file is cut short, or only a header")
    letter = "f" if tag in FLOATS else "i" if header.get("PixelRepresentation") else "u"
    syntax = header.file_meta.get("TransferSyntaxUID")
    frames = int(header.get("NumberOfFrames") or 1)
    shape = frames, int(header.Rows), int(header.Columns)
    if min(shape) < 1:
        raise BrokenVolume(path, f"header claims the shape {shape}")
    compressed = syntax is not None and syntax.is_transfer_syntax and syntax.is_compressed
    claimed, held = -(-num_items(shape) * bits[0] // 8), path.stat().st_size - end
    # A compressed frame has a head of 8 bytes; numbers that are not compressed lie there as such.
    most = min(max(LARGE, held * MAX_EXPANSION), held // 8 * claimed // frames)
    if claimed > (most if compressed else held):
        raise BrokenVolume(path, f"header claims {claimed} bytes but the file holds {held}")
    dtype = np.dtype(f"{'<' if little else '>'}{letter}{max(bits[0] // 8, 1)}")
    at = end + (8 if implicit else 12)
    return Pixels(path, at, compressed, dtype, shape, bits, colors)


def bits_of(path: Path, header: Dataset) -> tuple[int, int, int]:
    """Return bits allocated, bits stored and the high bit of a number."""
    allocated = int(header.get("BitsAllocated") or 16)
    stored = int(header.get("BitsStored") or allocated)
    high = int(header.get("HighBit") or stored - 1)
    if not (0 < stored <= allocated <= 64 and stored - 1 <= high < allocated):
        raise BrokenVolume(path, f"header claims {stored} bits stored of {allocated}, high {high}")
    if allocated not in (1, 8, 16, 32, 64):
        raise BrokenVolume(path, f"numbers of {allocated} bits are not supported")
    return allocated, stored, high


@dataclass(frozen=True)
class Told:
    """What a header tells of one frame: what holds for it alone, for all frames, for the file.

    Args:
        header: Of the file.
        index: Which frame.
    """

    header: Dataset
    index: int

    def value(self, name: str, sequence: str = "") -> object:
        """Look up a value: in a group of new kinds of files, else where old ones have it."""
        frames = self.header.get("PerFrameFunctionalGroupsSequence") or []
        shared = self.header.get("SharedFunctionalGroupsSequence") or []
        groups = [*frames[self.index : self.index + 1], *shared[:1]]
        items = [item for group in groups for item in (group.get(sequence) or [])[:1]]
        items += [self.header, *(self.header.get("DetectorInformationSequence") or [])[:1]]
        found = (item.get(name) for item in items)
        return next((value for value in found if value not in (None, "")), None)

    def numbers(self, name: str, sequence: str = "") -> np.ndarray | None:
        """Look up one number or several; None where they are not told."""
        value = self.value(name, sequence)
        return None if value is None else np.atleast_1d(np.array(value, dtype=np.float64))

    def number(self, name: str, default: float, sequence: str = "") -> float:
        """Look up one number."""
        found = self.numbers(name, sequence)
        return default if found is None else float(found[0])


def plane_of(header: Dataset, pixels: Pixels, index: int) -> Plane:
    """Return one frame of a file."""
    told = Told(header, index)
    position = told.numbers("ImagePositionPatient", "PlanePositionSequence")
    thickness = told.number("SliceThickness", 0, "PixelMeasuresSequence")
    thickness = told.number("SpacingBetweenSlices", thickness, "PixelMeasuresSequence") or 1.0
    slope, intercept = rescale_of(told, pixels)
    name = header.get("SeriesDescription") or header.get("ProtocolName")
    name = name or f"{header.get('Modality', 'series')} {header.get('SeriesNumber', '')}"
    segment = told.number("ReferencedSegmentNumber", 1, "SegmentIdentificationSequence")
    return Plane(
        pixels,
        index,
        series=str(header.get("SeriesInstanceUID") or UNNAMED),
        name=re.sub(r"[^\w.+-]+", "_", str(name)).strip("_.") or "series",
        order=(int(told.number("InstanceNumber", 0)), index),
        position=position,
        edges=edges_of(told),
        thickness=abs(thickness),
        slope=slope,
        intercept=intercept,
        lut=header if header.get("ModalityLUTSequence") else None,
        look=look_of(told),
        segment=int(segment) if header.get("SegmentationType") == "BINARY" else 0,
    )


def in_a_row(first: Plane, header: Dataset, count: int) -> list[Plane]:
    """Return the frames of an old kind of file, which tells one position and offsets from it."""
    if count == 1:
        return [first]
    offsets = Told(header, 0).numbers("GridFrameOffsetVector")
    if offsets is None:
        # Nuclear medicine counts downwards where this is negative.
        offsets = np.arange(count) * float(header.get("SpacingBetweenSlices") or first.thickness)
    start = np.zeros(3) if first.position is None else first.position
    positions = start + np.outer(offsets - offsets[0], across(first.edges))
    return [
        replace(first, index=index, order=(first.order[0], index), position=positions[index])
        for index in range(count)
    ]


def edges_of(told: Told) -> np.ndarray:
    """Return the steps (3, 2) to the next column and the next row in millimeters (LPS)."""
    cosines = told.numbers("ImageOrientationPatient", "PlaneOrientationSequence")
    row, column = np.array([1, 0, 0, 0, 1, 0.0] if cosines is None else cosines).reshape(2, 3)
    row = row / np.linalg.norm(row)  # rounded cosines are made orthonormal again
    column = column - row * (row @ column)
    spacing = spacing_of(told)
    down, right = np.ones(2) if spacing is None else spacing
    return np.stack([row * right, column / np.linalg.norm(column) * down], axis=1)


def spacing_of(told: Told) -> np.ndarray | None:
    """Return millimeters from row to row and from column to column; None where none are told."""
    names = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    spacings = (told.numbers(name, "PixelMeasuresSequence") for name in names)
    return next((found for found in spacings if found is not None), None)


def look_of(told: Told) -> Look:
    """Whether a frame tells how it lies in the patient, and how large its pixels are."""
    cosines = told.numbers("ImageOrientationPatient", "PlaneOrientationSequence")
    return Look(
        "picture" if cosines is None else "body", "px" if spacing_of(told) is None else "mm"
    )


def across(edges: np.ndarray) -> np.ndarray:
    """Unit vector across a plane."""
    normal = np.cross(edges[:, 0], edges[:, 1])
    return normal / (np.linalg.norm(normal) or 1.0)  # pixels without a size are told as singular


def rescale_of(told: Told, pixels: Pixels) -> tuple[float, float]:
    """Return slope and intercept from stored numbers to intensities of one frame."""
    slope = told.number("RescaleSlope", 1, "PixelValueTransformationSequence")
    intercept = told.number("RescaleIntercept", 0, "PixelValueTransformationSequence")
    modality = told.header.get("Modality")
    if modality == "RTDOSE":
        slope, intercept = told.number("DoseGridScaling", slope), 0.0
    if told.header.get("PhotometricInterpretation") == "MONOCHROME1" and modality in PROJECTIONS:
        lowest_and_highest = 2 ** pixels.bits[1] - 1 if pixels.dtype.kind == "u" else -1
        slope, intercept = -slope, intercept + slope * lowest_and_highest
    return slope, intercept


def intensities(stored: np.ndarray, plane: Plane) -> np.ndarray:
    """Return what the stored numbers of one plane mean."""
    if plane.lut is not None:
        from pydicom.pixels import apply_modality_lut

        return apply_modality_lut(stored, plane.lut)
    return stored * np.float64(plane.slope) + plane.intercept


def decoded(pixels: Pixels) -> np.ndarray:
    """Decode compressed pixels by GDCM, inside SimpleITK.

    It is given the pixels alone: of the original file it would apply a slope of its own choice.
    """
    import SimpleITK as sitk
    from pydicom import Dataset, dcmread, dcmwrite
    from pydicom.uid import UID

    check_fragments(pixels)
    source = dcmread(pixels.file, force=True, specific_tags=[*LAYOUT, "PixelData"])
    bare, meta = Dataset(), source.file_meta
    for element in source:
        bare.add(element)
    capture = "1.2.840.10008.5.1.4.1.1.7" + ".3" * (pixels.shape[0] > 1)
    bare.SOPClassUID = meta.MediaStorageSOPClassUID = UID(capture)
    bare.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    bare.PhotometricInterpretation, bare.file_meta = "MONOCHROME2", meta
    with TemporaryDirectory() as folder:
        try:
            dcmwrite(f"{folder}/pixels.dcm", bare, enforce_file_format=True)
            image = sitk.ReadImage(f"{folder}/pixels.dcm")
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = f"{meta.TransferSyntaxUID.name} cannot be decoded ({str(error)[-200:]})"
            raise BrokenVolume(pixels.file, reason) from error
        data = sitk.GetArrayFromImage(image).reshape(pixels.shape)
    return data.astype(pixels.dtype, copy=False)


def check_fragments(pixels: Pixels) -> None:
    """Walk a compressed stream to its end: decoders fill what is cut off with numbers of their own.

    It is a row of fragments, each behind a tag and its length; the first is a table of contents.
    """
    count, size = 0, pixels.file.stat().st_size
    with open(pixels.file, "rb") as file:
        file.seek(pixels.start)
        while (head := file.read(8)) and head[:4] != b"\xfe\xff\xdd\xe0":
            length = int.from_bytes(head[4:], "little")
            if head[:4] != b"\xfe\xff\x00\xe0" or file.tell() + length > size:
                raise BrokenVolume(pixels.file, "truncated: a compressed fragment is cut short")
            file.seek(length, os.SEEK_CUR)
            count += 1
    if count - 1 < pixels.shape[0]:
        frames = f"{count - 1} compressed fragments for {pixels.shape[0]} frames"
        raise BrokenVolume(pixels.file, f"truncated: holds {frames}")
