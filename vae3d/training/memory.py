"""How much memory a training step takes, found by taking one; and the largest batch that fits."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from loaders import Batch
from vae3d.kernels.device import fastest_kernels
from vae3d.kernels.memory import pages, trim
from vae3d.kernels.precision import Amp, autocast
from vae3d.kernels.steps import SLAB_BYTES
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.spatial.network import SlabVAE
from vae3d.spatial.slabs import Layout, cut
from vae3d.training.slabs import SlabTask
from vae3d.training.task import Task

CPU_SHARE = 0.7  # of the free memory; the rest is for reading ahead and for other programs
GPU_SHARE = 0.92  # the rest is for libraries, other ranks' messages and pieces that fit nothing
SMALLER_PASSES = ("--mode exact", "--mode patch", "a smaller --patch_size")  # without gradients
ROWS = 32  # of slabs that are measured
LATE = 10**9  # a step at which every term of the loss has begun


@dataclass
class Trial:
    """Takes forward and backward passes with a copy of a task; weights and optimizer stay as is.

    What runs is what would train: compiled, recomputing and with a discriminator where it is. The
    copy and two tensors per weight stand for what training keeps besides the weights: average,
    gradients and Adam's moments.

    Args:
        task: What would be trained, on its device.
        sample_shape: One sample, `(C, X, Y, Z)` or `(C, X, Y)`.
        amp: off | bf16 | fp16.
        num_weights: Channels of the weights of voxels; 0 without masks.
        whole: Voxels per axis of the volume of which the sample is a slab; None where it is none.
        same_shapes: Whether all batches are of one shape; then a GPU's kernels are tried out, as in
            training, and their work space counts.
    """

    task: Task
    sample_shape: Sequence[int]
    amp: Amp = "off"
    num_weights: int = 0
    whole: tuple[int, ...] | None = field(default=None, kw_only=True)
    same_shapes: bool = field(default=True, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Where the task is."""
        return next(self.task.parameters()).device

    def peak_bytes(self, batch_size: int) -> int:
        """Return the highest memory that training with this batch would have in use [bytes].

        On CUDA all that torch reserves, in the second step: the first leaves pieces that do not
        fit the next. On the CPU what the process grows by.
        """
        if self.device.type == "mps":
            raise ValueError(
                "--device mps does not tell how much memory was in use at most; give --batch_size a"
                " number, or measure with --device cpu"
            )
        # Copying forgets what is compiled, and the compiler must forget the size of this batch: it
        # compiles for a few sizes only, and training's is to be one of them.
        compiled = [n for n, m in self.task.named_modules() if m._compiled_call_impl is not None]
        with ExitStack() as stack:
            if compiled:
                stack.callback(torch.compiler.reset)
            stack.enter_context(torch.random.fork_rng())
            peak = stack.enter_context(_Peak(self.device))
            task = copy.deepcopy(self.task)
            for name in compiled:
                task.get_submodule(name).compile()
            moments = [torch.zeros_like(p) for p in task.parameters() for _ in range(2)]
            for _ in range(2 if self.device.type == "cuda" else 1):
                with fastest_kernels(self.same_shapes):
                    self._step(task, batch_size)
                task.zero_grad(set_to_none=True)
            del moments
        return peak.bytes

    def _step(self, task: Task, n: int) -> None:
        """Take the passes of one step with a batch of `n` samples of noise."""
        device = next(task.parameters()).device
        corner = torch.zeros(n, len(self.sample_shape) - 1, dtype=torch.long)
        index = torch.arange(n)
        weight = None
        if self.num_weights:
            weight = torch.ones(n, self.num_weights, *self.sample_shape[1:], device=device)
        x = torch.rand(n, *self.sample_shape, device=device)
        batch = Batch(x, index, corner, index, weight, whole=self.whole)
        with autocast(self.device, self.amp):
            loss = task(batch, LATE)["loss"]
        loss.backward()
        if task.discriminator is not None and task.discriminator_active(LATE):
            with autocast(self.device, self.amp):
                terms = task.discriminator_loss(LATE, task.discriminator)
            terms["discriminator_loss"].backward()

    def largest_batch(self, memory_bytes: int | None = None, most: int = 64) -> int:
        """Return the largest batch size that trains within a memory budget.

        Args:
            memory_bytes: The budget; None for most of the free memory.
            most: Never more than this.

        Raises:
            ValueError: Not even one sample fits.
        """
        if self.device.type == "cuda":
            fits = self._search(memory_bytes or budget_bytes(self.device), most)
        else:  # no OOM error to catch here: extrapolate from two small batches
            two, one = self.peak_bytes(2), self.peak_bytes(1)
            each = max(two - one, 1)
            budget = memory_bytes or budget_bytes(self.device)
            fits = int((budget - one) // each) + 1 if one <= budget else 0
        if fits < 1:
            raise ValueError(
                f"not even one patch of {list(self.sample_shape[1:])} fits into memory; choose a "
                "smaller --patch_size or set --checkpointing block"
            )
        return min(fits, most)

    def _search(self, budget: float, most: int) -> int:
        """Double until a batch does not fit, then halve the interval down to an eighth."""
        fits, size = 0, 1
        while size <= most and self.fits(size, budget):
            fits, size = size, 2 * size
        while size - fits > max(fits // 8, 1):
            middle = (fits + size) // 2
            fits, size = (middle, size) if self.fits(middle, budget) else (fits, middle)
        return fits

    def fits(self, batch_size: int, budget: float) -> bool:
        """Return whether a batch trains within a memory budget [bytes]."""
        try:
            return self.peak_bytes(batch_size) <= budget
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()


class RankMemory(NamedTuple):
    """What a rank takes that trains on a slab of each volume, `--sharding spatial` [bytes].

    Args:
        fixed: Whatever its slab is: weights, what training keeps for each, slabs in the cache.
        per_voxel: For each voxel of the slab.
        per_face: For each voxel of a face between two slabs: the rows beside it.
        factor: Shrink of the network per axis.
        axis: The axis that is cut.
    """

    fixed: float
    per_voxel: float
    per_face: float
    factor: Sequence[int]
    axis: int = 0

    @classmethod
    def measured(
        cls,
        vae: CustomVAE,
        loss: VAELoss,
        device: torch.device,
        amp: Amp,
        batch_size: int,
        axis: int = 0,
    ) -> RankMemory:
        """Measure steps of two slabs between two other ranks, which are pretended.

        One has four times the rows of the other, since a peak is known to some percent; both are
        large enough for the steps of the CPU, which take no more memory from some size on. Rows
        that neighbors send are counted.
        """
        f, others = without(vae.factor, axis)
        rows = -(-ROWS // f) * f
        voxels = 2 * SLAB_BYTES * torch.get_num_threads() / 4 / len(next(vae.parameters()))
        side = (voxels / rows) ** (1 / len(others))
        plane = [math.ceil(max(side, ROWS) / n) * n for n in others]

        def shape(rows: int) -> tuple[int, ...]:
            return (*plane[:axis], rows, *plane[axis:])

        with pretended(rank=1, ranks=3):
            task = SlabTask(vae, loss, axis=axis).to(device)
            _, one, two = (  # the first time loads code
                Trial(task, (vae.in_channels, *shape(n)), amp, whole=shape(3 * n))
                .peak_bytes(batch_size)
                for n in (f, rows, 4 * rows)
            )  # fmt: skip
            layout = Layout(shape(3 * f), vae.factor, axis)
            x = torch.zeros(batch_size, vae.in_channels, *vae.factor)
            with torch.no_grad(), autocast(device, amp):
                slabs = SlabVAE(vae, layout)
                slabs.decode(slabs.encode(x.to(device)).mean)
        area, both_faces = math.prod(plane), layout.bytes_sent / math.prod(others)
        per_voxel = max(two - one, 0) / (3 * rows * area)
        fixed = max(one - (per_voxel * rows + both_faces) * area, 0)
        return cls(fixed, per_voxel, both_faces / 2, vae.factor, axis)

    def of(self, shape: Sequence[int], ranks: int) -> float:
        """Memory of the rank that takes most of volumes of this shape [bytes].

        Raises:
            ValueError: There are fewer cells of the network's factor than ranks.
        """
        filled = [-(-n // f) * f for n, f in zip(shape, self.factor, strict=True)]
        area = math.prod(without(filled, self.axis)[1])
        rows = max(hi - lo for lo, hi in cut(shape, self.factor, ranks, self.axis))
        faces = min(ranks - 1, 2)
        return self.fixed + (self.per_voxel * rows + self.per_face * faces) * area


def without(sizes: Sequence[int], axis: int) -> tuple[int, list[int]]:
    """The size along an axis, and those along the others."""
    return sizes[axis], [n for i, n in enumerate(sizes) if i != axis]


@contextmanager
def pretended(rank: int, ranks: int) -> Iterator[None]:
    """A process group of which this process alone is there; what others send is left to chance."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Peak:
    """Highest memory in use inside the `with` block, less what was in use before it on the CPU."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what other sizes of batch have left is not this one's
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        import psutil

        pages.forget()  # what earlier steps left would hide, or add to, what this one takes
        trim()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_reserved(self.device)
            return
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)
            if self._done.wait(0.002):
                return


@contextmanager
def telling_of_device(*options: str) -> Iterator[None]:
    """Turn what a device lacks, memory or an operation, into one line that names what helps.

    Args:
        *options: Those that lower the memory that is needed.
    """
    try:
        yield
    except (NotImplementedError, TypeError) as error:  # of MPS, which does not have all of torch
        told = re.search(
            r"operator '(?:aten::)?(\w+).* for the MPS|MPS Tensor to (\w+)", str(error)
        )
        if told is None:
            raise
        raise ValueError(
            f"--device mps does not have {told[1] or told[2]}, which this asks for; use --device"
            " cpu, or for an operation the environment variable PYTORCH_ENABLE_MPS_FALLBACK=1,"
            " which does it on the CPU"
        ) from error
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:2])
        raise ValueError(
            f"{said}; what helps: {', '.join(options)}, or the environment variable "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which joins freed pieces"
        ) from error
    except RuntimeError as error:  # that of the CPU has no type of its own
        told = re.search(r"DefaultCPUAllocator: (.+? bytes)", str(error))
        if told is None:
            raise
        raise ValueError(f"{told[1]} of memory; what helps: {', '.join(options)}") from error


def budget_bytes(device: torch.device) -> float:
    """Memory that training may use: most of what is free, on a GPU with our own [bytes]."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return GPU_SHARE * (free + torch.cuda.memory_reserved(device))
    import psutil

    return psutil.virtual_memory().available * CPU_SHARE
