"""ITK's own formats: NRRD and MetaImage."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from loaders.readers.axes import to_channels_first
from loaders.readers.options import READING, Reading
from loaders.readers.units import millimeters, shown_unit
from loaders.readers.volume import LPS_TO_RAS, BrokenVolume, Look, Volume, num_items
from loaders.readers.voxels import read_voxels, require_number

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


def read_nrrd(path: Path, reading: Reading = READING) -> Volume:
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
    if codec[encoding] is None:  # the voxels themselves begin there
        skip, stream_start = stream_start + skip, 0
    where = {"start": skip, "stream_start": stream_start}
    raw = read_voxels(voxels, dtype, num_items(shape), codec=codec[encoding], **where)
    affine, spatial = nrrd_affine(path, fields, len(shape))
    data = raw.reshape(shape, order="F")
    others = [axis for axis in range(data.ndim) if axis not in spatial]
    data = to_channels_first(path, data.transpose(*spatial, *others), reading.volumes_4d)
    return Volume(data, affine, look=nrrd_look(path, fields, spatial))


def nrrd_look(path: Path, fields: dict[str, str], spatial: list[int]) -> Look:
    """Say whether a NRRD lies in a body, and its unit; what names no anatomy is a picture."""
    space = fields.get("space", "").lower()
    body = "superior" in space or space.split("-")[0] in ("ras", "las", "lps", "scanner")
    name = "space units" if "space directions" in fields else "units"
    known = "space directions" in fields or "spacings" in fields
    quoted = re.findall(r'"([^"]*)"', fields.get(name, ""))
    unit = millimeters(path, quoted[spatial[0]], {}) if len(quoted) > max(spatial) else None
    shown = shown_unit(unit) if unit else "mm" if body or known else "px"
    return Look("body" if body and len(spatial) > 2 else "picture", shown)


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
        text = fields["space directions"].replace(") (", ")|(").replace("none", "|none|")
        vectors = [v.strip() for v in text.split("|") if v.strip()]
        spatial = [i for i, vector in enumerate(vectors) if vector != "none"]
        for column, axis in enumerate(spatial[:3]):
            values = [float(x) for x in vectors[axis].strip("()").split(",")]
            affine[: len(values), column] = values
        origin = fields.get("space origin", "(0,0,0)").strip("() ").split(",")
        affine[: len(origin), 3] = [float(x) for x in origin]
        for row in range(len(origin)):
            affine[row] *= nrrd_unit(path, fields.get("space units", ""), row)
    else:
        not_spatial = ("vector", "list", "point", "covariant", "scalar", "3-vector", "4-vector")
        spatial = [
            i for i in range(ndim) if i >= len(kinds) or not kinds[i].startswith(not_spatial)
        ]
        spacings = [float(s) for s in fields.get("spacings", "").split()]
        for column, axis in enumerate(spatial[:3]):
            if axis < len(spacings) and np.isfinite(spacings[axis]):
                unit = nrrd_unit(path, fields.get("units", ""), axis)
                affine[column, column] = spacings[axis] * unit
    space = fields.get("space", "").lower()
    flips = {
        "left-posterior-superior": (-1, -1), "lps": (-1, -1),
        "left-anterior-superior": (-1, 1), "las": (-1, 1),
    }  # fmt: skip
    if space in flips:
        affine = np.diag([*flips[space], 1.0, 1.0]) @ affine
    return affine, spatial


def nrrd_unit(path: Path, text: str, axis: int) -> float:
    """Millimeters of a unit in a list of quoted names; 1 where it is not told."""
    names = dict(enumerate(re.findall(r'"([^"]*)"', text)))
    return millimeters(path, names.get(axis, ""), {}) or 1.0


META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


def read_meta(path: Path, reading: Reading = READING) -> Volume:
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
    data = to_channels_first(path, np.moveaxis(data, 0, -1), reading.volumes_4d)
    told = any(name in fields for name in ("ElementSpacing", "ElementSize"))
    look = Look("body" if len(shape) > 2 else "picture", "mm" if told else "px")
    return Volume(data, meta_affine(fields, len(shape)), look=look)


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


def data_file(path: Path, name: str) -> Path:
    """Return the file that a detached header names; lists and patterns are not supported."""
    if name.upper().startswith("LIST") or "%" in name:
        raise BrokenVolume(path, "voxels are spread over several files: convert to one file")
    target = path.parent / name
    if not target.is_file():
        raise BrokenVolume(path, f"names {name}, which does not exist")
    return target
