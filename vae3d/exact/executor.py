"""Run a VAE over a volume piece by piece, with the result of the full pass and bounded memory.

    posterior = encode_exact(vae, x, memory_gb=4)       # x (C, X, Y, Z), any array, memory maps too
    recon = decode_exact(vae, posterior.mean, memory_gb=4)

The model's own modules are walked once and become a graph of nodes (nodes.py) that compute any
region of their output on demand. Only a norm over the whole volume (its statistics) and attention
(its keys and values) need everything before them; there the graph is settled: computed tile by tile
while float64 statistics are merged, and stored, or, where the budget asks for it, computed again
when it is read.

What a layer sees is described in `vae3d.models.reach`, for sharded running as well; a layer that
needs more than that has an entry in `HANDLERS`, and one of neither may declare `halo`. Any other is
run on the whole volume, with a message.

Axes: b batch (always 1 here), c channels, x y z space. A region is ((lo, hi), ...) per axis.
"""

import itertools
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vae3d.exact.attention import global_attention, linear_attention, patch_attention
from vae3d.exact.nodes import (
    GRAIN,
    Array,
    Conv,
    Home,
    Kept,
    Local,
    Node,
    Place,
    Pointwise,
    Region,
    Scaled,
    Source,
    Stored,
    Sum,
    TransposedConv,
    UpsampledConv,
    clip,
    home_of,
    leaves_of,
    middle_of,
    nodes_of,
    whole_of,
)
from vae3d.kernels import convolutions
from vae3d.kernels.convolutions import Axes, ConvT, Ends
from vae3d.kernels.device import free_bytes
from vae3d.kernels.memory import CHANNELS_LAST, channels_last, held_heap, trim
from vae3d.kernels.moments import Moments
from vae3d.kernels.precision import exact_float32
from vae3d.kernels.progress import is_watched, passed
from vae3d.models import attention, blocks, custom_vae, downsample, norm, upsample
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.linear_code import added_to_mean
from vae3d.models.posterior import DiagonalGaussian
from vae3d.models.reach import POINTWISE, Cells, cells_of, handler_of, reach_of

ROWS = 16  # of the first axis in a tile, at most
SMALLEST = (4, 32, 32)  # tile in voxels
CACHE = 32 << 20  # bytes
Folder = str | Path | None
HOST: Home = (torch.device("cpu"), torch.float32)
CHEAP = 256  # operations per value below which computing again is faster than storing
LEAST_OPERATIONS = 8  # per value that is only read and written, for the progress
WORTH_TELLING = 64**3  # voxels; below, a volume is done before anybody asks

_rehearsals: "WeakKeyDictionary[CustomVAE, Rehearsal]" = WeakKeyDictionary()


@torch.no_grad()
@exact_float32()
@held_heap()
def encode_exact(
    vae: CustomVAE,
    volume: Array,
    memory_gb: float | None = None,
    *,
    tile: Axes | None = None,
    scratch_dir: Folder = None,
) -> DiagonalGaussian:
    """Posterior of a whole volume, equal to that of one full pass, in bounded memory.

    Args:
        vae: The model, in eval mode.
        volume: (C, X, Y, Z) or (C, X, Y): tensor, array or memory map.
        memory_gb: Memory budget in GiB on the model's device, the volume apart; None takes half of
            what is free there. What a GPU cannot hold goes to the host.
        tile: Largest tile per axis; None lets the budget choose.
        scratch_dir: Folder for activations that fit no other way; None for the system's.

    Returns:
        Posterior with mean and logvar of (C', *spatial / factor), on the model's device.

    Raises:
        ValueError: The volume is not of the model's channels and axes, or the budget no number.
    """
    assert not vae.training, "exact mode is for a model in eval mode"
    check_axes("volume", volume.shape, vae.in_channels, vae.spatial_dims)
    run = Executor(memory_gb, tile, scratch_dir, home=_home(vae))
    run.expect(vae, "encode", math.prod(volume.shape[1:]))
    return _encode(vae, volume, run)


