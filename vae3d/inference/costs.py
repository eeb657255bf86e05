"""What it costs to send a volume through a network, known before it is done.

Memory and time of a full pass are measured on two small inputs and grow with the voxels; mode exact
takes the same time in bounded memory; patches take it as often as they lie over a voxel.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vae3d.exact.executor import rehearsed
from vae3d.kernels.device import bytes_taken
from vae3d.kernels.progress import watched
from vae3d.models.custom_vae import CustomVAE

SIDE = {2: 128, 3: 32}  # voxels per axis of what is measured
What = Literal["encode", "decode"]
BOTH: tuple[What, ...] = ("encode", "decode")


class Cost(NamedTuple):
    """What a full pass takes: bytes whatever the size, then bytes and seconds per voxel."""

    fixed: float
    per_voxel: float
    seconds: float

    def bytes(self, voxels: int) -> float:
        """Memory for an input of so many voxels, weights and the volume apart."""
        return self.fixed + self.per_voxel * voxels


_costs: WeakKeyDictionary[CustomVAE, dict[What, Cost]] = WeakKeyDictionary()


def cost(vae: CustomVAE, what: What) -> Cost:
    """Cost of a full pass with a network where it is now, measured once."""
    known = _costs.setdefault(vae, {})
    if what not in known:
        side = SIDE[vae.spatial_dims]
        small = [-(-side // (2 * f)) * f for f in vae.factor]
        known[what] = measured(vae, what, small)
    return known[what]


@torch.no_grad()
def measured(vae: CustomVAE, what: What, small: Sequence[int]) -> Cost:
    """Measure passes of two sizes, the second four or eight times the first.

    Args:
        vae: The network, in eval mode.
        what: Which half.
        small: Voxels per axis of the smaller.
    """
    parameter = next(vae.parameters())
    voxels, peaks, seconds = [], [], 0.0
    for times in (1, 2):
        size = [times * n for n in small]
        channels = vae.in_channels
        if what == "decode":
            size = [n // f for n, f in zip(size, vae.factor, strict=True)]
            channels = vae.latent_channels
        x = torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)

        def run(x: Tensor = x) -> None:
            vae.encode(x) if what == "encode" else vae.decode(x)

        with watched(None):
            peaks.append(peak_bytes(run, parameter.device))  # the first time warms up
            begun = time.monotonic()
            run()
            if parameter.device.type == "cuda":
                torch.cuda.synchronize(parameter.device)
            seconds = time.monotonic() - begun
        voxels.append(math.prod(n * times for n in small))
    per_voxel = max(peaks[1] - peaks[0], 0) / (voxels[1] - voxels[0])
    return Cost(max(peaks[1] - per_voxel * voxels[1], 0), per_voxel, seconds / voxels[1])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """What a call takes at its peak [bytes]: as torch's own memory tells, or by its tensors."""
    if device.type == "cuda":
        return bytes_taken(run, device)
    with Living() as living:
        run()
    return living.peak


class Living(TorchDispatchMode):
    """Sums up the tensors that live at once while code runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation and take note of the memory of what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, which: int, nbytes: int) -> None:
        self.known.discard(which)
        self.now -= nbytes


def no_exact(vae: CustomVAE, amp: str) -> str | None:
    """Why mode exact does not go with a network and a precision; None where it does."""
    if amp != "off":
        return f"mode exact computes in float32, not in {amp}"
    if next(vae.parameters()).device.type == "mps":
        return "mode exact sums in float64, which mps does not have"
    if names := rehearsed(vae).at_once:
        return f"mode exact would run {', '.join(names)} on the whole volume at once"
    return None


def gib(nbytes: float) -> str:
    """Bytes as people say them."""
    return f"{nbytes / 2**30:.2g} GiB" if nbytes < 10 * 2**30 else f"{nbytes / 2**30:.0f} GiB"
