"""`vae3d plan RECIPE` or `vae3d plan DIR`: what a run costs, or what a data set asks for."""

from __future__ import annotations

import glob
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loaders.fingerprint import measure, times
from loaders.texts import read_yaml
from loaders.whole import write_text
from vae3d.config import parse
from vae3d.models.classes import made
from vae3d.ranges import check_ranges
from vae3d.recipes import HOME, find_recipe

if TYPE_CHECKING:
    import torch

    from vae3d.losses.vae_loss import VAELoss
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.training.memory import RankMemory


def plan(
    what: str,
    /,
    *,
    patch_size: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    memory_gb: float | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    sharding: Literal["ddp", "fsdp", "spatial"] | None = None,
    slab_axis: Literal["x", "y", "z"] | None = None,
    write: str | None = None,
    volumes: int = 32,
) -> None:
    """Show what a recipe costs before a run is begun, or propose a recipe for a data set.

        vae3d plan ixi_t1
        vae3d plan ixi_t1 --patch_size '[96,96,96]' --memory_gb 24
        vae3d plan ixi_t1 --patch_size '[512,512,512]' --sharding spatial --memory_gb 80
        vae3d plan DIR --write recipe.yaml

    Of a recipe or a model: parameters, latent shape and memory. Of a data set: its fingerprint
    (grid, intensities, foreground), and a recipe for `train_3d.py --config` in which each key
    tells its reason.

    Memory is measured by taking a training step on this device; the patch that fits a recipe is
    extrapolated from two patch sizes. With `--sharding spatial` it is that of a rank, for more and
    more ranks until the patch fits, extrapolated from two slabs.

    Args:
        what: A recipe (YAML file with the options of train_3d.py, a run's config.yaml, or a
            recipe's name), a model (its YAML file or name), or data (folder, glob or manifest;
            `./demo` where a recipe has that name).
        patch_size: Patch per axis [voxels]; null for the recipe's, or the proposal's.
        batch_size: Patches in a micro-batch; null for the recipe's, or the proposal's.
        memory_gb: Memory that a patch has to fit into [GB]; null for most of what is free.
        device: auto | cpu | cuda | mps.
        sharding: For a recipe: ddp | fsdp | spatial, of which the last cuts each patch over the
            ranks; null for the recipe's.
        slab_axis: For a recipe: x | y | z, the axis along which it is cut; null for the recipe's.
        write: For data: file to write the recipe to; one that exists stays as it is.
        volumes: For data: measure at most this many volumes.
    """
    check_ranges("plan", locals())
    if is_data(what):
        if option := ("sharding" if sharding else "slab_axis" if slab_axis else None):
            raise ValueError(f"--{option} is for a recipe that is there; {what} is data")
        plan_data(what, patch_size, batch_size, memory_gb, device, write, volumes)
    elif write:
        raise ValueError(f"--write is for the recipe that data ask for; {what} is a recipe itself")
    else:
        plan_recipe(what, patch_size, batch_size, memory_gb, device, sharding, slab_axis)


def is_data(what: str) -> bool:
    """Whether this names data; the name of a recipe wins over a folder of that name."""
    if recipe_kind(what) or Path(what).suffix in (".yaml", ".yml"):
        return False
    return Path(what).expanduser().exists() or glob.has_magic(what)


def recipe_kind(name: str) -> Literal["train", "model"] | None:
    """Folder of `configs/` that has a recipe of this name; `./demo` is a path, no name."""
    kinds: tuple[Literal["train", "model"], ...] = ("train", "model")
    known = (kind for kind in kinds if (HOME / kind / f"{name}.yaml").is_file())
    return next(known, None) if Path(name).name == name else None


def recipe_argv(what: str) -> list[str]:
    """How `train_3d` takes a recipe or a model, given by its file or its name."""
    path = find_recipe(recipe_kind(what) or "train", what)
    options = read_yaml(Path(path))
    is_model = isinstance(options, dict) and "class_path" in options
    return ["--model" if is_model else "--config", path]


