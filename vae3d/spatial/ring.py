"""Softmax attention over a volume in slabs, of which no rank holds all keys and values.

They go round the ranks in blocks, one rank's tokens each; a rank's queries meet one block after
another, and sums of the softmax are scaled as larger scores come (Milakov and Gimelshein, 2018; Liu
et al., 2023). In the backward pass the blocks go round again, with their gradients.

Axes: b batch, h heads, n queries of this rank, m keys of a block, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae3d.kernels.lean import Context
from vae3d.models.attention import RelativeBias
from vae3d.models.norm import wide
from vae3d.spatial.slabs import Layout, Rows, exchange

SCORES = 1 << 22  # of queries and keys that are held at once, rounded to planes of the volume

Maybe = Tensor | None
Places = tuple[list[slice], list[slice]]  # of queries and keys, per axis


class Ring(NamedTuple):
    """Ranks, and the grid of the tokens of all of them."""

    layout: Layout
    grid: Sequence[int]
    owned: Sequence[Rows]  # every rank's rows of the grid

    def box(self, rank: int) -> list[slice]:
        """Where on the grid a rank's tokens are, per axis."""
        box = [slice(0, n) for n in self.grid]
        box[self.layout.axis] = slice(*self.owned[rank])
        return box

    def after(self, step: int) -> int:
        """Whose block is here when the blocks have moved so often."""
        return (self.layout.rank + step) % self.layout.size

    def moved(self, block: Tensor, step: int) -> Tensor:
        """This rank's block `(B, H, m, D)` after so many steps, from the rank that has it now.

        The one that is here goes to the rank before.
        """
        if self.layout.size == 1:
            return block
        following, before = self.after(1), self.after(-1)
        # Channels come second where rows are exchanged, and travel innermost.
        shape = (len(block), block.shape[3], block.shape[1], tokens(self.box(self.after(step))))
        sent = {before: block.movedim(-1, 1)}
        return exchange(self.layout, sent, {following: shape}, block)()[following].movedim(1, -1)

    def scores(
        self, q: Tensor, keys: Tensor, rank: int, table: Maybe
    ) -> Iterator[tuple[slice, Places, Tensor]]:
        """Parts of the queries, the places of queries and keys on the grid, and their scores.

        Args:
            q: Queries `(B, H, n, D)`.
            keys: A block `(B, H, m, D)`.
            rank: Whose it is.
            table: Bias by offset on the grid; None for none.
        """
        x, *others = self.box(self.layout.rank)
        plane = tokens(others)
        rows = max(SCORES // (plane * keys.shape[2] * len(q) * q.shape[1]), 1)
        for lo in range(x.start, x.stop, rows):
            hi = min(lo + rows, x.stop)
            part = slice((lo - x.start) * plane, (hi - x.start) * plane)
            places = [slice(lo, hi), *others], self.box(rank)
            scores = wide(q[:, :, part]) @ wide(keys).transpose(2, 3) * q.shape[3] ** -0.5
            if table is not None:
                scores += RelativeBias.of_pairs(table, self.grid, *places)
            yield part, places, scores


def tokens(box: Sequence[slice]) -> int:
    """Tokens of a part of a grid."""
    return prod(axis.stop - axis.start for axis in box)


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries to the keys and values of all."""

    @staticmethod
    def forward(
        ctx: Context[Ring], ring: Ring, q: Tensor, k: Tensor, v: Tensor, table: Maybe
    ) -> Tensor:
        """Return mixed values `(B, H, n, D)`."""
        ctx.step, block = ring, torch.cat([k, v], 1)
        out = torch.zeros_like(wide(q))
        total = torch.zeros_like(out[..., :1])
        peak = torch.full_like(total, float("-inf"))
        with torch.autocast(q.device.type, enabled=False):
            for step in range(ring.layout.size):
                block = ring.moved(block, step) if step else block
                keys, values = block.chunk(2, 1)
                for part, _, scores in ring.scores(q, keys, ring.after(step), table):
                    top = torch.maximum(peak[:, :, part], scores.amax(-1, keepdim=True))
                    weights, shrink = scores.sub_(top).exp_(), (peak[:, :, part] - top).exp_()
                    out[:, :, part] = out[:, :, part] * shrink + weights @ wide(values)
                    total[:, :, part] = total[:, :, part] * shrink + weights.sum(-1, keepdim=True)
                    peak[:, :, part] = top
        out = (out / total).to(q.dtype)
        tables = () if table is None else (table,)
        ctx.save_for_backward(q, k, v, out, peak + total.log(), *tables)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[Ring], grad: Tensor) -> tuple[Maybe, ...]:
        """With p the softmax and g the gradient: dv = p^T g, ds = p (g v^T - sum(g out))."""
        q, k, v, out, logsum, *tables = ctx.saved_tensors
        table = tables[0] if tables else None
        ring, scale, grad, block = ctx.step, q.shape[3] ** -0.5, wide(grad), torch.cat([k, v], 1)
        common = (grad * out).sum(-1, keepdim=True)
        grad_q, grads = torch.zeros_like(wide(q)), torch.zeros_like(wide(block))
        grad_table = None if table is None else torch.zeros_like(table)
        with torch.autocast(q.device.type, enabled=False):
            for step in range(ring.layout.size):
                block = ring.moved(block, step) if step else block
                (keys, values), (grad_k, grad_v) = (t.chunk(2, 1) for t in (wide(block), grads))
                for part, places, scores in ring.scores(q, keys, ring.after(step), table):
                    g, weights = grad[:, :, part], scores.sub_(logsum[:, :, part]).exp_()
                    grad_v += weights.transpose(2, 3) @ g
                    slopes = weights.mul_(g @ values.transpose(2, 3) - common[:, :, part])
                    grad_q[:, :, part] += slopes @ keys * scale
                    grad_k += slopes.transpose(2, 3) @ wide(q[:, :, part]) * scale
                    if grad_table is not None and table is not None:
                        grad_table += by_offset(slopes.sum(0), table, ring.grid, places)
                grads = ring.moved(grads, step + 1)  # the last time home
        grad_k, grad_v = grads.to(k.dtype).chunk(2, 1)
        return None, grad_q.to(q.dtype), grad_k, grad_v, grad_table


def by_offset(grad: Tensor, table: Tensor, grid: Sequence[int], places: Places) -> Tensor:
    """Gradient of a table of offsets from that of the pairs which it is laid out by."""
    with torch.enable_grad():
        table = table.detach().requires_grad_()
        pairs = RelativeBias.of_pairs(table, grid, *places)
    return torch.autograd.grad(pairs, table, grad)[0]


def attend(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, shape: Sequence[int], bias: RelativeBias | None
) -> Tensor:
    """Softmax attention of this rank's queries to all ranks' keys and values.

    Args:
        layout: Who holds which rows.
        q: Queries of the own rows `(B, H, n, D)`.
        k: Keys of the same tokens.
        v: Values of the same tokens.
        shape: Voxels of the own slab per axis.
        bias: The bias by the offset of two tokens; None for none.
    """
    owned, grid = layout.rows(shape[layout.axis]), list(shape)
    grid[layout.axis] = owned[-1][1]
    table = None if bias is None else wide(bias.resized(grid))
    return RingAttention.apply(Ring(layout, grid, owned), q, k, v, table)
