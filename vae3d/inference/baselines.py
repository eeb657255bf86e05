"""What a reader can hold a VAE against: two linear codes with no network.

`pooled` keeps the mean of each cell of the latent grid, one value a cell. `BlockPCA` keeps as many
values a cell as the model has latent channels, in the directions of largest variance of the
training volumes: the best linear code of that size.
"""

import hashlib
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.whole import whole_file
from vae3d.kernels.large import Lazy, Values

BLOCKS_PER_VOLUME = 20_000
FEW = 1 << 24  # blocks of a volume that are shuffled to draw some
SLAB = 1 << 22  # values that are worked on at a time

# What torch may say of a file that is none of its own.
DAMAGE = (RuntimeError, TypeError, EOFError, LookupError, ValueError, pickle.UnpicklingError)


def pooled(x: Values, factor: Sequence[int]) -> Lazy:
    """Average-pool by `factor` and upsample linearly: (C, *spatial) to the same shape."""
    dims, first = len(factor), factor[0]
    pool = (F.avg_pool2d, F.avg_pool3d)[dims - 2]
    mode = ("bilinear", "trilinear")[dims - 2]
    parts = [
        pool(_pad(x[:, rows], factor)[None], tuple(factor))[0] for rows in _slabs(x.shape, factor)
    ]
    coarse = torch.cat(parts, 1)

    def read(box: tuple[slice, ...]) -> Tensor:
        low = max(box[1].start // first - 1, 0)  # one cell more on either side
        high = min(-(-box[1].stop // first) + 1, coarse.shape[1])
        cells = coarse[box[0], low:high]
        sizes = [n * f for n, f in zip(cells.shape[1:], factor, strict=True)]
        fine = F.interpolate(cells[None], sizes, mode=mode)[0]
        rows = slice(box[1].start - low * first, box[1].stop - low * first)
        return fine[(slice(None), rows, *box[2:])]

    return Lazy(x.shape, read)


class BlockPCA:
    """Principal components of blocks of `factor` voxels.

    Args:
        factor: Voxels of a block per axis.
        mean: Mean block, (C * prod(factor),).
        components: Orthonormal rows, (number kept, C * prod(factor)).
        std: Standard deviation of the blocks along each of them, (number kept,).
    """

    def __init__(self, factor: Sequence[int], mean: Tensor, components: Tensor, std: Tensor):
        self.factor, self.mean = tuple(factor), mean
        self.components, self.std = components, std

    @classmethod
    def fit(
        cls,
        volumes: Iterable[Values],
        factor: Sequence[int],
        num_components: int,
        most: int = BLOCKS_PER_VOLUME,
    ) -> Self:
        """Fit on at most so many blocks of each volume (C, *spatial), drawn with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        blocks = (drawn(x, factor, most, generator) for x in volumes)
        return cls.of_blocks(blocks, factor, num_components)

    @classmethod
    def of_blocks(cls, drawn: Iterable[Tensor], factor: Sequence[int], num_components: int) -> Self:
        """Fit on blocks, `(n, C * prod(factor))` at a time."""
        count, total, square = 0, *torch.zeros(2, dtype=torch.float64)
        for blocks in drawn:
            blocks = blocks.double()
            count, total = count + len(blocks), total + blocks.sum(0)
            square = square + blocks.T @ blocks
        mean = total / count
        variances, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        std = variances.flip(0)[:num_components].clamp(min=0).sqrt().float()
        return cls(factor, mean.float(), vectors.flip(1).T[:num_components].float(), std)

    def __call__(self, x: Tensor, count: int | None = None) -> Tensor:
        """Code and decode a volume (C, *spatial) by the first `count` components; None for all."""
        recon, coded = torch.empty_like(x), self.coded(x, count)
        for rows in _slabs(x.shape, self.factor):
            recon[:, rows] = coded[:, rows]
        return recon

    def coded(self, x: Values, count: int | None = None) -> Lazy:
        """Do so where it is sliced."""
        first = self.factor[0]

        def read(box: tuple[slice, ...]) -> Tensor:
            low = box[1].start // first * first
            high = min(-(-box[1].stop // first) * first, x.shape[1])
            blocks = self._coded(x[:, low:high], self.components[:count])
            return blocks[(box[0], slice(box[1].start - low, box[1].stop - low), *box[2:])]

        return Lazy(x.shape, read)

    def _coded(self, x: Tensor, kept: Tensor) -> Tensor:
        """Code and decode some rows by some components."""
        blocks, grid = _blocks(_pad(x, self.factor), self.factor)
        recon = (blocks - self.mean) @ kept.T @ kept + self.mean
        recon = recon.reshape(*grid, x.shape[0], *self.factor)
        dims = len(grid)
        order = [dims, *(i for axis in range(dims) for i in (axis, dims + 1 + axis))]
        sizes = [n * f for n, f in zip(grid, self.factor, strict=True)]
        recon = recon.permute(order).reshape(x.shape[0], *sizes)
        return recon[(slice(None), *(slice(n) for n in x.shape[1:]))]

    def equivalent(self, x: Values, recon: Values, mask: Values | None = None) -> float:
        """How many components have as small a squared error as a reconstruction, interpolated.

        Both are measured over the whole blocks in the volume.

        Args:
            x: Volume (C, *spatial).
            recon: Its reconstruction.
            mask: Voxels that count, bool (*spatial); None for all.

        Returns:
            The number, fractions by the logarithm of the error (that is, by PSNR) between the two
            next to it; infinity where all components together are worse.
        """
        sizes = [n // f * f for n, f in zip(x.shape[1:], self.factor, strict=True)]
        errors = wanted = torch.zeros(1, dtype=torch.float64)
        for rows in _slabs((x.shape[0], *sizes), self.factor):
            inside = (rows, *map(slice, sizes[1:]))
            a, b = (v[(slice(None), *inside)] for v in (x, recon))
            counts = None if mask is None else mask[inside].expand_as(a)
            blocks = (_blocks(a, self.factor)[0] - self.mean).double()
            missed = (a - b).double().square()
            if counts is not None:
                missed = missed * counts
            wanted = wanted + missed.sum()
            seen = None if counts is None else _blocks(counts, self.factor)[0]
            errors = errors + self._errors(blocks, seen)
        errors = errors.cummin(0).values
        better = int((errors > wanted * (1 + 1e-6)).sum())  # counts that are not enough
        if better == len(errors):
            return math.inf
        if better == 0:
            return 0.0
        before, after = errors[better - 1 : better + 1].clamp(min=1e-12 * errors[0]).tolist()
        return better - 1 + math.log(before / max(float(wanted), after)) / math.log(before / after)

    def _errors(self, blocks: Tensor, counts: Tensor | None) -> Tensor:
        """Squared error of 0, 1, 2, ... components, over the values that count.

        Among those components are not orthogonal, so each error is summed up by itself.
        """
        if counts is None:
            energy = (blocks @ self.components.T.double()).square().sum(0)
            return blocks.square().sum() - torch.cat([torch.zeros(1), energy.cumsum(0)])
        errors, left = [blocks[counts].square().sum()], blocks
        for component in self.components.double():
            left = left - torch.outer(blocks @ component, component)
            errors.append(left[counts].square().sum())
        return torch.stack(errors)

    def save(self, path: Path) -> None:
        """Write to a file, whole or not at all."""
        with whole_file(path) as temporary:
            torch.save(vars(self), temporary)

    @classmethod
    def load(cls, path: Path) -> "BlockPCA":
        """Read what `save` has written."""
        try:
            return cls(**torch.load(path, weights_only=True))
        except (
            RuntimeError,
            TypeError,
            EOFError,
            LookupError,
            ValueError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, it is fitted again") from error

    @cached_property
    def key(self) -> str:
        """Names what was fitted."""
        values = torch.cat([self.mean.flatten(), self.components.flatten()])
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _slabs(shape: Sequence[int], factor: Sequence[int]) -> Iterator[slice]:
    """Rows of whole blocks of a volume (C, *spatial), few enough to take little memory."""
    each = shape[0] * prod(shape[2:]) * factor[0]
    step = max(1, SLAB // max(each, 1)) * factor[0]
    return (slice(a, min(a + step, shape[1])) for a in range(0, shape[1], step))


def drawn(x: Values, factor: Sequence[int], most: int, generator: torch.Generator) -> Tensor:
    """At most so many blocks of a volume (C, *spatial), read slab by slab."""
    rows, *plane = (-(-n // f) for n, f in zip(x.shape[1:], factor, strict=True))
    total = rows * prod(plane)
    if total <= FEW:
        picks = torch.randperm(total, generator=generator)[:most]
    else:  # none of which is likely to come twice
        picks = torch.randint(total, (most,), generator=generator)
    ordered, order = picks.sort()
    parts = []
    for slab in _slabs(x.shape, factor):
        ends = torch.tensor([slab.start // factor[0], -(-slab.stop // factor[0])]) * prod(plane)
        low, high = torch.searchsorted(ordered, ends).tolist()
        if low < high:
            blocks = _blocks(_pad(x[:, slab], factor), factor)[0]
            parts.append(blocks[ordered[low:high] - ends[0]])
    drawn = torch.cat(parts)
    return torch.empty_like(drawn).index_copy_(0, order, drawn)


def _pad(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Repeat the last voxels up to a multiple of `factor`, as the model does."""
    missing = [-n % f for n, f in zip(x.shape[1:], factor, strict=True)]
    pads = [n for m in reversed(missing) for n in (0, m)]
    return F.pad(x[None], pads, mode="replicate")[0] if any(missing) else x


def _blocks(x: Tensor, factor: Sequence[int]) -> tuple[Tensor, list[int]]:
    """(C, *grid * factor) to (blocks, C * prod(factor)), and the grid."""
    grid = [n // f for n, f in zip(x.shape[1:], factor, strict=True)]
    dims = len(grid)
    cells = x.reshape(x.shape[0], *(n for pair in zip(grid, factor, strict=True) for n in pair))
    order = [*range(1, 2 * dims, 2), 0, *range(2, 2 * dims + 1, 2)]
    return cells.permute(order).reshape(prod(grid), -1), grid
