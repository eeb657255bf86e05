"""A bounded number of random slices of a volume, for networks that see images."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from vae3d.losses.term import add_up


def draw_slices(
    spatial_shape: tuple[int, ...], num_slices: int, step: int, seed: int = 0
) -> list[list[int]]:
    """Draw slice positions: a list of indices for each axis, as even between the axes as can be.

    The draw is a function of (seed, step) alone: all micro-batches and ranks of a step see the same
    positions, and a resumed run draws what the uninterrupted one would have.
    """
    draw = random.Random(f"slices {seed} {step}")
    dims = len(spatial_shape)
    picks: list[list[int]] = [[] for _ in range(dims)]
    first = draw.randrange(dims)
    for i in range(num_slices):
        axis = (first + i) % dims
        picks[axis].append(draw.randrange(spatial_shape[axis]))
    return picks


def take_slices(volume: Tensor, picks: list[list[int]]) -> list[Tensor]:
    """Cut slices out of `(B, C, X, Y, Z)`: one `(len(picks[axis]) * B, C, ...)` for each axis."""
    return [
        torch.cat([volume.select(2 + axis, index) for index in indices])
        for axis, indices in enumerate(picks)
        if indices
    ]


def mean_over_slices(values: list[Tensor], picks: list[list[int]]) -> Tensor:
    """Average one value for each axis, weighted by its number of slices."""
    counts = [len(indices) for indices in picks if indices]
    return add_up(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)
