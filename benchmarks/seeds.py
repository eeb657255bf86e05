"""What a shipped recipe makes of a data set, seed by seed, with its linear code and without.

    python benchmarks/seeds.py demo data/demo --seeds '[0, 1, 2, 3, 4]'
    python benchmarks/seeds.py ixi_t1 data/mouse_ct --data "mouse CT" --steps 240
    python benchmarks/seeds.py ct data/chest/manifest.csv --plain true
    python benchmarks/seeds.py demo data/demo --seeds '[]'        # what there is, of all

A run that is done is kept in seeds.json beside this script and not made again. The held-out volumes
are reconstructed as `python evaluate.py --mode patch --overlap 0.25` does (pictures whole).

A spike is a step whose loss is far above those before it. Patches differ more than steps do (air
costs a hundredth of bone), so the reconstruction's squared error is taken over that of block PCA on
the same patches, a tenth of the mean added to both, and then over its own running mean, a tenth a
step.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loaders import open_data
from loaders.whole import write_text
from vae3d import train_3d
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.config import main, parse
from vae3d.inference.baselines import BlockPCA
from vae3d.losses.term import Term
from vae3d.recipes import find_recipe

KEPT = Path(__file__).with_suffix(".json")
COLUMNS = ("psnr", "ssim", "pca_equivalent", "lattice_score", "spike", "cpu_s")
PACE = 0.1  # of the running mean, a step


class LinearCode(Term):
    """Squared error of block PCA on what the network sees; told, and counted for nothing."""

    code: BlockPCA

    def __init__(self) -> None:
        super().__init__(0.0)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """See `Term`."""
        return torch.stack([(self.code(one) - one).square().mean() for one in x]).mean()


def highest_spike(errors: Sequence[float], linear: Sequence[float]) -> float:
    """The largest step over the running mean of those before it."""
    floor = statistics.mean(linear) / 10
    pairs = zip(errors, linear, strict=True)
    ratios = [(error + floor) / (other + floor) for error, other in pairs]
    mean, highest = ratios[0], 0.0
    for ratio in ratios[1:]:
        highest = max(highest, ratio / mean)
        mean += PACE * (ratio - mean)
    return highest


def run(recipe: str, root: str, folder: Path, steps: int | None, plain: bool, seed: int) -> dict:
    """Train one seed and measure it."""
    flags = {"config": find_recipe("train", recipe), "data.root": root, "out_dir": folder,
             "data.cache_dir": folder.parent / "cache", "wandb": "disabled", "seed": seed,
             "log_every": 1, "val_every": 0, "media_every": 0, "save_every": 10**6,
             "device": "cpu"}  # fmt: skip
    flags |= {"max_steps": steps} if steps else {}
    flags |= {"model.linear_code": "false"} if plain else {}
    call = parse(train_3d, [text for k, v in flags.items() for text in (f"--{k}", str(v))])
    vae = call["model"]()
    store, split = open_data(call["data"], vae.spatial_dims, None, vae.in_channels, None)
    training = store.subset(split["train"])
    volumes = (torch.from_numpy(training.read(i)) for i in range(len(training)))
    LinearCode.code = BlockPCA.fit(volumes, vae.factor, vae.latent_channels)
    begun = time.process_time()
    if code := train_3d(**call | {"loss": partial(call["loss"], extra=[LinearCode])}):
        raise SystemExit(code)
    spent = time.process_time() - begun
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    errors, linear = (
        [row[f"train/{name}"] for row in log if "train/recon" in row]
        for name in ("recon", "linear_code")
    )
    stitching = {"mode": "patch", "overlap": 0.25} if vae.spatial_dims == 3 else {"mode": "full"}
    evaluate(
        str(folder), EvaluationData(root, call["data"].cache_dir), str(folder / "evaluation"),
        **stitching, split="test", media=False, save_recon=False, patch_gap=False,
        wandb="disabled", device="cpu", trust=("__main__",),
    )  # fmt: skip
    measured = json.loads((folder / "evaluation" / "summary.json").read_text())["metrics"]
    shutil.move(folder / "metrics.jsonl", folder.with_suffix(".jsonl"))
    shutil.rmtree(folder)
    found = {name: measured[name]["mean"] for name in COLUMNS[:4]}
    return found | {"spike": highest_spike(errors, linear), "cpu_s": spent}


def table(results: dict[str, dict]) -> str:
    """The runs as Markdown: means, and the range over seeds where there are several."""
    groups: dict[str, dict[int, dict]] = {}
    for key, one in results.items():
        name, seed = key.rsplit(" | ", 1)
        groups.setdefault(name, {})[int(seed)] = one
    lines = [f"| data | recipe | linear code | seeds | {' | '.join(COLUMNS)} |"]
    lines += [f"|{'---|' * (4 + len(COLUMNS))}"]
    for name, runs in groups.items():
        cells = [shown([one[column] for one in runs.values()]) for column in COLUMNS]
        seeds = ", ".join(map(str, sorted(runs)))
        lines += [f"| {name} | {seeds} | {' | '.join(cells)} |"]
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    """One number, or the mean of several with their least and largest."""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def seeds(
    recipe: str,
    root: str,
    /,
    data: str | None = None,
    steps: int | None = None,
    seeds: tuple[int, ...] = (0, 1),
    plain: bool = False,
    out_dir: str = "build/seeds",
) -> None:
    """Run the seeds of a recipe on a data set that are not done yet, and print all there is.

    Args:
        recipe: Name of a recipe of train_3d.
        root: Its volumes, as `--data.root`.
        data: What to call them; null for the recipe's name.
        steps: Updates; null for the recipe's own.
        seeds: Seeds of the runs; none to print alone.
        plain: Leave the linear code out.
        out_dir: Where runs lie while they are made, the cache, and the steps of each run.
    """
    torch.set_num_threads(1)
    results = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for seed in seeds:
        key = f"{data or recipe} | {recipe} | {'no' if plain else 'yes'} | {seed}"
        if key not in results:
            folder = Path(out_dir) / key.replace(" | ", "-").replace(" ", "_")
            results[key] = run(recipe, root, folder, steps, plain, seed)
            write_text(KEPT, json.dumps(results, indent=1) + "\n")
            print(key, results[key], flush=True)
    print(table(results))


if __name__ == "__main__":
    main(seeds)
