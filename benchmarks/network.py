"""Time and memory of the network beside MONAI's AutoencoderKL with the same weights, in one run.

    python benchmarks/network.py                                   # every row, most of an hour
    python benchmarks/network.py --grids 64^3 --precisions float32     # a group of rows, minutes
    python benchmarks/network.py --grids 256^2 --modes train infer
    python benchmarks/network.py --modes patches                   # largest patch per memory
    python benchmarks/network.py --modes kept                      # for the backward pass
    python benchmarks/network.py --peer FOLDER    # also the package vae3d2d, installed there

Both networks get the same input and do the same work: a training step (forward, L1 + KL, backward,
AdamW), the same with activation checkpointing, or encoding and decoding. Runs alternate and medians
count; on the CPU, time is that of the processor over all threads, which a busy machine changes less
than the clock. Peak memory is that of a process of its own, above what it held before the network
was built; on a GPU what the allocator handed out. The floor is the sum of the convolutions alone,
forward and backward, in the better of the two memory layouts, with upsampling folded into them.
The largest patches are those of `vae3d plan`: a line through the peaks at 48^3 and 64^3, which is
held against the peak measured at 96^3. What is kept for the backward pass is counted tensor by
tensor, weights apart, with the steps of the CPU off, so it is what a GPU would keep.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vae3d.commands.plan import largest_patch
from vae3d.kernels import steps
from vae3d.kernels.memory import CHANNELS_LAST
from vae3d.kernels.steps import plain
from vae3d.models import upsample
from vae3d.models.presets import VAEModel
from vae3d.models.upsample import InterpUp

CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "channels": (32, 64, 128),
    "num_res_blocks": 2,
    "latent_channels": 4,
    "attention_levels": (False, False, False),
    "norm_num_groups": 32,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
MODES = ("train", "checkpoint", "infer", "patches", "kept")
COLUMNS = "| input | precision | mode | network | time [s] | ratio | peak [MB] | ratio | floor |"
BUDGETS_GB = (8, 16, 24, 80)
# Greatest acceptable ratio to MONAI: (mode, precision) -> time, peak memory. On the CPU.
TARGETS = {
    ("train", "float32"): (0.68, 0.40),
    ("train", "bfloat16"): (0.77, 0.45),
    ("infer", "float32"): (0.65, 0.70),
    ("infer", "bfloat16"): (0.70, 0.65),
    ("checkpoint", "float32"): (1.10, 0.28),
    ("checkpoint", "bfloat16"): (1.10, 0.28),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="*", default=["64^3", "96^3", "256^2"], help="voxels^axes")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", help="folder with the package vae3d2d (pip install --target)")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # measure one network's memory
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peer:
        sys.path.append(options.peer)
    if options.probe:
        print(json.dumps(peak_megabytes(**json.loads(options.probe))))
        return
    names = ["monai", "vae3d"]
    reason = why_not("vae3d2d")
    if reason:
        print(f"vae3d2d is left out: {reason}; pip install --target FOLDER, then --peer FOLDER")
    else:
        names.append("vae3d2d")
    print(f"{options.device}, {options.threads} threads, torch {torch.__version__}")
    grids = [(int(n),) * int(dims) for n, dims in (grid.split("^") for grid in options.grids)]
    for dims in sorted({len(grid) for grid in grids}):
        check_same_numbers(dims)
        counts = ", ".join(f"{name} {operations(name, dims):.2f}" for name in names)
        print(f"{counts} GFLOP per encode + decode, by PyTorch's count for the plain layers")
    modes = [mode for mode in options.modes if mode not in ("patches", "kept")]
    if modes:
        print("\n" + COLUMNS)
        print("|---|---|---|---|---|---|---|---|---|")
    for grid in grids:
        for precision in options.precisions:
            for mode in modes:
                shape = (options.batch, 1, *grid)
                case = {"shape": shape, "precision": precision, "device": options.device}
                report(names, case, mode, options)
    if "patches" in options.modes:
        for precision in options.precisions:
            report_patches(precision, options)
    if "kept" in options.modes:
        report_kept(grids, options.precisions)


def why_not(package: str) -> str | None:
    """Why a package cannot be imported; None when it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


