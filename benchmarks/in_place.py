"""Random patches out of one zarr store per CPU-second, ours beside others, in one run.

    python benchmarks/in_place.py                 # 512^3 uint16, chunks of 64^3 in shards of 256^3
    python benchmarks/in_place.py --rounds 9      # more turns of each
    python benchmarks/in_place.py --no-s3         # without the S3 servers on the loopback

Peers come with `pip install -e '.[bench]'`. All take turns, and each one's median round counts, so
that busy neighbors hit them alike. The page cache is warm; "tensorstore" is its own random read
without a cache of chunks, of a patch as it lies there (uint16; Z, Y, X), the others return batches
(4, 1, X, Y, Z) of float32. With a cache chunks of 0.1 GB are kept, of a volume of 0.27 GB.
CPU-seconds are of this process, kernel included. The S3 servers are processes of their own that
answer at once and after 20 ms; a patch asks twice, for the index of a shard and for chunks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch

from loaders import PatchLoader, Preprocess, VolumeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.stores import array

ROOT = Path(__file__).resolve().parents[1]
SIDE, CHUNK, SHARD, PATCH, BATCH = 512, 64, 256, 64, 4
LATENCY_S = 0.02
THREADS = 8  # that read from a server, each a batch at once
LONG = 5  # times as many patches, so that the few which are read ahead count little
UNIT = Preprocess(window_hu=(0, 4000))
CACHE_GB = 0.1  # of a volume of 0.27; the default is 1
PLAIN, LOOP = "tensorstore", "zarr-python, MONAI"
OURS = {"K = 1": (1, 0.0), "K = 1, cache": (1, CACHE_GB), "K = 8, cache": (8, CACHE_GB)}
WANTED = (("K = 1", PLAIN, 0.95), ("K = 8, cache", PLAIN, 4.0), ("K = 1", LOOP, 3.0),
          ("K = 1, cache", LOOP, 3.0), ("K = 8, cache", LOOP, 3.0))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader")
    parser.add_argument("--patches", type=int, default=64, help="of each turn; 64 are 8 reads of 8")
    parser.add_argument("--no-s3", action="store_true", help="leave the S3 server out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = made(Path(folder) / "a.zarr")
        rates = turns(readers(path, Path(folder)), options.rounds, options.patches)
        print(f"{'reader':24}{'patches/CPU-s':>14}")
        for name, rate in rates.items():
            print(f"{name:24}{rate:14.1f}")
        for name, peer, wanted in WANTED:
            print(f"{name}: {rates[name] / rates[peer]:.2f} of {peer}, wanted {wanted}")
        print(
            f"bytes fetched / inner chunks touched: {fetched(path, Path(folder)):.3f}, wanted 1.1"
        )
        if not options.no_s3:
            slow = with_latency(path, Path(folder), options.rounds, LONG * options.patches)
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
    return PatchLoader(store, (PATCH,) * 3, patches_per_volume=1024, batch_size=BATCH,
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
        patches = (
            scale(torch.from_numpy(theirs[box].astype(np.float32).T)[None]) for box in boxes(count)
        )
        while batch := list(itertools.islice(patches, BATCH)):
            torch.stack(batch)

    def of_ours(per_read: int, cache_gb: float) -> Callable[[int], None]:
        stream = ours(path, folder, per_read, cache_gb).stream()

        def read(count: int) -> None:
            for _ in itertools.islice(stream, count // BATCH):
                pass

        return read

    found = {PLAIN: tensorstore, LOOP: zarr_python}
    return found | {name: of_ours(*how) for name, how in OURS.items()}


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


def with_latency(path: Path, folder: Path, rounds: int, count: int) -> float:
    """Return patches per second from a slow S3 server, as a part of those from a quick one."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    bucket = folder / "s3" / "box"
    bucket.mkdir(parents=True)
    (bucket / path.name).symlink_to(path)
    rates: dict[float, list[float]] = {0.0: [], LATENCY_S: []}
    for latency, found in itertools.islice(itertools.cycle(rates.items()), 2 * rounds):
        with s3_server(bucket.parent, latency) as os.environ["AWS_ENDPOINT_URL"]:
            loader = ours(f"s3://box/{path.name}", folder, 1, 0.0, threads=THREADS)
            stream = loader.stream()
            for _ in itertools.islice(stream, 2 * THREADS + 1):  # those read ahead, and one
                pass
            start = time.perf_counter()
            for _ in itertools.islice(stream, count // BATCH):
                pass
            found.append(count / (time.perf_counter() - start))
            stream.close()
    for latency, found in rates.items():
        name = f"S3, {1000 * latency:g} ms"
        print(f"{name:24}{median(found):14.1f} patches/s")
    return median(rates[LATENCY_S]) / median(rates[0.0])


@contextmanager
def s3_server(folder: Path, latency_s: float) -> Iterator[str]:
    """Serve the buckets of a folder; yields the URL."""
    command = [sys.executable, "-m", "tests.stores", str(folder), str(latency_s)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as server:
        yield server.stdout.readline().strip()
        server.stdin.close()


if __name__ == "__main__":
    main()
