"""A network as a graph of nodes, of which any region can be computed on demand.

A node pulls the region it needs, halo included, from the nodes before it. `Source` and `Stored` are
the ends of the pull; `Kept` remembers its last rows, so that halos are not computed twice.

Axes: b batch (always 1 here), c channels, x y z space. A region is ((lo, hi), ...) per axis.
"""
# ruff: noqa: D102 - what read, needs, operations, peak_bytes and new_bytes do is said in Node

import copy
import math
import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.kernels import convolutions, winograd
from vae3d.kernels.convolutions import Axes, Ends, Maybe
from vae3d.kernels.large import Lazy
from vae3d.kernels.memory import CHANNELS_LAST, channels_last, private_pages
from vae3d.kernels.moments import Moments
from vae3d.kernels.upsampling import Phases
from vae3d.models.reach import Cells, Reach, Spread, windows_of

Array = Tensor | np.ndarray | Lazy  # a memory map too
Function = Callable[[Tensor], Tensor]
Home = tuple[torch.device, torch.dtype]
Region = tuple[tuple[int, int], ...]
Place = torch.device | Path  # memory of a device, or a folder
N = TypeVar("N", bound="Node")

GRAIN = mmap.PAGESIZE  # bytes: memory is given back in pages


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

    def write(self, region: Region, out: Tensor) -> None:
        """Compute a region into memory that is there, `(1, C, *region)`."""
        out.copy_(self.read(region))

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
            held += source.new_bytes(inner)
        return max(peak, held + self.new_bytes(region))

    def new_bytes(self, region: Region) -> int:
        """Bytes of what a read of a region returns, as far as it is not stored already."""
        return self.bytes(region)

    def bytes(self, region: Region | None = None) -> int:
        """Size of a region, or of the whole, in float32."""
        sizes = self.shape if region is None else [hi - lo for lo, hi in region]
        return 4 * self.channels * math.prod(sizes)


class Leaf(Node):
    """An end of the pull: its values are there."""

    fresh = False

    def __init__(self, channels: int, shape: Axes, home: Home):
        super().__init__(channels, shape)
        self.device, self.dtype = home


class Source(Leaf):
    """The input volume `(C, *spatial)`; voxels past its end repeat the last ones."""

    def __init__(self, volume: Array, shape: Axes, device: torch.device, dtype: torch.dtype):
        super().__init__(volume.shape[0], shape, (device, dtype))
        self.volume = volume

    def read(self, region: Region) -> Tensor:
        axes = zip(region, self.volume.shape[1:], strict=True)
        inside = [(min(lo, n - 1), min(hi, n)) for (lo, hi), n in axes]
        part = self.volume[(slice(None), *(slice(*r) for r in inside))]
        if not isinstance(part, Tensor):
            part = torch.from_numpy(np.array(part))
        part = part[None].to(self.device, self.dtype)
        short = [(hi - lo) - (b - a) for (lo, hi), (a, b) in zip(region, inside, strict=True)]
        if any(short):
            part = F.pad(part, [n for s in reversed(short) for n in (0, s)], mode="replicate")
        return channels_last(part)


