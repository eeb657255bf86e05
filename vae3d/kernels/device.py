"""What a GPU has free, how it chooses its kernels, and how it gets what the CPU has made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


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


def there(x: Tensor, make: Callable[..., Tensor], *arguments: object) -> Tensor:
    """What `make(*arguments)` gives, in the precision of `x` and where `x` is.

    There once for all calls but on the CPU: a GPU waits for what is copied to it, at every step.
    """
    if x.device.type == "cpu":
        return make(*arguments).to(x)
    return _kept(make, arguments, x.device, x.dtype)


@lru_cache(maxsize=64)
def _kept(
    make: Callable[..., Tensor], arguments: tuple, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):  # what validation has made is there in training, too
        return make(*arguments).to(device, dtype)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device; a GPU fetches them while it goes on with its work."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
