"""Normalization and activation: the one place where statistics over a volume are taken.

Every norm computes in float32 (float64 stays float64) whatever the input is, and gives back the
input's dtype, so that autocast and half-precision models are safe.
Axes: b batch, c channels, x y z space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "none": nn.Identity,
}


class Norm(nn.Module):
    """Contract of a norm: `Norm(channels, **options)`, keeps shape and dtype of `(B, C, *spatial)`.

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` in float32 and return it in its own dtype."""
        return self.normalize(wide(x)).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """The norm itself, on float32 or float64 input."""
        raise NotImplementedError


class GroupNorm(Norm):
    """Group normalization (Wu and He, 2018): mean and variance per sample and group of channels.

    Args:
        channels: Channels of the input, a multiple of `num_groups`.
        num_groups: Groups of channels that share their statistics.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, num_groups: int = 32, eps: float = 1e-6):
        super().__init__(channels)
        if channels % num_groups:
            raise ValueError(
                f"num_groups={num_groups} does not divide {channels} channels;"
                " choose channels that are multiples of it, or fewer groups"
            )
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize over the voxels of each group, then scale and shift per channel."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class NormAct(nn.Module):
    """A norm followed by an activation, both in float32; the unit that fast kernels replace.

    Args:
        norm: The norm, already built for its channels.
        act: Name of the activation, see `ACTIVATIONS`.
    """

    def __init__(self, norm: Norm, act: str):
        super().__init__()
        self.norm = norm
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Return `act(norm(x))` in the dtype of `x`."""
        return self.act(self.norm(wide(x))).to(x.dtype)


def activation(name: str) -> nn.Module:
    """Build an activation from its name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def wide(x: Tensor) -> Tensor:
    """Cast half precision up to float32; float32 and float64 pass through."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