class Stored(Leaf):
    """A tensor kept in a device's memory, or in a file that is mapped, channels innermost.

    In host memory it grows as it is written, and rows are given back as its last reader passes
    them; a GPU's memory is taken and given back whole.
    """

    def __init__(self, channels: int, shape: Axes, home: Home, place: Place):
        super().__init__(channels, shape, home)
        self.place = place
        self.pages = self._pages()
        if self.pages is None:
            size = math.prod((channels, *shape))
            flat = torch.empty(size, dtype=self.dtype, device=self.device)
        else:
            flat = torch.frombuffer(self.pages, dtype=self.dtype)
        self.values = flat.view(1, *shape, -1).movedim(-1, 1)
        self.first, self.past = 0, 0 if self.pages else self.shape[0]  # rows in use
        self.lowest: int | None = None  # first row read by the tiles at hand

    def _pages(self) -> mmap.mmap | None:
        """Its memory on the host or in a file; None for that of a GPU."""
        size = self.rows_bytes(self.shape[0])
        if isinstance(self.place, Path):
            with tempfile.TemporaryFile(dir=self.place) as file:
                file.truncate(size)
                return mmap.mmap(file.fileno(), size)
        return private_pages(size) if self.place.type == "cpu" else None

    @property
    def in_file(self) -> bool:
        """Whether it lies in a file."""
        return isinstance(self.place, Path)

    def take(self, source: Node, region: Region) -> Tensor:
        """Compute a region of what is stored here; the values, where they were computed."""
        part = self.part(region)
        if part.device == self.device:
            source.write(region, part)
            return part
        values = source.read(region)
        part.copy_(values)
        return values

    def part(self, region: Region) -> Tensor:
        """The memory of a region, to be written to."""
        self.past = max(self.past, region[0][1])
        return self.values[(slice(None), slice(None), *(slice(*r) for r in region))]

    def read(self, region: Region) -> Tensor:
        lo = region[0][0]
        self.lowest = lo if self.lowest is None else min(self.lowest, lo)
        part = self.values[(slice(None), slice(None), *(slice(*r) for r in region))]
        return part.to(self.device)

    def let_go(self) -> None:
        """Unmap what is in a file; its pages stay the system's business."""
        if self.pages and self.in_file and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)

    def free_passed(self) -> None:
        """Give back the rows before the first one that the tiles at hand have read."""
        if self.pages is None:
            return
        lowest = self.lowest or 0
        start, stop = (self.rows_bytes(n) // GRAIN * GRAIN for n in (self.first, lowest))
        if start < stop and not self.in_file and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED, start, stop - start)
        self.first, self.lowest = max(self.first, lowest), None

    def free(self) -> None:
        """Give everything back."""
        del self.values
        self.pages = None
        self.first = self.past

    def held_bytes(self) -> int:
        """Bytes in memory now."""
        return 0 if self.in_file else self.rows_bytes(self.past - self.first)

    def rows_bytes(self, rows: int) -> int:
        """Bytes of some rows."""
        return rows * self.dtype.itemsize * self.channels * math.prod(self.shape[1:])

    def peak_bytes(self, region: Region) -> int:
        return 0

    def new_bytes(self, region: Region) -> int:
        return 0


class Kept(Node):
    """Remembers the rows it computed last, so that overlapping halos are not computed twice.

    It is also the handle of a node that may move into storage: once its source is `Stored`, it only
    passes on. `overlap` rows of every column of tiles are kept from one tile to the next.
    """

    fresh = False

    def __init__(self, source: Node):
        super().__init__(source.channels, source.shape, source)
        self.overlap = 0
        self.columns: dict[Region, tuple[int, Tensor]] = {}  # first row and values, by column
        self.region: Region | None = None  # read last

    @property
    def is_stored(self) -> bool:
        """Whether its values lie in storage."""
        return isinstance(self.sources[0], Stored)

    def read(self, region: Region) -> Tensor:
        source, ((lo, hi), *rest) = self.sources[0], region
        if self.is_stored:
            return source.read(region)
        if self.region is not None and contains(self.region, region):
            _, held = self.columns[self.region[1:]]
            axes = zip(region, self.region, strict=True)
            where = [slice(lo - a, hi - a) for (lo, hi), (a, _) in axes]
            return held[(slice(None), slice(None), *where)]
        a, values = self.columns.get(tuple(rest), (0, None))
        if values is None or hi <= a or lo >= (b := a + values.shape[2]):
            values = source.read(region)
        elif lo < a or hi > b:
            first, last = max(lo, a), min(hi, b)
            kept = values[:, :, first - a : last - a]
            values = convolutions.empty_like(kept, (hi - lo, *kept.shape[3:]))
            values[:, :, first - lo : last - lo] = kept
            for start, stop in ((lo, first), (last, hi)):
                if start < stop:
                    source.write(((start, stop), *rest), values[:, :, start - lo : stop - lo])
        else:
            values = values[:, :, lo - a : hi - a]
        self.columns[tuple(rest)], self.region = (lo, values), region
        return values

    def trim(self) -> None:
        """After a tile: keep only the rows that the next one of its column shares."""
        for column, (a, values) in list(self.columns.items()):
            skip = values.shape[2] - self.overlap
            if not self.overlap:
                del self.columns[column]
            elif skip > 0:
                self.columns[column] = a + skip, values[:, :, skip:].clone()
        self.region = None

    def forget(self) -> None:
        """Drop the remembered rows."""
        self.columns.clear()
        self.region = None

    def peak_bytes(self, region: Region) -> int:
        return max(self.sources[0].peak_bytes(region), 2 * self.new_bytes(region))

    def new_bytes(self, region: Region) -> int:
        return self.sources[0].new_bytes(region)

    def between_bytes(self) -> int:
        """What is kept between the tiles of a volume of several columns."""
        return 0 if self.is_stored else self.bytes() // self.shape[0] * self.overlap


