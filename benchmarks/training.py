"""What the training loop costs beside the network, as a ratio to a bare loop, in one run.

    python benchmarks/training.py                    # 3 rounds of 40 steps each
    python benchmarks/training.py --steps 10 --rounds 1

Both loops see the same batches of random patches from the same loader settings, the same network,
loss and AdamW. The bare loop is forward, backward and optimizer step; the trainer clips, averages
the weights, looks for numbers that are not finite, reads ahead, logs and tracks as in a real run.
Speed is per second and per CPU-second of all threads, which a busy machine does not change; rounds
alternate and the median of their ratios counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from loaders import PatchLoader, Preprocess, VolumeStore
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.tracking.options import Tracking
from vae3d.tracking.tracker import Tracker
from vae3d.training.checkpoint import Checkpoints
from vae3d.training.distributed import World
from vae3d.training.options import Loop
from vae3d.training.task import VAETask
from vae3d.training.trainer import Trainer

TARGET = 0.97
PATCH = (32, 32, 32)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each loop")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        rows = []
        for n in range(options.rounds):
            bare = bare_loop(store, options.steps)
            ours = trainer_loop(store, options.steps, Path(folder) / f"run{n}")
            rows.append((bare, ours))
            for unit, slow, fast in zip(("s", "CPU-s"), bare, ours, strict=True):
                print(
                    f"round {n}  patches/{unit}: bare {slow:.2f}, trainer {fast:.2f}, "
                    f"{fast / slow:.3f}"
                )
    ratios = [statistics.median(ours[i] / bare[i] for bare, ours in rows) for i in range(2)]
    for unit, ratio in zip(("second", "CPU-second"), ratios, strict=True):
        verdict = "holds" if ratio >= TARGET else "missed"
        print(f"trainer : bare loop = {ratio:.3f} per {unit}   target {TARGET} {verdict}")
    return min(ratios)


def make_store(folder: Path):
    generator = np.random.default_rng(0)
    for i in range(4):
        np.save(folder / f"v{i}.npy", generator.random((64, 64, 64), dtype=np.float32))
    paths = sorted(folder.glob("*.npy"))
    return VolumeStore.build(paths, folder / "cache", Preprocess())


def make_loader(store):
    return PatchLoader(store, PATCH, batch_size=2, threads=1)


def make_task() -> VAETask:
    torch.manual_seed(0)
    norm = partial(GroupNorm, num_groups=8)
    return VAETask(CustomVAE(channels=(16, 32, 64), num_res_blocks=1, norm=norm), VAELoss())


def bare_loop(store, steps: int) -> tuple[float, float]:
    """Patches per second and per CPU-second of forward, backward and optimizer step."""
    task, batches = make_task(), make_loader(store).stream()
    optimizer = torch.optim.AdamW(task.parameters(), 1e-4, fused=True)

    def step(n: int) -> int:
        batch = next(batches)
        task(batch, n)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return len(batch.image)

    step(0)  # allocations and primitive caches
    clock = Clock()
    patches = sum(step(n) for n in range(1, steps + 1))
    speed = clock.speed(patches)
    batches.close()
    return speed


def trainer_loop(store, steps: int, folder: Path) -> tuple[float, float]:
    """The same of the trainer with everything on but validation and checkpoints."""
    tracker = Tracker(folder, Tracking(wandb="offline"))
    trainer = Trainer(
        make_task(), make_loader(store), Checkpoints(folder / "checkpoints"), World(), tracker,
        loop=Loop(max_steps=1, lr=1e-4, warmup_steps=0, save_every=0, amp="off"),
    )  # fmt: skip
    trainer.fit()
    trainer.loop = replace(trainer.loop, max_steps=steps + 1)
    before = trainer.samples
    settle()
    clock = Clock()
    trainer.fit()
    speed = clock.speed(trainer.samples - before)
    tracker.close(5)
    return speed


class Clock:
    """Time since it was made, on the wall and of the processor."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def speed(self, patches: int) -> tuple[float, float]:
        """Patches per second and per CPU-second."""
        now = time.perf_counter(), time.process_time()
        return tuple(patches / (b - a) for a, b in zip(self.start, now, strict=True))


def settle() -> None:
    """Wait until the threads of the tracker have started and are idle."""
    used = -1.0
    while time.process_time() - used > 0.01:
        used = time.process_time()
        time.sleep(1.0)


if __name__ == "__main__":
    main()
