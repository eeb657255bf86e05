"""What a GPU has free, and how it chooses its kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def free_bytes(device: torch.device) -> int:
    """What tensors may still take on a GPU: what nobody has, and what torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
