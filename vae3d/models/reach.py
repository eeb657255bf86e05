"""What a layer sees: the one description of it that exact mode and sharded running share.

Exact mode (`vae3d.exact`) computes any region of a layer's output, sharded running
(`vae3d.spatial`) any slab of it; both ask here which rows of the input that takes. A layer that has
no entry here may declare `halo`: input voxels beside its own, one number or one per axis.

All of it is about one axis; a region is `(lo, hi)`, and may reach beyond the volume, where layers
see zeros of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import nn

from vae3d.kernels import convolutions
from vae3d.kernels.convolutions import Conv, ConvT, Ends
from vae3d.models import attention, downsample, norm, posterior, upsample

H = TypeVar("H", bound=Callable[..., object])

# What a subclass may not override if what is known of its base is to hold for it.
OVERRIDES = ("forward", "normalize", "update", "mix")
# Functions of each voxel's channels.
POINTWISE: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Tanh,
    nn.Sigmoid,
    nn.Dropout,
    norm.RMSNorm,
    norm.NoNorm,
    *norm.ACTIVATIONS.values(),
)


class Window(NamedTuple):
    """A convolution: output voxel o sees `extent` voxels from `o * stride - near` on."""

    stride: int
    near: int  # zeros before the axis
    far: int  # and after it
    extent: int

    def size(self, n: int) -> int:
        """Output voxels of `n` input voxels."""
        return (n + self.near + self.far - self.extent) // self.stride + 1

    def wants(self, lo: int, hi: int) -> tuple[int, int]:
        """Input voxels of output voxels, those beyond the volume included."""
        first = lo * self.stride - self.near
        return first, (hi - 1) * self.stride - self.near + self.extent

    def begins(self, first: int) -> tuple[int, int]:
        """The input voxel at or before `first` to run the layer from, and the output it begins at.

        The layer adds its own zeros there, so what it makes of them is to be cut off.
        """
        return first // self.stride * self.stride, first // self.stride


class Spread(NamedTuple):
    """A transposed convolution: input voxel i reaches `extent` voxels from `i * grow - near` on."""

    grow: int
    near: int  # cut off before the axis
    far: int  # and after it
    extent: int

    def size(self, n: int) -> int:
        """Output voxels of `n` input voxels."""
        return (n - 1) * self.grow - self.near - self.far + self.extent

    def wants(self, lo: int, hi: int) -> tuple[int, int]:
        """Input voxels of output voxels."""
        first = -(-(lo + self.near - self.extent + 1) // self.grow)
        return first, (hi - 1 + self.near) // self.grow + 1

    def begins(self, first: int) -> tuple[int, int]:
        """See `Window`."""
        return first, first * self.grow


class Cells(NamedTuple):
    """Cells of `shrink` voxels become `grow` voxels, and see `halo` voxels beside themselves."""

    shrink: int = 1
    grow: int = 1
    halo: int = 0

    def size(self, n: int) -> int:
        """Output voxels of `n` input voxels."""
        return n // self.shrink * self.grow

    def wants(self, lo: int, hi: int) -> tuple[int, int]:
        """Input voxels of output voxels, whole cells."""
        halo = -(-self.halo // self.shrink) * self.shrink
        return (
            lo // self.grow * self.shrink - halo,
            -(-hi // self.grow) * self.shrink + halo,
        )

    def begins(self, first: int) -> tuple[int, int]:
        """See `Window`."""
        cell = first // self.shrink
        return cell * self.shrink, cell * self.grow


class Tiles(NamedTuple):
    """Attention in windows: every voxel of a window sees the whole of it."""

    window: int
    shift: int  # voxels that the first window begins before the axis

    def size(self, n: int) -> int:
        """Output voxels of `n` input voxels."""
        return n

    def wants(self, lo: int, hi: int) -> tuple[int, int]:
        """Input voxels of output voxels, from a multiple of the window on.

        The layer counts windows from the origin of what it is given.
        """
        w, s = self
        first, last = (lo + s) // w * w - s, -(-(hi + s) // w) * w - s
        return max(first, 0) // w * w, last

    def begins(self, first: int) -> tuple[int, int]:
        """See `Window`."""
        return first, first


Reach = Window | Spread | Cells | Tiles


def reach_of(module: nn.Module, dims: int) -> tuple[Reach, ...] | None:
    """What a layer sees along each axis; None where that is not known.

    Args:
        module: An elementary layer.
        dims: Its spatial axes.
    """
    describe = handler_of(module, DESCRIBED)
    if describe is not None:
        return describe(module, dims)
    halo = getattr(module, "halo", None)
    return None if halo is None else cells_of(module, dims, halo)


def cells_of(module: nn.Module, dims: int, halo: int | Sequence[int] = 0) -> tuple[Cells, ...]:
    """What a layer of limited reach sees."""
    ones = (1,) * dims
    halos = (halo,) * dims if isinstance(halo, int) else halo
    shrink = module.factor if isinstance(module, downsample.Down) else ones
    grow = module.factor if isinstance(module, upsample.Up) else ones
    return tuple(Cells(*axis) for axis in zip(shrink, grow, halos, strict=True))


def convolution(layer: Conv, dims: int) -> tuple[Reach, ...] | None:
    """A convolution that adds zeros; what others repeat or mirror is at the volume's end alone."""
    return windows_of(layer) if layer.padding_mode == "zeros" else None


