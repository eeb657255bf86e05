"""Training steps on one volume in slabs: time, memory of a rank, and bytes that travel.

    python benchmarks/spatial.py --size 128 --ranks 2 --rounds 3

One process and each number of ranks take turns, a thread each; a step is forward and backward of
the default network with L1 and KL, float32. Printed are medians: seconds of a step and the most
memory that it took a rank beyond what it began with, both also as parts of one process's, and the
bytes of halos that all ranks sent, beside the formula of docs/how/slabs.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vae3d.models.custom_vae import CustomVAE
from vae3d.spatial.network import SlabVAE
from vae3d.spatial.slabs import Layout, cut


def main() -> None:
    """Run the turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="voxels along each axis")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--checkpointing", default="none", choices=["none", "block", "level"])
    args = parser.parse_args()
    turns: dict[int, list[tuple[float, float, int]]] = {ranks: [] for ranks in (1, *args.ranks)}
    for _ in range(args.rounds):
        for ranks, results in turns.items():
            results.append(turn(ranks, args))
    times, memory = (
        {n: statistics.median(row[i] for row in rows) for n, rows in turns.items()} for i in (0, 1)
    )
    print(f"{args.size}^3, channels {args.channels}, checkpointing {args.checkpointing}, float32")
    print(f"{'ranks':>5} {'s/step':>8} {'of one':>7} {'MB/rank':>8} {'of one':>7} {'halo MB':>8}")
    for n, rows in turns.items():
        parts = times[n] / times[1], memory[n] / memory[1]
        print(f"{n:5} {times[n]:8.2f} {parts[0]:7.2f} {memory[n] / 1e6:8.0f} {parts[1]:7.2f} "
              f"{rows[0][2] / 1e6:8.2f}")  # fmt: skip
        if n > 1:
            print(f"      formula: {formula(args, n) / 1e6:.2f} MB of halos")


def turn(ranks: int, args: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds of a step, bytes of a rank's step, and bytes of halos of all ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(step, (ranks, port, args, results), ranks)
    found = [results.get() for _ in range(ranks)]
    return max(f[0] for f in found), max(f[1] for f in found), sum(f[2] for f in found)


def step(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """Take a small step to warm up, then the one that counts."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = CustomVAE(channels=tuple(args.channels))
    vae.set_checkpointing(args.checkpointing)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    forward_and_backward(vae, rank, ranks, vae.factor[0] * 2 * ranks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.barrier()
    begun = time.perf_counter()
    sent = forward_and_backward(vae, rank, ranks, args.size)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put((seconds, 1024.0 * (after - before), sent))
    dist.destroy_process_group()


def forward_and_backward(vae: CustomVAE, rank: int, ranks: int, size: int) -> int:
    """One step, weights left alone; return the bytes of halos that this rank has sent."""
    lo, hi = cut(size, ranks, vae.factor[0])[rank]
    x = torch.rand(1, 1, hi - lo, size, size)
    layout = Layout(size, vae.factor[0])
    halves: Any = vae if ranks == 1 else SlabVAE(vae, layout)
    posterior = halves.encode(x)
    recon = halves.crop(halves.decode(posterior.sample()), x)
    ((recon - x).abs().mean() + 1e-4 * posterior.kl()).backward()
    for parameter in vae.parameters() if ranks > 1 else ():
        dist.all_reduce(parameter.grad)
    vae.zero_grad()
    return layout.bytes_sent


def formula(args: argparse.Namespace, ranks: int) -> int:
    """Bytes of halos of a step by the formula of docs/how/slabs.md, for the default network."""
    widths, blocks, latent = args.channels, 2, 4
    planes = [(args.size >> level) ** 2 for level in range(len(widths))]
    deepest = widths[-1] * planes[-1]
    values = 5 * deepest + (latent * planes[-1] + 4 * deepest) + widths[0] * planes[0]
    for level, (width, plane) in enumerate(zip(widths, planes, strict=True)):
        finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        values += (finer + coarser + 2 * (2 * blocks - 1) * width) * plane  # both halves
        if level:  # down layer, up layer
            values += finer * planes[level - 1] + width * plane
    first = planes[0]  # the input has no gradient
    return 4 * (ranks - 1) * 2 * (2 * values + first)


if __name__ == "__main__":
    main()
