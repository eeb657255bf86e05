"""Run a function over overlapping tiles of a volume and blend the results without seams.

    y = stitch(fn, volume, patch_size=(64, 64, 64), overlap=0.5, blend="hann")

The tile grid is a product of one list of starts per axis and every blend window is separable, so
the weights are normalized once per axis, in float64, to sum to one at each voxel. No count map and
no division follow: an identity `fn` gives the volume back, faces and corners included.

Axes: c channels, then 2 or 3 spatial axes. The volume is (C, X, Y, Z); tiles are (B, C, *patch).
"""

import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F

from loaders.patches import PatchGrid
from vae3d.kernels.memory import private_pages
from vae3d.kernels.progress import passed

CACHED = 1 << 17  # blend weights that are computed at a time, to stay in the processor's cache

Tiles = torch.Tensor | tuple[torch.Tensor, ...]
Overlap = float | int | Sequence  # a fraction of the patch or voxels, one or one per axis
Scale = float | Fraction | Sequence
Home = tuple[torch.device, torch.dtype]
T = TypeVar("T", torch.Tensor, tuple[torch.Tensor, ...])


class Volume(Protocol):
    """A tensor, or anything that slices to an array, such as a memory map."""

    @property
    def shape(self) -> Sequence[int]:
        """`(C, *spatial)`."""

    def __getitem__(self, region: Any, /) -> Any: ...


def _hann(n: int) -> np.ndarray:
    return np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2  # half-sample: never zero at the ends


def _gaussian(n: int) -> np.ndarray:
    return np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2)


BLENDS: dict[str, Callable[[int], np.ndarray] | None] = {
    "hann": _hann,
    "gaussian": _gaussian,
    "average": np.ones,
    "crop": None,  # each voxel belongs to the tile whose center is nearest: nothing is mixed
}


class Span(NamedTuple):
    """What one tile contributes along one axis: output voxels lo..hi, from `offset` in the tile."""

    lo: int
    hi: int
    offset: int
    weight: torch.Tensor | None  # (hi - lo,) float32; None copies (crop)


