"""The ranks of a run and what they agree on.

One process or many: the same calls. Tensors travel over the device's own backend (nccl or gloo);
flags and Python objects over a second, gloo group on the CPU, so that agreeing on a signal never
makes a GPU wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from vae3d.kernels.precision import settle_float32
from vae3d.stop import Stopped, asked, listening

# Process groups stay to the end of the process: to free one is to wait for its threads, holding
# Python's lock, and they may be waiting for that lock to free the tensors of their last work.
_groups: list[dist.ProcessGroup] = []
ANSWER_S = 5.0  # a rank that the others wait for says so often that it is alive
STORE_S = 5.0  # to hear of a stop takes 0.2 s, or seconds where others use the processor
SHORT_NAP_S, LONG_NAP_S = 0.002, 0.1  # between two looks at what rank 0 does


@dataclass(frozen=True)
class Mesh:
    """Ranks in teams: each team has samples of its own, and each rank of it a slab of those.

    Ranks beside each other are of one team.

    Args:
        data: Teams.
        spatial: Ranks of a team.
    """

    data: int = 1
    spatial: int = 1

    @classmethod
    def of(cls, sharding: str, asked: Mesh | None, size: int) -> Mesh:
        """The mesh of so many ranks: the one that was asked for, else what `--sharding` says.

        Raises:
            ValueError: It is of another number of ranks, or its slabs are to go with fsdp.
        """
        mesh = asked or (cls(1, size) if sharding == "spatial" else cls(size, 1))
        if mesh.data * mesh.spatial != size:
            raise ValueError(
                f"--mesh {{data: {mesh.data}, spatial: {mesh.spatial}}} is of "
                f"{mesh.data * mesh.spatial} ranks, and there are {size}: start as many, or change "
                "--mesh"
            )
        if mesh.spatial > 1 and sharding == "fsdp":
            raise ValueError("--mesh cuts samples and --sharding fsdp weights: leave out one")
        return mesh


@dataclass
class World:
    """All ranks of this run, or a team of them, as one sees it. The default is one process."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    control: dist.ProcessGroup | None = None  # gloo, for flags and objects
    store: Any = None  # key-value store shared by all ranks, lives in torchrun's agent
    turns: int = 0  # how often rank 0 went first
    group: dist.ProcessGroup | None = None  # for tensors; None for that of all ranks

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def team(self, size: int) -> Self:
        """The ranks beside this one, `size` of them, as a world of their own. All must call it."""
        if size == self.size:
            return self
        if size == 1:
            return type(self)(device=self.device)
        group = control = dist.new_subgroups(size, self.group, self.store.timeout)[0]
        if self.control is not dist.group.WORLD:
            control = dist.new_subgroups(size, self.group, self.store.timeout, "gloo")[0]
        number, rank = divmod(self.rank, size)
        store = dist.PrefixStore(f"team{number}of{size}", self.store)
        return type(self)(rank, size, self.device, control, store, group=group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_int(self, value: int) -> int:
        """Largest `value` of all ranks. Costs no GPU synchronization."""
        if self.size == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control)
        return int(flag)

    def add(self, value: float) -> float:
        """Sum of a number over all ranks. Costs no GPU synchronization."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return float(total)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, any picklable object, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        first = 0 if self.control is None else dist.get_global_rank(self.control, 0)
        dist.broadcast_object_list(box, src=first, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of ranks, on all ranks."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 does the body before the others: it builds a cache, they find it built.

        That may take longer than a rank waits for one that does not answer; so rank 0 answers from
        a thread while it works.
        """
        key = self.next_turn()
        if self.size == 1:
            yield
        elif self.is_main:
            with self.answering(key):
                yield
            self.barrier()
        else:
            self.wait_for_main(key)
            self.barrier()
            yield

    def next_turn(self) -> str:
        """A name in the store for what rank 0 does next, the same on all ranks."""
        self.turns += 1
        return f"main_first/{self.turns}"

    @contextmanager
    def answering(self, key: str) -> Iterator[None]:
        """Count up in the store while the body runs; then say there how it ended."""
        over = threading.Event()

        def answer() -> None:
            while not over.wait(ANSWER_S):
                self.store.add(f"{key}/alive", 1)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except Stopped as stopped:
            outcome = str(stopped.code)
            raise
        finally:
            over.set()
            thread.join()
            self.store.set(key, outcome)
            if outcome != "done":
                self._keep_store([f"{key}/{rank}" for rank in range(1, self.size)])

    def wait_for_main(self, key: str, meanwhile: Callable[[], bool] = bool) -> None:
        """Wait for what rank 0 does, for as long as it answers.

        Args:
            key: Of this turn.
            meanwhile: Called again and again; whether there was something to do.
        """
        patience_s = self.store.timeout.total_seconds()
        heard, since, nap_s = -1, time.monotonic(), SHORT_NAP_S
        while not self.store.check([key]):
            if meanwhile():
                nap_s = SHORT_NAP_S
                continue
            count = self.store.add(f"{key}/alive", 0)
            if count != heard:
                heard, since = count, time.monotonic()
            elif time.monotonic() - since > patience_s:
                raise RuntimeError(f"rank 0 has not answered for {patience_s / 60:g} minutes")
            time.sleep(nap_s)
            nap_s = min(1.5 * nap_s, LONG_NAP_S)
        outcome = self.store.get(key).decode()
        self.store.set(f"{key}/{self.rank}", "heard")
        if outcome.isdigit():
            raise Stopped(int(outcome))
        if outcome != "done":
            raise ValueError("rank 0 could not do what the others wait for; it says why")

    @contextmanager
    def naming_the_missing(self, step: Callable[[], int]) -> Iterator[None]:
        """Turn a lost connection into an error that says which rank was lost, and when.

        Args:
            step: Tells the last step this rank has done.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not is_lost(error):
                raise
            names = ", ".join(map(str, self.missing(step())))
            if self.heard():  # it has stopped, as this rank does
                raise
            raise RuntimeError(
                f"rank {names or 'unknown'} no longer answers; rank {self.rank} had done step "
                f"{step()}. The same command continues from the last checkpoint"
            ) from error

    def missing(self, step: int, wait_s: float = 10.0) -> list[int]:
        """Ranks that no longer answer, found out after a collective call has failed.

        Every rank that is alive sees the failure and signs in here; who does not is named.
        """
        try:
            self.store.set(f"failed/{step}/{self.rank}", "here")
            until = time.monotonic() + wait_s
            absent = set(range(self.size))
            while absent and time.monotonic() < until and not self.heard():
                absent = {r for r in absent if not self.store.check([f"failed/{step}/{r}"])}
                time.sleep(0.1)
            return sorted(absent)
        except (RuntimeError, dist.DistError):  # the store's own host, rank 0, is gone
            return [0]

    def tell(self, code: int) -> None:
        """Say to the other ranks that this one was asked to stop, and with which exit code."""
        with suppress(RuntimeError):  # rank 0 has gone, and with it the store
            self.store.set("stop", str(code))
            self.store.set(f"stop/{self.rank}", "told")

    def heard(self) -> int:
        """The exit code that some rank was asked to stop with, 0 for none."""
        try:
            return int(self.store.get("stop")) if self.store.check(["stop"]) else 0
        except RuntimeError:  # rank 0 has gone, and with it the store
            return asked()

    def let_all_hear(self) -> None:
        """Wait for that."""
        if self.is_main:
            self._keep_store([f"stop/{rank}" for rank in range(self.size)])

    def _keep_store(self, keys: list[str]) -> None:
        """Stay until others have set `keys`: without torchrun rank 0 takes the store with it."""
        until = time.monotonic() + STORE_S
        with suppress(RuntimeError):  # torchrun has gone, and with it the store
            while time.monotonic() < until and not self.store.check(keys):
                time.sleep(0.05)


def is_lost(error: BaseException) -> bool:
    """Whether this is how torch tells that another rank does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextmanager
