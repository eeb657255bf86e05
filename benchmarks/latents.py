"""Do the terms for better latents make better samples? Both stages, trained and judged, arm by arm.

    python benchmarks/latents.py --out_dir build/latents                 # demo volumes, 24 arms
    python benchmarks/latents.py --stage B --root DIR                    # T1 heads, six arms
    python benchmarks/latents.py --only_table true                       # what there is

Stage A: {plain, spectrum, scale, both} x {linear code, none} x 3 seeds on demo volumes of 8 mm.
Stage B: plain and the two arms that stage A found best, 2 seeds, on the T1 heads in `--root` at
4 mm. An arm is a VAE, the latents of its training volumes, a diffusion model of the same network
and steps for all, samples, and `vae3d compare` of these with volumes that neither stage has seen.
All arms with the linear code come first, and of these all have their first seed before any has its
second. Each arm's numbers go into latents.json beside this script when it is done; the same command
again continues where it stopped. Printed are means over seeds, and differences from the plain arm
of the same seed and code with 95 % intervals (Student's t). An arm takes 2 to 3 core-minutes.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from imageio.v3 import imread
from scipy.stats import t as student

from loaders import DataConfig, Preprocess, read_volume, write_demo
from loaders.preprocess import to_store_grid
from loaders.whole import write_text
from vae3d import train_3d
from vae3d.commands.compare import compare
from vae3d.commands.encode import encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.commands.sample import sample
from vae3d.commands.train_ldm import UNet, train_ldm
from vae3d.config import main
from vae3d.losses import VAELoss
from vae3d.losses.features import DeepBet
from vae3d.losses.latents import ScaleEquivariance, SpectrumMatching
from vae3d.models.blocks import ResBlock
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.posterior import LogVarianceHead
from vae3d.stage2.sheet import contact_sheet, three_slices
from vae3d.tracking.media import write_png

ARMS = {
    "plain": (),
    "spectrum": (SpectrumMatching,),
    "scale": (ScaleEquivariance,),
    "both": (SpectrumMatching, ScaleEquivariance),
}
KEPT = Path(__file__).with_suffix(".json")
QUIET = {"wandb": "disabled", "device": "cpu", "val_every": 0, "media_every": 0, "threads": 0}
# What is told of an arm: its column, and whether more is better (None where neither is).
COLUMNS = {
    "psnr": True,
    "spectral_gap": False,
    "high_frequency_share": None,
    "scale_psnr": True,
    "kernel": False,
    "frechet": False,
    "precision": True,
    "recall": True,
    "density": True,
    "coverage": True,
    "histogram": False,
    "ms_ssim": None,
    "cpu_minutes": False,
}
JUDGED = ("kernel", "frechet", "precision", "recall", "density", "coverage", "histogram", "ms_ssim")


@dataclass(frozen=True)
class Stage:
    """What all arms of a stage share.

    Args:
        seeds: Seeds of an arm; each seeds both stages and the samples.
        codes: With the linear code, without, or both.
        spacing_mm: Voxels of the volumes.
        channels: Channels of the VAE, level by level; each halves, the first at once.
        vae_steps: Updates of the VAE.
        ldm_steps: Updates of the diffusion model.
        samples: Drawn volumes.
        enlarged: How much larger a volume is shown to the network whose features judge it, which
            knows heads of about 2 mm.
    """

    seeds: tuple[int, ...]
    codes: tuple[bool, ...]
    spacing_mm: float
    channels: tuple[int, ...]
    vae_steps: int
    ldm_steps: int
    samples: int
    enlarged: int


STAGES = {
    "A": Stage((0, 1, 2), (True, False), 8.0, (16,), 200, 600, 24, 3),
    "B": Stage((0, 1), (True,), 4.0, (16, 32), 200, 600, 24, 2),
}


class Enlarged(DeepBet):
    """Features of the packaged network of T1 heads, which are brought near the size it knows.

    Args:
        times: How much larger each axis becomes.
    """

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See `DeepBet`."""
        return super().forward(torch.nn.functional.interpolate(x, scale_factor=self.times))


@dataclass(frozen=True)
class Arm:
    """One cell of the experiment."""

    stage: str
    terms: str
    code: bool
    seed: int

    @property
    def name(self) -> str:
        """Its key in latents.json, and its folder."""
        return f"{self.stage}-{self.terms}-{'code' if self.code else 'none'}-{self.seed}"


