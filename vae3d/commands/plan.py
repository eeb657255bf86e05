"""`vae3d plan RECIPE.yaml`: what a recipe costs, before a run is begun."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


def plan(
    recipe: str,
    /,
    *,
    patch_size: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    memory_gb: float | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Show parameters, latent shape and memory of a training recipe, before a run is begun.

        vae3d plan ixi_t1
        vae3d plan ixi_t1 --patch_size '[96,96,96]' --memory_gb 24

    Memory is measured by taking a training step on this device; the patch that fits is
    extrapolated from two patch sizes.

    Args:
        recipe: YAML file with the options of train_3d.py, a run's config.yaml, or a recipe's name.
        patch_size: Patch per axis [voxels]; null for the recipe's.
        batch_size: Patches in a micro-batch; null for the recipe's.
        memory_gb: Memory that a patch has to fit into [GB]; null for most of what is free.
        device: auto | cpu | cuda | mps.
    """
    import torch

    from vae3d.commands.train import check_sizes, train_3d
    from vae3d.config import parse
    from vae3d.recipes import find_recipe
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import Trial, budget_bytes, telling_of_memory
    from vae3d.training.precision import native_amp
    from vae3d.training.task import VAETask

    recipe = find_recipe("train", recipe)
    options = parse(train_3d, ["--config", recipe, "--data.root", "-", "--out_dir", "-"])
    patch = tuple(patch_size or options["patch_size"])
    if batch_size is None:
        batch_size = 1 if options["batch_size"] == "auto" else options["batch_size"]
    vae = options["model"]()
    check_sizes(vae, "full", patch)
    vae.set_checkpointing(options["checkpointing"])

    with open_world(device) as world, telling_of_memory("--batch_size", "--patch_size"):
        task = VAETask(vae, options["loss"]()).to(world.device)
        amp, dtype = options["amp"] or native_amp(world.device), torch.float32
        smaller = tuple(max(n // 2 // f, 1) * f for n, f in zip(patch, vae.factor, strict=True))
        peaks = {
            size: Trial(task, (vae.in_channels, *size), amp).peak_bytes(batch_size)
            for size in (patch, smaller)
        }
        budget = memory_gb * 1e9 if memory_gb else budget_bytes(world.device)

    latent = tuple(n // f for n, f in zip(patch, vae.factor, strict=True))
    shrink = math.prod(vae.factor) * vae.in_channels / vae.latent_channels
    fits = largest_patch(peaks, vae.factor, budget)
    for name, fact in {
        "parameters": f"{count(vae):.2f} M (encoder {count(vae.encoder):.2f} M, "
        f"decoder {count(vae.decoder):.2f} M), {count(vae) * dtype.itemsize:.1f} MB",
        "factor": times(vae.factor),
        "latent": f"{vae.latent_channels} x {times(latent)} for a patch of {times(patch)}",
        "compression": f"{shrink:.3g} input numbers for one latent number",
        "memory": f"{peaks[patch] / 1e9:.2f} GB for {batch_size} x {times(patch)} with amp {amp} "
        f"and checkpointing {options['checkpointing']} on {world.device.type}",
        f"fits {budget / 1e9:.3g} GB": f"patch {times(fits)} with batch {batch_size}"
        if fits
        else f"no patch at all with batch {batch_size}",
    }.items():
        print(f"{name:<14}{fact}")


def largest_patch(
    peaks: dict[tuple[int, ...], int], factor: Sequence[int], budget: float
) -> tuple[int, ...] | None:
    """Return the largest cube-like patch that fits, by a line through two measured patches.

    Args:
        peaks: Memory of two patches [bytes], by patch.
        factor: What the patch must be a multiple of, per axis.
        budget: Memory to fit into [bytes].
    """
    (small, low), (large, high) = sorted((math.prod(size), peak) for size, peak in peaks.items())
    slope = max(high - low, 1) / max(large - small, 1)
    voxels = (budget - (low - slope * small)) / slope
    side = math.lcm(*factor)
    edge = int(max(voxels, 0) ** (1 / len(factor)) / side) * side
    return (edge,) * len(factor) if edge else None


def count(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def times(sizes: Sequence[int]) -> str:
    """Sizes as `64 x 64 x 64`."""
    return " x ".join(map(str, sizes))
