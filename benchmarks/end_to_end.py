"""Patches per second of `train_3d.py` beside the same training written with MONAI and TorchIO.

    python benchmarks/end_to_end.py                        # demo volumes, both precisions
    python benchmarks/end_to_end.py --steps 4 --patch 48   # shorter
    python benchmarks/end_to_end.py --data DIR             # volumes of your own

Both train MONAI's AutoencoderKL architecture with AdamW on L1 + KL, on random patches, 8 of each
volume. The peer is the loop of MONAI's and TorchIO's tutorials: SubjectsDataset, Queue with a
uniform sampler, autocast, backward, step; ours is the command itself with everything that a run
does: plan, store, clipping, averaged weights, checks, logging. Every run is a process of its own,
long and short runs alternate, and their difference is the cost of the steps between: start-up,
preprocessing of the store and the last checkpoint cancel. Patches per second need a machine with
nothing else to do; CPU-seconds, which count all threads and child processes, do not. `defaults`
leaves the precision to each (float32 for both, as they ship).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ARCHITECTURE = {
    "channels": [32, 64, 128],
    "num_res_blocks": 2,
    "latent_channels": 4,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
PATCHES_PER_VOLUME = 8
AMP = {"float32": "off", "bfloat16": "bf16"}
TARGETS = {"float32": 1.4, "bfloat16": 1.4, "defaults": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patch", type=int, default=64, help="voxels per axis")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--data", help="folder of volumes; default demo volumes")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # run the peer's loop in this process
    options = parser.parse_args()
    if options.peer:
        train_peer(**json.loads(options.peer))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or make_demo(Path(folder) / "data")
        print("| precision | patches per | train_3d.py | MONAI + TorchIO | ratio | goal |")
        print("|---|---|---|---|---|---|")
        for row in options.rows:
            rounds = [
                speeds_of_a_round(row, data, Path(folder) / f"{row}{n}", options)
                for n in range(options.rounds)
            ]
            for unit, speeds in zip(("s", "CPU-s"), zip(*rounds, strict=True), strict=True):
                mine, peer = (statistics.median(column) for column in zip(*speeds, strict=True))
                ratio = statistics.median(a / b for a, b in speeds)
                print(
                    f"| {row} | {unit} | {mine:.3f} | {peer:.3f} | {ratio:.2f} | {TARGETS[row]} |",
                    flush=True,
                )


def make_demo(folder: Path) -> str:
    """Write a few of the demo volumes."""
    from loaders.demo import write_demo

    write_demo(str(folder), 6, 2.0, 0)
    return str(folder)


def speeds_of_a_round(
    row: str, data: str, out: Path, options: argparse.Namespace
) -> list[tuple[float, float]]:
    """Speed of ours and of the peer, from a short and a long run of each.

    Returns:
        Patches per second, then per CPU-second.
    """
    run = {"data": data, "patch": options.patch, "batch": options.batch}
    costs = []
    for steps in (1, 1 + options.steps):
        mine = seconds_of(ours_command(steps, row, out, **run))
        peer = seconds_of(peer_command(steps, row, **run))
        costs.append((mine, peer))
    patches = options.steps * options.batch
    return [
        tuple(patches / (long[unit] - short[unit]) for short, long in zip(*costs, strict=True))
        for unit in range(2)
    ]


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Seconds that a command took, and processor seconds of it and its children."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours_command(
    steps: int, precision: str, out: Path, data: str, patch: int, batch: int
) -> list[str]:
    """`train_3d.py` on a fresh run folder; the store is kept between runs."""
    options = {
        "data.root": data,
        "data.cache_dir": str(out.parent / "cache"),
        "out_dir": f"{out}_{steps}_{time.monotonic_ns()}",
        "model": "vae3d.models.presets.MonaiVAE",
        **{f"model.{key}": json.dumps(value) for key, value in ARCHITECTURE.items()},
        "patch_size": json.dumps([patch] * 3),
        "patches_per_volume": PATCHES_PER_VOLUME,
        "batch_size": batch,
        "max_steps": steps,
        **({} if precision == "defaults" else {"amp": AMP[precision]}),
        "val_every": 0,
        "media_every": 0,
        "wandb": "disabled",
        "device": "cpu",
    }
    pairs = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "train_3d.py"), *pairs]


def peer_command(steps: int, precision: str, data: str, patch: int, batch: int) -> list[str]:
    """This file as the peer's training loop."""
    run = {"steps": steps, "precision": precision, "data": data, "patch": patch, "batch": batch}
    return [sys.executable, __file__, "--peer", json.dumps(run)]


def train_peer(steps: int, precision: str, data: str, patch: int, batch: int) -> None:
    """The tutorials' loop: TorchIO's Queue, MONAI's network."""
    import torch
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(spatial_dims=3, in_channels=1, out_channels=1, **ARCHITECTURE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    batches = patches(data, patch, batch)
    for _ in range(steps):
        x = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            recon, mean, std = net(x)
            kl = (mean**2 + std**2 - 2 * std.log() - 1).mean() / 2
            loss = (recon - x).abs().mean() + 1e-4 * kl
        loss.backward()
        optimizer.step()


def patches(data: str, patch: int, batch: int) -> Iterator:
    """Batches of random patches, epoch after epoch."""
    import torchio as tio

    files = sorted(path for path in Path(data).rglob("*.nii*"))
    subjects = [tio.Subject(image=tio.ScalarImage(path)) for path in files]
    transform = tio.Compose(
        [tio.ToCanonical(), tio.RescaleIntensity((0, 1), percentiles=(0, 99.5))]
    )
    queue = tio.Queue(
        tio.SubjectsDataset(subjects, transform=transform),
        max_length=4 * PATCHES_PER_VOLUME,
        samples_per_volume=PATCHES_PER_VOLUME,
        sampler=tio.UniformSampler(patch),
        num_workers=0,
    )
    while True:
        for item in tio.SubjectsLoader(queue, batch_size=batch, num_workers=0):
            yield item["image"][tio.DATA].float()


if __name__ == "__main__":
    main()
