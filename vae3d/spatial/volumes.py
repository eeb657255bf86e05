"""A volume that the ranks hold in slabs, for code that was written for whole ones.

    volume = SlabVolume.of(x, layout)         # x (B, C, own rows, Y, Z)
    logits, features = discriminator(volume)  # its own forward; a rank has its rows of them
    logits.mean()                             # a plain tensor, of all ranks

Networks that judge volumes (discriminators, frozen networks of features) are anyone's, and may do
anything in their forward. So it runs as it is, and every function of torch that it calls is looked
up here: what is not known is refused by name, and nothing is taken of a slab for a volume. What a
convolution or a pooling layer sees of its input is described by `vae3d.models.reach`.

Rows are those along the axis that is cut. A row that a layer makes belongs to the rank that has the
row at its own number times the layer's stride, the last ones to the last rank; a rank may be left
without any. All of it has second derivatives, which penalties on gradients need.

Every rank has the same plain tensors, and its gradients of one are multiplied by the number of
ranks: on average over the ranks, as data-parallel training takes it, they are those of one process.

Axes: b batch, c channels, x y z space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from vae3d.models.norm import wide
from vae3d.models.reach import Window
from vae3d.spatial.slabs import Layout, Rows, clipped

Sizes = int | Sequence[int]


class SlabVolume(Tensor):
    """A whole volume, of which this rank has some rows.

    As a tensor it has the shape of the whole and no memory.

    Attributes:
        slab: This rank's rows; there may be none.
        cut: Who holds which rows of the volume that all began with.
        owned: Every rank's rows of this one.
        dims: Spatial axes, the last ones.
    """

    slab: Tensor
    cut: Layout
    owned: list[Rows]
    dims: int

    @classmethod
    def of(cls, slab: Tensor, cut: Layout) -> Self:
        """The volume `(B, C, X, Y, Z)` of which a rank has the slab that its layout tells."""
        return cls.held(slab, cut, cut.slabs, slab.ndim - 2)

    @classmethod
    def held(cls, slab: Tensor, cut: Layout, owned: Iterable[Rows], dims: int) -> Self:
        """One of which every rank has the rows that `owned` tells."""
        owned = list(owned)
        shape = [*slab.shape]
        shape[cut.axis - dims] = owned[-1][1]
        found = torch.empty(shape, dtype=slab.dtype, device="meta").as_subclass(cls)
        found.slab, found.cut, found.owned, found.dims = slab, cut, owned, dims
        return found

    @property
    def axis(self) -> int:
        """The axis along which it is cut, counted from the last: those before may change."""
        return self.cut.axis - self.dims

    def holding(self, slab: Tensor, owned: Iterable[Rows] | None = None) -> Self:
        """A volume that was made of this one, cut at the same places where no others are given."""
        return self.held(slab, self.cut, owned or self.owned, self.dims)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Tensor],
        types: object,
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Take a function of torch of the whole volume, if it is known how."""
        name = getattr(func, "__name__", type(func).__name__)
        if name == "__get__":
            return attribute(func, *args)
        if name in OF_SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        known = pointwise if name in POINTWISE else FUNCTIONS.get(name)
        if isinstance(func, torch.ScriptMethod):
            raise unknown("is TorchScript")
        if known is None:
            raise unknown(f"calls {name}")
        return known(func, *args, **(kwargs or {}))


