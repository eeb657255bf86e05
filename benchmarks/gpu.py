"""All that only a GPU can tell, in one run of six minutes at most: `make gpu-check`.

    make gpu-check PYTHON=python3          # nothing is installed; what lacks a library is left out
    python benchmarks/gpu.py steps syncs   # some parts
    python benchmarks/gpu.py --tiny        # a dry run, to try out the script; --device cpu is one

The parts run in the order of their worth, each in a process and a time of its own. After each the
table is written anew, as docs/benchmarks.md takes it. Exit code 1 where a part has failed or was
stopped at its time; 2, and a line, without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TOTAL_S = 350  # with the start of the last part under six minutes
GOALS = {"train": (0.50, 0.45), "encode + decode": (0.50, 0.60)}  # of MONAI's time and memory
SIZES = (2, 96), (4, 64)  # of the training steps that are timed: patches, and voxels per axis
HEAD = "| part | what | figures |\n|---|---|---|\n"
Row = tuple[str, str]  # what was measured, and the figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all unless named")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, ten times as much time")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"), help="the table")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # this process does that part
    options = parser.parse_args()
    tiny = options.tiny or options.device == "cpu"
    if options.part:
        run_part(options.part, options.device, tiny)
        return 0
    begun, lines, failed = time.monotonic(), [], False
    if (title := name_of(options.device)) is None:
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part at hand, too
    title += ", tiny sizes" * tiny
    print(title, flush=True)
    for part in options.parts or PARTS:
        limit = PARTS[part][1] * (10 if tiny else 1)
        left = math.inf if tiny else TOTAL_S - (time.monotonic() - begun)
        found, well = [f"| {part} | | left out: no time |"], True
        if left > 5:
            how = ["--device", options.device, *["--tiny"] * tiny]
            found, well = in_a_process(part, min(limit, left), how)
        lines += found
        failed |= not well
        options.out.write_text(f"{title}\n\n{HEAD}" + "\n".join(lines) + "\n")
    print(f"{time.monotonic() - begun:.0f} s; the table is in {options.out}")
    return int(failed)


def name_of(device: str) -> str | None:
    """The card and the libraries that drive it; None, and a line, where there is none."""
    try:
        import torch
    except ImportError:
        print("no GPU can be reached: this Python has no torch; choose one by make's PYTHON=")
        return None
    if device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here, so nothing is measured (--device cpu tries out the script)")
        return None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def in_a_process(part: str, limit: float, options: Sequence[str]) -> tuple[list[str], bool]:
    """Run a part within its time; the lines of its table, and whether it ended well."""
    command = [sys.executable, sys.argv[0], "--part", part, *options]
    since, why = time.monotonic(), ""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True)
        try:
            if code := process.wait(limit):
                why = f"FAILED: exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"STOPPED after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # what it has started, and may have left behind
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # as one that waits for a driver that hangs
            process.wait(10)
        for file in (said, errors):
            file.seek(0)
        lines = [line.rstrip() for line in said if line.startswith("|")]
        if why:
            tail = errors.read().strip().splitlines()[-12:] or [""]
            print(*tail, sep="\n")
            lines.append(f"| {part} | | {why}, {tail[-1][:200].replace('|', '/')} |")
    print(*lines, f"== {part}: {time.monotonic() - since:.0f} s", sep="\n", flush=True)
    return lines, not why


def run_part(part: str, device: str, tiny: bool) -> None:
    """Print a part's rows; a library that is missing leaves it out."""
    try:
        for what, figures in PARTS[part][0](Bench(device, tiny)):
            print(f"| {part} | {what} | {figures} |", flush=True)
    except ModuleNotFoundError as error:
        print(f"| {part} | | left out: no {error.name} |", flush=True)


