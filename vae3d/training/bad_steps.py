"""Steps whose loss or gradient is not finite: which tensor was the first, and of which volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.kernels.precision import Amp, autocast
from vae3d.training.task import Task


def first_bad(
    task: Task,
    window: Sequence[Any],
    step: int,
    device: torch.device,
    amp: Amp,
    sources: Callable[[Any], list[str]] | None = None,
    run_again: bool = True,
) -> str:
    """Run a window again and name the first tensor that is not finite, and its volumes.

    Args:
        task: What is trained.
        window: The micro-batches of the step.
        step: Its number.
        device: Where the task is.
        amp: off | bf16 | fp16.
        sources: `sources(batch) -> names` of the volumes in a batch.
        run_again: Look at the inputs alone where False.

    Returns:
        What was found, empty where nothing was.
    """
    for batch in window:
        batch = batch.to(device)
        names = f" for {', '.join(sources(batch))}" if sources else ""
        if not batch.image.isfinite().all():
            return f"the input is not finite{names}"
        if run_again and (found := first_in_batch(task, batch, step, device, amp)):
            return f"first {found}{names}"
    return ""


def first_in_batch(task: Task, batch: Any, step: int, device: torch.device, amp: Amp) -> str:
    """Name the first output, term or gradient of one batch that is not finite, if there is one."""
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(bad, name))
        for name, module in task.named_modules()
        if not list(module.children())
    ]
    with autocast(device, amp):
        values = task(batch, step)
    for hook in hooks:
        hook.remove()
    bad += [name for name, value in values.items() if not value.isfinite().all()]
    if bad:
        return bad[0]
    values["loss"].backward()
    for name, p in task.named_parameters():
        if p.grad is not None and not p.grad.isfinite().all():
            return f"the gradient of {name}"
    return ""


def _watch(bad: list[str], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not bad and not output.isfinite().all():
            bad.append(f"the output of {name}")

    return hook
