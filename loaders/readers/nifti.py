"""NIfTI and FreeSurfer's MGH; the only importer of nibabel."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loaders.readers.axes import to_channels_first
from loaders.readers.options import READING, Reading
from loaders.readers.volume import Boxes, BrokenVolume, Look, Volume, num_items, same_grid, slabs
from loaders.readers.voxels import codec_of, head, read_voxels, require_number
from loaders.whole import whole_file

if TYPE_CHECKING:
    from nibabel import Nifti1Header
    from nibabel.freesurfer.mghformat import MGHHeader


def read_nifti(path: Path, reading: Reading = READING) -> Volume:
    """NIfTI-1 and NIfTI-2, single file or .hdr/.img pair."""
    from nibabel.spatialimages import HeaderDataError

    header, shape = nifti_header(path)
    dtype = stored_dtype(path, header, "datatype")
    try:
        affine, (scale, offset) = header.get_best_affine(), header.get_slope_inter()
    except HeaderDataError as error:
        raise BrokenVolume(path, f"bad header ({error})") from error
    start, voxels = int(header["vox_offset"]), path
    if bytes(header["magic"]).startswith(b"ni"):
        voxels = sibling(path, (".img", ".img.gz"))
    elif start < header.sizeof_hdr:
        raise BrokenVolume(path, f"header puts the voxels at byte {start}, inside itself")
    require_number(path, dtype)
    raw = read_voxels(voxels, dtype, num_items(shape), start=start, codec=codec_of(voxels))
    data = to_channels_first(path, raw.reshape(shape, order="F"), reading.volumes_4d)
    # The low three bits of xyzt_units: 1 meter, 2 millimeter, 3 micrometer.
    unit = int(header["xyzt_units"]) & 7
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(unit, 1.0)
    placed = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
    look = Look("body" if placed else "array", "um" if unit == 3 else "mm")
    scale, offset = 1.0 if scale is None else scale, 0.0 if offset is None else offset
    return Volume(data, affine, scale, offset, look=look)


def nifti_header(path: Path) -> tuple[Nifti1Header, tuple[int, ...]]:
    """Return the header of NIfTI-1 or NIfTI-2, and the shape that it claims; no voxel is read."""
    import nibabel
    from nibabel.spatialimages import HeaderDataError

    codec_of(path)
    block = head(path, 540)
    size = int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")
    if 348 in size and block[344:348] in (b"n+1\0", b"ni1\0"):
        cls, length = nibabel.Nifti1Header, 348
    elif 540 in size and block[4:7] in (b"n+2", b"ni2"):
        cls, length = nibabel.Nifti2Header, 540
    elif 348 in size and path.suffix.lower() == ".hdr":
        raise BrokenVolume(path, "is Analyze 7.5, which has no orientation: convert it to NIfTI")
    else:
        raise BrokenVolume(path, "has no NIfTI header")
    if len(block) < length:
        raise BrokenVolume(path, "truncated header")
    header = cls(block[:length], endianness=None, check=False)
    try:
        shape = header.get_data_shape()
    except HeaderDataError as error:
        raise BrokenVolume(path, f"bad header ({error})") from error
    if not shape or len(shape) > 7 or min(shape) < 1:
        raise BrokenVolume(path, f"header claims the shape {shape}")
    return header, shape


def stored_dtype(path: Path, header: Nifti1Header | MGHHeader, name: str) -> np.dtype:
    """Return the dtype that a header claims.

    Args:
        path: The file, for the message.
        header: What stands at its beginning.
        name: Of the field with the dtype's code.
    """
    try:
        return header.get_data_dtype()
    except KeyError as error:
        raise BrokenVolume(path, f"{name} {int(header[name])} is none that is known") from error


def sibling(path: Path, suffixes: tuple[str, ...]) -> Path:
    """Return the file beside `path` that differs only in its suffix, whatever its case."""
    for other in path.parent.iterdir():
        if other.name.lower() in [(path.stem + suffix).lower() for suffix in suffixes]:
            return other
    raise BrokenVolume(path, f"lacks {path.stem}{suffixes[0]} beside it")


def read_mgh(path: Path, reading: Reading = READING) -> Volume:
    """FreeSurfer .mgh and .mgz."""
    header, shape = mgh_header(path)
    dtype = stored_dtype(path, header, "type")
    raw = read_voxels(
        path, dtype, num_items(shape), start=284, codec=codec_of(path), trailing=2**22
    )
    data = to_channels_first(path, raw.reshape(shape, order="F"), reading.volumes_4d)
    look = Look("body" if header["goodRASFlag"] > 0 else "array")
    return Volume(data, header.get_affine(), look=look)


def mgh_header(path: Path) -> tuple[MGHHeader, tuple[int, ...]]:
    """Return the header of a .mgh file, and the shape that it claims; no voxel is read."""
    from nibabel.freesurfer.mghformat import MGHHeader

    block = head(path, 284)
    if len(block) < 284 or int.from_bytes(block[:4], "big") != 1:
        raise BrokenVolume(path, "has no MGH header")
    header = MGHHeader(block, check=False)
    return header, tuple(int(n) for n in header["dims"])


def write_nifti(path: Path, volume: Boxes) -> None:
    """Write NIfTI (.nii or .nii.gz), slice by slice; the same volume gives the same bytes."""
    import nibabel

    dtype = {"b": np.dtype(np.uint8)}.get(volume.dtype.kind, volume.dtype)
    dtype = np.dtype(np.float32) if dtype == np.float16 else dtype
    channels, *shape = volume.shape
    cls = nibabel.Nifti1Header if max(shape) < 2**15 else nibabel.Nifti2Header
    header = cls(endianness="<")
    header.set_data_dtype(dtype.newbyteorder("<"))
    header.set_data_shape(shape if channels == 1 else (*shape, channels))
    header.set_qform(volume.affine, code=1, strip_shears=True)
    if not same_grid(shape, volume.affine, shape, header.get_qform()):
        header["qform_code"] = 0  # it holds no shear: let nobody take it, the sform is right
    header.set_sform(volume.affine, code=1)
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = volume.scale, volume.offset
    header["magic"] = header.single_magic
    with whole_file(path) as temporary, open(temporary, "wb") as raw:
        packed = path.name.lower().endswith(".gz")
        file = gzip.GzipFile("", "wb", compresslevel=3, fileobj=raw, mtime=0) if packed else raw
        with file:
            file.write(header.binaryblock.ljust(header.single_vox_offset, b"\0"))
            for channel in range(channels):
                for slab in slabs(volume, channel):
                    file.write(slab.astype(dtype.newbyteorder("<"), copy=False).tobytes("F"))


def ras_axes(affine: np.ndarray) -> tuple[list[int], list[bool]]:
    """Return the source axis for each of X, Y, Z and whether it is then flipped."""
    from nibabel.orientations import io_orientation

    orientation = io_orientation(affine)
    axes = [int(np.flatnonzero(orientation[:, 0] == target)[0]) for target in range(3)]
    return axes, [bool(orientation[axis, 1] < 0) for axis in axes]
