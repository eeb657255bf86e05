"""Files on disk -> `Volume`: one small reader per format, chosen by the file's suffix.

A reader parses the header, says where the voxels lie, and `read_voxels` fetches them. Nothing is
allocated before the header's claim is held against the bytes on disk, and a compressed stream is
read to its end and checked, so a damaged file is a `BrokenVolume` with its reason, never zeros.

Axes: `data` is (C, X, Y, Z) in storage order; `affine` maps voxel indices to RAS+ millimeters.
"""

from __future__ import annotations

import bz2
import gzip
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from loaders.whole import whole_file

# ITK, DICOM, NRRD and MetaImage count millimeters towards left and posterior; we count in RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Deflate cannot expand more than 1032-fold; an image with any content stays far below.
MAX_EXPANSION = 800
LARGE = 64 * 2**20
CHUNK = 2**18

Volumes4D = Literal["error", "channels", "first"]


class BrokenVolume(ValueError):
    """A file that cannot be trusted; the message is one line with the file and the reason.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str):
        self.path, self.reason = str(path), " ".join(str(reason).split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self):
        return type(self), (self.path, self.reason)


@dataclass
class Volume:
    """A volume as its file holds it; intensity = data * scale + offset.

    Args:
        data: Stored numbers (C, X, Y, Z) in the file's own dtype.
        affine: 4x4, voxel index -> RAS+ millimeters.
        scale: Slope from stored numbers to intensities.
        offset: Intercept from stored numbers to intensities.
    """

    data: np.ndarray
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    scale: float = 1.0
    offset: float = 0.0

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths along X, Y, Z in millimeters."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def intensities(self) -> np.ndarray:
        """Return `data * scale + offset` as float32 (C, X, Y, Z)."""
        if self.scale == 1 and self.offset == 0:
            return self.data.astype(np.float32)
        return (self.data * np.float64(self.scale) + self.offset).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Bytes: every voxel of every format passes through `read_voxels`.


def inflaters() -> tuple[Callable, tuple[type[Exception], ...]]:
    """Return the class that inflates, and its errors: isal's, 2.5 times as fast, where it is there.

    Both check the CRC and the length in the trailer.
    """
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.decompressobj, (zlib.error, OSError)
    return isal_zlib.decompressobj, (isal_zlib.error, zlib.error, OSError)


def decompressed(path: Path, codec: str, start: int = 0) -> Iterator[bytes]:
    """Yield the decompressed chunks of a gzip, zlib or bzip2 stream and check it to its end."""
    inflate, errors = inflaters()
    new = {
        "gzip": lambda: inflate(wbits=31),
        "zlib": lambda: inflate(wbits=15),
        "bzip2": bz2.BZ2Decompressor,
    }[codec]
    with open(path, "rb") as file:
        file.seek(start)
        stream, rest = new(), file.read(CHUNK)
        while rest:
            try:
                chunk = stream.decompress(rest)  # a bit flip ends here, at the trailer at last
            except errors as error:
                raise BrokenVolume(path, f"damaged {codec} stream ({error})") from error
            if chunk:
                yield chunk
            rest = file.read(CHUNK)
            if stream.eof:
                rest = (stream.unused_data + rest).lstrip(b"\0")  # tapes pad with zeros
                if rest:
                    stream = new()  # a further gzip member
        if not stream.eof:
            raise BrokenVolume(path, f"truncated {codec} stream")


def read_voxels(
    path: Path,
    dtype: np.dtype,
    count: int,
    *,
    start: int = 0,
    codec: str | None = None,
    stream_start: int = 0,
    trailing: int = 2**16,
) -> np.ndarray:
    """Read `count` items of `dtype` after the header's claim is held against the bytes on disk.

    Args:
        path: File that holds the voxels.
        dtype: Stored dtype with its byte order.
        count: Number of items that the header claims.
        start: Bytes before the voxels, counted after decompression.
        codec: None, gzip, zlib or bzip2.
        stream_start: Bytes of the file before the compressed stream.
        trailing: Bytes behind the voxels that are tolerated; more say that the header lies.

    Returns:
        One-dimensional array; a read-only map of the file where it is not compressed.
    """
    claimed, on_disk = count * dtype.itemsize, os.path.getsize(path)
    if count <= 0:
        raise BrokenVolume(path, "header claims no voxels")
    if codec is None:
        if start < 0 or start + claimed > on_disk:
            raise BrokenVolume(
                path, f"header claims {start + claimed} bytes but the file holds {on_disk}"
            )
        if on_disk - start - claimed > trailing:
            extra = on_disk - start - claimed
            raise BrokenVolume(path, f"file holds {extra} bytes more than its header claims")
        return np.memmap(path, dtype, "r", start, (count,))
    if claimed > max(LARGE, on_disk * MAX_EXPANSION):
        raise BrokenVolume(
            path,
            f"header claims {claimed} bytes but the {codec} stream of {on_disk} bytes cannot hold "
            f"an image of that size",
        )
    if codec == "gzip" and (length_in_trailer(path) - start - claimed) % 2**32 > trailing:
        # Cut short, lying, or made of several members: count before memory is taken.
        held = 0
        for chunk in decompressed(path, codec, stream_start):
            held += len(chunk)
            if held > start + claimed + trailing:
                break
        refuse_length(path, held - start, claimed, trailing)
    # Pages of np.empty are committed as they are filled: a lying header costs what the file holds.
    out = np.empty(claimed, np.uint8)
    view, position = memoryview(out), -start
    for chunk in decompressed(path, codec, stream_start):
        low, high = max(position, 0), min(position + len(chunk), claimed)
        if low < high:
            view[low:high] = chunk[low - position : high - position]
        position += len(chunk)
        if position > claimed + trailing:
            break
    refuse_length(path, position, claimed, trailing)
    return out.view(dtype)


def refuse_length(path: Path, held: int, claimed: int, trailing: int) -> None:
    """Raise unless a stream holds the voxels that its header claims, and little more."""
    if held > claimed + trailing:
        raise BrokenVolume(path, f"stream holds more than the {claimed} bytes of its header")
    if held < claimed:
        raise BrokenVolume(path, f"header claims {claimed} bytes but the stream holds {held}")


def length_in_trailer(path: Path) -> int:
    """Return what the end of a gzip stream says of its length, in bytes modulo 2^32."""
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def head(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file, decompressed where it is a gzip stream."""
    with open(path, "rb") as file:
        magic = file.read(2)
    if magic != b"\x1f\x8b":
        with open(path, "rb") as file:
            return file.read(num_bytes)
    with gzip.open(path) as file:
        return file.read(num_bytes)


