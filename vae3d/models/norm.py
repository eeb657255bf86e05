"""Normalization and activation: the one place where statistics over a volume are taken.

Every norm computes in float32 (float64 stays float64) whatever the input is, and gives back the
input's dtype, so that autocast and half-precision models are safe.
Axes: b batch, c channels, x y z space.
"""

import threading
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from vae3d.kernels.steps import NormParts, Preparation

T = TypeVar("T")

ACTIVATIONS: dict[str, type[nn.Module]] = {
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
        # Contiguous: torch's channels-last kernel loses digits on the CPU as volumes grow.
        return F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)


class InstanceNorm(GroupNorm):
    """Instance normalization: every channel of every sample on its own.

    Args:
        channels: Channels of the input.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, num_groups=channels, eps=eps)


class BatchNorm(Norm):
    """Batch normalization; under distributed training the batch is that of all ranks.

    Args:
        channels: Channels of the input.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics, which evaluation uses.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(channels)
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize over batch and voxels, or by the running statistics in evaluation."""
        mean, var = self.batch_statistics(x) if self.training else self.running_statistics(x)
        scale = self.weight.to(x.dtype) * torch.rsqrt(var + self.eps)
        shift = self.bias.to(x.dtype) - mean * scale
        per_channel = (1, -1, *(1,) * (x.dim() - 2))
        return x * scale.view(per_channel) + shift.view(per_channel)

    def running_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel gathered in training."""
        return self.running_mean.to(x.dtype), self.running_var.to(x.dtype)

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel over batch, voxels and ranks; updates the running ones."""
        axes = (0, *range(2, x.dim()))
        count = x.new_full((), x.numel() / self.channels)  # filled there: a GPU need not wait
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Variance round the common mean, in two exchanges, does not cancel as E[x^2] would.
            totals = all_reduce(torch.cat([x.sum(axes), count[None]]))
            count = totals[-1].detach()
            mean = totals[:-1] / count
            centered = x - mean.view(1, -1, *(1,) * (x.dim() - 2))
            var = all_reduce(centered.square().sum(axes)) / count
        else:
            var, mean = torch.var_mean(x, axes, correction=0)
        self.remember(mean, var, count)
        return mean, var

    @torch.no_grad()
    def remember(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics by those of a batch of so many voxels."""
        if not _state.recomputing:
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class RMSNorm(Norm):
    """Root-mean-square norm over the channels of each voxel (Zhang and Sennrich, 2019).

    No voxel sees another, so tiles with a halo give exactly the full volume's result.

    Args:
        channels: Channels of the input.
        eps: Added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def normalize(self, x: Tensor) -> Tensor:
        """Divide each voxel by the root mean square of its channels."""
        weight = self.weight.to(x.dtype).view(1, -1, *(1,) * (x.dim() - 2))
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * weight


class NoNorm(Norm):
    """No normalization.

    Args:
        channels: Channels of the input.
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


class NormAct(Preparation):
    """A norm followed by an activation, both in float32; the unit that fast steps replace.

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

    def repeatable(self) -> bool:
        """Whether both are ours and have no state, which a subclass might."""
        ours = (GroupNorm, InstanceNorm, RMSNorm, NoNorm)
        return type(self) is NormAct and type(self.norm) in ours

    def parts(self) -> NormParts | None:
        """The norm's options and parameters, and the activation; None for another norm."""
        norm = self.norm
        if type(self) is not NormAct:
            return None
        if type(norm) is GroupNorm or type(norm) is InstanceNorm:
            return NormParts(norm.num_groups, norm.eps, norm.weight, norm.bias, self.act)
        if type(norm) is RMSNorm:
            return NormParts(0, norm.eps, norm.weight, None, self.act)
        return None


def activation(name: str) -> nn.Module:
    """Build an activation from its name in `ACTIVATIONS`."""
    return named(ACTIVATIONS, name, "act")()


def named(choices: dict[str, T], name: str, option: str) -> T:
    """Look `name` up, or say which names there are.

    Args:
        choices: The values by name.
        name: The name that the user gave.
        option: The option it was given for.
    """
    if name not in choices:
        raise ValueError(f"{option}={name!r} is not one of {', '.join(choices)}")
    return choices[name]


def wide(x: Tensor) -> Tensor:
    """Cast half precision up to float32; float32 and float64 pass through."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _State(threading.local):
    recomputing = False  # of this thread; the backward pass has its own


_state = _State()


class recomputing:
    """Mark a forward pass as a repetition, so that running statistics are not updated twice.

    A class, since `contextmanager` can be entered once only: a graph that is walked more than once
    (for the adaptive weight of an adversarial loss) is repeated as often.
    """

    def __enter__(self) -> None:
        _state.recomputing = True

    def __exit__(self, *_: object) -> None:
        _state.recomputing = False
