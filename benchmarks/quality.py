"""How well does a run of the shipped recipe reconstruct, beside MONAI's AutoencoderKL?

    python benchmarks/quality.py --root DIR                     # 1500 steps, factors 4 and 8
    python benchmarks/quality.py --root DIR --steps 10 --factors '[4]'    # does it run?

Both networks get one budget: the same volumes and split, patches in the same order, loss,
optimizer, precision and number of steps, all from the recipe, and the same latents. MONAI's first
level works at full resolution; it begins with half the recipe's channels, so that its step costs
about as many processor-seconds. Every network trains in a process of its own, so that its peak
memory is its own.
The held-out volumes are reconstructed whole. Average pooling to the same latent grid and trilinear
upsampling back says what a network has to beat.

Writes quality.md (the table), quality.json and quality.svg (validation PSNR over steps) to
`--out_dir`. The same command again continues where it stopped.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from math import log2
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL
from torch import nn

from loaders.whole import write_text
from vae3d import train_3d
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.config import main, parse
from vae3d.inference.metrics import METRICS
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import DiagonalGaussian

ROOT = Path(__file__).resolve().parents[1]


class MonaiPeer(CustomVAE):
    """MONAI's AutoencoderKL, without attention, behind the contract of `CustomVAE`."""

    def __init__(
        self, channels: tuple[int, ...], num_res_blocks: int, latent_channels: int, norm_groups: int
    ):
        nn.Module.__init__(self)
        self.linear_code = None
        self.net = AutoencoderKL(
            spatial_dims=3,
            channels=channels,
            num_res_blocks=(num_res_blocks,) * len(channels),
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            attention_levels=(False,) * len(channels),
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.spatial_dims, self.in_channels, self.out_channels = 3, 1, 1
        self.latent_channels = latent_channels
        self.factor = (2 ** (len(channels) - 1),) * 3

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output convolution."""
        return self.net.decoder.blocks[-1].conv.weight

    def set_checkpointing(self, mode: str) -> None:
        """MONAI's own checkpointing is left off."""
        if mode != "none":
            raise ValueError(f"checkpointing={mode!r} is not for MONAI's network; use none")

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """Posterior of `(B, 1, X, Y, Z)`."""
        h = self.net.encoder(self.pad(x))
        logvar = self.net.quant_conv_log_sigma(h).clamp(-30, 20)
        return DiagonalGaussian(self.net.quant_conv_mu(h), logvar)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction of a latent."""
        return self.net.decode(z)


def quality(
    root: str,
    out_dir: str = "runs/quality",
    recipe: str = str(ROOT / "configs/train/ixi_t1.yaml"),
    steps: int = 1500,
    factors: tuple[int, ...] = (4, 8),
    split: str = "test",
    only: str | None = None,
) -> None:
    """Train the recipe's network and MONAI's, and compare them on held-out volumes.

    Args:
        root: Folder of volumes.
        out_dir: Where runs and results go.
        recipe: YAML of `train_3d`.
        steps: Updates of each network [steps].
        factors: Shrink factors of the latent per axis; each is a pair of runs.
        split: Held-out part: test | val.
        only: One run, such as `4-vae3d`; what the benchmark calls itself with.
    """
    out = Path(out_dir)
    if only:
        factor, name = only.split("-")
        write(
            out / only / "result.json",
            run_one(root, out / only, recipe, steps, factor, name, split),
        )
        return
    rows = []
    for factor in factors:
        for name in ("vae3d", "monai"):
            key = f"{factor}-{name}"
            done = out / key / "result.json"
            if not done.is_file() or json.loads(done.read_text())["steps"] != steps:
                options = {"root": root, "out_dir": out_dir, "recipe": recipe, "steps": steps}
                options |= {"split": split, "only": key}
                flags = [
                    text for name, value in options.items() for text in (f"--{name}", str(value))
                ]
                subprocess.run([sys.executable, __file__, *flags], check=True)
            rows.append(json.loads(done.read_text()))
        rows.append(pooling(root, recipe, rows[-1]["run"], factor, split))
    write(out / "quality.json", rows)
    write_text(out / "quality.md", table(rows))
    write_text(out / "quality.svg", curves(rows))
    print(table(rows))


def run_one(root, run: Path, recipe, steps: int, factor: str, name: str, split: str) -> dict:
    """Train one network and measure it."""
    kwargs = options_of(root, recipe, run, steps)
    kwargs["model"] = network(kwargs["model"], int(factor), name)
    start = max((int(file.stem[5:]) for file in run.glob("checkpoints/step_*.pt")), default=0)
    used = time.process_time()
    code = train_3d(**kwargs)
    if code:
        sys.exit(code)
    used = time.process_time() - used  # of the steps since this process began, with validation
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    data = EvaluationData(root, kwargs["data"].cache_dir)
    evaluate(
        str(run),
        data,
        str(run / "evaluation"),
        mode="full",
        split=split,
        save_recon=False,
        media=False,
        trust=("__main__",),
    )
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    return {
        "factor": int(factor),
        "network": name,
        "run": str(run),
        "steps": steps,
        "parameters": sum(p.numel() for p in kwargs["model"]().parameters()),
        "metrics": {k: summary["metrics"][k] for k in METRICS},
        "cpu_s_per_step": used / (steps - start) if steps > start else None,
        "peak_gb": memory / 1e9,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "curve": [(r["step"], r["val/psnr"]) for r in log if "val/psnr" in r],
    }


def options_of(root: str, recipe: str, run: Path, steps: int) -> dict:
    """Arguments of `train_3d` from the recipe, for a short quiet run."""
    flags = {"config": recipe, "data.root": root, "out_dir": run, "max_steps": steps}
    flags |= {"val_every": max(steps // 15, 1), "media_every": 0, "wandb": "disabled"}
    return parse(train_3d, [text for k, v in flags.items() for text in (f"--{k}", str(v))])


def network(recipe, factor: int, name: str):
    """Return the factory of a network at a factor: the recipe's levels, then more like its last."""
    plan = recipe().spec["init_args"]
    missing = round(log2(factor)) - len(plan["factors"])
    if missing < 0:
        raise ValueError(f"--factors {factor}: the recipe itself shrinks by {recipe().factor}")
    channels = tuple(plan["channels"]) + (plan["channels"][-1],) * missing
    if name == "vae3d":
        return partial(
            recipe, channels=channels, factors=[*plan["factors"]] + [(2, 2, 2)] * missing
        )
    channels = (channels[0] // 2, *channels)
    return partial(MonaiPeer, channels, plan["num_res_blocks"], plan["latent_channels"], 8)


def pooling(root: str, recipe: str, run: str, factor: int, split: str) -> dict:
    """Measure average pooling to the latent grid and trilinear upsampling back."""
    from loaders import open_data

    config = options_of(root, recipe, Path(run), 1)["data"]
    store, _ = open_data(config)
    store = store.subset(json.loads((Path(run) / "split.json").read_text())[split])
    lo, hi = store.data_range
    values = {name: [] for name in METRICS}
    for i in range(len(store)):
        x = torch.from_numpy(store.read(i))
        small = F.avg_pool3d(x[None], factor, ceil_mode=True, count_include_pad=False)
        size = [n * factor for n in small.shape[2:]]
        large = F.interpolate(small, size, mode="trilinear")[0]
        large = large[(..., *(slice(n) for n in x.shape[1:]))]
        for name, metric in METRICS.items():
            values[name].append(metric(x, large, hi - lo))
    metrics = {k: {"mean": statistics.fmean(v), "n": len(v)} for k, v in values.items()}
    return {"factor": factor, "network": "average pooling", "metrics": metrics}


def table(rows: list[dict]) -> str:
    """The results as Markdown."""
    head = "factor | network | M parameters | PSNR [dB] | SSIM | MAE | CPU s a step | peak GB"
    lines = [f"| {head} |", "| " + " | ".join(["---"] * len(head.split("|"))) + " |"]
    for row in rows:
        cells = [row["factor"], row["network"]]
        cells.append(f"{row['parameters'] / 1e6:.2f}" if "parameters" in row else "")
        cells += [f"{row['metrics'][k]['mean']:{f}}" for k, f in (("psnr", ".2f"), ("ssim", ".4f"))]
        cells.append(f"{row['metrics']['mae']['mean']:.4f}")
        cells += [
            f"{row[k]:.2f}" if row.get(k) is not None else "" for k in ("cpu_s_per_step", "peak_gb")
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    first = next(row for row in rows if "steps" in row)
    count = first["metrics"]["psnr"]["n"]
    return "\n".join(lines) + (
        f"\n\n{first['steps']} steps, {count} held-out volumes reconstructed whole, on "
        f"{first['device']}.\n"
    )


def curves(rows: list[dict]) -> str:
    """Validation PSNR over steps as an SVG: a line for each run."""
    runs = [row for row in rows if row.get("curve")]
    steps = [s for row in runs for s, _ in row["curve"]]
    psnr = [p for row in runs for _, p in row["curve"]]
    low, high = min(psnr), max(psnr) + 1e-9

    def place(step: float, value: float) -> str:
        return f"{60 + 520 * step / max(steps):.1f},{330 - 300 * (value - low) / (high - low):.1f}"

    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="370" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="34">{high:.1f} dB</text><text x="8" y="334">{low:.1f} dB</text>',
        f'<text x="60" y="358">step 0</text><text x="540" y="358">{max(steps)}</text>',
    ]
    for i, row in enumerate(runs):
        color = colors[i % len(colors)]
        points = " ".join(place(*point) for point in row["curve"])
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{points}"/>')
        label = f"{row['network']}, factor {row['factor']}"
        parts.append(f'<text x="600" y="{40 + 20 * i}" fill="{color}">{label}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def write(path: Path, value) -> None:
    """Write JSON that is whole or not there."""
    write_text(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main(quality)
