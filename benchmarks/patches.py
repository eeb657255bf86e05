"""Patches per CPU-second of every way to read patches from disk, as ratios, in one run.

    python benchmarks/patches.py                          # store build, 64^3 and 96^3, all peers
    python benchmarks/patches.py --quick                  # fewer volumes
    python benchmarks/patches.py --sizes 96 --only nnunet # one size, rows whose name holds a word

Peers come with `pip install -e '.[bench]'`; what is not installed is left out of the table. Volumes
are 256x256x192 int16 in a warm page cache; every reader returns float32 patches. All readers take
turns, round by round, and each one's median round counts, so that busy neighbors hit them alike.
CPU-seconds are of this process and its children, kernel included.

The copy limit is the faster of numpy's and torch's strided int16 -> float32 copy of random patches,
out of the same memory maps into the memory of two batches in turn: what a loader must do at least,
since the consumer looks at one batch while the next is read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from loaders import PatchLoader, Preprocess, VolumeStore
from loaders.readers import Volume, write_volume

SHAPE = (256, 256, 192)
QUEUE = 64  # patches in TorchIO's queue
EPOCH = 100  # patches of each volume in an epoch of ours, as of hundreds of volumes in training
LIMITS = ("copy, numpy", "copy, torch")
# Lowest acceptable ratio of ours to each peer, for 64^3 and 96^3 patches.
TARGETS = {
    "torchio queue": {64: 30, 96: 18},
    "monai persistent": {64: 9, 96: 9},
    "monai cache": {64: 5, 96: 8},
    "nnunet blosc2": {64: 5, 96: 7},
    "tensorstore": {64: 8},
    "zarr": {64: 20},
}
SLOW = ("monai persistent", "tensorstore", "zarr", "torchio queue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 volumes instead of 8")
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 96], help="edges of patches")
    parser.add_argument("--only", nargs="*", default=[""], help="words in the names of peers")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each reader")
    parser.add_argument("--no-build", action="store_true", help="leave the store's build out")
    parser.add_argument("--folder", help="where to keep the volumes; default a temporary folder")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        paths = make_volumes(folder, 4 if options.quick else 8)
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
              f"{len(paths)} volumes of {'x'.join(map(str, SHAPE))} int16")  # fmt: skip
        if not options.no_build:
            build_report(paths, folder, options.rounds)
        for size in options.sizes:
            patch_report(paths, folder, size, options)


def make_volumes(folder: Path, count: int) -> list[Path]:
    """Write smooth noisy volumes with an empty border, as compressible as a scan."""
    from scipy import ndimage

    paths = [folder / f"v{n}.nii.gz" for n in range(count)]
    for n, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.default_rng(n)
        field = ndimage.gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 2)
        data = field / field.std() * 300 + rng.normal(size=SHAPE).astype(np.float32) * 10 + 1000
        data[:50], data[:, :30] = 0, 0
        write_volume(path, Volume(data.clip(0, 4000).astype(np.int16)[None]))
    return paths


def cpu_seconds() -> float:
    """CPU time of this process and its finished children, user and kernel."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def rates(readers: dict[str, Iterator], counts: dict[str, int], rounds: int) -> dict[str, float]:
    """Patches per CPU-second of each reader: the median of its rounds after one that warms up.

    Each turn of a fast reader begins with as many patches that do not count: its neighbors have
    filled the processor's caches with data of their own.
    """
    found = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, patches in list(readers.items()):
            try:
                for _ in range(1 if name in SLOW else 2):
                    start, done = cpu_seconds(), 0
                    while done < counts[name]:
                        done += next(patches)
                    used = cpu_seconds() - start
            except ImportError as error:
                print(f"{name:<24} not installed ({error.name})")
                del readers[name], found[name]
                continue
            if number:
                found[name].append(done / used)
    return {name: float(np.median(values)) for name, values in found.items()}


