"""Trainings through random trouble: what they end with is what an undisturbed one ends with.

Each round has a seed of its own and prints what it does to the run. The same round again:
VAE3D_SOAK_SEED=<seed> pytest tests/test_soak.py -s. VAE3D_SOAK_MINUTES is for all.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import GAN, TINY, Process, assert_equal, fork_server, losses, run
from troubles import DEEDS, FIRST, LATER, MOMENTS, OFTEN, ONCE, SIGNALS, Trouble, relieve

from vae3d.training.checkpoint import load_checkpoint

__all__ = ["fork_server"]  # a fixture

MINUTES = float(os.environ.get("VAE3D_SOAK_MINUTES", 1.2))
SEED = int(os.environ.get("VAE3D_SOAK_SEED", 0))
STEPS, BATCH = 60, 4  # of all ranks together
EVERY = {"save_every": 5, "val_every": 10, "media_every": 20}
DISK = "size=32m"
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}
STATE = ("model", "ema", "task", "optimizers", "scaler", "loader", "samples", "best")


@contextmanager
def small_disk(place: Path):
    """Make `place` a disk of its own; say whether that was possible, which needs root."""
    place.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", DISK, "none", str(place)]
        small = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        small = False
    try:
        yield small
    finally:
        relieve(place)
        if small:
            subprocess.run(["umount", "-l", str(place)], check=True)


@dataclass
class Soak:
    """Trainings in one place, and what they are compared with."""

    place: Path
    small: bool
    ranks: tuple[int, ...]  # one of these numbers each time

    def argv(self, ranks: int) -> list[str]:
        """The command line that the user gives again and again; the step's batch is the same."""
        place = self.place
        options = {
            "config": place / "recipe.yaml",
            "data.root": place / "volumes",
            "data.cache_dir": place / "cache",
            "data.augment": "null",  # it runs in processes, which take seconds to start
            "out_dir": place / "run",
            "batch_size": BATCH // ranks,
            "max_steps": STEPS,
            "threads": 2,
            "model.init_args.linear_code": "true",
            # Another number of ranks takes another batch of each, which only --force lets pass.
            "force": str(len(self.ranks) > 1).lower(),
            **EVERY,
        }
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def prepare(self) -> None:
        """Write volumes and recipe."""
        generator = np.random.default_rng(0)
        (self.place / "volumes").mkdir()
        for i in range(10):
            shape = (18 + i % 3, 24, 22)
            grid = np.stack(np.meshgrid(*[np.linspace(0, 3, n) for n in shape], indexing="ij"))
            image = np.sin(grid * (1 + i / 3)).sum(0) + 0.1 * generator.standard_normal(shape)
            np.save(self.place / "volumes" / f"subject_{i:02d}.npy", image.astype(np.float32))
        (self.place / "recipe.yaml").write_text(TINY + GAN)

    def begin_anew(self) -> None:
        """Forget the run and what was cached."""
        relieve(self.place)
        for name in ("run", "cache"):
            shutil.rmtree(self.place / name, ignore_errors=True)

    def undisturbed(self, ranks: int, keep: Path) -> dict[int, list]:
        """Train without trouble; keep the run folder, return the samples of each step."""
        process = Process(self.argv(ranks), keep.parent, ranks, troubles=[])
        assert process.wait() == [0] * ranks, process.text()
        shutil.copytree(self.place / "run", keep)
        return samples(process, ranks)


def samples(process: Process, ranks: int) -> dict[int, list]:
    """The samples of each step, in the order of the data, as far as all ranks have told them."""
    told = [
        {int(n): json.loads(rows) for n, rows in re.findall(r"^SAMPLES (\d+) (.*)$", text, re.M)}
        for text in map(process.text, range(ranks))
    ]
    steps = set.intersection(*map(set, told))
    # Rank r of n takes every n-th sample, from the r-th.
    return {s: [row for rows in zip(*[t[s] for t in told], strict=True) for row in rows]
            for s in sorted(steps)}  # fmt: skip


def draw(rng: random.Random, soak: Soak, ranks: int, begun: bool) -> Trouble:
    """A trouble at a random moment that can come."""
    deed = rng.choice([*SIGNALS, *DEEDS])  # signals twice as often
    if len(soak.ranks) > 1 and deed == "vanished volume":
        deed = "vanished cache"  # with --force a run goes on without the volume, as it is told to
    moment = rng.choice([m for m in MOMENTS if m not in (FIRST if begun else LATER)])
    count = 1 if moment in ONCE else rng.randint(1, 15 if moment in OFTEN else 3)
    rank = rng.randrange(ranks) if deed in SIGNALS else 0  # rank 0 writes
    return Trouble(rank, moment, count, rng.random() < 0.5, deed, soak.place, soak.small)


def end(process: Process, both: bool) -> tuple[list[int], int]:
    """Exit codes, and the rank that ended first, with an error if there is one.

    With `both`, a rank that is left alone is ended soon, as torchrun or a dead machine would.
    """
    alone_since, first = 0.0, None
    for _ in process.naps():
        failed = [n for n, rank in enumerate(process.ranks) if rank.exitcode not in (None, 0)]
        if failed and first is None:
            first, alone_since = failed[0], time.monotonic()
        if both and failed and time.monotonic() > alone_since + 1:
            process.kill()
    codes = process.wait()
    return codes, next((n for n, code in enumerate(codes) if code), 0) if first is None else first


