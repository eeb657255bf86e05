"""Train a VAE on volumes, cut into patches or whole.

    python train_3d.py --config configs/train/demo.yaml --data.root DIR --out_dir runs/a
    torchrun --nproc_per_node=2 train_3d.py --config ... --data.root DIR --out_dir runs/a

The same command again resumes. Runs on CPU (gloo) and CUDA GPUs (nccl). From Python:

    from train_3d import train_3d
    train_3d("DIR", "runs/a", patching=None, max_steps=1000)  # whole volumes

Several nodes: the same `torchrun` line on each, with --nnodes, --node_rank and --rdzv_endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from loaders import DataConfig
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE


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
    grad_accum: int = 1,
    max_steps: int = 10000,
    lr: float = 2e-4,
    warmup_steps: int = 100,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    discriminator_lr: float | None = None,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    amp: Literal["off", "bf16", "fp16"] | None = None,
    sharding: Literal["ddp", "fsdp"] = "ddp",
    channels_last: bool = False,
    compile: bool = False,
    checkpointing: Literal["none", "block", "level"] = "none",
    seed: int = 0,
    log_every: int = 10,
    val_every: int = 500,
    val_volumes: int = 8,
    media_every: int = 1000,
    media_volumes: int = 2,
    save_every: int = 500,
    keep_checkpoints: int = 2,
    max_hours: float | None = None,
    early_stop: int | None = None,
    max_bad_steps: int = 10,
    wandb: Literal["online", "offline", "disabled"] | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    threads: int = 2,
    timeout_minutes: float = 30.0,
    init_from: str | None = None,
    fresh: bool = False,
    force: bool = False,
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
        grad_accum: Micro-batches of one update; update size is batch_size x grad_accum x ranks.
        max_steps: Updates in all [steps].
        lr: Peak learning rate of AdamW.
        warmup_steps: Linear rise of the learning rate [steps].
        schedule: cosine | linear | constant, the way down after the rise.
        weight_decay: Decay of kernels and matrices; norms and biases have none.
        betas: Decay of AdamW's mean gradient and mean squared gradient.
        discriminator_lr: Learning rate of the discriminator; null for lr.
        clip_norm: Longer gradients are shortened to this norm; 0 for never.
        ema_decay: Decay of the averaged weights, which validation and users see; 0 for none.
        amp: off | bf16 | fp16, precision of convolutions and matrix products; null for bf16 where
            the device multiplies it natively, else off.
        sharding: ddp | fsdp (weights cut over the ranks, for models that outgrow a GPU).
        channels_last: Keep channels innermost in memory; faster on recent GPUs and CPUs.
        compile: Compile encoder and decoder with torch.compile.
        checkpointing: none | block | level, what the backward pass computes again to save memory.
        seed: Seed of weights, patches and noise.
        log_every: Interval of numbers in metrics.jsonl and W&B [steps].
        val_every: Interval of validation [steps]; 0 for none.
        val_volumes: Validate on at most this many volumes, always the same [volumes].
        media_every: Interval of pictures and clips [steps]; 0 for none.
        media_volumes: Validation volumes that are pictured [volumes].
        save_every: Interval of checkpoints [steps].
        keep_checkpoints: Step files that are kept beside best and last, at least 2.
        max_hours: Save and end with exit code 0 after this time [h]; null for no limit.
        early_stop: End after so many validations without a better one; null for never.
        max_bad_steps: End after so many steps in a row that are not finite [steps].
        wandb: online | offline | disabled; null for online with a WANDB_API_KEY, else offline.
        device: auto | cpu | cuda | mps.
        threads: Threads that read patches ahead on each rank.
        timeout_minutes: How long a rank waits for one that does not answer [min].
        init_from: Weights to begin with, not read again on resuming: a run folder, a checkpoint, a
            folder of save_pretrained, or a file in any layout that vae3d convert knows.
        fresh: Remove the checkpoints in out_dir and begin anew.
        force: Continue although options that change the training have changed.

    Returns:
        Exit code: 0 done or out of time, 143 after SIGTERM, 130 after SIGINT.
    """
    if isinstance(data, str):
        data = DataConfig(data)
    options = dict(locals())

    import torch

    from loaders import PatchLoader, open_data
    from vae3d.tracking.console import Console
    from vae3d.tracking.tracker import Tracker
    from vae3d.training.checkpoint import find_weights
    from vae3d.training.distributed import World, open_world
    from vae3d.training.facts import facts
    from vae3d.training.run import Run
    from vae3d.training.task import VAETask
    from vae3d.training.trainer import Trainer, native_amp
    from vae3d.training.validate import Validation
    from vae3d.weights.convert import load_weights

    torch.manual_seed(seed)
    vae = model()
    check_sizes(vae, patching, patch_size)
    vae.set_checkpointing(checkpointing)
    with (
        open_world(device, timeout_minutes) as world,
        Run(out_dir, world, keep_checkpoints) as run,
    ):
        config, state = run.begin(train_3d, options, fresh, force)
        amp = world.broadcast(amp or (state and state["amp"]) or native_amp(world.device))
        if init_from and state is None:
            load_weights(vae, find_weights(init_from))
            if world.is_main:
                say_other_intensities(find_weights(init_from), data.preprocess)
        innermost = torch.channels_last_3d if vae.spatial_dims == 3 else torch.channels_last
        vae.to(world.device, memory_format=innermost if channels_last else torch.preserve_format)
        if compile:
            vae.encoder.compile()
            vae.decoder.compile()
        task = VAETask(vae, loss().to(world.device), seed)

        with world.main_first():
            store, split = open_data(data, vae.spatial_dims, split=state and state["split"])
        split = world.broadcast(split)
        run.write_json("split.json", split)
        training, held_out = store.subset(split["train"]), store.subset(split["val"])
        if batch_size == "auto":
            sample = whole_shape(training) if patching is None else patch_size
            batch_size = state["batch_size"] if state else largest_batch(task, sample, amp, world)
        loader = PatchLoader(
            training,
            patch_size=patch_size,
            patching=patching,
            patches_per_volume=patches_per_volume,
            batch_size=batch_size,
            seed=seed,
            rank=world.rank,
            world_size=world.size,
            threads=threads,
            pin=world.device.type == "cuda",
            **data.loader_options(),
        )
        if world.is_main:
            store.write_skipped(out_dir)
        whole = patching is None
        # Sharded weights need all ranks at each volume; then no rank has volumes of its own.
        sharers = World(device=world.device) if sharding == "fsdp" else world
        validation = Validation(
            held_out, sharers, None if whole else patch_size, val_volumes, media_volumes
        )

        tracker = None
        if world.is_main:
            run_id = state and state["wandb_id"]
            about = facts(vae, store, split, loader, world, grad_accum, amp)
            with Console(max_steps) as console:
                console.summary(about, title=str(out_dir))
            tracker = Tracker(out_dir, wandb, config={**config, "about": about}, run_id=run_id)

        def show(network, step):
            if tracker or sharding == "fsdp":
                validation.show(network, step, tracker, Path(out_dir) / "media")

        trainer = Trainer(
            task,
            loader,
            run.checkpoints,
            world,
            tracker,
            max_steps=max_steps,
            lr=lr,
            schedule=schedule,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=betas,
            discriminator_lr=discriminator_lr,
            grad_accum=grad_accum,
            clip_norm=clip_norm,
            amp=amp,
            sharding=sharding,
            ema_decay=ema_decay,
            log_every=log_every,
            val_every=val_every if len(held_out) else 0,
            media_every=media_every if len(held_out) else 0,
            save_every=save_every,
            max_hours=max_hours,
            early_stop=early_stop,
            max_bad_steps=max_bad_steps,
            validate=validation,
            show=show,
            sources=lambda batch: sorted({loader.store.ids[i] for i in batch.volume.tolist()}),
            record={
                "spec": vae.spec,
                "config": config,
                "split": split,
                "preprocess": data.preprocess.to_dict(),
                "batch_size": batch_size,
            },
        )
        return run.fit(trainer, state)


