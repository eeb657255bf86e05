"""The loader: what it yields is decided by (seed, epoch) alone, and it cleans up after itself."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from loaders import Augment, Batch, PatchDataset, PatchLoader, Preprocess, Subject, VolumeStore
from loaders.patches import PatchGrid, UniformCorners

SHAPES = [(20, 17, 9), (8, 8, 8), (12, 30, 16), (5, 9, 40), (16, 16, 17)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> VolumeStore:
    """Volumes whose values encode volume and position."""
    root = tmp_path_factory.mktemp("volumes")
    subjects = []
    for n, shape in enumerate(SHAPES):
        np.save(root / f"v{n}.npy", np.arange(np.prod(shape), dtype=np.int16).reshape(shape) + n)
        labels = {"site": "x" if n < 4 else "y"}
        subjects.append(Subject(f"v{n}", (root / f"v{n}.npy",), None, labels))
    return VolumeStore.build(subjects, root / "cache", Preprocess(window_hu=(0, 6000)))


def loader(store, **options) -> PatchLoader:
    return PatchLoader(store, (8, 8, 8), **{"batch_size": 3, "threads": 0} | options)


def rows(batches) -> list[tuple[int, ...]]:
    """(index, volume, corner...) of every patch."""
    return [
        (i, v, *c)
        for batch in batches
        for i, v, c in zip(
            batch.index.tolist(), batch.volume.tolist(), batch.corner.tolist(), strict=True
        )
    ]


def test_patches_are_what_the_store_holds_at_their_corner(store):
    for batch in loader(store, patching="full"):
        assert batch.image.dtype == torch.float32 and batch.image.shape[1:] == (1, 8, 8, 8)
        for image, volume, corner in zip(batch.image, batch.volume, batch.corner, strict=True):
            x = store.read(int(volume))
            part = x[(slice(None), *(slice(c, c + 8) for c in corner.tolist()))]
            pads = [(0, 8 - n) for n in part.shape[1:]]
            assert np.array_equal(image.numpy(), np.pad(part, [(0, 0), *pads], "reflect"))


@pytest.mark.parametrize("threads", [0, 1, 2, 8])
@pytest.mark.parametrize("patching", ["full", "random_parts"])
def test_threads_do_not_change_the_plan_or_the_pictures(store, patching, threads):
    reference = list(loader(store, patching=patching))
    found = list(loader(store, patching=patching, threads=threads))
    assert rows(found) == rows(reference)
    assert all(torch.equal(a.image, b.image) for a, b in zip(found, reference, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("patching", ["full", "random_parts"])
def test_ranks_share_an_epoch_without_gap_or_repeat(store, patching, world_size):
    reference = rows(loader(store, patching=patching, batch_size=1))
    found = []
    for rank in range(world_size):
        one = loader(store, patching=patching, rank=rank, world_size=world_size)
        batches = list(one)
        assert len(batches) == len(one)
        found += rows(batches)
    assert Counter(found) == Counter(reference) and max(Counter(found).values()) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stream_has_full_batches_in_step_and_each_row_once_an_epoch(store, world_size):
    per_epoch = loader(store).plan.rows_per_epoch
    ranks = [
        list(islice(loader(store, rank=rank, world_size=world_size, threads=2).stream(), 40))
        for rank in range(world_size)
    ]
    assert all(len(batch.image) == 3 for batches in ranks for batch in batches)
    # Interleaved, the ranks give the sequence of one process.
    one = rows(islice(loader(store, batch_size=1).stream(), 40 * 3 * world_size))
    found = [row for step in zip(*map(rows, ranks), strict=True) for row in step]
    assert found == one
    assert Counter(row[0] for row in found[:per_epoch]) == {i: 1 for i in range(per_epoch)}


def test_accumulated_and_global_batches_hold_the_same_samples(store):
    big = rows(islice(loader(store, batch_size=4).stream(), 10))
    small = rows(islice(loader(store, batch_size=2).stream(), 20))
    assert big == small


def test_epochs_differ_and_come_back(store):
    one = loader(store)
    first, second = rows(one), rows(one)  # the next epoch without a call
    assert first != second
    one.set_epoch(0)
    assert rows(one) == first
    one.set_epoch(1)
    assert rows(one) == second and rows(loader(store, seed=1)) != first


def test_early_break_starts_the_same_epoch_again(store):
    one = loader(store, threads=2)
    reference = rows(loader(store))
    for _ in range(3):
        next(iter(one))
    assert rows(one) == reference


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("steps", [1, 7, 20, 33])
def test_resuming_gives_what_would_have_come(store, threads, steps):
    reference = rows(islice(loader(store).stream(), 60))
    one = loader(store, threads=threads)
    stream = one.stream()
    before = rows(islice(stream, steps))
    state = one.state_dict()
    stream.close()
    two = loader(store, threads=threads)
    two.load_state_dict(state)
    assert before + rows(islice(two.stream(), 60 - steps)) == reference


def test_resuming_on_another_number_of_ranks_goes_on_with_the_same_samples(store):
    one = loader(store, batch_size=6)
    before = rows(islice(one.stream(), 4))
    pair = [loader(store, rank=rank, world_size=2) for rank in range(2)]
    after = []
    for half in pair:
        half.load_state_dict(one.state_dict())
        after.append(rows(islice(half.stream(), 4)))
    after = [row for step in zip(*after, strict=True) for row in step]
    assert before + after == rows(islice(loader(store, batch_size=6).stream(), 8))


def test_resuming_inside_an_epoch_finishes_it(store):
    one = loader(store)
    whole = rows(one)
    two = loader(store)
    taken = rows(islice(iter(two), 5))
    three = loader(store)
    three.load_state_dict(two.state_dict())
    assert taken + rows(three) == whole


def test_state_of_other_data_is_told(store):
    state = loader(store).state_dict()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        loader(store, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="rows_per_epoch"):
        loader(store, patches_per_volume=3).load_state_dict(state)


def test_global_random_state_is_left_alone(store, tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    augment = Augment({"RandomNoise": {}})
    paths = [path for entry in store.entries for path in entry.subject.paths]
    VolumeStore.build(paths, tmp_path / "cache")
    for threads in (0, 2):
        one = loader(store, threads=threads, augment=augment)
        len(one), next(iter(one)), one.state_dict()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def test_augmentation_is_the_same_whatever_the_threads_and_fresh_each_epoch(store):
    options = {"augment": Augment({"RandomNoise": {"std": 0.1}})}
    plain = next(iter(loader(store)))
    batches = [list(loader(store, threads=threads, **options)) for threads in (0, 1, 2)]
    for other in batches[1:]:
        assert rows(other) == rows(batches[0])
        assert all(torch.equal(a.image, b.image) for a, b in zip(other, batches[0], strict=True))
    assert not torch.equal(batches[0][0].image, plain.image)
    # The same patch is altered in another way in the next epoch: nothing is frozen by a cache.
    whole = PatchLoader(store, patching=None, threads=0, **options)
    images = {}
    for epoch in range(2):
        whole.set_epoch(epoch)
        images[epoch] = {int(batch.volume[0]): batch.image for batch in whole}
    assert not torch.equal(images[0][0], images[1][0])


def test_whole_volumes_come_padded_to_the_largest_of_the_batch(store):
    batches = list(PatchLoader(store, patching=None, batch_size=1, threads=0))
    assert sorted(tuple(batch.image.shape[2:]) for batch in batches) == sorted(SHAPES)
    (batch,) = PatchLoader(store, patching=None, batch_size=5, threads=0)
    assert batch.image.shape == (5, 1, 20, 30, 40)
    for image, volume in zip(batch.image, batch.volume, strict=True):
        shape = SHAPES[volume]
        inner = image[(slice(None), *(slice(0, n) for n in shape))]
        assert np.array_equal(inner.numpy(), store.read(int(volume)))


@pytest.mark.parametrize("size", [(64, 64, 4), (1, 1, 1), (9, 8, 7), (40, 40, 40)])
def test_patches_of_any_shape(store, size):
    batch = next(iter(PatchLoader(store, size, batch_size=2, threads=0)))
    assert batch.image.shape == (2, 1, *size) and torch.isfinite(batch.image).all()


def test_volumes_one_below_equal_to_and_one_above_the_patch(tmp_path):
    for n in (7, 8, 9):
        np.save(tmp_path / f"v{n}.npy", np.arange(n**3, dtype=np.int16).reshape(n, n, n))
    paths = [tmp_path / f"v{n}.npy" for n in (7, 8, 9)]
    small = VolumeStore.build(paths, tmp_path / "cache", Preprocess(window_hu=(0, 1000)))
    counts = Counter(row[1] for row in rows(loader(small, patching="full")))
    assert counts == {0: 1, 1: 1, 2: 8}


def test_balanced_groups_hold_over_all_ranks(store):
    found = []
    for rank in range(2):
        one = loader(store, balance_by="site", rank=rank, world_size=2, batch_size=2)
        for batch in islice(one, len(one) - 1):
            found += batch.volume.tolist()
    sites = Counter(store.labels(v)["site"] for v in found)
    assert abs(sites["x"] - sites["y"]) <= 2
    with pytest.raises(ValueError, match="'age' for v0"):
        loader(store, balance_by="age")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_balanced_groups_are_exact_in_every_epoch_and_differ_between_epochs(store, world_size):
    epochs = []
    for epoch in range(2):
        found = []
        for rank in range(world_size):
            one = loader(store, balance_by="site", rank=rank, world_size=world_size)
            one.set_epoch(epoch)
            found += rows(one)
        sites = Counter(store.labels(row[1])["site"] for row in found)
        assert sites["x"] == sites["y"] == 4 * 8
        assert sorted(row[0] for row in found) == list(range(64))  # each row of the plan once
        epochs.append(sorted(found))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"world_size": 6}, "6 ranks but only 5 volumes"),
        ({"batch_size": 0}, "batch_size"),
        ({"patching": "half"}, "patching"),
        ({"patches_per_volume": 0}, "patches_per_volume"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options_are_told(store, options, word):
    with pytest.raises(ValueError, match=word):
        loader(store, **options)
    for size in [(8, 8), None, (8, 8, 0)]:
        with pytest.raises(ValueError, match="patch_size"):
            PatchLoader(store, size)


class Failing(VolumeStore):
    """Cannot read its last volume."""

    def __init__(self, store):
        super().__init__(store.entries, store.cache_dir, store.preprocess)

    def read_into(self, index, slices, out):
        if index == 4:
            raise OSError("the disk is gone")
        super().read_into(index, slices, out)


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_exceptions_in_threads_surface_at_the_consumer(store, threads):
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader(Failing(store), threads=threads))
    assert threading.active_count() == before


def test_no_thread_is_left_after_break_error_or_interrupt(store):
    before = threading.active_count()
    one = loader(store, threads=4)
    for _ in one:
        assert threading.active_count() > before
        break
    assert threading.active_count() == before
    for error in (KeyboardInterrupt, RuntimeError):
        try:
            for _ in one.stream():
                raise error
        except (KeyboardInterrupt, RuntimeError):
            pass
        assert threading.active_count() == before


def test_no_process_is_left_after_breaking_off_augmentation(store):
    import multiprocessing

    for batch in loader(store, threads=2, augment=Augment({"RandomNoise": {}})):
        assert batch.image.shape[1:] == (1, 8, 8, 8) and multiprocessing.active_children()
        break
    for _ in range(100):
        if not multiprocessing.active_children():
            break
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_ctrl_c_ends_a_loop_over_batches_at_once(store, tmp_path):
    import signal
    import subprocess
    import sys

    np.save(tmp_path / "v.npy", np.random.default_rng(0).integers(0, 99, (40,) * 3, np.int16))
    code = (
        "import signal, sys\nfrom loaders import PatchLoader, VolumeStore\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "store = VolumeStore.build([sys.argv[1]], sys.argv[2])\n"
        "for n, batch in enumerate(PatchLoader(store, (8, 8, 8), threads=4).stream()):\n"
        "    if n == 20: print('running', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "v.npy"), str(tmp_path / "cache")]
    for _ in range(3):  # Python itself now and then loses a lock of its own in this
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"running\n"
            process.send_signal(signal.SIGINT)
            try:
                _, errors = process.communicate(timeout=20)
            finally:
                process.kill()  # else the end of `with` would wait for it
        if b"cannot release un-acquired lock" not in errors:
            break
    assert process.returncode == -signal.SIGINT and errors.count(b"Traceback") == 1, errors


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [0, 2])
def test_pinned_batches_are_copied_to_the_gpu_in_the_background_and_arrive_whole(store, threads):
    """Copies queue behind work on the GPU while the loader goes on and takes up freed memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    plain = [batch.image for batch in islice(loader(store).stream(), 60)]
    arrived = []
    for number, batch in enumerate(islice(loader(store, threads=threads, pin=True).stream(), 60)):
        assert batch.image.is_pinned()
        if number % 10 == 0:
            torch.cuda._sleep(10**8)  # tens of milliseconds in which no copy can begin
        moved = batch.to("cuda")
        assert moved.image.is_cuda and moved.volume is batch.volume
        arrived.append(moved.image)
        del batch, moved
    torch.cuda.synchronize()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(plain, arrived, strict=True))


