"""Exact mode against MONAI's full forward pass of the same weights: time and memory by budget.

    python benchmarks/exact.py [--sizes 96 128] [--parts decode encode] [--rounds 3]

Each measurement is a process of its own with one thread; methods take turns, rounds are
interleaved, the table gives medians and ratios to MONAI. `cpu s` are processor seconds, which other
jobs disturb less than the clock. Memory is the peak of the process above what it holds before the
call; `x budget` is that peak as a part of the budget. The truth is a full pass of plain layers with
norms in float64; above 160^3, where that takes more than 20 GB, it is our own full pass.
"""

import argparse
import ast
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peak import PeakMemory

from vae3d.exact.executor import decode_exact, encode_exact
from vae3d.models.presets import MonaiVAE

NETWORK = dict(
    spatial_dims=3,
    in_channels=1,
    out_channels=1,
    channels=(32, 64, 64),
    num_res_blocks=1,
    attention_levels=(False, False, False),
    latent_channels=4,
    norm_num_groups=16,
    with_encoder_nonlocal_attn=False,
    with_decoder_nonlocal_attn=False,
)


def networks():
    """MONAI's network and ours with the same weights."""
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(0)
    options = {**NETWORK, "num_res_blocks": (NETWORK["num_res_blocks"],) * 3}
    theirs = AutoencoderKL(**options).eval()
    ours = MonaiVAE(**NETWORK).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def full_in_float64_statistics(vae, part, x):
    """The truth: the plain layers with every group norm in float64."""
    from vae3d.kernels import steps
    from vae3d.models.norm import GroupNorm

    plain = GroupNorm.normalize
    GroupNorm.normalize = lambda self, t: plain(self, t.double()).to(t.dtype)
    try:
        with steps.plain():
            return vae.decode(x)[0] if part == "decode" else vae.encode(x).mean[0]
    finally:
        GroupNorm.normalize = plain


def call(method, part, x, memory_gb):
    theirs, ours = networks()
    if method == "MONAI":
        return lambda: (theirs.decode(x[None]) if part == "decode" else theirs.encode(x[None])[0])[
            0
        ]
    if method == "ours full":
        return lambda: ours.decode(x[None])[0] if part == "decode" else ours.encode(x[None]).mean[0]
    if method == "truth":
        return lambda: full_in_float64_statistics(ours, part, x[None])
    if part == "decode":
        return lambda: decode_exact(ours, x, memory_gb)
    return lambda: encode_exact(ours, x, memory_gb).mean


def make_input(part, size):
    generator = torch.Generator().manual_seed(size)
    shape = (4, *[size // 4] * 3) if part == "decode" else (1, size, size, size)
    return torch.rand(shape, generator=generator)


def one(method, part, size, memory_gb, keep=None):
    """Seconds, CPU seconds and peak bytes of one call, after a small warm-up."""
    torch.set_num_threads(1)
    with torch.no_grad():
        call(method, part, make_input(part, 32), memory_gb)()
        run = call(method, part, make_input(part, size), memory_gb)
        with PeakMemory() as peak:
            begun, cpu = time.perf_counter(), time.thread_time()
            result = run()
            seconds, cpu = time.perf_counter() - begun, time.thread_time() - cpu
    if keep:
        torch.save(result, keep)
    return {"seconds": seconds, "cpu": cpu, "peak": peak.bytes}


def in_fresh_process(*args):
    command = [sys.executable, __file__, "--one", repr(args)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def table(part, size, rounds, budgets, folder):
    methods = [("MONAI", None), ("ours full", None), *(("exact", b) for b in budgets)]
    runs = {method: [] for method in methods}
    truth = folder / "truth.pt"
    in_fresh_process("truth" if size <= 160 else "ours full", part, size, None, str(truth))
    for _ in range(rounds):
        for name, share in methods:
            budget = share and share * runs["MONAI", None][0]["peak"] / 2**30
            file = str(folder / f"{name}{share}.pt")
            runs[name, share].append(in_fresh_process(name, part, size, budget, file))
    middle = {
        m: {k: statistics.median(r[k] for r in runs[m]) for k in ("seconds", "cpu", "peak")}
        for m in methods
    }
    base, expected = middle["MONAI", None], torch.load(truth, weights_only=True)
    print(f"\n{part} {size}^3, {rounds} rounds")
    heads = ("s", "x MONAI", "cpu s", "x MONAI", "GiB", "x MONAI", "x budget", "max d")
    print(f"{'':<22}" + "".join(f"{head:>9}" for head in heads))
    for name, share in methods:
        row = middle[name, share]
        result = torch.load(folder / f"{name}{share}.pt", weights_only=True)
        error = float((result - expected).abs().max() / (expected.max() - expected.min()))
        label = name if share is None else f"{name}, budget {share:.2f}x"
        used = (
            "" if share is None else f"{row['peak'] / (share * runs['MONAI', None][0]['peak']):.2f}"
        )
        print(
            f"{label:<22}{row['seconds']:>9.2f}{row['seconds'] / base['seconds']:>9.2f}"
            f"{row['cpu']:>9.2f}{row['cpu'] / base['cpu']:>9.2f}"
            f"{row['peak'] / 2**30:>9.3f}{row['peak'] / base['peak']:>9.2f}{used:>9}{error:>9.0e}",
            flush=True,
        )


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["decode", "encode"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.18], help="x MONAI")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*ast.literal_eval(options.one))))
        sys.exit()
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            for part in options.parts:
                table(part, size, options.rounds, options.budgets, Path(scratch))
