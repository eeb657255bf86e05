"""Training steps on one volume in slabs: memory and time of a rank, and bytes that travel.

    python benchmarks/spatial.py --shape 128 64 64 --ranks 2 4 --rounds 1
    python benchmarks/spatial.py --shape 128 128 128 --ranks 2 --rounds 3

One process and each number of ranks take turns, a thread each; a step is forward and backward of
the default network with L1 and KL, float32. Printed are medians of the rank that needs most:

- seconds of a step, by the clock and of the processor, and the former as a part of one process's;
- memory at the peak of the step above what the rank held before it, and, without the gradients of
  the weights, which every rank has, as a part of one process's times the ranks (1.00 is perfect);
- bytes of halos that all ranks sent, beside the formula of docs/how/slabs.md;
- what their rows cost in a step: seconds in which a rank waited for rows (it may be for the rank
  that sends them, which is late), and seconds of its processor for the same rows sent again with
  nothing between, the median of five times.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import socket
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vae3d.kernels.memory import pages, trim
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.spatial import slabs
from vae3d.spatial.network import SlabVAE
from vae3d.spatial.slabs import Layout, own_part


class Turn(NamedTuple):
    """What a step took: the most of any rank, but for `sent`, of all together."""

    seconds: float
    cpu_seconds: float
    bytes: float
    waited: float
    travel: float
    sent: int


def main() -> None:
    """Run the turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 64, 64])
    parser.add_argument("--axis", default="x", choices=["x", "y", "z"], help="that is cut")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--checkpointing", default="none", choices=["none", "block", "level"])
    args = parser.parse_args()
    turns: dict[int, list[Turn]] = {ranks: [] for ranks in (1, *args.ranks)}
    for _ in range(args.rounds):
        for ranks, results in turns.items():
            results.append(turn(ranks, args))
    medians = {n: Turn(*map(statistics.median, zip(*rows))) for n, rows in turns.items()}  # noqa: B905
    weights = 4 * sum(p.numel() for p in network(args).parameters())
    one, load = medians[1], os.getloadavg()[0]
    print(f"{args.shape} cut along {args.axis}, channels {args.channels}, float32,"
          f" checkpointing {args.checkpointing}")  # fmt: skip
    print(f"gradients of weights {weights / 1e6:.0f} MB; load {load:.1f} of {os.cpu_count()} cores")
    print(f"{'ranks':>5} {'s/step':>8} {'of one':>7} {'CPU-s':>7} {'MB/rank':>8} {'x ranks':>8}"
          f" {'halo MB':>8} {'formula':>8} {'waited s':>8} {'sent CPU-s':>10}")  # fmt: skip
    for n, row in medians.items():
        share = n * (row.bytes - weights) / (one.bytes - weights)
        print(f"{n:5} {row.seconds:8.2f} {row.seconds / one.seconds:7.2f} {row.cpu_seconds:7.2f}"
              f" {row.bytes / 1e6:8.0f} {share:8.2f} {row.sent / 1e6:8.3f}"
              f" {formula(args, n) / 1e6:8.3f} {row.waited:8.3f} {row.travel:10.3f}")  # fmt: skip
        assert row.sent == formula(args, n), "what was sent is not what the formula says"


def network(args: argparse.Namespace) -> CustomVAE:
    """The default network of some channels; groups of its norms are as many as the least takes."""
    norm = partial(GroupNorm, num_groups=min(32, *args.channels))
    return CustomVAE(channels=tuple(args.channels), norm=norm)


def turn(ranks: int, args: argparse.Namespace) -> Turn:
    """A step of so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(step, (ranks, port, args, results), ranks)
    *most, sent = zip(*(results.get() for _ in range(ranks)), strict=True)
    return Turn(*map(max, most), sum(sent))


def step(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """Take a small step to warm up, then the one that counts."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = network(args)
    vae.set_checkpointing(args.checkpointing)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    axis, small = "xyz".index(args.axis), [16, 16, 16]
    small[axis] = vae.factor[axis] * 2 * ranks
    forward_and_backward(vae, rank, ranks, small, axis)
    dist.barrier()
    pages.forget()
    trim()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    begun, cpu, rows = time.perf_counter(), time.process_time(), Rows()
    sent = forward_and_backward(vae, rank, ranks, args.shape, axis)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak, waited = memory("VmHWM") - before, rows.waited
    results.put((seconds, cpu, peak, waited, rows.travel(), sent))
    dist.destroy_process_group()


