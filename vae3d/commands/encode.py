"""`vae3d encode --checkpoint runs/a --data.root DIR --out_dir latents`: volumes to latents."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loaders import Preprocess

if TYPE_CHECKING:
    from torch import nn

    from loaders import VolumeStore
    from vae3d.models.custom_vae import CustomVAE


@dataclass
class VolumeSource:
    """Which volumes; how they are preprocessed is read from the checkpoint.

    Args:
        root: Folder, glob or manifest; null for the one that the model was trained on.
        cache_dir: Where prepared volumes are kept; null for ~/.cache/vae3d (or $VAE3D_CACHE).
        preprocess: What you hold for that of the checkpoint, as a check; null to trust it.
        mask: Which voxels are seen, a manifest column or a pattern as in training; `trained` for
            that of the run, null for all (then name the images by a glob where masks lie beside).
        region: Part of each volume that is read, [[x0, x1], [y0, y1], [z0, z1]] in voxels of its
            file (of the level), x1 apart; null for the whole, or where root
            is null, too, for what training read.
    """

    root: str | None = None
    cache_dir: str | None = None
    preprocess: Preprocess | None = None
    mask: str | None = "trained"
    region: list[list[int]] | None = None


def encode(
    checkpoint: str,
    out_dir: str,
    data: VolumeSource | None = None,
    split: Literal["train", "val", "test", "all"] = "all",
    mode: Literal["auto", "full", "patch", "exact"] = "auto",
    patch_size: tuple[int, ...] | None = None,
    overlap: int | float | None = None,
    blend: Literal["hann", "gaussian", "average", "crop"] | None = None,
    memory_gb: float | None = None,
    amp: Literal["off", "bf16", "fp16"] = "off",
    ema: bool = True,
    sharding: Literal["spatial"] | None = None,
    slab_axis: Literal["x", "y", "z"] = "x",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    overwrite: bool = False,
    measured_scale: bool = False,
    trust: tuple[str, ...] = (),
) -> None:
    """Write the latents of volumes: one safetensors file each, and latents.json over all.

        vae3d encode --checkpoint runs/a --data.root DIR --out_dir latents
        torchrun --nproc_per_node=4 --no_python -- vae3d encode --checkpoint runs/a --out_dir z

    A file holds mean and log-variance, never a draw; of a network with a codebook the codes, as
    integers, and their values. The same command again goes on where it was
    stopped; ranks share the volumes out and write what one process writes.

    Args:
        checkpoint: Run folder, checkpoint file or folder of save_pretrained of the VAE, or
            hf://owner/name.
        out_dir: Folder of the latents.
        data: Volumes to encode.
        split: Subjects of this part of the run's split; all for every volume in the data.
        mode: full (one pass) | patch (overlapped patches, blended) | exact (as full, in bounded
            memory) | auto (full where it fits in memory, else exact; patch where both are refused,
            or where the options of patches are given).
        patch_size: Patch in voxels for mode patch; null for that of training.
        overlap: Overlap of neighboring patches: below 1 a fraction of the patch, else [voxels];
            null for half of it.
        blend: How overlapping patches are mixed; null for hann.
        memory_gb: Memory budget of modes exact and auto on the device [GiB]; null for half of what
            is free.
        amp: off | bf16 | fp16, precision of convolutions and matrix products.
        ema: Use the averaged weights where the run kept some.
        sharding: spatial (ranks share each volume, cut into slabs, in mode full) | null (they share
            the volumes out).
        slab_axis: x | y | z, the axis along which they are cut; the longest is the best.
        device: auto | cpu | cuda | mps.
        overwrite: Replace latents in out_dir that another model, or another mode, has written.
        measured_scale: Write vae.pt beside the latents too: the VAE with one over their standard
            deviation (of the training subjects, where there are some) as its latent_scale.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
    """
    from loaders.whole import sweep
    from vae3d.inference.estimate import told
    from vae3d.inference.files import codes_of
    from vae3d.inference.reconstruct import coding_of, of_training, volume_of
    from vae3d.stage2.latents import latent_path, write_index, write_latent
    from vae3d.training.checkpoint import find_checkpoint, load_checkpoint, vae_of
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import SMALLER_PASSES, telling_of_device
    from vae3d.training.shares import Shares, cut_along

    state = load_checkpoint(checkpoint)
    vae = vae_of(state, checkpoint, ema, trust)
    patching = dict(patch_size=patch_size, overlap=overlap, blend=blend)
    usual = of_training(state["config"])
    coding, lines = coding_of(usual, mode, patching, memory_gb=memory_gb, amp=amp)
    coding.check(vae)
    coding, axis = cut_along(coding, vae, sharding, slab_axis)
    if measured_scale:
        vae.set_latent_scale(vae.latent_scale)  # refuses what keeps none, before anything is made
    made_by = {"checkpoint": weights_hash(vae), "step": state["step"], "ema": ema}
    made_by |= coding.facts()
    folder = Path(out_dir)
    with open_world(device) as world, telling_of_device(*SMALLER_PASSES):
        vae.to(world.device)
        with world.main_first():
            say = print if world.is_main else None
            channels = vae.in_channels, coding.slices_of(vae)
            store, parts = open_volumes(state, data or VolumeSource(), split, say, *channels)
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        world.barrier()
        shares = Shares(vae, world, len(store), axis)
        mine = shares.mine
        todo = [i for i in mine if not _finished(folder, store, i, made_by, overwrite)]
        if len(todo) < len(mine):
            print(f"{len(mine) - len(todo)} of {len(mine)} volumes are done already", flush=True)
        shapes = {i: store.shape(i)[1:] for i in todo}
        codings = {i: coding.settled(vae, shape, ("encode",)) for i, shape in shapes.items()}
        if todo and world.is_main:
            cost = told(coding, vae, [*shapes.values()], ("encode",), shares.team.size)
            print(*lines, cost, sep="\n", flush=True)
        with shares.at_work("encode", shapes) as work:
            for index in todo:
                name, x = store.ids[index], volume_of(store, index)
                with work.on(index):
                    mean, logvar = codings[index].encode(vae, x, name)
                factor = coding.factor(vae, mean.ndim - 1)
                by = made_by | codings[index].facts()
                info = header(store, index, factor, by, parts)
                codes = codes_of(vae, mean)
                write_latent(latent_path(folder, name), mean, logvar, info, codes)
                print(f"{name}: {tuple(mean.shape)}  eta {work.left()}", flush=True)
        world.barrier()
        if world.is_main:
            where = os.path.abspath(find_checkpoint(checkpoint))
            report(folder, write_index(folder, made_by, where), vae.head.num_codes)
            if measured_scale:
                write_scaled(vae, folder)


def write_scaled(vae: CustomVAE, folder: Path) -> None:
    """Write the VAE with the scale of its latents as `vae.pt` beside them."""
    from vae3d.stage2.latents import read_statistics
    from vae3d.training.checkpoint import checkpoint_of, write_atomic

    scale = read_statistics(folder).scaling_factor
    vae.set_latent_scale(scale)
    path, weights = folder / "vae.pt", vae.cpu().state_dict()
    write_atomic(path, checkpoint_of(vae.spec, weights, vae.contract or {}))
    print(f"{path}: the VAE with latent_scale {scale:.5g}")


def open_volumes(
    state: dict[str, Any],
    source: VolumeSource,
    split: str = "all",
    say: Callable[[str], None] | None = print,
    in_channels: int | None = None,
    num_slices: int = 1,
) -> tuple[VolumeStore, dict[str, str]]:
    """Open volumes as the run read them.

    Args:
        state: The checkpoint.
        source: Which volumes.
        split: train, val, test or all.
        say: Takes the lines on the volumes; None for ranks that follow.
        in_channels: Channels that the model takes; None for any.
        num_slices: Neighboring slices that become channels.

    Returns:
        The store, and the part of the split of each subject that has one.
    """
    from loaders import DataConfig, VolumeStore, find_subjects
    from loaders.config import as_meant
    from loaders.store import silent

    of_run = dict(as_meant(state["config"])["data"])
    of_run |= {"preprocess": Preprocess.of_checkpoint(state["preprocess"], source.preprocess)}
    if source.mask != "trained":
        of_run |= {"mask": source.mask, "mask_weights": None}
    if source.root or source.region is not None:
        of_run["region"] = source.region
    for name in ("root", "cache_dir"):
        of_run[name] = getattr(source, name) or of_run[name]
    config = DataConfig(**of_run)
    parts = {id: part for part, ids in (state["split"] or {}).items() for id in ids}
    subjects = find_subjects(config.root, config.reading, parts, say or (lambda line: None))
    chosen = [s for s in subjects if split in ("all", parts.get(s.id))]
    if not chosen:
        raise ValueError(
            f"{config.root}: none of {len(subjects)} volumes is in the run's {split} split; "
            "take another --split, or --split all"
        )
    store = VolumeStore.build(
        chosen,
        config.cache_dir,
        config.preprocess,
        on_error=config.on_error,
        reading=config.reading,
        backend=config.store,
        threads=config.threads,
        in_channels=in_channels,
        num_slices=num_slices,
        say=say or silent,
    )
    return store, parts


def header(store: VolumeStore, index: int, factor: list[int], made_by: dict, parts: dict) -> dict:
    """What a latent file says beside its tensors."""
    from vae3d.inference.files import latent_info

    about = {"split": parts.get(store.ids[index]), "labels": dict(store.labels(index))}
    return {**latent_info(store, index, factor), **about, "made_by": made_by}


def _finished(folder: Path, store: VolumeStore, index: int, made_by: dict, overwrite: bool) -> bool:
    """Whether the latent of a volume lies there, whole and up to date."""
    from vae3d.stage2.latents import latent_path, made_alike, read_info

    path = latent_path(folder, store.ids[index])
    if not path.is_file():
        return False
    try:
        info = read_info(path)
    except ValueError:  # damaged
        if overwrite:
            return False
        raise
    if not made_alike(info["made_by"], made_by):
        if overwrite:
            return False
        raise ValueError(
            f"{path}: written by another model or mode ({info['made_by']}); "
            "choose another --out_dir, or replace it with --overwrite"
        )
    return info["source"]["fingerprint"] == store.meta(index)["key"]


def weights_hash(model: nn.Module) -> str:
    """Hash of a model's weights: the same in every file, and under later versions of its class."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def report(folder: Path, index: dict[str, Any], num_codes: int = 0) -> None:
    """Print what lies in a folder of latents and whether it is fit for a second stage."""
    kept = index["statistics"].get("train", index["statistics"]["all"])
    print(f"{len(index['subjects'])} latents in {folder}")
    if num_codes:
        print(f"codes out of {num_codes}, {math.log2(num_codes):.2f} bit each, with their values")
        return
    print("channel       mean        std  noise share")
    rows = zip(kept["mean"], kept["std"], kept["noise_share"], strict=True)
    for channel, (mean, std, share) in enumerate(rows):
        dead = "  dead: it carries next to nothing" if share > 0.9 else ""
        print(f"{channel:7d} {mean:10.4f} {std:10.4f} {share:12.3f}{dead}")
    print(f"scaling factor {kept['scaling_factor']:.5g}")
