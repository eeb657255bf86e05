"""NumPy's formats: .npy and .npz."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from loaders.readers.axes import to_channels_first
from loaders.readers.options import READING, Reading
from loaders.readers.volume import BrokenVolume, Look, Volume, num_items
from loaders.readers.voxels import LARGE, MAX_EXPANSION, read_voxels, require_number


def read_npy(path: Path, reading: Reading = READING) -> Volume:
    """A .npy array (X, Y[, Z[, C]]), 1 mm voxels; pickled objects are never loaded."""
    with open(path, "rb") as file:
        shape, fortran, dtype = npy_header(path, file)
        start = file.tell()
    require_number(path, dtype)
    raw = read_voxels(path, dtype, num_items(shape), start=start)
    data = raw.reshape(shape, order="F" if fortran else "C")
    return Volume(to_channels_first(path, data, reading.volumes_4d), look=Look("array", "px"))


def npy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse the header of a .npy stream without loading anything."""
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(file)
    except ValueError as error:
        raise BrokenVolume(path, f"has no .npy header ({error})") from error


def read_npz(path: Path, reading: Reading = READING) -> Volume:
    """A .npz with the volume under `data` (or alone) and, if given, `affine` or `spacing_mm`."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise BrokenVolume(path, f"is not a .npz archive ({error})") from error
    with archive:
        names = {Path(name).stem: name for name in archive.namelist()}
        images = [name for name in names if name not in ("affine", "spacing_mm", "spacing")]
        if "data" not in names and len(images) != 1:
            raise BrokenVolume(path, f"holds {sorted(names)}: name the volume 'data'")
        data = npz_array(path, archive, names["data" if "data" in names else images[0]])
        affine, look = np.eye(4), Look("array", "px")
        if "affine" in names:
            affine = npz_array(path, archive, names["affine"]).astype(float)
            look = Look()
        for key in ("spacing_mm", "spacing"):
            if key in names:
                affine[:3, :3] = np.diag(npz_array(path, archive, names[key]).astype(float))
                look = replace(look, unit="mm")
    return Volume(to_channels_first(path, data, reading.volumes_4d), affine, look=look)


def npz_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read one array; its header must fit the archive's table before anything is allocated."""
    info = archive.getinfo(name)
    if info.file_size > max(LARGE, info.compress_size * MAX_EXPANSION):
        raise BrokenVolume(path, f"{name} expands {info.file_size // info.compress_size}-fold")
    try:
        with archive.open(info) as file:
            shape, fortran, dtype = npy_header(path, file)
            require_number(path, dtype)
            if file.tell() + num_items(shape) * dtype.itemsize != info.file_size:
                raise BrokenVolume(path, f"{name} does not hold what its header claims")
            raw = np.frombuffer(file.read(), dtype)  # to the end: zipfile checks the CRC there
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BrokenVolume(path, f"damaged archive ({error})") from error
    return raw.reshape(shape, order="F" if fortran else "C")
