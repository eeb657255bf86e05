"""The diagonal Gaussian posterior and the heads that make it from the encoder's output.

Names: `mean`, `logvar` (log of the variance) and `std` never stand for one another.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.norm import wide

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # clamp of the log-variance in Stable Diffusion and MONAI


@dataclass(frozen=True)
class DiagonalGaussian:
    """Normal distribution with a mean and a variance per latent element.

    Args:
        mean: `(B, C, *spatial)`.
        logvar: Log of the variance, same shape.
    """

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation, `exp(logvar / 2)`."""
        return torch.exp(self.logvar / 2)

    def mode(self) -> Tensor:
        """Most likely latent, the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw `mean + std * noise`, differentiable in both.

        Args:
            generator: Source of the noise; the global one of the device when None.
        """
        std = self.std
        if generator is None:
            # Laid out contiguously, so that a seed gives one volume whatever the strides of `std`.
            noise = torch.randn_like(std, memory_format=torch.contiguous_format)
            return self.mean + noise * std
        noise = torch.randn(std.shape, generator=generator, dtype=std.dtype, device=std.device)
        return self.mean + noise * std

    def kl(self, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """KL divergence to the standard normal, in nats.

        `mean` averages over the batch and every latent element, in 2D and 3D alike, so a weight
        fitted at one patch size holds at another. `sum` adds the latent elements of a sample and
        averages over the batch, the convention of latent-diffusion codes; it is `mean` times the
        number of latent elements of a sample: a weight of 1e-6 on `sum` at a latent of 4x16x16x16
        is a weight of 1e-6 * 16384 = 0.016 on `mean`.

        Args:
            reduction: `mean`, `sum`, or `none` for one value per latent element.
        """
        kl = 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)
        if reduction == "none":
            return kl
        return kl.mean() if reduction == "mean" else kl.flatten(1).sum(1).mean()


class PosteriorHead(nn.Module):
    """Contract of a head: maps `num_moments * latent_channels` channels to a `DiagonalGaussian`."""

    num_moments: int

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, num_moments * C, *spatial)`."""
        raise NotImplementedError


class LogVarianceHead(PosteriorHead):
    """Second half of the channels is the log-variance, clamped (as in Stable Diffusion and MONAI).

    Args:
        min_logvar: Lower clamp.
        max_logvar: Upper clamp.
        init_logvar: Added before the clamp. A new network's own log-variance is near 0, that is
            noise as strong as the signal; -6 lets training begin with a std of 0.05.
    """

    num_moments = 2

    def __init__(
        self,
        min_logvar: float = MIN_LOGVAR,
        max_logvar: float = MAX_LOGVAR,
        init_logvar: float = 0.0,
    ):
        super().__init__()
        self.min_logvar, self.max_logvar = min_logvar, max_logvar
        self.init_logvar = init_logvar

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, 2 C, *spatial)`, in float32."""
        mean, logvar = wide(moments).chunk(2, dim=1)
        logvar = (logvar + self.init_logvar).clamp(self.min_logvar, self.max_logvar)
        return DiagonalGaussian(mean, logvar)


class SoftplusHead(PosteriorHead):
    """Second half of the channels is the standard deviation, through a softplus.

    Args:
        min_std: Added to it, so that its log stays finite.
    """

    num_moments = 2

    def __init__(self, min_std: float = 1e-4):
        super().__init__()
        if min_std <= 0:
            raise ValueError(f"min_std={min_std} must be positive, else the log-variance is -inf")
        self.min_std = min_std

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, 2 C, *spatial)`, in float32."""
        mean, raw = wide(moments).chunk(2, dim=1)
        return DiagonalGaussian(mean, 2 * torch.log(F.softplus(raw) + self.min_std))


class FixedStdHead(PosteriorHead):
    """All channels are the mean; the standard deviation is a constant.

    Args:
        std: Standard deviation of every latent element.
    """

    num_moments = 1

    def __init__(self, std: float = 0.5):
        super().__init__()
        if std <= 0:
            raise ValueError(f"std={std} must be positive")
        self.logvar = 2 * math.log(std)

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, C, *spatial)`, in float32."""
        mean = wide(moments)
        return DiagonalGaussian(mean, torch.full_like(mean, self.logvar))