class Rows:
    """Looks on as rows are exchanged: how long a rank waits for them, and for them alone."""

    def __init__(self) -> None:
        self.waited, self.seen, self.exchange = 0.0, list[Any](), slabs.exchange
        slabs.exchange = self.watched

    def watched(self, layout: Layout, sent: Any, got: Any, like: Any) -> Any:
        """`slabs.exchange`, of which waiting is timed."""
        self.seen.append((layout, {rank: t.shape for rank, t in sent.items()}, got, like.dtype))
        wait = self.exchange(layout, sent, got, like)

        def timed() -> Any:
            begun = time.perf_counter()
            arrived = wait()
            self.waited += time.perf_counter() - begun
            return arrived

        return timed

    def travel(self) -> float:
        """Seconds of the processor for all exchanges once more, one after another."""
        times = []
        for _ in range(5):
            dist.barrier()
            begun = time.process_time()
            for layout, sent, got, dtype in self.seen:
                like = torch.empty(0, dtype=dtype)
                rows = {rank: like.new_empty(shape) for rank, shape in sent.items()}
                self.exchange(layout, rows, got, like)()
            times.append(time.process_time() - begun)
        return statistics.median(times)


def memory(line: str) -> float:
    """Bytes that this process holds (`VmRSS`), or held at most (`VmHWM`), as Linux tells."""
    found = re.search(rf"{line}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def forward_and_backward(
    vae: CustomVAE, rank: int, ranks: int, shape: Sequence[int], axis: int
) -> int:
    """One step, weights left alone; return the bytes of halos that this rank has sent."""
    slab = [part.stop - part.start for part in own_part(shape, vae.factor, ranks, rank, axis)]
    x, layout = torch.rand(1, 1, *slab), Layout(shape, vae.factor, axis)
    halves: Any = vae if ranks == 1 else SlabVAE(vae, layout)
    posterior = halves.encode(x)
    recon = halves.crop(halves.decode(posterior.sample()), x)
    ((recon - x).abs().mean() + 1e-4 * posterior.kl()).backward()
    for parameter in vae.parameters() if ranks > 1 else ():
        dist.all_reduce(parameter.grad)
    vae.zero_grad()
    return layout.bytes_sent


def formula(args: argparse.Namespace, ranks: int) -> int:
    """Bytes of halos of a step by the formula of docs/how/slabs.md, for the default network.

    A step of norm, activation and convolution sends its input's channels forward and its output's
    backward; other layers send their input's both ways. What is computed again is sent again.
    """
    widths, blocks, latent = args.channels, 2, 4
    plane = math.prod(args.shape) // args.shape["xyz".index(args.axis)]
    planes = [plane >> 2 * level for level in range(len(widths))]
    deep, last = widths[-1], planes[-1]
    other = latent * last  # the decoder's first convolution; the input has no gradient
    fused = [(deep, deep, last)] * 8  # both bottlenecks, then the ends of both halves
    fused += [(deep, 2 * latent, last), (widths[0], 1, planes[0])]
    for level, (width, plane) in enumerate(zip(widths, planes, strict=True)):
        finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        fused += [(c, width, plane) for c in (finer, coarser)]
        fused += [(width, width, plane)] * 2 * (2 * blocks - 1)
        if level:  # down layer, up layer
            other += finer * planes[level - 1] + width * plane
    forward = planes[0] + other + sum(c * plane for c, _, plane in fused)
    backward = other + sum(c * plane for _, c, plane in fused)
    again = forward if args.checkpointing != "none" else 0
    return 4 * (ranks - 1) * 2 * (forward + again + backward)


if __name__ == "__main__":
    main()
