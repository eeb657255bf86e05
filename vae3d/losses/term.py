"""What every term of the loss has in common."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from vae3d.models.posterior import DiagonalGaussian

# Standard normal numbers `(B, *shape)` for a shape and a word that tells them from others: a
# function of sample and step alone, so that micro-batches and ranks draw what a large batch draws.
Normal = Callable[[Sequence[int], str], Tensor]


@dataclass(frozen=True)
class Decoding:
    """How a reconstruction came about, for terms that ask for it (`Term.decodes`).

    Args:
        z: Latent drawn from the posterior, `(B, c, x, y, z)`, with its gradient.
        decoded: The latent that was decoded: `z`, unless a `Disturbance` has changed it.
        decode: The network's decoder, for latents of any spatial size; call it under the caller's
            autocast. Sizes come out as multiples of the network's factor.
    """

    z: Tensor
    decoded: Tensor
    decode: Callable[[Tensor], Tensor]


class Term(nn.Module):
    """One term of the loss: a scalar, its weight and its name.

    Write a term of your own by deriving from this class; `forward` is all it needs, and a YAML
    names it under `loss.extra` (see `vae_loss.py`).

    A term is the *mean over the samples of the batch* of something that each sample has by itself.
    Accumulated micro-batches and ranks then add up to the large batch to float rounding.

    A mask comes as `weight`, whose mean over all samples of an update is 1: the mean of
    `weight * distance` over voxels is then `sum(w e) / sum(w)` over that update, however it is cut
    into micro-batches and ranks, and 0 where no voxel counts. What counts 0 is 0 in `x` and in
    `recon`. A term that takes the `weight` says so by `weighted`; others are refused with a mask.

    Attributes:
        weighted: Whether `forward` takes a `weight`.
        autocast: Whether the term runs under the caller's autocast. Formulas stay in float32
            (False); terms that run a network set True and bring their own float32 islands.
        scalars: What else the term measured in its last call, detached, for the log.
    """

    autocast = False
    weighted = False
    decodes = False

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight of {type(self).__name__} is {weight}; it must be 0 or more")
        self.weight = weight
        self.scalars: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """Name of the term in logs and dashboards: its class in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def precision(self) -> float | Tensor:
        """Inverse variance of the likelihood, where the term is one (`LearnedVariance`)."""
        return 1.0

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: DiagonalGaussian,
        step: int,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the unweighted term.

        Args:
            x: The input, float32, `(B, C, X, Y, Z)` or `(B, C, X, Y)`.
            recon: Its reconstruction, same shape, float32, not clamped.
            posterior: Posterior of the latents with `mean` and `logvar`, each `(B, c, x, y, z)`.
            step: Number of optimizer updates done before this one.
            weight: How much each voxel counts, `(B, 1 or C, X, Y, Z)`, 1 on average; None for all
                alike. A term that is not `weighted` may leave the parameter out.
        """
        raise NotImplementedError

    def concerns(self, posterior: DiagonalGaussian) -> bool:
        """Whether the term is of such latents; those that it is not of are trained without it."""
        return True

    def check(self, shape: Sequence[int]) -> None:
        """Refuse volumes that the term cannot be taken of; called before anything is read.

        Args:
            shape: `(C, X, Y, Z)` or `(C, X, Y)` of a sample.

        Raises:
            ValueError: In one line, with the option that helps.
        """

    def check_latent(self, shape: Sequence[int], latent: Sequence[int]) -> None:
        """Refuse latents that the term cannot be taken of; called as `check` is, where they matter.

        Args:
            shape: `(C, X, Y, Z)` or `(C, X, Y)` of a sample.
            latent: The same of its latent.
        """

    def weight_at(self, step: int) -> float | Tensor:
        """Return the weight of the term at a step; a tensor where only the device knows it."""
        return self.weight

    def after_step(self) -> None:
        """Update what the term controls, once an optimizer update; every rank calls it."""


class Disturbance(Term):
    """What is decoded in training instead of the drawn latent; it has no value and no weight.

    Stands in `loss.extra` like a term. Several follow one another.
    """

    def __init__(self) -> None:
        super().__init__()

    def disturb(self, z: Tensor, normal: Normal) -> Tensor:
        """Return what is decoded instead of `z`.

        Args:
            z: Latent `(B, c, x, y, z)`.
            normal: Source of everything random.
        """
        raise NotImplementedError


def in_float32(device_type: str, unless: bool = False) -> AbstractContextManager[object]:
    """Leave autocast for formulas; what runs a network stays under the caller's."""
    return nullcontext() if unless else torch.autocast(device_type, enabled=False)


def mean(distance: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of a distance; with weights of mean 1, the weighted one."""
    return distance.mean() if weight is None else (distance * weight).mean()


def add_up(values: Iterable[Tensor]) -> Tensor:
    """Sum of one or more tensors; Python's own `sum` begins from an int."""
    return reduce(operator.add, values)