def report(names: list[str], case: dict, mode: str, options: argparse.Namespace) -> None:
    """Print a row per network; ratios are to MONAI without checkpointing."""
    timed = [*names, "monai plain"] if mode == "checkpoint" else names
    steps = {name: make_step(name, mode, **case) for name in timed}
    seconds = {name: [] for name in timed}
    for n in range(options.rounds + 1):
        for name, step in steps.items():
            took = clock(step, case["device"])
            if n:  # the first round builds kernels and allocates
                seconds[name].append(took)
    base = seconds["monai plain" if mode == "checkpoint" else "monai"]
    memory = {name: probe(name, mode, case, options) for name in timed}
    whole = memory["monai plain" if mode == "checkpoint" else "monai"]
    least = floor(case, train=mode != "infer") if mode != "checkpoint" else None
    grid = "x".join(map(str, case["shape"][2:]))
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], base, strict=True))
        time_of = statistics.median(seconds[name])
        part = memory[name] / whole
        verdict = ""
        if name == "vae3d" and case["device"] == "cpu" and (mode, case["precision"]) in TARGETS:
            goals = TARGETS[mode, case["precision"]]
            verdict = f" goal {goals[0]:.2f}, {goals[1]:.2f}"
        above = f"{time_of / least:.2f}x{verdict}" if least else verdict
        print(
            f"| {case['shape'][0]} x {grid} | {case['precision']} | {mode} | {name} "
            f"| {time_of:.2f} | {ratio:.2f} | {memory[name]:.0f} | {part:.2f} | {above} |",
            flush=True,
        )


def report_patches(precision: str, options: argparse.Namespace) -> None:
    """Print the largest cubic patch that trains in a memory, per network."""
    budgets = " | ".join(f"{gb} GB" for gb in BUDGETS_GB)
    print(f"\n| {precision} | peak of 96^3 [MB] | by the line | {budgets} |")
    print("|---|---|---|" + "---|" * len(BUDGETS_GB))
    for label, name, mode in (
        ("MONAI", "monai", "train"),
        ("MONAI, checkpointing", "monai", "checkpoint"),
        ("vae3d", "vae3d", "train"),
        ("vae3d, checkpointing", "vae3d", "checkpoint"),
    ):
        peaks = {}
        for n in (48, 64, 96):
            case = {"shape": (1, 1, n, n, n), "precision": precision, "device": options.device}
            peaks[n] = probe(name, mode, case, options) * 2**20
        measured = {(n,) * 3: peaks[n] for n in (48, 64)}
        slope, rest = statistics.linear_regression([48**3, 64**3], [peaks[48], peaks[64]])
        line = slope * 96**3 + rest
        edges = [largest_patch(measured, (4, 4, 4), gb * 1e9) for gb in BUDGETS_GB]
        print(
            f"| {label} | {peaks[96] / 2**20:.0f} | {line / peaks[96]:.2f}x | "
            + " | ".join(f"{edge[0]}^3" if edge else "none" for edge in edges)
            + " |",
            flush=True,
        )


def report_kept(grids: list[tuple[int, ...]], precisions: list[str]) -> None:
    """Print what autograd keeps after a forward pass, for networks that run layer by layer."""
    print("\n| input | precision | network | kept [MB] | ratio |")
    print("|---|---|---|---|---|")
    for grid, precision in product(grids, precisions):
        x = torch.rand(1, 1, *grid)
        base = None
        for label, name, context in (
            ("MONAI", "monai", nullcontext),
            ("vae3d, plain layers", "vae3d", plain),
            ("vae3d", "vae3d", nullcontext),
        ):
            net = BUILD[name](len(grid), False)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
                patch.object(steps, "is_fast", lambda *_: False),
                patch.object(upsample, "is_fast", lambda *_: False),
                context(),
            ):
                kept = kept_megabytes(net, x)
            base = base or kept
            size = "x".join(map(str, grid))
            print(
                f"| {size} | {precision} | {label} | {kept:.0f} | {kept / base:.2f} |", flush=True
            )


