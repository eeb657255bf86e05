"""DICOM files for tests: slices, files of many frames, and objects that hold no image."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "NM": "1.2.840.10008.5.1.4.1.1.20",
    "map": "1.2.840.10008.5.1.4.1.1.30",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "RTDOSE": "1.2.840.10008.5.1.4.1.1.481.2",
    "SEG": "1.2.840.10008.5.1.4.1.1.66.4",
    "enhanced MR": "1.2.840.10008.5.1.4.1.1.4.1",
    "DICOMDIR": "1.2.840.10008.1.3.10",
    "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
    "SR": "1.2.840.10008.5.1.4.1.1.88.11",
    "PR": "1.2.840.10008.5.1.4.1.1.11.1",
    "CSA": "1.3.12.2.1107.5.9.1",  # Siemens' own, without an image
}
ROWS, COLUMNS = 6, 5


def dataset(kind: str, instance: str = "1.2.3.4", **attributes: object) -> Dataset:
    """An object of a class, with these attributes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CLASSES[kind], instance
    meta.TransferSyntaxUID, meta.ImplementationClassUID = "1.2.840.10008.1.2.1", "1.2.3.4"
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CLASSES[kind], instance
    data.Modality = kind.split()[-1]
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


def image(kind: str, stored: np.ndarray, **attributes: object) -> Dataset:
    """An image object of stored numbers (rows, columns) or (frames, rows, columns)."""
    bits = stored.dtype.itemsize * 8
    shape = {"Rows": stored.shape[-2], "Columns": stored.shape[-1]}
    if stored.ndim == 3:
        shape["NumberOfFrames"] = len(stored)
    usual = {
        "SeriesInstanceUID": "1.2.3",
        "PixelSpacing": [1.5, 0.5],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.tobytes() + b"\0" * (stored.nbytes % 2),
    }
    return dataset(kind, **{**usual, **shape, **attributes})


def save(data: Dataset, path: Path) -> Path:
    """Write an object to a file; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def stored_slice(number: int) -> np.ndarray:
    """Numbers that encode their position and their slice."""
    return (100 * number + np.arange(ROWS * COLUMNS, dtype="<i2")).reshape(ROWS, COLUMNS)


def write_series(
    folder: Path, count: int = 4, kind: str = "CT", series: str = "1.2.3", each=None, name=None,
    **attributes: object,
) -> Path:  # fmt: skip
    """Write an axial series 3 mm apart, file names not in the order of positions.

    Args:
        folder: Where to; it may hold other series.
        count: Number of slices.
        kind: One of `CLASSES`.
        series: UID of the series.
        each: Function slice number -> attributes of this slice, or None to leave it out.
        name: Function slice number -> file name.
        attributes: Of all slices.
    """
    for number in range(count):
        own = {} if each is None else each(number)
        if own is None:
            continue
        placed = {
            "SOPInstanceUID": f"{series}.{number + 1}",
            "SeriesInstanceUID": series,
            "InstanceNumber": number + 1,
            "SliceThickness": 3,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [10, -20, 30 + 3 * number],
        }
        data = image(kind, stored_slice(number), **{**placed, **attributes, **own})
        save(data, folder / (name(number) if name else f"{series}.{count - number}"))
    return folder


def frame(position: list[float], **rescale: float) -> Dataset:
    """What holds for one frame of an enhanced file: its position, slope and intercept."""
    item, place = Dataset(), Dataset()
    place.ImagePositionPatient = position
    item.PlanePositionSequence = Sequence([place])
    if rescale:
        values = Dataset()
        values.RescaleSlope, values.RescaleIntercept = rescale["slope"], rescale["intercept"]
        values.RescaleType = "US"
        item.PixelValueTransformationSequence = Sequence([values])
    return item


def segment_frame(position: list[float], number: int) -> Dataset:
    """What holds for one frame of a segmentation."""
    item, which = frame(position), Dataset()
    which.ReferencedSegmentNumber = number
    item.SegmentIdentificationSequence = Sequence([which])
    return item


def shared(thickness: float = 3) -> Sequence:
    """What holds for all frames of an enhanced file: orientation and pixel size."""
    item, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [1.5, 0.5], thickness
    item.PlaneOrientationSequence = Sequence([orientation])
    item.PixelMeasuresSequence = Sequence([measures])
    return Sequence([item])
