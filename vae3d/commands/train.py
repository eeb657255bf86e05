"""`vae3d train`, `train_3d.py`: from a signature to a trained VAE, top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loaders import DataConfig, Preprocess
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.classes import made
from vae3d.models.custom_vae import Checkpointing, CustomVAE
from vae3d.training.augment import Augmentation
from vae3d.training.distributed import Mesh
from vae3d.training.options import Loop, as_options, spread

if TYPE_CHECKING:
    from loaders import VolumeStore
    from loaders.slices import SliceStore
    from vae3d.training.distributed import World
    from vae3d.training.memory import Trial


@spread
def train_3d(
    data: DataConfig,
    out_dir: str,
    model: Callable[[], CustomVAE] = CustomVAE,
    loss: Callable[[], VAELoss] = VAELoss,
    *,
    patching: Literal["full", "random_parts"] | None = "random_parts",
    patch_size: tuple[int, ...] = (64, 64, 64),
    patches_per_volume: int = 8,
    batch_size: int | Literal["auto"] = 2,
    augment: Augmentation | None = None,
    discriminator_lr: float | None = None,
    sharding: Literal["ddp", "fsdp", "spatial"] = "ddp",
    mesh: Mesh | None = None,
    slab_axis: Literal["x", "y", "z"] = "x",
    compile: bool = False,
    checkpointing: Checkpointing = "none",
    init_from: str | None = None,
    ignore_keys: tuple[str, ...] = (),
    freeze: Literal["encoder", "decoder"] | None = None,
    loop: Loop,
) -> int:
    """Train a VAE on volumes, cut into patches or whole.

        python train_3d.py --config configs/train/demo.yaml --data.root DIR --out_dir runs/a
        torchrun --nproc_per_node=2 train_3d.py --config ... --data.root DIR --out_dir runs/a

    The same command again resumes from the newest checkpoint.

    Args:
        data: Which volumes and how they are normalized.
        out_dir: Run folder: config.yaml, split.json, metrics.jsonl, checkpoints/, media/, wandb/.
        model: The network and its options.
        loss: The terms of the loss and their weights.
        patching: null (whole volumes) | full (every patch of a grid) | random_parts.
        patch_size: Patch per axis [voxels], a multiple of the model's factor.
        patches_per_volume: Random patches of a volume in one epoch [patches].
        batch_size: Patches in a micro-batch on each rank [patches]; auto for the most that fit.
        augment: Changes of patches on the device, e.g. {flip: [0], noise: 0.02}; TorchIO's, which
            data.augment takes, are made in processes of the CPU.
        discriminator_lr: Learning rate of the discriminator; null for lr.
        sharding: ddp | fsdp (weights cut over the ranks, for models that outgrow a GPU) | spatial
            (each patch or whole volume cut into slabs, one for each rank).
        mesh: Teams of ranks with patches of their own, which they cut into slabs, e.g. {data: 2,
            spatial: 4} on 8 ranks; null for one team with sharding spatial, else for teams of one.
        slab_axis: x | y | z, the axis along which slabs are cut; the longest is the best.
        compile: Compile encoder and decoder with torch.compile.
        checkpointing: none | block | level, what the backward pass computes again to save memory.
        init_from: Weights to begin with, not read again on resuming: a run folder, a checkpoint, a
            folder of save_pretrained, hf://owner/name, or a file in any layout that convert knows.
        ignore_keys: Weights of the network that init_from does not fill, by the beginning of their
            names or a pattern, e.g. '[decoder.*.bias, quant_conv]'; which they are is told.
        freeze: Half of the network that stays as init_from gives it: encoder (so that latents stay
            what they are, and a decoder is tuned on them) | decoder; null to train both.
        loop: Each option of the loop by its own name, see `vae3d.training.options`.

    Returns:
        Exit code: 0 done or out of time, 143 after SIGTERM, 130 after SIGINT, 138 after SIGUSR1.
    """
    if isinstance(data, str):
        data = DataConfig(data)
    call = as_options(locals())

    import torch

    from loaders import PatchLoader
    from vae3d.spatial.slabs import axis_named, own_part
    from vae3d.spatial.slabs import cut as cut_slabs
    from vae3d.training.distributed import World, open_world
    from vae3d.training.facts import facts, largest
    from vae3d.training.linear_code import fit_linear_code
    from vae3d.training.memory import Trial, telling_of_device
    from vae3d.training.run import Run
    from vae3d.training.slabs import SlabTask
    from vae3d.training.task import VAETask
    from vae3d.training.trainer import Trainer
    from vae3d.training.validate import Validation
    from vae3d.weights.convert import LINEAR_CODE, named_by

    torch.manual_seed(loop.seed)
    vae, terms = made("--model", model), made("--loss", loss)
    if patching:
        check_sizes(vae, patch_size)
        grid = (-(-n // f) for n, f in zip(patch_size, vae.factor, strict=True))
        terms.check((vae.out_channels, *patch_size), (vae.latent_channels, *grid))
    if augment:
        augment.check(vae.spatial_dims)
    loading = data.loader_options(loop.threads)
    mesh = Mesh.of(sharding, mesh, int(os.environ.get("WORLD_SIZE", 1)))
    axis = axis_named(slab_axis, vae.spatial_dims)
    if sharding == "spatial" or mesh.spatial > 1:
        check_slabs(batch_size, augment, compile, data)
        if patching:
            cut_slabs(patch_size, vae.factor, mesh.spatial, axis)
    check_beginning(init_from, ignore_keys, freeze, terms)
    vae.set_checkpointing(checkpointing)
    with (
        open_world(loop.device, loop.timeout_minutes) as world,
        Run(out_dir, world, loop.keep_checkpoints) as run,
        telling_of_device("--batch_size", "--patch_size", "--checkpointing level"),
    ):
        config, state = run.begin(train_3d, call, loop.fresh, loop.force)
        data = run.options["data"]  # by the rules that the run was begun under
        amp = run.precision(loop.amp, state)
        if state is not None:
            had = state["spec"]["init_args"].get("linear_code")
            vae.settle_linear_code(bool(had))
        elif init_from:
            begin_with(vae, init_from, ignore_keys, data.preprocess, world)
        else:
            vae.settle_linear_code()
        if freeze:
            vae.freeze(freeze)
        vae.to(world.device)
        if compile:
            vae.encoder.compile()
            vae.decoder.compile()
        terms.to(world.device)
        team = world.team(mesh.spatial)  # who share samples
        in_slabs = team.size > 1
        if in_slabs:
            task: VAETask = SlabTask(vae, terms, loop.seed, axis, team.group)
        else:
            task = VAETask(vae, terms, loop.seed, augment)

        store, split = open_parts(data, vae, state and state["split"], loop.force, world)
        training, held_out = store.subset(split["train"]), store.subset(split["val"])
        sample = patch_size if patching else largest(map(training.shape, range(len(training))))[1:]
        if in_slabs and not patching:
            cut_slabs(training.spatial_shapes.min(axis=0).tolist(), vae.factor, team.size, axis)
        alike = patching is not None
        shape = vae.in_channels, *sample
        trial = Trial(task, shape, amp, training.num_weights, same_shapes=alike)
        begun_with = state["batch_size"] if state else None
        batch = settled_batch(batch_size, begun_with, trial, world)
        cut = partial(
            PatchLoader,
            training,
            patch_size=patch_size,
            patching=patching,
            patches_per_volume=patches_per_volume,
            seed=loop.seed,
            threads=loop.threads,
            **loading,
        )
        slab = partial(own_part, factor=vae.factor, parts=team.size, rank=team.rank, axis=axis)
        loader = cut(
            batch_size=batch,
            rank=world.rank // team.size,
            world_size=mesh.data,
            pin=world.device.type == "cuda",
            part=slab if in_slabs else None,
        )
        filled = init_from and not named_by(LINEAR_CODE, ignore_keys)
        if vae.linear_code is not None and not (state or filled):
            seen = cut(batch_size=1)
            batches = seen.stream() if patching == "random_parts" else seen
            fit_linear_code(vae, (batch.image[0] for batch in batches), world)
        # Sharded weights need all ranks at each volume; then no rank has volumes of its own.
        validation = Validation(
            held_out,
            World(device=world.device) if sharding == "fsdp" else world,
            None if patching is None else patch_size,
            loop.val_volumes,
            loop.media_volumes,
            radiological=loop.radiological,
            team=None if patching else team,  # a patch without gradients fits on one
            axis=axis,
        )
        about = facts(vae, store, split, loader, world, loop.grad_accum, amp)
        tracker = run.track(loop, {**config, "about": about}, state, about)
        show = partial(validation.show, tracker=tracker, folder=Path(out_dir) / "media")
        trainer = Trainer(
            task,
            loader,
            run.checkpoints,
            world,
            tracker,
            loop=replace(loop, amp=amp),
            discriminator_lr=discriminator_lr,
            sharding=sharding,
            same_shapes=alike,
            validate=validation if len(held_out) else None,
            show=show if len(held_out) else None,
            sources=lambda batch: sorted({loader.store.ids[i] for i in batch.volume.tolist()}),
            record={
                "spec": vae.spec,
                "config": config,
                "split": split,
                "preprocess": data.preprocess.to_dict(),
                "batch_size": batch,
            },
        )
        run.write_json("split.json", split)
        if world.is_main:
            store.write_skipped(out_dir)
        return run.fit(trainer, state)


def open_parts(
    data: DataConfig, vae: CustomVAE, known: dict[str, list[str]] | None, force: bool, world: World
) -> tuple[VolumeStore | SliceStore, dict[str, list[str]]]:
    """Open the volumes, one rank first; the store, and the ids of each part of the split.

    Args:
        data: Which volumes.
        vae: What they are for.
        known: The split of the run that goes on, or None.
        force: Go on although the volumes have changed since.
        world: The ranks; the main one speaks, and its split is that of all.
    """
    from loaders import open_data

    with world.main_first():
        say = print if world.is_main else None
        store, split = open_data(
            data, vae.spatial_dims, known, vae.in_channels, say, force, world.size
        )
    return store, world.broadcast(split)


def check_sizes(vae: CustomVAE, patch_size: tuple[int, ...]) -> None:
    """Refuse a patch that the model cannot shrink by its factor.

    Args:
        vae: The model.
        patch_size: Patch per axis [voxels].
    """
    if len(patch_size) != vae.spatial_dims:
        raise ValueError(
            f"--patch_size {list(patch_size)} has {len(patch_size)} axes, the model has "
            f"{vae.spatial_dims}; give one size per axis"
        )
    for size, factor in zip(patch_size, vae.factor, strict=True):
        if size <= 0 or size % factor:
            raise ValueError(
                f"--patch_size {list(patch_size)} is no multiple of the model's factor "
                f"{list(vae.factor)}; {size} could be {max(size // factor, 1) * factor}"
            )


def check_slabs(
    batch_size: int | Literal["auto"], augment: Augmentation | None, compile: bool, data: DataConfig
) -> None:
    """Refuse what `--sharding spatial` does not do.

    Args:
        batch_size: Patches in a micro-batch, or auto.
        augment: Changes of patches on the device, or None.
        compile: Whether the network is to be compiled.
        data: Which volumes and how they are read.
    """
    asked = {
        "--batch_size auto": batch_size == "auto",
        "--augment": augment is not None,
        "--compile": compile,
        "--data.augment": bool(data.augment),
    }
    if names := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(f"--sharding spatial does not go with {', '.join(names)}: leave it out")


def check_beginning(
    init_from: str | None, ignore_keys: tuple[str, ...], freeze: str | None, terms: VAELoss
) -> None:
    """Refuse what makes no sense of weights to begin with.

    Args:
        init_from: Where they come from, or None.
        ignore_keys: What they do not fill.
        freeze: encoder | decoder | None, the half that stays as they give it.
        terms: The loss.
    """
    if freeze and not init_from:
        raise ValueError(f"--freeze {freeze} needs --init_from: new weights are nothing to keep")
    if freeze == "decoder" and terms.adversarial is not None and terms.adversarial.adaptive:
        raise ValueError(
            "--freeze decoder: an adaptive adversarial weight is balanced at the decoder's last"
            " layer; set --loss.adversarial.adaptive false"
        )
    if ignore_keys and not init_from:
        raise ValueError(f"--ignore_keys {list(ignore_keys)} needs --init_from")


def begin_with(
    vae: CustomVAE,
    init_from: str,
    ignore_keys: tuple[str, ...],
    preprocess: Preprocess,
    world: World,
) -> None:
    """Fill a network with the weights that `--init_from` names.

    Says in one line where they were trained on volumes that were prepared in another way; that may
    be meant (another organ, another modality), so it stops nothing.

    Args:
        vae: The network.
        init_from: A run folder, a checkpoint, a folder of save_pretrained, a file, or hf://...
        ignore_keys: What it does not fill.
        preprocess: What this run does to its volumes.
        world: The ranks; the main one speaks.
    """
    from vae3d.training.checkpoint import find_checkpoint, preprocess_of
    from vae3d.weights.convert import load_weights

    weights = find_checkpoint(init_from)
    report = load_weights(vae, weights, keep=ignore_keys)
    if report.lines and world.is_main:
        print(f"{weights}: {report.layout} weights", *report.lines, sep="\n  ", flush=True)
    trained = preprocess_of(weights)
    difference = trained and preprocess.difference(Preprocess.from_dict(trained))
    if difference and world.is_main:
        print(f"{weights}: trained with another data.preprocess: here {difference}", flush=True)


def settled_batch(
    asked: int | Literal["auto"], begun_with: int | None, trial: Trial, world: World
) -> int:
    """The batch that was asked for, or that a run began with; else the largest, found by trying.

    Args:
        asked: `--batch_size`.
        begun_with: The batch of the run that is continued, or None.
        trial: Finds it.
        world: The ranks; it has to fit on each.
    """
    if asked != "auto":
        return asked
    if begun_with:
        return begun_with
    size = min(world.gather(trial.largest_batch()))
    if world.is_main:
        print(f"batch_size auto: {size} on each rank", flush=True)
    return size