class Bench:
    """The device that is measured, and how.

    Args:
        device: cuda | cpu.
        tiny: Everything is, to try out the parts.
    """

    def __init__(self, device: str, tiny: bool):
        import torch

        self.torch, self.device, self.on_gpu = torch, torch.device(device), device == "cuda"
        self.tiny, self.bf16 = tiny, torch.bfloat16

    def size(self, large: int, tiny: int = 16) -> int:
        """A length, or the tiny one of a dry run."""
        return tiny if self.tiny else large

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], rounds: int = 7, warm: int = 3) -> float:
        """Median time of a call on the device."""
        for _ in range(warm):
            call()
        times = []
        for _ in range(rounds):
            self.wait()
            since = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - since))
        return statistics.median(times)

    def host_milliseconds(self, call: Callable[[], object]) -> float:
        """Time until a call returns, its kernels still in the queue."""
        self.wait()
        since = time.perf_counter()
        call()
        took = 1e3 * (time.perf_counter() - since)
        self.wait()
        return took

    def fresh(self) -> None:
        """Forget what earlier work has left in memory."""
        if self.on_gpu:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Highest memory handed out since `fresh` [GB]."""
        return self.torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else float("nan")

    def autocast(self, on: bool = True):
        """bfloat16 for convolutions and products."""
        return self.torch.autocast(self.device.type, self.bf16, enabled=on)

    def batch(self, count: int, size: int):
        """Samples of noise, as the loader gives them."""
        from loaders import Batch

        zeros = self.torch.zeros(count, 3, dtype=self.torch.long)
        image = self.torch.rand(count, 1, size, size, size, device=self.device)
        return Batch(image, zeros[:, 0], zeros, self.torch.arange(count))

    def vae(self, **options):
        """The default network; a narrow one for dry runs, and where `channels` say so."""
        from vae3d.models.custom_vae import CustomVAE
        from vae3d.models.norm import GroupNorm

        narrow = dict(channels=(8, 16), num_res_blocks=1, norm=partial(GroupNorm, num_groups=4))
        self.torch.manual_seed(0)
        return CustomVAE(**narrow | options if self.tiny else options).to(self.device)

    def step(self, vae, count: int, size: int, amp: bool = True, augment=None):
        """A training step of a network on one batch, as a function."""
        from vae3d.losses.vae_loss import VAELoss
        from vae3d.training.optimizers import adamw
        from vae3d.training.task import VAETask

        task = VAETask(vae, VAELoss().to(self.device), augment=augment)
        optimizer = adamw([*task.parameters()], 1e-4, (0.9, 0.99), 0.0)
        batch, updates = self.batch(count, size), iter(range(10**9))

        def step() -> None:
            with self.autocast(amp):
                loss = task(batch, next(updates))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


# Parts -------------------------------------------------------------------------------------------


def numbers(bench: Bench) -> Iterator[Row]:
    """Value and gradients beside float64 on the CPU, by precision and path."""
    from vae3d.kernels.precision import exact_float32
    from vae3d.kernels.steps import plain
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.models.norm import GroupNorm

    torch = bench.torch
    torch.manual_seed(0)
    vae = CustomVAE(channels=(16, 32), num_res_blocks=1, norm=partial(GroupNorm, num_groups=8))
    vae = vae.double()
    for p in vae.parameters():  # so that no gradient vanishes
        torch.nn.init.normal_(p, std=0.1)
    x = torch.rand(2, 1, 20, 16, 24).double()

    def values(net, x, amp):
        with torch.autocast(x.device.type, bench.bf16, enabled=amp):
            y = net(x, False)[0]
        gradients = torch.autograd.grad(y.double().square().mean(), [*net.parameters()])
        return [t.detach().cpu().double() for t in (y, *gradients)]

    with plain():
        wanted = values(vae, x, False)
    layouts = {"contiguous": torch.contiguous_format, "innermost": torch.channels_last_3d}
    for layout, form in layouts.items():
        for amp in (False, True):
            for path in ("plain layers", "fused"):
                net = copy.deepcopy(vae).float().to(bench.device)
                start = x.float().to(bench.device, memory_format=form)
                with exact_float32(), plain() if path == "plain layers" else nullcontext():
                    got = values(net, start, amp)
                apart = [float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
                precision = "bf16" if amp else "float32"
                figures = f"value {apart[0]:.1e}, worst gradient {max(apart[1:]):.1e} of its norm"
                yield f"channels {layout}, {precision}, {path}", figures


def syncs(bench: Bench) -> Iterator[Row]:
    """No step may wait for the device; how busy that is, with augmentation."""
    from vae3d.training.augment import Augmentation

    torch = bench.torch
    augment = Augmentation(flip=(0,), rotation_deg=(10, 10, 10), scaling=0.1, noise=0.02)
    for count, size in SIZES:
        size = bench.size(size)
        what = f"{count} x {size}^3, augmentation on"
        step = bench.step(bench.vae(), count, size, augment=augment)
        for _ in range(3):
            step()
        if not bench.on_gpu:
            yield what, "a dry run: nothing to wait for"
            continue
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
        yield what, "waits for nothing"
        yield from ((what, figures) for figures in busy(bench, step))


def busy(bench: Bench, step: Callable[[], None]) -> Iterator[str]:
    """The part of a step's time in which the device computes, and by which kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        bench.wait()
        since = time.perf_counter()
        for _ in range(5):
            step()
        bench.wait()
        wall = time.perf_counter() - since
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = sum(event.self_device_time_total for event in events) / 1e6
    yield f"GPU busy {100 * kernels / wall:.0f} % of {200 * wall:.1f} ms (goal 95 %)"
    for event in events[:8]:
        share = event.self_device_time_total / 1e6 / kernels
        yield f"{100 * share:.0f} % in `{event.key[:60].replace('|', '/')}`"