def test_a_batch_may_span_several_short_epochs(store):
    one = PatchLoader(store.subset(["v0", "v2"]), (8, 8, 8), patches_per_volume=1, threads=0)
    singly = rows(islice(one.stream(), 21))
    wide = PatchLoader(
        store.subset(["v0", "v2"]), (8, 8, 8), patches_per_volume=1, batch_size=7, threads=0
    )
    assert rows(islice(wide.stream(), 3)) == singly


def test_read_ahead_is_bounded(store):
    class Slow(VolumeStore):
        reads = 0

        def read_into(self, index, slices, out):
            Slow.reads += 1
            super().read_into(index, slices, out)

    slow = Slow(store.entries, store.cache_dir, store.preprocess)
    one = PatchLoader(slow, (5, 8, 8), patches_per_volume=100, batch_size=1, threads=2, prefetch=3)
    batches = iter(one)
    next(batches)
    time.sleep(0.3)
    assert Slow.reads <= 1 + 3 + 1  # yielded, read ahead, handed out
    batches.close()


def test_first_batch_is_quick(store):
    one = loader(store, threads=2)
    list(one)
    start = time.perf_counter()
    next(iter(one))
    assert (
        time.perf_counter() - start < 0.5
    )  # 0.05 s on a machine of our own: benchmarks/patches.py


