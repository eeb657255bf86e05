"""Volumes that do not fit in memory: computed where they are sliced, or kept on the disk."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

LARGE = 2**29  # bytes of float32 from which on a volume is not held in memory
ROWS, MOST = 16, 2**22  # rows and values of a slab that is worked on at a time

Box = tuple[slice, ...]


class Lazy:
    """A volume, or a mask, that is computed where it is sliced.

    Args:
        shape: Its axes.
        read: Gives a box, one slice for each axis with whole numbers as ends.

    Example:
        >>> twice = Lazy((1, 4, 3), lambda box: 2 * torch.ones(1, 4, 3)[box])
        >>> twice[:, 1:3].shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, shape: Sequence[int], read: Callable[[Box], Tensor]):
        self.shape, self.read = tuple(int(n) for n in shape), read

    @classmethod
    def of(cls, values: Values) -> Lazy:
        """A tensor, as one; no copy."""
        return values if isinstance(values, Lazy) else cls(values.shape, values.__getitem__)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, box: slice | Box) -> Tensor:
        """Compute a box; axes that are not named are whole."""
        parts = box if isinstance(box, tuple) else (box,)
        parts += (slice(None),) * (self.ndim - len(parts))
        ends = (part.indices(n) for part, n in zip(parts, self.shape, strict=True))
        return self.read(tuple(slice(low, max(low, high)) for low, high, _ in ends))

    def map(self, function: Callable[..., Tensor], *others: Values) -> Lazy:
        """Apply a function of boxes of equal shape, one of each volume."""
        return Lazy(self.shape, lambda box: function(self[box], *(other[box] for other in others)))

    def map_channels(self, function: Callable[[Tensor, slice], Tensor]) -> Lazy:
        """Apply a function of a box and its channels."""
        return Lazy(self.shape, lambda box: function(self.read(box), box[0]))

    def picked(self, channels: Sequence[int]) -> Lazy:
        """Only these channels."""

        def read(box: Box) -> Tensor:
            return self.read((slice(0, self.shape[0]), *box[1:]))[channels][box[0]]

        return Lazy((len(channels), *self.shape[1:]), read)

    def whole(self) -> Tensor:
        """All of it."""
        return self[()]

    def __array__(self, dtype: object = None, copy: bool | None = None) -> object:
        """For NumPy."""
        return self.whole().numpy()


Values = Tensor | Lazy


def whole_of(values: Values) -> Tensor:
    """All of a volume, as a tensor."""
    return values.whole() if isinstance(values, Lazy) else values


def room(shape: Sequence[int], folder: Path | None = None) -> Tensor:
    """Memory for a float32 volume; of a large one, in a file that has no name and goes with it.

    Args:
        shape: Of the volume.
        folder: On which disk; None for memory, however large.

    Raises:
        OSError: The disk is full.
    """
    size = 4 * math.prod(shape)
    if folder is None or size <= LARGE:
        return torch.empty(*shape)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk ends the process at a later write
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        pages = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(pages, dtype=torch.float32).view(*shape)


def held(values: Lazy, folder: Path, block: Sequence[int]) -> Tensor:
    """A volume (C, X, Y, Z) that is computed once, into `room`.

    Args:
        values: The volume.
        folder: On which disk it lies, where it is large.
        block: Voxels (X, Y, Z) that are computed together, such as a chunk of a store: boxes are
            whole numbers of them along X and Y, and of at most `MOST` values where these are less.
    """
    out = room(values.shape, folder)
    channels, x, y, z = values.shape
    each = channels * block[0] * block[1] * z
    for rows in rows_of(x, block[0]):
        for columns in rows_of(y, block[1] * max(1, MOST // each)):
            out[:, rows, columns] = values[:, rows, columns]
    return out


def rows_of(n: int, step: int) -> list[slice]:
    """Cut the rows of an axis into slabs."""
    return [slice(low, min(low + step, n)) for low in range(0, n, step)]


def slabs_of(shape: Sequence[int], axis: int, share: float = 1.0) -> list[slice]:
    """Cut a volume along an axis into slabs of at most `MOST` values and `ROWS` rows.

    Args:
        shape: Of the volume.
        axis: Which of its axes.
        share: Of these values, where each takes more memory; one row is taken in any case.
    """
    each = math.prod(shape) // shape[axis]
    return rows_of(shape[axis], max(1, min(ROWS, int(share * MOST) // max(each, 1))))
