"""How well does a run of the shipped recipe reconstruct, beside its peers at their best?

    python benchmarks/quality.py --root DIR                  # the sweep, then 1500 steps, 3 seeds
    python benchmarks/quality.py --root DIR --steps 10 --sweep_steps 5 --seeds '[0]'   # it runs?
    python benchmarks/quality.py --root DIR --peer FOLDER     # also the package vae3d2d, in FOLDER
    python benchmarks/quality.py --root DIR --seeds '[]'      # tables and curves of what there is

Every network gets its own best learning rate (a sweep of short runs, by PSNR on validation), and
the same budget: volumes and split, patches in the same order, loss, optimizer, precision and number
of steps, all from the recipe, and the same latents. The first levels of MONAI and vae3d2d work at
full resolution; they begin with half the recipe's channels, so that a step costs about as many
processor-seconds. Once, MONAI has the width of its 3D tutorial, (32, 64, 64), for as many
processor-seconds as our longest run, at the best rate of the narrow one. Every network trains in a
process of its own, so that its peak memory is its own. The held-out volumes are reconstructed
whole. Average pooling to the same latent grid and linear upsampling back, and block PCA with as
many and twice as many numbers, say what a network has to beat.

Writes quality.md (the tables) and quality.svg (validation PSNR over steps and over
processor-seconds) to `--out_dir`, with what there is after each run; all networks have their first
seed before any has its second. What is done is kept in quality.json beside this script (the heads
of docs/data_sets.md; `--kept FILE` for other volumes) and not made again; a run that was stopped
goes on where it was.
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
from vae3d.models.posterior import DiagonalGaussian, LogVarianceHead
from vae3d.recipes import find_recipe


class Peer(CustomVAE):
    """A network of another library, `net`, behind the contract of `CustomVAE`."""

    def __init__(self, latent_channels: int, levels: int):
        nn.Module.__init__(self)
        self.linear_code, self.head = None, LogVarianceHead()
        self.spatial_dims, self.in_channels, self.out_channels = 3, 1, 1
        self.latent_channels, self.factor = latent_channels, (2**levels,) * 3

    def set_checkpointing(self, mode: str) -> None:
        """Their own checkpointing is left off."""
        if mode != "none":
            raise ValueError(f"checkpointing={mode!r} is not for a peer's network; use none")

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction of a latent."""
        return self.net.decode(z)