def build_report(paths: list[Path], folder: Path, rounds: int) -> None:
    """Time to build the store against the time in which SimpleITK reads the same files."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    best = {"read": (np.inf, np.inf), "build": (np.inf, np.inf)}
    for number in range(rounds + 1):  # the first round pays for the imports
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            for name in best:
                start, clock = cpu_seconds(), time.perf_counter()
                if name == "read":
                    for path in paths:
                        sitk.GetArrayViewFromImage(sitk.ReadImage(str(path)))
                else:
                    VolumeStore.build(paths, cache, threads=1, progress=False)
                used = cpu_seconds() - start, time.perf_counter() - clock
                if number:
                    best[name] = tuple(map(min, used, best[name]))
            opened, first = first_batch(paths, cache)
    ratios = [b / r for b, r in zip(best["build"], best["read"], strict=True)]
    print(
        f"store build: {ratios[0]:.2f}x the CPU time and {ratios[1]:.2f}x the time in which "
        f"SimpleITK reads the files, one thread each (target at most 1.5x)\n"
        f"opened in {opened * 1e3:.0f} ms, first batch of an epoch after {first * 1e3:.0f} ms "
        f"(target below 50 ms)\n"
    )


def first_batch(paths: list[Path], cache: str) -> tuple[float, float]:
    """Seconds to open a store and its loader, and from the start of an epoch to its first batch."""
    start = time.perf_counter()
    store = VolumeStore.build(paths, cache, progress=False)
    loader = PatchLoader(store, (64, 64, 64), batch_size=4, threads=2)
    opened = time.perf_counter() - start
    list(loader)
    loader.set_epoch(1)
    start = time.perf_counter()
    next(iter(loader))
    return opened, time.perf_counter() - start


def patch_report(paths: list[Path], folder: Path, size: int, options) -> None:
    """Print the table of one patch size."""
    kept = ("ours", "our copy", *LIMITS)
    wanted = [n for n in READERS if n in kept or any(word in n for word in options.only)]
    turn = 200 if size <= 64 else 60
    counts = {name: turn // (5 if name in SLOW else 1) for name in wanted}
    counts["torchio queue"] = QUEUE  # a filling at a time
    readers = {name: READERS[name](paths, folder, size) for name in wanted}
    found = rates(readers, counts, options.rounds)
    print(f"{f'{size}^3 patches':<24}{'per CPU-s':>10}{'ours is':>10}   target")
    for name, rate in found.items():
        ratio, target = found["ours"] / rate, TARGETS.get(name, {}).get(size)
        print(f"{name:<24}{rate:>10.0f}{ratio:>9.2f}x   {verdict(ratio, target)}")
    limit = max(found[name] for name in LIMITS)
    for name, target in (("our copy", 0.9), ("ours", 0.85)):
        ratio = found[name] / limit
        print(f"{name} is {ratio:.2f}x of the copy limit   {verdict(ratio, target)}")
    if "ours, blosc2" in found and "nnunet blosc2" in found:
        ratio = found["ours, blosc2"] / found["nnunet blosc2"]
        print(f"our blosc2 is {ratio:.2f}x as fast as nnU-Net's   {verdict(ratio, 2)}")
        ours = sum(file.stat().st_size for file in blosc2_files(paths, folder))
        theirs = sum(file.stat().st_size for file in nnunet_files(paths, folder, size))
        print(f"and {ours / theirs:.2f}x its size (target at most 0.55x)")
    print()


def verdict(ratio: float, target: float | None) -> str:
    """Say whether a ratio reaches its target."""
    return "" if target is None else f"{target:g}x {'ok' if ratio >= target else 'MISSED'}"


def corners(size: int, count: int, seed: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Random (volume, x, y, z), the same for every reader."""
    rng = np.random.default_rng(seed)
    while True:
        yield (int(rng.integers(count)), *(int(rng.integers(n - size + 1)) for n in SHAPE))


# Readers: each an endless iterator over the number of patches it has just produced. ---------------


def ours(paths, folder, size, **options):
    """The whole loader in the caller's thread; intensities as they are, as the peers give them."""
    preprocess = options.pop("preprocess", Preprocess(intensity="raw", orient_ras=False))
    store = VolumeStore.build(paths, folder / "cache", preprocess, progress=False)
    loader = PatchLoader(
        store, (size,) * 3, patches_per_volume=EPOCH, batch_size=4, **{"threads": 0} | options
    )
    for batch in loader.stream():
        yield len(batch.image)


