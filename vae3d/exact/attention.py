"""Attention in the exact mode: what it must know of the whole volume, then any region on demand.

Global attention needs the keys and values of every voxel, linear attention their `(D, D)` summary;
both are gathered tile by tile, and the queries of a region are then mixed with them. Attention in
windows needs the whole windows that a region touches.

Axes: c channels, n m tokens, h heads, d e channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.exact.nodes import Node, Region, Sum, clip, home_of, wanted
from vae3d.kernels.memory import channels_last
from vae3d.kernels.moments import Moments
from vae3d.models import attention
from vae3d.models.norm import wide
from vae3d.models.reach import Tiles

QUERIES = 4096  # of global attention at a time
Mix = Callable[[Tensor, Region], Tensor]


class Run(Protocol):
    """What the functions here need of the executor, which imports them."""

    fixed_bytes: int

    def walk(self, module: nn.Module, node: Node) -> Node: ...  # noqa: D102
    def sweep(self, node: Node) -> Iterator[Region]: ...  # noqa: D102
    def settle(self, node: Node) -> tuple[Node, Moments]: ...  # noqa: D102


class Update(Node):
    """What an attention layer adds: the projection of `mix(q, region)`.

    Args:
        normed: Its normalized input.
        module: The attention layer.
        mix: Maps queries `(1, H, n, D)` of a region, and the region, to mixed values.
    """

    def __init__(self, normed: Node, module: attention.Attention, mix: Mix):
        super().__init__(normed.channels, normed.shape, normed)
        self.module, self.mix = module, mix

    def read(self, region: Region) -> Tensor:  # noqa: D102 - said in Node
        values = self.sources[0].read(region)
        q = project(self.module, 0, values)
        return finish(self.module, self.mix(q, region), values.shape)

    def operations(self) -> float:  # noqa: D102
        return 1e9  # of global attention; it counts as dear


class WindowUpdate(Node):
    """What attention in windows adds: a region is computed from the whole windows that it meets."""

    def __init__(self, normed: Node, module: attention.PatchAttention):
        super().__init__(normed.channels, normed.shape, normed)
        self.module, self.reach = module, tuple(map(Tiles, module.window, module.shift))

    def needs(self, region: Region) -> Region:  # noqa: D102
        return clip(wanted(self.reach, region), self.shape)

    def read(self, region: Region) -> Tensor:  # noqa: D102
        has = self.needs(region)
        values = self.sources[0].read(has)
        q, k, v = (project(self.module, part, values) for part in range(3))
        y = finish(self.module, self.module.mix(q, k, v, values.shape[2:]), values.shape)
        cuts = [slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(region, has, strict=True)]
        return y[(slice(None), slice(None), *cuts)]

    def operations(self) -> float:  # noqa: D102
        return 1e9


def global_attention(run: Run, module: attention.GlobalAttention, node: Node) -> Node:
    """Keys and values of every voxel are held; queries come in chunks."""
    node, normed = _normed(run, module, node)
    device, dtype = home_of(node)
    shape = (*node.shape, module.qkv.out_features // 3)
    keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
    run.fixed_bytes += keys.nbytes + values.nbytes
    for region in run.sweep(normed):
        part = normed.read(region)
        for whole, number in ((keys, 1), (values, 2)):
            tokens = rearrange(project(module, number, part), "1 h n d -> n (h d)")
            where = tuple(slice(*r) for r in region)
            whole[where] = tokens.view_as(whole[where])
    tokens_of = (t.flatten(0, -2) for t in (keys, values))
    k, v = (rearrange(t, "n (h d) -> 1 h n d", h=module.num_heads) for t in tokens_of)

    def mix(q: Tensor, region: Region) -> Tensor:
        if module.bias is None:
            return torch.cat([attention.attend(part, k, v) for part in q.split(QUERIES, 2)], 2)
        parts, start = [], 0
        for queries, count in query_chunks(region):
            bias = module.bias.of_queries(node.shape, queries).to(q.dtype)
            parts.append(attention.attend(q[:, :, start : start + count], k, v, bias))
            start += count
        return torch.cat(parts, 2)

    return _with_residual(module, Update(normed, module, mix), node)


def linear_attention(run: Run, module: attention.LinearAttention, node: Node) -> Node:
    """One pass sums `softmax(k)^T v` over the volume, scaled by the largest key so far."""
    node, normed = _normed(run, module, node)
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    for region in run.sweep(normed):
        part = normed.read(region)
        k, v = (project(module, number, part) for number in (1, 2))
        k = wide(k)
        peak = k.amax(2, keepdim=True)  # (1, H, 1, D)
        peak = peak if sums is None else torch.maximum(peak, sums[0])
        weights = (k - peak).exp()
        context = torch.einsum("bhnd,bhne->bhde", weights, v.to(k.dtype))
        total = weights.sum(2, keepdim=True)
        if sums is not None:
            shrink = (sums[0] - peak).exp()
            total, context = total + sums[1] * shrink, context + sums[2] * shrink.transpose(2, 3)
        sums = peak, total, context
    context = context / total.transpose(2, 3)

    def mix(q: Tensor, region: Region) -> Tensor:
        return torch.einsum("bhnd,bhde->bhne", q, context.to(q.dtype))

    return _with_residual(module, Update(normed, module, mix), node)


def patch_attention(run: Run, module: attention.PatchAttention, node: Node) -> Node:
    """Windows do not see each other: nothing is gathered."""
    node, normed = _normed(run, module, node)
    return _with_residual(module, WindowUpdate(normed, module), node)


def project(module: attention.Attention, part: int, values: Tensor) -> Tensor:
    """Queries (part 0), keys (1) or values (2) `(1, H, n, D)` of a region `(1, C, *n)`."""
    width = module.qkv.out_features // 3
    cut = slice(part * width, (part + 1) * width)
    bias = None if module.qkv.bias is None else module.qkv.bias[cut]
    tokens = F.linear(values.flatten(2).transpose(1, 2), module.qkv.weight[cut], bias)
    return rearrange(tokens, "1 n (h d) -> 1 h n d", h=module.num_heads)


def finish(module: attention.Attention, mixed: Tensor, shape: Sequence[int]) -> Tensor:
    """Project mixed values `(1, H, n, D)` and lay them out as a region of `shape`."""
    return channels_last(module.joined(mixed, shape))


def query_chunks(region: Region) -> Iterator[tuple[list[slice], int]]:
    """Parts of a region, row by row of its first axis, and the queries in each."""
    (lo, hi), *rest = region
    row = 1
    for a, b in rest:
        row *= b - a
    step = max(QUERIES // row, 1)
    for start in range(lo, hi, step):
        stop = min(start + step, hi)
        yield [slice(start, stop), *(slice(*r) for r in rest)], (stop - start) * row


def _normed(run: Run, module: attention.Attention, node: Node) -> tuple[Node, Node]:
    """The layer's input, settled, and its norm."""
    node, _ = run.settle(node)
    return node, run.walk(module.norm, node)


def _with_residual(module: attention.Attention, update: Node, node: Node) -> Node:
    if type(module).forward is attention.Attention.forward:
        return Sum(update, node)
    return update
