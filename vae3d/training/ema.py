"""Exponential moving average of the weights: what validation measures and what users load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vae3d.models.norm import wide
from vae3d.training.sharding import part


class EMA:
    """Average of a module's parameters in float32 or float64, with a warm-up of the decay.

    Buffers are those of the module, as it validates and as it is saved: running statistics, and the
    codebook of `VQ`, are running means themselves.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage: early averages are not held back by the initial weights.

    Args:
        module: The network that is averaged. It is read, never written, except in `applied`. What
            is frozen is its own average.
        decay: Decay once warm, 0 <= decay < 1. 0 keeps a copy of the last weights.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, not {decay}")
        self.module = module
        self.decay = decay
        self.params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: wide(p.detach()).clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Move the average towards the present weights.

        Args:
            step: Number of updates done before this one.
            skip: Scalar on the parameters' device; 1 where the step was dropped, and then nothing
                moves. A tensor, because reading it here would make the GPU wait.
        """
        weight: Tensor | float = 1.0 - min(self.decay, (1 + step) / (10 + step))
        if skip is not None:
            weight = weight * (1.0 - skip)
        # One by one: each goes in place, where the list forms would hold a second copy of them all.
        for name, p in self.params.items():
            self.shadow[name].lerp_(wide(p), weight)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Lend the averaged weights to the module: `with ema.applied() as model: ...`."""
        self._swap()
        try:
            yield self.module
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.params.items():
            mine = self.shadow[name]
            self.shadow[name] = wide(p.detach()).clone()
            p.copy_(mine)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights that the module's own `load_state_dict` takes, buffers included."""
        return {**self.module.state_dict(), **self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over an average written by `state_dict`."""
        for name, mine in self.shadow.items():
            mine.copy_(part(state[name], mine))