def axis_spans(size: int, tile: int, starts: Sequence[int], blend: str) -> list[Span]:
    """Spans of the tiles along one axis; their weights sum to one at each of `size` voxels.

    Args:
        size: Length of the axis in voxels.
        tile: Length of a tile in voxels; what reaches beyond the axis is cut off.
        starts: First voxel of each tile, ascending.
        blend: A key of `BLENDS`.
    """
    if blend not in BLENDS:
        raise ValueError(f"blend {blend!r} is unknown; choose one of {', '.join(BLENDS)}")
    make_window = BLENDS[blend]
    if make_window is None:
        inner = [(a + tile + b) // 2 for a, b in itertools.pairwise(starts)]
        edges = [0, *inner, size]
        return [
            Span(lo, hi, lo - s, None)
            for s, (lo, hi) in zip(starts, itertools.pairwise(edges), strict=True)
        ]
    window = make_window(tile).astype(np.float64)
    total = np.zeros(size)
    for s in starts:
        total[s : s + tile] += window[: size - s]
    spans = []
    for s in starts:
        hi = min(s + tile, size)
        weight = torch.from_numpy(window[: hi - s] / total[s:hi]).float()
        spans.append(Span(s, hi, 0, weight))
    return spans


def _per_axis(value: float | Fraction | Sequence, dims: int, name: str) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims:
        raise ValueError(f"{name} {values} has {len(values)} entries, the volume has {dims} axes")
    return values


def overlap_voxels(
    patch_size: Sequence[int], overlap: Overlap, unit: Sequence[int]
) -> tuple[int, ...]:
    """Overlap per axis in voxels, a multiple of `unit` and smaller than the patch.

    Args:
        patch_size: Patch in voxels.
        overlap: Fraction of the patch (float) or voxels (int), one or one per axis.
        unit: Starts are multiples of this many voxels.
    """
    result = []
    overlaps = _per_axis(overlap, len(patch_size), "overlap")
    for p, o, u in zip(patch_size, overlaps, unit, strict=True):
        fraction = isinstance(o, float)
        voxels = round(o * p) if fraction and math.isfinite(o) else o
        if not 0 <= voxels < p or (fraction and o >= 1):
            raise ValueError(
                f"overlap {o} must be at least 0 and smaller than the patch ({p} voxels): give a "
                "fraction such as 0.5 or a number of voxels"
            )
        result.append(min(math.ceil(voxels / u) * u, p - u))
    return tuple(result)


def check_patch(patch_size: Sequence[int], factor: Sequence[int]) -> None:
    """Raise ValueError unless the model's factor divides the patch."""
    if len(patch_size) != len(factor):
        raise ValueError(
            f"patch_size {tuple(patch_size)} has {len(patch_size)} entries, the model has "
            f"{len(factor)} axes"
        )
    if any(p < 1 or p % f for p, f in zip(patch_size, factor, strict=True)):
        near = tuple(max(1, round(p / f)) * f for p, f in zip(patch_size, factor, strict=True))
        raise ValueError(
            f"patch_size {tuple(patch_size)} is no multiple of the model's factor "
            f"{tuple(factor)}: choose {near}"
        )


class Stitcher:
    """Blends tiles that arrive one by one; says when one is missing or comes twice.

    `stitch` and `iter_slabs` drive it; use it directly when the tiles come from elsewhere:

        stitcher = Stitcher((100, 90, 80), (64, 64, 64), overlap=0.5)
        for corner in stitcher.corners():
            stitcher.add(corner, my_tile(corner))
        volume = stitcher.result()

    With `streaming` the output is held in segments along the first axis, cut where tiles begin or
    end; a finished segment leaves through `pop` and its memory with it.

    Args:
        shape: Spatial shape of the input volume in voxels.
        patch_size: Tile in input voxels.
        overlap: Fraction of the patch (float) or voxels (int), one or one per axis; < patch.
        blend: hann | gaussian | average | crop.
        scale: Output voxels per input voxel, one or one per axis: 4 decodes latents of a model of
            factor 4, Fraction(1, 4) or 0.25 encodes. Tile starts keep to whole output voxels.
        unit: Tiles start at multiples of this many input voxels, one or one per axis.
        streaming: Allocate segments when their first tile comes, free them in `pop`.
    """

    def __init__(self, shape: Sequence[int], patch_size: int | Sequence[int],
                 overlap: Overlap = 0.5, blend: str = "hann", scale: Scale = 1,
                 unit: int | Sequence[int] = 1, streaming: bool = False):  # fmt: skip
        dims = len(shape)
        self.patch_size = _per_axis(patch_size, dims, "patch_size")
        scales = _per_axis(scale, dims, "scale")
        self.scale = tuple(Fraction(s).limit_denominator(4096) for s in scales)
        units = zip(self.scale, _per_axis(unit, dims, "unit"), strict=True)
        unit = [math.lcm(s.denominator, u) for s, u in units]
        check_patch(self.patch_size, unit)
        overlap = overlap_voxels(self.patch_size, overlap, unit)
        # Counted in units of the coarser of the two grids, so that every start is whole in both.
        grid = PatchGrid(
            tuple(math.ceil(n / u) for n, u in zip(shape, unit, strict=True)),
            tuple(p // u for p, u in zip(self.patch_size, unit, strict=True)),
            tuple(o // u for o, u in zip(overlap, unit, strict=True)),
        )
        self.starts = [
            [int(s) * u for s in axis] for axis, u in zip(grid.starts, unit, strict=True)
        ]
        self.shape = tuple(math.ceil(n * s) for n, s in zip(shape, self.scale, strict=True))
        self.tile = tuple(int(p * s) for p, s in zip(self.patch_size, self.scale, strict=True))
        self.spans = [
            axis_spans(n, t, [int(s * k) for s in starts], blend)
            for n, t, starts, k in zip(self.shape, self.tile, self.starts, self.scale, strict=True)
        ]
        self.streaming = streaming
        ends = {edge for span in self.spans[0] for edge in (span.lo, span.hi)} if streaming else ()
        self.segments = list(itertools.pairwise(sorted({0, self.shape[0], *ends})))
        # Hundreds of float32 additions per voxel (overlap 0.75 and more) would round to over 1e-6.
        axes = zip(self.spans, self.shape, strict=True)
        most = math.prod(_most_overlapping(axis, n) for axis, n in axes)
        self._accumulator = torch.float64 if most > 27 and blend != "crop" else torch.float32
        self.seen = np.zeros([len(s) for s in self.starts], dtype=bool)
        self._index = dict(zip(self.corners(), np.ndindex(*self.seen.shape), strict=True))
        self._whole: list[torch.Tensor] = []
        self._parts: dict[int, list[torch.Tensor]] = {}
        self._weights: dict[Home, torch.Tensor] = {}  # memory of those at hand
        self._placed: dict[Home, list[list[Span]]] = {}  # spans with their weights
        self._planes: dict[tuple[Home, tuple[int, ...]], torch.Tensor] = {}  # weights across rows
        self._popped = 0
        self._single = True

    def corners(self) -> Iterator[tuple[int, ...]]:
        """First input voxel of each tile, first axis slowest."""
        return itertools.product(*self.starts)

    def add(self, corner: tuple[int, ...], tile: Tiles) -> None:
        """Blend one tile in; it is only read.

        Args:
            corner: One of `corners()`.
            tile: (C, *tile) in output voxels, or a tuple of such tensors.
        """
        index = self._index.get(tuple(int(c) for c in corner))
        if index is None:
            raise ValueError(f"no tile of this grid starts at {tuple(corner)}")
        if self.seen[index]:
            raise ValueError(f"the tile at {tuple(corner)} came twice")
        self._single = isinstance(tile, torch.Tensor)
        tiles = (tile,) if self._single else tuple(tile)
        self._dtypes = [t.dtype for t in tiles]
        for t in tiles:
            if tuple(t.shape[1:]) != self.tile:
                raise ValueError(f"a tile has shape {tuple(t.shape)}, expected (C, *{self.tile})")
        span = self.spans[0][index[0]]
        for number, (lo, hi) in enumerate(self.segments):
            lo, hi = max(lo, span.lo), min(hi, span.hi)
            if lo < hi:
                for part, t in zip(self._segment(number, tiles), tiles, strict=True):
                    self._blend(part, t, index, (lo, hi), self.segments[number][0])
        self.seen[index] = True

    def _blend(
        self,
        out: torch.Tensor,
        tile: torch.Tensor,
        index: tuple[int, ...],
        reach: tuple[int, int],
        base: int,
    ) -> None:
        """Add rows of the weighted tile (crop: copy them) to `out`, whose first row is `base`."""
        spans = [axis[i] for axis, i in zip(self._spans_of(out), index, strict=True)]
        x, *rest = _clip(spans[0], *reach), *spans[1:]
        rows = (slice(None), slice(x.lo - base, x.hi - base))
        target = out[(*rows, *(slice(s.lo, s.hi) for s in rest))]
        inside = (slice(s.offset, s.offset + s.hi - s.lo) for s in (x, *rest))
        source = tile[(slice(None), *inside)].detach().to(out.dtype)
        along = x.weight
        if along is None:
            target.copy_(source)
            return
        plane = self._plane(out, index[1:], [s.weight for s in rest if s.weight is not None])
        # A few rows at a time: their weights stay in the cache, and take little memory.
        step = max(1, CACHED // plane.numel()) if out.device.type == "cpu" else len(along)
        step = min(step, len(along))
        home = out.device, out.dtype
        memory = self._weights.get(home)
        if memory is None or memory.numel() < step * plane.numel():
            memory = self._weights[home] = out.new_empty(step * plane.numel())
        products = memory[: step * plane.numel()].view(step, *plane.shape)
        along = along.view(-1, *[1] * plane.ndim)
        parts = (t.split(step, d) for t, d in ((target, 1), (source, 1), (along, 0)))
        for into, values, factors in zip(*parts, strict=True):
            into.addcmul_(values, torch.mul(factors, plane, out=products[: len(factors)]))

    def _spans_of(self, out: torch.Tensor) -> list[list[Span]]:
        """The spans with their weights where `out` lies; they go there together, once."""
        home = out.device, out.dtype
        if home not in self._placed:
            weights = [s.weight for axis in self.spans for s in axis if s.weight is not None]
            if not weights:
                return self.spans
            moved = torch.cat(weights).to(out.device, out.dtype, non_blocking=True)
            parts = iter(moved.split([len(w) for w in weights]))
            self._placed[home] = [[s._replace(weight=next(parts)) for s in a] for a in self.spans]
        return self._placed[home]

    def _plane(
        self, out: torch.Tensor, index: tuple[int, ...], weights: list[torch.Tensor]
    ) -> torch.Tensor:
        """The weights of a tile across its rows; tiles of all rows share them."""
        key = (out.device, out.dtype), index
        if key not in self._planes:
            self._planes[key] = reduce(operator.mul, torch.meshgrid(*weights, indexing="ij"))
        return self._planes[key]

    def _segment(self, number: int, like: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The accumulators of one segment, one per output, allocated at first use."""
        if number not in self._parts:
            lo, hi = self.segments[number]
            if self.streaming:
                self._parts[number] = [self._zeros(t, (hi - lo, *self.shape[1:])) for t in like]
            else:
                if not self._whole:
                    self._whole = [self._zeros(t, self.shape) for t in like]
                self._parts[number] = [w[:, lo:hi] for w in self._whole]
        return self._parts[number]

    def _zeros(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Accumulator of at least float32: half-precision sums lose the blend."""
        dtype = torch.promote_types(like.dtype, self._accumulator)
        shape = (like.shape[0], *shape)
        if self.streaming and like.device.type == "cpu":
            pages = private_pages(math.prod(shape) * dtype.itemsize)
            # Written at once: pages that are read first are found a second time, much dearer.
            return torch.frombuffer(pages, dtype=dtype).view(shape).zero_()
        return torch.zeros(shape, dtype=dtype, device=like.device)

    def _finish(self, parts: list[torch.Tensor]) -> Tiles:
        dtypes = [torch.promote_types(dtype, torch.float32) for dtype in self._dtypes]
        parts = [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        return parts[0] if self._single else tuple(parts)

    def pop(self) -> Iterator[tuple[slice, Tiles]]:
        """Finished segments since the last call: (rows of the first axis, (C, rows, ...))."""
        unfinished = next((i for i, row in enumerate(self.seen) if not row.all()), None)
        limit = self.shape[0] if unfinished is None else self.spans[0][unfinished].lo
        while self._popped < len(self.segments) and self.segments[self._popped][1] <= limit:
            part = self._parts.pop(self._popped)
            where = slice(*self.segments[self._popped])
            self._popped += 1
            yield where, self._finish(part)

    def check_complete(self) -> None:
        """Raise ValueError unless every tile has come once."""
        if not self.seen.all():
            first = np.argwhere(~self.seen)[0]
            corner = tuple(axis[i] for axis, i in zip(self.starts, first, strict=True))
            raise ValueError(f"{int((~self.seen).sum())} tiles are missing, first at {corner}")

    def result(self) -> Tiles:
        """The blended volume(s), (C, *shape); ValueError when a tile is missing."""
        assert not self.streaming
        self.check_complete()
        return self._finish(self._whole)


def _most_overlapping(spans: list[Span], size: int) -> int:
    """The largest number of tiles over one voxel of an axis."""
    count = np.zeros(size, dtype=int)
    for span in spans:
        count[span.lo : span.hi] += 1
    return int(count.max())


def _clip(span: Span, lo: int, hi: int) -> Span:
    cut = slice(lo - span.lo, hi - span.lo)
    weight = None if span.weight is None else span.weight[cut]
    return Span(lo, hi, span.offset + lo - span.lo, weight)


def _read_tile(volume: Volume, corner: Sequence[int], patch_size: Sequence[int]) -> torch.Tensor:
    """A copy of the tile (C, *patch), edge voxels repeated where it reaches beyond the volume."""
    region = (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True)))
    part = volume[region]
    if not isinstance(part, torch.Tensor):
        part = torch.from_numpy(np.array(part))
    if not part.is_floating_point():
        part = part.float()
    short = [p - n for p, n in zip(patch_size, part.shape[1:], strict=True)]
    if any(short):
        pads = [side for s in reversed(short) for side in (0, s)]
        part = F.pad(part[None], pads, mode="replicate")[0]
    return part


def tile_batches(
    volume: Volume, stitcher: Stitcher, batch_size: int
) -> Iterator[tuple[list[tuple[int, ...]], torch.Tensor]]:
    """Corners and copies of the tiles `(B, C, *patch)` of a volume, first axis slowest.

    Args:
        volume: (C, *spatial): a tensor, or anything that slices to an array.
        stitcher: Whose tiles.
        batch_size: Tiles at a time; the last batch may be smaller.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    corners = list(stitcher.corners())
    memory = None
    for at in range(0, len(corners), batch_size):
        batch = corners[at : at + batch_size]
        parts = [_read_tile(volume, c, stitcher.patch_size) for c in batch]
        if parts[0].device.type != "cpu":
            yield batch, torch.stack(parts)
            continue
        # One piece of memory serves all batches (new ones leave holes in the heap), unless somebody
        # holds a tensor that lies in it: the tensors of a storage share one reference to its array.
        size = sum(p.numel() * p.element_size() for p in parts)
        if memory is None or memory.size != size or sys.getrefcount(memory) > 2:
            memory = np.empty(size, np.uint8)
        tiles = torch.from_numpy(memory).view(parts[0].dtype).view(len(parts), *parts[0].shape)
        torch.stack(parts, out=tiles)
        del parts
        yield batch, tiles
        del tiles


def add_batch(stitcher: Stitcher, corners: Sequence[tuple[int, ...]], out: Tiles) -> None:
    """Blend a batch of tiles in: `(B, C, *tile)`, or a tuple of such."""
    outs = (out,) if isinstance(out, torch.Tensor) else tuple(out)
    if any(o.shape[0] != len(corners) for o in outs):
        raise ValueError(f"fn returned {len(outs[0])} tiles for a batch of {len(corners)}")
    for i, corner in enumerate(corners):
        tile = tuple(o[i] for o in outs)
        stitcher.add(corner, tile[0] if isinstance(out, torch.Tensor) else tile)


def tile_faces(shape: Sequence[int], patch_size: int | Sequence[int], overlap: Overlap = 0.5,
               blend: str = "hann", unit: int | Sequence[int] = 1) -> list[list[int]]:  # fmt: skip
    """Per axis the voxels at which a tile begins or ends inside the volume.

    Args:
        shape: Spatial shape of the volume.
        patch_size: Tile in voxels.
        overlap: As given to `stitch`.
        blend: As given to `stitch`.
        unit: As given to `Stitcher`.
    """
    spans = Stitcher(shape, patch_size, overlap, blend, unit=unit).spans
    return [
        sorted({edge for span in axis for edge in (span.lo, span.hi)} - {0, n})
        for axis, n in zip(spans, shape, strict=True)
    ]


@torch.no_grad()
def stitch(
    fn: Callable[[torch.Tensor], T],
    volume: Volume,
    patch_size: Sequence[int],
    overlap: Overlap = 0.5,
    blend: str = "hann",
    batch_size: int = 1,
    *,
    scale: Scale = 1,
    out: Any = None,
) -> T:
    """Apply `fn` tile by tile and blend; equals `fn(volume)` where `fn` is local.

    Args:
        fn: (B, C, *patch) -> (B, C', *patch * scale), or a tuple of such tensors. Where it returns
            tensors of another device, the result lies there.
        volume: (C, X, Y, Z) or (C, X, Y); a tensor, or anything that slices to an array, such as a
            memory map. A leading batch axis is stitched one by one. Never written to.
        patch_size: Tile in input voxels, one per spatial axis. Smaller volumes are padded by
            repeating the edge, and the result is cropped.
        overlap: Fraction of the patch (float) or voxels (int), one or one per axis; < patch.
        blend: hann | gaussian | average | crop (each voxel from the tile nearest in the middle).
        batch_size: Tiles per call of `fn`.
        scale: Output voxels per input voxel: 4 decodes, 1/4 encodes, at factor 4.
        out: Array, memory map or dataset (C', X, Y, Z) to write finished slabs into; then only a
            few rows of tiles are held in memory.

    Returns:
        (C', X, Y, Z), at least float32; or a tuple of such. `out` when it is given.

    Example:
        >>> stitch(lambda x: x, torch.rand(1, 40, 30, 20), (16, 16, 16)).shape
        torch.Size([1, 40, 30, 20])
    """
    dims = len(patch_size)
    options = (patch_size, overlap, blend, batch_size)
    if len(volume.shape) == dims + 2:
        parts = [
            stitch(fn, volume[i], *options, scale=scale, out=None if out is None else out[i])
            for i in range(volume.shape[0])
        ]
        if out is not None:
            return out
        if isinstance(parts[0], torch.Tensor):
            return torch.stack(parts)
        return tuple(torch.stack(p) for p in zip(*parts, strict=True))
    if len(volume.shape) != dims + 1:
        raise ValueError(
            f"volume has shape {tuple(volume.shape)}; patch_size {tuple(patch_size)} asks for "
            f"(C, {', '.join('XYZ'[:dims])})"
        )
    if out is not None:
        size: tuple[int, ...] = Stitcher(volume.shape[1:], patch_size, overlap, blend, scale).shape
        for where, slab in iter_slabs(fn, volume, *options, scale=scale):
            if not isinstance(slab, torch.Tensor):
                raise ValueError("out takes one result, fn returns several")
            if tuple(out.shape) != (len(slab), *size):
                raise ValueError(f"out has shape {tuple(out.shape)}, not {(len(slab), *size)}")
            out[:, where] = slab if isinstance(out, torch.Tensor) else slab.cpu().numpy()
            del slab  # before the next row of tiles is summed
        return out
    stitcher = Stitcher(volume.shape[1:], patch_size, overlap, blend, scale)
    for corners, tiles in tile_batches(volume, stitcher, batch_size):
        add_batch(stitcher, corners, fn(tiles))
        del tiles  # their memory serves the next batch
        passed(len(corners) / stitcher.seen.size)
    return cast(T, stitcher.result())


def iter_slabs(
    fn: Callable[[torch.Tensor], Tiles],
    volume: Volume,
    patch_size: Sequence[int],
    overlap: Overlap = 0.5,
    blend: str = "hann",
    batch_size: int = 1,
    *,
    scale: Scale = 1,
) -> Iterator[tuple[slice, Tiles]]:
    """Like `stitch`, but hands out finished slabs in order: (rows of the first axis, slab).

    Neither input nor output need fit in memory: `volume` may be a memory map, and at most the
    slabs under one row of tiles are held, beside the one handed out last: `del` it when it is
    written.
    """
    stitcher = Stitcher(volume.shape[1:], patch_size, overlap, blend, scale, streaming=True)
    for corners, tiles in tile_batches(volume, stitcher, batch_size):
        with torch.no_grad():  # as a decorator it would hold the last slab
            add_batch(stitcher, corners, fn(tiles))
        del tiles
        passed(len(corners) / stitcher.seen.size)
        yield from stitcher.pop()
    stitcher.check_complete()