def codec_of(path: Path) -> str | None:
    """Return gzip where the file's name says so and its first bytes agree, else None."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if path.suffix.lower() in (".gz", ".mgz") and not is_gzip:
        raise BrokenVolume(path, "is not a gzip stream")
    return "gzip" if is_gzip else None


def to_channels_first(path: Path, data: np.ndarray, volumes_4d: Volumes4D) -> np.ndarray:
    """(X, Y[, Z[, T or C ...]]) -> (C, X, Y, Z); more than one volume needs the user's leave."""
    shape = data.shape + (1,) * (3 - data.ndim)
    data = data.reshape(*shape[:3], -1, order="F")  # (X, Y, Z, T)
    if data.shape[3] > 1 and volumes_4d == "error":
        size = "x".join(map(str, shape))
        raise BrokenVolume(path, f"is 4D ({size}): set volumes_4d to channels or first to allow it")
    if volumes_4d == "first":
        data = data[..., :1]
    return np.moveaxis(data, 3, 0)  # (C, X, Y, Z)


# --------------------------------------------------------------------------------------------------
# Readers: path, leave for 4D -> Volume.


def read_nifti(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """NIfTI-1 and NIfTI-2, single file or .hdr/.img pair."""
    import nibabel
    from nibabel.spatialimages import HeaderDataError

    codec_of(path)
    block = head(path, 540)
    size = int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")
    if 348 in size and block[344:348] in (b"n+1\0", b"ni1\0"):
        cls, magic, length = nibabel.Nifti1Header, block[344:347], 348
    elif 540 in size and block[4:7] in (b"n+2", b"ni2"):
        cls, magic, length = nibabel.Nifti2Header, block[4:7], 540
    elif 348 in size and path.suffix.lower() == ".hdr":
        raise BrokenVolume(path, "is Analyze 7.5, which has no orientation: convert it to NIfTI")
    else:
        raise BrokenVolume(path, "has no NIfTI header")
    if len(block) < length:
        raise BrokenVolume(path, "truncated header")
    header = cls(block[:length], endianness=None, check=False)
    try:
        dtype, shape = header.get_data_dtype(), header.get_data_shape()
        affine, (scale, offset) = header.get_best_affine(), header.get_slope_inter()
    except HeaderDataError as error:
        raise BrokenVolume(path, f"bad header ({error})") from error
    if not shape or len(shape) > 7 or min(shape) < 1:
        raise BrokenVolume(path, f"header claims the shape {shape}")
    start = int(header["vox_offset"])
    voxels = path
    if magic.startswith(b"ni"):
        voxels = sibling(path, (".img", ".img.gz"))
    elif start < length:
        raise BrokenVolume(path, f"header puts the voxels at byte {start}, inside itself")
    require_number(path, dtype)
    raw = read_voxels(voxels, dtype, num_items(shape), start=start, codec=codec_of(voxels))
    data = to_channels_first(path, raw.reshape(shape, order="F"), volumes_4d)
    # The low three bits of xyzt_units: 1 meter, 2 millimeter, 3 micrometer.
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)
    return Volume(data, affine, 1.0 if scale is None else scale, 0.0 if offset is None else offset)


