"""The main job on real heads, as a user runs it: train, evaluate, and beat the best linear code."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *argv: object) -> str:
    command = [sys.executable, ROOT / script, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_three_hundred_steps_reconstruct_held_out_heads_better_than_block_pca(
    real_volumes, tmp_path
):
    data = ["--data.root", real_volumes / "ixi_t1_2mm", "--data.cache_dir", tmp_path / "cache"]
    recipe = ROOT / "configs" / "train" / "ixi_t1.yaml"
    options = ["--wandb", "disabled", "--val_every", 0, "--media_every", 0]
    run("train_3d.py", "--config", recipe, *data, "--out_dir", tmp_path / "run", *options)
    for split, count in (("test", 2), ("val", 7)):
        out = tmp_path / split
        said = run(
            "evaluate.py", "--checkpoint", tmp_path / "run", *data, "--out_dir", out,
            "--split", split, "--overlap", 0.25, "--media", "false", "--patch_gap", "false",
        )  # fmt: skip
        with open(out / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        ours = [float(row["psnr"]) for row in rows]
        linear = [float(row["pca_psnr"]) for row in rows]
        assert len(rows) == count
        assert sum(ours) / count > sum(linear) / count, said
