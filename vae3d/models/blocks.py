"""Blocks that change channels and keep the grid: the socket `block` of `CustomVAE`.

Axes: b batch, c channels, x y z space.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae3d.kernels.steps import is_fast, run
from vae3d.models.conv import conv
from vae3d.models.norm import Norm, NormAct, activation


class Block(nn.Module):
    """Contract of a block: `Block(in_channels, out_channels, spatial_dims, norm, act, **options)`.

    A block maps `(B, in_channels, *spatial)` to `(B, out_channels, *spatial)` as
    `shortcut(x) + body(x)`, or `body(x)` where `shortcut` is None. `body` is a chain of elementary
    layers (convolution, norm, activation), so that the exact executor can walk it. A block that is
    not of this form overrides `forward`, and is then run on the whole volume.

    Args:
        body: The chain of layers.
        shortcut: What is added to it; None for nothing.
    """

    def __init__(self, body: nn.Sequential, shortcut: nn.Module | None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor, run: Callable[..., Tensor] = run) -> Tensor:
        """Map `(B, in_channels, *spatial)` to `(B, out_channels, *spatial)`.

        Args:
            x: The input.
            run: Runs layers as `vae3d.kernels.steps.run` does.
        """
        if self.shortcut is None:
            return run(self.body, x)
        last = type(self.shortcut) is not nn.Identity and not is_fast(self.shortcut, x)
        if last and not torch.is_grad_enabled():
            # There is one volume less, then, beside the normalized one of the body.
            return run([self.shortcut], x, residual=run(self.body, x))
        skip = run([self.shortcut], x)
        return run(self.body, x, residual=skip, overwrite=skip is not x)


class ResBlock(Block):
    """Pre-norm residual block of the Stable Diffusion family: twice norm, activation, convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        act: Name of the activation.
        dropout: Probability of a dropped value before the second convolution.
        zero_init: Start the second convolution at zero, so that the block starts as its shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        norm: Callable[[int], Norm],
        act: str,
        dropout: float = 0.0,
        zero_init: bool = False,
    ):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["norm1"] = NormAct(norm(in_channels), act)
        layers["conv1"] = conv(spatial_dims, in_channels, out_channels, 3)
        layers["norm2"] = NormAct(norm(out_channels), act)
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        layers["conv2"] = conv(spatial_dims, out_channels, out_channels, 3)
        if zero_init:
            zero_(layers["conv2"])
        super().__init__(nn.Sequential(layers), shortcut(in_channels, out_channels, spatial_dims))


class ConvBlock(Block):
    """Convolution, norm, activation; no shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        act: Name of the activation.
        dropout: Probability of a dropped value at the end.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        norm: Callable[[int], Norm],
        act: str,
        dropout: float = 0.0,
    ):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = conv(spatial_dims, in_channels, out_channels, 3)
        layers["norm1"] = NormAct(norm(out_channels), act)
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        super().__init__(nn.Sequential(layers), None)


class ConvNeXtBlock(Block):
    """Depthwise convolution with a large kernel, then a two-layer perceptron per voxel.

    After Liu et al., 2022, with the norm and activation of the network.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        act: Name of the activation.
        kernel: Kernel size of the depthwise convolution, odd.
        expansion: Hidden channels of the perceptron as a multiple of `out_channels`.
        dropout: Probability of a dropped value before the last layer.
        zero_init: Start the last layer at zero, so that the block starts as its shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        norm: Callable[[int], Norm],
        act: str,
        kernel: int = 7,
        expansion: int = 4,
        dropout: float = 0.0,
        zero_init: bool = False,
    ):
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd, so that the size stays")
        hidden = expansion * out_channels
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["depthwise"] = conv(
            spatial_dims, in_channels, in_channels, kernel, groups=in_channels
        )
        layers["norm1"] = norm(in_channels)
        layers["expand"] = conv(spatial_dims, in_channels, hidden, 1)
        layers["act"] = activation(act)
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        layers["project"] = conv(spatial_dims, hidden, out_channels, 1)
        if zero_init:
            zero_(layers["project"])
        super().__init__(nn.Sequential(layers), shortcut(in_channels, out_channels, spatial_dims))


def shortcut(in_channels: int, out_channels: int, spatial_dims: int) -> nn.Module:
    """Identity where the channels agree, else a 1x1 convolution."""
    if in_channels == out_channels:
        return nn.Identity()
    return conv(spatial_dims, in_channels, out_channels, 1)


def zero_(layer: nn.Module) -> None:
    """Set every parameter of `layer` to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
