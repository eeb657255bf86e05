"""Where latents are drawn from when there is no diffusion model: Gaussians over latent space."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from vae3d.stage2.latents import LatentStore

Kind = Literal["gaussian", "joint", "standard"]
PRIORS = ("gaussian", "joint", "standard")


class GaussianPrior:
    """A Gaussian over the latents of a folder.

    `gaussian` has the mean and standard deviation of each channel and no correlation: what the
    decoder gets is noise of the right size. `joint` has the mean of each latent value and the
    covariance of all of them, as the training subjects give it: what the decoder gets is a mean
    anatomy with variations; all subjects must share one grid. `standard` is N(0, 1), what a VAE
    that has reached its prior would follow, for comparison.

    Args:
        store: Latents of the training subjects.
        kind: gaussian | joint | standard.
    """

    def __init__(self, store: LatentStore, kind: Kind):
        if kind not in PRIORS:
            raise ValueError(f"prior {kind!r} is unknown; choose one of {', '.join(PRIORS)}")
        self.store, self.kind = store, kind
        if kind == "joint":
            shapes = {store.shape(i) for i in range(len(store))}
            if len(shapes) > 1 or len(store) < 2:
                raise ValueError(
                    "prior joint needs two subjects or more on one grid; these have "
                    f"{len(store)} on {len(shapes)} grids: use --prior gaussian"
                )
            means = [self._posterior(i)[0] for i in range(len(store))]
            self.center = reduce(operator.add, means) / len(means)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw a latent `(C, *spatial)` as the VAE decodes it.

        Args:
            shape: `(C, *spatial)`.
            generator: Source of the noise, on the CPU.
        """
        if self.kind == "joint":
            if tuple(shape) != tuple(self.center.shape):
                raise ValueError(
                    f"--grid {list(shape[1:])}: prior joint has the grid of the training latents, "
                    f"{list(self.center.shape[1:])}"
                )
            return self._draw_joint(generator)
        noise = torch.randn(tuple(shape), generator=generator)
        return noise if self.kind == "standard" else self.store.statistics.restore(noise)

    def _draw_joint(self, generator: torch.Generator) -> Tensor:
        """Weighted sum of deviations: its covariance is the sample covariance, never formed."""
        count = len(self.store)
        weights = torch.randn(count, generator=generator) / (count - 1) ** 0.5
        z, variance = self.center.clone(), torch.zeros_like(self.center)
        for index, weight in enumerate(weights):
            mean, logvar = self._posterior(index)
            z += weight * (mean - self.center)
            variance += logvar.exp() / count
        return z + variance.sqrt() * torch.randn(z.shape, generator=generator)

    def _posterior(self, index: int) -> tuple[Tensor, Tensor]:
        mean, logvar = torch.from_numpy(self.store.read(index)).chunk(2)
        return mean, logvar
