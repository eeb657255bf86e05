"""Patches in memory: threads copy the rows of the plan out of the store's memory maps.

Images are (B, C, X, Y, Z) float32 in 3D and (B, C, X, Y) in 2D.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from loaders.guard import require_guard
from loaders.patches import Chunked, Sampler, Store, UniformCorners, Weighted, plan_epoch
from loaders.readers import BrokenVolume, Traffic, traffic

Patching = Literal["full", "random_parts"] | None
Jobs = Iterator[tuple[int, range]]  # (where the next job begins, samples to read)
STAND_INS = 16  # patches that are tried in the place of one that cannot be read
MOST_AT_ONCE = 32  # patches that are fetched at once from where their volumes lie


@dataclass
class Batch:
    """Patches and where they come from.

    Args:
        image: (B, C, *patch) float32, normalized.
        volume: Index of each patch's volume in the store, (B,).
        corner: Lowest corner of each patch in voxels, (B, dims).
        index: Row of each patch in the plan of its epoch, (B,).
        weight: How much each voxel counts, (B, 1 or C, *patch) float32; None without a mask.
        mean_weight: Mean of the weights that the loss is to divide by, where that is of more than
            this batch: of all that go into one update.
        unread: Why patches of the plan could not be read; the next ones that could stand in their
            place.
        whole: Voxels per axis of the whole patches, of which `image` may be a part.
    """

    image: torch.Tensor
    volume: torch.Tensor
    corner: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor | None = None
    mean_weight: float | None = None
    unread: tuple[str, ...] = ()
    whole: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its voxels on a device; copied in the background where pinned."""
        weight = self.weight
        if weight is not None:
            weight = weight.to(device, non_blocking=True)
        return replace(self, image=self.image.to(device, non_blocking=True), weight=weight)