def suffer(soak: Soak, trouble: Trouble, ranks: int, delay: float | None, both: bool) -> Process:
    """Train until the end or through a trouble, and hold it to what is promised."""
    before = newest_step(soak.place / "run")
    process = Process(soak.argv(ranks), soak.place.parent, ranks, troubles=[trouble])
    if delay is not None:  # at any moment at all, beside the one that was drawn
        process.ranks[trouble.rank].join(delay)
        if process.ranks[trouble.rank].exitcode is None:
            os.kill(process.ranks[trouble.rank].pid, signal.SIGKILL)
    codes, first = end(process, both)
    texts = [process.text(rank) for rank in range(ranks)]
    happened = any("TROUBLE" in text for text in texts)
    told = f"{trouble}, killed after {delay:.2f} s" if delay else f"{trouble}"
    told += "" if happened else ", not reached"
    print(f"    {ranks} ranks from step {before}: {told}: {codes}", flush=True)
    everything = "\n".join(texts)
    allowed = {0}
    if delay is not None or (happened and trouble.deed == "SIGKILL"):
        allowed.add(-signal.SIGKILL)
    if happened and trouble.deed != "SIGKILL":
        allowed.add(CODES.get(trouble.deed, 2))
    assert codes[first] in allowed, everything
    if happened and delay is None and trouble.deed in CODES:  # all ranks stop for the one's signal
        assert set(codes) <= {0, CODES[trouble.deed], -signal.SIGKILL}, everything
    assert "Traceback" not in texts[first], everything
    if codes[first] == 2:
        errors = [line for line in texts[first].splitlines() if "error: " in line]
        assert len(errors) == 1, everything
    relieve(soak.place)
    done = max(samples(process, ranks), default=before)  # a signal lets them be saved
    check_folder(soak, codes, done if codes[first] in CODES.values() else before)
    return process


def newest_step(folder: Path) -> int:
    last = folder / "checkpoints" / "last.pt"
    return load_checkpoint(last)["step"] if last.exists() else 0


def check_folder(soak: Soak, codes: list[int], done: int) -> None:
    """A run folder is whole at any moment, and has the steps that are done for good."""
    folder = soak.place / "run"
    assert newest_step(folder) >= done
    for path in folder.glob("checkpoints/[!.]*.pt"):
        load_checkpoint(path)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
    if -signal.SIGKILL not in codes:
        assert not list(soak.place.rglob("*.partial.*"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1,), (2,), (1, 2)], ids=["1", "2", "1-or-2"])
def test_whatever_happens_to_a_run_it_ends_as_one_to_which_nothing_happened(ranks, tmp_path):
    with small_disk(tmp_path / "disk") as small:
        soak = Soak(tmp_path / "disk", small, ranks)
        soak.prepare()
        wanted = soak.undisturbed(ranks[0], tmp_path / "undisturbed")
        assert sorted(wanted) == list(range(1, STEPS + 1))
        until, seed = time.monotonic() + MINUTES * 60 / 3, SEED
        while seed == SEED or time.monotonic() < until:
            play_round(soak, seed, wanted, tmp_path / "undisturbed")
            seed += 1


def play_round(soak: Soak, seed: int, wanted: dict[int, list], undisturbed: Path) -> None:
    """One run through trouble to its end, compared with the undisturbed one."""
    print(f"\n  seed {seed}, {'a disk of its own' if soak.small else 'no disk of its own'}")
    ranks, rng = soak.ranks, random.Random(f"{seed} {soak.ranks}")
    soak.begin_anew()
    lost_lines = False  # a full disk costs lines of the log, which is told
    troubles, step = 0, 0
    while troubles < 12 and step < STEPS:
        count, troubles = rng.choice(ranks), troubles + 1
        trouble = draw(rng, soak, count, begun=step > 0)
        delay = rng.uniform(0.2, 3) if rng.random() < 0.15 else None
        # Who is killed before the ranks have met is waited for, by whom no torchrun ends.
        both = rng.random() < 0.8 or delay is not None
        process = suffer(soak, trouble, count, delay, both)
        lost_lines |= trouble.deed == "full disk"
        step = newest_step(soak.place / "run")
        assert_as_wanted(samples(process, count), wanted)
    run(soak.argv(ranks[-1]), soak.place.parent, ranks[-1])
    got = losses(soak.place / "run"), losses(soak.place / "run", "val/mae")
    for found, name in zip(got, ("train/loss", "val/mae"), strict=True):
        expected = losses(undisturbed, name)
        assert lost_lines or found.keys() == expected.keys(), name
        expected = {step: expected[step] for step in found}
        assert found == (expected if len(ranks) == 1 else pytest.approx(expected, rel=1e-3)), name
    folders = soak.place / "run", undisturbed
    one, two = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in folders)
    for part in STATE if len(ranks) == 1 else ("samples", "loader"):
        assert_equal(one[part], two[part], part)


def assert_as_wanted(told: dict[int, list], wanted: dict[int, list]) -> None:
    """Each step that was done, for the first time or again, had the samples that it has to have."""
    for step, rows in told.items():
        assert rows == wanted[step], f"step {step}"