def interpolated(layer: upsample.InterpUp, dims: int) -> tuple[Reach, ...]:
    """Interpolation, and a convolution of width 3 after it, reach into the next voxel alone."""
    halo = 0 if layer.mode == "nearest" and isinstance(layer.conv, nn.Identity) else 1
    return cells_of(layer, dims, halo)


def windows_of(layer: Conv, padding: Ends = ()) -> tuple[Window, ...]:
    """What a convolution sees; `padding` in place of its own."""
    kernel = zip(layer.dilation, layer.kernel_size, strict=True)
    extent = [d * (k - 1) + 1 for d, k in kernel]
    ends = padding or convolutions.zeros_of(layer)
    axes = zip(layer.stride, ends, extent, strict=True)
    return tuple(Window(s, near, far, r) for s, (near, far), r in axes)


def spreads_of(layer: ConvT) -> tuple[Spread, ...]:
    """What a transposed convolution sees."""
    ends = convolutions.zeros_of(layer)
    kernel = zip(layer.dilation, layer.kernel_size, strict=True)
    extent = [d * (k - 1) + 1 for d, k in kernel]
    axes = zip(layer.stride, ends, layer.output_padding, extent, strict=True)
    return tuple(Spread(s, near, far - extra, r) for s, (near, far), extra, r in axes)


def handler_of(module: nn.Module, table: Mapping[type, H]) -> H | None:
    """The entry of a module's class or of a base of which nothing that counts is overridden."""
    for cls in type(module).__mro__:
        if cls in table and all(
            getattr(cls, name, None) is getattr(type(module), name, None) for name in OVERRIDES
        ):
            return table[cls]
    return None


DESCRIBED: dict[type, Callable[..., tuple[Reach, ...] | None]] = {
    **dict.fromkeys(POINTWISE, cells_of),
    **dict.fromkeys(
        (
            *(posterior.LogVarianceHead, posterior.SoftplusHead, posterior.FixedStdHead),
            *(posterior.FSQ, posterior.VQ),
        ),
        cells_of,
    ),
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose2d: lambda layer, _: spreads_of(layer),
    nn.ConvTranspose3d: lambda layer, _: spreads_of(layer),
    attention.PatchAttention: lambda layer, _: tuple(map(Tiles, layer.window, layer.shift)),
    downsample.ConvDown: lambda layer, _: windows_of(layer.conv, layer.far_padding),
    downsample.PoolDown: cells_of,
    downsample.HaarDown: cells_of,
    downsample.UnshuffleDown: lambda layer, dims: cells_of(layer, dims, 1),
    upsample.InterpUp: interpolated,
    upsample.TransposeUp: lambda layer, _: spreads_of(layer.conv),
    upsample.ShuffleUp: lambda layer, dims: cells_of(layer, dims, 1),
    upsample.HaarUp: cells_of,
}