class PatchPlan:
    """The endless, seeded sequence of patches of a store, and how to read one.

    Shared by `PatchLoader` and `PatchDataset`; see `PatchLoader` for the arguments.
    """

    def __init__(
        self,
        store: Store,
        patch_size: Sequence[int] | None = None,
        patching: Patching = "random_parts",
        patches_per_volume: int = 8,
        seed: int = 0,
        sampler: Callable[[], Sampler] = UniformCorners,
        balance_by: str | None = None,
        augment: Callable[..., torch.Tensor] | None = None,
        patches_per_read: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        part: Callable[[Sequence[int]], Sequence[slice]] | None = None,
    ):
        dims = store.spatial_shapes.shape[1]
        if patching not in ("full", "random_parts", None):
            raise ValueError(f"patching is {patching!r}: use full, random_parts or null")
        self.patch_size: tuple[int, ...] | None = None
        if patching is not None:
            if patch_size is None or len(patch_size) != dims or min(patch_size) < 1:
                raise ValueError(f"patch_size is {patch_size}: give {dims} sizes of at least 1")
            if patches_per_volume < 1:
                raise ValueError(f"patches_per_volume is {patches_per_volume}: use 1 or more")
            self.patch_size = tuple(int(p) for p in patch_size)
        if patches_per_read > 1 and (
            patching != "random_parts" or patches_per_volume % patches_per_read
        ):
            raise ValueError(
                f"data.patches_per_read is {patches_per_read}: it is for patching random_parts, "
                f"and patches_per_volume ({patches_per_volume}) has to be a multiple of it"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}: use 0 or more")
        self.store, self.patching, self.seed = store, patching, seed
        self.weights = store if isinstance(store, Weighted) and store.num_weights else None
        self.patches_per_volume, self.patches_per_read = patches_per_volume, patches_per_read
        self.sampler, self.augment, self.on_error = sampler(), augment, on_error
        self.part = part
        if part and (augment is not None or on_error == "skip"):
            raise ValueError("parts of patches go without data.augment and data.on_error skip")
        self.groups = None
        if balance_by is not None:
            lacking = [store.ids[i] for i in range(len(store)) if balance_by not in store.labels(i)]
            if lacking:
                raise ValueError(f"balance_by: the manifest has no {balance_by!r} for {lacking[0]}")
            self.groups = [store.labels(i)[balance_by] for i in range(len(store))]
        self._tables: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.rows_per_epoch = len(self.table(0))

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_tables": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def table(self, epoch: int) -> np.ndarray:
        """Return the plan of an epoch, rows (volume, corner...); the last two are kept."""
        with self._lock:
            if epoch not in self._tables:
                while len(self._tables) > 1:
                    del self._tables[min(self._tables)]
                self._tables[epoch] = plan_epoch(
                    self.store,
                    self.patch_size,
                    self.patching,
                    self.patches_per_volume,
                    np.random.default_rng([self.seed, epoch]),
                    self.sampler,
                    self.groups,
                    self.patches_per_read,
                )
            return self._tables[epoch]

    def rows(self, samples: Sequence[int]) -> np.ndarray:
        """Return (epoch, row, volume, corner...) of samples of the endless sequence, int64."""
        found = np.empty((len(samples), 3 + self.store.spatial_shapes.shape[1]), np.int64)
        done = 0
        while done < len(samples):  # epoch by epoch; nearly always there is one
            epoch, first = divmod(samples[done], self.rows_per_epoch)
            start = samples[done] - first
            rows = [n - start for n in samples[done:] if n - start < self.rows_per_epoch]
            part = found[done : done + len(rows)]
            part[:, 0], part[:, 1], part[:, 2:] = epoch, rows, self.table(epoch)[rows]
            done += len(rows)
        return found

    def image_shape(self, samples: Sequence[int]) -> tuple[int, ...]:
        """Shape (B, C, *patch) of a batch, or of a part of it; see `whole_shape`."""
        shape = self.whole_shape(samples)
        if self.part is not None:
            shape = tuple(axis.stop - axis.start for axis in self.part(shape))
        return (len(samples), self.store.num_channels, *shape)

    def whole_shape(self, samples: Sequence[int]) -> tuple[int, ...]:
        """Voxels of a patch; whole volumes are padded to the largest of the batch."""
        if self.patch_size is not None:
            return self.patch_size
        return tuple(self.store.spatial_shapes[self.rows(samples)[:, 2]].max(axis=0).tolist())

    def batch(
        self,
        samples: Sequence[int],
        image: torch.Tensor | None = None,
        pool: Executor | None = None,
    ) -> Batch:
        """Read patches by their place in the endless sequence.

        Args:
            samples: Their places.
            image: Where they go; None for new memory.
            pool: What reads them all at once, for requests to overlap; None reads one by one.
        """
        rows = self.rows(samples)
        image = torch.empty(self.image_shape(samples)) if image is None else image
        weight = self.empty_weights(image)
        whole = self.whole_shape(samples)
        read = partial(self.read, whole=whole)
        weights = itertools.repeat(None) if weight is None else weight.numpy()
        found = list((pool.map if pool else map)(read, rows, image.numpy(), weights))
        rows = np.array([row for row, _ in found]).reshape(rows.shape)
        unread = tuple(line for _, lines in found for line in lines)
        for number in range(len(rows)):
            epoch, row, volume, *_ = rows[number].tolist()
            if self.augment is not None:
                key, spacing_mm = (self.seed, epoch, row), self.store.spacing_mm(volume)
                if weight is None:
                    image[number] = self.augment(image[number], key, spacing_mm)
                else:
                    pair = self.augment(image[number], key, spacing_mm, weight[number])
                    image[number], weight[number] = pair
        index, volume, corner = (
            torch.from_numpy(part) for part in (rows[:, 1], rows[:, 2], rows[:, 3:])
        )
        return Batch(image, volume, corner, index, weight, None, unread, whole)

    def read(
        self, row: np.ndarray, out: np.ndarray, weights: np.ndarray | None, whole: Sequence[int]
    ) -> tuple[np.ndarray, list[str]]:
        """Fill `out` (C, *patch) by a row of the plan, or by the next that can be read.

        Args:
            row: (epoch, row, volume, corner...).
            out: Where voxels go.
            weights: Where goes how much they count; None where all count alike.
            whole: Voxels of a patch, of which `out` may be a part.

        Returns:
            The row that was read, and why those before it could not be, with `on_error` at skip.
        """
        epoch, first, faults = int(row[0]), int(row[1]), []
        part = self.part(whole) if self.part else [slice(0, n) for n in whole]
        tries = STAND_INS if self.on_error == "skip" and self.patch_size is not None else 0
        for number in range(first, first + 1 + tries):
            number %= self.rows_per_epoch
            volume, *corner = self.table(epoch)[number].tolist()
            try:
                read_part(self.store, volume, corner, whole, part, out)
                if weights is not None and self.weights is not None:
                    low = [at + axis.start for at, axis in zip(corner, part, strict=True)]
                    read_weights(self.weights, volume, low, weights)
            except BrokenVolume as error:
                faults.append(error)
                continue
            return np.array([epoch, number, volume, *corner]), [*map(str, faults)]
        raise faults[0]

    def empty_weights(self, image: torch.Tensor) -> torch.Tensor | None:
        """Memory for how much the voxels of a batch count; None where all count alike."""
        if self.weights is None:
            return None
        shape = (len(image), self.weights.num_weights, *image.shape[2:])
        return torch.empty(shape, pin_memory=image.is_pinned())