class Whole(Layout):
    """The layout of one rank alone, which has all rows and asks nobody.

    Args:
        shape: Voxels of the volume per axis.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape, self.axis, self.dim, self.group = tuple(shape), 0, 2, None
        self.rank, self.size, self.bytes_sent = 0, 1, 0
        self.slabs, self.cells = [(0, shape[0])], [shape[0]]

    def sum(self, x: Tensor) -> Tensor:
        """See `Layout`."""
        return x

    def sum_of_teams(self, x: Tensor) -> Tensor:
        """See `Layout`."""
        return x


def check(network: nn.Module, channels: int, dims: int, size: int = 128) -> None:
    """Refuse a network that calls what is not known of volumes in slabs.

    It is run on a volume without values, which takes neither memory nor time.

    Args:
        network: Anything that takes one volume.
        channels: Of its input.
        dims: Its spatial axes.
        size: Of that volume, along each axis.

    Raises:
        ValueError: It names the network and the function.
    """
    name = type(network).__name__
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in network.modules()):
        raise ValueError(
            f"sharding spatial: {name} has a SyncBatchNorm; take BatchNorm, whose batch is that of"
            " all ranks here"
        )
    states = dict([*network.named_parameters(), *network.named_buffers()])
    states = {key: torch.empty_like(t, device="meta") for key, t in states.items()}
    dtype = next((t.dtype for t in states.values() if t.is_floating_point()), torch.float32)
    x = torch.empty(1, channels, *[size] * dims, dtype=dtype, device="meta")
    try:
        torch.func.functional_call(network, states, (SlabVolume.of(x, Whole(x.shape[2:])),))
    except ValueError as error:
        raise ValueError(f"sharding spatial: {name} {error}") from error
    except (RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"sharding spatial: {name} cannot be run without data, to look for what is not known in"
            f" slabs; its tensors have to be parameters or buffers: {why}"
        ) from error


def unknown(what: str) -> ValueError:
    """The error that names what is done to a volume."""
    return ValueError(f"{what}, and it is not known how that is done to a volume in slabs")


# What stands in the shape of the whole volume.
OF_SHAPES = {"size", "dim", "numel", "ndimension", "__len__", "is_floating_point"}
# What is done to each voxel by itself.
POINTWISE = {
    *("add", "sub", "rsub", "mul", "div", "true_divide", "neg", "pow", "__rsub__", "__rdiv__"),
    *("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
    *("__rpow__", "__rtruediv__"),
    *("abs", "square", "sqrt", "rsqrt", "exp", "log", "clamp", "clamp_min", "clamp_max"),
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "silu"),
    *("gelu", "mish", "softplus", "sigmoid", "logsigmoid", "tanh", "hardtanh", "hardswish"),
    *("prelu", "maximum", "minimum", "to", "float", "double", "detach", "clone", "contiguous"),
    *("type_as", "requires_grad_"),
}


def attribute(func: Callable[..., Tensor], volume: object) -> object:
    """Read an attribute of a tensor: its shape is that of the whole."""
    assert isinstance(volume, SlabVolume)
    name = getattr(func, "__self__", func).__name__
    if name in ("shape", "ndim"):
        with torch._C.DisableTorchFunctionSubclass():
            return func(volume)
    if name in ("dtype", "device", "is_cuda", "requires_grad"):
        return func(volume.slab)
    raise unknown(f"asks for {name}")


def pointwise(func: Callable[..., Tensor], *args: object, **options: object) -> SlabVolume:
    """Do something to each voxel of volumes that are cut alike."""
    volumes = [a for a in (*args, *options.values()) if isinstance(a, SlabVolume)]
    like = volumes[0]
    if any(v.shape[-v.dims :] != like.shape[-like.dims :] for v in volumes):
        raise unknown("adds up volumes of unequal size")
    tensors = [a for a in (*args, *options.values()) if isinstance(a, Tensor)]
    plain = [a for a in tensors if not isinstance(a, SlabVolume) and a.ndim >= -like.axis]
    if any(a.shape[like.axis] != 1 for a in plain):
        raise unknown("has a value of its own for each voxel")
    named = {key: rows_of(value, like.owned) for key, value in options.items()}
    return like.holding(func(*(rows_of(value, like.owned) for value in args), **named))


def rows_of(value: object, owned: Sequence[Rows]) -> object:
    """The rows of a volume, cut as another is; anything else as it is."""
    if not isinstance(value, SlabVolume):
        return value
    if value.owned == owned:
        return value.slab
    before, space = value.slab.shape[: -value.dims], value.slab.shape[-value.dims :]
    flat = value.slab.reshape(1, math.prod(before), *space)
    slab = fetched(value.cut, flat, value.owned, owned)
    return slab.reshape(*before, *slab.shape[2:])


def fetched(cut: Layout, slab: Tensor, owned: Sequence[Rows], wanted: Sequence[Rows]) -> Tensor:
    """The rows that this rank wants, from whoever has them.

    A node of the graph on all ranks, also where it does nothing: nodes of graphs that are alike run
    in one order.
    """
    (lo, hi), start = wanted[cut.rank], clipped(owned, wanted)[cut.rank][0]
    return cut.part(cut.extended(slab, wanted, owned), lo - start, hi - start)


# Layers that see other rows ------------------------------------------------------------------


def within(
    func: Callable[[Tensor], Tensor], x: SlabVolume, window: Window, least: int = 1
) -> SlabVolume:
    """Run what sees a limited number of rows: on the slab with them, and cut its own rows.

    A rank of which no row is made makes one all the same, and holds none of it: so every rank runs
    every layer, and sends what the others wait for.

    Args:
        func: The layer.
        x: What it is run on.
        window: What it sees.
        least: Rows that it asks for, zeros of its own apart.
    """
    me, n = x.cut.rank, x.owned[-1][1]
    size = window.size(n)
    if size < 1:
        raise ValueError(f"has a layer of {window.extent} rows, and the volume has {n} of them")
    edges = [min(-(-lo // window.stride), size) for lo, _ in x.owned]
    made = list(pairwise([*edges, size]))
    computed = [(min(lo, size - 1), max(hi, min(lo, size - 1) + 1)) for lo, hi in made]
    seen = [window.wants(*rows) for rows in computed]
    ends = [min(max(hi, max(lo, 0) + least), n) for lo, hi in seen]
    pairs = zip(seen, ends, strict=True)
    wanted = [(window.begins(max(min(lo, end - least), 0))[0], end) for (lo, _), end in pairs]
    y = func(fetched(x.cut, x.slab, x.owned, wanted))
    begin, count = computed[me][0] - window.begins(wanted[me][0])[1], made[me][1] - made[me][0]
    return x.holding(x.cut.part(y, begin, begin + count), made)


def convolved(
    func: Callable[..., Tensor],
    x: SlabVolume,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> SlabVolume:
    """A convolution that adds zeros."""
    reach = along_cut(dilation, x) * (weight.shape[x.cut.dim] - 1)
    if isinstance(padding, str):
        near = reach // 2 if padding == "same" else 0
        far = reach - near if padding == "same" else 0
    else:
        near = far = along_cut(padding, x)
    rest = weight, bias, stride, padding, dilation, groups
    window = Window(along_cut(stride, x), near, far, reach + 1)
    return within(lambda slab: func(slab, *rest), x, window)


def max_pooled(
    func: Callable[..., Tensor],
    x: SlabVolume,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> SlabVolume:
    """Maxima of windows."""
    if ceil_mode or return_indices:
        raise unknown("pools with ceil_mode or return_indices")
    sizes = kernel_size, kernel_size if stride is None else stride, padding, dilation
    size, steps, ends, apart = (along_cut(number, x) for number in sizes)
    window = Window(steps, ends, ends, apart * (size - 1) + 1)
    return within(lambda slab: func(slab, kernel_size, stride, padding, dilation), x, window)


def mean_pooled(
    func: Callable[..., Tensor],
    x: SlabVolume,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> SlabVolume:
    """Means of windows."""
    if ceil_mode:
        raise unknown("pools with ceil_mode")
    sizes = kernel_size, kernel_size if stride is None else stride, padding
    size, steps, ends = (along_cut(number, x) for number in sizes)
    rest = kernel_size, stride, padding, False, count_include_pad, divisor_override
    window = Window(steps, ends, ends, size)
    return within(lambda slab: func(slab, *rest), x, window, least=size)


def padded(
    func: Callable[..., Tensor],
    x: SlabVolume,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> SlabVolume:
    """Constants beyond the volume, or its last voxels again."""
    pad = [*pad, *[0] * (2 * x.dims - len(pad))]
    at = 2 * (x.dims - 1 - x.cut.axis)
    near, far = pad[at : at + 2]
    if min(near, far) < 0 or (max(near, far) > 0 and mode not in ("constant", "replicate")):
        raise unknown(f"pads with {mode} by {near} and {far}")
    me, n, holders = x.cut.rank, x.owned[-1][1], [r for r, (a, b) in enumerate(x.owned) if a < b]
    pad[at] = near * (me == holders[0])
    pad[at + 1] = far * (me == holders[-1])
    starts = [lo + near if r > holders[0] else 0 for r, (lo, _) in enumerate(x.owned)]
    starts = [n + near + far if r > holders[-1] else lo for r, lo in enumerate(starts)]
    slab = func(x.slab, pad, mode if me in holders else "constant", value)
    return x.holding(slab, pairwise([*starts, n + near + far]))


def interpolated(
    func: Callable[..., Tensor],
    x: SlabVolume,
    size: Sequence[int],
    scale_factor: object = None,
    mode: str = "nearest",
    **options: object,
) -> SlabVolume:
    """The means of cells, which have the rows `n o / m` to `n (o + 1) / m` for row o of m."""
    if mode != "area" or scale_factor is not None:
        raise unknown("calls interpolate, other than for the area of a size")
    me, n, m = x.cut.rank, x.owned[-1][1], size[x.cut.axis]
    made = list(pairwise([*(-(-lo * m // n) for lo, _ in x.owned), m]))
    computed = [(min(lo, m - 1), max(hi, min(lo, m - 1) + 1)) for lo, hi in made]
    wanted = [(lo * n // m, -(-hi * n // m)) for lo, hi in computed]
    slab, start, dim = fetched(x.cut, x.slab, x.owned, wanted), wanted[me][0], x.cut.dim
    cells = [(o * n // m - start, -(-(o + 1) * n // m) - start) for o in range(*computed[me])]
    rows = torch.stack([x.cut.part(slab, *cell).mean(dim) for cell in cells], dim)
    _, _, *own = x.cut.resized((0, 0, *size), len(cells))
    return x.holding(x.cut.part(func(rows, own, mode=mode), 0, made[me][1] - made[me][0]), made)


def dropped(
    func: Callable[..., Tensor],
    x: SlabVolume,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> SlabVolume:
    """Dropout, where it does nothing."""
    if training and p > 0:
        raise unknown("drops values")
    return x


def along_cut(sizes: Sizes, x: SlabVolume) -> int:
    """Of one number, or of one for each axis, that of the axis that is cut."""
    return sizes if isinstance(sizes, int) else sizes[x.cut.axis]


# Norms ---------------------------------------------------------------------------------------


def standardized(
    x: Tensor,
    axes: tuple[int, ...],
    count: Tensor | int,
    total: Callable[[Tensor], Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(x - mean) / std` over axes of all ranks, with mean and variance in float64."""
    mean = total(x.sum(axes, keepdim=True, dtype=torch.float64)) / count
    centered = x - mean.to(x.dtype)
    var = total(centered.square().sum(axes, keepdim=True, dtype=torch.float64)) / count
    return centered * torch.rsqrt(var + eps).to(x.dtype), mean, var


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift per channel."""
    for change, values in ((torch.mul, weight), (torch.add, bias)):
        if values is not None:
            x = change(x, values.to(x.dtype).view(-1, *[1] * (x.ndim - 2)))
    return x


def group_norm(
    func: object,
    x: SlabVolume,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> SlabVolume:
    """Per sample and group of channels."""
    groups = wide(x.slab).unflatten(1, (num_groups, -1))
    count = x[0].numel() // num_groups
    y, _, _ = standardized(groups, tuple(range(2, groups.ndim)), count, x.cut.sum, eps)
    return x.holding(scaled(y.flatten(1, 2), weight, bias).to(x.dtype))


def instance_norm(
    func: Callable[..., Tensor],
    x: SlabVolume,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> SlabVolume:
    """Per sample and channel."""
    if use_input_stats and running_mean is not None:
        raise unknown("gathers running statistics of instances")
    if use_input_stats:
        return group_norm(func, x, x.shape[1], weight, bias, eps)
    return x.holding(func(x.slab, running_mean, running_var, weight, bias, False, momentum, eps))


def batch_norm(
    func: Callable[..., Tensor],
    x: SlabVolume,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> SlabVolume:
    """Per channel; the batch is that of all ranks, of other teams too."""
    values = wide(x.slab)
    if not training:
        assert running_mean is not None and running_var is not None
        values = (values - along(running_mean, values)) * torch.rsqrt(
            along(running_var, values) + eps
        )
        return x.holding(scaled(values, weight, bias).to(x.dtype))
    number = values.new_full((), values.numel() / values.shape[1], dtype=torch.float64)
    count = x.cut.sum_of_teams(number)
    axes = (0, *range(2, values.ndim))
    y, mean, var = standardized(values, axes, count, x.cut.sum_of_teams, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_mean.lerp_(mean.flatten().to(running_mean), momentum)
            running_var.lerp_(unbiased.flatten().to(running_var), momentum)
    return x.holding(scaled(y, weight, bias).to(x.dtype))


def along(values: Tensor, like: Tensor) -> Tensor:
    """A number for each channel of `(B, C, *spatial)`."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 2))


