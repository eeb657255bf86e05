"""Volumes that ranks share out, or of which they share each, for commands that go through many.

coding, axis = cut_along(coding, vae, sharding, slab_axis)
shares = Shares(vae, world, len(store), axis)
sizes = {index: store.shape(index)[1:] for index in shares.mine}
with shares.at_work("encode", sizes) as work:
    for index in sizes:
        with work.on(index):
            ...
        print(work.left())
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod

from vae3d.inference.reconstruct import Coding
from vae3d.kernels.progress import part, watched
from vae3d.models.custom_vae import CustomVAE
from vae3d.spatial.slabs import axis_named
from vae3d.tracking.console import Gauge
from vae3d.training.distributed import World
from vae3d.training.passes import in_slabs, together, work_of


def cut_along(
    coding: Coding, vae: CustomVAE, sharding: str | None, slab_axis: str
) -> tuple[Coding, int | None]:
    """How volumes go through a network, and along which axis ranks cut each of them.

    Args:
        coding: How they go through it on one rank.
        vae: The network.
        sharding: spatial, or None.
        slab_axis: x | y | z.

    Returns:
        Both; None for the axis where ranks share the volumes out.

    Raises:
        ValueError: The network, or the way through it, cannot be cut; see `in_slabs`.
    """
    axis = axis_named(slab_axis, vae.spatial_dims)
    return (in_slabs(coding, vae), axis) if sharding else (coding, None)


class Shares:
    """Who works on which volumes.

    Args:
        vae: The network, the same on all ranks.
        world: All ranks.
        count: How many volumes there are.
        axis: The axis along which all ranks cut each volume; None where they share them out.

    Attributes:
        team: The ranks that work on a volume together.
        mine: Numbers of the volumes that this rank works on.
    """

    def __init__(self, vae: CustomVAE, world: World, count: int, axis: int | None):
        self.vae, self.axis, self.tells = vae, axis or 0, world.is_main
        self.team = world.team(1 if axis is None else world.size)
        self.mine = work_of(world, self.team, count)

    @contextmanager
    def at_work(self, what: str, sizes: Mapping[int, Sequence[int]]) -> Iterator[Work]:
        """Lend who tells how far it is, while the team takes part in this rank's passes.

        Args:
            what: What is done.
            sizes: Voxels per axis of each volume that is to do.
        """
        gauge = Gauge(what, enabled=self.tells)
        with gauge, watched(gauge.add), together(self.vae, self.team, self.axis):
            yield Work(gauge, sizes)


class Work:
    """How far it has come; a volume counts as many parts as it has voxels.

    Args:
        gauge: Shows it.
        sizes: Of the volumes that are to do; others count nothing.
    """

    def __init__(self, gauge: Gauge, sizes: Mapping[int, Sequence[int]]):
        self.gauge = gauge
        self.voxels = {index: prod(size) for index, size in sizes.items()}
        self.total = max(sum(self.voxels.values()), 1)

    def on(self, index: int) -> AbstractContextManager[None]:
        """What passes inside is of this volume."""
        return part(self.voxels.get(index, 0) / self.total)

    def left(self) -> str:
        """Time to the end."""
        return self.gauge.left() if self.voxels else "0:00:00"