def references(arrays: list[np.ndarray]) -> list[int]:
    """Count who refers to each array; only to be compared with another count from here.

    What the interpreter itself holds differs between versions of Python.
    """
    return [sys.getrefcount(array) for array in arrays]


def read_patch(store: Store, volume: int, corner: Sequence[int], out: np.ndarray) -> None:
    """Fill `out` (C, *patch); what lies beyond the volume's high end is reflected into it."""
    slices, inside = [], True
    for low, size, n in zip(corner, out.shape[1:], store.shape(volume)[1:], strict=True):
        slices.append(slice(low, low + size))
        inside &= low + size <= n
    if inside:
        store.read_into(volume, slices, out)
        return
    part = store.read(volume, slices)  # a slice ends where its axis does
    pads = [(0, p - n) for p, n in zip(out.shape, part.shape, strict=True)]
    out[...] = np.pad(part, pads, "reflect")


def read_part(
    store: Store,
    volume: int,
    corner: Sequence[int],
    patch: Sequence[int],
    part: Sequence[slice],
    out: np.ndarray,
) -> None:
    """Fill `out` (C, *part) with a part of a patch, of which no more is read where it fits."""
    axes = zip(corner, patch, part, store.shape(volume)[1:], strict=True)
    if all(low + p <= n or axis == slice(0, p) for low, p, axis, n in axes):
        first = [low + axis.start for low, axis in zip(corner, part, strict=True)]
        read_patch(store, volume, first, out)
    else:  # what is reflected into the patch may lie in another part
        whole = np.empty((len(out), *patch), out.dtype)
        read_patch(store, volume, corner, whole)
        out[...] = whole[(slice(None), *part)]


def read_weights(store: Weighted, volume: int, corner: Sequence[int], out: np.ndarray) -> None:
    """Fill `out` (1 or C, *patch) with how much voxels count; what lies beyond the volume is 0."""
    sizes = zip(corner, out.shape[1:], store.shape(volume)[1:], strict=True)
    slices = [slice(min(low, n), min(low + size, n)) for low, size, n in sizes]
    inside = out[(slice(None), *(slice(s.stop - s.start) for s in slices))]
    if inside.shape != out.shape:
        out.fill(0)
    if inside.size:
        store.read_weights_into(volume, slices, inside)