# Sums, shapes and gradients ------------------------------------------------------------------


def summed(
    func: Callable[..., Tensor],
    x: SlabVolume,
    dim: Sizes | None = None,
    keepdim: bool = False,
) -> Tensor:
    """Sum or mean: over all of space a plain tensor, over axes before it a volume."""
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    axes = tuple(axis % x.ndim for axis in dims)
    in_space = [axis for axis in axes if axis >= x.ndim - x.dims]
    if not in_space:
        return x.holding(func(x.slab, axes, keepdim))
    if len(in_space) < x.dims:
        raise unknown(f"takes a {func.__name__} over some axes of space")
    total = x.cut.sum(x.slab.sum(axes, keepdim, dtype=torch.float64))
    count = math.prod(x.shape[axis] for axis in axes) if func.__name__ == "mean" else 1
    return (total / count).to(x.dtype)


AXES = {"flatten": 2, "transpose": 2, "unflatten": 1, "unsqueeze": 1, "squeeze": 1}


def shaped(func: Callable[..., Tensor], x: SlabVolume, *args: int | Sequence[int]) -> SlabVolume:
    """Samples and channels in another shape."""
    slab = func(x.slab, *args)
    before = max(x.ndim, slab.ndim) - x.dims
    axes = args[: AXES[func.__name__]]
    if len(axes) < AXES[func.__name__] or any(
        not isinstance(axis, int) or not 0 <= axis < before for axis in axes
    ):
        raise unknown(f"has {func.__name__} of axes of space")
    return x.holding(slab)