def steps(bench: Bench) -> Iterator[Row]:
    """Time, time on the host, and memory of a training step by path."""
    from vae3d.kernels.steps import plain

    for count, size in SIZES:
        yield timed(bench, count, size, "fused")
        with plain():
            yield timed(bench, count, size, "plain layers")
        yield timed(bench, count, size, "float32", amp=False)


def compiled(bench: Bench) -> Iterator[Row]:
    """The same of the plain layers as torch.compile makes them; it takes a minute to do so."""
    for count, size in SIZES if bench.on_gpu else ():
        bench.torch._dynamo.reset()
        yield timed(bench, count, size, "compiled")


def timed(bench: Bench, count: int, size: int, path: str, amp: bool = True) -> Row:
    """Measure a training step on `count` patches of `size`."""
    from vae3d.kernels.device import fastest_kernels

    vae, size = bench.vae(), bench.size(size)
    if path == "compiled":
        vae.encoder.compile()
        vae.decoder.compile()
    bench.fresh()
    with fastest_kernels():
        step = bench.step(vae, count, size, amp)
        ms, host = bench.milliseconds(step), bench.host_milliseconds(step)
    figures = f"{ms:.1f} ms, host {host:.1f} ms, peak {bench.peak_gb():.2f} GB"
    return f"{count} x {size}^3, {path}", figures


