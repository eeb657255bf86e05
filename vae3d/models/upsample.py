"""Layers that grow the grid by a per-axis factor: the socket `up` of `CustomVAE`.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.kernels.convolutions import Conv
from vae3d.kernels.steps import is_fast, on_gpu, prepared
from vae3d.kernels.upsampling import upsample_convolve
from vae3d.models.conv import CONV_TRANSPOSE, conv, per_axis
from vae3d.models.downsample import Resampling, cell_sizes, check_haar

LINEAR = {2: "bilinear", 3: "trilinear"}
MAX_ELEMENTS = 2**31 - 1  # of one call of torch's kernels, which count in 32 bits on GPUs
# channel to space, the inverse of `downsample.UNSHUFFLE`.
SHUFFLE = {
    2: "b (c fx fy) x y -> b c (x fx) (y fy)",
    3: "b (c fx fy fz) x y z -> b c (x fx) (y fy) (z fz)",
}


class Up(Resampling):
    """Contract of an up layer: `Up(channels, factor, spatial_dims, **options)`.

    It maps `(B, C, *spatial)` to `(B, C, *spatial * factor)`.

    Args:
        channels: Channels of input and output.
        factor: Growth per axis, one number or one per axis.
        spatial_dims: 2 or 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Grow `(B, C, *spatial)` by `factor`."""
        raise NotImplementedError


class InterpUp(Up):
    """Interpolation, then a 3x3 convolution.

    Args:
        channels: Channels of input and output.
        factor: Growth per axis.
        spatial_dims: 2 or 3.
        mode: `nearest` (Stable Diffusion, MONAI) or `linear` (MAISI; corners not aligned).
        conv_after: False leaves the convolution out.
    """

    conv: Conv | nn.Identity

    def __init__(
        self,
        channels: int,
        factor: int | Sequence[int],
        spatial_dims: int,
        mode: Literal["nearest", "linear"] = "nearest",
        conv_after: bool = True,
    ):
        super().__init__(channels, factor, spatial_dims)
        if mode not in ("nearest", "linear"):
            raise ValueError(f"mode={mode!r} is not one of nearest, linear")
        self.mode = mode
        self.conv = conv(spatial_dims, channels, channels, 3) if conv_after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial * factor)`."""
        if (folded := self.folded(x)) is not None:
            return upsample_convolve(folded, x, self.factor)
        return prepared(partial(interpolate, factor=self.factor, mode=self.mode), self.conv, x)

    def folded(self, x: Tensor) -> Conv | None:
        """The convolution, where it and interpolation are one: `upsample_convolve`."""
        conv = self.conv
        doubles = self.mode == "nearest" and max(self.factor) == 2
        return conv if doubles and is_fast(conv, x) else None


class TransposeUp(Up):
    """Transposed convolution.

    Args:
        channels: Channels of input and output.
        factor: Growth per axis.
        spatial_dims: 2 or 3.
        kernel: Kernel size per axis; None for the factor, so that no two kernels overlap (MONAI).
            MAISI has 3.
    """

    def __init__(
        self,
        channels: int,
        factor: int | Sequence[int],
        spatial_dims: int,
        kernel: int | None = None,
    ):
        super().__init__(channels, factor, spatial_dims)
        kernels = self.factor if kernel is None else per_axis(kernel, spatial_dims, "kernel")
        axes = list(zip(kernels, self.factor, strict=True))
        if any(k < f for k, f in axes):
            raise ValueError(
                f"kernel={kernel} leaves holes at factor {self.factor}; make it larger"
            )
        padding = tuple((k - 1) // 2 if k != f else 0 for k, f in axes)
        missing = tuple(f - k + 2 * p for (k, f), p in zip(axes, padding, strict=True))
        self.conv = CONV_TRANSPOSE[spatial_dims](
            channels, channels, kernels, self.factor, padding, missing
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial * factor)`."""
        return self.conv(x)


class ShuffleUp(Up):
    """Convolution to more channels, channel to space, and a nearest-neighbor shortcut (DC-AE).

    Args:
        channels: Channels of input and output.
        factor: Growth per axis.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__(channels, factor, spatial_dims)
        self.conv = conv(spatial_dims, channels, channels * prod(self.factor), 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial * factor)`."""
        return shuffle(self.conv(x), self.factor) + interpolate(x, self.factor, "nearest")


class HaarUp(Up):
    """1x1 convolution to wavelet bands, inverse Haar transform.

    Args:
        channels: Channels of input and output.
        factor: Growth per axis, 1 or 2 each.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__(channels, factor, spatial_dims)
        check_haar(self.factor)
        self.conv = conv(spatial_dims, channels, channels * prod(self.factor), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial * factor)`."""
        return inverse_haar(self.conv(x), self.factor)


def interpolate(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """Grow `(B, C, *spatial)` by `factor` per axis, nearest or linear.

    Args:
        x: `(B, C, *spatial)`.
        factor: Growth per axis.
        mode: `nearest` or `linear`.
    """
    if mode == "nearest" and on_gpu(x) and x.stride(1) == 1:
        return repeat(x, factor)
    mode = LINEAR[len(factor)] if mode == "linear" else mode
    grow = partial(F.interpolate, scale_factor=tuple(float(f) for f in factor), mode=mode)
    if torch.compiler.is_compiling() or x.numel() * prod(factor) <= MAX_ELEMENTS:
        return grow(x)
    per_channel = x[:, :1].numel() * prod(factor)
    parts = x.split(max(MAX_ELEMENTS // per_channel, 1), dim=1)
    return torch.cat([grow(part) for part in parts], dim=1)


def repeat(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Nearest neighbors of `(B, C, *spatial)`, channels innermost.

    One pass of large copies, also over more elements than 32 bits count; PyTorch's own kernels turn
    such a volume there and back.
    """
    x = x.movedim(1, -1)
    for axis in range(len(factor), 0, -1):
        x = x.unsqueeze(axis + 1)
    cells = [n for axis in zip(x.shape[1:-1:2], factor, strict=True) for n in axis]
    grown = x.expand(len(x), *cells, x.shape[-1])
    size = [n * f for n, f in zip(x.shape[1:-1:2], factor, strict=True)]
    return grown.reshape(len(x), *size, x.shape[-1]).movedim(-1, 1)


def shuffle(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Channel to space: `(B, C * prod(factor), *spatial)` to `(B, C, *spatial * factor)`."""
    return rearrange(x, SHUFFLE[len(factor)], **cell_sizes(factor))


def inverse_haar(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Inverse of `downsample.haar`.

    Args:
        x: `(B, prod(factor) * C, *spatial)`.
        factor: 1 or 2 per axis.

    Returns:
        `(B, C, *spatial * factor)`.
    """
    for axis, f in reversed(list(enumerate(factor, start=2))):
        if f == 2:
            total, difference = x.chunk(2, dim=1)
            pair = torch.stack([total + difference, total - difference], dim=axis + 1)
            x = pair.flatten(axis, axis + 1) * 0.5**0.5
    return x