def selected(func: Callable[..., Tensor], x: SlabVolume, key: object) -> SlabVolume:
    """Samples or channels."""
    keys = key if isinstance(key, tuple) else (key,)
    if len(keys) > x.ndim - x.dims or not all(isinstance(k, (int, slice)) for k in keys):
        raise unknown("takes a part of a volume")
    return x.holding(func(x.slab, key))


def apart(
    func: Callable[..., tuple[Tensor, ...]], x: SlabVolume, *args: int, dim: int = 0
) -> tuple[SlabVolume, ...]:
    """Samples or channels one by one, or in groups."""
    sizes = 0 if func.__name__ == "unbind" else 1
    dim = args[sizes] if len(args) > sizes else dim
    if not 0 <= dim < x.ndim - x.dims:
        raise unknown(f"has {func.__name__} of axes of space")
    return tuple(x.holding(part) for part in func(x.slab, *args[:sizes], dim))


def expanded(func: Callable[..., Tensor], x: SlabVolume, *sizes: int) -> SlabVolume:
    """Samples or channels again."""
    space = zip(sizes[-x.dims :], x.shape[-x.dims :], strict=True)
    if any(size not in (-1, n) for size, n in space):
        raise unknown("has expand of axes of space")
    return x.holding(func(x.slab, *sizes[: -x.dims], *[-1] * x.dims))


