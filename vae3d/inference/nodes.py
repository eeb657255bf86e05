"""A network as a graph of nodes, of which any region can be computed on demand.

A node pulls the region it needs, halo included, from the nodes before it. `Source` and `Stored` are
the ends of the pull; `Kept` remembers its last region, so that halos are not computed twice.

Axes: b batch (always 1 here), c channels, x y z space. A region is ((lo, hi), ...) per axis.
"""
# ruff: noqa: D102 - what read, needs, operations and peak_bytes do is said once, in Node

import copy
import math
import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Region = tuple[tuple[int, int], ...]

LAYOUT = {2: torch.channels_last, 3: torch.channels_last_3d}


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
        return max(peak, held + self.bytes(region))

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
        return channels_last(part)


class Stored(Node):
    """A tensor kept in host memory, or in a file, in chunks of rows of the first axis.

    Chunks are given back as soon as the last reader has passed them, unless it is pinned.
    """

    fresh = False

    def __init__(self, channels, shape, rows: int, device, dtype, folder: Path | None = None):
        super().__init__(channels, shape)
        self.rows, self.device, self.dtype = rows, device, dtype
        self.file = tempfile.TemporaryFile(dir=folder) if folder else None  # noqa: SIM115
        self.chunks: dict[int, Tensor] = {}
        self.pins = 0
        self.lowest = -1  # first row that the tiles at hand have read; -1 for none

    def write(self, region: Region, values: Tensor) -> None:
        """Keep a tile, which lies in one chunk."""
        (lo, hi), *rest = region
        number = lo // self.rows
        assert hi <= min((number + 1) * self.rows, self.shape[0])
        sizes = [min((number + 1) * self.rows, self.shape[0]) - number * self.rows, *self.shape[1:]]
        if number not in self.chunks:
            self.chunks[number] = self._allocate(sizes)
        lo, hi = lo - number * self.rows, hi - number * self.rows
        index = (slice(None), slice(None), slice(lo, hi), *(slice(*r) for r in rest))
        self.chunks[number][index] = values
        complete = all(hi == n for (_, hi), n in zip(rest, self.shape[1:], strict=True))
        if self.file and complete:
            self._to_file(number)

    def _allocate(self, sizes: Sequence[int]) -> Tensor:
        """Memory of its own pages, given back whole: stored chunks must not hold the heap open."""
        pages = mmap.mmap(-1, self.dtype.itemsize * self.channels * math.prod(sizes))
        return torch.frombuffer(pages, dtype=self.dtype).view(1, *sizes, -1).movedim(-1, 1)

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

    def begin_row(self) -> None:
        """Forget what the last row of tiles has read."""
        self.lowest = -1

    def free_passed(self) -> None:
        """Give back the chunks below the first row that the last tiles have read."""
        if self.pins == 0 and self.lowest > 0:
            for k in [k for k in self.chunks if (k + 1) * self.rows <= self.lowest]:
                del self.chunks[k]

    def free(self) -> None:
        """Give everything back."""
        if self.pins == 0:
            self.chunks.clear()
            if self.file:
                self.file.close()

    def in_use(self) -> bool:
        """Whether it still holds anything."""
        return bool(self.chunks) or bool(self.file and not self.file.closed)

    def lag_bytes(self) -> int:
        """What is still held of rows that are done: chunks go one row of tiles late."""
        return 0 if self.file else min(2 * self.rows, self.shape[0]) * self._row_bytes()

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
    """`act(x * scale + shift)` per channel: a norm with known statistics and its activation."""

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
        self.weight, self.bias = channels_last(module.weight), module.bias
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
        return clip(self._wants(region), self.sources[0].shape)

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
        return self._convolve(channels_last(x), both)

    def _convolve(self, x: Tensor, padding: Sequence[int]) -> Tensor:
        """The convolution; on the CPU by oneDNN directly.

        PyTorch's own choice for small float32 tiles is a kernel that takes up to six times as long.
        """
        direct = x.device.type == "cpu" and x.dtype == torch.float32 and self.groups == 1
        if direct and torch.backends.mkldnn.is_available():
            if self.weight[0, 0].numel() == 1 and max(self.stride) == 1 and not any(padding):
                y = F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias)
                return y.movedim(-1, 1)
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, padding, self.stride, self.dilation, 1
            )
        return self.function(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
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
        return clip(wants, self.sources[0].shape)

    def read(self, region):
        has = self.needs(region)
        x = channels_last(self.sources[0].read(has))
        y = self.function(x, self.weight, self.bias, self.stride, 0, 0, self.groups)
        # Output voxel 0 of y is voxel a * stride - padding of the whole.
        cuts, pads = [], []
        for (lo, hi), (a, _), s, p, n in zip(
            region, has, self.stride, self.padding, y.shape[2:], strict=True
        ):
            start = lo - (a * s - p)
            cuts.append(slice(start, min(start + hi - lo, n)))
            pads.append(max(start + hi - lo - n, 0))
        y = y[(slice(None), slice(None), *cuts)]
        if any(pads):  # output_padding: voxels that no input reaches have the bias alone
            y = F.pad(y, [n for q in reversed(pads) for n in (0, q)])
            for axis, q in enumerate(pads, start=2):
                if q and self.bias is not None:
                    bias = self.bias.reshape(1, -1, *[1] * len(pads))
                    y.narrow(axis, y.shape[axis] - q, q).copy_(bias)
        return y

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
        return clip(tuple(wants), self.sources[0].shape)

    def read(self, region):
        has = self.needs(region)
        y = self.module(self.sources[0].read(has))
        axes = zip(region, has, self.shrink, self.grow, strict=True)
        cuts = [slice(lo - a // s * g, hi - a // s * g) for (lo, hi), (a, _), s, g in axes]
        return channels_last(y[(slice(None), slice(None), *cuts)])

    def operations(self):
        return 1e9  # unknown, so it counts as dear


def clip(region: Region, shape: Sequence[int]) -> Region:
    """The part of a region that lies inside the volume."""
    return tuple((max(lo, 0), min(hi, n)) for (lo, hi), n in zip(region, shape, strict=True))


def channels_last(x: Tensor) -> Tensor:
    """`x` with its channels innermost in memory."""
    return x.contiguous(memory_format=LAYOUT[x.ndim - 2])


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
        for block in values.split(1 << 14):
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


def nodes_of(node: Node, kind: type) -> list:
    """All nodes of a class that a node is computed from, itself included."""
    found = [node] if isinstance(node, kind) else []
    for source in node.sources:
        found += [n for n in nodes_of(source, kind) if n not in found]
    return found


def leaves_of(node: Node) -> list[Stored]:
    """The stored tensors that a node is computed from."""
    return nodes_of(node, Stored)


def home_of(node: Node) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a node is computed in."""
    while node.sources:
        node = node.sources[0]
    return node.device, node.dtype


def whole_of(shape: Sequence[int]) -> Region:
    """The region that covers `shape`."""
    return tuple((0, n) for n in shape)


def middle_of(shape: Sequence[int], size: Sequence[int]) -> Region:
    """A tile of `size` in the middle of `shape`."""
    starts = [(n - s) // 2 for n, s in zip(shape, size, strict=True)]
    return tuple((a, a + s) for a, s in zip(starts, size, strict=True))
