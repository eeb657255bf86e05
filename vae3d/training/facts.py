"""What a run is about to do, in a few lines for the terminal and the dashboard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vae3d.models.custom_vae import CustomVAE


def facts(
    vae: CustomVAE,
    store: Any,
    split: dict[str, list[str]],
    loader: Any,
    world: Any,
    grad_accum: int,
    amp: str,
) -> dict[str, str]:
    """Return what was found and what will happen, one fact a line.

    Args:
        vae: The network, on its device.
        store: All volumes.
        split: Their ids by part.
        loader: Patches of the training volumes on this rank.
        world: The ranks.
        grad_accum: Micro-batches of one update.
        amp: off | bf16 | fp16.
    """
    shapes = [store.shape(i)[1:] for i in range(len(store))]
    spacing = times([float(f"{mm:.3g}") for mm in store.spacing_mm(0)])
    plan = loader.plan
    size = plan.patch_size or largest(shapes)
    latent = [math.ceil(n / f) for n, f in zip(size, vae.factor, strict=True)]
    shrink = math.prod(size) * vae.in_channels / (math.prod(latent) * vae.latent_channels)
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    teams = loader.world_size  # with samples of their own
    update = loader.batch_size * grad_accum * teams
    each = world.size // teams
    ranks = f"{teams} rank{'s' * (teams > 1)}"
    if each > 1:
        ranks = f"{teams} team{'s' * (teams > 1)} of {each} ranks"
    return {
        "data": f"{len(store)} volumes: "
        + ", ".join(f"{len(ids)} {part}" for part, ids in split.items()),
        "size": f"{between(shapes)} voxels, {spacing} mm",
        "patches": cutting(plan, size),
        "network": f"{parameters:.2f} M parameters, factor {times(vae.factor)}",
        "latent": f"{vae.latent_channels} x {times(latent)} for {times(size)}, "
        + (codebook(vae) or f"{shrink:.3g} input numbers for one"),
        "update": f"batch {loader.batch_size} x accumulation {grad_accum} x {ranks} = {update}",
        "device": f"{device_name(world.device)}, amp {amp}",
    }


def codebook(vae: CustomVAE) -> str:
    """The codes of a latent, and what they take; empty without a codebook."""
    if not (known := vae.head.num_codes):
        return ""
    z = torch.zeros(1, vae.latent_channels, *[1] * vae.spatial_dims, device=vae.last_layer.device)
    number = vae.head.codes(z).shape[1]
    bits = number * math.log2(known) / math.prod(vae.factor)
    each = "a code" if number == 1 else f"{number} codes"
    return f"{each} of {known} a latent voxel, {bits:.3g} bit a voxel"


def cutting(plan: Any, size: Sequence[int]) -> str:
    """How the training volumes are cut, and into how many patches."""
    if not plan.patching:
        return "none, whole volumes"
    kind = {"full": "a grid", "random_parts": "random parts"}[plan.patching]
    return f"{kind} of {times(size)}, {plan.rows_per_epoch} an epoch"


def between(shapes: Sequence[Sequence[int]]) -> str:
    """One shape, or the smallest and the largest extent of each axis."""
    low, high = (tuple(f(axis) for axis in zip(*shapes, strict=True)) for f in (min, max))
    return times(low) if low == high else f"{times(low)} to {times(high)}"


def largest(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The largest extent of each axis."""
    return tuple(max(axis) for axis in zip(*shapes, strict=True))


def device_name(device: torch.device) -> str:
    """The device with its model, or the number of threads on a CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def times(sizes: Sequence[float]) -> str:
    """Sizes as `64 x 64 x 64`."""
    return " x ".join(f"{n:g}" for n in sizes)
