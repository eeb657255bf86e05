"""Files on disk -> `Volume`: one small reader per format, chosen by the file's suffix.

Formats that belong together share a file; all need `volume`, `options`, `axes`, and `voxels`, which
says how a file is held to its claims.

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

from loaders.readers.arrays import (
    CACHE_GB,
    HDF5,
    ZARR,
    Traffic,
    is_store,
    split_dataset,
    traffic,
)
from loaders.readers.bio import read_bio
from loaders.readers.dicom import DICOM_SUFFIXES, holds_dicom, patient_of, read_dicom, volumes_of
from loaders.readers.itk import read_meta, read_nrrd
from loaders.readers.ngff import Image, describe
from loaders.readers.ngff_writer import write_ome_zarr
from loaders.readers.nifti import ras_axes, read_mgh, read_nifti, write_nifti
from loaders.readers.npy import read_npy, read_npz
from loaders.readers.options import READING, Dicom, Reading, Volumes4D
from loaders.readers.picture import read_picture, write_picture
from loaders.readers.planes import is_dicom, object_name
from loaders.readers.remote import stores_at
from loaders.readers.stores import (
    Beside,
    InPlace,
    View,
    beside,
    finite,
    look_of_view,
    mirrored,
    read_store,
    times_of,
    view_of,
    view_written,
)
from loaders.readers.tiff import (
    TIFF,
    is_tiff,
    is_tiff_store,
    read_tiff,
    tiff_time_points,
    write_tiff,
)
from loaders.readers.volume import (
    UNIT_MM,
    Boxes,
    BrokenVolume,
    Cut,
    Look,
    MissingFile,
    Volume,
    check_one_grid,
    cut_out,
    is_singular,
    num_items,
    same_grid,
    shifted,
    url_of,
)
from loaders.readers.voxels import (
    LFS,
    POINTER,
    are_headers_alone,
    headers_alone,
    require_number,
    split_series,
)

__all__ = [
    "CACHE_GB",
    "DICOM_SUFFIXES",
    "HDF5",
    "PICTURES",
    "READERS",
    "READING",
    "SLICES",
    "TIFF",
    "UNIT_MM",
    "ZARR",
    "Beside",
    "Boxes",
    "BrokenVolume",
    "Cut",
    "Dicom",
    "Image",
    "InPlace",
    "Look",
    "MissingFile",
    "Reading",
    "Traffic",
    "View",
    "Volume",
    "Volumes4D",
    "as_store",
    "beside",
    "check_file",
    "check_one_grid",
    "describe",
    "finite",
    "has_place",
    "holds_dicom",
    "is_dicom",
    "is_store",
    "is_there",
    "is_tiff",
    "look_of_view",
    "mirrored",
    "num_items",
    "num_time_points",
    "object_name",
    "patient_of",
    "ras_axes",
    "read_header",
    "read_volume",
    "revision",
    "same_grid",
    "shifted",
    "split_dataset",
    "split_series",
    "stores_at",
    "times_of",
    "traffic",
    "url_of",
    "view_of",
    "view_written",
    "volume_suffix",
    "volumes_of",
    "write_volume",
]  # fmt: skip

READERS: dict[str, Callable[[Path, Reading], Volume]] = {
    ".nii.gz": read_nifti, ".nii": read_nifti, ".hdr": read_nifti,
    ".nrrd": read_nrrd, ".nhdr": read_nrrd, ".mha": read_meta, ".mhd": read_meta,
    ".mgz": read_mgh, ".mgh.gz": read_mgh, ".mgh": read_mgh,
    ".npy": read_npy, ".npz": read_npz,
    ".tif": read_tiff, ".tiff": read_tiff,
    ".png": read_picture, ".jpg": read_picture, ".jpeg": read_picture,
    ".lif": read_bio, ".nd2": read_bio, ".czi": read_bio,
    ".dcm": read_dicom,
}  # fmt: skip

WRITERS: dict[str, Callable[[Path, Boxes], None]] = {
    ".nii.gz": write_nifti, ".nii": write_nifti,
    ".tif": write_tiff, ".tiff": write_tiff,
    ".png": write_picture,
    ZARR: write_ome_zarr,
}  # fmt: skip

# They do not say where their voxels lie in space.
PLACELESS = {".npy", ".npz", ".tif", ".tiff", ".png", ".jpg", ".jpeg"}
# Their headers tell all but the voxels, which `read_voxels` fetches, or their reader after a look.
HEADED = {
    ".nii.gz", ".nii", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh.gz", ".mgh", ".npy",
    ".tif", ".tiff",
}  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg")  # one slice each, whatever they show
SLICES = (".tif", ".tiff", *PICTURES)  # of a stack
# Raised when a reader is mended, so that what it had read wrong leaves the caches.
REVISIONS = {"folder": 1, ".nrrd": 1, ".nhdr": 1, **dict.fromkeys(SLICES, 1)}


def revision(path: Path) -> str:
    """Which revision of its reader a volume is read by; empty for the first."""
    return str(REVISIONS.get("folder" if path.is_dir() else volume_suffix(path) or "", ""))


def has_place(path: Path, affine: np.ndarray) -> bool:
    """Whether a file says where its voxels lie in space; a store that tells no size does not."""
    if is_store(path) and not is_tiff(path):
        return not np.array_equal(affine, np.eye(4))
    return volume_suffix(path) not in PLACELESS or bool(affine[:3, 3].any())


def volume_suffix(path: Path | str) -> str | None:
    """Return the first suffix of `READERS` that the name ends with, None if there is none."""
    name = Path(path).name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def is_there(path: Path) -> bool:
    """Whether the file or folder of what a path names exists; a URL is not asked."""
    if url_of(path) is not None:
        return True
    file, _ = split_dataset(path) or split_series(path)
    return file.exists()


def read_volume(path: Path | str, reading: Reading = READING) -> Volume:
    """Read any supported file, a folder with a DICOM series or a stack of pictures, or a store.

    Args:
        path: The file, whose suffix decides the reader; DICOM is known by its first bytes, and one
            series of a folder is `folder#SeriesInstanceUID`.
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
    reader = reader_of(path, reading)
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
    if reading.region is not None and volume.cut is None:
        volume = cut_out(path, volume, reading.region)
    require_number(path, volume.data.dtype)
    if not (np.isfinite(volume.affine).all() and np.isfinite([volume.scale, volume.offset]).all()):
        raise BrokenVolume(path, "affine or intensity scale is not finite")
    if volume.scale == 0:
        raise BrokenVolume(path, "intensity scale is 0: all intensities would be equal")
    if is_singular(volume.affine):
        raise BrokenVolume(path, "affine is singular: two axes point the same way or have no size")
    data = volume.data.astype(volume.data.dtype.newbyteorder("="), copy=False)
    # Slice by slice: the first of nearly every volume settles it.
    planes = () if are_headers_alone() else range(data.shape[3])
    if planes and not any(np.isfinite(data[..., z]).any() for z in planes):
        raise BrokenVolume(path, "all voxels are NaN or infinite")
    return replace(volume, data=data)


