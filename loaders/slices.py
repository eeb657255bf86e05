"""Volumes as stacks of slices, for 2D networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders.layout import Layout
from loaders.preprocess import Preprocess
from loaders.readers import Volume
from loaders.store import VolumeStore
from loaders.undo import undo


class SliceStore:
    """A `VolumeStore` seen slice by slice: item i is one slice, (C, X, Y).

    With several neighboring slices their channels are stacked, lowest slice first; beyond the
    volume's ends the last slice is repeated.

    Args:
        volumes: The volumes.
        axis: Spatial axis (0, 1, 2) that the slices are cut across.
        num_slices: Neighboring slices that become channels; odd, the middle one names the item.

    Example:
        >>> slices = SliceStore(store, axis=2)
        >>> slices.read(100).shape                              # (C, X, Y)
        >>> slices.locate(100)                                  # (volume, slice)
    """

    def __init__(self, volumes: VolumeStore, axis: int = 2, num_slices: int = 1):
        if axis not in (0, 1, 2):
            raise ValueError(f"data.slice_axis is {axis}: use 0, 1 or 2")
        if num_slices < 1 or num_slices % 2 == 0:
            raise ValueError(f"data.num_slices is {num_slices}: use an odd number")
        self.volumes, self.axis, self.num_slices = volumes, axis, num_slices
        depths = volumes.spatial_shapes[:, axis]
        self.ends = np.cumsum(depths)
        self.kept = [other for other in range(3) if other != axis]
        shapes = volumes.spatial_shapes[:, self.kept]
        self.spatial_shapes: np.ndarray = np.repeat(shapes, depths, axis=0)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Return the volume of an item, and which of its slices it is."""
        volume = int(np.searchsorted(self.ends, index, "right"))
        return volume, index - (int(self.ends[volume - 1]) if volume else 0)

    @property
    def ids(self) -> list[str]:
        """Names of the slices, for example `sub-01_T1w__042`."""
        depths = self.volumes.spatial_shapes[:, self.axis]
        pairs = zip(self.volumes.ids, depths, strict=True)
        return [f"{id}__{number:03d}" for id, depth in pairs for number in range(depth)]

    @property
    def num_channels(self) -> int:
        """Channels of every slice."""
        return self.volumes.num_channels * self.num_slices

    @property
    def data_range(self) -> tuple[float, float]:
        """Lowest and highest value that `read` can return."""
        return self.volumes.data_range

    @property
    def channel_ranges(self) -> list[tuple[float, float]]:
        """Range of what `read` returns of each channel."""
        return self.volumes.channel_ranges * self.num_slices

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels of a slice: those of the volumes, once for each of its slices."""
        return self.volumes.channel_names * self.num_slices

    @property
    def preprocess(self) -> Preprocess:
        """What was done to the volumes."""
        return self.volumes.preprocess

    @property
    def skipped(self) -> list[tuple[str, str, str]]:
        """(id, path, reason) of broken volumes."""
        return self.volumes.skipped

    def shape(self, index: int) -> tuple[int, int, int]:
        """(C, X, Y) of a slice."""
        x, y = (int(n) for n in self.spatial_shapes[index])
        return self.num_channels, x, y

    def spacing_mm(self, index: int) -> tuple[float, float]:
        """Pixel size in millimeters."""
        spacing = self.volumes.spacing_mm(self.locate(index)[0])
        x, y = (spacing[axis] for axis in self.kept)
        return x, y

    def layout(self, index: int) -> Layout:
        """Return how a slice is shown to people."""
        layout = self.volumes.layout(self.locate(index)[0])
        return replace(layout, cut=self.axis, channels=layout.channels * self.num_slices)

    def chunks(self, index: int) -> tuple[int, ...] | None:
        """See `VolumeStore.chunks`; along the two axes of a slice."""
        chunks = self.volumes.chunks(self.locate(index)[0])
        return chunks and tuple(chunks[axis] for axis in self.kept)

    def lead(self, index: int) -> tuple[int, ...] | None:
        """See `VolumeStore.lead`; along the two axes of a slice."""
        lead = self.volumes.lead(self.locate(index)[0])
        return lead and tuple(lead[axis] for axis in self.kept)

    def labels(self, index: int) -> dict[str, str]:
        """Return the manifest's further columns of the slice's volume."""
        return self.volumes.labels(self.locate(index)[0])

    def meta(self, index: int) -> dict[str, Any]:
        """Return what is known about the slice's volume, and which slice it is."""
        volume, number = self.locate(index)
        return self.volumes.meta(volume) | {"slice": number, "slice_axis": self.axis}

    def subset(self, ids: Sequence[str]) -> SliceStore:
        """Return the slices of these volumes; `ids` are those of the volumes."""
        return SliceStore(self.volumes.subset(ids), self.axis, self.num_slices)

    def write_skipped(self, folder: str | Path) -> None:
        """See `VolumeStore.write_skipped`."""
        self.volumes.write_skipped(folder)

    def read(self, index: int, slices: Sequence[slice] | None = None) -> np.ndarray:
        """Return normalized float32 pixels (C, *shape of the two slices)."""
        slices = (slice(None), slice(None)) if slices is None else slices
        sizes = [len(range(*s.indices(n)))
                 for s, n in zip(slices, self.spatial_shapes[index], strict=True)]  # fmt: skip
        out = np.empty((self.num_channels, *sizes), np.float32)
        self.read_into(index, slices, out)
        return out

    def part(self, index: int) -> tuple[slice, ...]:
        """See `VolumeStore.part`; a slice is never too large."""
        return (slice(None),) * 2

    def read_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read as `read` into a float32 buffer."""
        volume, channels = self.locate(index)[0], self.volumes.num_channels
        for place, where in enumerate(self._planes(index, slices)):
            part = out[place * channels : (place + 1) * channels]
            self.volumes.read_into(volume, where, np.expand_dims(part, 1 + self.axis))

    def _planes(self, index: int, slices: Sequence[slice]) -> Iterator[list[slice]]:
        """Where the neighboring slices of an item lie in its volume; the last ones repeat."""
        volume, number = self.locate(index)
        last = int(self.volumes.spatial_shapes[volume, self.axis]) - 1
        half = self.num_slices // 2
        for wanted in range(number - half, number + half + 1):
            at = min(max(wanted, 0), last)
            where = list(slices)
            where.insert(self.axis, slice(at, at + 1))
            yield where

    @property
    def num_weights(self) -> int:
        """Channels of the weights: one for all, or one each where channels are several slices."""
        if self.num_slices == 1:
            return self.volumes.num_weights
        return self.volumes.num_weights * self.num_channels

    def read_weights_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read how much pixels count into a float32 buffer (num_weights, *shape of the slices)."""
        parts = out.reshape(self.num_slices, -1, *out.shape[1:])
        for part, where in zip(parts, self._planes(index, slices), strict=True):
            first = np.expand_dims(part[:1], 1 + self.axis)
            self.volumes.read_weights_into(self.locate(index)[0], where, first)
            part[1:] = part[:1]

    def seen(self, index: int, slices: Sequence[slice] | None = None) -> np.ndarray | None:
        """Return which pixels (X, Y) of a slice count at all; None where nothing was said."""
        volume, number = self.locate(index)
        where = list(slices or (slice(None),) * 2)
        where.insert(self.axis, slice(number, number + 1))
        seen = self.volumes.seen(volume, where)
        return None if seen is None else seen.take(0, self.axis)

    def undo(self, index: int, x: np.ndarray) -> Volume:
        """Return a slice's intensities in its place in the store's grid, (C, X, Y, Z) with one 1.

        The grid of the source is only defined for whole volumes: stack the slices and call
        `volumes.undo`.
        """
        volume, number = self.locate(index)
        record = self.volumes.undo_record(volume)
        if tuple(x.shape[1:]) != self.shape(index)[1:]:
            raise ValueError(f"got {tuple(x.shape[1:])}, the slice is {self.shape(index)[1:]}")
        affine = np.array(record["affine"])
        affine[:3, 3] += affine[:3, self.axis] * number
        record["geometry"] = {"source_affine": affine}
        return undo(np.expand_dims(np.asarray(x, np.float32), 1 + self.axis), record)

    def foreground_points(self, index: int) -> np.ndarray:
        """Return the remembered foreground voxels of a slice, (N, 2); may be none."""
        volume, number = self.locate(index)
        return self._in_slice(self.volumes.foreground_points(volume), number)

    def label_points(self, index: int) -> dict[int, np.ndarray]:
        """Return the remembered voxels of each label in a slice, (N, 2)."""
        volume, number = self.locate(index)
        found = self.volumes.label_points(volume)
        return {label: self._in_slice(points, number) for label, points in found.items()}

    def _in_slice(self, points: np.ndarray, number: int) -> np.ndarray:
        return points[points[:, self.axis] == number][:, self.kept]
