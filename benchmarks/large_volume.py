"""A volume of 2048^3 voxels, read where it lies by the real commands: time and peak memory of each.

    python benchmarks/large_volume.py             # some minutes on one core, 30 MB of disk
    python benchmarks/large_volume.py --epoch     # and 10,000 patches out of one terabyte

Trains a tiny network on the whole, evaluates 512 x 512 x 256 voxels in mode patch, encodes 256^3 in
mode exact and decodes them. The volume is uint16 (17 GB), chunks of 64^3 in shards of 256^3; all
its shards are one file, linked. The terabyte, 8192^3, is all fill value but for its coarse level.
Memory is what no file backs (RssAnon), sampled 20 times a second; Linux alone counts it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.stores import array, terabyte, write

ROOT = Path(__file__).resolve().parents[1]
SIDE, SHARD, CHUNK = 2048, 256, 64
TINY = """
model:
  class_path: CustomVAE
  init_args:
    channels: [4, 8]
    num_res_blocks: 1
    encoder_mid: false
    decoder_mid: false
    norm: {class_path: GroupNorm, init_args: {num_groups: 4}}
patch_size: [64, 64, 64]
patches_per_volume: 64
batch_size: 2
max_steps: 8
val_every: 0
media_every: 0
threads: 1
wandb: disabled
device: cpu
data: {fractions: [1, 0, 0], cache_gb: 0.2}
"""
REGIONS = {
    "evaluate": "[[700,1212],[600,1112],[900,1156]]",
    "encode": "[[0,256],[300,556],[1,257]]",
}
VAE3D = "from vae3d.cli import main; main()"
EPOCH = """
import sys
from loaders import DataConfig, PatchLoader, open_data
root, cache = sys.argv[1:]
store, _ = open_data(DataConfig(root=root, cache_dir=cache, fractions=(1, 0, 0)))
for batch in PatchLoader(store, (64, 64, 64), patches_per_volume=10_000, batch_size=4, threads=1):
    pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epoch", action="store_true", help="read 10,000 patches of a terabyte too"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, config = made(folder / "a.zarr"), folder / "tiny.yaml"
        config.write_text(TINY)
        data = f"--data.root {path} --data.cache_dir {folder}/cache"
        evaluation = "--mode patch --overlap 8 --patch_gap false --split all --wandb disabled"
        exact = f"--checkpoint {folder}/run --mode exact --memory_gb 0.5 --device cpu"
        commands = {
            "train, 8 steps of 2 x 64^3 out of 2048^3":
                f"train --config {config} {data} --out_dir {folder}/run",
            "evaluate 512 x 512 x 256, mode patch":
                f"evaluate --checkpoint {folder}/run {data} --data.region {REGIONS['evaluate']} "
                f"{evaluation} --device cpu --out_dir {folder}/out",
            "encode 256^3, mode exact":
                f"encode {data} --data.region {REGIONS['encode']} {exact} --out_dir {folder}/z",
            "decode them, mode exact":
                f"decode {folder}/z {exact} --out_dir {folder}/decoded",
        }  # fmt: skip
        print(f"{'command':44}{'s':>8}{'CPU-s':>8}{'peak MB':>9}", flush=True)
        for told, command in commands.items():
            measure(told, ["-c", VAE3D, *command.split()])
        if options.epoch:
            epoch = ["-c", EPOCH, str(terabyte(folder / "b.zarr")), str(folder / "cache")]
            measure("10,000 patches of 64^3 out of 8192^3", epoch)


def made(path: Path) -> Path:
    """Write smooth structure under noise, compressed by a third, and link it to all places."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(100, 3000, (SHARD // 16,) * 3)
    data = np.kron(coarse, np.ones((16, 16, 16), np.int64)).astype(np.uint16)
    data += rng.integers(0, 100, data.shape, dtype=np.uint16)
    one = (
        array(path.with_name("one.zarr"), data, (CHUNK,) * 3, (SHARD,) * 3) / "c" / "0" / "0" / "0"
    )
    write(path, (SIDE,) * 3, np.uint16, (CHUNK,) * 3, (SHARD,) * 3, names="zyx")
    for place in itertools.product(map(str, range(SIDE // SHARD)), repeat=3):
        target = path.joinpath("c", *place)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(one, target)
    return path


def measure(told: str, arguments: list[str]) -> None:
    """Run Python, and print what it took."""
    start, peak, used = time.perf_counter(), 0, 0.0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        child = psutil.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
        while child.poll() is None:
            try:
                used = sum(child.cpu_times()[:2])
                peak = max(peak, anonymous(child.pid))
            except (psutil.Error, OSError, IndexError):  # it has just ended
                break
            time.sleep(0.05)
        if child.wait():
            said.seek(0)
            raise SystemExit(said.read())
    print(f"{told:44}{time.perf_counter() - start:8.1f}{used:8.1f}{peak / 1024:9.0f}", flush=True)


def anonymous(pid: int) -> int:
    """Kilobytes that a process holds and no file does."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    main()