def ours_normalized(paths, folder, size):
    """Ours with percentile clip and scaling to [0, 1], which no peer does here."""
    yield from ours(paths, folder, size, preprocess=Preprocess(orient_ras=False))


def ours_two_threads(paths, folder, size):
    """Ours with two threads."""
    yield from ours(paths, folder, size, threads=2)


def maps_and_memory(paths, folder, size):
    """Memory maps of the store's volumes, the memory of two batches, and an endless supply of
    corners; they are drawn ahead, so that only copying is timed."""
    preprocess = Preprocess(intensity="raw", orient_ras=False)
    store = VolumeStore.build(paths, folder / "cache", preprocess, progress=False)
    out = np.empty((8, 1, size, size, size), np.float32)  # two batches of 4
    drawn = list(itertools.islice(corners(size, len(store)), 4096))
    return store, out, zip(itertools.cycle(range(len(out))), itertools.cycle(drawn), strict=False)


def copy_numpy(paths, folder, size):
    """The limit: a strided copy by numpy."""
    store, out, turns = maps_and_memory(paths, folder, size)
    arrays = [store.array(index)[0] for index in range(len(store))]
    for number, (v, x, y, z) in turns:
        np.copyto(out[number, 0], arrays[v][x : x + size, y : y + size, z : z + size])
        yield 1


def copy_torch(paths, folder, size):
    """The limit: a strided copy by torch."""
    store, out, turns = maps_and_memory(paths, folder, size)
    arrays = [torch.from_numpy(store.array(index)[0]) for index in range(len(store))]
    out = torch.from_numpy(out)
    for number, (v, x, y, z) in turns:
        out[number, 0].copy_(arrays[v][x : x + size, y : y + size, z : z + size])
        yield 1


def our_copy(paths, folder, size):
    """The store's read, without plan, batch and threads."""
    store, out, turns = maps_and_memory(paths, folder, size)
    for number, (v, *corner) in turns:
        store.read_into(v, tuple(slice(c, c + size) for c in corner), out[number])
        yield 1


def torchio_queue(paths, folder, size):
    """TorchIO's Queue, 16 patches a volume, in this process."""
    import torchio as tio

    dataset = tio.SubjectsDataset([tio.Subject(image=tio.ScalarImage(path)) for path in paths])
    queue = tio.Queue(dataset, QUEUE, 16, tio.UniformSampler(size), num_workers=0)
    loader = tio.SubjectsLoader(queue, batch_size=4, num_workers=0)
    while True:
        for batch in loader:
            yield len(batch["image"][tio.DATA].float())


def monai_transforms(size):
    """Load, and 16 random crops a volume."""
    from monai import transforms as mt

    return mt.Compose(
        [
            mt.LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float32),
            mt.RandSpatialCropSamples((size,) * 3, 16, random_size=False),
        ]
    )


def monai_persistent(paths, folder, size):
    """MONAI's PersistentDataset: the volume is unpickled for its 16 patches."""
    from monai.data import DataLoader, PersistentDataset

    dataset = PersistentDataset(
        [str(path) for path in paths], monai_transforms(size), folder / "monai"
    )
    while True:
        for batch in DataLoader(dataset, batch_size=1, shuffle=True):
            yield len(batch)


def monai_cache(paths, folder, size):
    """MONAI's CacheDataset: every volume in memory."""
    from monai.data import CacheDataset, DataLoader

    dataset = CacheDataset([str(path) for path in paths], monai_transforms(size), progress=False)
    while True:
        for batch in DataLoader(dataset, batch_size=1, shuffle=True):
            yield len(batch)


def nnunet_blosc2(paths, folder, size):
    """Float32 cases in blosc2 as nnU-Net v2 keeps them, read patch by patch."""
    import blosc2

    arrays = [blosc2.open(str(path), mmap_mode="r") for path in nnunet_files(paths, folder, size)]
    for v, x, y, z in corners(size, len(arrays)):
        np.asarray(arrays[v][:, x : x + size, y : y + size, z : z + size])
        yield 1


