"""From the store's grid and normalized intensities back to those of a volume's file.

`undo` does it at once, `Undone` where it is sliced, and `write_undone` into a file of the format
that the volume came in, or another, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from loaders.preprocess import WHOLE, Resampled
from loaders.readers import (
    PICTURES,
    Boxes,
    Look,
    Volume,
    holds_dicom,
    is_store,
    num_items,
    shifted,
    volume_suffix,
    write_volume,
)
from loaders.texts import Record

Format = Literal["nifti", "ome-zarr", "tiff", "png"]
SUFFIXES: dict[str, str] = {
    "nifti": ".nii.gz", "ome-zarr": ".ome.zarr", "tiff": ".ome.tif", "png": ".png",
}  # fmt: skip
IN_TIFF = (".tif", ".tiff", ".lif", ".nd2", ".czi")
Box = tuple[slice, ...]


class Sliced(Protocol):
    """An array or tensor `(C, X, Y, Z)`, or what gives one where it is sliced."""

    @property
    def shape(self) -> Sequence[int]:
        """(C, X, Y, Z)."""

    def __getitem__(self, box: Box, /) -> np.ndarray | torch.Tensor: ...


def format_of(path: Path) -> Format:
    """Return the format in which a volume of a file is written: its own, where we write that.

    HDF5 becomes OME-Zarr, microscopes' own formats and folders of pictures TIFF, JPEG PNG; all else
    NIfTI.
    """
    suffix = volume_suffix(path)
    if suffix in IN_TIFF:
        return "tiff"
    if is_store(path):
        return "ome-zarr"
    if path.is_dir():
        return "nifti" if holds_dicom(path) else "tiff"
    return "png" if suffix in PICTURES else "nifti"


class Undone:
    """A volume `(C, X, Y, Z)` in its file's grid and intensities, computed where it is sliced.

    One that was resampled is computed at once where it is small enough.

    Args:
        x: Normalized, on the store's grid; channels may differ in number.
        record: What `VolumeStore.undo_record` returned.
        dtype: Of what slicing gives: intensities are rounded and clipped to integers.
    """

    scale, offset = 1.0, 0.0  # intensity = voxel * scale + offset, see `Volume`

    def __init__(self, x: Sliced, record: Record, dtype: np.dtype | None = None):
        self.x, self.record, self.dtype = x, record, np.dtype(dtype or np.float32)
        try:
            self.prepare()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the record of how a volume was prepared is damaged ({error}); encode it again"
            ) from error

    def prepare(self) -> None:
        """Take the record apart."""
        record, geometry, count = self.record, self.record["geometry"], self.x.shape[0]
        known = [min(channel, len(record["gain"]) - 1) for channel in range(count)]
        names = ("gain", "bias", "scale", "offset")
        self.mappings = [tuple(float(record[name][which]) for name in names) for which in known]
        background = record["background"]
        if isinstance(background, list):  # latents of old have one number
            background = [float(background[which]) for which in known]
        self.background = np.broadcast_to(np.float32(background), (count,)).reshape(-1, 1, 1, 1)
        self.affine = np.array(geometry["source_affine"], dtype=np.float64)
        self.look = Look.of(record["look"]) if "look" in record else Look()
        # On the store's axes: size of what was read, where it lies in the file's, that size.
        self.size = [int(n) for n in geometry.get("pad_from", self.x.shape[1:])]
        self.low = [int(n) for n in geometry["crop"][0]] if "crop" in geometry else [0, 0, 0]
        self.full = [int(n) for n in geometry.get("crop_from", self.size)]
        self.axes = [int(n) for n in geometry.get("axes", range(3))]
        self.flips = [bool(flip) for flip in geometry.get("flips", [False] * 3)]
        self.numbers: Sliced | None = None
        if "oriented_grid" in geometry:
            self.resample_back(*geometry["oriented_grid"])
        back = np.argsort(self.axes)
        self.shape = (count, *(self.full[axis] for axis in back))
        if sorted(self.axes) != [0, 1, 2] or self.affine.shape != (4, 4):
            raise ValueError("axes or affine")

    def resample_back(self, shape: Sequence[int], affine: Sequence[Sequence[float]]) -> None:
        """Let what lies on the store's grid stand on the grid that it was resampled from."""
        names = ("pad_from", "crop", "crop_from")
        geometry = {name: self.record["geometry"][name] for name in names
                    if name in self.record["geometry"]}  # fmt: skip
        stored = shifted(np.array(self.record["affine"]), [-n for n in self.low])
        geometry["source_affine"] = stored.tolist()
        fine = Undone(self.x, {**self.record, "geometry": geometry})
        back = Resampled(fine, tuple(shape), np.array(affine))
        self.numbers = back[(slice(None),) * 4] if num_items(back.shape) <= WHOLE else back
        self.size, self.low, self.full = list(shape), [0, 0, 0], list(shape)

    def __getitem__(self, box: Box) -> np.ndarray:
        """Compute a box."""
        channels, *inside = (range(n)[part] for n, part in zip(self.shape, box, strict=True))
        there = []  # on the store's axes, of the whole grid
        for axis, flip, n in zip(self.axes, self.flips, self.full, strict=True):
            low, high = inside[axis].start, inside[axis].stop
            there.append((n - high, n - low) if flip else (low, high))
        held = [
            (min(max(a - low, 0), n), min(max(b - low, 0), n))
            for (a, b), low, n in zip(there, self.low, self.size, strict=True)
        ]
        picked = slice(channels.start, channels.stop)
        known = self.intensities((picked, *(slice(a, b) for a, b in held)))
        if [b - a for a, b in held] != [b - a for a, b in there]:  # some of it was cropped away
            out = np.empty((len(channels), *(b - a for a, b in there)), np.float32)
            out[:] = self.background[picked]
            where = [
                slice(a + low - start, b + low - start)
                for (a, b), low, (start, _) in zip(held, self.low, there, strict=True)
            ]
            if known.size:
                out[(slice(None), *where)] = known
            known = out
        flipped = tuple(1 + axis for axis, flip in enumerate(self.flips) if flip)
        back = [0, *(1 + int(axis) for axis in np.argsort(self.axes))]
        return as_dtype(np.ascontiguousarray(np.flip(known, flipped).transpose(back)), self.dtype)

    def intensities(self, box: Box) -> np.ndarray:
        """Return the file's intensities in a box of the store's grid, float32."""
        if self.numbers is not None:
            return np.asarray(self.numbers[box])
        x = self.x[box]
        x = x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) else x
        x = np.asarray(x, np.float32)
        data = np.empty_like(x)
        for channel, (gain, bias, scale, offset) in enumerate(self.mappings[box[0]]):
            for row, out in zip(x[channel], data[channel], strict=True):  # it is float64 meanwhile
                out[...] = (row - np.float64(bias)) / gain * scale + offset
        return data