def monai(bench: Bench) -> Iterator[Row]:
    """Training, and encoding and decoding, beside MONAI's AutoencoderKL on the same weights."""
    from monai.networks.nets import AutoencoderKL

    from vae3d.kernels.device import fastest_kernels
    from vae3d.models.presets import VAEModel

    torch = bench.torch
    config = {
        **{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4},
        **{"channels": (32, 64, 128), "num_res_blocks": 2, "norm_num_groups": 32},
        **{"attention_levels": (False,) * 3, "with_encoder_nonlocal_attn": False},
        "with_decoder_nonlocal_attn": False,
    }
    theirs, ours = AutoencoderKL(**config), VAEModel.from_config(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    n = bench.size(96)
    x = torch.rand(2, 1, n, n, n, device=bench.device)

    def train(net, optimizer):
        with bench.autocast():
            recon, mean, std = net(x)[:3]
        kl = (mean.float() ** 2 + std.float() ** 2 - 2 * std.float().log() - 1).mean() / 2
        ((recon.float() - x).abs().mean() + 1e-6 * kl).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer(net):
        with torch.no_grad(), bench.autocast():
            net.decode(net.encode(x)[0])

    for mode, goals in GOALS.items():
        found = []
        for net in (theirs, ours):
            net.to(bench.device)
            bench.fresh()
            run = partial(infer, net)
            if mode == "train":
                run = partial(train, net, torch.optim.AdamW(net.parameters(), 1e-4, fused=True))
            with fastest_kernels():
                took = bench.milliseconds(run), bench.host_milliseconds(run)
            found.append((*took, bench.peak_gb()))
            net.cpu()
        (slow, slow_host, large), (fast, fast_host, small) = found
        times = f"{fast:.1f} ms : {slow:.1f} ms = {fast / slow:.2f} (goal {goals[0]:.2f})"
        times += f", host {fast_host:.1f} ms : {slow_host:.1f} ms"
        memory = f"{small:.2f} GB : {large:.2f} GB = {small / large:.2f} (goal {goals[1]:.2f})"
        yield f"2 x {n}^3, {mode}, vae3d : MONAI", f"{times}, {memory}"


def batch(bench: Bench) -> Iterator[Row]:
    """The batch that `batch_size: auto` finds must train, on a card of 24 GB and on this one."""
    from vae3d.kernels.device import fastest_kernels
    from vae3d.losses.vae_loss import VAELoss
    from vae3d.training.memory import GPU_SHARE, Trial
    from vae3d.training.task import VAETask

    whole = bench.torch.cuda.mem_get_info()[1] if bench.on_gpu else 64 << 30
    for size, card in ((128, min(24 << 30, whole)), (64, min(24 << 30, whole)), (128, whole)):
        size = bench.size(size)
        bench.fresh()
        if bench.on_gpu:
            bench.torch.cuda.set_per_process_memory_fraction(card / whole)
        vae = bench.vae()
        trial = Trial(VAETask(vae, VAELoss().to(bench.device)), (1, size, size, size), "bf16")
        budget = None if card == whole else int(GPU_SHARE * card)
        found = trial.largest_batch(budget, most=bench.size(64, 2))
        bench.fresh()
        with fastest_kernels():
            step = bench.step(vae, found, size)
            for _ in range(4):
                step()
        bench.wait()
        reserved = bench.torch.cuda.max_memory_reserved() / 1e9 if bench.on_gpu else float("nan")
        figures = f"batch {found} trains, {reserved:.1f} GB reserved"
        yield f"{size}^3, auto, {card >> 30} GiB", figures
        del vae, trial, step


def inference(bench: Bench) -> Iterator[Row]:
    """Full, patch and exact: time and difference."""
    from vae3d.inference.reconstruct import autoencode

    n, p = bench.size(192, 32), bench.size(64)
    vae, x = bench.vae().eval(), bench.torch.rand(1, n, n, n)
    patch = {"patch_size": (p,) * 3}
    cases = {
        "full": {},
        "exact": {},
        "exact, 2 GiB": {"memory_gb": 2},
        "patch": patch,
        "patch, one at a time": patch | {"batch_size": 1},
        "patch, bf16": patch | {"amp": "bf16"},
    }
    full = None
    for name, how in cases.items():
        bench.fresh()
        call = partial(autoencode, vae, x, name.split(",")[0], **how)
        recon = call()[0]
        full = recon if full is None else full
        apart = float((recon - full).abs().max() / (full.max() - full.min()))
        ms, peak = bench.milliseconds(call, rounds=1, warm=0), bench.peak_gb()
        yield f"{n}^3, {name}", f"{ms / 1e3:.2f} s, {peak:.2f} GB, from full {apart:.1e}"


def layers(bench: Bench) -> Iterator[Row]:
    """TFLOP/s of the convolutions and GB/s of norm and activation, beside what the card gives."""
    from vae3d.models.norm import GroupNorm, NormAct

    torch, half = bench.torch, {"device": bench.device, "dtype": bench.bf16}
    n = bench.size(8192, 64)
    a = torch.randn(n, n, **half)
    product = 2 * n**3 / bench.milliseconds(lambda: a @ a) / 1e9
    big = torch.empty(bench.size(1 << 30, 1 << 16), dtype=torch.uint8, device=bench.device)
    copy = 2 * big.numel() / bench.milliseconds(big.clone) / 1e6
    yield "the card", f"{product:.0f} TFLOP/s in bf16 products, {copy:.0f} GB/s copying"
    forms = {"contiguous": torch.contiguous_format, "innermost": torch.channels_last_3d}
    for channels, size in ((32, 96), (64, 96), (128, 24)):
        size = bench.size(size, 8)
        for layout, form in forms.items():
            x = torch.randn(2, channels, size, size, size, **half).to(memory_format=form)
            w = torch.randn(channels, channels, 3, 3, 3, **half).to(memory_format=form)
            flops, rates = 2 * x.numel() * w[0].numel(), []

            def back(x, w, mask):
                ones = [1] * 3
                torch.ops.aten.convolution_backward(
                    x, x, w, None, ones, ones, ones, False, [0] * 3, 1, mask
                )

            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                for call in (
                    partial(torch.conv3d, x, w, None, 1, 1),
                    partial(back, x, w, [True, False, False]),
                    partial(back, x, w, [False, True, False]),
                ):
                    rates.append(flops / bench.milliseconds(call, 5, 2) / 1e9)
            shares = ", ".join(f"{rate:.0f}" for rate in rates)
            what = f"conv {channels} of {size}^3, channels {layout}"
            yield what, f"{shares} TFLOP/s forward, to input, to weights"
            with torch.no_grad():
                norm = NormAct(GroupNorm(channels, 8), "silu").to(bench.device)
                ms = bench.milliseconds(partial(norm, x), 5, 2)
            least = 6 * x.numel() / copy / 1e6
            yield f"norm + SiLU {channels} of {size}^3, {layout}", f"{ms:.3f} ms, least {least:.3f}"


def ranks(bench: Bench) -> Iterator[Row]:
    """Two gloo ranks on one GPU, with saves, and nccl in a world of one."""
    from toys import toy_trainer  # noqa: F401 - says here what is missing

    for name, size, backend in (("gloo", 2, "gloo"), ("nccl", 1, "nccl")):
        if backend == "nccl" and not bench.on_gpu:
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            processes = []
            for rank in range(size):
                environ = dict(
                    os.environ, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
                code = f"import gpu; gpu.rank_main({folder!r}, {bench.device.type!r}, {backend!r})"
                command = [sys.executable, "-c", code]
                processes.append(
                    subprocess.Popen(command, env=environ, cwd=Path(__file__).parent,
                                     stdout=subprocess.PIPE, text=True)
                )  # fmt: skip
            said = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"{name}, {size} ranks: exit code not 0")
        what = "2 ranks, ddp with saves" if size > 1 else "1 rank, a sum"
        yield f"{name}, {what}", said[0].strip()


def rank_main(folder: str, device: str, backend: str) -> None:
    """Train a few steps as one of the ranks; the first prints its losses."""
    import torch.distributed as dist
    from toys import ToyLoader, VAELoss, VAETask, tiny_vae, toy_trainer

    from vae3d.training.distributed import open_world

    with open_world(device, 1.0, backend) as world:
        if world.size == 1:  # a world of one that has a group all the same
            store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 1, True)
            dist.init_process_group(
                backend, store=store, rank=0, world_size=1, device_id=world.device
            )
            total = dist_sum(world.device)
            dist.destroy_process_group()
            print(f"sum over the world {total:g}")
            return
        task = VAETask(tiny_vae().to(world.device), VAELoss().to(world.device))
        loader = ToyLoader(10, 2, world.rank, world.size)
        options = {"max_steps": 6, "save_every": 2, "task": task, "loader": loader}
        trainer = toy_trainer(Path(folder), world, **options)
        trainer.fit()
        if world.is_main:
            first, *_, last = trainer.tracker.losses()
            print(f"loss {first:.3f} to {last:.3f}, saved {(Path(folder) / 'last.pt').is_file()}")