def test_map_style_dataset_follows_the_same_plan(store):
    dataset = PatchDataset(store, (8, 8, 8), patches_per_volume=4)
    reference = list(loader(store, patches_per_volume=4))
    for workers in (0, 2):
        data = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=workers)
        batches = [Batch(**batch) for batch in data]
        assert rows(batches) == rows(reference)
        assert all(torch.equal(a.image, b.image) for a, b in zip(batches, reference, strict=True))
    dataset.set_epoch(1)
    assert dataset[3]["corner"].tolist() != reference[1].corner[0].tolist()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_iterating_a_dataset_ends(store):
    """A dataset that ignores its index runs for ever or past its end."""
    assert sum(1 for _ in PatchDataset(store, (8, 8, 8), patching="full")) == sum(
        len(PatchGrid(shape, (8, 8, 8))) for shape in SHAPES
    )


def test_custom_sampler_by_socket(store):
    class Origin(UniformCorners):
        def corners(self, store, volumes, patch_size, rng):
            return np.zeros((len(volumes), 3), int)

    for batch in loader(store, sampler=Origin):
        assert (batch.corner == 0).all()


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Anonymous memory stays below (prefetch + 2) batches and 50 MB, for 3000 volumes of 4 MB."""
    import subprocess
    import sys

    np.save(tmp_path / "v.npy", np.random.default_rng(0).integers(0, 99, (128,) * 3, np.int16))
    code = """
