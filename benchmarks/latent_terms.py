"""What each term for better latents adds to a training step, beside plain training in one run.

    python benchmarks/latent_terms.py [--recipe demo] [--rounds 12]

The recipe's network and loss on noise of its patch and batch. Rounds of all variants are
interleaved; printed is the median over rounds of the time relative to the plain step of the round.
"""

import argparse
import copy
import statistics
import time

import torch

from loaders import Batch
from vae3d.commands.train import train_3d
from vae3d.config import parse
from vae3d.losses.latents import (
    NoiseRobust,
    ScaleEquivariance,
    SpectrumMatching,
    StructuredChannels,
)
from vae3d.losses.term import Disturbance
from vae3d.training.task import VAETask

VARIANTS = {
    "plain": [],
    "SpectrumMatching": [SpectrumMatching],
    "ScaleEquivariance": [ScaleEquivariance],
    "NoiseRobust": [NoiseRobust],
    "StructuredChannels": [StructuredChannels],
}


def task_of(options, extra) -> VAETask:
    """The recipe's task with further terms."""
    torch.manual_seed(0)
    vae, loss = options["model"](), options["loss"]()
    for term in (make() for make in extra):
        kept = loss.disturbances if isinstance(term, Disturbance) else loss.terms
        kept[term.name] = term
    return VAETask(vae, loss)


def seconds(task, optimizer, batch, step) -> float:
    """Time of one update."""
    begun = time.perf_counter()
    optimizer.zero_grad()
    task(batch, step)["loss"].backward()
    optimizer.step()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    needed = ["--data.root", "none", "--out_dir", "none"]
    options = parse(train_3d, ["--config", args.recipe, *needed])
    count, patch = options["batch_size"], options["patch_size"]
    index = torch.arange(count)
    batch = Batch(torch.rand(count, 1, *patch), index, torch.zeros(count, len(patch)), index)
    runs = {}
    for name, extra in VARIANTS.items():
        task = task_of(options, extra)
        runs[name] = (task, torch.optim.AdamW(task.parameters(), 1e-4))
    ratios = {name: [] for name in VARIANTS}
    for step in range(-1, args.rounds):
        took = {name: seconds(*run, copy.copy(batch), max(step, 0)) for name, run in runs.items()}
        for name in ratios if step >= 0 else ():  # the first round warms up
            ratios[name].append(took[name] / took["plain"])
    print(f"{args.recipe}: {count} patches of {list(patch)}, {torch.get_num_threads()} threads")
    for name, values in ratios.items():
        print(f"{name:<20}{statistics.median(values):.3f} of a plain step")


if __name__ == "__main__":
    main()