def nnunet_files(paths, folder, size) -> list[Path]:
    """Store float32 volumes with zstd 8, blocks of a L1 cache and chunks of a L3 cache."""
    import blosc2

    files = []
    for index, path in enumerate(paths):
        files.append(folder / f"nnunet{size}_{index}.b2nd")
        if not files[-1].exists():
            from loaders import read_volume

            data = read_volume(path).intensities()
            data = (data - data.mean()) / data.std()
            blocks, chunks = nnunet_blocks(data.shape[1:], size)
            blosc2.asarray(
                np.ascontiguousarray(data), chunks=(1, *chunks), blocks=(1, *blocks),
                urlpath=str(files[-1]),
                cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8},
            )  # fmt: skip
    return files


def nnunet_blocks(shape, size, l1=32768, l3=1441792):
    """Blocks shrink from the patch to 80 % of the L1 cache; chunks grow to 80 % of the L3 cache."""
    block = np.array([2 ** int(np.ceil(np.log2(size)))] * 3)
    while block.prod() * 4 > l1 * 0.8:
        block[int(np.argmax(block))] //= 2
    block = np.minimum(block, shape)
    chunk = block.copy()
    while chunk.prod() * 4 < l3 * 0.8:
        axis = int(np.argmin(chunk / size))
        if chunk[axis] >= shape[axis] or (chunk / size).min() > 1.5:
            break
        chunk[axis] = min(chunk[axis] + block[axis], shape[axis])
    return tuple(int(n) for n in block), tuple(int(n) for n in chunk)


def blosc2_store(paths, folder) -> VolumeStore:
    """Ours with the compressed backend."""
    import blosc2  # noqa: F401 - not installed: the row is left out

    preprocess = Preprocess(intensity="raw", orient_ras=False)
    return VolumeStore.build(paths, folder / "cache", preprocess, backend="blosc2", progress=False)


def blosc2_files(paths, folder) -> list[Path]:
    """Its files."""
    store = blosc2_store(paths, folder)
    return [store.cache_dir / entry.voxels.file for entry in store.entries]


def ours_blosc2(paths, folder, size):
    """Ours out of the compressed backend."""
    store = blosc2_store(paths, folder)
    loader = PatchLoader(store, (size,) * 3, patches_per_volume=EPOCH, batch_size=4, threads=0)
    for batch in loader.stream():
        yield len(batch.image)


def tensorstore_zarr(paths, folder, size):
    """Tensorstore on a zarr with 64^3 chunks, compressed with blosc."""
    import tensorstore as ts

    arrays = [
        ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}).result()
        for path in zarr_files(paths, folder)
    ]
    for v, x, y, z in corners(size, len(arrays)):
        arrays[v][x : x + size, y : y + size, z : z + size].read().result().astype(np.float32)
        yield 1


def zarr_python(paths, folder, size):
    """Zarr-python on the same files."""
    import zarr

    arrays = [zarr.open(str(path), mode="r") for path in zarr_files(paths, folder)]
    for v, x, y, z in corners(size, len(arrays)):
        arrays[v][x : x + size, y : y + size, z : z + size].astype(np.float32)
        yield 1


def zarr_files(paths, folder) -> list[Path]:
    """Store int16 volumes as zarr v2 with 64^3 chunks."""
    import zarr

    files = [folder / f"v{index}.zarr" for index in range(len(paths))]
    for path, file in zip(paths, files, strict=True):
        if not file.exists():
            from loaders import read_volume

            data = np.ascontiguousarray(read_volume(path).data[0])
            target = zarr.create_array(
                str(file), shape=data.shape, chunks=(64, 64, 64), dtype=data.dtype, zarr_format=2
            )
            target[...] = data
    return files


READERS = {
    "ours": ours,
    "our copy": our_copy,
    "copy, numpy": copy_numpy,
    "copy, torch": copy_torch,
    "ours, 2 threads": ours_two_threads,
    "ours, normalized": ours_normalized,
    "ours, blosc2": ours_blosc2,
    "nnunet blosc2": nnunet_blosc2,
    "monai cache": monai_cache,
    "monai persistent": monai_persistent,
    "tensorstore": tensorstore_zarr,
    "zarr": zarr_python,
    "torchio queue": torchio_queue,
}

if __name__ == "__main__":
    main()
