"""Run a VAE over a volume piece by piece, with the result of the full pass and bounded memory.

    posterior = encode_exact(vae, x, memory_gb=4)       # x (C, X, Y, Z), any array, memory maps too
    recon = decode_exact(vae, posterior.mean, memory_gb=4)

The model's own modules are walked once and become a graph of nodes that compute any region of
their output on demand, pulling the region with its halo from the node before. Only a norm over the
whole volume (its statistics) and global attention need everything before them; there the graph is
settled: computed tile by tile while float64 statistics are merged, and either stored or, when the
budget asks for it, computed again when it is read.

A new layer is one entry in `HANDLERS`. A module that has none may declare `halo` (input voxels, one
number or one per axis); any other is run on the whole volume, with a message.

Axes: b batch (always 1 here), c channels, x y z space. A region is ((lo, hi), ...) per axis.
"""

import copy
import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models import attention, blocks, custom_vae, downsample, norm, upsample
from vae3d.models.posterior import DiagonalGaussian

Region = tuple[tuple[int, int], ...]

LAYOUT = {2: torch.channels_last, 3: torch.channels_last_3d}
CHEAP = 256  # operations per value below which computing again beats storing


# Nodes -------------------------------------------------------------------------------------------


class Node:
    """One tensor of the network, `(1, C, *shape)`, of which any region can be computed.

    Args:
        channels: C.
        shape: Voxels per axis.
        sources: Nodes it reads.
    """

    fresh = True  # whether `read` returns memory that nobody else holds

    def __init__(self, channels: int, shape: Sequence[int], *sources: "Node"):
        self.channels, self.shape, self.sources = channels, tuple(shape), sources
        self.moments: Moments | None = None

    def read(self, region: Region) -> Tensor:
        """Compute a region: `(1, C, *region)`, channels last in memory."""
        raise NotImplementedError

    def needs(self, region: Region) -> Region:
        """Region of the sources that `region` is computed from."""
        return region

    def operations(self) -> float:
        """Multiplications and additions per value of what is not stored."""
        return max((s.operations() for s in self.sources), default=0.0)

    def peak_bytes(self, region: Region) -> int:
        """Bytes in use while a region is read, apart from what is stored."""
        inner, held = self.needs(region), 0
        peak = 0
        for source in self.sources:
            peak = max(peak, held + source.peak_bytes(inner))
            held += source.bytes(inner)
        return max(peak, held + self.bytes(region) * (2 if self.fresh else 1))

    def bytes(self, region: Region | None = None) -> int:
        """Size of a region, or of the whole, in float32."""
        sizes = self.shape if region is None else [hi - lo for lo, hi in region]
        return 4 * self.channels * math.prod(sizes)


class Source(Node):
    """The input volume `(C, *spatial)`; voxels past its end repeat the last ones."""

    fresh = False

    def __init__(self, volume, shape: Sequence[int], device, dtype):
        super().__init__(volume.shape[0], shape)
        self.volume, self.device, self.dtype = volume, device, dtype

    def read(self, region):
        inside = [
            (min(lo, n - 1), min(hi, n))
            for (lo, hi), n in zip(region, self.volume.shape[1:], strict=True)
        ]
        part = self.volume[(slice(None), *(slice(*r) for r in inside))]
        if not isinstance(part, Tensor):
            part = torch.from_numpy(np.array(part))
        part = part[None].to(self.device, self.dtype)
        short = [(hi - lo) - (b - a) for (lo, hi), (a, b) in zip(region, inside, strict=True)]
        if any(short):
            part = F.pad(part, [n for s in reversed(short) for n in (0, s)], mode="replicate")
        return _channels_last(part)


