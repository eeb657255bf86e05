"""The command line of `train_3d.py` in forked processes, tiny runs of it, and whether two agree."""

import multiprocessing
import os
import socket
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from commanded import train_command

from vae3d.tracking.tracker import read_metrics
from vae3d.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = """
model:
  class_path: CustomVAE
  init_args:
    channels: [4, 8]
    num_res_blocks: 1
    encoder_mid: false
    decoder_mid: false
    norm: {class_path: GroupNorm, init_args: {num_groups: 4}}
patch_size: [8, 8, 8]
patches_per_volume: 2
batch_size: 2
max_steps: 8
lr: 1e-3
warmup_steps: 2
log_every: 1
val_every: 4
media_every: 0
save_every: 2
threads: 0
wandb: disabled
device: cpu
amp: off
"""
GAN = """
loss:
  class_path: VAELoss
  init_args:
    recon: {class_path: Charbonnier}
    kl: {class_path: KL, init_args: {weight: 1e-3, warmup_steps: 4, target_std: 1.0}}
    adversarial:
      class_path: Adversarial
      init_args:
        start_step: 3
        spatial_dims: 3
        discriminator:
          class_path: PatchDiscriminator
          init_args: {channels: 4, num_layers: 2, norm_groups: 4}
    extra: [{class_path: GradientDifference, init_args: {weight: 0.1}}]
data:
  augment: {RandomNoise: {std: [0.0, 0.05]}}
"""


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Ten small volumes of unequal size, each with a pattern of its own."""
    folder = tmp_path_factory.mktemp("volumes")
    generator = np.random.default_rng(0)
    for i in range(10):
        shape = (12 + i % 3, 16, 10)
        grid = np.stack(np.meshgrid(*[np.linspace(0, 3, n) for n in shape], indexing="ij"))
        image = np.sin(grid * (1 + i / 3)).sum(0) + 0.1 * generator.standard_normal(shape)
        np.save(folder / f"subject_{i:02d}.npy", image.astype(np.float32))
    return folder


FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """Children are forks of a clean server that has imported what a run needs.

    They start fast, and have neither this process's threads, whose locks a fork of it could wait
    for, nor its libraries. The server finds modules by PYTHONPATH only.
    """
    FORKS.set_forkserver_preload(["commanded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


class Process:
    """One or more ranks of the command line; output goes to files."""

    def __init__(self, argv, folder, ranks=1, environ=None, max_file_bytes=-1, troubles=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.output = Path(folder) / f"output_{time.monotonic_ns()}"
        self.ranks = []
        for rank in range(ranks):
            variables = dict(environ or {}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if ranks > 1:
                variables |= dict(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
            mine = troubles and [trouble for trouble in troubles if trouble.rank == rank]
            arguments = (argv, variables, f"{self.output}_{rank}", max_file_bytes, mine)
            self.ranks.append(FORKS.Process(target=train_command, args=arguments))
            self.ranks[-1].start()

    def wait(self, timeout_s=120):
        """Exit codes of all ranks."""
        for process in self.ranks:
            process.join(timeout_s)
            assert process.exitcode is not None, self.text()
        return [process.exitcode for process in self.ranks]

    def text(self, rank=0):
        path = Path(f"{self.output}_{rank}")
        return path.read_text() if path.exists() else ""


def run(argv, folder, ranks=1, expect=0, timeout_s=300):
    process = Process(argv, folder, ranks)
    codes = process.wait(timeout_s)
    assert codes == [expect] * ranks, process.text()
    return process.text()


def losses(folder, name="train/loss"):
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def assert_same_run(a, b):
    """Losses, validation and every tensor of the last and the best checkpoint, bit by bit."""
    for name in ("train/loss", "train/recon", "train/kl", "val/mae"):
        assert losses(a, name) == losses(b, name)
    for name in ("last.pt", "best.pt"):
        one, two = (load_checkpoint(Path(f) / "checkpoints" / name) for f in (a, b))
        for part in ("model", "ema", "task", "optimizers", "scaler", "loader", "samples", "best"):
            assert_equal(one[part], two[part], f"{name} {part}")


def assert_equal(a, b, where):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            assert_equal(p, q, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where
