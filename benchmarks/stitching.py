"""Stitching: identity model, ours against TorchIO's GridAggregator and MONAI's sliding window.

    python benchmarks/stitching.py [--rounds 5] [--size small|large]

All methods run in turn in one process, several rounds; the table gives medians, in processor
seconds, and their ratios.
The byte limit is what any method must do with the tiles: copy each out of the volume, and add it to
a volume-sized sum (for crop: copy each voxel once).
Memory is the peak of a fresh process above what it holds before the call, the result included.
"""

import argparse
import ast
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from peak import PeakMemory

from vae3d.inference.stitching import Stitcher, iter_slabs, stitch

SIZES = {"small": ((256, 256, 192), (96, 96, 96)), "large": ((512, 512, 384), (128, 128, 128))}


def identity(x):
    return x


def byte_limit(x, patch):
    """Gather every tile once and add it once."""
    out = torch.zeros_like(x)
    for corner in Stitcher(x.shape[1:], patch, 0.5).corners():
        where = (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
        out[where] += x[where].clone()
    return out


def copy_limit(x, patch):
    """Gather every tile once and copy the part it owns."""
    out = torch.empty_like(x)
    stitcher = Stitcher(x.shape[1:], patch, 0.5, "crop")
    for corner, index in zip(stitcher.corners(), np.ndindex(*stitcher.seen.shape), strict=True):
        tile = x[
            (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
        ].clone()
        spans = [axis[i] for axis, i in zip(stitcher.spans, index, strict=True)]
        source = (slice(None), *(slice(s.offset, s.offset + s.hi - s.lo) for s in spans))
        out[(slice(None), *(slice(s.lo, s.hi) for s in spans))] = tile[source]
    return out


def ours(blend):
    return lambda x, patch: stitch(identity, x, patch, 0.5, blend)


def streaming(x, patch):
    for _, slab in iter_slabs(identity, x, patch, 0.5):
        del slab  # as one does who has written it


def torchio_hann(x, patch):
    import torchio as tio

    subject = tio.Subject(image=tio.ScalarImage(tensor=x))
    sampler = tio.inference.GridSampler(subject, patch, [p // 2 for p in patch])
    aggregator = tio.inference.GridAggregator(sampler, overlap_mode="hann")
    for batch in torch.utils.data.DataLoader(sampler, batch_size=1):
        aggregator.add_batch(batch["image"]["data"], batch[tio.LOCATION])
    return aggregator.get_output_tensor()


def monai_gaussian(x, patch):
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(
        x[None], patch, 1, lambda t: t.clone(), overlap=0.5, mode="gaussian"
    )[0]


METHODS = {
    "byte limit": byte_limit,
    "copy limit (crop)": copy_limit,
    "ours hann": ours("hann"),
    "ours gaussian": ours("gaussian"),
    "ours crop": ours("crop"),
    "ours streaming": streaming,
    "TorchIO hann": torchio_hann,
    "MONAI gaussian": monai_gaussian,
}


def memory_in_fresh_process(name, shape, patch) -> int:
    command = [sys.executable, __file__, "--memory", name, str([shape, patch])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(shape, patch, rounds):
    x = torch.rand(1, *shape)
    times = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, method in METHODS.items():
            begun = time.process_time()
            method(x, patch)
            times[name].append(time.process_time() - begun)
    times = {name: statistics.median(values) for name, values in times.items()}
    volume = x.numel() * 4
    print(f"\n{shape} in patches of {patch}, overlap 0.5, {rounds} rounds, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':<20}{'cpu s':>8}{'x limit':>9}{'memory / volume':>17}{'max error':>11}")
    for name, method in METHODS.items():
        limit = times["copy limit (crop)" if "crop" in name else "byte limit"]
        memory = memory_in_fresh_process(name, shape, patch) / volume
        result = method(x, patch)
        error = "" if result is None else f"{float((result - x).abs().max()):.1e}"
        print(f"{name:<20}{times[name]:>8.3f}{times[name] / limit:>9.2f}{memory:>17.2f}{error:>11}")
    for peer, mine in (("TorchIO hann", "ours hann"), ("MONAI gaussian", "ours gaussian")):
        print(f"{mine} is {times[peer] / times[mine]:.2f}x as fast as {peer}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, help="default: both")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with torch.no_grad():
        if options.memory:
            size, tile = ast.literal_eval(options.memory[1])
            METHODS[options.memory[0]](torch.rand(1, *tile), tile)  # imports, thread pools
            x = torch.rand(1, *size)
            with PeakMemory() as peak:
                METHODS[options.memory[0]](x, tile)
            print(peak.bytes)
            sys.exit()
        for name in [options.size] if options.size else SIZES:
            measure(*SIZES[name], options.rounds)