def dist_sum(device) -> float:
    """All-reduce of ones."""
    import torch
    import torch.distributed as dist

    ones = torch.ones(4, device=device)
    dist.all_reduce(ones)
    return float(ones.mean())


def runs(bench: Bench) -> Iterator[Row]:
    """A run that is resumed, evaluated in each mode and followed by a second stage."""
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "data").mkdir()
        generator = np.random.default_rng(0)
        for i in range(6):
            volume = generator.random((32, 32, 32), dtype=np.float32)
            np.save(folder / "data" / f"v{i}.npy", volume)
        data = ["--data.root", str(folder / "data"), "--data.cache_dir", str(folder / "cache")]
        where = ["--device", bench.device.type]
        small = ["--model.channels", "[8,16]", "--model.num_res_blocks", "1"]
        small += ["--model.norm.class_path", "GroupNorm", "--model.norm.init_args.num_groups", "4"]
        train = [
            *("train", *data, *where, *small, "--patch_size", "[16,16,16]", "--trackers", "[]"),
            *("--out_dir", str(folder / "run"), "--augment", "{flip: [0], noise: 0.02}"),
            *("--val_every", "2", "--media_every", "2", "--save_every", "2"),
        ]
        command(*train, "--max_steps", "2")
        yield "train", "validates, draws pictures and saves"
        said = command(*train, "--max_steps", "4")
        assert "from step 2" in said, said
        yield "train again", "resumes from step 2"
        run = ["--checkpoint", str(folder / "run")]
        for mode in ("full", "patch", "exact"):
            out = ["--out_dir", str(folder / mode), "--split", "all", "--media", "false"]
            command("evaluate", *run, *data, *where, *out, "--mode", mode, "--trackers", "[]")
        yield "evaluate", "full, patch and exact"
        latents = str(folder / "latents")
        command("encode", *run, *data, *where, "--out_dir", latents, "--amp", "bf16")
        command("decode", latents, *run, *where, "--out_dir", str(folder / "decoded"))
        yield "encode in bf16, decode", "done"
        __import__("monai")
        command(
            *("train-ldm", latents, "--vae", str(folder / "run"), "--out_dir", str(folder / "ldm")),
            *(*where, "--max_steps", "2", "--media_every", "2", "--trackers", "[]"),
            *("--unet.channels", "[8,16]", "--unet.num_res_blocks", "1", "--batch_size", "1"),
            *("--unet.attention_levels", "[false,true]", "--unet.num_head_channels", "[0,8]"),
            *("--unet.norm_num_groups", "4"),
        )
        yield "train-ldm", "with a picture"