class Pointwise(Node):
    """A function of each voxel's channels: activations, norms with known statistics."""

    fresh = False  # an identity gives back what it was given

    def __init__(self, source: Node, function: Function):
        super().__init__(source.channels, source.shape, source)
        self.function = function

    def read(self, region: Region) -> Tensor:
        return self.function(self.sources[0].read(region))

    def operations(self) -> float:
        return super().operations() + 8


class Scaled(Node):
    """`act(x * scale + shift)` per channel: a norm with known statistics and its activation."""

    def __init__(self, source: Node, scale: Tensor, shift: Tensor, act: nn.Module | None = None):
        super().__init__(source.channels, source.shape, source)
        dims = [1] * len(source.shape)
        self.scale, self.shift = scale.reshape(1, -1, *dims), shift.reshape(1, -1, *dims)
        if hasattr(act, "inplace"):
            act = copy.copy(act)
            act.__dict__["inplace"] = True
        self.act = act

    def read(self, region: Region) -> Tensor:
        x = torch.addcmul(self.shift, self.sources[0].read(region), self.scale)
        return x if self.act is None else self.act(x)

    def operations(self) -> float:
        return super().operations() + 8


class Sum(Node):
    """The sum of two nodes: a residual connection. The first is the one with the larger halo."""

    def __init__(self, body: Node, shortcut: Node):
        super().__init__(body.channels, body.shape, body, shortcut)

    def read(self, region: Region) -> Tensor:
        body, shortcut = (s.read(region) for s in self.sources)
        return body.add_(shortcut) if self.sources[0].fresh else body + shortcut

    def write(self, region: Region, out: Tensor) -> None:
        body, shortcut = (s.read(region) for s in self.sources)
        if out.device == body.device:
            torch.add(body, shortcut, out=out)
        else:
            out.copy_(body + shortcut)

    def operations(self) -> float:
        return sum(s.operations() for s in self.sources)


class Conv(Node):
    """A convolution with zeros beyond the volume, near and far padding per axis."""

    def __init__(self, source: Node, module: convolutions.Conv, padding: Ends = ()):
        self.weight, self.bias = channels_last(module.weight), module.bias
        self.stride, self.dilation, self.groups = module.stride, module.dilation, module.groups
        self.reach = windows_of(module, padding)
        super().__init__(module.out_channels, sizes_of(self.reach, source.shape), source)

    def _wants(self, region: Region) -> Region:
        """Input voxels, those beyond the volume included."""
        return wanted(self.reach, region)

    def needs(self, region: Region) -> Region:
        return clip(self._wants(region), self.sources[0].shape)

    def read(self, region: Region) -> Tensor:
        wants, has = self._wants(region), self.needs(region)
        x = channels_last(self.sources[0].read(has))
        missing = [(a - lo, hi - b) for (lo, hi), (a, b) in zip(wants, has, strict=True)]
        # Zeros at one end only: along x they are added, elsewhere at both ends, and what comes of
        # the ones too many is cut off. Rows are few and costly, copies of a slab as well.
        spare = [(0, 0)] * len(missing)
        if set(self.stride) == {1}:
            spare[1:] = [(max(far - near, 0), max(near - far, 0)) for near, far in missing[1:]]
        missing = [(a + p, b + q) for (a, b), (p, q) in zip(missing, spare, strict=True)]
        x, padding = convolutions.pad_uneven(x, missing)
        options = (padding, self.stride, self.dilation, self.groups)
        y = convolve(x, self.weight, self.bias, *options)
        cuts = [slice(p, n - q) for (p, q), n in zip(spare, y.shape[2:], strict=True)]
        return y[(slice(None), slice(None), *cuts)]

    def peak_bytes(self, region: Region) -> int:
        inner, sums = self.needs(region), 0
        if (
            self.groups == 1
            and set(self.dilation) == {1}
            and winograd.fits(self.weight, self.stride)
        ):
            sums = self.sources[0].bytes(inner) // 2 + self.bytes(region)
        held = self.sources[0].new_bytes(inner) + self.new_bytes(region)
        return max(super().peak_bytes(region), held + sums)

    def operations(self) -> float:
        taps = self.weight[0].numel()
        volume = math.prod(self.stride) * self.sources[0].channels / self.channels
        return 2 * taps + self.sources[0].operations() * volume