def undo(x: Sliced, record: Record) -> Volume:
    """Invert the preprocessing of a volume whose cache may be gone.

    Args:
        x: Normalized (C, X, Y, Z) on the store's grid; channels may differ in number.
        record: What `VolumeStore.undo_record` returned.

    Raises:
        ValueError: The record is damaged.
    """
    undone = Undone(x, record)
    return Volume(undone[(slice(None),) * 4], undone.affine)


def as_dtype(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bring float32 intensities to a dtype; integers are rounded, and clipped to what they hold."""
    if dtype.kind not in "iu":
        return data.astype(dtype, copy=False)
    ends = np.iinfo(dtype)
    return np.rint(data, dtype=np.float64).clip(ends.min, ends.max).astype(dtype)


def file_written(record: Record, form: str | None = None) -> tuple[str, str]:
    """Return the format in which a volume is written, and the suffix of its file's name.

    Args:
        record: What `VolumeStore.undo_record` returned; one of old is of NIfTI.
        form: A format that is asked for; None for the one that came in.
    """
    found = form or record.get("file", {}).get("format", "nifti")
    if found not in SUFFIXES:
        raise ValueError(f"recon_format {found!r} is unknown; choose one of {', '.join(SUFFIXES)}")
    return found, SUFFIXES[found]


def write_undone(
    folder: Path, stem: str, x: Sliced, record: Record, form: str | None = None
) -> Path:
    """Write a volume in its file's grid and intensities, piece by piece.

    Numbers are float32. TIFF and PNG out of TIFF and PNG have those of their file, rounded and
    clipped where they are integers.

    Args:
        folder: Where to; made when missing.
        stem: Name of the file without its suffix.
        x: Normalized, on the store's grid.
        record: What `VolumeStore.undo_record` returned.
        form: See `file_written`.
    """
    found, suffix = file_written(record, form)
    file = record.get("file", {})
    pictures = {found, file.get("format")} <= {"tiff", "png"}
    source: Boxes = Undone(x, record, np.dtype(file["dtype"]) if pictures else None)
    path = folder / f"{stem}{suffix}"
    write_volume(path, source)
    return path
