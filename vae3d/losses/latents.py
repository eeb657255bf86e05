"""Terms that make latents which a diffusion model learns: see docs/two_stages.md.

Two compare (`SpectrumMatching`, `ScaleEquivariance`); two change what is decoded in training
(`NoiseRobust`, `StructuredChannels`), and every other term then sees that reconstruction. None of
them turns or mirrors anything: a body is not its mirror image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vae3d.losses.reconstruction import L1
from vae3d.losses.term import Decoding, Disturbance, Normal, Term, in_float32
from vae3d.models.norm import wide
from vae3d.models.posterior import DiagonalGaussian
from vae3d.spectrum import counted, padded, pooled_to, resized, spectral_gap


class SpectrumMatching(Term):
    """Latents whose power falls with frequency as the input's does, only flatter.

    Ning et al. 2026, arXiv 2603.14645, encoding spectrum matching, in rings of 3D (or 2D)
    frequencies: KL of the latent's spectrum from the input's times f^delta, see
    `vae3d.spectrum.spectral_gap`. The gradient reaches the encoder alone.

    Args:
        weight: Factor of the term in the total.
        delta: How much flatter than the input's the latent's spectrum is to be; 0 for as steep.
        bins: Rings of frequencies.
    """

    decodes = True

    def __init__(self, weight: float = 0.01, delta: float = 1.0, bins: int = 16):
        super().__init__(weight)
        self.delta, self.bins = delta, bins

    def forward(
        self,
        x: Tensor,
        recon: Tensor | None,
        posterior: object = None,
        step: int = 0,
        weight: object = None,
        *,
        decoding: Decoding | None = None,
    ) -> Tensor:
        """Return the divergence in nats, mean over samples."""
        assert decoding is not None
        z = wide(decoding.z)
        return spectral_gap(pooled_to(x, z.shape[2:]), z, self.delta, self.bins).mean()


class ScaleEquivariance(Term):
    """A latent at a smaller size decodes to the input at a smaller size: d(D(S z), S x).

    Skorokhodov et al. 2025, arXiv 2502.14831. S is linear and shrinks by a whole number, drawn for
    each step. It takes a second, small decode; the gradient reaches encoder and decoder.

    Args:
        weight: Factor of the term in the total.
        shrink: Least and most that every axis shrinks.
        distance: The distance d, a term of its own; its weight does not count.
    """

    autocast = True
    decodes = True

    def __init__(
        self,
        weight: float = 0.25,
        shrink: tuple[int, int] = (2, 4),
        distance: Callable[[], Term] = L1,
    ):
        super().__init__(weight)
        if shrink[0] > shrink[1]:
            raise ValueError(f"ScaleEquivariance.shrink is {list(shrink)}; give the least first")
        self.shrink, self.distance = shrink, distance()
        if self.distance.decodes or isinstance(self.distance, Disturbance):
            name = type(self.distance).__name__
            raise ValueError(
                f"ScaleEquivariance.distance is {name}, which does not compare two volumes; take "
                "L1, L2 or another distance"
            )
        self.weighted = self.distance.weighted

    def check_latent(self, shape: Sequence[int], latent: Sequence[int]) -> None:
        """See `Term`."""
        cells = [-(-n // m) for n, m in zip(shape[1:], latent[1:], strict=True)]
        for by in range(self.shrink[0], self.shrink[1] + 1):
            size = [m * f for m, f in zip(self._small(latent[1:], by), cells, strict=True)]
            try:
                self.distance.check((shape[0], *size))
            except ValueError as error:
                where = f"ScaleEquivariance.distance at 1/{by} of the size"
                raise ValueError(f"{where}: {error}; or a smaller shrink") from error

    @staticmethod
    def _small(grid: Sequence[int], by: int) -> list[int]:
        """The grid of a latent that is shrunk."""
        return [max(n // by, 1) for n in grid]

    def forward(
        self,
        x: Tensor,
        recon: Tensor | None,
        posterior: DiagonalGaussian,
        step: int = 0,
        weight: Tensor | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> Tensor:
        """Return the distance at the size of this step, mean over samples."""
        assert decoding is not None
        z = decoding.z
        by = random.Random(f"scale {step}").randint(*self.shrink)
        grid = self._small(z.shape[2:], by)
        with in_float32(z.device.type):
            small = resized(wide(z), grid)
        got = decoding.decode(small)
        cells = zip(got.shape[2:], grid, z.shape[2:], strict=True)
        whole = [n // m * of for n, m, of in cells]  # of the volume that z stands for, padding too
        with in_float32(z.device.type, unless=self.distance.autocast):
            wanted, got = resized(padded(x, whole), got.shape[2:]), wide(got)
            if weight is None:
                return self.distance(wanted, got, posterior, step)
            # Where some of the voxels behind one do not count, it says nothing.
            weight = padded(weight, whole)
            behind = counted(weight > 0, got.shape[2:])
            weight = resized(weight, got.shape[2:]) * behind
            seen = weight > 0
            wanted, got = torch.where(seen, wanted, 0.0), torch.where(seen, got, 0.0)
            return self.distance(wanted, got, posterior, step, weight)


class NoiseRobust(Disturbance):
    """Decode (1 - t) z + t g eps, t uniform in [0, 1) for each sample, instead of z.

    Yang et al. 2025 (l-DeTok), arXiv 2507.15856: latents that tell what they stand for through the
    noise that a diffusion model takes off. The gradient reaches encoder and decoder.

    Args:
        strength: Standard deviation g of the noise; 3 is the paper's, for latents of unit scale.
    """

    def __init__(self, strength: float = 3.0):
        super().__init__()
        self.strength = strength

    def disturb(self, z: Tensor, normal: Normal) -> Tensor:
        """See `Disturbance`."""
        t = _uniform(normal, z)
        return (1 - t) * z + t * self.strength * normal(z.shape[1:], "noise")


class StructuredChannels(Disturbance):
    """Decode the first c' channels of each sample, the others 0, instead of all.

    Chen et al. 2025 (DC-AE 1.5), arXiv 2508.00413: first channels then hold what is coarse. c' is
    uniform from `smallest` to all; channels that are left out get no gradient.

    Args:
        smallest: Channels that are never left out.
    """

    def __init__(self, smallest: int = 1):
        super().__init__()
        self.smallest = smallest

    def check_latent(self, shape: Sequence[int], latent: Sequence[int]) -> None:
        """See `Term`."""
        if self.smallest > latent[0]:
            raise ValueError(
                f"StructuredChannels.smallest is {self.smallest}; the latent has {latent[0]} "
                "channels"
            )

    def disturb(self, z: Tensor, normal: Normal) -> Tensor:
        """See `Disturbance`."""
        channels = z.shape[1]
        drawn = (_uniform(normal, z) * (channels - self.smallest + 1)).floor() + self.smallest
        place = torch.arange(channels, device=z.device).reshape(-1, *[1] * (z.ndim - 2))
        return torch.where(place < drawn, z, 0.0)


def _uniform(normal: Normal, like: Tensor) -> Tensor:
    """A number in [0, 1) for each sample, `(B, 1, ...)`."""
    drawn = torch.special.ndtr(normal((1,), "share")).clamp_max(1 - 1e-6)
    return drawn.reshape(-1, *[1] * (like.ndim - 1))
