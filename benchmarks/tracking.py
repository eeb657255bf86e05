"""What pictures and clips cost a run, as parts of its time at the default cadence of train_3d.

    python benchmarks/tracking.py                # forward passes against steps, then the drawing
    python benchmarks/tracking.py --rounds 0     # the drawing alone

1. On the training thread: CPU-seconds of `Trainer.picture` right after a validation, as in a run,
   over those of `media_every` steps. Network, patch, batch and cadence are the defaults. Both sides
   are forward and backward passes of one network, so the ratio hardly depends on the device.
2. On the media thread: CPU-seconds of drawing two volumes, and of ffmpeg, a process of its own.
3. What the training thread loses to the media thread, which shares its interpreter: seconds that a
   loop of tiny tensor operations, all Python as in a run that waits for no GPU, stands still while
   two volumes are drawn, less what the kernel says it has waited for a core (Linux alone). Drawing
   does not get faster on a GPU, so this is put beside steps of 0.1 s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from inspect import signature
from pathlib import Path
from threading import get_native_id

import numpy as np
import torch

from loaders import PatchLoader, Preprocess, VolumeStore
from vae3d import train_3d
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.tracking.options import Tracking
from vae3d.tracking.tracker import Tracker
from vae3d.training.checkpoint import Checkpoints
from vae3d.training.distributed import World
from vae3d.training.options import Loop
from vae3d.training.task import VAETask
from vae3d.training.trainer import Trainer
from vae3d.training.validate import Validation

TARGET = 0.02
GPU_STEP_S = 0.1
DEFAULT = {name: p.default for name, p in signature(train_3d).parameters.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="rounds of steps and pictures")
    parser.add_argument("--size", type=int, default=64, help="volumes of the passes [voxels]")
    parser.add_argument("--drawn", type=int, default=256, help="volumes that are drawn [voxels]")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    every = DEFAULT["media_every"]
    with tempfile.TemporaryDirectory() as folder:
        if options.rounds:
            passes(Path(folder) / "passes", options.rounds, options.size, every)
        drawing(Path(folder) / "drawing", options.drawn, every)


def passes(folder: Path, rounds: int, size: int, every: int) -> None:
    """Pictures against steps on the training thread."""
    trainer = make_trainer(folder, make_store(folder, size))
    batches = trainer.loader.stream()
    ratios = []
    for n in range(rounds):
        step = statistics.median(seconds(lambda: take_step(trainer, batches)) for _ in range(2))
        trainer.validate()
        shown = seconds(trainer.picture)
        ratios.append(shown / (every * step))
        print(f"round {n}: step {step:.2f} CPU-s, pictures {shown:.2f} = {shown / step:.2f} steps")
    trainer.tracker.close()
    say(f"training thread, every {every} steps", statistics.median(ratios))


def drawing(folder: Path, size: int, every: int) -> None:
    """CPU-seconds of the media thread, and what they cost a thread that is all Python."""
    from vae3d.training.validate import _views

    folder.mkdir()
    count, x = DEFAULT["media_volumes"], smooth((size,) * 3)[None]
    tracker = Tracker(folder, Tracking(wandb="disabled"))
    _views(folder, "warm", x[:, :32, :32, :32], x[:, :32, :32, :32], None, (0, 1), panel="v")
    until = time.monotonic() + 5
    idle = stood_still(lambda: time.monotonic() < until)
    cpu = os.times()
    for n in range(count):
        tracker.in_background(_views, folder, f"v{n}", x, x * 0.9, None, (0, 1), panel="v", step=n)
    begun, mine = time.monotonic(), time.thread_time()
    share = stood_still(lambda: tracker._pending_bytes > 0) - idle
    lasted, used = time.monotonic() - begun, os.times()
    theirs = used.user + used.system - cpu.user - cpu.system - (time.thread_time() - mine)
    ffmpeg = used.children_user + used.children_system - cpu.children_user - cpu.children_system
    tracker.close()
    print(
        f"{count} volumes of {size}^3: media thread {theirs:.1f} CPU-s, ffmpeg {ffmpeg:.1f} CPU-s, "
        f"{lasted:.1f} s in all, {share:.0%} of which a thread that is all Python stands still"
    )
    say(f"lost to drawing, at {GPU_STEP_S} s a step", share * lasted / (every * GPU_STEP_S))


def make_store(folder: Path, size: int) -> VolumeStore:
    folder.mkdir()
    for n in range(DEFAULT["media_volumes"]):
        np.save(folder / f"v{n}.npy", smooth((size,) * 3, n))
    return VolumeStore.build(sorted(folder.glob("*.npy")), folder / "cache", Preprocess())


def make_trainer(folder: Path, store: VolumeStore) -> Trainer:
    torch.manual_seed(0)
    loader = PatchLoader(store, DEFAULT["patch_size"], batch_size=DEFAULT["batch_size"], threads=1)
    tracker = Tracker(folder / "run", Tracking(wandb="disabled"))
    shown = (DEFAULT["media_volumes"],) * 2
    validation = Validation(store, World(), DEFAULT["patch_size"], *shown)
    return Trainer(
        VAETask(CustomVAE(), VAELoss()), loader, Checkpoints(folder / "checkpoints"), World(),
        tracker, loop=Loop(max_steps=DEFAULT["max_steps"], amp="off"), validate=validation,
        show=lambda network, step: validation.show(network, step, tracker, folder / "media"),
    )  # fmt: skip


def take_step(trainer: Trainer, batches) -> None:
    window = trainer.fetch(batches)
    trainer.update(trainer.backward(window), window)
    trainer.step += 1


def seconds(call) -> float:
    """CPU-seconds of this thread."""
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def stood_still(go_on) -> float:
    """Part of the time, while `go_on()`, that tiny tensor operations wait for the interpreter."""

    def running() -> float:
        used, waited, _ = Path(f"/proc/self/task/{get_native_id()}/schedstat").read_text().split()
        return (int(used) + int(waited)) / 1e9  # on a core, or in line for one

    a, begun, before = torch.ones(16), time.monotonic(), running()
    while go_on():
        for _ in range(100):
            a = a * 0.5 + 0.5
    lasted = time.monotonic() - begun
    return 1 - (running() - before) / lasted


def smooth(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A volume in [0, 1] with structure and noise, so that clips are neither flat nor hopeless."""
    random = np.random.default_rng(seed)
    axes = [np.sin(np.linspace(0, 9 + k, n, dtype=np.float32)) for k, n in enumerate(shape)]
    waves = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return (0.5 + 0.4 * waves + 0.05 * random.standard_normal(shape, np.float32)).clip(0, 1)


def say(what: str, share: float) -> None:
    verdict = "holds" if share < TARGET else "missed"
    print(f"{what}: {share:.2%} of the step time   target {TARGET:.0%} {verdict}", flush=True)


if __name__ == "__main__":
    main()
