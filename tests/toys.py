"""Stand-ins for tests of the trainer: data in memory, a tiny VAE, ranks as forked processes."""

import io
import multiprocessing
import os
import socket
import traceback
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.training.checkpoint import Checkpoints
from vae3d.training.distributed import World, open_world
from vae3d.training.options import Loop
from vae3d.training.task import VAETask
from vae3d.training.trainer import Trainer

SHAPE = (8, 4, 12)  # not cubic


@dataclass
class ToyBatch:
    image: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor | None = None

    def to(self, device, non_blocking=False):
        return replace(self, image=self.image.to(device))


class ToyLoader:
    """Shuffled samples in memory, cut over ranks as `loaders.PatchLoader` cuts its plan."""

    def __init__(self, samples=10, batch_size=2, rank=0, world_size=1, seed=0):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(samples, 1, *SHAPE, generator=generator)
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.consumed = 0

    def stream(self):
        size = self.batch_size * self.world_size
        while True:
            rows = [self._row(i) for i in range(self.consumed, self.consumed + size)]
            self.consumed += size
            mine = torch.tensor(rows[self.rank :: self.world_size])
            yield ToyBatch(self.images[mine], mine)

    def _row(self, place):
        epoch, row = divmod(place, len(self.images))
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        return int(torch.randperm(len(self.images), generator=generator)[row])

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["consumed"]


class Recorder:
    """A tracker that keeps the lines in memory."""

    run_id = "toy"

    def __init__(self):
        self.rows = {}

    def log(self, values, step):
        self.rows.setdefault(step, {}).update(values)

    def losses(self, name="train/loss"):
        return [row[name] for _, row in sorted(self.rows.items()) if name in row]


class OnGPU(torch.Tensor):
    """A tensor that has to be brought to the CPU before NumPy or another process may have it."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def tiny_vae(seed=0, **options):
    torch.manual_seed(seed)
    defaults = dict(channels=(4, 8), num_res_blocks=1, norm=partial(GroupNorm, num_groups=4))
    return CustomVAE(**(defaults | options))


def toy_trainer(folder, world=None, loss=VAELoss, loader=None, task=None, batch_size=2, **options):
    """A trainer on toy data that logs every step; `.tracker` is a Recorder."""
    world = world or World()
    loader = loader or ToyLoader(10, batch_size, world.rank, world.size)
    defaults = dict(max_steps=8, lr=1e-2, warmup_steps=0, log_every=1, save_every=100)
    options = defaults | dict(ema_decay=0.9, amp="off", trackers=()) | options
    loop = Loop(**{f.name: options.pop(f.name) for f in fields(Loop) if f.name in options})
    task = task or VAETask(tiny_vae(), loss(), seed=0)
    files = Checkpoints(folder)
    trainer = Trainer(task, loader, files, world, Recorder(), loop=loop, **options)
    for group in trainer.optimizers["generator"].param_groups:
        group["eps"] = 1e-3  # else Adam blows up the rounding of gradients that are zero
    return trainer


def on_ranks(count, fn, *args, timeout_s=120):
    """Run `fn(world, *args)` on `count` gloo ranks, forked, and return what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        environ = dict(
            RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        process = context.Process(target=_rank_main, args=(theirs, environ, fn, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    for rank, pipe in enumerate(pipes):
        assert pipe.poll(timeout_s), f"rank {rank} did not answer in {timeout_s} s"
        results.append(pipe.recv())
    for process in processes:
        process.join(timeout_s)
    failures = [text for ok, text in results if not ok]
    assert not failures, "\n".join(failures)
    return [torch.load(io.BytesIO(value), weights_only=True) for _, value in results]


def _rank_main(pipe, environ, fn, args):
    os.environ.update(environ)
    torch.set_num_threads(1)
    try:
        with open_world("cpu", timeout_minutes=1) as world:
            value = io.BytesIO()
            torch.save(fn(world, *args), value)
            pipe.send((True, value.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)
