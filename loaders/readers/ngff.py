"""What a store says of an image: the names of its axes, its levels and their voxel sizes.

OME-Zarr 0.4 and 0.5 (https://ngff.openmicroscopy.org), plain zarr arrays, HDF5 datasets, TIFF.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.readers import remote
from loaders.readers.arrays import (
    Place,
    hdf5_dataset,
    read_keys,
    split_dataset,
    tiles_of,
    version_of_file,
)
from loaders.readers.tiff import is_tiff, others
from loaders.readers.units import millimeters, shown_unit, spacing_mm
from loaders.readers.volume import RGB, BrokenVolume, Look, is_singular, url_of
from loaders.readers.voxels import LFS, POINTER

# Axes of arrays that name none, as C order has them.
UNNAMED = {2: "YX", 3: "ZYX", 4: "CZYX", 5: "TCZYX"}
TIFF_AXES = {"S": "C", "I": "Z", "Q": "Z"}  # samples of a pixel, and what names none
OLD_AXES = "tczyx"  # of OME-Zarr before 0.3
NODES = ("zarr.json", ".zarray")  # what tells of an array
UNITS = {
    "micrometer": 1e-3, "micron": 1e-3, "nanometer": 1e-6, "millimeter": 1.0,
    "centimeter": 10.0, "meter": 1e3, "angstrom": 1e-7,
}  # fmt: skip
# Where an axis runs (RFC 4 of OME-Zarr): axis of RAS+ and sign.
DIRECTIONS = {
    "left-to-right": (0, 1), "right-to-left": (0, -1),
    "posterior-to-anterior": (1, 1), "anterior-to-posterior": (1, -1),
    "inferior-to-superior": (2, 1), "superior-to-inferior": (2, -1),
}  # fmt: skip
Json = Mapping[str, object]


@dataclass(frozen=True)
class Level:
    """One of the sizes in which an image is stored.

    Args:
        place: Its array.
        affine: Index along X, Y, Z to millimeters, 4 x 4.
    """

    place: Place
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z."""
        x, y, z = (float(n) for n in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z


@dataclass(frozen=True)
class Image:
    """An image as its metadata describe it.

    Args:
        path: As the user named it.
        axes: A letter of TCXYZ for each axis of its arrays.
        levels: From the finest to the coarsest.
        look: How people see it.
        notes: What had to be assumed.
        version: Changes whenever the metadata do.
        alpha: Channels at the end that tell of opacity, which is no data.
        objects: Whether its voxels are numbers of objects, as OME's label images say of theirs.
    """

    path: Path
    axes: str
    levels: tuple[Level, ...]
    look: Look
    notes: tuple[str, ...]
    version: str
    alpha: int = 0
    objects: bool = False


def describe(path: Path) -> Image:
    """Read the metadata of a store; no voxel is read.

    Args:
        path: Folder `*.zarr` or an array or image in one, `file.h5:/dataset`, a TIFF, or a URL of
            such.
    """
    try:
        if split_dataset(path):
            return sized(describe_hdf5(path))
        return sized(describe_tiff(path) if is_tiff(path) else describe_zarr(path))
    except BrokenVolume:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if str(path) in str(error):  # an extra is missing
            raise
        reason = f"metadata are not understood ({type(error).__name__}: {error})"
        raise BrokenVolume(path, reason) from error


def sized(image: Image) -> Image:
    """Refuse an image whose voxels have no size."""
    for number, level in enumerate(image.levels):
        if not np.isfinite(level.affine).all() or is_singular(level.affine):
            raise BrokenVolume(
                image.path, f"voxel size or place of level {number} is 0 or no number"
            )
    return image


def describe_hdf5(path: Path) -> Image:
    """An HDF5 dataset: axes from its dimension labels, else ZYX.

    Voxels have the size of `element_size_um`, or that which Imaris tells.
    """
    file, name = split_dataset(path) or (path, "")
    dataset = hdf5_dataset(file, name)
    labels = [dimension.label for dimension in dataset.dims]
    axes, notes = letters(path, labels if all(labels) else None, dataset.ndim)
    sizes = dataset.attrs.get("element_size_um")  # of ilastik and BigDataViewer, in that order
    spatial = [name for name in axes if name in "XYZ"]
    image, channel = dataset.file.get("DataSetInfo/Image"), dataset.parent.attrs
    if image is not None and "ImageSizeX" in channel and axes == "ZYX":
        sizes, padded = of_imaris(path, channel, image.attrs, dataset.shape)
        notes = (*notes, *padded)
    if sizes is None or len(sizes) != len(spatial):
        known, unit = {}, "px"
        notes = (*notes, "tells no voxel size: taken as 1 mm")
    else:
        known, unit = {a: float(s) * 1e-3 for a, s in zip(spatial, sizes, strict=True)}, "um"
    where = url_of(file) or os.path.abspath(file)
    version = f"{where} {version_of_file(where)} {name}"
    affine = np.diag([*(known.get(axis, 1.0) for axis in "XYZ"), 1.0])
    level = Level(Place("hdf5", where, name), affine)
    return Image(path, axes, (level,), Look("picture", unit), notes, hashed([version]))


def of_imaris(
    path: Path, channel: Json, image: Json, shape: Sequence[int]
) -> tuple[list[float], tuple[str, ...]]:
    """Return voxel sizes along Z, Y, X in micrometers, and what is told of the voxels at the end.

    Imaris fills up its last chunks, and tells how many voxels are of the image.

    Args:
        path: The dataset.
        channel: Attributes of the group that it lies in.
        image: Those of `DataSetInfo/Image`.
        shape: Of the dataset.
    """

    def told(attributes: Json, name: str) -> str:
        return np.asarray(attributes[name]).tobytes().decode()  # a letter an item

    counts = [int(told(channel, f"ImageSize{axis}")) for axis in "ZYX"]
    ends = [[float(told(image, f"Ext{end}{axis}")) for end in ("Min", "Max")] for axis in (2, 1, 0)]
    unit = millimeters(path, told(image, "Unit") if "Unit" in image else "um", UNITS) or 1e-3
    sizes = [(b - a) / n * unit / 1e-3 for (a, b), n in zip(ends, counts, strict=True)]
    if counts == list(shape):
        return sizes, ()
    region = str([[0, n] for n in counts[::-1]])
    return sizes, (f"is filled up beyond its image: --data.region '{region}' takes that alone",)


def describe_tiff(path: Path) -> Image:
    """The first image of a TIFF: axes, sizes and channels from OME or ImageJ; colors are channels.

    A coarser level covers the same field of view as the finest.
    """
    where = url_of(path) or os.path.abspath(path)
    version = version_of_file(where)
    tiles = tiles_of(where, 0, version)
    named = [TIFF_AXES.get(axis, axis) for axis in tiles.axes]
    axes, _ = letters(path, named, len(named))
    about, finest = tiles.about, dict(zip(axes, tiles.shape, strict=True))
    spacing, notes = spacing_mm(about.sizes, finest.get("Z", 1))
    levels = []
    for number, shape in enumerate(tiles.levels):
        sizes = dict(zip(axes, shape, strict=True))
        factors = [finest.get(axis, 1) / sizes.get(axis, 1) for axis in "XYZ"]
        affine = np.diag([*np.multiply(spacing, factors), 1.0])
        levels.append(Level(Place("tiff", where, str(number)), affine))
    colored = "S" in tiles.axes and finest["C"] - about.alpha == 3
    look = Look("picture", about.sizes[2], RGB if colored else about.channels)
    notes = (*notes, *others(about.images))
    return Image(path, axes, tuple(levels), look, notes, hashed([where, version]), about.alpha)


def describe_zarr(path: Path) -> Image:
    """An OME-Zarr image, or a plain array."""
    where = (url_of(path) or str(path)).rstrip("/")
    files = read_keys(where, remote.METADATA)
    if not files:
        raise BrokenVolume(where, missing(path))
    attributes, is_array = parsed(where, files)
    # The cache outlives the folder that a command is called in.
    versions = [where if url_of(path) else os.path.abspath(where), marks(files)]
    if is_array:
        return plain(path, files, attributes, versions)
    held = attributes.get("ome", attributes)  # from version 0.5 on
    assert isinstance(held, dict)
    if "multiscales" not in held:
        there = [bool(read_keys(f"{where}/{n}", remote.METADATA)) for n in range(2)]
        if "bioformats2raw.layout" in held and there == [True, False]:
            return describe_zarr(path / "0")
        raise BrokenVolume(where, no_image(Path(where).name, held))
    image, channels = held["multiscales"][0], channels_of(held)
    told = image.get("axes", OLD_AXES)
    named = [axis if isinstance(axis, dict) else {"name": axis} for axis in told]
    axes, notes = letters(path, [str(axis["name"]) for axis in named], len(named))
    levels: list[Level] = []
    shapes, unsized = [], True
    if not image["datasets"]:
        raise BrokenVolume(where, "names no level (datasets of its multiscales)")
    for entry in image["datasets"]:
        name = inside(where, str(entry["path"]))
        array = read_keys(f"{where}/{name}", remote.METADATA)
        if not array.keys() & set(NODES):
            raise BrokenVolume(where, f"its level {name} is no array, or missing")
        versions.append(marks(array))
        steps = [*entry.get("coordinateTransformations", ())]
        steps += image.get("coordinateTransformations", ())
        scale, offset = scale_and_offset(steps, len(axes))
        shapes.append(json.loads(next(array[file][0] for file in NODES if file in array))["shape"])
        if not steps and len(shapes[-1]) == len(axes):  # all levels cover the same field of view
            scale = np.divide(shapes[0], shapes[-1])
        unsized = unsized and not steps
        units = [millimeters(path, str(axis.get("unit") or ""), UNITS) if letter in "XYZ" else None
                 for axis, letter in zip(named, axes, strict=True)]  # fmt: skip
        affine = affine_of(axes, scale, offset, units, named)
        driver = "zarr3" if "zarr.json" in array else "zarr"
        levels.append(Level(Place(driver, versions[0], name), affine))
    unit = next((u for u in units if u is not None), None)
    if unsized:
        notes = (*notes, "tells no voxel size: taken as 1 mm")
    elif unit is None:
        notes = (*notes, "names no unit of length: taken as mm")
    body = sum(direction(axis) is not None for axis in named) == 3
    look = Look("body" if body else "picture", shown_unit(unit), channels)
    alpha = int(len(channels) == 4 and channels[3][0].lower() == "alpha")
    objects = "image-label" in held
    return Image(path, axes, tuple(levels), look, notes, hashed(versions), alpha, objects)


def no_image(name: str, held: Json) -> str:
    """Say what a group is that is no image, and what to name instead."""
    labels = held.get("labels")
    if "plate" in held:
        return f"is a plate: name its fields, all by '{name}/*/*/[0-9]*'"
    if "well" in held:
        return f"is a well of a plate: name its fields, all by '{name}/[0-9]*'"
    if "bioformats2raw.layout" in held:
        return f"holds several images: name one, {name}/0, or all by '{name}/[0-9]*'"
    if isinstance(labels, list) and labels:
        return f"holds label images: name one, {name}/{labels[0]}"
    return "is a group without OME metadata: name an array or image in it"


def plain(
    path: Path,
    files: Mapping[str, tuple[bytes, str]],
    attributes: Json,
    versions: Sequence[str],
) -> Image:
    """A zarr array without OME metadata; the first of its versions is where it lies."""
    driver = "zarr3" if "zarr.json" in files else "zarr"
    array = json.loads(files["zarr.json" if driver == "zarr3" else ".zarray"][0])
    told = array.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS")
    names = [str(name) for name in told] if isinstance(told, list) and all(told) else None
    axes, notes = letters(path, names, len(array["shape"]))
    notes = (*notes, "tells no voxel size: taken as 1 mm")
    level = Level(Place(driver, versions[0]), np.eye(4))
    return Image(path, axes, (level,), Look("picture", "px"), notes, hashed(versions))


def parsed(where: str, files: Mapping[str, tuple[bytes, str]]) -> tuple[Json, bool]:
    """Return the attributes of a node of a zarr hierarchy, and whether it is an array."""
    try:
        known = {name: json.loads(content) for name, (content, _) in files.items()}
    except ValueError as error:
        if any(content.startswith(LFS) for content, _ in files.values()):
            raise BrokenVolume(where, POINTER) from error
        raise BrokenVolume(where, f"metadata are not JSON ({error})") from error
    if "zarr.json" in known:
        node = known["zarr.json"]
        return node.get("attributes", {}), node["node_type"] == "array"
    return known.get(".zattrs", {}), ".zarray" in known


def missing(path: Path) -> str:
    """Say why a store has no metadata."""
    if url_of(path) is None and not os.path.lexists(path):
        return "no such store"
    return "holds no zarr metadata (zarr.json, .zattrs or .zarray)"


def inside(where: str, name: str) -> str:
    """Return the path of a level below its store, which it must not leave."""
    name = os.path.normpath(name)
    root = os.path.realpath(where)
    out = name.startswith("..") or os.path.isabs(name)
    if not out and url_of(where) is None:
        out = os.path.commonpath([root, os.path.realpath(os.path.join(where, name))]) != root
    if out:
        raise BrokenVolume(where, f"its level {name} leads out of the store")
    return "" if name == "." else name


def letters(path: Path, names: Sequence[str] | None, ndim: int) -> tuple[str, tuple[str, ...]]:
    """Return a letter for each axis, and a note where they had to be assumed."""
    if names is None:
        if ndim not in UNNAMED:
            raise BrokenVolume(path, f"has {ndim} axes without names: 2 to 5 are understood")
        return UNNAMED[ndim], (f"names no axes: taken as {UNNAMED[ndim]}",)
    axes = "".join(name[0].upper() for name in names)
    if len(axes) != ndim or len(set(axes)) < ndim or not set("XY") <= set(axes) <= set("TCXYZ"):
        raise BrokenVolume(path, f"axes {', '.join(names)} are not understood: t, c, z, y, x are")
    return axes, ()


def scale_and_offset(steps: Sequence[Json], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `coordinateTransformations` come to, one after the other."""
    scale, offset = np.ones(count), np.zeros(count)
    for step in steps:
        if step["type"] == "scale":
            factor = np.array(step["scale"], float)
            scale, offset = scale * factor, offset * factor
        elif step["type"] == "translation":
            offset = offset + np.array(step["translation"], float)
        elif step["type"] != "identity":
            raise ValueError(f"transformation {step['type']}")
    return scale, offset


def direction(axis: Json) -> tuple[int, int] | None:
    """Where an axis runs in a body, if it says so."""
    told = axis.get("orientation")
    value = told.get("value") if isinstance(told, dict) else told
    return DIRECTIONS.get(str(value))


def affine_of(
    axes: str,
    scale: np.ndarray,
    offset: np.ndarray,
    units: Sequence[float | None],
    named: Sequence[Json],
) -> np.ndarray:
    """Return index along X, Y, Z to millimeters; RAS+ where the axes say how they run."""
    where = {letter: direction(axis) for letter, axis in zip(axes, named, strict=True)}
    body = sorted(found[0] for found in where.values() if found) == [0, 1, 2]
    affine = np.eye(4)
    for column, letter in enumerate("XYZ"):
        if letter not in axes:
            continue
        at = axes.index(letter)
        row, sign = (body and where[letter]) or (column, 1)
        unit = units[at] or 1.0
        affine[:3, column] = 0
        affine[row, column] = sign * scale[at] * unit
        affine[row, 3] = sign * offset[at] * unit
    return affine


def channels_of(held: Json) -> tuple[tuple[str, str], ...]:
    """Name and color of each channel, as the viewer's part of the metadata tells them."""
    omero = held.get("omero")
    told = omero.get("channels", []) if isinstance(omero, dict) else []
    return tuple((str(one.get("label", "")), str(one.get("color", "")).lower()) for one in told)


def marks(files: Mapping[str, tuple[bytes, str]]) -> str:
    """Names, content and versions of files, hashed."""
    return hashed([f"{name} {mark} {content!r}" for name, (content, mark) in sorted(files.items())])


def hashed(parts: Sequence[str]) -> str:
    """Hash texts."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
