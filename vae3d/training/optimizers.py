"""The parts of a task that are trained, each with an optimizer, and what DDP makes of them."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vae3d.training.task import Task

# Buffers change in `after_step` alone, the same on every rank; torch 2.13 renamed the switch.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


def parts_of(task: Task) -> dict[str, tuple[nn.Module, list[nn.Parameter]]]:
    """The modules that have an optimizer each, with the parameters it owns."""
    discriminator = task.discriminator
    theirs = list(discriminator.parameters()) if discriminator is not None else []
    owned = {id(p) for p in theirs}
    ours = [p for p in task.parameters() if p.requires_grad and id(p) not in owned]
    parts: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {"generator": (task, ours)}
    if discriminator is not None and theirs:
        parts["discriminator"] = discriminator, theirs
    return parts


class FusedAdamW(torch.optim.AdamW):
    """AdamW whose kernel divides the gradients as it reads them, and can drop a step by itself.

    Attributes:
        grad_scale: What the gradients are divided by.
        found_inf: 1 where the step is dropped, else 0.
    """

    grad_scale: Tensor
    found_inf: Tensor

    @property
    def kernel_scales(self) -> bool:
        """Whether the kernel of this device heeds both; that of MPS passes over them."""
        return self.param_groups[0]["params"][0].device.type != "mps"

    def step_unless(self, bad: Tensor) -> None:
        """Update by the gradients divided by `grad_scale`; where `bad` is 1, change nothing."""
        if self.kernel_scales:
            self.found_inf = bad
        elif bad:
            return
        else:
            for gradient in gradients(self):
                gradient.div_(self.grad_scale)
            del self.grad_scale
        self.step()


def adamw(
    params: list[nn.Parameter], lr: float, betas: tuple[float, float], decay: float
) -> FusedAdamW:
    """AdamW that decays kernels and matrices, not norms and biases."""
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return FusedAdamW([g for g in groups if g["params"]], lr, betas, fused=True)


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients that an optimizer is about to use."""
    return [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]


def distributed(task: Task, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Wrap each part by itself. DDP leaves out what is frozen: each parameter has one owner.

    Args:
        task: What is trained.
        networks: Its parts by name.
    """
    wrapped: dict[str, nn.Module] = {}
    for name, module in networks.items():
        if name == "generator" and task.discriminator is not None:
            task.discriminator.requires_grad_(False)
        wrapped[name] = DistributedDataParallel(
            module, gradient_as_bucket_view=True, **_KEEP_BUFFERS
        )
        if task.discriminator is not None:
            task.discriminator.requires_grad_(True)
    return wrapped
