"""Random patches out of one zarr store per CPU-second, ours beside others, in one run.

    python benchmarks/in_place.py                 # 512^3 uint16, chunks of 64^3 in shards of 256^3
    python benchmarks/in_place.py --rounds 9      # more turns of each
    python benchmarks/in_place.py --no-s3         # without the S3 server on the loopback

Peers come with `pip install -e '.[bench]'`, the S3 server with the extra `test`. All take turns,
and each one's median round counts, so that busy neighbors hit them alike. Every reader returns
float32 patches in a warm page cache; "tensorstore" is its own random read without a cache of
chunks, and without a conversion. CPU-seconds are of this process, kernel included.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from loaders import PatchLoader, Preprocess, VolumeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.stores import Bucket, array

SIDE, CHUNK, SHARD, PATCH = 512, 64, 256, 64
LATENCY_S = 0.02
UNIT = Preprocess(window_hu=(0, 4000))
TARGETS = {"ours, K = 1": ("tensorstore", 0.95), "ours, K = 8": ("tensorstore", 4.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader")
    parser.add_argument("--patches", type=int, default=48, help="of each turn")
    parser.add_argument("--no-s3", action="store_true", help="leave the S3 server out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = made(Path(folder) / "a.zarr")
        rates = turns(readers(path, Path(folder)), options.rounds, options.patches)
        print(f"{'reader':24}{'patches/CPU-s':>14}")
        for name, rate in rates.items():
            print(f"{name:24}{rate:14.1f}")
        for name, (peer, target) in TARGETS.items():
            print(f"{name}: {rates[name] / rates[peer]:.2f} of {peer}, wanted {target}")
        print(f"K = 1: {rates['ours, K = 1'] / rates['zarr-python, MONAI']:.2f} of zarr-python, "
              "MONAI, wanted 3")  # fmt: skip
        print(
            f"bytes fetched / inner chunks touched: {fetched(path, Path(folder)):.3f}, wanted 1.1"
        )
        if not options.no_s3:
            slow = with_latency(path, Path(folder), options.patches)
            print(f"patches/s with {1000 * LATENCY_S:g} ms of latency: {slow:.2f} of without, "
                  "wanted 0.8")  # fmt: skip


def made(path: Path) -> Path:
    """Write smooth structure under noise, as a microscope's, compressed by a half."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(100, 3000, (SIDE // 16,) * 3)
    data = np.kron(coarse, np.ones((16, 16, 16), np.int64)).astype(np.uint16)
    data += rng.integers(0, 100, data.shape, dtype=np.uint16)
    return array(path, data, (CHUNK,) * 3, (SHARD,) * 3, names="zyx")


def ours(path: Path | str, folder: Path, per_read: int, cache_gb: float, threads: int = 0):
    """Return our loader over the store; the plan of an epoch is longer than any turn."""
    store = VolumeStore.build([path], folder / "cache", UNIT, progress=False, cache_gb=cache_gb)
    return PatchLoader(store, (PATCH,) * 3, patches_per_volume=1024, batch_size=4,
                       threads=threads, patches_per_read=per_read)  # fmt: skip


def readers(path: Path, folder: Path) -> dict[str, Callable[[int], None]]:
    """Return what reads a number of random patches, by name."""
    import tensorstore as ts
    import zarr
    from monai.transforms import ScaleIntensityRange

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    raw = ts.open(spec, recheck_cached_data="open", read=True).result()
    theirs = zarr.open_array(str(path), mode="r")
    scale = ScaleIntensityRange(0, 4000, 0.0, 1.0, clip=True)
    rng = np.random.default_rng(1)

    def boxes(count: int) -> Iterator[tuple[slice, ...]]:
        for corner in rng.integers(0, SIDE - PATCH + 1, (count, 3)).tolist():
            yield tuple(slice(n, n + PATCH) for n in corner)

    def tensorstore(count: int) -> None:
        for box in boxes(count):
            raw[box].read().result()

    def zarr_python(count: int) -> None:
        for box in boxes(count):
            scale(torch.from_numpy(theirs[box].astype(np.float32))[None])

    streams = {k: ours(path, folder, k, gb).stream() for k, gb in ((1, 0.0), (8, 1.0))}

    def of_ours(per_read: int) -> Callable[[int], None]:
        def read(count: int) -> None:
            for _ in itertools.islice(streams[per_read], count // 4):
                pass

        return read

    return {"tensorstore": tensorstore, "zarr-python, MONAI": zarr_python,
            "ours, K = 1": of_ours(1), "ours, K = 8": of_ours(8)}  # fmt: skip


def turns(kinds: dict[str, Callable[[int], None]], rounds: int, count: int) -> dict[str, float]:
    """Return each one's median of patches per CPU-second; a first turn is not counted."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, read in kinds.items():
            before = cpu_seconds()
            read(count)
            if number:
                found[name].append(count / (cpu_seconds() - before))
    return {name: median(rates) for name, rates in found.items()}


def cpu_seconds() -> float:
    """Of this process, kernel included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def fetched(path: Path, folder: Path) -> float:
    """Return bytes read in an epoch, as a part of those of the inner chunks that it touches."""
    loader = ours(path, folder, 1, 2.0)
    table = loader.plan.table(0)[:24, 1:]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    chunk = size / (SIDE // CHUNK) ** 3
    touched = {
        place
        for corner in table
        for place in itertools.product(*(range(c // CHUNK, (c + PATCH - 1) // CHUNK + 1)
                                         for c in corner))
    }  # fmt: skip
    before = loader.traffic()
    for _ in itertools.islice(loader, len(table) // 4):
        pass
    return (loader.traffic() - before).num_bytes / (len(touched) * chunk)


def with_latency(path: Path, folder: Path, count: int) -> float:
    """Return patches per second from a slow S3 server, as a part of those from a quick one."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with Bucket() as bucket:
        os.environ["AWS_ENDPOINT_URL"] = bucket.url
        bucket.upload(path.parent)
        stream = ours(f"s3://box/{path.name}", folder, 1, 0.0, threads=4).stream()
        rates: dict[float, list[float]] = {0.0: [], LATENCY_S: []}
        for _ in range(3):
            for latency, found in rates.items():
                bucket.latency_s = latency
                for _ in itertools.islice(stream, 4):  # what was read ahead before
                    pass
                start = time.perf_counter()
                for _ in itertools.islice(stream, count // 4):
                    pass
                found.append(count / (time.perf_counter() - start))
        return median(rates[LATENCY_S]) / median(rates[0.0])


if __name__ == "__main__":
    main()