def open_world(
    device: str = "auto", timeout_minutes: float = 30.0, backend: str | None = None
) -> Iterator[World]:
    """Join the other ranks that `torchrun` started, or be alone; leave on exit.

    Args:
        device: auto | cpu | cuda | mps. `auto` takes CUDA where there is some.
        timeout_minutes: How long a rank waits for the others before it gives up [min].
        backend: nccl | gloo, what tensors travel by; None for nccl between GPUs. By gloo ranks may
            share a GPU, as tests on one do.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    where = _device(device, int(os.environ.get("LOCAL_RANK", 0)), shared=backend == "gloo")
    settle_float32()
    if size == 1:
        yield World(device=where)
        return
    if where.type == "mps":
        raise ValueError("--device mps is one GPU for one process: start it without torchrun")
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # After a restart the agent's store still holds the keys of the attempt that died, and gloo
    # would wait for its ranks.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set_timeout(timeout)
    world = World(rank, size, where, None, store)
    backend = backend or ("nccl" if where.type == "cuda" else "gloo")
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=where if backend == "nccl" else None,
    )
    with listening() as stop:
        try:
            world.control = dist.group.WORLD
            if backend != "gloo":
                world.control = dist.new_group(backend="gloo", timeout=timeout)
            with stop.heard_by(world):
                yield world
        except BaseException as error:
            code = stop.code or world.heard()
            _leave(world, wait=False)
            if code and is_lost(error):  # a rank that was asked to stop has gone before
                stop.share(code)
                raise Stopped(code) from error
            raise
        _leave(world, wait=not stop.code)


def _leave(world: World, wait: bool) -> None:
    """Leave the other ranks: to destroy a group is to wait for them, of which one may be lost."""
    if code := asked():
        world.tell(code)  # the thread that does so may not have had its turn
        world.let_all_hear()
    _groups.extend(dist.distributed_c10d._world.pg_map)
    if wait:
        dist.destroy_process_group()
        return
    with suppress(RuntimeError):  # gloo knows nothing to abort in some versions of torch
        dist.distributed_c10d._abort_process_group()


def _device(name: str, local_rank: int, shared: bool = False) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
        if shared:
            local_rank %= torch.cuda.device_count()
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; lower --nproc_per_node"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no MPS device here; use --device cpu")
    if name not in ("cpu", "mps"):
        raise ValueError(f"--device must be auto, cpu, cuda or mps, not {name!r}")
    return torch.device(name)
