"""Files on disk -> `Volume`: one small reader per format, chosen by the file's suffix.

Formats that belong together share a file; what all need is in `common`, which says how a file is
held to its claims.

Axes: `data` is (C, X, Y, Z) in storage order; `affine` maps voxel indices to RAS+ millimeters.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from loaders.readers.common import (
    READING,
    BrokenVolume,
    Reading,
    Volume,
    Volumes4D,
    num_items,
    require_number,
)  # fmt: skip
from loaders.readers.dicom import is_dicom, read_dicom
from loaders.readers.itk import read_meta, read_nrrd
from loaders.readers.nifti import (
    mgh_header,
    nifti_header,
    ras_axes,
    read_mgh,
    read_nifti,
    write_volume,
)
from loaders.readers.npy import read_npy, read_npz
from loaders.readers.picture import read_picture
from loaders.readers.tiff import read_tiff, tiff_time_points

__all__ = [
    "READERS", "READING", "BrokenVolume", "Reading", "Volume", "Volumes4D", "check_file",
    "is_dicom", "num_items", "num_time_points", "ras_axes", "read_volume", "volume_suffix",
    "write_volume",
]  # fmt: skip

READERS: dict[str, Callable[[Path, Reading], Volume]] = {
    ".nii.gz": read_nifti, ".nii": read_nifti, ".hdr": read_nifti,
    ".nrrd": read_nrrd, ".nhdr": read_nrrd, ".mha": read_meta, ".mhd": read_meta,
    ".mgz": read_mgh, ".mgh.gz": read_mgh, ".mgh": read_mgh,
    ".npy": read_npy, ".npz": read_npz,
    ".tif": read_tiff, ".tiff": read_tiff,
    ".png": read_picture, ".jpg": read_picture, ".jpeg": read_picture,
    ".dcm": read_dicom,
}  # fmt: skip


def volume_suffix(path: Path | str) -> str | None:
    """Return the first suffix of `READERS` that the name ends with, None if there is none."""
    name = Path(path).name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_volume(path: Path | str, reading: Reading = READING) -> Volume:
    """Read any supported file, or a folder with a DICOM series or a stack of pictures.

    Args:
        path: The file; its suffix decides the reader.
        reading: What to do where more than one answer is right, for example with 4D files.

    Returns:
        The volume as stored, (C, X, Y, Z) in the file's own dtype but native byte order, with its
        affine. Some voxels may be NaN or infinite, but not all.

    Raises:
        BrokenVolume: In one line the file and the reason, for anything that cannot be trusted.

    Example:
        >>> volume = read_volume("scan.nii.gz")
        >>> volume.intensities().shape
    """
    path = Path(path)
    suffix = check_file(path)
    reader = read_folder if suffix == "folder" else READERS[suffix]
    try:
        volume = reader(path, reading)
    except BrokenVolume:
        raise
    except (OSError, EOFError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise BrokenVolume(path, f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise BrokenVolume(path, f"bad header ({error})") from error
    require_number(path, volume.data.dtype)
    if not (np.isfinite(volume.affine).all() and np.isfinite([volume.scale, volume.offset]).all()):
        raise BrokenVolume(path, "affine or intensity scale is not finite")
    if abs(np.linalg.det(volume.affine[:3, :3])) < 1e-12 or volume.scale == 0:
        raise BrokenVolume(path, "affine is singular: two axes point the same way or have no size")
    data = volume.data.astype(volume.data.dtype.newbyteorder("="), copy=False)
    # Slice by slice: the first of nearly every volume settles it.
    if not any(np.isfinite(data[..., z]).any() for z in range(data.shape[3])):
        raise BrokenVolume(path, "all voxels are NaN or infinite")
    return replace(volume, data=data)


# What counts the volumes of a 4D file by its header; files of other formats are read for it.
TIME_POINTS: dict[str, Callable[[Path], int]] = {
    **dict.fromkeys((".nii.gz", ".nii", ".hdr"), lambda path: fourth(nifti_header(path)[1])),
    **dict.fromkeys((".mgz", ".mgh.gz", ".mgh"), lambda path: fourth(mgh_header(path)[1])),
    **dict.fromkeys((".tif", ".tiff"), tiff_time_points),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".dcm", "folder"), lambda path: 1),
}


def num_time_points(path: Path, reading: Reading) -> int:
    """Return how many samples a file is: the length of its time axis with `volumes_4d: samples`.

    Time is the axis T of a TIFF and the fourth axis of other formats.
    """
    if reading.volumes_4d != "samples":
        return 1
    if count := TIME_POINTS.get(check_file(path)):
        return count(path)
    return len(read_volume(path, reading).data)


def fourth(shape: tuple[int, ...]) -> int:
    """Length of the fourth axis."""
    return shape[3] if len(shape) > 3 else 1


def read_folder(path: Path, reading: Reading = READING) -> Volume:
    """A folder with one DICOM series, or with the slices of a stack as TIFF, PNG or JPEG."""
    kinds = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    pictures = [file for file in files if volume_suffix(file) in kinds]
    if not pictures or len(pictures) < len(files) / 2:
        return read_dicom(path, reading)
    # slice_2 comes before slice_10.
    pictures.sort(
        key=lambda file: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", file.name)]
    )
    slices = [read_volume(file, reading) for file in pictures]
    first = slices[0]
    for file, one in zip(pictures, slices, strict=True):
        if one.data.shape != first.data.shape or one.data.dtype != first.data.dtype:
            raise BrokenVolume(file, f"differs from {pictures[0].name} in size or dtype")
        if one.data.shape[3] > 1 or one.data.shape[0] > 1:
            raise BrokenVolume(file, "is not a gray slice, so the folder is not a stack")
    return Volume(np.concatenate([one.data for one in slices], axis=3), first.affine)


def check_file(path: Path) -> str:
    """Return the suffix that decides the reader; raise for what is not a readable file.

    A FIFO would block for ever, so the kind of the file is asked before it is opened.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = "dangling link" if path.is_symlink() else error.strerror or str(error)
        raise BrokenVolume(path, reason) from error
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise BrokenVolume(path, "is not a regular file (a pipe, socket or device)")
    suffix = volume_suffix(path)
    if suffix is None:
        raise BrokenVolume(path, f"unknown format; known are {' '.join(READERS)}")
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError as error:
        raise BrokenVolume(path, error.strerror or str(error)) from error
    if not os.path.getsize(path):
        raise BrokenVolume(path, "is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise BrokenVolume(path, "is a Git LFS pointer: run `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BrokenVolume(path, "is a web page: the download failed")
    return suffix
