"""Slabs of a volume on several ranks: who holds which rows, and rows and sums that they exchange.

A volume is cut along one of its axes, at multiples of the network's factor, so that every layer's
grid is cut at the same places. Each rank holds its own rows of every tensor; `Layout` knows which
axis it is, and everybody's. What ranks exchange is differentiable: the gradient of a row that was
sent comes back.

Every rank of the group makes the same calls in the same order, forward and backward.

Axes: b batch, c channels, x y z space; rows are those along the axis that is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae3d.kernels.lean import Context
from vae3d.kernels.moments import Moments, merged
from vae3d.kernels.steps import Neighbors, Sides

Rows = tuple[int, int]


def axis_named(name: str, dims: int) -> int:
    """Number of the axis of `--slab_axis`.

    Raises:
        ValueError: Volumes of so many axes have none of this name.
    """
    axes = "xyz"[:dims]
    if name not in axes:
        raise ValueError(f"--slab_axis {name}: the model's axes are {' and '.join(axes)}")
    return axes.index(name)


def cut(shape: Sequence[int], factor: Sequence[int], parts: int, axis: int = 0) -> list[Rows]:
    """Rows of each slab of a volume, as even as multiples of the factor can be.

    Args:
        shape: Voxels of the volume per axis, any numbers.
        factor: Shrink of the network per axis.
        parts: Slabs.
        axis: The axis that is cut.

    Raises:
        ValueError: There is not one cell of the factor for each slab.
    """
    cells = [-(-n // f) for n, f in zip(shape, factor, strict=True)]
    if cells[axis] < parts:
        longest = max(range(len(cells)), key=cells.__getitem__)
        other = f"--slab_axis {'xyz'[longest]} has {cells[longest]}; " * (longest != axis)
        raise ValueError(
            f"{shape[axis]} rows along {'xyz'[axis]} are {cells[axis]} cells of the factor "
            f"{factor[axis]}, fewer than the {parts} ranks that share them; {other}use fewer ranks "
            "or larger volumes"
        )
    edges = [min(cells[axis] * i // parts * factor[axis], shape[axis]) for i in range(parts + 1)]
    return list(pairwise(edges))


def own_part(
    shape: Sequence[int], factor: Sequence[int], parts: int, rank: int, axis: int = 0
) -> tuple[slice, ...]:
    """The part of a volume that is one rank's slab; see `cut`."""
    whole = [slice(0, n) for n in shape]
    whole[axis] = slice(*cut(shape, factor, parts, axis)[rank])
    return tuple(whole)


