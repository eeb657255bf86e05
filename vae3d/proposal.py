"""A data set's fingerprint -> a training recipe, each key with its reason.

The network is that of `configs/train/ixi_t1.yaml`, cut to the data: an axis with thick slices
shrinks later than the others, and the latent grows with what a cell of it stands for.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import yaml

from loaders.fingerprint import Fingerprint, times
from vae3d.training.memory import Trial
from vae3d.training.precision import Amp
from vae3d.training.task import VAETask

Value = bool | int | float | str | Sequence["Value"] | Mapping[str, "Value"] | None
Recipe = dict[str, tuple[Value, str]]  # dotted name of an option -> its value, and why

WIDTH = 100  # characters of a line
SAME_SPACING = 1.1  # volumes whose voxel sizes differ by less are trained as they are
SERIES = 8  # more channels than this in one file are time points
CELL = 32  # voxels that a cell of the latent stands for, at least
CODED = 16  # voxels that one latent number stands for, where there is one channel
LEAST_LATENT = 4  # channels of the latent
LEAST_CELLS = 4  # along an axis that shrinks
WIDTHS = (32, 64, 128, 128, 128)  # channels of the levels
WINDOW_HU = (-1000, 1000)  # air to dense bone
SPARSE = 0.1  # share of foreground below which patches are sent there
PATCH_VOXELS = {True: 128**3, False: 48**3}  # on a GPU, elsewhere: larger ones teach no faster
BATCH = {True: 8, False: 2}

GROUPS = {
    "data": "Which volumes, and how they are prepared.",
    "data.preprocess": "Goes into the checkpoint: volumes are prepared in the same way ever after.",
    "model": "The network and its options.",
    "loss": "The terms of the loss.",
}


def propose(found: Fingerprint, root: str, out_dir: str, on_gpu: bool) -> Recipe:
    """Propose all options but patch and batch, which depend on memory.

    Args:
        found: The fingerprint of the data.
        root: Where the data are, as `--data.root` takes it.
        out_dir: Run folder.
        on_gpu: Whether there is a GPU to train on.
    """
    return {
        **data_options(found, root),
        "out_dir": (out_dir, "The run's folder; the same command again resumes."),
        **network(found),
        **loss(),
        **training(found.spatial_dims, on_gpu),
    }


def data_options(found: Fingerprint, root: str) -> Recipe:
    """How the volumes are read and prepared."""
    options: Recipe = {"data.root": (root, f"Volumes: {found.num_volumes}.")}
    if found.spatial_dims == 2 and found.thinnest != 2:
        options["data.slice_axis"] = (found.thinnest, "The axis along which volumes are thinnest.")
    if is_series(found):
        why = f"One file holds {len(found.channels)} volumes, likely a series in time: each is one."
        options["data.volumes_4d"] = ("samples", why)
    elif found.several_in_a_file:
        why = f"One file holds {len(found.channels)} volumes: they become channels."
        options["data.volumes_4d"] = ("channels", why)
    if found.holes:
        why = "Some voxels are NaN or infinite: they get the volume's lowest intensity."
        options["data.nan"] = ("fill", why)
    if found.foreground < SPARSE:
        share = f"{100 * found.foreground:.2g} %"
        why = f"Only {share} of the voxels are foreground: half of the patches lie there."
        options["data.sampler"] = ({"class_path": "ForegroundCorners"}, why)
    options["data.preprocess.spacing_mm"] = spacing(found)
    for name, choice in intensities(found).items():
        options[f"data.preprocess.{name}"] = choice
    return options


def spacing(found: Fingerprint) -> tuple[list[float] | None, str]:
    """The voxel size that volumes are resampled to, None for their own; and why."""
    own = f"{times(found.spacing_mm)} mm"
    if found.spatial_dims == 2:
        return None, "Slices are trained pixel by pixel, as they are."
    if max(found.spread) < SAME_SPACING:
        return None, f"Voxels are {own} in all volumes: resampling would only blur."
    median = [float(f"{edge:.4g}") for edge in found.spacing_mm]
    return median, f"Voxel sizes differ up to {max(found.spread):.3g}-fold: all get the median."


def intensities(found: Fingerprint) -> Recipe:
    """How intensities become network input."""
    channels = found.channels
    lowest = min(channel.lowest for channel in channels)
    highest = max(channel.highest for channel in channels)
    unit: tuple[Value, str] = ("unit", "To [0, 1], of which PSNR and SSIM take their range.")
    if all(channel.hounsfield for channel in channels):
        why = "CT, whole numbers with air near -1000: from air to dense bone, alike in all volumes."
        return {"window_hu": (list(WINDOW_HU), why), "intensity": unit}
    if all(channel.whole_numbers for channel in channels) and lowest >= 0 and highest <= 255:
        why = "8-bit intensities have been windowed before: nothing more is clipped."
        return {"percentiles": ([0.0, 100.0], why), "intensity": unit}
    no_unit = f"Intensities have no fixed unit ({lowest:.6g} to {highest:.6g})"
    if found.foreground < SPARSE:
        why = f"{no_unit} and what is bright is rare: no more than hot voxels may be clipped."
        return {"percentiles": ([0.0, 99.99], why), "intensity": unit}
    why = f"{no_unit}: each volume is clipped where its brightest voxels begin."
    return {"percentiles": ([0.0, 99.5], why), "intensity": unit}


def network(found: Fingerprint) -> Recipe:
    """A network whose cells come near to cubes, and which starts as the best linear code."""
    channels = num_channels(found)
    factors = level_factors(*grid(found))
    cell = [math.prod(axis) for axis in zip(*factors, strict=True)]
    voxels = math.prod(cell)
    latent = max(LEAST_LATENT, round(voxels * math.sqrt(channels) / CODED))
    edges = [f * edge for f, edge in zip(cell, grid(found)[1], strict=True)]
    thickness = f"The thinnest axis of a volume has {found.shape[found.thinnest]} voxels"
    how = {2: "slices are trained, one by one.", 3: "volumes are trained in 3D."}
    options: Recipe = {
        "class_path": ("CustomVAE", ""),
        "init_args.spatial_dims": (
            found.spatial_dims,
            f"{thickness}: {how[found.spatial_dims]}",
        ),
        "init_args.in_channels": (channels, "Channels of the volumes."),
        "init_args.channels": (
            list(WIDTHS[: len(factors)]),
            "Channels of each level, finest first; a large GPU takes twice as many.",
        ),
        "init_args.factors": (
            factors,
            f"An axis is halved unless its step is twice the finest, until a cell has {CELL} "
            f"voxels: a cell has {times(cell)}, edges of {times(edges)} mm.",
        ),
        "init_args.num_res_blocks": (1, "Residual blocks of each level."),
        "init_args.block": (
            {"class_path": "ResBlock", "init_args": {"zero_init": True}},
            "Blocks begin as identity, which short runs need.",
        ),
        "init_args.encoder_mid": (False, "No blocks between encoder and latent."),
        "init_args.decoder_mid": (False, "No blocks between latent and decoder."),
        "init_args.latent_channels": (
            latent,
            f"One latent number for {voxels * channels / latent:.3g} input numbers"
            + (", since channels have much in common." if channels > 1 else "."),
        ),
        "init_args.linear_code": (
            True,
            "Training begins at the best linear code of blocks, fitted to the training volumes.",
        ),
        "init_args.down": ("HaarDown", "Wavelets lose nothing on the way down, and learn fast."),
        "init_args.up": ("HaarUp", "The way back."),
        "init_args.norm": ("NoNorm", "Without a norm, tiles agree with the whole volume."),
        "init_args.posterior": (
            {"class_path": "LogVarianceHead", "init_args": {"init_logvar": -6.0}},
            "The posterior begins with little noise.",
        ),
    }
    return {f"model.{name}": choice for name, choice in options.items()}


def loss() -> Recipe:
    """The loss of the recipe for IXI."""
    return {
        "loss.class_path": ("VAELoss", ""),
        "loss.init_args.recon": (
            {"class_path": "L2", "init_args": {"weight": 10.0}},
            "L2 learns faster than L1 in a short run.",
        ),
        "loss.init_args.kl": (
            {"class_path": "KL", "init_args": {"weight": 1e-5}},
            "Per latent element; weak, so that the latent stays near N(0, 1) but keeps detail.",
        ),
    }


def training(spatial_dims: int, on_gpu: bool) -> Recipe:
    """The loop."""
    many = (16, "Patches of a volume in one epoch.")
    few = (1, "Patches of a slice in one epoch; there are many slices.")
    steps, ema = (10000, 0.999) if on_gpu else (1500, 0.99)
    where = "a GPU" if on_gpu else "a CPU"
    return {
        "patching": ("random_parts", "Random patches; the next epoch has others."),
        "patches_per_volume": few if spatial_dims == 2 else many,
        "max_steps": (steps, f"Enough to see what the data allow, on {where}; more is better."),
        "lr": (1e-3, "What networks with zero_init and a linear code learn best with."),
        "warmup_steps": (100, "The learning rate rises over so many steps."),
        "ema_decay": (ema, "Weights are averaged over the last tenth of the run, or less."),
    }


def is_series(found: Fingerprint) -> bool:
    """Whether the channels look like time points of one file."""
    return found.several_in_a_file and len(found.channels) > SERIES


def num_channels(found: Fingerprint) -> int:
    """Channels that the network gets."""
    return 1 if is_series(found) else len(found.channels)


def grid(found: Fingerprint) -> tuple[list[int], list[float]]:
    """Shape and voxel size [mm] of a median volume as the network sees it."""
    edges = spacing(found)[0] or found.spacing_mm
    seen = found.kept_axes
    if spacing(found)[0] is None:
        return [found.shape[axis] for axis in seen], [edges[axis] for axis in seen]
    shape = [round(found.size_mm[axis] / edges[axis]) for axis in seen]
    return shape, [edges[axis] for axis in seen]


def level_factors(shape: Sequence[int], spacing_mm: Sequence[float]) -> list[list[int]]:
    """Halve the axes with the finest steps, level by level, until a cell is large enough.

    Args:
        shape: Voxels per axis; one with few of them is halved no further.
        spacing_mm: Voxel edges per axis.

    Example:
        >>> level_factors((512, 512, 20), (0.7, 0.7, 5.0))
        [[2, 2, 1], [2, 2, 1], [2, 2, 2]]
    """
    factors: list[list[int]] = []
    left, edges = list(shape), list(spacing_mm)
    while math.prod(map(math.prod, factors)) < CELL:
        long = [n >= 2 * LEAST_CELLS for n in left]
        if not any(long):
            break
        finest = min(edge for edge, enough in zip(edges, long, strict=True) if enough)
        level = [
            2 if enough and edge < 2 * finest else 1
            for edge, enough in zip(edges, long, strict=True)
        ]
        factors.append(level)
        left = [n // f for n, f in zip(left, level, strict=True)]
        edges = [edge * f for edge, f in zip(edges, level, strict=True)]
    if not factors:
        raise ValueError(f"volumes of {times(shape)} voxels are too small to be coded")
    return factors


def patch_sizes(
    shape: Sequence[int], factor: Sequence[int], on_gpu: bool
) -> Iterator[tuple[int, ...]]:
    """Yield patches that are as many cells along each axis as a volume allows, largest first.

    Args:
        shape: Voxels of a median volume.
        factor: Shrink of the model per axis.
        on_gpu: Whether there is a GPU to train on.
    """
    cells = max(-(-n // f) for n, f in zip(shape, factor, strict=True))
    last: tuple[int, ...] = ()
    for count in range(cells, 0, -1):
        patch = tuple(min(count, max(n // f, 1)) * f for n, f in zip(shape, factor, strict=True))
        if math.prod(patch) <= PATCH_VOXELS[on_gpu] and patch != last:
            last = patch
            yield patch


def sizes(
    found: Fingerprint,
    task: VAETask,
    amp: Amp,
    budget: float,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Recipe:
    """Patch and batch: the largest that train within the memory, found by training steps.

    Args:
        found: The fingerprint of the data.
        task: What would be trained, on its device.
        amp: off | bf16 | fp16.
        budget: Memory to fit into [bytes].
        patch_size: Patch that is wanted; None for the largest.
        batch_size: Batch that is wanted; None for the largest.
    """
    device = next(task.parameters()).device
    shape, factor, on_gpu = grid(found)[0], task.network.factor, device.type == "cuda"
    memory = f"{budget / 1e9:.3g} GB on {device.type}"
    patches = [tuple(patch_size)] if patch_size else list(patch_sizes(shape, factor, on_gpu))
    for patch in patches:
        trial = Trial(task, (task.network.in_channels, *patch), amp)
        if trial.fits(batch_size or 1, budget):
            break
    else:
        raise ValueError(f"no patch, not even {times(patch)}, trains within {memory}")
    batch = batch_size or trial.largest_batch(int(budget), BATCH[on_gpu])
    why = f"As many cells of the latent along each axis as fit; a volume has {times(shape)} voxels."
    return {
        "patch_size": (list(patch), why),
        "batch_size": (batch, f"Trains within {memory}."),
    }


def recipe_text(recipe: Recipe, head: str = "") -> str:
    """The recipe as YAML, with its reasons as comments.

    Args:
        recipe: The options, those of a group one after the other.
        head: The comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()] + [""] * bool(head)
    above: tuple[str, ...] = ()
    for name, (value, reason) in recipe.items():
        *groups, key = name.split(".")
        for depth, group in enumerate(groups):
            if above[: depth + 1] != tuple(groups[: depth + 1]):
                lines += entry(group, "", GROUPS.get(".".join(groups[: depth + 1]), ""), depth)
        above = tuple(groups)
        plain = yaml.safe_dump([value], default_flow_style=True, width=10**6, sort_keys=False)
        lines += entry(key, f" {plain.strip()[1:-1]}", reason, len(groups))
    return "\n".join(lines) + "\n"


def entry(key: str, value: str, reason: str, depth: int) -> list[str]:
    """The lines of one key."""
    indent = "  " * depth
    mark = f"{indent}# "
    comment = textwrap.wrap(reason, WIDTH, initial_indent=mark, subsequent_indent=mark)
    return [*comment, f"{indent}{key}:{value}"]