def joined(func: Callable[..., Tensor], parts: Sequence[Tensor], dim: int = 0) -> SlabVolume:
    """Volumes that are cut alike, one after another as samples or channels."""
    volumes = [part for part in parts if isinstance(part, SlabVolume)]
    like = volumes[0]
    alike = len(volumes) == len(parts) and all(v.owned == like.owned for v in volumes)
    if not alike or not 0 <= dim < like.ndim - like.dims:
        raise unknown("joins volumes of unequal size, or along an axis of space")
    return like.holding(func([v.slab for v in volumes], dim))


def gradient(
    func: Callable[..., tuple[Tensor, ...]],
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    **options: bool,
) -> tuple[SlabVolume]:
    """Gradient of a plain tensor, which every rank takes of the whole."""
    (x,) = inputs
    assert isinstance(x, SlabVolume)
    (slope,) = func(outputs, x.slab, **options)
    return (x.holding(slope / x.cut.size),)


FUNCTIONS: dict[str, Callable[..., object]] = {
    **dict.fromkeys(("conv2d", "conv3d"), convolved),
    **dict.fromkeys(("max_pool2d", "max_pool3d"), max_pooled),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), mean_pooled),
    **dict.fromkeys(("dropout", "dropout2d", "dropout3d"), dropped),
    **dict.fromkeys(("sum", "mean"), summed),
    **dict.fromkeys(AXES, shaped),
    "pad": padded,
    "interpolate": interpolated,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "__getitem__": selected,
    "expand": expanded,
    **dict.fromkeys(("unbind", "split", "chunk"), apart),
    "cat": joined,
    "grad": gradient,
}