def write_volume(path: Path | str, volume: Boxes) -> None:
    """Write a volume, whole or not at all: NIfTI, OME-TIFF, PNG or OME-Zarr, as the suffix says.

    Args:
        path: The file, or the folder of a store; folders on the way are made.
        volume: Stored as it is: dtype and affine (RAS+ millimeters), scale and offset in NIfTI; in
            other formats intensities. TIFF and PNG show x to the right and y down, and keep the
            voxel size alone of the affine.

    Example:
        >>> write_volume("recon.ome.zarr", volume)  # doctest: +SKIP
    """
    path = Path(path)
    suffix = next((one for one in WRITERS if path.name.lower().endswith(one)), None)
    if suffix is None:
        raise ValueError(f"{path}: volumes are written as {', '.join(WRITERS)}")
    if WRITERS[suffix] is not write_nifti and isinstance(volume, Volume):
        stored = volume.scale == 1 and volume.offset == 0
        data = volume.data if stored else volume.intensities()
        data = data.view(np.uint8) if data.dtype.kind == "b" else data
        volume = replace(volume, data=data, scale=1.0, offset=0.0)
    WRITERS[suffix](path, volume)


def reader_of(path: Path, reading: Reading) -> Callable[[Path, Reading], Volume]:
    """Return the function that reads a file, folder or store."""
    if as_store(path, reading):
        return read_store
    suffix = check_file(path)
    if chosen := reading.of_stores():
        stores = "zarr, HDF5 and TIFF that is read where it lies"
        raise BrokenVolume(path, f"data.{chosen[0]} is of {stores}, alone")
    return read_folder if suffix == "folder" else READERS[suffix]