def kept_megabytes(net: nn.Module, x: torch.Tensor) -> float:
    """Memory that autograd holds after a forward pass, that of the weights apart."""
    kept, weights = {}, {p.data_ptr() for p in net.parameters()}

    def note(t):
        if t.data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = net(x)  # held, so that no memory is counted for two tensors
    assert out is not None
    return sum(kept.values()) / 2**20


def make_step(
    name: str, mode: str, shape: tuple[int, ...], precision: str, device: str
) -> Callable[[], None]:
    """One training step, or one encoding and decoding, of a network as a function."""
    torch.manual_seed(0)
    net = BUILD[name.split()[0]](len(shape) - 2, mode == "checkpoint" and name != "monai plain")
    net = net.to(device)
    x = torch.rand(shape, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    if mode == "infer":
        net.eval()

        def infer():
            with torch.no_grad(), autocast:
                ROUND_TRIP[name.split()[0]](net, x)

        return infer
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            recon, mean, std = net(x)[:3]
        kl = (mean.float() ** 2 + std.float() ** 2 - 2 * std.float().log() - 1).mean() / 2
        loss = (recon.float() - x).abs().mean() + 1e-6 * kl
        loss.backward()
        optimizer.step()

    return train


def monai_net(dims: int, checkpointing: bool) -> nn.Module:
    from monai.networks.nets import AutoencoderKL

    return AutoencoderKL(spatial_dims=dims, use_checkpoint=checkpointing, **CONFIG)


def vae3d_net(dims: int, checkpointing: bool) -> nn.Module:
    return VAEModel.from_config({"spatial_dims": dims, "use_checkpoint": checkpointing, **CONFIG})


def vae3d2d_net(dims: int, checkpointing: bool) -> nn.Module:
    """The nearest that package has: the same widths, factor and latent; not the same arithmetic."""
    from vae3d2d import CustomVAE

    class WithMoments(CustomVAE):
        def forward(self, x):
            z = self.encode(x)
            mean, std = (z[0], z[1]) if isinstance(z, tuple) else (z, torch.ones_like(z))
            return self.decode(mean), mean, std.abs() + 1e-3

    return WithMoments(
        spatial_dims=dims,
        vae_latent_channels=CONFIG["latent_channels"],
        init_filters=CONFIG["channels"][0],
        smallest_filters=CONFIG["channels"][-1],
        blocks_down=(2, 2, 2),
        blocks_up=(2, 2),
        downsample_strides=[(2,) * dims] * 2,
        vae_down_stride=(1,) * dims,
        use_checkpoint=checkpointing,
    )


BUILD = {"monai": monai_net, "vae3d": vae3d_net, "vae3d2d": vae3d2d_net}
ROUND_TRIP = {
    "monai": lambda net, x: net.decode(net.encode(x)[0]),
    "vae3d": lambda net, x: net.decode(net.encode(x)[0]),
    "vae3d2d": lambda net, x: net(x),
}


def check_same_numbers(dims: int) -> None:
    """Same weights, same input: print how far the two reconstructions are apart."""
    theirs, ours = monai_net(dims, False).eval(), vae3d_net(dims, False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(1, 1, *(24, 16, 32)[:dims])
    with torch.no_grad():
        a, b = ours.decode(ours.encode(x)[0]), theirs.decode(theirs.encode(x)[0])
    error = ((a - b).abs().max() / b.abs().max()).item()
    print(f"largest difference of the reconstructions: {error:.1e} of the largest value")
    assert error < 1e-4


def operations(name: str, dims: int) -> float:
    """10^9 multiplications and additions to encode and decode 32 voxels per axis."""
    net, x = BUILD[name](dims, False).eval(), torch.rand(1, 1, *(32,) * dims)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain():
        ROUND_TRIP[name](net, x)
    return counter.get_total_flops() / 1e9


def clock(step: Callable[[], None], device: str) -> float:
    """Processor seconds of all threads on the CPU, wall seconds on a GPU."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def probe(name: str, mode: str, case: dict, options: argparse.Namespace) -> float:
    """Peak memory in MB, measured in a process of its own."""
    request = json.dumps({"name": name, "mode": mode, **case})
    command = [sys.executable, __file__, "--probe", request, "--threads", str(options.threads)]
    if options.peer:
        command += ["--peer", options.peer]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def peak_megabytes(name: str, mode: str, **case) -> float:
    """Growth of this process's memory at its peak over two runs, network included."""
    if case["device"] != "cpu":
        step = make_step(name, mode, **case)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 2**20
    BUILD[name.split()[0]](len(case["shape"]) - 2, False)
    load_libraries()
    before = status_megabytes("VmRSS")
    step = make_step(name, mode, **case)
    for _ in range(2):  # the second meets what the first left behind
        step()
    return status_megabytes("VmHWM") - before


def load_libraries() -> None:
    """Import what a first training step imports, some 60 MB that are not the network's."""
    layer = nn.Conv3d(1, 1, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    checkpoint(layer, torch.rand(1, 1, 4, 4, 4), use_reentrant=False).sum().backward()
    optimizer.step()


def status_megabytes(key: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def floor(case: dict, train: bool) -> float | None:
    """Seconds of the convolutions alone, each in its better layout; None on a GPU."""
    if case["device"] != "cpu":
        return None
    net, shapes, doubled = vae3d_net(len(case["shape"]) - 2, False), Counter(), set()

    def note(layer, inputs, _output):
        shape, weight = tuple(inputs[0].shape), tuple(layer.weight.shape)
        stride, padding = tuple(layer.stride), tuple(layer.padding)
        if layer in doubled:  # all phases as channels of one convolution on the coarse grid
            dims = len(stride)
            shape = (*shape[:2], *(n // 2 for n in shape[2:]))
            weight = (2**dims * weight[0], weight[1], *(2,) * dims)
        shapes[shape, weight, stride, padding, layer is not first] += 1

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    first = layers[0]
    doubled.update(m.conv for m in net.modules() if isinstance(m, InterpUp))
    for layer in layers:
        layer.register_forward_hook(note)
    with torch.no_grad():
        net.decode(net.encode(torch.rand(case["shape"]))[0])
    dtypes = {torch.float32, getattr(torch, case["precision"])}
    return sum(
        count
        * min(time_convolution(*key, dtype, last, train) for dtype in dtypes for last in (0, 1))
        for key, count in shapes.items()
    )


def time_convolution(shape, weight, stride, padding, need_x, dtype, last: bool, train: bool):
    """Processor seconds of one convolution, and of its gradients when `train`, best of two."""
    layout = CHANNELS_LAST[len(shape)] if last else torch.contiguous_format
    x = torch.randn(shape).to(dtype, memory_format=layout)
    w = torch.randn(weight).to(dtype, memory_format=layout)
    ones, zeros = (1,) * len(stride), (0,) * len(stride)
    y = torch.mkldnn_convolution(x, w, None, padding, stride, ones, 1)

    def once():
        torch.mkldnn_convolution(x, w, None, padding, stride, ones, 1)
        if train:
            torch.ops.aten.convolution_backward(
                y, x, w, None, stride, padding, ones, False, zeros, 1, [need_x, True, False]
            )

    return min(clock(once, "cpu") for _ in range(2))


if __name__ == "__main__":
    main()