class MonaiPeer(Peer):
    """MONAI's AutoencoderKL, without attention."""

    def __init__(
        self, channels: tuple[int, ...], num_res_blocks: int, latent_channels: int, norm_groups: int
    ):
        super().__init__(latent_channels, len(channels) - 1)
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

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output convolution."""
        return self.net.decoder.blocks[-1].conv.weight

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """Posterior of `(B, 1, X, Y, Z)`."""
        h = self.net.encoder(self.pad(x))
        logvar = self.net.quant_conv_log_sigma(h).clamp(-30, 20)
        return DiagonalGaussian(self.net.quant_conv_mu(h), logvar)


class Vae3d2dPeer(Peer):
    """The package vae3d2d's network, without attention and without its final tanh."""

    def __init__(
        self, channels: tuple[int, ...], num_res_blocks: int, latent_channels: int, norm_groups: int
    ):
        from vae3d2d import CustomVAE as Theirs

        levels = len(channels) - 1
        super().__init__(latent_channels, levels)
        self.net = Theirs(
            vae_latent_channels=latent_channels,
            vae_use_log_var=True,
            init_filters=channels[0],
            smallest_filters=channels[-1],
            blocks_down=(num_res_blocks,) * len(channels),
            blocks_up=(num_res_blocks,) * levels,
            downsample_strides=[(2, 2, 2)] * levels,
            vae_down_stride=(1, 1, 1),
            norm=("GROUP", {"num_groups": norm_groups}),
            final_activation=None,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output convolution."""
        return [p for p in self.net.vae_conv_final.parameters() if p.ndim > 1][-1]

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """Posterior of `(B, 1, X, Y, Z)`."""
        mean, _, _, logvar = self.net.encode(self.pad(x))
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))


OURS = "linear code"
NETWORKS = (OURS, "plain", "monai")
PEERS = {"monai": MonaiPeer, "monai wide": MonaiPeer, "vae3d2d": Vae3d2dPeer}
WIDE = (32, 64, 64)  # channels of MONAI's 3D AutoencoderKL tutorial
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
SHOWN = {"psnr": ".2f", "ssim": ".3f", "pca_equivalent": ".2f", "lattice_score": ".2f"}
WARM_STEPS = 20  # to measure what a step costs
KEPT = str(Path(__file__).with_suffix(".json"))


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
    peer: str | None = None,
    kept: str = KEPT,
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
        seeds: Seeds of the runs; the sweep has the first. None to print alone.
        networks: Which of them: linear code | plain | monai.
        split: Held-out part: test | val.
        peer: Folder with the package vae3d2d (`pip install --target`), for its network too.
        kept: File of what is done; one for each set of volumes.
        only: One run as `factor/network/rate/steps/seed`; what the benchmark calls itself with.
    """
    out, recipe = Path(out_dir), find_recipe("train", recipe)
    if peer:
        sys.path.append(peer)
        networks = (*networks, "vae3d2d")
    if only:
        write(out / only / "result.json", run_one(root, out / only, recipe, only, split))
        return
    results = json.loads(Path(kept).read_text()) if Path(kept).is_file() else {}
    for file in sorted(out.rglob("result.json")):  # of runs that were begun one by one
        results[str(file.parent.relative_to(out))] = json.loads(file.read_text())

    def publish() -> str:
        write(Path(kept), results)
        text = tables(list(results.values()), sweep_steps)
        write_text(out / "quality.md", text)
        few = (None, sweep_steps, WARM_STEPS)
        runs = [row for row in results.values() if row.get("steps") not in few]
        write_text(out / "quality.svg", curves(runs))
        return text

    def run(*key: object) -> dict:
        name = "/".join(map(str, key))
        if name not in results:
            options = {"root": root, "out_dir": out_dir, "recipe": recipe, "split": split}
            options |= {"peer": peer} if peer else {}
            flags = [text for k, v in options.items() for text in (f"--{k}", str(v))]
            subprocess.run([sys.executable, __file__, *flags, "--only", name], check=True)
            results[name] = json.loads((out / name / "result.json").read_text())
            publish()
        return results[name]

    for factor in factors if seeds else ():
        best = {}
        for name in networks:
            sweep = [run(factor, name, rate, sweep_steps, seeds[0]) for rate in rates]
            best[name] = max(sweep, key=lambda r: r["curve"][-1][1])["rate"]
        if f"{factor}/average pooling" not in results:
            results |= linear_codes(root, recipe, out, factor, split)
        for seed in seeds:
            for name in networks:
                run(factor, name, best[name], steps, seed)
            both = {"monai", OURS} <= best.keys()
            if seed == seeds[0] and factor == 2 ** (len(WIDE) - 1) and both:
                ours = run(factor, OURS, best[OURS], steps, seed)
                a_step = run(factor, "monai wide", best["monai"], WARM_STEPS, seed)
                budget = steps * ours["cpu_s_per_step"] / a_step["cpu_s_per_step"]
                run(factor, "monai wide", best["monai"], round(budget), seed)
    print(publish())


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
    cost = used / (steps - start) if steps > start else None
    told = {"factor": int(factor), "network": name, "rate": float(rate), "seed": int(seed)}
    told |= {"steps": steps, "cpu_s_per_step": cost, "peak_gb": memory / 1e9}
    if steps == WARM_STEPS:
        return told
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
    metrics = json.loads((run / "evaluation" / "summary.json").read_text())["metrics"]
    return told | {
        "parameters": sum(p.numel() for p in kwargs["model"]().parameters()),
        "metrics": {name: metrics[name] for name in SHOWN if name in metrics},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "curve": [(r["step"], r["val/psnr"]) for r in log if "val/psnr" in r],
    }


def options_of(root: str, recipe: str, run: Path, steps: int) -> dict:
    """Arguments of `train_3d` from the recipe, for a short quiet run."""
    flags = {"config": recipe, "data.root": root, "out_dir": run, "max_steps": steps}
    often = 0 if steps == WARM_STEPS else max(steps // 15, 1)
    flags |= {"val_every": often, "media_every": 0, "wandb": "disabled"}
    return parse(train_3d, [text for k, v in flags.items() for text in (f"--{k}", str(v))])


def network(recipe, factor: int, name: str):
    """Return the factory of a network at a factor: the recipe's levels, then more like its last."""
    plan = recipe().spec["init_args"]
    missing = round(log2(factor)) - len(plan["factors"])
    if missing < 0:
        raise ValueError(f"--factors {factor}: the recipe itself shrinks by {recipe().factor}")
    channels = tuple(plan["channels"]) + (plan["channels"][-1],) * missing
    if name not in PEERS:
        factors = [*plan["factors"]] + [(2, 2, 2)] * missing
        linear = name == OURS
        return partial(recipe, channels=channels, factors=factors, linear_code=linear)
    channels = WIDE if name == "monai wide" else (channels[0] // 2, *channels)
    groups = 16 if name == "monai wide" else 8
    return partial(PEERS[name], channels, plan["num_res_blocks"], plan["latent_channels"], groups)


def linear_codes(root: str, recipe: str, out: Path, factor: int, split: str) -> dict[str, dict]:
    """Measure average pooling and block PCA with as many and twice as many numbers."""
    from loaders import open_data

    options = options_of(root, recipe, out, 1)
    store, parts = open_data(options["data"])
    training, held_out = store.subset(parts["train"]), store.subset(parts[split])
    lo, hi = store.data_range
    channels, cell = options["model"]().latent_channels, (factor,) * 3
    read = (torch.from_numpy(training.read(i)) for i in range(len(training)))
    pca = BlockPCA.fit(read, cell, 2 * channels)
    codes = {"average pooling": lambda x: pooled(x, cell)}
    codes |= {f"block PCA, {n} channels": partial(pca, count=n) for n in (channels, 2 * channels)}
    volumes = [torch.from_numpy(held_out.read(i)) for i in range(len(held_out))]
    rows = {}
    for name, code in codes.items():
        pairs = [(x, code(x)) for x in volumes]
        metrics = {
            k: {"mean": statistics.fmean(METRICS[k](x, recon, hi - lo) for x, recon in pairs)}
            for k in SHOWN
            if k in METRICS
        }
        rows[f"{factor}/{name}"] = {"factor": factor, "network": name, "metrics": metrics}
    return rows


def tables(rows: list[dict], sweep_steps: int) -> str:
    """The results as Markdown: the sweep, then the runs, means over seeds."""
    trained = [row for row in rows if "steps" in row and row["steps"] != WARM_STEPS]
    sweep = [row for row in trained if row["steps"] == sweep_steps]
    rates = sorted({row["rate"] for row in sweep})
    found = {(r["factor"], r["network"], r["rate"]): r["curve"][-1][1] for r in sweep}
    lines = [
        [factor, name, *(f"{found.get((factor, name, rate), float('nan')):.2f}" for rate in rates)]
        for factor, name in dict.fromkeys(key[:2] for key in found)
    ]
    text = f"Validation PSNR [dB] after {sweep_steps} steps, by learning rate:\n\n"
    text += markdown(" | ".join(["factor | network", *(f"{rate:g}" for rate in rates)]), lines)
    runs: dict[tuple, list[dict]] = {}
    for row in trained:
        if row["steps"] != sweep_steps:
            key = (row["factor"], row["network"], row["rate"], row["steps"])
            runs.setdefault(key, []).append(row)
    lines = []
    for (factor, name, rate, steps), ones in runs.items():
        costs = [one["cpu_s_per_step"] for one in ones if one["cpu_s_per_step"]]
        lines.append([
            factor, name, f"{rate:g}", steps, len(ones), f"{ones[0]['parameters'] / 1e6:.2f}",
            *measured(ones), f"{statistics.fmean(costs):.2f}" if costs else "",
        ])  # fmt: skip
    for row in rows:
        if "steps" not in row:
            lines.append([row["factor"], row["network"], "", "", "", "", *measured([row]), ""])
    head = "factor | network | learning rate | steps | seeds | M parameters | PSNR [dB] | SSIM"
    head += " | pca_equivalent | lattice_score | CPU s a step"
    return text + "\nHeld-out volumes, mean (sd over seeds):\n\n" + markdown(head, lines)


def measured(rows: list[dict]) -> list[str]:
    """Mean and standard deviation over `rows` of each metric, as text."""
    cells = []
    for metric, form in SHOWN.items():
        values = [row["metrics"][metric]["mean"] for row in rows if metric in row["metrics"]]
        sd = f" ({statistics.stdev(values):{form}})" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):{form}}{sd}" if values else "")
    return cells


def markdown(head: str, rows: list[list]) -> str:
    """A table as Markdown."""
    lines = [f"| {head} |", "| " + " | ".join(["---"] * len(head.split("|"))) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def curves(rows: list[dict]) -> str:
    """Validation PSNR as an SVG: a line for each run, over steps and over processor-seconds."""
    runs = [row for row in rows if row["curve"] and row["cpu_s_per_step"]]
    networks = sorted({(row["factor"], row["network"]) for row in runs})
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="380" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>',
    ]
    by_step = {id(row): row["curve"] for row in runs}
    by_time = {
        id(row): [(step * row["cpu_s_per_step"], psnr) for step, psnr in row["curve"]]
        for row in runs
    }
    for left, unit, lines in ((50, "steps", by_step), (460, "processor-seconds", by_time)):
        points = [point for line in lines.values() for point in line]
        if not points:
            continue
        end, high = max(x for x, _ in points), max(y for _, y in points)
        low = max(min(y for _, y in points), high - 6)  # the beginning of a plain run is cut off
        parts.append(
            f'<rect x="{left}" y="20" width="340" height="310" fill="none" stroke="#bbb"/>'
            f'<text x="{left - 44}" y="30">{high:.1f}</text>'
            f'<text x="{left - 44}" y="334">{low:.1f}</text>'
            f'<text x="{left}" y="352">0</text>'
            f'<text x="{left + 170}" y="370" text-anchor="middle">{unit}</text>'
            f'<text x="{left + 340}" y="352" text-anchor="end">{end:.0f}</text>'
        )
        for row in runs:
            color = COLORS[networks.index((row["factor"], row["network"])) % len(COLORS)]
            line = " ".join(
                f"{left + 340 * x / end:.1f},{330 - 310 * (y - low) / (high - low + 1e-9):.1f}"
                for x, y in lines[id(row)]
                if y >= low
            )
            parts.append(
                f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{line}"/>'
            )
    for i, (factor, name) in enumerate(networks):
        color = COLORS[i % len(COLORS)]
        label = f"{name}, factor {factor}"
        parts.append(f'<text x="820" y="{40 + 20 * i}" fill="{color}">{label}</text>')
    parts.append('<text x="6" y="14">PSNR on validation [dB]</text>')
    return "\n".join(parts) + "\n</svg>\n"


def write(path: Path, value) -> None:
    """Write JSON that is whole or not there."""
    write_text(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main(quality)
