"""The Kullback-Leibler term, and the controller that keeps the latents at unit scale."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from vae3d.losses.term import Term
from vae3d.models.norm import wide
from vae3d.models.posterior import DiagonalGaussian, Quantized

DEAD = 0.01  # variance of the posterior mean below which a channel is dead: Burda et al. 2016, 4.2
MAX_FACTOR = 1e4  # the controller moves the weight at most this far, up or down


class KL(Term):
    """KL divergence of the posterior from N(0, 1), in nats, mean over batch and latent elements.

    A mask is of voxels and says nothing of latents: all of them count, with one too. Codes (`FSQ`,
    `VQ`) have no divergence, and are trained without the term.

    The mean does not change with the patch size, so a weight tuned on 64^3 patches holds for 128^3.
    The convention 'sum over latents, mean over batch' of CompVis and MONAI is this value times the
    number of latent elements of a patch; its weight is ours divided by that number. For example,
    `kl_weight=1e-7` on 64^3 patches at factor 4 with 4 channels (16384 latent elements) is
    `weight=1.6e-3` here.

    Args:
        weight: Factor of the term in the total; the start value where `target_std` is given.
        warmup_steps: Steps over which the weight grows linearly from 0.
        free_bits: Nats per latent element that a channel of a sample may carry at no cost.
        target_std: Standard deviation that a controller steers the latents to by moving the
            weight; 1.0 suits latent diffusion. None keeps the weight.
        target_rate: Speed of the controller, in log(weight) per step and per log(std / target).
    """

    factor: Tensor
    weighted = True

    def __init__(
        self,
        weight: float = 1e-4,
        warmup_steps: int = 0,
        free_bits: float = 0.0,
        target_std: float | None = None,
        target_rate: float = 0.01,
    ):
        super().__init__(weight)
        if target_std is not None and not (target_std > 0 and weight > 0):
            raise ValueError(
                f"KL.target_std is {target_std} and KL.weight {weight}; both must be above 0"
            )
        self.warmup_steps = warmup_steps
        self.free_bits = free_bits
        self.target_std = target_std
        self.target_rate = target_rate
        self.register_buffer("factor", torch.ones(()))  # what the controller multiplies
        self._moments: Tensor | None = None  # of this step's micro-batches
        self._last_moments: Tensor | None = None

    def concerns(self, posterior: DiagonalGaussian) -> bool:
        """Whether the latents have a spread."""
        return not isinstance(posterior, Quantized)

    def forward(
        self,
        x: Tensor | None,
        recon: Tensor | None,
        posterior: DiagonalGaussian,
        step: int = 0,
        weight: object = None,
    ) -> Tensor:
        """Return the mean KL per latent element, a scalar in nats."""
        posterior = DiagonalGaussian(wide(posterior.mean), wide(posterior.logvar))
        self._measure(posterior.mean.detach(), posterior.logvar.detach())
        of_channels = self.of_channels(posterior)
        if not self.free_bits:
            return of_channels.mean()
        self.scalars["nats"] = of_channels.mean().detach()
        return self.beyond_free(of_channels)

    @staticmethod
    def of_channels(posterior: DiagonalGaussian) -> Tensor:
        """Mean KL per latent element of each channel of each sample, `(b, c)` in nats."""
        posterior = DiagonalGaussian(wide(posterior.mean), wide(posterior.logvar))
        return posterior.kl("none").flatten(2).mean(2)

    def beyond_free(self, nats: Tensor) -> Tensor:
        """The mean of them, where what is free costs as much as all of it."""
        return nats.clamp_min(self.free_bits).mean()

    def weight_at(self, step: int) -> Tensor:
        """Return the weight after `step` updates: warm-up times controller."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * warmup * self.factor

    def after_step(self) -> None:
        """Move the weight by the latents of the step, of all micro-batches and ranks together."""
        moments, self._moments = self._moments, None
        if moments is None:  # no training forward since the last call
            return
        if self.target_std is not None:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(moments)
            steered = self._steer(self.target_std, *_spread(moments))
            self.factor.copy_(torch.where(moments.isfinite().all(), steered, self.factor))
        self._last_moments = moments

    def dead_channels(self) -> list[int]:
        """Return the latent channels that said nothing in the last step (waits for the device)."""
        if self._last_moments is None:
            return []
        _, alive = _spread(self._last_moments)
        return (~alive).nonzero().flatten().tolist()

    def _measure(self, mean: Tensor, logvar: Tensor) -> None:
        """Add up count, sum of mean, of mean^2 and of variance of each channel."""
        mean, var = (t.transpose(0, 1).flatten(1) for t in (mean, logvar.exp()))  # (c, n)
        count = torch.full_like(mean[:, 0], mean.shape[1])
        moments = torch.stack((count, mean.sum(1), mean.square().sum(1), var.sum(1)))
        std, alive = _spread(moments)
        self.scalars = {"std": std.mean(), "dead_channels": (~alive).sum()}
        if self.target_std is not None:
            self.scalars["weight"] = self.weight * self.factor.clone()
        if self.training and torch.is_grad_enabled():
            self._moments = moments if self._moments is None else self._moments + moments

    def _steer(self, target: float, std: Tensor, alive: Tensor) -> Tensor:
        """Return the new factor: integral control of log(weight) by log(std / target).

        Dead channels have the standard deviation of the prior whatever the weight, so only live
        ones count; where none lives, the weight is too large.
        """
        gap = (std / target).log()
        gap = torch.where(alive, gap, 0).sum() / alive.sum().clamp_min(1)
        gap = torch.where(alive.any(), gap, -1.0)
        log_factor = self.factor.log() + self.target_rate * gap
        limit = math.log(MAX_FACTOR)
        return log_factor.clamp(-limit, limit).exp()


def _spread(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's standard deviation of z, and whether its mean varies at all."""
    count, mean, square, var = moments
    var_of_mean = (square / count - (mean / count) ** 2).clamp_min(0)
    return (var_of_mean + var / count).sqrt(), var_of_mean > DEAD