class Layout(Neighbors):
    """Who holds which rows of a volume.

    The last slab may end within a cell, which the network fills up.

    Args:
        shape: Voxels of the volume per axis.
        factor: Shrink of the network per axis.
        axis: The axis that is cut.
        group: The ranks that share the volume; None for all.

    Raises:
        ValueError: There are fewer cells of the factor than ranks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        factor: Sequence[int],
        axis: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        self.shape, self.axis, self.dim, self.group = tuple(shape), axis, axis + 2, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.slabs = cut(shape, factor, self.size, axis)
        self.cells = [-(-(hi - lo) // factor[axis]) for lo, hi in self.slabs]
        self.bytes_sent = 0  # of halos, forward and backward, by this rank

    @property
    def share(self) -> float:
        """This rank's share of the volume's rows."""
        lo, hi = self.slabs[self.rank]
        return (hi - lo) / self.slabs[-1][1]

    @property
    def share_of_latent(self) -> float:
        """This rank's share of the latent's rows."""
        return self.cells[self.rank] / sum(self.cells)

    def owned(self, x: Tensor) -> list[Rows]:
        """Every rank's rows of a grid of whole cells, by this rank's tensor of it."""
        return self.rows(x.shape[self.dim])

    def rows(self, own: int) -> list[Rows]:
        """Every rank's rows of a grid of which this rank holds `own`."""
        scale, rest = divmod(own, self.cells[self.rank])
        assert not rest, f"{own} rows in {self.cells[self.rank]} cells"
        edges = [0, *accumulate(scale * n for n in self.cells)]
        return list(pairwise(edges))

    def part(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Some rows of a tensor, counted from its first."""
        return x.narrow(self.dim, lo, hi - lo)

    def resized(self, shape: Sequence[int], rows: int) -> tuple[int, ...]:
        """The shape `(B, C, *spatial)` of a tensor with so many rows instead of its own."""
        return (*shape[: self.dim], rows, *shape[self.dim + 1 :])

    def peer(self, rank: int) -> int:
        """The rank of all that is this rank of the group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def following(self, x: Tensor, count: int) -> Tensor:
        """A slab of the volume itself, with so many rows after it."""
        return self.extended(x, [(lo, hi + count) for lo, hi in self.slabs], self.slabs)

    def extended(
        self, x: Tensor, wanted: Sequence[Rows], owned: Sequence[Rows] | None = None
    ) -> Tensor:
        """A slab with the rows that other ranks hold, as far as each wants and the volume has them.

        Args:
            x: This rank's rows of `(B, C, *spatial)`.
            wanted: For every rank, the rows that it is to have beside its own.
            owned: Every rank's rows; None for those of a grid of whole cells.
        """
        owned = owned or self.owned(x)
        extents = clipped(owned, wanted)
        return x if extents == owned else Extended.apply(x, self, owned, extents)

    def beside(self, x: Tensor, before: int, after: int) -> Callable[[], Sides]:
        """Begin to fetch rows of other ranks; see `Neighbors`."""
        owned = self.owned(x)
        extents = clipped(owned, [(lo - before, hi + after) for lo, hi in owned])
        arrived = fetch(self, x, owned, extents)

        def sides() -> Sides:
            none = self.part(x, 0, 0)
            before, after = (torch.cat(p, self.dim) if p else none for p in arrived())
            return before, after

        return sides

    def merge(self, counts: Tensor, means: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of all ranks' rows; see `Neighbors`."""
        counts, means, m2 = gathered(torch.stack([counts, means, m2]), self.group).unbind(1)
        return counts.sum(0), *merged(counts, means, m2)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's tensor; so is its gradient."""
        return Summed.apply(x, self.group)

    def sum_of_teams(self, x: Tensor) -> Tensor:
        """The same of all ranks of all teams."""
        return Summed.apply(x, None)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of every rank's values, without a gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


def clipped(owned: Sequence[Rows], wanted: Sequence[Rows]) -> list[Rows]:
    """Every rank's rows with those that it wants beside them, as far as the volume has them."""
    last = owned[-1][1]
    pairs = zip(owned, wanted, strict=True)
    return [(max(min(a, lo), 0), min(max(b, hi), last)) for (a, b), (lo, hi) in pairs]


def overlap(a: Rows, b: Rows) -> Rows:
    """The rows that two ranges share; empty where the first is not below the second."""
    return max(a[0], b[0]), min(a[1], b[1])


# What rows travel by: everybody's, and everybody's with those that they are to have.
Cut = tuple[Layout, Sequence[Rows], Sequence[Rows]]
Group = dist.ProcessGroup | None
Among = tuple[Group, int, Rows]  # ranks; of a slab the dimension that is cut, and the own rows


class Extended(torch.autograd.Function):
    """A slab with rows of other ranks before and after it."""

    @staticmethod
    def forward(
        ctx: Context[Cut], x: Tensor, layout: Layout, owned: Sequence[Rows], extents: Sequence[Rows]
    ) -> Tensor:
        """Return the rows of this rank's extent."""
        ctx.step = layout, owned, extents
        before, after = fetch(layout, x, owned, extents)()
        parts = [*before, x, *after]
        return torch.cat(parts, layout.dim) if before or after else x.view_as(x)

    @staticmethod
    def backward(ctx: Context[Cut], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradients of others' rows home."""
        return Returned.apply(grad, *ctx.step), None, None, None


class Returned(torch.autograd.Function):
    """What a slab with rows of other ranks is the gradient of: both have each other's gradient."""

    @staticmethod
    def forward(
        ctx: Context[Cut],
        grad: Tensor,
        layout: Layout,
        owned: Sequence[Rows],
        extents: Sequence[Rows],
    ) -> Tensor:
        """Send rows of others to them, and add those that come to the own rows."""
        ctx.step = layout, owned, extents
        me = layout.rank
        (first, _), (start, stop) = extents[me], owned[me]
        there, here = shared(owned, extents, me), shared(extents, owned, me)
        sent = {n: layout.part(grad, lo - first, hi - first) for n, (lo, hi) in here.items()}
        got = {n: layout.resized(grad.shape, hi - lo) for n, (lo, hi) in there.items()}
        parts = exchange(layout, sent, got, grad)()
        own = layout.part(grad, start - first, stop - first).clone()
        for n, (lo, hi) in there.items():  # by rank: sums have one order
            layout.part(own, lo - start, hi - start).add_(parts[n])
        return own

    @staticmethod
    def backward(ctx: Context[Cut], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Fetch the rows of others, for a second derivative."""
        return Extended.apply(grad, *ctx.step), None, None, None


def shared(mine: Sequence[Rows], others: Sequence[Rows], me: int) -> dict[int, Rows]:
    """Rows of rank `me` in `mine` that each other rank has in `others`, where there are some."""
    pairs = {rank: overlap(rows, mine[me]) for rank, rows in enumerate(others) if rank != me}
    return {rank: (lo, hi) for rank, (lo, hi) in pairs.items() if lo < hi}


def fetch(
    layout: Layout, x: Tensor, owned: Sequence[Rows], extents: Sequence[Rows]
) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """Begin to exchange the rows of every rank's extent; the result waits for those of this rank.

    They are parts, those before the own rows and those after.
    """
    me, start = layout.rank, owned[layout.rank][0]
    there, here = shared(owned, extents, me), shared(extents, owned, me)
    sent = {rank: layout.part(x, lo - start, hi - start) for rank, (lo, hi) in there.items()}
    got = {rank: layout.resized(x.shape, hi - lo) for rank, (lo, hi) in here.items()}
    arrived = exchange(layout, sent, got, x)

    def sides() -> tuple[list[Tensor], list[Tensor]]:
        parts = sorted(arrived().items())
        return [t for rank, t in parts if rank < me], [t for rank, t in parts if rank > me]

    return sides


def exchange(
    layout: Layout, sent: dict[int, Tensor], got: dict[int, tuple[int, ...]], like: Tensor
) -> Callable[[], dict[int, Tensor]]:
    """Begin to send rows to ranks of the group; the result waits for those of the shapes `got`.

    They travel channels innermost, as most of the network holds them.
    """
    operations, arrived = [], {}
    for rank, rows in sent.items():
        values = rows.detach().movedim(1, -1).contiguous()
        layout.bytes_sent += values.nbytes
        operations.append(dist.P2POp(dist.isend, values, layout.peer(rank), layout.group))
    for rank, (b, c, *grid) in got.items():
        buffer = like.new_empty(b, *grid, c)
        operations.append(dist.P2POp(dist.irecv, buffer, layout.peer(rank), layout.group))
        arrived[rank] = buffer.movedim(-1, 1)
    under_way = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> dict[int, Tensor]:
        for work in under_way:
            work.wait()
        operations.clear()  # to here what is sent has to stay
        return arrived

    return wait


def gathered(own: Tensor, group: Group) -> Tensor:
    """Every rank's tensor, stacked."""
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, own, group=group)
    return torch.stack(everyones)


class Summed(torch.autograd.Function):
    """Sum over ranks, of which every rank goes on with the whole."""

    @staticmethod
    def forward(ctx: Context[Group], x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """Return the sum."""
        ctx.step = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Context[Group], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the sum of what every rank made of the whole."""
        return Summed.apply(grad, ctx.step), None


class SharedMoments(torch.autograd.Function):
    """Mean and variance per channel over all ranks' rows, merged in float64 (Chan et al., 1979)."""

    @staticmethod
    def forward(
        ctx: Context[Among], x: Tensor, group: Group, batch: bool, dim: int, own: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and count `(B, C)`; `(1, C)` of the batch as a whole.

        Args:
            ctx: For the backward pass.
            x: A slab.
            group: The ranks that share the volume.
            batch: Whether the samples are one.
            dim: The dimension that is cut.
            own: First and last row of `x` that are this rank's.
        """
        parts = []
        for sample in x.detach().narrow(dim, own[0], own[1] - own[0]):
            moments = Moments(x.shape[1], x.device)
            moments.update(sample[None])
            count = torch.full_like(moments.mean, moments.count)
            parts.append(torch.stack([count, moments.mean, moments.m2]))
        mine = torch.stack(parts)  # (B, 3, C)
        counts, means, m2 = gathered(mine, group).unbind(2)  # (ranks, B, C) each
        if batch:
            counts, means, m2 = (t.flatten(0, 1)[:, None] for t in (counts, means, m2))
        mean, m2 = merged(counts, means, m2)
        count = counts.sum(0)
        ctx.save_for_backward(x, mean, count)
        ctx.mark_non_differentiable(count)
        ctx.step = group, dim, own
        return mean, m2 / count, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context[Among], grad_mean: Tensor, grad_var: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        """With n values: dx = dmean / n + dvar * 2 (x - mean) / n, gradients of all ranks added."""
        x, mean, count = ctx.saved_tensors
        (group, dim, (lo, hi)), grads = ctx.step, torch.stack([grad_mean, grad_var])
        dist.all_reduce(grads, group=group)
        grad_mean, grad_var = grads / count
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (len(mean), -1, *(1,) * (x.dim() - 2))
        slope, level, mean = (t.to(wide).view(shape) for t in (2 * grad_var, grad_mean, mean))
        grad = torch.addcmul(level, x.narrow(dim, lo, hi - lo) - mean, slope).to(x.dtype)
        later = (0, 0) * (x.dim() - 1 - dim)
        return F.pad(grad, (*later, lo, x.shape[dim] - hi)), None, None, None, None
