"""Spatial frequencies of volumes and latents, and both at a smaller size.

All of it is linear maps along one axis after another, written as matrix products: exact in its
gradients, the same on every device, and quick on grids of the size of latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.kernels.device import there

BINS = 16
EPS = 1e-8
COUNTED = 1 - 1e-4  # of a mask at a smaller size: no voxel behind it that does not count


def along_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix along each spatial axis of `(B, C, *spatial)`."""
    for axis, matrix in enumerate(matrices, start=2):
        x = (x.movedim(axis, -1) @ matrix.to(x).mT).movedim(-1, axis)
    return x


@lru_cache(maxsize=64)
def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II of `n` values, as a matrix; float64."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (i + 0.5) * k) * math.sqrt(2 / n)
    return torch.cat((matrix[:1] / math.sqrt(2), matrix[1:]))


@lru_cache(maxsize=256)
def linear(n: int, size: int) -> Tensor:
    """Linear resampling of `n` values to `size`, as a matrix; float64."""
    first, rows = linear_rows(n, size, 0, size)
    matrix = torch.zeros(size, n, dtype=torch.float64)
    matrix[:, first : first + rows.shape[1]] = rows
    return matrix


def linear_rows(n: int, size: int, start: int, stop: int) -> tuple[int, Tensor]:
    """Rows of `linear`, of the columns that they use alone, and the first of these.

    As `interpolate` with `align_corners=False`: value j lies at (j + 1/2) n / size - 1/2.
    """
    places = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * (n / size) - 0.5
    places = places.clamp(min=0, max=n - 1)
    near = places.floor().long()
    far = (near + 1).clamp_max(n - 1)
    first, row = int(near[0]), torch.arange(stop - start)
    matrix = torch.zeros(stop - start, int(far[-1]) + 1 - first, dtype=torch.float64)
    matrix[row, near - first] = 1 - (places - near)
    matrix[row, far - first] += places - near
    return first, matrix


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring `(B, C, *spatial)` to another size, linearly (of half the size: means of pairs)."""
    return along_axes(x, [there(x, linear, n, m) for n, m in zip(x.shape[2:], size, strict=True)])


def counted(seen: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a mask `(B, C, *spatial)` to a smaller size: where all voxels behind one count."""
    return resized(seen.float(), size) > COUNTED


def padded(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the last voxels of `(B, C, *spatial)` up to a size, as the network does."""
    missing = [m - n for n, m in zip(x.shape[2:], size, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [n for m in reversed(missing) for n in (0, m)], mode="replicate")


def pooled_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a volume to the grid of its latent: each value is the mean of a cell."""
    pool: Callable[..., Tensor] = F.adaptive_avg_pool3d if x.ndim == 5 else F.adaptive_avg_pool2d
    return pool(x, tuple(size))


def power(x: Tensor) -> Tensor:
    """Squared DCT of `(B, C, *spatial)`, mean over channels, 0 where nothing changes (DC)."""
    spectrum = along_axes(x, [there(x, cosines, n) for n in x.shape[2:]]).square().mean(1)
    dc: tuple[slice | int, ...] = (slice(None), *[0] * len(x.shape[2:]))
    spectrum[dc] = 0
    return spectrum


def radius(shape: Sequence[int]) -> Tensor:
    """Frequency of each coefficient, in parts of the highest one of the grid."""
    axes = [torch.arange(n, dtype=torch.float64) / n for n in shape]
    squares = sum(k.square() for k in torch.meshgrid(*axes, indexing="ij"))
    assert isinstance(squares, Tensor)
    return squares.sqrt() / squares.max().sqrt().clamp_min(EPS)


def rings(x: Tensor, bins: int = BINS) -> Tensor:
    """Mean power `(B, bins)` of `(B, C, *spatial)` in rings of equal width, slow to fast."""
    found, ring = power(x).flatten(1), there(x, ring_of, x.shape[2:], bins)
    inside = (ring == number for number in range(bins))  # one by one: a latent may be large
    return torch.stack([(found * one).sum(1) / one.sum().clamp_min(1) for one in inside], 1)


def ring_of(shape: Sequence[int], bins: int) -> Tensor:
    """In which ring a coefficient lies, `(coefficients,)`."""
    return (radius(shape) * bins).long().clamp_max(bins - 1).flatten()


def spectral_gap(x: Tensor, z: Tensor, delta: float = 1.0, bins: int = BINS) -> Tensor:
    """KL divergence `(B,)` of the latent's spectrum from the input's, flattened by `f^delta`.

    As in the code of Ning et al. 2026 (arXiv 2603.14645): the power of ring number f = 1, 2, ... of
    the input is multiplied by `f^delta`; both are taken as log(1 + power), in parts of their sum.

    Args:
        x: The input on the latent's grid, `(B, C, *spatial)`.
        z: The latent, `(B, c, *spatial)`.
        delta: How much flatter than the input's the spectrum is to be; 0 for as steep.
        bins: Rings of frequencies.
    """
    steps = torch.arange(1, bins + 1, dtype=x.dtype, device=x.device)
    wanted, found = (
        _parts(torch.log1p(p)) for p in (rings(x, bins) * steps**delta, rings(z, bins))
    )
    return (wanted * ((wanted + EPS).log() - (found + EPS).log())).sum(1)


def _parts(values: Tensor) -> Tensor:
    """Values in parts of their sum, sample by sample."""
    return values / (values.sum(1, keepdim=True) + EPS)


def high_frequency_share(x: Tensor) -> Tensor:
    """Part `(B,)` of the power of `(B, C, *spatial)` beyond half of the highest frequency."""
    spectrum = power(x).flatten(1)
    high = (radius(x.shape[2:]) > 0.5).flatten().to(spectrum)
    return (spectrum * high).sum(1) / spectrum.sum(1).clamp_min(EPS)