def check_sizes(vae, patching, patch_size) -> None:
    """Refuse a patch that the model cannot shrink by its factor.

    Args:
        vae: The model.
        patching: null | full | random_parts.
        patch_size: Patch per axis [voxels].
    """
    if patching is None:
        return
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


def say_other_intensities(weights: Path, preprocess) -> None:
    """Say in one line where weights were trained on volumes that were prepared in another way.

    That may be meant (another organ, another modality), so it stops nothing.

    Args:
        weights: File of weights; only a checkpoint of ours knows.
        preprocess: What this run does to its volumes.
    """
    from loaders import Preprocess
    from vae3d.weights.hub import read_state

    trained = read_state(weights).get("preprocess")
    difference = trained and preprocess.difference(Preprocess.from_dict(trained))
    if difference:
        print(f"{weights}: trained with another data.preprocess: here {difference}", flush=True)


def whole_shape(store) -> tuple[int, ...]:
    """Return the largest extent of the volumes along each axis."""
    shapes = [store.shape(i)[1:] for i in range(len(store))]
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def largest_batch(task, sample: tuple[int, ...], amp: str, world) -> int:
    """Find the largest batch that fits on every rank, by trying.

    Args:
        task: What is trained.
        sample: Spatial shape of a sample [voxels].
        amp: off | bf16 | fp16.
        world: The ranks.
    """
    from vae3d.training.memory import Trial

    trial = Trial(task, (task.network.in_channels, *sample), amp)
    size = min(n for (n,) in world.gather_ints(trial.largest_batch()))
    if world.is_main:
        print(f"batch_size auto: {size} on each rank", flush=True)
    return size


if __name__ == "__main__":
    from vae3d.config import main

    main(train_3d)