import dataclasses, itertools, re, sys, torch
from pathlib import Path
from loaders import PatchLoader, VolumeStore
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.set_num_threads(1)
store = VolumeStore.build([sys.argv[1]], sys.argv[2], threads=1)
before = anonymous()
(entry,) = store.entries
named = lambda n: dataclasses.replace(entry.subject, id=f"v{n}")
entries = [dataclasses.replace(entry, subject=named(n)) for n in range(3000)]
store = VolumeStore(entries, store.cache_dir, store.preprocess)
loader = PatchLoader(store, (64, 64, 64), batch_size=4, threads=2, prefetch=4)
print(max(anonymous() for batch in itertools.islice(loader, 100)) - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "v.npy"), str(tmp_path / "cache")]
    used = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert used < (4 + 2) * 4 + 50, f"{used:.0f} MB"


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_is_not_overwritten_while_anyone_looks_at_it(store, threads):
    """Memory of batches is used again once nobody refers to it, by whatever view."""
    looks = [
        lambda image: image,
        lambda image: image[1],
        lambda image: image.numpy()[0, 0],
        lambda image: image.detach().view(-1)[3:],
        lambda image: image.requires_grad_().square().sum(),  # kept by the graph
    ]
    for look in looks:
        kept, copies = [], []
        for number, batch in enumerate(islice(loader(store, threads=threads).stream(), 40)):
            if number % 7 == 0:
                copies.append(batch.image.clone())
                kept.append((look(batch.image), batch.image if look is looks[4] else None))
        del batch
        for copy, (view, image) in zip(copies, kept, strict=True):
            if image is not None:
                view.backward()
                assert torch.equal(image.grad, 2 * copy)
            else:
                assert np.array_equal(np.asarray(view), np.asarray(look(copy)))


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_nobody_keeps_share_a_few_places_in_memory(store, threads):
    patches = loader(store, threads=threads)
    stream = islice(patches.stream(), 40)
    assert len({batch.image.data_ptr() for batch in stream}) <= patches.prefetch + 2


