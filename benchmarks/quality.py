"""How well does a run of the shipped recipe reconstruct, beside its peers at their best?

    python benchmarks/quality.py --root DIR                  # the sweep, then 1500 steps, 3 seeds
    python benchmarks/quality.py --root DIR --steps 10 --sweep_steps 5 --seeds '[0]'   # it runs?

Every network gets its own best learning rate (a sweep of short runs, by PSNR on validation), and
the same budget: volumes and split, patches in the same order, loss, optimizer, precision and number
of steps, all from the recipe, and the same latents. MONAI's first level works at full resolution;
it begins with half the recipe's channels, so that its step costs about as many
processor-seconds. Every network trains in a process of its own, so that its peak memory is its
own. The held-out volumes are reconstructed whole. Average pooling to the same latent grid and
linear upsampling back, and block PCA with as many and twice as many numbers, say what a network has
to beat.

Writes quality.md (the tables), quality.json and quality.svg (validation PSNR over steps) to
`--out_dir`, with what there is after each run. The same command again continues where it stopped.
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
from monai.networks.nets import AutoencoderKL
from torch import nn

from loaders.whole import write_text
from vae3d import train_3d
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.config import main, parse
from vae3d.inference.baselines import BlockPCA, pooled
from vae3d.inference.metrics import METRICS
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import DiagonalGaussian
from vae3d.recipes import find_recipe


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


NETWORKS = ("linear code", "plain", "monai")


def quality(
    root: str,
    out_dir: str = "runs/quality",
    recipe: str = "ixi_t1",
    steps: int = 1500,
    factors: tuple[int, ...] = (4, 8),
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3),
    sweep_steps: int = 300,
    seeds: tuple[int, ...] = (0, 1, 2),
    networks: tuple[str, ...] = NETWORKS,
    split: str = "test",
    only: str | None = None,
) -> None:
    """Train the recipe's network, with and without its linear code, and MONAI's, and compare them.

    Args:
        root: Folder of volumes.
        out_dir: Where runs and results go.
        recipe: Recipe of `train_3d`, a name or a file.
        steps: Updates of each network [steps].
        factors: Shrink factors of the latent per axis; each is a set of runs.
        rates: Learning rates of the sweep; the best on validation is taken for the runs.
        sweep_steps: Updates of a run of the sweep [steps].
        seeds: Seeds of the runs; the sweep has the first.
        networks: Which of them: linear code | plain | monai.
        split: Held-out part: test | val.
        only: One run as `factor/network/rate/steps/seed`; what the benchmark calls itself with.
    """
    out, recipe = Path(out_dir), find_recipe("train", recipe)
    if only:
        write(out / only / "result.json", run_one(root, out / only, recipe, only, split))
        return
    done: list[dict] = []

    def run(*key: object) -> dict:
        name = "/".join(map(str, key))
        result = out / name / "result.json"
        if not result.is_file():
            options = {"root": root, "out_dir": out_dir, "recipe": recipe, "split": split}
            flags = [text for k, v in options.items() for text in (f"--{k}", str(v))]
            subprocess.run([sys.executable, __file__, *flags, "--only", name], check=True)
        done.append(json.loads(result.read_text()))
        write(out / "quality.json", done)
        write_text(out / "quality.md", tables(done, linear, sweep_steps))
        return done[-1]

    linear = []
    for factor in factors:
        for name in networks:
            sweep = [run(factor, name, rate, sweep_steps, seeds[0]) for rate in rates]
            best = max(sweep, key=lambda r: r["curve"][-1][1])["rate"]
            for seed in seeds:
                run(factor, name, best, steps, seed)
        linear += linear_codes(root, recipe, done[-1]["run"], factor, split)
    write_text(out / "quality.md", tables(done, linear, sweep_steps))
    write_text(out / "quality.svg", curves([r for r in done if r["steps"] == steps]))
    print(tables(done, linear, sweep_steps))


def run_one(root: str, run: Path, recipe: str, key: str, split: str) -> dict:
    """Train one network and measure it."""
    factor, name, rate, steps, seed = key.split("/")
    steps = int(steps)
    kwargs = options_of(root, recipe, run, steps) | {"lr": float(rate), "seed": int(seed)}
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
        "rate": float(rate),
        "seed": int(seed),
        "run": str(run),
        "steps": steps,
        "parameters": sum(p.numel() for p in kwargs["model"]().parameters()),
        "metrics": summary["metrics"],
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
    if name != "monai":
        factors = [*plan["factors"]] + [(2, 2, 2)] * missing
        linear = name == "linear code"
        return partial(recipe, channels=channels, factors=factors, linear_code=linear)
    channels = (channels[0] // 2, *channels)
    return partial(MonaiPeer, channels, plan["num_res_blocks"], plan["latent_channels"], 8)


def linear_codes(root: str, recipe: str, run: str, factor: int, split: str) -> list[dict]:
    """Measure average pooling and block PCA with as many and twice as many numbers."""
    from loaders import open_data

    options = options_of(root, recipe, Path(run), 1)
    store, _ = open_data(options["data"])
    parts = json.loads((Path(run) / "split.json").read_text())
    training, held_out = store.subset(parts["train"]), store.subset(parts[split])
    lo, hi = store.data_range
    channels, cell = options["model"]().latent_channels, (factor,) * 3
    read = (torch.from_numpy(training.read(i)) for i in range(len(training)))
    pca = BlockPCA.fit(read, cell, 2 * channels)
    codes = {"average pooling": lambda x: pooled(x, cell)}
    codes |= {f"block PCA, {n} channels": partial(pca, count=n) for n in (channels, 2 * channels)}
    volumes = [torch.from_numpy(held_out.read(i)) for i in range(len(held_out))]
    rows = []
    for name, code in codes.items():
        pairs = [(x, code(x)) for x in volumes]
        metrics = {
            k: {"mean": statistics.fmean(metric(x, recon, hi - lo) for x, recon in pairs)}
            for k, metric in METRICS.items()
        }
        rows.append({"factor": factor, "network": name, "metrics": metrics})
    return rows


def tables(done: list[dict], linear: list[dict], sweep_steps: int) -> str:
    """The results as Markdown: the sweep, then the runs, means over seeds."""
    sweep = [row for row in done if row["steps"] == sweep_steps]
    text = f"Validation PSNR [dB] after {sweep_steps} steps, by learning rate:\n\n"
    text += markdown("factor | network | learning rate | PSNR", [
        [r["factor"], r["network"], f"{r['rate']:g}", f"{r['curve'][-1][1]:.2f}"] for r in sweep
    ])  # fmt: skip
    runs: dict[tuple, list[dict]] = {}
    for row in done:
        if row not in sweep:
            runs.setdefault((row["factor"], row["network"], row["rate"], row["steps"]), []).append(
                row
            )
    lines = []
    for (factor, name, rate, steps), rows in runs.items():
        cells = [factor, name, f"{rate:g}", steps, len(rows), f"{rows[0]['parameters'] / 1e6:.2f}"]
        for metric, form in (("psnr", ".2f"), ("ssim", ".3f"), ("pca_equivalent", ".2f"),
                             ("lattice_score", ".2f")):  # fmt: skip
            values = [r["metrics"][metric]["mean"] for r in rows if metric in r["metrics"]]
            sd = f" ({statistics.stdev(values):{form}})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):{form}}{sd}" if values else "")
        costs = [r["cpu_s_per_step"] for r in rows if r["cpu_s_per_step"]]
        cells.append(f"{statistics.fmean(costs):.2f}" if costs else "")
        cells.append(f"{max(r['peak_gb'] for r in rows):.2f}")
        lines.append(cells)
    for row in linear:
        psnr, ssim = (row["metrics"][k]["mean"] for k in ("psnr", "ssim"))
        lines.append(
            [row["factor"], row["network"], *[""] * 4, f"{psnr:.2f}", f"{ssim:.3f}"] + [""] * 4
        )
    head = "factor | network | learning rate | steps | seeds | M parameters | PSNR [dB] | SSIM"
    head += " | pca_equivalent | lattice_score | CPU s a step | peak GB"
    return text + "\nHeld-out volumes, mean (sd over seeds):\n\n" + markdown(head, lines)


def markdown(head: str, rows: list[list]) -> str:
    """A table as Markdown."""
    lines = [f"| {head} |", "| " + " | ".join(["---"] * len(head.split("|"))) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


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
        label = f"{row['network']}, factor {row['factor']}, seed {row['seed']}"
        parts.append(f'<text x="600" y="{40 + 20 * i}" fill="{color}">{label}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def write(path: Path, value) -> None:
    """Write JSON that is whole or not there."""
    write_text(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main(quality)
