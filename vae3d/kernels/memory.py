"""Memory of large tensors, in pages of their own.

Large tensors that come and go in turn with small ones leave holes in the heap, which a process
keeps; pages of their own go back to the system, or to the next tensor, when a tensor dies.
"""

import ctypes
import mmap
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
OWN_PAGES_FROM = 2 << 20  # bytes
STATM = Path("/proc/self/statm")  # Linux only: what the process holds, in pages
MEMORY_OF_THE_MOST = 0.9995  # per large tensor; a training step has some 150

_libc = ctypes.CDLL(None)
_malloc_trim, _mallopt = (getattr(_libc, name, None) for name in ("malloc_trim", "mallopt"))
# For glibc's `mallopt`: the option, where its own adjustment ends [bytes], and while tiles pass.
THRESHOLDS = {"trim": (-1, 64 << 20, 256 << 20), "mmap": (-3, 32 << 20, 256 << 20)}


@contextmanager
def held_heap() -> Iterator[None]:
    """Inside, the heap keeps what is freed for what comes next, to the end or a `trim`.

    For work that frees and takes tiles of the same sizes all the time: else the system takes their
    pages back and hands out new ones, which costs as much as several passes over them.
    """
    if _mallopt is None:
        yield
        return
    for option, _, held in THRESHOLDS.values():
        _mallopt(option, held)
    try:
        yield
    finally:
        for option, usual, _ in THRESHOLDS.values():
            _mallopt(option, usual)
        trim()


def trim() -> None:
    """Give what is free in the heap back to the system, where the C library can."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def release(x: Tensor) -> None:
    """After a step over a large `x`: give freed slabs back, before tensors that stay pin them."""
    if x.numel() * x.element_size() >= OWN_PAGES_FROM:
        trim()


def channels_last(x: Tensor) -> Tensor:
    """`x` with its channels innermost in memory, and strides that say so.

    Those of a single channel could mean either layout; oneDNN would take the other, which takes
    twice as long and makes all that follows copy.
    """
    x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    return x.as_strided(x.shape, _strides(x.shape)) if x.stride(1) != 1 else x


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=CHANNELS_LAST[len(shape)]).stride()


def images(slab: Tensor) -> Tensor:
    """The rows of `(1, C, rows, Y, Z)` as a batch `(rows, C, Y, Z)`, without a copy."""
    return slab[0].transpose(0, 1)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialized tensor with its channels innermost in memory, large ones in `pages`."""
    size, channels, *spatial = shape
    nbytes = size * channels * prod(spatial) * dtype.itemsize
    if nbytes < OWN_PAGES_FROM or not STATM.is_file():
        return torch.empty(shape, dtype=dtype, memory_format=CHANNELS_LAST[len(shape)])
    flat = torch.frombuffer(pages.take(nbytes), dtype=dtype)
    # Detached it is no view, so that autograd may add a second gradient to it in place.
    return flat.as_strided(shape, _strides(shape)).detach()


def private_pages(size: int) -> mmap.mmap:
    """Zeroed pages of `size` bytes.

    Not huge ones: a virtual machine may have to ask its host for each (7 ms for 2 MB, measured).
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def anonymous_bytes() -> int:
    """What the process holds in memory, files that it mapped apart."""
    _, resident, shared, *_ = STATM.read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE


class Pages:
    """Memory of large tensors, kept for the next ones of the same size.

    Pages fresh from the system cost several passes over them. Free memory goes back to the system
    where it would let the process grow beyond the most that it had in use not long ago, whatever
    used it: tensors here, gradients, or slabs in the heap.
    """

    def __init__(self) -> None:
        self.free: dict[int, list[mmap.mmap]] = defaultdict(list)  # by size [bytes]
        self.kept = self.most = 0  # bytes: free here; in use by the process at its peak
        self.lock = RLock()  # tensors die anywhere, also within `take`

    def take(self, size: int) -> ctypes.Array:
        """Memory of `size` bytes, which comes back by itself when nothing refers to it."""
        with self.lock:
            in_use = anonymous_bytes() - self.kept + size
            self.most = max(in_use, int(self.most * MEMORY_OF_THE_MOST))
            block = self.free[size].pop() if self.free[size] else None
            self.kept -= size if block else 0
            self.give_back(self.most - in_use)
        if block is None:
            block = private_pages(size)
        lease = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(lease, self.put, size, block).atexit = False
        return lease

    def put(self, size: int, block: mmap.mmap) -> None:
        """Take a block back."""
        with self.lock:
            self.kept += size
            self.free[size].append(block)

    def give_back(self, but: int = 0) -> None:
        """Return free memory to the system, but at most `but` bytes."""
        with self.lock:
            while self.kept > but:
                size = max(size for size, blocks in self.free.items() if blocks)
                self.free[size].pop()
                self.kept -= size

    def forget(self) -> None:
        """Return all free memory, and keep no more for what was in use up to now."""
        with self.lock:
            self.give_back()
            self.most = 0


pages = Pages()