def volumes_of(stage: str, root: str | None, home: Path) -> tuple[Path, Path]:
    """Folders of the volumes that are trained on, and of those that no model sees."""
    train, unseen = home / f"{stage}-train", home / f"{stage}-unseen"
    if stage == "A":
        write_demo(train, 40, STAGES["A"].spacing_mm, seed=0)
        write_demo(unseen, 24, STAGES["A"].spacing_mm, seed=1)
    elif not unseen.is_dir():
        if root is None:
            raise ValueError("stage B needs --root, a folder of T1 heads")
        paths = sorted(Path(root).expanduser().glob("*.nii*"))
        for folder, chosen in (
            (train, paths[: len(paths) // 2]),
            (unseen, paths[len(paths) // 2 :]),
        ):
            folder.mkdir(parents=True)
            for path in chosen:
                (folder / path.name).symlink_to(path.resolve())
    return train, unseen


def run(arm: Arm, train: Path, unseen: Path, home: Path) -> dict[str, float]:
    """Train, draw and judge one arm; return its numbers."""
    stage, folder, cache = STAGES[arm.stage], home / arm.name, str(home / "cache")
    begun = time.process_time()
    torch.manual_seed(arm.seed)
    spacing = None if arm.stage == "A" else (stage.spacing_mm,) * 3
    preprocess = Preprocess(spacing_mm=spacing)
    data = DataConfig(str(train), cache_dir=cache, preprocess=preprocess, fractions=(1, 0, 0))
    network = partial(
        CustomVAE, channels=stage.channels, factors=((2, 2, 2),) * len(stage.channels),
        num_res_blocks=1, latent_channels=3, block=partial(ResBlock, zero_init=True),
        norm=partial(GroupNorm, num_groups=4), encoder_mid=False, decoder_mid=False,
        linear_code=arm.code,
        posterior=partial(LogVarianceHead, init_logvar=-6.0),
    )  # fmt: skip
    loss = partial(VAELoss, extra=list(ARMS[arm.terms]))
    common = QUIET | {"seed": arm.seed, "log_every": 100, "save_every": 10**6}
    go_on(train_3d(
        data, str(folder / "vae"), network, loss, patching=None, batch_size=4,
        max_steps=stage.vae_steps, lr=2e-3, warmup_steps=20, ema_decay=0.98, **common,
    ))  # fmt: skip
    numbers = {"minutes_vae": (time.process_time() - begun) / 60}
    evaluate(
        str(folder / "vae"), EvaluationData(str(unseen), cache_dir=cache), str(folder / "unseen"),
        mode="full", split="all", media=False, save_recon=False, patch_gap=False, baseline=False,
        wandb="disabled", device="cpu",
    )  # fmt: skip
    measured = json.loads((folder / "unseen" / "summary.json").read_text())["metrics"]
    for name in ("psnr", "spectral_gap", "high_frequency_share", "scale_psnr"):
        numbers[name] = measured[name]["mean"]
    encode(str(folder / "vae"), str(folder / "latents"), mode="full", device="cpu")
    go_on(train_ldm(
        str(folder / "latents"), str(folder / "ldm"), UNet((16, 32), 1, (False, True), (0, 16), 8),
        time_sampling="logit_normal", batch_size=4, max_steps=stage.ldm_steps, lr=2e-3,
        warmup_steps=50, ema_decay=0.99, **common,
    ))  # fmt: skip
    sample(
        ldm=str(folder / "ldm"), out_dir=str(folder / "samples"), n=stage.samples, steps=25,
        clip=True, seed=arm.seed, media=False, device="cpu",
    )  # fmt: skip
    judge = partial(
        compare, str(folder / "samples" / "ldm"), network=partial(Enlarged, stage.enlarged),
        preprocess=preprocess, cache_dir=cache, device="cpu",
    )  # fmt: skip
    judge(str(unseen), out_dir=str(folder / "judged"))
    found = json.loads((folder / "judged" / "compare.json").read_text())["numbers"]
    numbers |= {name: found[name]["value"] for name in JUDGED}
    numbers |= {f"{name}_floor": found[name]["floor"] for name in JUDGED}
    if arm.stage == "B":  # demo volumes are warps of one template: nothing is a copy there
        judge(str(train), heldout=str(unseen), out_dir=str(folder / "copies"))
        found = json.loads((folder / "copies" / "compare.json").read_text())["memorization"]
        numbers["copies_p"] = found["voxels"]["p"]
    numbers["cpu_minutes"] = (time.process_time() - begun) / 60
    write_png(
        home / f"{arm.name}.png", drawn(arm.terms, folder / "samples" / "ldm", stage.spacing_mm)
    )
    shutil.rmtree(folder)
    return numbers


def drawn(title: str, folder: Path, spacing_mm: float, count: int = 6) -> np.ndarray:
    """The first volumes of a folder as a row of a picture, each between 0 and its brightest."""
    pictures, spacing = [], (spacing_mm,) * 3
    for path in sorted(folder.glob("*.nii*"))[:count]:
        volume, _ = to_store_grid(read_volume(path), Preprocess(spacing_mm=spacing))
        x = volume.data.astype(np.float32)
        pictures.append(three_slices(x, spacing, (0.0, float(np.quantile(x, 0.999)))))
    return contact_sheet({title: pictures})


def picture(stage: str, unseen: Path, home: Path) -> None:
    """Write the samples of the arms' first seed below volumes that they have not seen."""
    rows = [drawn("not seen", unseen, STAGES[stage].spacing_mm)]
    rows += [imread(path) for path in sorted(home.glob(f"{stage}-*-code-0.png"))]
    wide = max(row.shape[1] for row in rows)
    edges = [((0, 0), (0, wide - row.shape[1]), (0, 0)) for row in rows]
    write_png(
        home / f"{stage}.png",
        np.concatenate([np.pad(r, e, mode="edge") for r, e in zip(rows, edges, strict=True)]),
    )


def go_on(code: int) -> None:
    """End with a training that a signal has ended."""
    if code:
        raise SystemExit(code)


def arms_of(stage: str, results: dict[str, dict]) -> Iterator[Arm]:
    """The arms in the order in which they run."""
    how = STAGES[stage]
    terms = tuple(ARMS) if stage == "A" else ("plain", *best_two(results))
    for code, seed, name in itertools.product(how.codes, how.seeds, terms):
        yield Arm(stage, name, code, seed)


def best_two(results: dict[str, dict]) -> list[str]:
    """The two arms whose samples have the least kernel distance in stage A."""
    found = {
        terms: [one["kernel"] for key, one in results.items() if key.startswith(f"A-{terms}-")]
        for terms in ARMS
        if terms != "plain"
    }
    if not all(found.values()):
        raise ValueError("stage B follows stage A, which has not had every arm yet")
    return sorted(found, key=lambda terms: statistics.mean(found[terms]))[:2]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def table(stage: str, results: dict[str, dict]) -> str:
    """What there is of a stage, as Markdown: means, then differences from plain."""
    of_stage = {key: one for key, one in results.items() if key.startswith(f"{stage}-")}
    lines = row("arm", "linear code", "seeds", *COLUMNS)
    lines += row(*["---"] * (len(COLUMNS) + 3))
    for code, terms in itertools.product(("code", "none"), ARMS):
        rows = [one for key, one in of_stage.items() if key.startswith(f"{stage}-{terms}-{code}-")]
        if rows:
            means = [f"{statistics.mean(one[name] for one in rows):.3g}" for name in COLUMNS]
            lines += row(terms, code, str(len(rows)), *means)
    floors = {
        name: f"{statistics.mean(one[f'{name}_floor'] for one in of_stage.values()):.3g}"
        for name in JUDGED
    }
    lines += row("real against real", "", "", *(floors.get(name, "") for name in COLUMNS))
    lines += ["", "Differences from plain of the same seed and code, with 95 % intervals:", ""]
    lines += row("arm", "pairs", *COLUMNS) + row(*["---"] * (len(COLUMNS) + 2))
    for terms in ARMS:
        plain = {key: key.replace(f"-{terms}-", "-plain-") for key in of_stage}
        pairs = [
            (of_stage[key], of_stage[other])
            for key, other in plain.items()
            if f"-{terms}-" in key and other != key and other in of_stage
        ]
        if pairs:
            shown = [difference([a[name] - b[name] for a, b in pairs]) for name in COLUMNS]
            lines += row(terms, str(len(pairs)), *shown)
    minutes = sum(one["cpu_minutes"] for one in of_stage.values())
    return "\n".join([*lines, "", f"{len(of_stage)} arms, {minutes:.0f} core-minutes"])


def row(*cells: str) -> list[str]:
    """A line of a table."""
    return [f"| {' | '.join(cells)} |"]


def difference(values: list[float]) -> str:
    """A mean with its interval; a star where that does not hold 0."""
    mean, half = interval(values)
    return f"{mean:+.2g} ± {half:.2g}" + ("*" if abs(mean) > half else "")


def experiment(
    out_dir: str = "build/latents",
    stage: str = "A",
    root: str | None = None,
    only_table: bool = False,
) -> None:
    """Run the arms of a stage that are not done yet, and print what there is.

    Args:
        out_dir: Where volumes and runs lie.
        stage: A (demo volumes) or B (T1 heads, after A).
        root: Folder of T1 heads, for stage B.
        only_table: Print what there is and run nothing.
    """
    torch.set_num_threads(1)
    home = Path(out_dir)
    home.mkdir(parents=True, exist_ok=True)
    results = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    todo = [] if only_table else [a for a in arms_of(stage, results) if a.name not in results]
    for arm in todo:
        train, unseen = volumes_of(stage, root, home)
        results[arm.name] = run(arm, train, unseen, home)
        write_text(KEPT, json.dumps(results, indent=1) + "\n")
        print(arm.name, {k: round(v, 4) for k, v in results[arm.name].items()}, flush=True)
        picture(stage, unseen, home)
    for name in STAGES:
        if any(key.startswith(f"{name}-") for key in results):
            print(f"\nStage {name}\n\n{table(name, results)}")


if __name__ == "__main__":
    main(experiment)