def test_plan_survives_pickling_for_worker_processes(store):
    import pickle

    one = loader(store, augment=Augment({"RandomNoise": {}}), patching="full")
    again = pickle.loads(pickle.dumps(one.plan))
    assert torch.equal(again.batch(range(3)).image, one.plan.batch(range(3)).image)


def test_nothing_is_flipped_or_altered_unless_asked_for():
    from loaders import DataConfig

    options = DataConfig().loader_options(threads=0)
    assert options["augment"] is None and options["balance_by"] is None


KILLED = """
import multiprocessing, os, signal
from loaders import Augment, PatchLoader, VolumeStore

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    store = VolumeStore.build(["{folder}/a.npy"], "{folder}/cache", progress=False)
    augment = Augment({{"RandomFlip": {{"axes": [0]}}}})
    loader = PatchLoader(store, (4, 4, 4), patches_per_volume=9, augment=augment, threads=2)
    batches = iter(loader)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_processes_that_augment_end_with_a_parent_that_is_killed(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    (tmp_path / "script.py").write_text(KILLED.format(folder=tmp_path))
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "output.txt"  # not a pipe: who is left would hold it open
    with open(output, "w") as file:
        code = subprocess.run([sys.executable, tmp_path / "script.py"], stdout=file, env=environ)
    assert code.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in output.read_text().split()]
    assert len(workers) == 2
    until = time.monotonic() + 60
    while left := [pid for pid in workers if psutil.pid_exists(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)
