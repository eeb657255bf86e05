"""The command line of `train_3d.py` in forked processes, tiny runs of it, and whether two agree."""

import multiprocessing
import os
import socket
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
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
WORK_S, IDLE_S = 600.0, 120.0  # what a run may take of the processor, and how long it may rest
NAP_S = 0.01


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
        self.ranks, self.used = [], {}
        for rank in range(ranks):
            variables = dict(environ or {}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if ranks > 1:
                variables |= dict(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
            mine = troubles and [trouble for trouble in troubles if trouble.rank == rank]
            arguments = (argv, variables, f"{self.output}_{rank}", max_file_bytes, mine)
            self.ranks.append(FORKS.Process(target=train_command, args=arguments))
            self.ranks[-1].start()

    def naps(self):
        """Short waits until all ranks have ended; who hangs is killed, which is an error.

        To hang is to compute for `WORK_S`, or for less than a second in `IDLE_S` of naps. By a
        clock a run would hang that is slow because others use the processor.
        """
        begun, mark, idle_s = self.cpu_s(), 0.0, 0.0
        while any(rank.exitcode is None for rank in self.ranks):
            yield
            time.sleep(NAP_S)
            idle_s += NAP_S
            worked = self.cpu_s() - begun
            if worked > mark + 1:
                mark, idle_s = worked, 0.0
            if worked > WORK_S or idle_s > IDLE_S:
                self.kill()
                texts = [self.text(rank) for rank in range(len(self.ranks))]
                raise AssertionError(f"hangs, after {worked:.0f} s of work: {texts}")

    def cpu_s(self):
        """What the ranks have had of the processor, those that have ended until they did."""
        for rank in self.ranks:
            with suppress(psutil.NoSuchProcess):
                self.used[rank.pid] = sum(psutil.Process(rank.pid).cpu_times()[:2])
        return sum(self.used.values())

    def kill(self):
        for rank in self.ranks:
            rank.kill()

    def wait(self):
        """Exit codes of all ranks."""
        for _ in self.naps():
            pass
        return [rank.exitcode for rank in self.ranks]

    def text(self, rank=0):
        path = Path(f"{self.output}_{rank}")
        return path.read_text() if path.exists() else ""


def run(argv, folder, ranks=1, expect=0):
    process = Process(argv, folder, ranks)
    codes = process.wait()
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