def read_mgh(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """FreeSurfer .mgh and .mgz."""
    from nibabel.freesurfer.mghformat import MGHHeader

    block = head(path, 284)
    if len(block) < 284 or int.from_bytes(block[:4], "big") != 1:
        raise BrokenVolume(path, "has no MGH header")
    header = MGHHeader(block, check=False)
    shape, dtype = tuple(int(n) for n in header["dims"]), header.get_data_dtype()
    raw = read_voxels(
        path, dtype, num_items(shape), start=284, codec=codec_of(path), trailing=2**22
    )
    data = to_channels_first(path, raw.reshape(shape, order="F"), volumes_4d)
    return Volume(data, header.get_affine())


NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}


def read_nrrd(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """NRRD, attached (.nrrd) or detached (.nhdr); raw, gzip or bzip2."""
    fields, start = nrrd_fields(path)
    shape = tuple(int(n) for n in fields["sizes"].split())
    dtype = np.dtype(NRRD_TYPES.get(fields["type"].lower(), "V1"))
    dtype = dtype.newbyteorder(">" if fields.get("endian") == "big" else "<")
    require_number(path, dtype, fields["type"])
    encoding = fields["encoding"].lower()
    codec = {"raw": None, "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
    if encoding not in codec:
        raise BrokenVolume(path, f"encoding {encoding} is not supported: use raw or gzip")
    voxels, stream_start = path, start
    if "data file" in fields:
        voxels, stream_start = data_file(path, fields["data file"]), 0
    skip = int(fields.get("byte skip", 0))
    if skip == -1:  # the voxels are the end of the file
        stream_start = os.path.getsize(voxels) - num_items(shape) * dtype.itemsize
        skip = 0
    if int(fields.get("line skip", 0)):
        raise BrokenVolume(path, "line skip is not supported")
    where = (
        {"start": stream_start + skip}
        if codec[encoding] is None
        else {"start": skip, "stream_start": stream_start}
    )
    raw = read_voxels(voxels, dtype, num_items(shape), codec=codec[encoding], **where)
    affine, spatial = nrrd_affine(path, fields, len(shape))
    data = raw.reshape(shape, order="F")
    others = [axis for axis in range(data.ndim) if axis not in spatial]
    return Volume(to_channels_first(path, data.transpose(*spatial, *others), volumes_4d), affine)


def nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """Return the header's fields, keys in lower case, and the byte at which it ends."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        if not file.read(4) == b"NRRD":
            raise BrokenVolume(path, "has no NRRD header")
        file.readline(64)
        for _ in range(4096):
            line = file.readline(2**16)
            text = line.decode("utf-8", "replace").strip()
            if not text:  # the blank line before the voxels, or the end of a detached header
                break
            if not text.startswith("#") and ":=" not in text and ":" in text:
                key, value = text.split(":", 1)
                fields[key.strip().lower().replace("datafile", "data file")] = value.strip()
        start = file.tell()
    missing = [key for key in ("sizes", "type", "encoding") if key not in fields]
    if missing:
        raise BrokenVolume(path, f"NRRD header lacks {', '.join(missing)}")
    return fields, start


def nrrd_affine(path: Path, fields: dict[str, str], ndim: int) -> tuple[np.ndarray, list[int]]:
    """Return the affine in RAS+ millimeters and the array axes that are spatial."""
    kinds = fields.get("kinds", "").lower().split()
    if any("color" in kind for kind in kinds):
        raise BrokenVolume(path, "holds colors (RGB): convert it to one intensity per voxel")
    affine = np.eye(4)
    if "space directions" in fields:
        vectors = fields["space directions"].replace(") (", ")|(").replace("none", "|none|")
        vectors = [v.strip() for v in vectors.split("|") if v.strip()]
        spatial = [i for i, vector in enumerate(vectors) if vector != "none"]
        for column, axis in enumerate(spatial[:3]):
            values = [float(x) for x in vectors[axis].strip("()").split(",")]
            affine[: len(values), column] = values
        origin = fields.get("space origin", "(0,0,0)").strip("() ").split(",")
        affine[: len(origin), 3] = [float(x) for x in origin]
    else:
        not_spatial = ("vector", "list", "point", "covariant", "scalar", "3-vector", "4-vector")
        spatial = [
            i for i in range(ndim) if i >= len(kinds) or not kinds[i].startswith(not_spatial)
        ]
        spacings = [float(s) for s in fields.get("spacings", "").split()]
        for column, axis in enumerate(spatial[:3]):
            if axis < len(spacings) and np.isfinite(spacings[axis]):
                affine[column, column] = spacings[axis]
    space = fields.get("space", "").lower()
    flips = {
        "left-posterior-superior": (-1, -1), "lps": (-1, -1),
        "left-anterior-superior": (-1, 1), "las": (-1, 1),
    }  # fmt: skip
    if space in flips:
        affine = np.diag([*flips[space], 1.0, 1.0]) @ affine
    return affine, spatial[:3] + spatial[3:]


META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


def read_meta(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """MetaImage, one file (.mha) or header and voxels apart (.mhd)."""
    fields, start = meta_fields(path)
    shape = tuple(int(n) for n in fields["DimSize"].split())
    num_channels = int(fields.get("ElementNumberOfChannels", 1))
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    dtype = np.dtype(META_TYPES.get(fields["ElementType"], "V1"))
    dtype = dtype.newbyteorder(">" if big.lower() == "true" else "<")
    require_number(path, dtype, fields["ElementType"])
    count = num_items(shape) * num_channels
    voxels = path
    if fields["ElementDataFile"] != "LOCAL":
        voxels, start = data_file(path, fields["ElementDataFile"]), 0
    skip = int(fields.get("HeaderSize", 0))
    if skip == -1:
        start = os.path.getsize(voxels) - count * dtype.itemsize
    elif skip > 0 and voxels != path:
        start = skip
    if fields.get("CompressedData", "False").lower() == "true":
        raw = read_voxels(voxels, dtype, count, codec="zlib", stream_start=start)
    else:
        raw = read_voxels(voxels, dtype, count, start=start)
    data = raw.reshape(num_channels, *shape, order="F")  # the channel runs fastest
    data = to_channels_first(path, np.moveaxis(data, 0, -1), volumes_4d)
    return Volume(data, meta_affine(fields, len(shape)))


def meta_fields(path: Path) -> tuple[dict[str, str], int]:
    """Return the header's fields and the byte at which it ends."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        for _ in range(4096):
            line = file.readline(2**16).decode("utf-8", "replace")
            if "=" not in line:
                break
            key, value = (part.strip() for part in line.split("=", 1))
            fields[key] = value
            if key == "ElementDataFile":
                break
        start = file.tell()
    missing = [key for key in ("DimSize", "ElementType", "ElementDataFile") if key not in fields]
    if missing:
        raise BrokenVolume(path, f"MetaImage header lacks {', '.join(missing)}")
    return fields, start


def meta_affine(fields: dict[str, str], ndim: int) -> np.ndarray:
    """MetaImage counts towards left and posterior; row i of its matrix is the step of axis i."""

    def numbers(*keys: str, default: np.ndarray) -> np.ndarray:
        text = next((fields[key] for key in keys if key in fields), None)
        return default if text is None else np.array([float(x) for x in text.split()])

    axes = min(ndim, 3)
    matrix = numbers("TransformMatrix", "Rotation", "Orientation", default=np.eye(ndim))
    spacing = numbers("ElementSpacing", "ElementSize", default=np.ones(ndim))
    origin = numbers("Offset", "Position", "Origin", default=np.zeros(ndim))
    affine = np.eye(4)
    affine[:axes, :axes] = (matrix.reshape(ndim, ndim).T * spacing)[:axes, :axes]
    affine[:axes, 3] = origin[:axes]
    return LPS_TO_RAS @ affine


def read_npy(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """A .npy array (X, Y[, Z[, C]]), 1 mm voxels; pickled objects are never loaded."""
    with open(path, "rb") as file:
        shape, fortran, dtype = npy_header(path, file)
        start = file.tell()
    require_number(path, dtype)
    raw = read_voxels(path, dtype, num_items(shape), start=start)
    data = raw.reshape(shape, order="F" if fortran else "C")
    return Volume(to_channels_first(path, data, volumes_4d))


def npy_header(path: Path, file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse the header of a .npy stream without loading anything."""
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(file)
    except ValueError as error:
        raise BrokenVolume(path, f"has no .npy header ({error})") from error


def read_npz(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
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
        affine = np.eye(4)
        if "affine" in names:
            affine = npz_array(path, archive, names["affine"]).astype(float)
        for key in ("spacing_mm", "spacing"):
            if key in names:
                affine[:3, :3] = np.diag(npz_array(path, archive, names[key]).astype(float))
    return Volume(to_channels_first(path, data, volumes_4d), affine)


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


def read_tiff(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
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
    data = data.transpose(*order, *(i for i in range(data.ndim) if i not in order))
    leave = "channels" if "S" in axes and data.shape[2] == 1 else volumes_4d  # a color picture
    return Volume(to_channels_first(path, data, leave), np.diag([*spacing, 1.0]))


def tiff_spacing_mm(tiff) -> tuple[float, float, float]:
    """Voxel size in millimeters from ImageJ (resolution tags, spacing) or OME; 1 mm if unknown."""
    units = {"micron": 1e-3, "um": 1e-3, "\u00b5m": 1e-3, "mm": 1.0, "cm": 10.0, "nm": 1e-6}
    if tiff.is_ome:
        from xml.etree import ElementTree

        elements = ElementTree.fromstring(tiff.ome_metadata).iter()
        pixels = next(element for element in elements if element.tag.endswith("Pixels")).attrib
        # OME counts in micrometers where it names no unit.
        return tuple(
            float(pixels[f"PhysicalSize{axis}"])
            * units.get(pixels.get(f"PhysicalSize{axis}Unit", "um"), 1.0)
            if f"PhysicalSize{axis}" in pixels
            else 1.0
            for axis in "XYZ"
        )
    if tiff.is_imagej:
        metadata, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
        unit = units.get(metadata.get("unit", "").encode().decode("unicode_escape"))
        if unit is not None and "XResolution" in tags:
            per_unit = [tags[name].value for name in ("XResolution", "YResolution")]
            x, y = (float(d) / float(n) * unit if n else 1.0 for n, d in per_unit)
            return x, y, float(metadata.get("spacing", 1.0)) * unit
    return 1.0, 1.0, 1.0


def read_picture(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """PNG or JPEG -> (C, X, Y, 1), X to the right and Y down; colors become channels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max(LARGE, os.path.getsize(path) * MAX_EXPANSION):
                raise BrokenVolume(path, f"header claims {width} x {height} pixels")
            if image.mode == "P":
                image = image.convert("RGB")
            data = np.asarray(image)  # (Y, X) or (Y, X, C)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise BrokenVolume(path, f"damaged picture ({error})") from error
    if data.ndim == 2:
        data = data[..., None]
    return Volume(np.ascontiguousarray(data.transpose(2, 1, 0))[..., None])  # (C, X, Y, 1)


def read_dicom(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """A folder that holds one DICOM series, or a single multi-frame file; see `dicom_slices`."""
    import SimpleITK as sitk

    files = dicom_slices(path) if path.is_dir() else [str(path)]
    try:
        image = sitk.ReadImage(files if len(files) > 1 else files[0])
    except RuntimeError as error:
        raise BrokenVolume(path, f"DICOM cannot be decoded ({str(error)[-200:]})") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise BrokenVolume(path, "holds colors (RGB): convert it to one intensity per voxel")
    data = sitk.GetArrayFromImage(image)  # (Z, Y, X)
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(to_channels_first(path, data.T, volumes_4d), LPS_TO_RAS @ affine)


def read_folder(path: Path, volumes_4d: Volumes4D = "error") -> Volume:
    """A folder with one DICOM series, or with the slices of a stack as TIFF, PNG or JPEG."""
    kinds = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    pictures = [file for file in files if volume_suffix(file) in kinds]
    if not pictures or len(pictures) < len(files) / 2:
        return read_dicom(path, volumes_4d)
    # slice_2 comes before slice_10.
    pictures.sort(
        key=lambda file: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", file.name)]
    )
    slices = [read_volume(file, volumes_4d) for file in pictures]
    first = slices[0]
    for file, one in zip(pictures, slices, strict=True):
        if one.data.shape != first.data.shape or one.data.dtype != first.data.dtype:
            raise BrokenVolume(file, f"differs from {pictures[0].name} in size or dtype")
        if one.data.shape[3] > 1 or one.data.shape[0] > 1:
            raise BrokenVolume(file, "is not a gray slice, so the folder is not a stack")
    return Volume(np.concatenate([one.data for one in slices], axis=3), first.affine)


def dicom_slices(folder: Path) -> list[str]:
    """Sort the files of a series by position; a mixed, gappy or repeated series is an error."""
    import SimpleITK as sitk

    slices, kinds = [], set()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or not is_dicom(file):
            continue
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise BrokenVolume(file, f"damaged DICOM file ({str(error)[-120:]})") from error
        tags = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
        kinds.add((tags.get("0020|000e"), reader.GetSize()[:2], tags.get("0020|0037")))
        direction = np.array(reader.GetDirection()).reshape(3, 3)
        slices.append((float(direction[:, 2] @ np.array(reader.GetOrigin())), str(file)))
    if not slices:
        raise BrokenVolume(folder, "holds no DICOM files")
    if len(kinds) > 1:
        series = len({kind[0] for kind in kinds})
        reason = f"mixes {series} series" if series > 1 else "mixes sizes or orientations"
        raise BrokenVolume(folder, f"{reason}: put each series in its own folder")
    slices.sort()
    steps = np.diff([position for position, _ in slices])
    if len(steps) and steps.min() < 1e-3:
        raise BrokenVolume(folder, "two slices lie at the same position")
    if len(steps) and steps.max() > 1.01 * np.median(steps) + 1e-3:
        at = int(np.argmax(steps))
        raise BrokenVolume(
            folder,
            f"gap of {steps[at]:.4g} mm after {Path(slices[at][1]).name} "
            f"(slices are {np.median(steps):.4g} mm apart): slices are missing",
        )
    return [file for _, file in slices]


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's magic word at byte 128."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


READERS: dict[str, Callable[[Path, Volumes4D], Volume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".hdr": read_nifti,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_meta,
    ".mhd": read_meta,
    ".mgz": read_mgh,
    ".mgh.gz": read_mgh,
    ".mgh": read_mgh,
    ".npy": read_npy,
    ".npz": read_npz,
    ".tif": read_tiff,
    ".tiff": read_tiff,
    ".png": read_picture,
    ".jpg": read_picture,
    ".jpeg": read_picture,
    ".dcm": read_dicom,
}


def volume_suffix(path: Path | str) -> str | None:
    """Return the first suffix of `READERS` that the name ends with, None if there is none."""
    name = Path(path).name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_volume(path: Path | str, volumes_4d: Volumes4D = "error") -> Volume:
    """Read any supported file, or a folder with a DICOM series or a stack of pictures.

    Args:
        path: The file; its suffix decides the reader.
        volumes_4d: What to do with 4D files: error, channels (each volume a channel), or first.

    Returns:
        The volume as stored, (C, X, Y, Z) in the file's own dtype, with its affine.

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
        volume = reader(path, volumes_4d)
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
    return volume


def check_file(path: Path) -> str:
    """Return the suffix that decides the reader; raise for what is not a readable file.

    A FIFO would block for ever, so the kind of the file is asked before it is opened.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = "dangling link" if path.is_symlink() else error.strerror
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
        raise BrokenVolume(path, error.strerror) from error
    if not os.path.getsize(path):
        raise BrokenVolume(path, "is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise BrokenVolume(path, "is a Git LFS pointer: run `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BrokenVolume(path, "is a web page: the download failed")
    return suffix


def require_number(path: Path, dtype: np.dtype, name: str = "") -> None:
    """Raise unless one voxel is one real number that numpy computes with."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise BrokenVolume(
            path, f"voxels are {name or dtype} (RGB, complex or structured): convert to one number"
        )


def num_items(shape: tuple[int, ...]) -> int:
    """Product in Python integers: a lying header must not overflow."""
    count = 1
    for n in shape:
        count *= int(n)
    return count


def sibling(path: Path, suffixes: tuple[str, ...]) -> Path:
    """Return the file beside `path` that differs only in its suffix, whatever its case."""
    for other in path.parent.iterdir():
        if other.name.lower() in [(path.stem + suffix).lower() for suffix in suffixes]:
            return other
    raise BrokenVolume(path, f"lacks {path.stem}{suffixes[0]} beside it")


def data_file(path: Path, name: str) -> Path:
    """Return the file that a detached header names; lists and patterns are not supported."""
    if name.upper().startswith("LIST") or "%" in name:
        raise BrokenVolume(path, "voxels are spread over several files: convert to one file")
    target = path.parent / name
    if not target.is_file():
        raise BrokenVolume(path, f"names {name}, which does not exist")
    return target


def ras_axes(affine: np.ndarray) -> tuple[list[int], list[bool]]:
    """Return the source axis for each of X, Y, Z and whether it is then flipped."""
    from nibabel.orientations import io_orientation

    orientation = io_orientation(affine)
    axes = [int(np.flatnonzero(orientation[:, 0] == target)[0]) for target in range(3)]
    return axes, [bool(orientation[axis, 1] < 0) for axis in axes]


# --------------------------------------------------------------------------------------------------


def write_volume(path: Path | str, volume: Volume) -> None:
    """Write NIfTI (.nii or .nii.gz) atomically; the same volume gives the same bytes.

    Args:
        path: Target; folders on the way are made.
        volume: Stored as it is: dtype, affine (RAS+ millimeters), scale and offset.
    """
    import nibabel

    path = Path(path)
    if volume_suffix(path) not in (".nii", ".nii.gz"):
        raise ValueError(f"{path}: volumes are written as .nii or .nii.gz")
    data = volume.data
    if data.dtype.kind == "b" or data.dtype == np.float16:
        data = data.astype(np.uint8 if data.dtype.kind == "b" else np.float32)
    data = data.astype(data.dtype.newbyteorder("<"), copy=False)
    channels, *shape = data.shape
    cls = nibabel.Nifti1Header if max(shape) < 2**15 else nibabel.Nifti2Header
    header = cls(endianness="<")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(shape if channels == 1 else (*shape, channels))
    header.set_qform(volume.affine, code=1, strip_shears=True)
    header.set_sform(volume.affine, code=1)
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = volume.scale, volume.offset
    header["magic"] = header.single_magic
    block = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    with whole_file(path) as temporary, open(temporary, "wb") as raw:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", compresslevel=3, fileobj=raw, mtime=0) as file:
                file.write(block + np.moveaxis(data, 0, -1).tobytes("F"))
        else:
            raw.write(block + np.moveaxis(data, 0, -1).tobytes("F"))