def plan_recipe(
    recipe: str,
    patch_size: tuple[int, ...] | None,
    batch_size: int | None,
    memory_gb: float | None,
    device: str,
    sharding: str | None,
    slab_axis: str | None,
) -> None:
    """Print parameters, latent shape and memory of a recipe or a model; see `plan`."""
    import torch

    from vae3d.commands.train import check_sizes, train_3d
    from vae3d.spatial.slabs import axis_named
    from vae3d.training.distributed import open_world
    from vae3d.training.facts import codebook
    from vae3d.training.memory import RankMemory, Trial, budget_bytes, telling_of_device
    from vae3d.training.precision import native_amp
    from vae3d.training.task import VAETask

    options = parse(train_3d, [*recipe_argv(recipe), "--data.root", "-", "--out_dir", "-"])
    patch = tuple(patch_size or options["patch_size"])
    if batch_size is None:
        batch_size = 1 if options["batch_size"] == "auto" else options["batch_size"]
    vae, terms = made("--model", options["model"]), made("--loss", options["loss"])
    vae.settle_linear_code()
    check_sizes(vae, patch)
    axis = axis_named(slab_axis or options["slab_axis"], vae.spatial_dims)
    vae.set_checkpointing(options["checkpointing"])

    with open_world(device) as world, telling_of_device("--batch_size", "--patch_size"):
        task = VAETask(vae, terms).to(world.device)
        if options["compile"]:
            vae.encoder.compile()
            vae.decoder.compile()
        amp, dtype = options["amp"] or native_amp(world.device), torch.float32
        budget = memory_gb * 1e9 if memory_gb else budget_bytes(world.device)
        if (sharding or options["sharding"]) == "spatial":
            rank = RankMemory.measured(vae, terms, world.device, amp, batch_size, axis)
            needed, fits = memory_of_ranks(rank, patch, budget)
        else:
            smaller = tuple(max(n // 2 // f, 1) * f for n, f in zip(patch, vae.factor, strict=True))
            peaks = {
                size: Trial(task, (vae.in_channels, *size), amp).peak_bytes(batch_size)
                for size in (patch, smaller)
            }
            largest = largest_patch(peaks, vae.factor, budget)
            needed = f"{peaks[patch] / 1e9:.2f} GB"
            fits = f"patch {times(largest)}" if largest else "no patch at all"

    latent = tuple(n // f for n, f in zip(patch, vae.factor, strict=True))
    shrink = math.prod(vae.factor) * vae.in_channels / vae.latent_channels
    for name, fact in {
        "parameters": f"{count(vae):.2f} M (encoder {count(vae.encoder):.2f} M, "
        f"decoder {count(vae.decoder):.2f} M), {count(vae) * dtype.itemsize:.1f} MB",
        "factor": times(vae.factor),
        "latent": f"{vae.latent_channels} x {times(latent)} for a patch of {times(patch)}",
        "compression": codebook(vae) or f"{shrink:.3g} input numbers for one latent number",
        "memory": f"{needed} for {batch_size} x {times(patch)} with amp {amp} "
        f"and checkpointing {options['checkpointing']} on {world.device.type}",
        f"fits {budget / 1e9:.3g} GB": f"{fits} with batch {batch_size}",
    }.items():
        print(f"{name:<14}{fact}")


def memory_of_ranks(rank: RankMemory, patch: Sequence[int], budget: float) -> tuple[str, str]:
    """What a rank takes of a patch that 1, 2, 4, ... share, and with how many it fits.

    Args:
        rank: What was measured.
        patch: Voxels per axis.
        budget: Memory of a rank [bytes].
    """
    cells = [-(-n // f) for n, f in zip(patch, rank.factor, strict=True)]
    most, needed, ranks = cells[rank.axis], [], 1
    while ranks <= most:
        taken = rank.of(patch, ranks)
        needed.append(f"{taken / 1e9:.2f} GB on each of {ranks} ranks")
        if taken <= budget:
            return ", ".join(needed), f"{ranks} ranks"
        ranks *= 2
    return ", ".join(needed), "no number of ranks"


def plan_data(
    root: str,
    patch_size: tuple[int, ...] | None,
    batch_size: int | None,
    memory_gb: float | None,
    device: str,
    write: str | None,
    volumes: int,
) -> None:
    """Print the fingerprint of a data set and a recipe for it; see `plan`."""
    from loaders.find import find_subjects
    from loaders.readers import url_of
    from vae3d.commands.train import check_sizes
    from vae3d.proposal import propose, recipe_text, sizes
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import budget_bytes, telling_of_device
    from vae3d.training.precision import native_amp
    from vae3d.training.task import VAETask

    if write and Path(write).exists():
        raise ValueError(f"--write {write}: is there already; remove it, or give another name")
    found = measure(find_subjects(root), volumes)
    facts = "\n".join(found.lines())
    print(facts, flush=True)
    where = url_of(root) or Path(root).expanduser().absolute()
    folder = next(part for part in reversed(Path(where).parts) if not glob.has_magic(part))
    out_dir = f"runs/{Path(write or folder).stem}"
    with open_world(device) as world, telling_of_device("--batch_size", "--patch_size"):
        recipe = propose(found, str(where), out_dir, world.device.type == "cuda")
        vae, loss = read_back(recipe_text(recipe))
        if patch_size:
            check_sizes(vae, patch_size)
        task = VAETask(vae, loss).to(world.device)
        budget = memory_gb * 1e9 if memory_gb else budget_bytes(world.device)
        recipe |= sizes(found, task, native_amp(world.device), budget, patch_size, batch_size)
    command = f"python train_3d.py --config {write or 'recipe.yaml'}"
    head = f"Proposed for {root}; trains by `{command}`."
    text = recipe_text(recipe, f"{head}\n\n{facts}" if write else head)
    read_back(text)
    if write:
        write_text(write, text)
        print(f"\nwrote {write}: {command}")
    else:
        print(f"\n{text}", end="")


def read_back(text: str) -> tuple[CustomVAE, VAELoss]:
    """Build network and loss from the text of a recipe, as training would."""
    from vae3d.commands.train import train_3d

    with tempfile.TemporaryDirectory() as folder:
        path = write_text(Path(folder, "recipe.yaml"), text)
        options = parse(train_3d, ["--config", str(path)])
    return made("--model", options["model"]), made("--loss", options["loss"])


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
