"""Precision of the networks in training: what a device multiplies, and float16 kept in range."""

from __future__ import annotations

import torch
from torch import Tensor

from vae3d.kernels.precision import Amp
from vae3d.kernels.steps import compute_dtype


def native_amp(device: torch.device) -> Amp:
    """Precision that trains fast at no risk: bf16 where a device multiplies it natively, or off.

    Args:
        device: Where the training is.
    """
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fits = device.type == "cpu" and compute_dtype(torch.bfloat16) == torch.bfloat16
    return "bf16" if fits else "off"


class LossScaler:
    """Keeps float16 gradients in range: doubles after 2000 good steps, halves after a bad one.

    The rule of `torch.amp.GradScaler`, without reading the device: the trainer divides by `factor`
    while it clips.

    Args:
        device: Where the factor lives.
        enabled: Otherwise the factor is 1 and stays so.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.factor = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to call backward on."""
        return loss * self.factor if self.enabled else loss

    def update(self, bad: Tensor) -> None:
        """Move the factor after a step; `bad` is 1 where the step was dropped."""
        if not self.enabled:
            return
        self.good_steps = (self.good_steps + 1) * (1 - bad)
        grow = self.good_steps >= 2000
        self.factor = torch.where(bad > 0, self.factor / 2, self.factor * (1 + grow.float()))
        self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Factor and count, for a checkpoint."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint, unless precision was changed meanwhile."""
        if self.enabled:
            self.factor = state["factor"].to(self.factor.device)
            self.good_steps = state["good_steps"].to(self.factor.device)
