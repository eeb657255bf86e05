"""One line on what it will cost to send volumes through a network, and which mode costs less."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from vae3d.exact.executor import WORTH_TELLING, half_of_free
from vae3d.inference.costs import BOTH, What, cost, gib
from vae3d.inference.reconstruct import Coding
from vae3d.inference.stitching import Stitcher
from vae3d.kernels.precision import faults_of_conv3d
from vae3d.models.attention import GlobalAttention
from vae3d.models.custom_vae import CustomVAE

MANY = 1.2  # passes through the network for each voxel from which another mode is recommended


def told(
    coding: Coding, vae: CustomVAE, shapes: Sequence[Sequence[int]], what: Sequence[What] = BOTH,
    ranks: int = 1,
) -> str:  # fmt: skip
    """One line: which mode, what it costs, whether another is cheaper, and known faults.

    Args:
        coding: How volumes will go through the network.
        vae: The network, in eval mode on its device.
        shapes: Spatial shape of each volume.
        what: Which halves of the network are used.
        ranks: That share a full pass.
    """
    choices = [coding.choice(vae, shape, what) for shape in shapes]
    volumes: dict[str, list[Sequence[int]]] = {}
    for choice, shape in zip(choices, shapes, strict=True):
        volumes.setdefault(choice.mode, []).append(shape)
    heads = [f"mode {m} for {len(of)} volume{'s' * (len(of) != 1)}" for m, of in volumes.items()]
    largest = " x ".join(map(str, max(shapes, key=math.prod)))
    upto = "up to " if len(set(map(tuple, shapes))) > 1 else ""
    voxels, passes = sum(map(math.prod, shapes)), 1.0
    if of_patches := volumes.get("patch"):
        passes = passes_of_patches(coding, vae, of_patches)
    facts, hints = [], [choice.why for choice in choices if choice.why]
    once = "once"
    if voxels >= WORTH_TELLING:
        # The time of attention of all to all grows with the square of the voxels.
        word = "at least" if any(isinstance(m, GlobalAttention) for m in vae.modules()) else "about"
        once = f"{word} {spell(seconds(replace(coding, mode='full'), vae, shapes, what))}"
        facts = [f"{word} {spell(seconds(coding, vae, shapes, what))}"]
        if whole := volumes.get("full"):
            needed = max(coding.full_bytes(vae, shape, what) for shape in whole) / ranks
            facts += [f"about {gib(needed)}"]
            if ranks > 1:  # as many times as fast, where each has a processor of its own
                facts = [f"{facts[-1]} on each of {ranks} ranks"]
            elif coding.mode == "full" and needed > (free := half_of_free(_device(vae))):
                hints += [f"{gib(2 * free)} are free: --mode exact has the same result in less"]
    if passes > MANY:
        facts += [f"each voxel goes through the network {passes:.1f} times"]
        if coding.mode == "patch":
            hints += [f"--mode auto: {once}, and the exact result"]
    if vae.spatial_dims == 3:
        hints += faults_of_conv3d(_device(vae), coding.amp)
    line = f"{' and '.join(heads)} of {upto}{largest}"
    return "; ".join([": ".join(filter(None, [line, ", ".join(facts)])), *dict.fromkeys(hints)])


def seconds(
    coding: Coding, vae: CustomVAE, shapes: Sequence[Sequence[int]], what: Sequence[What] = BOTH
) -> float:
    """What volumes of these shapes take [s], by the time of a small one."""
    voxels = 0.0
    for shape in shapes:
        patches = coding.choice(vae, shape, what).mode == "patch"
        voxels += math.prod(shape) * (passes_of_patches(coding, vae, [shape]) if patches else 1)
    return voxels * sum(cost(vae, half).seconds for half in what)


def passes_of_patches(coding: Coding, vae: CustomVAE, shapes: Sequence[Sequence[int]]) -> float:
    """How often a voxel goes through the network in patches, on average."""
    assert coding.patch_size is not None
    volume, done = math.prod(coding.patch_size), 0
    for shape in shapes:
        plane = coding.plane(vae, shape)
        grid = Stitcher(plane, coding.patch_size, coding.overlap, coding.blend, unit=vae.factor)
        done += volume * grid.seen.size * (math.prod(shape) // math.prod(plane))
    return done / sum(map(math.prod, shapes))


def spell(time: float) -> str:
    """A duration [s] as people say it."""
    if time < 90:
        return f"{max(time, 1):.0f} s"
    return f"{time / 60:.0f} min" if time < 5400 else f"{time / 3600:.1f} h"


def _device(vae: CustomVAE) -> torch.device:
    return next(vae.parameters()).device
