"""OME-Zarr 0.5 out of volumes, shard by shard; its metadata are held to the standard's schema."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.readers.arrays import ERRORS, key_value_store, reason, require_tensorstore
from loaders.readers.ngff import DIRECTIONS
from loaders.readers.nifti import ras_axes
from loaders.readers.volume import UNIT_MM, Boxes, BrokenVolume
from loaders.whole import whole_file

VERSION = "0.5"
CHUNK, FLAT = 64, 512  # voxels along an axis, of a volume and of one that is one voxel thick
SHARD = 4  # chunks along an axis
OME_UNITS = {"mm": "millimeter", "um": "micrometer", "nm": "nanometer"}
OBLIQUE = 1e-3  # parts of an axis that may point another way
ROWS = 32  # of a coarser level that are computed at a time

Box = tuple[slice, ...]


class Pending(Protocol):
    """What a read or write comes to."""

    def result(self) -> np.ndarray:
        """Wait for it."""


class Array(Protocol):
    """An array of tensorstore, or a box of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its axes c, z, y, x."""

    def __getitem__(self, box: Box, /) -> Array: ...

    def read(self) -> Pending:
        """Read all of it."""

    def write(self, values: np.ndarray, /) -> Pending:
        """Write all of it."""


def write_ome_zarr(path: Path, volume: Boxes) -> None:
    """Write a folder `*.zarr`: axes c, z, y, x in levels, each half the size of the one before.

    A voxel of a level is the mean of the two along each axis that is longer than a chunk. Of bodies
    it is told how their axes run (RFC 4); an oblique one loses its angle, with a warning.

    Args:
        path: The folder, which appears whole or not at all.
        volume: Whole shards of it are read, one at a time.

    Raises:
        BrokenVolume: The disk refuses it.
    """
    scale, offset, directions = placed(path, volume)
    factors = factors_of(volume.shape)
    steps = [
        [
            {"type": "scale", "scale": [1.0, *(scale * factor)[::-1].tolist()]},
            {"type": "translation",
             "translation": [0.0, *(offset + (factor - 1) / 2 * scale)[::-1].tolist()]},
        ]
        for factor in factors
    ]  # fmt: skip
    axes: list[dict[str, object]] = [{"name": "c", "type": "channel"}]
    for name, told in zip("zyx", directions[::-1], strict=True):
        unit = {"unit": OME_UNITS[volume.look.unit]} if volume.look.unit in OME_UNITS else {}
        turned = {"orientation": {"type": "anatomical", "value": told}} if told else {}
        axes.append({"name": name, "type": "space", **unit, **turned})
    levels = [{"path": str(n), "coordinateTransformations": one} for n, one in enumerate(steps)]
    image = {"name": path.name.partition(".")[0], "axes": axes, "datasets": levels}
    held: dict[str, object] = {"version": VERSION, "multiscales": [image]}
    if any(any(channel) for channel in volume.look.channels):
        held["omero"] = {"channels": [
            {"label": name, "active": True} | ({"color": color.upper()} if color else {})
            for name, color in volume.look.channels
        ]}  # fmt: skip
    check_schema(path, {"ome": held})
    with whole_file(path) as temporary:
        level = create(path, temporary / "0", volume.shape, volume.dtype)
        for box in boxes_of(level):
            put(path, level, box, volume[inverted(box)].transpose(0, 3, 2, 1))
        for number, (finer, coarser) in enumerate(itertools.pairwise(factors), start=1):
            factor = (coarser // finer)[::-1]
            level = halved(path, temporary / str(number), level, factor, volume.dtype)
        node = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": held}}
        (temporary / "zarr.json").write_text(json.dumps(node, indent=1), encoding="utf-8")


def placed(path: Path, volume: Boxes) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return scale and offset along X, Y, Z in the volume's unit, and how its axes run.

    The last are empty where the volume does not lie in a body.
    """
    affine, unit = volume.affine, UNIT_MM[volume.look.unit]
    scale = np.linalg.norm(affine[:3, :3], axis=0)
    axes, flips = ras_axes(affine)  # for each axis of RAS+
    rows = [axes.index(column) for column in range(3)]
    signs = np.array([-1.0 if flips[row] else 1.0 for row in rows])
    straight = np.abs(affine[rows, range(3)]) / scale
    if (straight < 1 - OBLIQUE).any():
        warnings.warn(f"{path}: OME-Zarr {VERSION} knows no oblique axes: the angle is lost")
    names = {where: name for name, where in DIRECTIONS.items()}
    told = [names[row, int(sign)] for row, sign in zip(rows, signs, strict=True)]
    upright = rows == [0, 1, 2] and (signs > 0).all()
    directions = [""] * 3 if upright and volume.look.space != "body" else told
    return scale / unit, signs * affine[rows, 3] / unit, directions


