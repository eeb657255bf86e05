"""One line on what it will cost to send volumes through a network, and which mode costs less."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from vae3d.exact.executor import WORTH_TELLING, half_of_free
from vae3d.inference.costs import BOTH, What, cost, gib
from vae3d.inference.reconstruct import Coding
from vae3d.inference.stitching import Stitcher
from vae3d.models.attention import GlobalAttention
from vae3d.models.custom_vae import CustomVAE

MANY = 1.2  # passes through the network for each voxel from which another mode is recommended


def told(
    coding: Coding, vae: CustomVAE, shapes: Sequence[Sequence[int]], what: Sequence[What] = BOTH
) -> str:
    """One line: which mode, what it costs, and whether another is cheaper.

    Args:
        coding: How volumes will go through the network.
        vae: The network, in eval mode on its device.
        shapes: Spatial shape of each volume.
        what: Which halves of the network are used.
    """
    choices = [coding.choice(vae, shape, what) for shape in shapes]
    modes = Counter(choice.mode for choice in choices)
    heads = [f"mode {mode} for {n} volume{'s' * (n != 1)}" for mode, n in modes.items()]
    largest = " x ".join(map(str, max(shapes, key=math.prod)))
    upto = "up to " if len(set(map(tuple, shapes))) > 1 else ""
    passes = 1.0
    if modes["patch"]:
        of_patches = [s for s, c in zip(shapes, choices, strict=True) if c.mode == "patch"]
        passes = passes_of_patches(coding, vae, of_patches)
    voxels = sum(map(math.prod, shapes))
    facts, hints = [], [choice.why for choice in choices if choice.why]
    once = "once"
    if voxels >= WORTH_TELLING:
        seconds = voxels * sum(cost(vae, half).seconds for half in what)
        # The time of attention of all to all grows with the square of the voxels.
        word = "at least" if any(isinstance(m, GlobalAttention) for m in vae.modules()) else "about"
        facts, once = [f"{word} {spell(passes * seconds)}"], f"{word} {spell(seconds)}"
        needed = max(coding.full_bytes(vae, shape, what) for shape in shapes)
        if modes["full"]:
            facts += [f"about {gib(needed)}"]
        if coding.mode == "full" and needed > (free := half_of_free(_device(vae))):
            hints += [f"{gib(2 * free)} are free: --mode exact has the same result in less"]
    if passes > MANY:
        facts += [f"each voxel goes through the network {passes:.1f} times"]
        if coding.mode == "patch":
            hints += [f"--mode auto: {once}, and the exact result"]
    line = f"{' and '.join(heads)} of {upto}{largest}"
    return "; ".join([": ".join(filter(None, [line, ", ".join(facts)])), *dict.fromkeys(hints)])


def passes_of_patches(coding: Coding, vae: CustomVAE, shapes: Sequence[Sequence[int]]) -> float:
    """How often a voxel goes through the network in patches, on average."""
    assert coding.patch_size is not None
    volume, done = math.prod(coding.patch_size), 0
    for shape in shapes:
        plane = coding.plane(vae, shape)
        grid = Stitcher(plane, coding.patch_size, coding.overlap, coding.blend, unit=vae.factor)
        done += volume * grid.seen.size * (math.prod(shape) // math.prod(plane))
    return done / sum(map(math.prod, shapes))


def spell(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _device(vae: CustomVAE) -> torch.device:
    return next(vae.parameters()).device