class Stored(Node):
    """A tensor kept in host memory, or in a file, in chunks of rows of the first axis.

    Chunks are given back as soon as the last reader has passed them, unless it is pinned.
    """

    fresh = False

    def __init__(self, channels, shape, rows: int, device, dtype, folder: Path | None = None):
        super().__init__(channels, shape)
        self.rows, self.device, self.dtype = rows, device, dtype
        self.file = tempfile.TemporaryFile(dir=folder) if folder else None
        self.chunks: dict[int, Tensor] = {}
        self.pins = 0
        self.lowest = 0  # first row that the tile at hand has read

    def write(self, region: Region, values: Tensor) -> None:
        """Keep a tile; it may span several chunks."""
        (lo, hi), *rest = region
        for k in range(lo // self.rows, -(-hi // self.rows)):
            first, last = k * self.rows, min((k + 1) * self.rows, self.shape[0])
            a, b = max(lo, first), min(hi, last)
            part = values[:, :, a - lo : b - lo]
            whole = (a, b) == (first, last) and all(
                r == (0, n) for r, n in zip(rest, self.shape[1:], strict=True)
            )
            if whole and values.device.type == "cpu" and (lo, hi) == (a, b):
                self.chunks[k] = part
            else:
                if k not in self.chunks:
                    self.chunks[k] = self._empty(last - first)
                index = (
                    slice(None),
                    slice(None),
                    slice(a - first, b - first),
                    *(slice(*r) for r in rest),
                )
                self.chunks[k][index] = part
            if (
                self.file
                and all(hi == n for (_, hi), n in zip(rest, self.shape[1:], strict=True))
                and b == last
            ):
                self._to_file(k)

    def _empty(self, rows: int) -> Tensor:
        shape = (1, self.channels, rows, *self.shape[1:])
        return torch.empty(shape, dtype=self.dtype, memory_format=LAYOUT[len(self.shape)])

    def _row_bytes(self) -> int:
        return self.dtype.itemsize * self.channels * math.prod(self.shape[1:])

    def _to_file(self, k: int) -> None:
        values = self.chunks.pop(k).movedim(1, -1).contiguous()
        self.file.seek(k * self.rows * self._row_bytes())
        self.file.write(memoryview(values.numpy()).cast("B"))

    def read(self, region):
        (lo, hi), *rest = region
        self.lowest = min(self.lowest, lo) if self.lowest >= 0 else lo
        index = [slice(*r) for r in rest]
        if self.file:
            self.file.seek(lo * self._row_bytes())
            raw = bytearray(self.file.read((hi - lo) * self._row_bytes()))
            values = torch.frombuffer(raw, dtype=self.dtype)
            values = values.view(1, hi - lo, *self.shape[1:], self.channels).movedim(-1, 1)
            return values[(slice(None), slice(None), slice(None), *index)].to(self.device)
        parts = []
        for k in range(lo // self.rows, -(-hi // self.rows)):
            first = k * self.rows
            rows = slice(max(lo - first, 0), min(hi - first, self.rows))
            parts.append(self.chunks[k][(slice(None), slice(None), rows, *index)])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).to(self.device)

    def begin_tile(self) -> None:
        """Forget what the last tile has read."""
        self.lowest = -1

    def free_passed(self) -> None:
        """Give back the chunks below the first row that the tile just done has read."""
        if self.pins == 0 and self.lowest > 0:
            for k in [k for k in self.chunks if (k + 1) * self.rows <= self.lowest]:
                del self.chunks[k]

    def free(self) -> None:
        """Give everything back."""
        if self.pins == 0:
            self.chunks.clear()
            if self.file:
                self.file.close()

    def held_bytes(self) -> int:
        """Bytes in memory now."""
        return sum(c.numel() * c.element_size() for c in self.chunks.values())

    def peak_bytes(self, region):
        return self.bytes(region)


class Kept(Node):
    """Remembers the last region it computed, so that overlapping halos are not computed twice."""

    fresh = False

    def __init__(self, source: Node):
        super().__init__(source.channels, source.shape, source)
        self.region: Region | None = None
        self.values: Tensor | None = None

    def read(self, region):
        (lo, hi), *rest = region
        if self.region is None or list(self.region[1:]) != rest:
            overlap = False
        else:
            (a, b) = self.region[0]
            overlap = lo < b and hi > a
        if not overlap:
            self.values = self.sources[0].read(region)
            self.region = region
            return self.values
        if a <= lo and hi <= b:
            return self.values[:, :, lo - a : hi - a]
        parts = [self.values[:, :, max(lo - a, 0) : min(hi, b) - a]]
        if lo < a:
            parts.insert(0, self.sources[0].read(((lo, a), *rest)))
        if hi > b:
            parts.append(self.sources[0].read(((b, hi), *rest)))
        self.values, self.region = torch.cat(parts, 2), region
        return self.values

    def forget(self) -> None:
        """Drop the remembered region."""
        self.region = self.values = None

    def peak_bytes(self, region):
        return self.sources[0].peak_bytes(region) + 2 * self.bytes(region)


class Pointwise(Node):
    """A function of each voxel's channels: activations, norms with known statistics."""

    fresh = False  # an identity gives back what it was given

    def __init__(
        self, source: Node, function: Callable[[Tensor], Tensor], channels: int | None = None
    ):
        super().__init__(channels or source.channels, source.shape, source)
        self.function = function

    def read(self, region):
        return self.function(self.sources[0].read(region))

    def operations(self):
        return super().operations() + 8


class Scaled(Node):
    """`act(x * scale + shift)` per channel: a norm whose statistics are known, and its activation."""

    def __init__(self, source: Node, scale: Tensor, shift: Tensor, act: nn.Module | None = None):
        super().__init__(source.channels, source.shape, source)
        dims = [1] * len(source.shape)
        self.scale, self.shift = scale.reshape(1, -1, *dims), shift.reshape(1, -1, *dims)
        if hasattr(act, "inplace"):
            act = copy.copy(act)
            act.inplace = True
        self.act = act

    def read(self, region):
        x = torch.addcmul(self.shift, self.sources[0].read(region), self.scale)
        return x if self.act is None else self.act(x)

    def operations(self):
        return super().operations() + 8


class Sum(Node):
    """The sum of two nodes: a residual connection. The first is the one with the larger halo."""

    def __init__(self, body: Node, shortcut: Node):
        super().__init__(body.channels, body.shape, body, shortcut)

    def read(self, region):
        body, shortcut = (s.read(region) for s in self.sources)
        return body.add_(shortcut) if self.sources[0].fresh else body + shortcut

    def operations(self):
        return sum(s.operations() for s in self.sources)


class Conv(Node):
    """A convolution with zeros beyond the volume, near and far padding per axis."""

    def __init__(self, source: Node, module: nn.Module, pad_near=None, pad_far=None):
        self.weight, self.bias = module.weight, module.bias
        self.stride, self.dilation, self.groups = module.stride, module.dilation, module.groups
        self.near = tuple(module.padding if pad_near is None else pad_near)
        self.far = tuple(self.near if pad_far is None else pad_far)
        self.reach = [
            d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        axes = zip(source.shape, self.near, self.far, self.reach, self.stride, strict=True)
        shape = [(n + a + b - r) // s + 1 for n, a, b, r, s in axes]
        super().__init__(module.out_channels, shape, source)
        self.function = F.conv3d if len(shape) == 3 else F.conv2d

    def _wants(self, region: Region) -> Region:
        """Input voxels, those beyond the volume included."""
        axes = zip(region, self.stride, self.near, self.reach, strict=True)
        return tuple((lo * s - p, (hi - 1) * s - p + r) for (lo, hi), s, p, r in axes)

    def needs(self, region):
        return _clip(self._wants(region), self.sources[0].shape)

    def read(self, region):
        wants, has = self._wants(region), self.needs(region)
        x = self.sources[0].read(has)
        missing = [(a - lo, hi - b) for (lo, hi), (a, b) in zip(wants, has, strict=True)]
        # Zeros on both sides alike are the kernel's business; on one side only they are added here.
        both = [near if near == far else 0 for near, far in missing]
        pads = [
            n
            for (near, far), p in zip(reversed(missing), reversed(both), strict=True)
            for n in (near - p, far - p)
        ]
        if any(pads):
            x = F.pad(x, pads)
        return self.function(
            _channels_last(x), self.weight, self.bias, self.stride, both, self.dilation, self.groups
        )

    def operations(self):
        taps = self.weight[0].numel()
        volume = math.prod(self.stride) * self.sources[0].channels / self.channels
        return 2 * taps + self.sources[0].operations() * volume


class TransposedConv(Node):
    """A transposed convolution; also a nearest upsampling folded into the convolution after it."""

    def __init__(self, source: Node, weight, bias, stride, padding, output_padding=None, groups=1):
        self.weight, self.bias, self.groups = weight, bias, groups
        self.stride, self.padding = tuple(stride), tuple(padding)
        self.kernel = tuple(weight.shape[2:])
        extra = output_padding or (0,) * len(self.stride)
        axes = zip(source.shape, self.stride, self.padding, self.kernel, extra, strict=True)
        shape = [(n - 1) * s - 2 * p + k + e for n, s, p, k, e in axes]
        super().__init__(weight.shape[1] * groups, shape, source)
        self.function = F.conv_transpose3d if len(shape) == 3 else F.conv_transpose2d

    def needs(self, region):
        axes = zip(region, self.stride, self.padding, self.kernel, strict=True)
        wants = tuple(
            (-(-(lo + p - k + 1) // s), (hi - 1 + p) // s + 1) for (lo, hi), s, p, k in axes
        )
        return _clip(wants, self.sources[0].shape)

    def read(self, region):
        has = self.needs(region)
        x = _channels_last(self.sources[0].read(has))
        y = self.function(x, self.weight, None, self.stride, 0, 0, self.groups)
        # Output voxel 0 of y is voxel a * stride - padding of the whole.
        cuts, pads = [], []
        for (lo, hi), (a, _), s, p, n in zip(
            region, has, self.stride, self.padding, y.shape[2:], strict=True
        ):
            start = lo - (a * s - p)
            cuts.append(slice(start, min(start + hi - lo, n)))
            pads.append(max(start + hi - lo - n, 0))
        y = y[(slice(None), slice(None), *cuts)]
        if any(pads):  # output_padding: voxels that no input reaches
            y = F.pad(y, [n for q in reversed(pads) for n in (0, q)])
        return y if self.bias is None else y + self.bias.reshape(1, -1, *[1] * len(cuts))

    def operations(self):
        taps = 2 * self.weight[:, 0].numel() / math.prod(self.stride)
        return taps + self.sources[0].operations() * self.sources[0].channels / self.channels


class Local(Node):
    """Any module whose output depends on input voxels at most `halo` away; its own padding holds.

    The module is run on the region with its halo, clipped to the volume, and the halo is cut off.

    Args:
        source: Its input.
        module: Maps `(1, C, *n)` to `(1, C', *n * grow / shrink)`.
        halo: Input voxels per axis.
        channels: C'.
        shrink: Input voxels per output voxel, per axis.
        grow: Output voxels per input voxel, per axis.
    """

    def __init__(self, source: Node, module, halo, channels: int, shrink=None, grow=None):
        dims = len(source.shape)
        self.module, self.halo = module, (halo,) * dims if isinstance(halo, int) else tuple(halo)
        self.shrink, self.grow = shrink or (1,) * dims, grow or (1,) * dims
        axes = zip(source.shape, self.shrink, self.grow, strict=True)
        super().__init__(channels, [n // s * g for n, s, g in axes], source)

    def needs(self, region):
        axes = zip(region, self.shrink, self.grow, self.halo, strict=True)
        wants = []
        for (lo, hi), s, g, h in axes:
            h = -(-h // s) * s  # whole output voxels
            wants.append((lo // g * s - h, -(-hi // g) * s + h))
        return _clip(tuple(wants), self.sources[0].shape)

    def read(self, region):
        has = self.needs(region)
        y = self.module(self.sources[0].read(has))
        axes = zip(region, has, self.shrink, self.grow, strict=True)
        cuts = [slice(lo - a // s * g, hi - a // s * g) for (lo, hi), (a, _), s, g in axes]
        return _channels_last(y[(slice(None), slice(None), *cuts)])

    def operations(self):
        return 1e9  # unknown: never computed twice for speed


def _clip(region: Region, shape: Sequence[int]) -> Region:
    return tuple((max(lo, 0), min(hi, n)) for (lo, hi), n in zip(region, shape, strict=True))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=LAYOUT[x.ndim - 2])


# Statistics --------------------------------------------------------------------------------------


class Moments:
    """Mean and variance per channel over a whole volume, merged from tiles in float64.

    Chan, Golub and LeVeque 1979: each block is centered on its own mean, so no digits are lost to a
    large mean, and the variance between blocks is added when they are merged.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.m2 = torch.zeros(channels, dtype=torch.float64)

    def update(self, tile: Tensor) -> None:
        """Merge a tile `(1, C, *n)`."""
        values = tile.movedim(1, -1).reshape(-1, tile.shape[1])
        for block in values.split(1 << 16):
            n = len(block)
            center = block.mean(0)
            off = block - center
            rest = off.sum(0).double().cpu() / n
            m2 = off.square_().sum(0).double().cpu() - n * rest**2
            delta = center.double().cpu() + rest - self.mean
            total = self.count + n
            self.mean += delta * (n / total)
            self.m2 += m2 + delta**2 * (self.count * n / total)
            self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel, shared within each of `groups` groups of channels."""
        mean = self.mean.view(groups, -1)
        shared = mean.mean(1, keepdim=True)
        variance = (self.m2.view(groups, -1) / self.count + (mean - shared) ** 2).mean(
            1, keepdim=True
        )
        size = mean.shape[1]
        return shared.expand(-1, size).reshape(-1), variance.expand(-1, size).reshape(-1)


# The executor ------------------------------------------------------------------------------------


class Executor:
    """Settles nodes within a memory budget.

    Args:
        memory_gb: What may be in use at once, the input volume apart; None takes half of what is
            free.
        tile: Largest tile per axis in voxels of the grid at hand; None lets the budget choose.
        scratch_dir: Where activations go that fit no other way; None for the system's place.
    """

    def __init__(self, memory_gb: float | None = None, tile=None, scratch_dir=None):
        if memory_gb is None:
            import psutil

            memory_gb = psutil.virtual_memory().available / 2 / 2**30
        if memory_gb <= 0:
            raise ValueError(f"memory_gb is {memory_gb}; give a positive number of GiB")
        self.budget = int(memory_gb * 2**30)
        self.work = min(self.budget // 5, 256 << 20)
        self.tile, self.scratch_dir = tile, Path(scratch_dir or tempfile.gettempdir())
        self.live: list[Stored] = []

    def tiles(self, node: Node) -> list[list[Region]]:
        """The tiles of a node, grouped by rows of the first axis, as large as the work space allows."""
        size = list(self.tile or node.shape)
        size = [min(s, n) for s, n in zip(size, node.shape, strict=True)]
        if self.tile is None:
            size[0] = min(size[0], 16)
            while node.peak_bytes(_middle(node.shape, size)) > self.work and max(size) > 1:
                # Thinner slabs first: whole planes keep the halo on one axis.
                axis = 0 if size[0] > 2 else max(range(len(size)), key=lambda i: size[i])
                size[axis] = -(-size[axis] // 2)
        edges = [
            [(a, min(a + s, n)) for a in range(0, n, s)]
            for n, s in zip(node.shape, size, strict=True)
        ]
        return [[(first, *rest) for rest in itertools.product(*edges[1:])] for first in edges[0]]

    def walk(self, module: nn.Module, node: Node) -> Node:
        """Extend the graph by a module: by its handler, its declared halo, or in full."""
        for cls in type(module).__mro__:
            if cls in HANDLERS and all(
                getattr(cls, name, None) is getattr(type(module), name, None)
                for name in ("forward", "normalize")
            ):
                return HANDLERS[cls](self, module, node)
        if hasattr(module, "halo"):
            return self.local(module, node, module.halo)
        warnings.warn(
            f"exact mode runs {type(module).__name__} on the whole volume at once: it has no handler "
            "and declares no `halo`"
        )
        return self.in_full(module, node)

    def local(self, module, node: Node, halo) -> Node:
        """A module of limited reach, tile by tile."""
        factor = getattr(module, "factor", None)
        resize = {}
        if isinstance(module, downsample.Down):
            resize = {"shrink": factor}
        elif isinstance(module, upsample.Up):
            resize = {"grow": factor}
        channels = getattr(module, "out_channels", node.channels)
        return Local(keep(node), module, halo, channels, **resize)

    def in_full(self, module, node: Node) -> Node:
        """A module that needs its whole input."""
        whole = tuple((0, n) for n in node.shape)
        x = node.read(whole)
        self.release(node)
        return self.hold(module(x))

    def hold(self, values: Tensor) -> Stored:
        """Store a whole tensor `(1, C, *shape)`."""
        shape = values.shape[2:]
        stored = Stored(values.shape[1], shape, shape[0], values.device, values.dtype)
        stored.write(tuple((0, n) for n in shape), _channels_last(values))
        self.live.append(stored)
        return stored

    def settle(self, node: Node) -> Node:
        """Compute a node's statistics; store it where the budget allows. The node to read from then.

        What it was computed from is given back on the way, unless it is pinned.
        """
        if node.moments is not None:
            return node
        if isinstance(node, Stored):
            result, store = node, False
        elif node.operations() < CHEAP:
            result, store = keep(node), False
        else:
            result, store = self._place(node)
        moments = Moments(node.channels)
        for row in self.tiles(node):
            self._begin_row(node)
            for region in row:
                values = node.read(region)
                moments.update(values)
                if store:
                    result.write(region, values)
                del values
            if store:
                self._free_passed(node)
        if store:
            self.release(node)
        result.moments = moments
        return result

    def _place(self, node: Node) -> tuple[Node, bool]:
        """Where a node that is worth storing goes: memory, nowhere (computed again), or a file."""
        leaves = _leaves(node)
        held = sum(s.held_bytes() for s in self.live)
        passing = sum(s.held_bytes() for s in leaves if s.pins == 0)
        rows = self.tiles(node)[0][0][0][1]
        fits = held - passing + max(passing, node.bytes()) + 2 * self.work <= self.budget
        if not fits and _depth(node) < 1:
            return keep(node), False
        folder = None if fits else self.scratch_dir
        stored = Stored(node.channels, node.shape, rows, *_where(node), folder)
        self.live.append(stored)
        return stored, True

    def _begin_row(self, node: Node) -> None:
        for leaf in _leaves(node):
            leaf.begin_tile()

    def _free_passed(self, node: Node) -> None:
        for leaf in _leaves(node):
            leaf.free_passed()

    def release(self, node: Node) -> None:
        """Give back what a node was computed from."""
        for leaf in _leaves(node):
            leaf.free()
        for kept in _nodes(node, Kept):
            kept.forget()
        self.live = [s for s in self.live if s.chunks or (s.file and not s.file.closed)]

    def slabs(self, node: Node) -> Iterator[tuple[Region, Tensor]]:
        """The finished tiles of the last node, in order."""
        for row in self.tiles(node):
            self._begin_row(node)
            for region in row:
                yield region, node.read(region)
            self._free_passed(node)
        self.release(node)


def keep(node: Node) -> Node:
    """A node that may be read with overlap."""
    return node if isinstance(node, (Stored, Kept, Source)) else Kept(node)


def _nodes(node: Node, kind: type) -> list:
    found = [node] if isinstance(node, kind) else []
    for source in node.sources:
        found += [n for n in _nodes(source, kind) if n not in found]
    return found


def _leaves(node: Node) -> list[Stored]:
    return _nodes(node, Stored)


def _where(node: Node) -> tuple[torch.device, torch.dtype]:
    while node.sources:
        node = node.sources[0]
    return node.device, node.dtype


def _depth(node: Node) -> int:
    """How many settled nodes in a row are computed again."""
    below = max((_depth(s) for s in node.sources), default=0)
    return below + (
        isinstance(node, Kept) and node.moments is not None and node.operations() >= CHEAP
    )


def _middle(shape: Sequence[int], size: Sequence[int]) -> Region:
    starts = [(n - s) // 2 for n, s in zip(shape, size, strict=True)]
    return tuple((a, a + s) for a, s in zip(starts, size, strict=True))


# Handlers: how each class of module extends the graph ----------------------------------------------


def _chain(run: Executor, module, node: Node) -> Node:
    for layer in module:
        node = run.walk(layer, node)
    return node


def _block(run: Executor, module, node: Node) -> Node:
    """`shortcut(x) + body(x)`: the input is read by both."""
    if module.shortcut is None:
        return run.walk(module.body, node)
    first = next(m for m in module.body.modules() if not isinstance(m, nn.Sequential))
    node = run.settle(node) if isinstance(first, (norm.Norm, norm.NormAct)) else keep(node)
    pinned = _leaves(node)
    for leaf in pinned:
        leaf.pins += 1
    body = run.walk(module.body, node)
    for leaf in pinned:
        leaf.pins -= 1
    return Sum(body, run.walk(module.shortcut, node))


def _conv(run: Executor, module, node: Node) -> Node:
    assert module.padding_mode == "zeros"
    return Conv(keep(node), module)


def _conv_transpose(run: Executor, module, node: Node) -> Node:
    assert module.dilation == (1,) * len(node.shape)
    return TransposedConv(
        keep(node),
        module.weight,
        module.bias,
        module.stride,
        module.padding,
        module.output_padding,
        module.groups,
    )


def _conv_down(run: Executor, module, node: Node) -> Node:
    if module.far_padding is None:
        return Conv(keep(node), module.conv)
    pairs = list(zip(module.far_padding[::2], module.far_padding[1::2], strict=True))[::-1]
    near, far = zip(*pairs, strict=True)
    return Conv(keep(node), module.conv, near, far)


def _interp_up(run: Executor, module, node: Node) -> Node:
    if module.mode == "nearest":
        weight = fold_nearest(module.conv.weight, module.factor)
        return TransposedConv(
            keep(node), weight, module.conv.bias, module.factor, module.conv.padding
        )
    grown = Local(
        keep(node),
        lambda x: upsample.interpolate(x, module.factor, module.mode),
        halo=1,
        channels=node.channels,
        grow=module.factor,
    )
    return Conv(keep(grown), module.conv)


def fold_nearest(weight: Tensor, factor: Sequence[int]) -> Tensor:
    """Kernel of the transposed convolution that equals nearest upsampling and then `weight`.

    Upsampled voxel j is input voxel j // f, so output voxel o = i * f + t - p takes weight[d] from
    input voxel i wherever 0 <= t - 2 p + d < f: taps that meet the same input voxel are summed. For
    f = 2 and kernel 3 that is 4^3 / 2^3 = 8 products per output voxel in place of 27.

    Args:
        weight: `(C_out, C_in, *kernel)`, odd kernel with padding p = (kernel - 1) / 2.
        factor: Growth per axis.

    Returns:
        `(C_in, C_out, *kernel + factor - 1)`.
    """
    folded = weight.double().transpose(0, 1)
    for axis, f in enumerate(factor, start=2):
        k = folded.shape[axis]
        fold = torch.zeros(f + k - 1, k, dtype=torch.float64, device=weight.device)
        for t, d in itertools.product(range(f + k - 1), range(k)):
            fold[t, d] = 0 <= t - (k - 1) + d < f
        folded = (folded.movedim(axis, -1) @ fold.T).movedim(-1, axis)
    return folded.to(weight.dtype).contiguous(memory_format=LAYOUT[weight.ndim - 2])


def _norm_act(run: Executor, module, node: Node) -> Node:
    normed = run.walk(module.norm, node)
    if isinstance(normed, Scaled):
        return Scaled(normed.sources[0], normed.scale, normed.shift, module.act)
    return Pointwise(normed, module.act)


def _group_norm(run: Executor, module, node: Node) -> Node:
    """Group norm with the statistics of the whole volume: an affine map per channel."""
    node = run.settle(node)
    mean, variance = node.moments.of_groups(module.num_groups)
    device, dtype = module.weight.device, module.weight.dtype
    scale = module.weight.double().cpu() / torch.sqrt(variance + module.eps)
    shift = module.bias.double().cpu() - mean * scale
    return Scaled(node, scale.to(device, dtype), shift.to(device, dtype))


def _pointwise(run: Executor, module, node: Node) -> Node:
    return Pointwise(node, module)


def _same(run: Executor, module, node: Node) -> Node:
    return node


def _global_attention(run: Executor, module, node: Node) -> Node:
    """Keys and values of every voxel, queries in chunks."""
    node = run.settle(node)
    whole = tuple((0, n) for n in node.shape)
    x = node.read(whole)
    tokens = run.walk(module.norm, node).read(whole).flatten(2).transpose(1, 2)  # (1, N, C)
    run.release(node)
    heads, width = module.num_heads, module.qkv.out_features // 3

    def project(part: int, rows: Tensor) -> Tensor:
        weight = module.qkv.weight[part * width : (part + 1) * width]
        bias = (
            None if module.qkv.bias is None else module.qkv.bias[part * width : (part + 1) * width]
        )
        return F.linear(rows, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

    k, v = project(1, tokens), project(2, tokens)
    out = torch.empty_like(tokens)
    for rows in torch.arange(tokens.shape[1]).split(4096):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        attended = attention.attend(project(0, tokens[:, rows]), k, v)
        out[:, rows] = module.proj(attended.transpose(1, 2).flatten(2))
    return run.hold(x + out.transpose(1, 2).reshape(x.shape))


HANDLERS: dict[type, Callable[[Executor, nn.Module, Node], Node]] = {
    nn.Sequential: _chain,
    custom_vae.Chain: _chain,
    nn.Identity: _same,
    nn.Dropout: _same,
    blocks.Block: _block,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
    downsample.ConvDown: _conv_down,
    upsample.InterpUp: _interp_up,
    norm.NormAct: _norm_act,
    norm.GroupNorm: _group_norm,
    attention.GlobalAttention: _global_attention,
    nn.Tanh: _pointwise,
    nn.Sigmoid: _pointwise,
    **{type(make()): _pointwise for name, make in norm.ACTIVATIONS.items() if name != "none"},
}


# The two halves of a VAE ---------------------------------------------------------------------------


@torch.no_grad()
def encode_exact(
    vae: nn.Module, volume, memory_gb: float | None = None, *, tile=None, scratch_dir=None
) -> DiagonalGaussian:
    """Posterior of a whole volume, equal to `vae.encode`, in bounded memory.

    Args:
        vae: The model, in eval mode.
        volume: (C, X, Y, Z) or (C, X, Y): tensor, array or memory map.
        memory_gb: Memory budget in GiB, the volume apart; None takes half of what is free.
        tile: Largest tile per axis; None lets the budget choose.
        scratch_dir: Folder for activations that fit no other way.

    Returns:
        Posterior with mean and logvar of (C', *spatial / factor).
    """
    assert not vae.training
    run = Executor(memory_gb, tile, scratch_dir)
    shape = [-(-n // f) * f for n, f in zip(volume.shape[1:], vae.factor, strict=True)]
    node = Source(volume, shape, *_home(vae))
    node = run.walk(vae.quant_conv, run.walk(vae.encoder, node))
    moments = torch.empty(1, node.channels, *node.shape)
    for region, values in run.slabs(node):
        moments[(slice(None), slice(None), *(slice(*r) for r in region))] = values
    posterior = vae.head(moments)
    return DiagonalGaussian(posterior.mean[0], posterior.logvar[0])


@torch.no_grad()
def decode_exact(
    vae: nn.Module,
    z,
    memory_gb: float | None = None,
    *,
    out=None,
    size=None,
    tile=None,
    scratch_dir=None,
):
    """Reconstruction of a whole latent, equal to `vae.decode`, in bounded memory.

    Args:
        vae: The model, in eval mode.
        z: (C, *spatial): tensor, array or memory map.
        memory_gb: Memory budget in GiB, latent and result apart; None takes half of what is free.
        out: Array or memory map (C', *size) to write to; default a new tensor.
        size: Crop the result to these voxels per axis, the size of the volume that was encoded.
        tile: Largest tile per axis; None lets the budget choose.
        scratch_dir: Folder for activations that fit no other way.

    Returns:
        (C', *size) float32; `out` when it is given.
    """
    assert not vae.training
    run = Executor(memory_gb, tile, scratch_dir)
    node = Source(z, z.shape[1:], *_home(vae))
    node = run.walk(vae.post_quant_conv, node)
    node = run.walk(vae.output, run.walk(vae.decoder, node))
    size = tuple(size or node.shape)
    if out is None:
        out = torch.empty(node.channels, *size)
    for region, values in run.slabs(node):
        inside = _clip(region, size)
        if all(lo < hi for lo, hi in inside):
            values = values[0][(slice(None), *(slice(hi - lo) for lo, hi in inside))].float()
            values = values.to(out.device) if isinstance(out, Tensor) else values.cpu().numpy()
            out[(slice(None), *(slice(*r) for r in inside))] = values
    return out


def _home(vae: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(vae.parameters())
    return parameter.device, parameter.dtype