def factors_of(shape: Sequence[int]) -> list[np.ndarray]:
    """Return voxels of the volume along X, Y, Z that a voxel of each level stands for."""
    sizes, factors = np.array(shape[1:]), [np.ones(3, int)]
    while (long := sizes > chunk_of(shape)).any():
        factors.append(factors[-1] * (1 + long))
        sizes = -(-sizes // (1 + long))
    return factors


def chunk_of(shape: Sequence[int]) -> int:
    """Return voxels of a chunk along each axis that is as long."""
    return FLAT if min(shape[1:]) == 1 else CHUNK


def grids(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return voxels of a chunk and of a shard along each spatial axis, whatever their order."""
    chunk = [min(chunk_of([1, *sizes]), n) for n in sizes]
    return chunk, [c * min(SHARD, -(-n // c)) for c, n in zip(chunk, sizes, strict=True)]


def create(path: Path, where: Path, shape: Sequence[int], dtype: np.dtype) -> Array:
    """Make an array (c, z, y, x) for a volume (C, X, Y, Z), sharded, all zeros."""
    ts = require_tensorstore(str(path))
    count, *sizes = shape
    chunk, shard = grids(sizes[::-1])
    packed = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": dtype.itemsize}
    inner = [{"name": "bytes", "configuration": {"endian": "little"}},
             {"name": "blosc", "configuration": packed}]  # fmt: skip
    sharding = {"chunk_shape": [1, *chunk], "codecs": inner}
    metadata = {
        "shape": [count, *sizes[::-1]],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list("czyx"),
    }
    spec = {"driver": "zarr3", "kvstore": key_value_store(str(where)), "metadata": metadata}
    try:
        return ts.open(spec, create=True).result()
    except ERRORS as error:
        raise BrokenVolume(path, f"cannot be written: {reason(error)}") from error


def put(path: Path, array: Array, box: Box, values: np.ndarray) -> None:
    """Write a box of an array."""
    try:
        array[box].write(np.ascontiguousarray(values)).result()
    except ERRORS as error:
        raise BrokenVolume(path, f"cannot be written: {reason(error)}") from error


def boxes_of(array: Array) -> Iterator[Box]:
    """Yield the shards of an array."""
    steps = [1, *grids(array.shape[1:])[1]]
    starts = [range(0, n, step) for n, step in zip(array.shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        ends = zip(corner, steps, array.shape, strict=True)
        yield tuple(slice(low, min(low + step, n)) for low, step, n in ends)


def inverted(box: Box) -> tuple[slice, slice, slice, slice]:
    """Return a box (c, z, y, x) as one of (C, X, Y, Z)."""
    c, z, y, x = box
    return c, x, y, z


def halved(path: Path, where: Path, fine: Array, factor: np.ndarray, dtype: np.dtype) -> Array:
    """Write the level below one: means over `factor` voxels along z, y, x."""
    count, *sizes = fine.shape
    smaller = [-(-n // f) for n, f in zip(sizes, factor.tolist(), strict=True)]
    coarse = create(path, where, (count, *smaller[::-1]), dtype)
    for box in boxes_of(coarse):
        values = np.empty([part.stop - part.start for part in box], dtype)
        channels, (first, *plane) = box[0], box[1:]
        for row in range(first.start, first.stop, ROWS):  # twice as large each way: in parts
            rows = slice(row, min(row + ROWS, first.stop))
            wanted = zip((rows, *plane), factor.tolist(), sizes, strict=True)
            above = tuple(slice(p.start * f, min(p.stop * f, n)) for p, f, n in wanted)
            inside = slice(rows.start - first.start, rows.stop - first.start)
            values[:, inside] = means(fine[(channels, *above)].read().result(), factor)
        put(path, coarse, box, values)
    return coarse


def means(data: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return means over `factor` voxels along z, y, x of (c, z, y, x); fewer at the far end."""
    lacking = [(0, -n % f) for n, f in zip(data.shape[1:], factor.tolist(), strict=True)]
    data = np.pad(data, [(0, 0), *lacking], mode="edge")
    kind = data.dtype
    for axis, f in enumerate(factor.tolist(), start=1):
        if f > 1:
            every = [(slice(None),) * axis + (slice(k, None, f),) for k in range(f)]
            data = np.asarray(np.mean([data[part] for part in every], axis=0, dtype=np.float32))
    return np.rint(data).astype(kind) if kind.kind in "iu" else data.astype(kind)


def check_schema(path: Path, attributes: dict[str, object]) -> None:
    """Hold metadata to the standard's schema; what breaks it is a fault of ours."""
    try:
        from ngff_zarr.validate import validate
    except ImportError as error:
        raise ValueError(f"{path}: writing zarr needs `pip install 'vae3d[zarr]'`") from error

    validate(attributes, version=VERSION, model="image")
