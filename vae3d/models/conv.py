"""Convolutions for 2D and 3D under one name, and per-axis numbers.

Axes: b batch, c channels, x y z space in storage order; 2D is `(B, C, X, Y)`, 3D `(B, C, X, Y, Z)`.
"""

from collections.abc import Callable, Sequence

from torch import nn

from vae3d.kernels.convolutions import Conv, ConvT

CONV: dict[int, Callable[..., Conv]] = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., ConvT]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> Conv:
    """Convolution that keeps the size at stride 1 (odd kernels, zero padding).

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Kernel size, one number or one per axis, odd.
        stride: Stride, one number or one per axis.
        groups: Channel groups; `in_channels` makes it depthwise.
    """
    kernel = per_axis(kernel, spatial_dims, "kernel")
    padding = tuple((k - 1) // 2 for k in kernel)
    stride = per_axis(stride, spatial_dims, "stride")
    return CONV[spatial_dims](in_channels, out_channels, kernel, stride, padding, groups=groups)


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One positive integer per spatial axis from one number or one per axis.

    Args:
        value: A number or a sequence of `spatial_dims` numbers.
        spatial_dims: 2 or 3.
        name: What the number is called, for the error message.
    """
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims or any(v < 1 for v in values):
        raise ValueError(
            f"{name}={value} must be one positive integer or {spatial_dims}, one per axis"
        )
    return values
