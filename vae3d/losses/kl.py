"""The Kullback-Leibler term: how much the latents say beyond a standard normal."""

from __future__ import annotations

from torch import Tensor

from vae3d.losses.term import Term


class KL(Term):
    """KL divergence of the posterior from N(0, 1), in nats, mean over batch and latent elements.

    The mean does not change with the patch size, so a weight tuned on 64^3 patches holds for 128^3.
    The convention 'sum over latents, mean over batch' of CompVis and MONAI is this value times the
    number of latent elements of a patch; its weight is ours divided by that number. For example,
    `kl_weight=1e-7` on 64^3 patches at factor 4 with 4 channels (16384 latent elements) is
    `weight=1.6e-3` here.

    Args:
        weight: Factor of the term in the total.
        warmup_steps: Steps over which the weight grows linearly from 0.
    """

    def __init__(self, weight: float = 1e-4, warmup_steps: int = 0):
        super().__init__(weight)
        self.warmup_steps = warmup_steps

    def forward(self, x: Tensor | None, recon: Tensor | None, posterior, step: int = 0) -> Tensor:
        """Return the mean KL per latent element, a scalar in nats."""
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()

    def weight_at(self, step: int) -> float:
        """Return the weight after `step` updates of warm-up."""
        return self.weight * min(1.0, (step + 1) / self.warmup_steps if self.warmup_steps else 1.0)