class PatchLoader:
    """Batches of patches, in an order that depends on (seed, epoch) alone.

    `for batch in loader` is one epoch of this rank: over all ranks each row of the plan comes
    exactly once, so ranks may differ by a batch. `loader.stream()` has no end and no seam: every
    batch is full and all ranks stay in step, as gradient all-reduce needs it. Both begin where
    `set_epoch` or `load_state_dict` says.

    Args:
        store: The volumes, a `VolumeStore` or `SliceStore`.
        patch_size: Spatial shape of a patch in voxels; None with patching=None.
        patching: full (every patch of every volume), random_parts, or None for whole volumes.
        patches_per_volume: Patches of each volume and epoch with random_parts.
        batch_size: Patches in a batch of one rank.
        seed: Decides the plan of every epoch.
        rank: Which process this is.
        world_size: Number of processes.
        threads: Threads that read ahead; 0 reads in the caller.
        pin: Pinned memory, for copies to CUDA in the background.
        augment: Called with a patch (C, *patch), the key (seed, epoch, row) and the voxel size; see
            `Augment`. Then `threads` are processes, and a script needs its
            `if __name__ == "__main__":` where these are spawned (macOS, Windows, Python 3.14). With
            masks it gets the weights as well, and returns both.
        balance_by: Manifest column whose groups are equally frequent in an epoch.
        sampler: Chooses the corners with random_parts.
        prefetch: Batches that are read ahead; None for two a thread.
        patches_per_read: Patches that lie in the chunks which one of them touches, so that these
            are read once; see `loaders.patches.gathered`.
        on_error: A patch that cannot be read where it lies ends the run (raise), or the next of the
            plan stands in its place and it is counted (skip).
        part: `part(shape)` -> a slice per axis: which part of a patch of that shape this loader
            reads; None for all. Loaders of the same rank then share their patches.

    Attributes:
        unread: Patches of this rank that could not be read.

    Example:
        >>> loader = PatchLoader(store, (64, 64, 64), patches_per_volume=8, batch_size=4)
        >>> for batch in loader:
        ...     batch.image                                    # (4, C, 64, 64, 64)
    """

    def __init__(
        self,
        store: Store,
        patch_size: Sequence[int] | None = None,
        patching: Patching = "random_parts",
        patches_per_volume: int = 8,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        pin: bool = False,
        augment: Callable[..., torch.Tensor] | None = None,
        balance_by: str | None = None,
        sampler: Callable[[], Sampler] = UniformCorners,
        prefetch: int | None = None,
        patches_per_read: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        part: Callable[[Sequence[int]], Sequence[slice]] | None = None,
    ):
        if len(store) < world_size:
            raise ValueError(
                f"{world_size} ranks but only {len(store)} volumes to train on: start fewer, or "
                "leave more of them to training (--data.fractions)"
            )
        if threads < 0:
            raise ValueError(f"threads is {threads}: use 0 or more")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: use 1 or more")
        assert 0 <= rank < world_size, (rank, world_size)
        self.in_place = isinstance(store, Chunked) and any(map(store.chunks, range(len(store))))
        if augment is not None and threads:
            require_guard("spawn" if self.in_place else None)
        self.plan = PatchPlan(
            store, patch_size, patching, patches_per_volume, seed, sampler, balance_by, augment,
            patches_per_read, on_error, part,
        )  # fmt: skip
        self.unread, self._told = 0, set[str]()
        self._elsewhere = Traffic()  # of processes that augment
        self.store, self.batch_size = store, batch_size
        self.rank, self.world_size = rank, world_size
        self.threads, self.pin = threads, pin and torch.cuda.is_available()
        self.prefetch = prefetch if prefetch is not None else 2 * threads
        self.samples = 0  # of all ranks together, since the start of epoch 0
        self._begin = 0  # where the next iteration starts
        self._slots: list[np.ndarray] = []
        self._idle: list[int] = []  # reference counts of slots that no tensor looks at

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        rows = len(range(self.rank, self.plan.rows_per_epoch, self.world_size))
        return -(-rows // self.batch_size)

    @property
    def epoch(self) -> int:
        """Epoch of the next iteration."""
        return self._begin // self.plan.rows_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin with this epoch."""
        self._begin = self.samples = epoch * self.plan.rows_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return where the consumer is; what was read ahead does not count."""
        plan = self.plan
        return {"samples": self.samples, "seed": plan.seed, "rows_per_epoch": plan.rows_per_epoch}

    def changes_since(self, state: dict[str, int]) -> list[str]:
        """Return in what the order of the data is another than where `state_dict` was taken."""
        mine = self.state_dict()
        return [
            f"{name} was {state[name]}, is {mine[name]}"
            for name in ("seed", "rows_per_epoch")
            if state[name] != mine[name]
        ]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was taken, on any number of ranks."""
        if changes := self.changes_since(state):
            raise ValueError(
                f"the checkpoint's order of the data is another ({', '.join(changes)}): resume with"
                f" the same data, patching and seed, or begin the order anew by --force"
            )
        self._begin = self.samples = int(state["samples"])

    def __iter__(self) -> Iterator[Batch]:
        first = self._begin
        rows = self.plan.rows_per_epoch
        last = (first // rows + 1) * rows
        # After a break the epoch starts again; after its end the next one does.
        self._begin = first - first % rows
        yield from self._run(first, last)
        self._begin = self.samples = last

    def stream(self) -> Iterator[Batch]:
        """Iterate without end: full batches, epoch after epoch, all ranks in step."""
        yield from self._run(self._begin, None)

    def _run(self, first: int, last: int | None) -> Iterator[Batch]:
        """Yield the batches of this rank among the samples [first, last), read ahead by threads."""
        step = self.batch_size * self.world_size
        starts = itertools.count(first, step) if last is None else range(first, last, step)
        jobs = (
            (min(start + step, last or start + step), samples)
            for start in starts
            if (samples := range(start, min(start + step, last or start + step))[
                self.rank :: self.world_size])
        )  # fmt: skip
        self.samples = first
        if self.threads == 0:
            batches = ((after, self.read(samples)) for after, samples in jobs)
        elif self.plan.augment is not None:
            batches = self._from_processes(jobs)
        else:
            batches = self._from_threads(jobs)
        with closing(batches):
            for after, batch in batches:
                self.samples = after
                self._tell(batch.unread)
                yield batch

    def traffic(self) -> Traffic:
        """What this rank has read, so far, of volumes that stay where they are."""
        return traffic() + self._elsewhere

    def _tell(self, unread: Sequence[str]) -> None:
        """Count patches that could not be read, and tell each reason once."""
        self.unread += len(unread)
        for line in unread:
            if line not in self._told:
                self._told.add(line)
                print(f"{line}; other patches stand in (data.on_error skip)", file=sys.stderr)

    def read(self, samples: range) -> Batch:
        """Read the patches of these samples now."""
        return self.plan.batch(samples, self._buffer(samples))

    def _buffer(self, samples: range) -> torch.Tensor:
        """Return memory for a batch: pinned, or a slot of the arena that nobody looks at, or new.

        Fresh memory costs as much as the copy, a page fault each 4 KB; the arena is one block, so
        that the system can back it with huge pages. A slot is referred to by the storage of the
        tensor over it, so its reference count tells whether any tensor still looks at it.
        """
        if self.pin:
            return torch.empty(self.plan.image_shape(samples), pin_memory=True)
        if self.plan.patch_size is not None and not self._slots:
            size = (self.prefetch + 2, self.batch_size, *self.plan.image_shape(samples)[1:])
            self._slots = list(np.empty(size, np.float32))
            self._idle = references(self._slots)
        counts = references(self._slots)
        for slot, count, idle in zip(self._slots, counts, self._idle, strict=True):
            if count == idle:
                image = torch.from_numpy(slot)
                return image if len(samples) == self.batch_size else image[: len(samples)]
        return torch.empty(self.plan.image_shape(samples))

    def _from_threads(self, jobs: Jobs) -> Generator[tuple[int, Batch], None, None]:
        """Read batches ahead in threads; none is left when the iterator is closed.

        Of volumes that stay where they are all patches of a batch are fetched at once: their
        threads wait for a disk or a network.
        """
        pool, each = ThreadPoolExecutor(self.threads, "patches"), None
        if self.in_place and self.batch_size > 1:
            most = min(self.threads * self.batch_size, MOST_AT_ONCE)
            each = ThreadPoolExecutor(most, "fetches")
        read = partial(self.plan.batch, pool=each)
        try:
            ahead = deque(
                (after, pool.submit(read, samples, self._buffer(samples)))
                for after, samples in itertools.islice(jobs, max(1, self.prefetch))
            )
            while ahead:
                after, future = ahead.popleft()
                batch = future.result()  # an exception of the thread is raised here
                for later, samples in itertools.islice(jobs, 1):
                    buffer = self._buffer(samples)
                    ahead.append((later, pool.submit(read, samples, buffer)))
                    del buffer
                yield after, batch
                del batch, future  # the consumer's to keep or free
        finally:
            for one in (pool, each) if each else (pool,):
                one.shutdown(wait=True, cancel_futures=True)

    def _from_processes(self, jobs: Jobs) -> Generator[tuple[int, Batch], None, None]:
        """Read and augment batches ahead in processes, where global random state is their own."""
        jobs, order = itertools.tee(jobs)
        loader = torch.utils.data.DataLoader(
            _Batches(self.plan),
            batch_size=None,
            sampler=(samples for _, samples in jobs),
            num_workers=self.threads,
            prefetch_factor=max(1, self.prefetch // self.threads),
            generator=torch.Generator().manual_seed(self.plan.seed),  # leaves the global one alone
            worker_init_fn=serve_the_parent,
            # Threads that read stores do not survive a fork.
            multiprocessing_context="spawn" if self.in_place else None,
        )
        for (after, _), (batch, read) in zip(order, loader, strict=False):
            self._elsewhere += read
            if isinstance(batch, BrokenVolume):
                raise batch
            if self.pin:
                batch.image = batch.image.pin_memory()
                if batch.weight is not None:
                    batch.weight = batch.weight.pin_memory()
            yield after, batch


def serve_the_parent(_worker: int) -> None:
    """Outlast what asks a whole group of processes to stop, since the parent's step needs its
    batches, but not the parent."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """End when the parent is killed. torch looks at its id, which stays where a server forks."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


class _Batches(torch.utils.data.Dataset[tuple[Batch | BrokenVolume, Traffic]]):
    """Whole batches by their samples, for worker processes, and what was read for them.

    What is broken is handed over too: torch would make another error of it, of many lines.
    """

    def __init__(self, plan: PatchPlan):
        self.plan = plan

    def __getitem__(self, samples: range) -> tuple[Batch | BrokenVolume, Traffic]:
        before = traffic()
        try:
            batch: Batch | BrokenVolume = self.plan.batch(samples)
        except BrokenVolume as error:
            batch = error
        return batch, traffic() - before


class PatchDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The same plan as a map-style dataset, for `torch.utils.data.DataLoader`.

    Item i is row i of the epoch's plan, already shuffled: leave the DataLoader's shuffle off. Call
    `set_epoch` before each epoch, and leave persistent_workers off so that workers learn of it.

    Args:
        store: The volumes.
        patch_size: Spatial shape of a patch in voxels.
        **options: As `PatchPlan`: patching, patches_per_volume, seed, sampler, balance_by, augment.
    """

    def __init__(self, store: Store, patch_size: Sequence[int] | None = None, **options: Any):
        self.plan = PatchPlan(store, patch_size, **options)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the plan of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.rows_per_epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return image (C, *patch), volume, corner and index of a row, and weight with a mask."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self.plan.batch([self.epoch * len(self) + index])
        names = ("image", "volume", "corner", "index")
        item = {name: getattr(batch, name)[0] for name in names}
        return item if batch.weight is None else item | {"weight": batch.weight[0]}