def as_store(path: Path, reading: Reading) -> bool:
    """Whether a path is read as a store.

    A TIFF that could stay where it is and is copied is read as any TIFF is, unless a part of it is
    chosen.
    """
    parts = reading.in_place or reading.of_stores()
    return is_store(path) and bool(parts or not is_tiff_store(path))


def read_header(path: Path | str, reading: Reading = READING) -> Volume | None:
    """Return what the header of a file says of its volume, its voxels all zero.

    Args:
        path: The file.
        reading: As for `read_volume`.

    Returns:
        A volume whose voxels take no memory; None for formats that tell nothing before they are
        read whole.
    """
    headed = volume_suffix(path) in HEADED and not Path(path).is_dir()
    if not (headed or is_store(path)):
        return None
    with headers_alone():
        return read_volume(path, reading)


def num_time_points(path: Path, reading: Reading) -> int:
    """Return how many samples a file is: the length of its time axis with `volumes_4d: samples`.

    Time is the axis T of a TIFF and the fourth axis of other formats; a picture, and a DICOM series
    whose slices do not repeat, has one.
    """
    if reading.volumes_4d != "samples":
        return 1
    if is_store(path):
        return times_of(describe(path), reading)
    if volume_suffix(path) in (".tif", ".tiff"):
        return tiff_time_points(path)
    volume = read_header(path, reading) or read_volume(path, reading)
    return 1 if volume_suffix(path) in PICTURES else len(volume.data)


def read_folder(path: Path, reading: Reading = READING) -> Volume:
    """A folder with one DICOM series, or with the slices of a stack as TIFF, PNG or JPEG."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    pictures = [file for file in files if volume_suffix(file) in SLICES]
    stacked = reading.stacks == "folder" or len(pictures) >= len(files) / 2
    if not pictures or not stacked or holds_dicom(path):
        return read_dicom(path, reading)
    pictures.sort(key=natural)
    slices = [read_volume(file, replace(reading, region=None)) for file in pictures]
    first = slices[0]
    for file, one in zip(pictures, slices, strict=True):
        if one.data.shape[3] > 1:
            raise BrokenVolume(file, "is a stack itself: --data.stacks files reads each file alone")
        if one.data.shape != first.data.shape or one.data.dtype != first.data.dtype:
            raise BrokenVolume(file, f"differs from {pictures[0].name} in size, colors or dtype")
    data = np.concatenate([one.data for one in slices], axis=3)
    note = f"is a folder of slices, taken as {first.spacing_mm[2]:g} mm apart"
    return Volume(data, first.affine, notes=(*first.notes, note), look=first.look)


def natural(path: Path) -> list[str | int]:
    """Sort key by which slice_2 comes before slice_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def check_file(path: Path) -> str:
    """Return the suffix that decides the reader; raise for what is not a readable file.

    A FIFO would block for ever, so the kind of the file is asked before it is opened.
    """
    if split_series(path)[1] is not None:
        return ".dcm"
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
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip().lower()
        suffix = suffix or (".dcm" if is_dicom(path) else None)
    except OSError as error:
        raise BrokenVolume(path, error.strerror or str(error)) from error
    if suffix is None:
        raise BrokenVolume(path, f"unknown format; known are {' '.join(READERS)}")
    if not os.path.getsize(path):
        raise BrokenVolume(path, "is empty (0 bytes)")
    if start.startswith(LFS):
        raise BrokenVolume(path, POINTER)
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BrokenVolume(path, "is a web page: the download failed")
    return suffix
