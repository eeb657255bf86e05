"""Layers that shrink the grid by a per-axis factor: the socket `down` of `CustomVAE`.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vae3d.kernels.convolutions import Ends
from vae3d.kernels.steps import convolve
from vae3d.models.conv import conv, per_axis

# space to channel: every voxel of a factor-sized cell becomes a channel, cell axes innermost.
UNSHUFFLE = {
    2: "b c (x fx) (y fy) -> b (c fx fy) x y",
    3: "b c (x fx) (y fy) (z fz) -> b (c fx fy fz) x y z",
}


class Resampling(nn.Module):
    """What down and up layers share.

    Args:
        channels: Channels of input and output.
        factor: Shrink or growth per axis, one number or one per axis.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__()
        self.channels = channels
        self.factor = per_axis(factor, spatial_dims, "factor")


class Down(Resampling):
    """Contract of a down layer: `Down(channels, factor, spatial_dims, **options)`.

    It maps `(B, C, *spatial)` to `(B, C, *spatial / factor)` for sizes that `factor` divides.

    Args:
        channels: Channels of input and output.
        factor: Shrink per axis, one number or one per axis.
        spatial_dims: 2 or 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shrink `(B, C, *spatial)` by `factor`."""
        raise NotImplementedError


class ConvDown(Down):
    """Strided convolution.

    Args:
        channels: Channels of input and output.
        factor: Shrink per axis.
        spatial_dims: 2 or 3.
        padding: Where zeros are added: `symmetric`, or `asymmetric`, at the far end only, as the
            Stable Diffusion family and MONAI do.
    """

    def __init__(
        self,
        channels: int,
        factor: int | Sequence[int],
        spatial_dims: int,
        padding: Literal["symmetric", "asymmetric"] = "symmetric",
    ):
        super().__init__(channels, factor, spatial_dims)
        if padding not in ("symmetric", "asymmetric"):
            raise ValueError(f"padding={padding!r} is not one of symmetric, asymmetric")
        # Kernel 3 up to factor 2; above, one kernel per cell, so that no voxel goes unseen.
        kernel = tuple(max(3, f) for f in self.factor)
        self.conv = conv(spatial_dims, channels, channels, kernel, self.factor)
        self.conv.padding = tuple(1 if f < 3 else 0 for f in self.factor)
        self.far_padding: Ends = ()
        if padding == "asymmetric":
            # Near and far zeros per axis; an axis that keeps its size stays symmetric.
            sizes = zip(kernel, self.factor, strict=True)
            self.far_padding = tuple((0, k - f) if f > 1 else (1, 1) for k, f in sizes)
            self.conv.padding = (0,) * spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial / factor)`."""
        return convolve(self.conv, x, padding=self.far_padding)


class PoolDown(Down):
    """Average pooling, without parameters.

    Args:
        channels: Channels of input and output.
        factor: Shrink per axis.
        spatial_dims: 2 or 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Average over cells of `factor` voxels."""
        # Not torch's pooling, which knows no half precision in 3D on the CPU.
        return cell_mean(x, self.factor)


class UnshuffleDown(Down):
    """Convolution to fewer channels, space to channel, and a shortcut without parameters.

    The shortcut averages groups of the unshuffled channels, as in DC-AE (Chen et al., 2024).

    Args:
        channels: Channels of input and output, a multiple of the voxels of a cell.
        factor: Shrink per axis.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__(channels, factor, spatial_dims)
        self.cell = prod(self.factor)
        if channels % self.cell:
            raise ValueError(
                f"UnshuffleDown needs channels that are multiples of {self.cell} (factor"
                f" {self.factor}), not {channels}"
            )
        self.conv = conv(spatial_dims, channels, channels // self.cell, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial / factor)`."""
        return unshuffle(self.conv(x), self.factor) + cell_mean(x, self.factor)


class HaarDown(Down):
    """Haar wavelet transform, its bands mixed by a 1x1 convolution.

    Args:
        channels: Channels of input and output.
        factor: Shrink per axis, 1 or 2 each.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__(channels, factor, spatial_dims)
        check_haar(self.factor)
        self.conv = conv(spatial_dims, channels * prod(self.factor), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial / factor)`."""
        return self.conv(haar(x, self.factor))


def unshuffle(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Space to channel: `(B, C, *spatial)` to `(B, C * prod(factor), *spatial / factor)`."""
    return rearrange(x, UNSHUFFLE[len(factor)], **cell_sizes(factor))


def cell_mean(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Mean over cells of `factor` voxels: `(B, C, *spatial)` to `(B, C, *spatial / factor)`."""
    return unshuffle(x, factor).unflatten(1, (x.shape[1], prod(factor))).mean(2)


def haar(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Orthonormal Haar transform of every axis with factor 2; the bands become channels.

    Args:
        x: `(B, C, *spatial)`.
        factor: 1 or 2 per axis.

    Returns:
        `(B, prod(factor) * C, *spatial / factor)`; along each axis sums come before differences.
    """
    for axis, f in enumerate(factor, start=2):
        if f == 2:
            even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.cat([even + odd, even - odd], dim=1) * 0.5**0.5
    return x


def cell_sizes(factor: Sequence[int]) -> dict[str, int]:
    """Sizes of the einops letters `fx fy fz`."""
    return dict(zip(("fx", "fy", "fz"), factor, strict=False))


def check_haar(factor: Sequence[int]) -> None:
    """Refuse factors that the Haar transform does not have."""
    if any(f > 2 for f in factor):
        raise ValueError(f"the Haar transform has factors 1 and 2 only, not {tuple(factor)}")