def convolve(
    x: Tensor, weight: Tensor, bias: Maybe, padding: Axes, stride: Axes, dilation: Axes, groups: int
) -> Tensor:
    """A convolution of channels-last input; on the CPU by oneDNN directly.

    PyTorch's own choice for small float32 tiles is a kernel that takes up to six times as long.
    """
    direct = x.device.type == "cpu" and x.dtype == torch.float32 and set(dilation) == {1}
    if direct and groups == 1 and torch.backends.mkldnn.is_available():
        return convolutions.convolve(x, weight, bias, padding, stride, together=4)
    function = F.conv3d if x.dim() == 5 else F.conv2d
    return function(x, weight, bias, stride, padding, dilation, groups)


class UpsampledConv(Node):
    """Nearest upsampling by one or two per axis, then a convolution of width 3.

    It is computed on the coarse grid, one small convolution per phase, see `Phases`.
    """

    def __init__(self, source: Node, conv: convolutions.Conv, factor: Axes):
        self.factor = tuple(factor)
        self.reach = tuple(Cells(grow=f, halo=1) for f in factor)
        super().__init__(conv.out_channels, sizes_of(self.reach, source.shape), source)
        self.phases = Phases(conv.weight, self.factor, conv.weight.dtype)
        self.bias = None if conv.bias is None else conv.bias.repeat(self.phases.per_row)

    def _cover(self, region: Region) -> Region:
        """Coarse voxels under a region."""
        axes = zip(region, self.factor, strict=True)
        return tuple((lo // f, -(-hi // f)) for (lo, hi), f in axes)

    def needs(self, region: Region) -> Region:
        return clip(wanted(self.reach, region), self.sources[0].shape)

    def read(self, region: Region) -> Tensor:
        cover = self._cover(region)
        size = [(hi - lo) * f for (lo, hi), f in zip(cover, self.factor, strict=True)]
        device, dtype = home_of(self)
        shape, layout = (1, self.channels, *size), CHANNELS_LAST[2 + len(size)]
        fine = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
        self._fill(fine, cover, region[0])
        axes = zip(region, cover, self.factor, strict=True)
        cuts = [slice(lo - a * f, hi - a * f) for (lo, hi), (a, _), f in axes]
        return fine[(slice(None), slice(None), *cuts)]

    def write(self, region: Region, out: Tensor) -> None:
        edges = zip(region, self.factor, strict=True)
        if any(edge % f for r, f in edges for edge in r) or out.device != home_of(self)[0]:
            out.copy_(self.read(region))
        else:
            self._fill(out, self._cover(region), region[0])

    def _fill(self, fine: Tensor, cover: Region, rows: tuple[int, int]) -> None:
        """Compute `rows` of the fine voxels over a coarse region into `fine`, which holds all."""
        wants = tuple((lo - 1, hi + 1) for lo, hi in cover)
        has = clip(wants, self.sources[0].shape)
        x = channels_last(self.sources[0].read(has))
        ends, *missing = [(a - lo, hi - b) for (lo, hi), (a, b) in zip(wants, has, strict=True)]
        if any(ends):
            x = F.pad(x, (*(0, 0) * len(missing), *ends))
        x, padding = convolutions.pad_uneven(x, [(0, 0), *missing])
        first, f, ones = cover[0][0], self.factor[0], (1,) * len(cover)
        for phase, weight in enumerate(self.phases.weights):
            start, stop = (-((phase - n) // f) - first for n in rows)  # coarse rows of this phase
            if start < stop:
                slab = x[:, :, start + phase : stop + phase + weight.shape[2] - 1]
                y = convolve(slab, weight, self.bias, padding, ones, ones, 1)
                for target, grid in self.phases.pairs(fine, start, stop, phase, y):
                    target.copy_(grid)

    def operations(self) -> float:
        taps = 2 * self.phases.weights[0][0].numel()
        grown = self.sources[0].channels / self.channels / math.prod(self.factor)
        return taps + self.sources[0].operations() * grown

    def peak_bytes(self, region: Region) -> int:
        return super().peak_bytes(region) + self.bytes(region) // self.factor[0]


class TransposedConv(Node):
    """A transposed convolution; also a nearest upsampling folded into the convolution after it.

    Factors of two have the faster `UpsampledConv`. `padding` is cut off at both ends of each axis.
    """

    def __init__(
        self, source: Node, weight: Tensor, bias: Maybe, stride: Axes, padding: Ends, groups: int
    ):
        self.weight, self.bias, self.stride, self.groups = weight, bias, stride, groups
        axes = zip(stride, padding, weight.shape[2:], strict=True)
        self.reach = tuple(Spread(s, near, far, k) for s, (near, far), k in axes)
        shape = sizes_of(self.reach, source.shape)
        super().__init__(weight.shape[1] * groups, shape, source)
        self.function = F.conv_transpose3d if len(shape) == 3 else F.conv_transpose2d

    def needs(self, region: Region) -> Region:
        return clip(wanted(self.reach, region), self.sources[0].shape)

    def read(self, region: Region) -> Tensor:
        has = self.needs(region)
        x = channels_last(self.sources[0].read(has))
        y = self.function(x, self.weight, self.bias, self.stride, 0, 0, self.groups)
        # Output voxel 0 of y is voxel a * stride - padding of the whole.
        cuts, pads = [], []
        axes = zip(region, has, self.reach, y.shape[2:], strict=True)
        for (lo, hi), (a, _), reach, n in axes:
            start = lo - (a * reach.grow - reach.near)
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

    def operations(self) -> float:
        taps = 2 * self.weight[:, 0].numel() / math.prod(self.stride)
        return taps + self.sources[0].operations() * self.sources[0].channels / self.channels


class Local(Node):
    """Any module whose output depends on input voxels at most `halo` away; its own padding holds.

    The module is run on the region with its halo, clipped to the volume, and the halo is cut off.

    Args:
        source: Its input.
        module: Maps `(1, C, *n)` to `(1, C', *n * grow / shrink)`.
        reach: Which input voxels it sees, per axis.
        channels: C'.
    """

    def __init__(self, source: Node, module: Function, reach: Sequence[Reach], channels: int):
        self.module, self.reach = module, reach
        super().__init__(channels, sizes_of(reach, source.shape), source)

    def needs(self, region: Region) -> Region:
        return clip(wanted(self.reach, region), self.sources[0].shape)

    def read(self, region: Region) -> Tensor:
        has = self.needs(region)
        y = self.module(self.sources[0].read(has))
        axes = zip(region, has, self.reach, strict=True)
        begins = ((lo, hi, r.begins(a)[1]) for (lo, hi), (a, _), r in axes)
        cuts = [slice(lo - begin, hi - begin) for lo, hi, begin in begins]
        return channels_last(y[(slice(None), slice(None), *cuts)])

    def operations(self) -> float:
        return 1e9  # unknown, so it counts as dear


def wanted(reach: Sequence[Reach], region: Region) -> Region:
    """Input voxels of a region, those beyond the volume included."""
    return tuple(axis.wants(*r) for axis, r in zip(reach, region, strict=True))


def sizes_of(reach: Sequence[Reach], shape: Sequence[int]) -> list[int]:
    """Voxels per axis that a layer makes of `shape`."""
    return [axis.size(n) for axis, n in zip(reach, shape, strict=True)]


def clip(region: Region, shape: Sequence[int]) -> Region:
    """The part of a region that lies inside the volume."""
    return tuple((max(lo, 0), min(hi, n)) for (lo, hi), n in zip(region, shape, strict=True))


def contains(outer: Region, inner: Region) -> bool:
    """Whether a region lies within another."""
    return all(a <= lo and hi <= b for (a, b), (lo, hi) in zip(outer, inner, strict=True))


def nodes_of(node: Node, kind: type[N]) -> list[N]:
    """All nodes of a class that a node is computed from, itself included."""
    found = [node] if isinstance(node, kind) else []
    for source in node.sources:
        found += [n for n in nodes_of(source, kind) if n not in found]
    return found


def leaves_of(node: Node) -> list[Stored]:
    """The stored tensors that a node is computed from."""
    return nodes_of(node, Stored)


def home_of(node: Node) -> Home:
    """Device and dtype that a node is computed in."""
    while not isinstance(node, Leaf):
        node = node.sources[0]
    return node.device, node.dtype


def whole_of(shape: Sequence[int]) -> Region:
    """The region that covers `shape`."""
    return tuple((0, n) for n in shape)


def middle_of(shape: Sequence[int], size: Sequence[int]) -> Region:
    """A tile of `size` in the middle of `shape`."""
    starts = [(n - s) // 2 for n, s in zip(shape, size, strict=True)]
    return tuple((a, a + s) for a, s in zip(starts, size, strict=True))
