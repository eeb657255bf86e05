"""What a GPU has free, and how it chooses its kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def free_bytes(device: torch.device) -> int:
    """What tensors may still take on a GPU: what nobody has, and what torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_taken(run: Callable[[], object], device: torch.device) -> int:
    """What a call takes on a GPU at its peak, beside what was taken before [bytes].

    Args:
        run: The call.
        device: The GPU.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def fastest_kernels(wanted: bool = True) -> Iterator[None]:
    """Inside, cuDNN times its kernels for each new shape and keeps the fastest.

    That pays where shapes repeat, as those of training patches do; whole volumes differ.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
