"""Layers that grow the grid by a per-axis factor: the socket `up` of `CustomVAE`.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.conv import conv, per_axis

LINEAR = {2: "bilinear", 3: "trilinear"}


class Up(nn.Module):
    """Contract of an up layer: `Up(channels, factor, spatial_dims, **options)`.

    It maps `(B, C, *spatial)` to `(B, C, *spatial * factor)`.

    Args:
        channels: Channels of input and output.
        factor: Growth per axis, one number or one per axis.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__()
        self.channels = channels
        self.factor = per_axis(factor, spatial_dims, "factor")


class InterpUp(Up):
    """Interpolation followed by a 3x3 convolution.

    Args:
        channels: Channels of input and output.
        factor: Growth per axis.
        spatial_dims: 2 or 3.
        mode: `nearest` (Stable Diffusion, MONAI) or `linear` (MAISI; corners not aligned).
    """

    def __init__(
        self,
        channels: int,
        factor: int | Sequence[int],
        spatial_dims: int,
        mode: Literal["nearest", "linear"] = "nearest",
    ):
        super().__init__(channels, factor, spatial_dims)
        self.mode = mode
        self.conv = conv(spatial_dims, channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial * factor)`."""
        return self.conv(interpolate(x, self.factor, self.mode))


def interpolate(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """Grow `(B, C, *spatial)` by `factor` per axis, nearest or linear.

    Args:
        x: `(B, C, *spatial)`.
        factor: Growth per axis.
        mode: `nearest` or `linear`.
    """
    mode = LINEAR[len(factor)] if mode == "linear" else mode
    return F.interpolate(x, scale_factor=tuple(float(f) for f in factor), mode=mode)