def command(*words: str) -> str:
    """Run a command of vae3d, in this process to save imports; what it says."""
    from vae3d.cli import main

    said = io.StringIO()
    try:
        with redirect_stdout(said):
            main([*words])
    except SystemExit as end:
        if end.code:
            print(said.getvalue()[-400:], file=sys.stderr)
            raise RuntimeError(f"vae3d {words[0]}: exit code {end.code}") from None
    return said.getvalue()


def suite(bench: Bench) -> Iterator[Row]:
    """The tests that are marked gpu."""
    tests = sorted(ROOT.glob("tests/test_*.py"))
    yield tested("-m", "gpu", *[file for file in tests if "pytest.mark.gpu" in file.read_text()])


def kernels(bench: Bench) -> Iterator[Row]:
    """The tests of the fused step, whose kernels are compiled where a GPU is."""
    yield tested(ROOT / "tests" / "test_gpu.py")


def tested(*what: str | Path) -> Row:
    """Run some tests; what pytest says in its last line."""
    import pytest  # noqa: F401 - says here that it is missing

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, what)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    *_, last = done.stdout.strip().splitlines() or [""]
    if done.returncode not in (0, 5):  # 5: there are none
        sys.exit(f"{done.stdout[-2000:]}\npytest ended with {done.returncode}: {last.strip('= ')}")
    files = ", ".join(part.name for part in what if isinstance(part, Path))
    return f"pytest {files}", last.strip("= ")


# In the order of their worth, with the time that each may take [s].
PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], int]] = {
    "numbers": (numbers, 60),
    "syncs": (syncs, 40),
    "steps": (steps, 60),
    "monai": (monai, 40),
    "inference": (inference, 50),
    "batch": (batch, 60),
    "suite": (suite, 50),
    "ranks": (ranks, 40),
    "runs": (runs, 60),
    "layers": (layers, 30),
    "compiled": (compiled, 90),
    "kernels": (kernels, 60),
}

if __name__ == "__main__":
    sys.exit(main())