def _encode(vae: CustomVAE, volume: Array, run: "Executor") -> DiagonalGaussian:
    """`encode_exact` by an executor."""
    volume = run.near(volume)
    shape = [-(-n // f) * f for n, f in zip(volume.shape[1:], vae.factor, strict=True)]
    node = run.walk(vae.encoder, Source(volume, shape, *run.home))
    node = run.walk(vae.quant_conv, node)
    moments = torch.empty(1, node.channels, *node.shape, device=run.device, dtype=run.wide)
    for region, values in run.slabs(node):
        moments[(slice(None), slice(None), *(slice(*r) for r in region))] = values
    if vae.linear_code is not None:
        source = Source(volume, shape, *run.home)
        code = run.take(run.walk(vae.linear_code.analysis, source))
        moments = added_to_mean(moments, code.to(moments))
    posterior = vae.head(moments)
    return DiagonalGaussian(posterior.mean[0], posterior.logvar[0])


@torch.no_grad()
@exact_float32()
@held_heap()
def decode_exact(
    vae: CustomVAE,
    z: Array,
    memory_gb: float | None = None,
    *,
    out: Tensor | np.ndarray | None = None,
    size: Sequence[int] | None = None,
    tile: Axes | None = None,
    scratch_dir: Folder = None,
) -> Any:
    """Reconstruction of a whole latent, equal to that of one full pass, in bounded memory.

    Args:
        vae: The model, in eval mode.
        z: (C, *spatial): tensor, array or memory map.
        memory_gb: Memory budget in GiB on the model's device, latent and result apart; None takes
            half of what is free there. What a GPU cannot hold goes to the host.
        out: Array or memory map (C', *size) to write to; default a new tensor in host memory.
        size: Crop the result to these voxels per axis, the size of the volume that was encoded.
        tile: Largest tile per axis; None lets the budget choose.
        scratch_dir: Folder for activations that fit no other way; None for the system's.

    Returns:
        (C', *size) float32, float64 of such a model; `out` when it is given.

    Raises:
        ValueError: The latent is not of the model's channels and axes, `size` or `out` do not fit
            what it decodes to, or the budget is no number.
    """
    assert not vae.training, "exact mode is for a model in eval mode"
    check_axes("latent", z.shape, vae.latent_channels, vae.spatial_dims)
    run = Executor(memory_gb, tile, scratch_dir, home=_home(vae))
    run.expect(vae, "decode", math.prod(z.shape[1:]) * math.prod(vae.factor))
    return _decode(vae, z, run, out, size)


def _decode(
    vae: CustomVAE,
    z: Array,
    run: "Executor",
    out: Tensor | np.ndarray | None = None,
    size: Sequence[int] | None = None,
) -> Tensor | np.ndarray:
    """`decode_exact` by an executor."""
    z = run.near(z)
    node = run.walk(vae.post_quant_conv, Source(z, z.shape[1:], *run.home))
    node = run.walk(vae.decoder, node)
    if vae.linear_code is not None:
        code = run.walk(vae.linear_code.synthesis, Source(z, z.shape[1:], *run.home))
        node = Sum(node, code)
    node = run.walk(vae.output, node)
    size = tuple(size or node.shape)
    check_size(size, node.shape)
    if out is not None and tuple(out.shape) != (node.channels, *size):
        raise ValueError(f"out has shape {tuple(out.shape)}, not {(node.channels, *size)}")
    if out is None:
        out = torch.empty(node.channels, *size, dtype=run.wide)
    for region, values in run.slabs(node):
        inside = clip(region, size)
        if all(lo < hi for lo, hi in inside):
            values = values[0][(slice(None), *(slice(hi - lo) for lo, hi in inside))]
            where = (slice(None), *(slice(*r) for r in inside))
            out[where] = values.to(out) if isinstance(out, Tensor) else values.float().cpu()
    return out


class Rehearsal(NamedTuple):
    """What the exact mode of a network would do.

    Args:
        encode: Work per voxel, in the unit of `Executor.swept`.
        decode: The same.
        at_once: Names of the layers that would be run on the whole volume at once.
    """

    encode: float
    decode: float
    at_once: tuple[str, ...]


@torch.no_grad()
@exact_float32()
def rehearsed(vae: CustomVAE) -> Rehearsal:
    """Go through a network once on a few voxels, to see what exact mode does with it."""
    if vae not in _rehearsals:
        size = [4 * f for f in vae.factor]
        runs = [Executor(home=_home(vae)) for _ in range(2)]
        with warnings.catch_warnings(action="ignore"):  # they come when it is done in earnest
            mean = _encode(vae, torch.zeros(vae.in_channels, *size), runs[0]).mean
            _decode(vae, mean, runs[1])
        names = dict.fromkeys(name for run in runs for name in run.run_at_once)
        encode, decode = (run.swept / math.prod(size) for run in runs)
        _rehearsals[vae] = Rehearsal(encode, decode, tuple(names))
    return _rehearsals[vae]


def check_axes(name: str, shape: Sequence[int], channels: int, dims: int) -> None:
    """Raise ValueError unless a shape is that of so many channels and axes."""
    if len(shape) != dims + 1 or shape[0] != channels or 0 in shape:
        wanted = ", ".join([str(channels), *"XYZ"[:dims]])
        raise ValueError(f"{name} has shape {tuple(shape)}, the model takes ({wanted})")


def check_size(size: Sequence[int], decoded: Sequence[int]) -> None:
    """Raise ValueError unless a volume of `size` can be cropped out of what a latent decodes to."""
    if len(size) != len(decoded) or any(not 0 < n <= m for n, m in zip(size, decoded, strict=True)):
        raise ValueError(
            f"size {tuple(size)} is no part of what the latent decodes to, {tuple(decoded)}"
        )


def check_budget(memory_gb: float | None) -> None:
    """Raise ValueError unless a memory budget is None or a positive number."""
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise ValueError(f"memory_gb is {memory_gb}; give a positive number of GiB")


def _home(vae: nn.Module) -> Home:
    parameter = next(vae.parameters())
    if parameter.device.type == "mps":
        raise ValueError(
            "mode exact sums in float64, which mps does not have; use --device cpu, or --mode patch"
        )
    return parameter.device, parameter.dtype


def half_of_free(device: torch.device) -> int:
    """Half of the memory that is free on a device [bytes]."""
    if device.type == "cuda":
        return free_bytes(device) // 2
    import psutil

    return psutil.virtual_memory().available // 2


# The executor ------------------------------------------------------------------------------------


class Executor:
    """Walks modules into a graph and settles nodes within a memory budget.

    Args:
        memory_gb: What may be in use at once on the device, in GiB, the input volume apart; None
            takes half of what is free there.
        tile: Largest tile per axis in voxels of the grid at hand; None lets the budget choose.
        scratch_dir: Where activations go that fit no other way; None for the system's place.
        home: Device and dtype of the model.
    """

    def __init__(
        self,
        memory_gb: float | None = None,
        tile: Axes | None = None,
        scratch_dir: Folder = None,
        home: Home = HOST,
    ):
        check_budget(memory_gb)
        self.home, (self.device, dtype) = home, home
        self.wide = torch.promote_types(dtype, torch.float32)  # of what is given back
        self.budget = half_of_free(self.device) if memory_gb is None else int(memory_gb * 2**30)
        on_host = self.device.type == "cpu"
        # Where activations may lie, best first, and how much of them [bytes].
        self.budgets = {self.device: self.budget}
        if not on_host:
            self.budgets[HOST[0]] = half_of_free(HOST[0])
        # For one tile, the rest is for storing; never as many as 2^31 values.
        self.work = min(self.budget // 8, 4 << 30)
        # A processor has a cache to stay in; a GPU is fastest with much to do at once.
        self.rows, self.cache = (ROWS, CACHE) if on_host else (sys.maxsize, self.work)
        self.tile, self.scratch_dir = tile, Path(scratch_dir or tempfile.gettempdir())
        self.live: list[Stored] = []
        self.waiting: list[Node] = []  # shortcuts that are read after the body at hand
        self.fixed_bytes = 0  # held to the end: keys and values of attention
        self.run_at_once: list[str] = []  # layers that were run on the whole volume
        # Operations times bytes of what was swept, and how much of that there will be.
        self.swept, self.expected = 0.0, math.inf

    def expect(self, vae: CustomVAE, what: Literal["encode", "decode"], voxels: int) -> None:
        """Tell whoever watches how much of the work for so many voxels has passed."""
        if is_watched() and voxels >= WORTH_TELLING:
            self.expected = getattr(rehearsed(vae), what) * voxels

    def walk(self, module: nn.Module, node: Node) -> Node:
        """Extend the graph by a module: by its handler, its declared halo, or in full."""
        if (handler := handler_of(module, HANDLERS)) is not None:
            return handler(self, module, node)
        if reach_of(module, len(node.shape)) is not None:
            return _local(self, module, node)
        return self.at_once(module, node, "it has no handler and declares no `halo`")

    def at_once(self, module: nn.Module, node: Node, why: str) -> Node:
        """Run a module on the whole volume, with a message."""
        name = type(module).__name__
        self.run_at_once.append(name)
        warnings.warn(f"exact mode runs {name} on the whole volume at once: {why}")
        return self.hold(module(self.take(node)))

    def tile_size(self, node: Node, part: int = 1) -> list[int]:
        """Largest tile that the work space, or a part of it, allows, in voxels per axis."""
        work = self.work // part
        size = [min(s, n) for s, n in zip(self.tile or node.shape, node.shape, strict=True)]
        if self.tile is None:
            size[0] = min(size[0], self.rows)
            # Thin slabs first: whole planes keep the halo on one axis, and a few rows the cache.
            # Below the smallest tile that is worth its halo, only what the budget cannot hold is
            # cut further.
            slab, dims = (SMALLEST[0], *node.shape[1:]), len(size)
            limits = (slab, min(work, self.cache)), (SMALLEST[:dims], work)
            for smallest, limit in (*limits, ((1,) * dims, self.budget // 3)):
                while self.work_bytes(node, size) > limit:
                    larger = [i for i, n in enumerate(size) if n > smallest[i]]
                    if not larger:
                        break
                    axis = 0 if 0 in larger and size[0] > 4 else max(larger, key=lambda i: size[i])
                    size[axis] = -(-size[axis] // 2)
            if (needed := self.work_bytes(node, size)) > self.budget:
                warnings.warn(
                    f"memory_gb {self.budget / 2**30:.2g} is too small to be kept: the smallest "
                    f"tile takes {needed / 2**30:.2g} GiB"
                )
        return size

    def work_bytes(self, node: Node, size: Sequence[int]) -> int:
        """What computing tiles of a size takes, apart from what is stored."""
        peak = node.peak_bytes(middle_of(node.shape, size))
        if tuple(size[1:]) != node.shape[1:]:
            peak += sum(kept.between_bytes() for kept in nodes_of(node, Kept))
        return peak

    def sweep(
        self,
        node: Node,
        going: Sequence[Stored] = (),
        beside: Sequence[Node] = (),
        size: Sequence[int] | None = None,
    ) -> Iterator[Region]:
        """Every tile of a node in order, for the caller to read.

        Args:
            node: What the caller reads.
            going: What is given back on the way, as it is passed.
            beside: Further nodes that the caller reads.
            size: Of a tile; None for the largest.
        """
        kept = [k for n in (node, *beside) for k in nodes_of(n, Kept)]
        size = size or self.tile_size(node)
        self.make_room(node, size)
        dear = max(node.operations(), LEAST_OPERATIONS)
        for row in tiles(node, size):
            for region in row:
                yield region
                swept = dear * node.bytes(region)
                self.swept += swept
                passed(swept / self.expected)
                for k in kept:
                    k.trim()
            for leaf in self.live:
                leaf.let_go()
            for leaf in going:
                leaf.free_passed()
        for k in kept:
            k.forget()
        for leaf in going:
            leaf.free()
            self.live.remove(leaf)

    def make_room(self, node: Node, size: Sequence[int]) -> None:
        """Give back what tiles of other shapes left free in the heap, if the budget may need it."""
        if self.device.type != "cpu":
            return
        stored = sum(leaf.rows_bytes(leaf.shape[0]) for leaf in self.live if not leaf.in_file)
        held = stored + self.fixed_bytes + self.work  # as much as those tiles were allowed
        if held + self.work_bytes(node, size) > self.budget:
            trim()

    def slabs(self, node: Node) -> Iterator[tuple[Region, Tensor]]:
        """The tiles of the last node; nothing is left in memory afterwards."""
        for region in self.sweep(node, self.going([node])):
            yield region, node.read(region)

    def settle(self, node: Node) -> tuple[Node, Moments]:
        """Gather a node's statistics, storing it where the budget allows: what to read then, these.

        What a stored node was computed from is given back on the way, unless it is waited for.
        """
        if node.moments is not None:
            return node, node.moments
        node = node if isinstance(node, (Stored, Kept)) else Kept(node)
        moved, size, place = self.to_store(node)
        going = self.going(moved) if moved else []
        stores = [Stored(n.channels, n.shape, home_of(n), place) for n in moved]
        self.live += stores
        moments = Moments(node.channels, self.device)
        sources = [n.sources[0] for n in moved] or [node]
        for region in self.sweep(sources[0], going, sources[1:], size):
            # The one with a halo first.
            parts = [s.take(source, region) for source, s in zip(sources, stores, strict=False)]
            moments.update(parts[0] if parts else node.read(region))
        for n, stored in zip(moved, stores, strict=True):
            n.sources = (stored,)
        node.moments = moments
        return node, moments

    def to_store(self, node: Node) -> tuple[list[Kept], list[int] | None, Place]:
        """What to store while a node is computed, in tiles of which size (None: largest), where.

        Beside the node itself that is the shortcut that waits for it, if both are computed from the
        same: its input need not stay then, nor be computed again. Nothing is stored that is cheap,
        or that does not fit, with smaller tiles neither; but of two dear nodes in a row one is, if
        need be in a file.
        """
        if node.operations() < CHEAP or not isinstance(node, Kept):
            return [], None, self.device
        choices = [[node]]
        for shortcut in self.waiting[-1:]:
            if isinstance(shortcut, Kept) and self.worth_storing(shortcut, node):
                choices.insert(0, [node, shortcut])
        sizes = [self.tile_size(node, part) for part in (1, 2)]
        for place, nodes, size in itertools.product(self.budgets, choices, sizes):
            if self.fits(nodes, size, place):
                return nodes, size, place
        if any(k.moments and k.operations() >= CHEAP for k in nodes_of(node.sources[0], Kept)):
            return [node], None, self.scratch_dir
        return [], None, self.device

    def worth_storing(self, shortcut: Kept, node: Node) -> bool:
        """Whether storing a shortcut beside a node saves memory or dear computation."""
        if shortcut.is_stored or shortcut.shape != node.shape:
            return False
        inputs = set(leaves_of(shortcut)) - {s for w in self.waiting[:-1] for s in leaves_of(w)}
        saves = sum(s.held_bytes() for s in inputs) >= shortcut.bytes()
        return inputs <= set(leaves_of(node)) and (saves or shortcut.operations() >= CHEAP)

    def fits(self, nodes: Sequence[Node], size: Sequence[int], place: torch.device) -> bool:
        """Whether a place's budget holds while nodes are computed in tiles and stored there."""
        going = [s for s in self.going(nodes) if s.place == place]
        passing = sum(s.held_bytes() for s in going)
        held = sum(s.held_bytes() for s in self.live if s.place == place) - passing
        if place == self.device:
            held += self.fixed_bytes + self.work_bytes(nodes[0], size)
        new = sum(n.bytes() for n in nodes)
        if place.type != "cpu":  # there, tensors come and go whole
            return held + passing + new <= self.budgets[place]
        # While one takes the place of the other, both hold the tile at hand: the old one is whole
        # when the first tile is written, the new one when the last is read.
        lag = sum(min(s.held_bytes(), s.rows_bytes(size[0] + 2) + GRAIN) for s in going)
        first = min(new, new * (size[0] + 2) // nodes[0].shape[0] + GRAIN)
        return held + max(passing + first, new + lag) <= self.budgets[place]

    def going(self, nodes: Sequence[Node]) -> list[Stored]:
        """What nobody reads once nodes are computed."""
        pinned = [s for w in self.waiting if w not in nodes for s in leaves_of(w)]
        leaves = {s: None for n in nodes for s in leaves_of(n)}
        return [s for s in leaves if s not in pinned and s not in nodes]

    def hold(self, values: Tensor) -> Stored:
        """Store a whole tensor `(1, C, *shape)`."""
        home = values.device, values.dtype
        stored = Stored(values.shape[1], values.shape[2:], home, values.device)
        stored.part(whole_of(stored.shape)).copy_(values)
        self.live.append(stored)
        return stored

    def near(self, volume: Array) -> Array:
        """A volume on the GPU that the model is on, if it is little there; else as it is."""
        if self.device.type == "cpu" or 4 * math.prod(volume.shape) > self.work:
            return volume
        whole = volume if isinstance(volume, Tensor) else torch.from_numpy(np.array(volume))
        return whole.to(self.device)

    def take(self, node: Node) -> Tensor:
        """The whole of a node; what it was computed from is given back."""
        device, dtype = home_of(node)
        layout = CHANNELS_LAST[2 + len(node.shape)]
        values = torch.empty(
            (1, node.channels, *node.shape), device=device, dtype=dtype, memory_format=layout
        )
        for region, part in self.slabs(node):
            values[(slice(None), slice(None), *(slice(*r) for r in region))] = part
        return values


def tiles(node: Node, size: Sequence[int]) -> list[list[Region]]:
    """The tiles of a node by rows of the first axis."""
    axes = zip(node.shape, size, strict=True)
    edges = [[(a, min(a + s, n)) for a in range(0, n, s)] for n, s in axes]
    return [[(rows, *rest) for rest in itertools.product(*edges[1:])] for rows in edges[0]]


def keep(node: Node, overlap: int = 0) -> Node:
    """The same node, ready to be read with rows that overlap.

    Rows are remembered before functions of a voxel, which are computed again: a block's body and
    shortcut then share them.
    """
    if isinstance(node, (Scaled, Pointwise)):
        node.sources = (keep(node.sources[0], overlap),)
    elif not isinstance(node, (Stored, Kept, Source)):
        node = Kept(node)
    if isinstance(node, Kept):
        node.overlap = max(node.overlap, overlap)
    return node


# Handlers: how each class of module extends the graph --------------------------------------------


def _same(run: Executor, module: nn.Module, node: Node) -> Node:
    return node


def _chain(run: Executor, module: nn.Sequential, node: Node) -> Node:
    for layer in module:
        node = run.walk(layer, node)
    return node


def _pointwise(run: Executor, module: nn.Module, node: Node) -> Node:
    return Pointwise(keep(node), module)


def _block(run: Executor, module: blocks.Block, node: Node) -> Node:
    """`shortcut(x) + body(x)`; the body is read first, it has the larger halo."""
    if module.shortcut is None:
        return run.walk(module.body, node)
    first = getattr(module.body[0], "norm", module.body[0])
    node = run.settle(node)[0] if isinstance(first, norm.GroupNorm) else keep(node)
    shortcut = keep(run.walk(module.shortcut, node))
    run.waiting.append(shortcut)
    body = run.walk(module.body, node)
    run.waiting.pop()
    return Sum(body, shortcut)


def _conv(run: Executor, module: convolutions.Conv, node: Node, padding: Ends = ()) -> Node:
    if module.padding_mode != "zeros":
        return run.at_once(module, node, f"its padding is {module.padding_mode}, not zeros")
    overlap = module.dilation[0] * (module.kernel_size[0] - 1) + 1 - module.stride[0]
    return Conv(keep(node, max(overlap, 0)), module, padding)


def _conv_transpose(run: Executor, module: ConvT, node: Node) -> Node:
    if set(module.dilation) != {1}:
        return run.at_once(module, node, f"its dilation is {module.dilation}")
    pads = zip(convolutions.zeros_of(module), module.output_padding, strict=True)
    padding = [(near, far - extra) for (near, far), extra in pads]
    node = keep(node, module.kernel_size[0] // module.stride[0])
    weight = channels_last(module.weight)
    return TransposedConv(node, weight, module.bias, module.stride, padding, module.groups)


def _local(run: Executor, module: nn.Module, node: Node) -> Node:
    """A module of limited reach: it is run on tiles with a halo, clipped to the volume."""
    reach = reach_of(module, len(node.shape))
    assert reach is not None
    cells = [axis for axis in reach if isinstance(axis, Cells)]
    device, dtype = home_of(node)
    sizes = [(2 * axis.halo + 1) * axis.shrink for axis in cells]
    probe = module(torch.zeros(1, node.channels, *sizes, device=device, dtype=dtype))
    return Local(keep(node, 2 * cells[0].halo), module, cells, probe.shape[1])


def _conv_down(run: Executor, module: downsample.ConvDown, node: Node) -> Node:
    return _conv(run, module.conv, node, module.far_padding)


def _interp_up(run: Executor, module: upsample.InterpUp, node: Node) -> Node:
    if module.mode == "nearest" and not isinstance(module.conv, nn.Identity):
        if max(module.factor) == 2:
            return UpsampledConv(keep(node, 2), module.conv, module.factor)
        weight = fold_nearest(module.conv.weight, module.factor)
        padding = convolutions.zeros_of(module.conv)
        return TransposedConv(keep(node, 2), weight, module.conv.bias, module.factor, padding, 1)

    def grow(x: Tensor) -> Tensor:
        return upsample.interpolate(x, module.factor, module.mode)

    reach = cells_of(module, len(node.shape), int(module.mode == "linear"))
    node = Local(keep(node, 2 * reach[0].halo), grow, reach, node.channels)
    return run.walk(module.conv, node)


def _transpose_up(run: Executor, module: upsample.TransposeUp, node: Node) -> Node:
    return run.walk(module.conv, node)


def _norm_act(run: Executor, module: norm.NormAct, node: Node) -> Node:
    normed = run.walk(module.norm, node)
    if isinstance(normed, Scaled):
        return Scaled(normed.sources[0], normed.scale, normed.shift, module.act)
    return Pointwise(normed, module.act)


def _group_norm(run: Executor, module: norm.GroupNorm, node: Node) -> Node:
    """With the statistics of the whole volume a group norm is an affine map per channel."""
    node, moments = run.settle(node)
    mean, variance = moments.of_groups(module.num_groups)
    return _affine(module, node, mean, variance)


def _batch_norm(run: Executor, module: norm.BatchNorm, node: Node) -> Node:
    return _affine(module, node, module.running_mean, module.running_var)


def _affine(module: norm.GroupNorm | norm.BatchNorm, node: Node, mean: Tensor, var: Tensor) -> Node:
    """`(x - mean) / sqrt(var + eps) * weight + bias` as one multiplication and addition."""
    scale = module.weight.double() / torch.sqrt(var.double() + module.eps)
    shift = module.bias.double() - mean.double() * scale
    return Scaled(node, scale.to(module.weight), shift.to(module.bias))


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
        t, d = torch.arange(f + k - 1)[:, None], torch.arange(k)
        fold = ((t - (k - 1) + d >= 0) & (t - (k - 1) + d < f)).to(folded)
        folded = (folded.movedim(axis, -1) @ fold.T).movedim(-1, axis)
    return channels_last(folded.to(weight.dtype))


# The key is the class that the handler takes.
HANDLERS: dict[type, Callable[[Executor, Any, Node], Node]] = {
    nn.Sequential: _chain,
    custom_vae.Chain: _chain,
    nn.Dropout: _same,
    **dict.fromkeys(POINTWISE, _pointwise),
    nn.Identity: _same,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
    norm.NormAct: _norm_act,
    norm.GroupNorm: _group_norm,
    norm.BatchNorm: _batch_norm,
    norm.NoNorm: _same,
    blocks.Block: _block,
    downsample.ConvDown: _conv_down,
    upsample.InterpUp: _interp_up,
    upsample.TransposeUp: _transpose_up,
    attention.GlobalAttention: global_attention,
    attention.PatchAttention: patch_attention,
    attention.LinearAttention: linear_attention,
    attention.BareLinearAttention: linear_attention,
}
