"""The commitment term: what draws an encoder to the codebook that follows it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vae3d.losses.term import Term
from vae3d.models.norm import wide
from vae3d.models.posterior import DiagonalGaussian, Quantized


class Commitment(Term):
    """Squared distance of what the encoder gives from its code, mean over all latent elements.

    Van den Oord et al. 2017, arXiv 1711.00937: the codebook stays where it is, so that the gradient
    reaches the encoder alone. Taken of latents of `VQ`, and of no other. A mask is of voxels and
    says nothing of latents: all of them count, with one too.

    Args:
        weight: Factor of the term in the total, the paper's beta.
    """

    weighted = True

    def __init__(self, weight: float = 0.25):
        super().__init__(weight)

    def concerns(self, posterior: DiagonalGaussian) -> bool:
        """Whether the latents follow a learned codebook."""
        return isinstance(posterior, Quantized) and posterior.encoded is not None

    def forward(
        self,
        x: Tensor | None,
        recon: Tensor | None,
        posterior: DiagonalGaussian,
        step: int = 0,
        weight: object = None,
    ) -> Tensor:
        """Return the mean squared distance."""
        assert isinstance(posterior, Quantized) and posterior.encoded is not None
        return F.mse_loss(wide(posterior.encoded), wide(posterior.mean.detach()))
