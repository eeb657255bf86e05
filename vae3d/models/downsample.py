"""Layers that shrink the grid by a per-axis factor: the socket `down` of `CustomVAE`.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.conv import conv, per_axis


class Down(nn.Module):
    """Contract of a down layer: `Down(channels, factor, spatial_dims, **options)`.

    It maps `(B, C, *spatial)` to `(B, C, *spatial / factor)` for sizes that `factor` divides.

    Args:
        channels: Channels of input and output.
        factor: Shrink per axis, one number or one per axis.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, factor: int | Sequence[int], spatial_dims: int):
        super().__init__()
        self.channels = channels
        self.factor = per_axis(factor, spatial_dims, "factor")


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
        kernel = tuple(max(3, f + 1 - f % 2) for f in self.factor)
        self.conv = conv(spatial_dims, channels, channels, kernel, self.factor)
        self.far_padding = None
        if padding == "asymmetric":
            # Near and far zeros per axis; an axis that keeps its size stays symmetric.
            pairs = [
                (0, k - f) if f > 1 else (1, 1) for k, f in zip(kernel, self.factor, strict=True)
            ]
            self.far_padding = tuple(n for pair in reversed(pairs) for n in pair)
            self.conv.padding = (0,) * spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to `(B, C, *spatial / factor)`."""
        return self.conv(x if self.far_padding is None else F.pad(x, self.far_padding))
