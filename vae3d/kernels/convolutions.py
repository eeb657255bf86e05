"""Convolutions of one slab on the CPU, each by the fastest way there is.

oneDNN is called directly, also where PyTorch's own dispatch would choose a slow kernel; matrix
products serve where it wastes its width, and Winograd's sums where they pay.

A slab is `(1, C, *n)`, channels last; `padding` has one number per axis, zeros at both ends.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.kernels import winograd
from vae3d.kernels.memory import CHANNELS_LAST, channels_last, images
from vae3d.kernels.winograd import Axes, Maybe

Conv = nn.Conv2d | nn.Conv3d
ConvT = nn.ConvTranspose2d | nn.ConvTranspose3d
Ends = Sequence[tuple[int, int]]  # a number before and one after each axis
Pairs = Iterator[tuple[Tensor, Tensor]]

SLOW_KERNEL = 20480  # PyTorch leaves oneDNN for this many values of (c, x, y) or fewer


def convolve(
    x: Tensor, weight: Tensor, bias: Maybe, padding: Axes, stride: Axes = (), together: int = 2
) -> Tensor:
    """Convolution of a slab; `together` as in `convolve_into`."""
    stride = stride or (1,) * len(padding)
    if pointwise(weight, stride):
        y = F.linear(x.movedim(1, -1), weight.flatten(1), bias)
        return y.movedim(-1, 1)
    if few(weight, stride) and len(weight) <= 2:
        return conv_to_few(x, weight, bias, padding)
    if winograd.fits(weight, stride) and x.shape[2] + 2 * padding[0] >= 4:
        axes = zip(x.shape[2:], padding, weight.shape[2:], strict=True)
        size = [n + 2 * p + 1 - k for n, p, k in axes]
        y = empty_like(x, size, len(weight))
        convolve_into(y, x, weight, bias, padding, together=together)
        return y
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * len(padding), 1)


def convolve_into(
    target: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    padding: Axes,
    stride: Axes = (),
    onto: Maybe = None,
    together: int = 2,
) -> None:
    """Convolution of a slab into `target`, added to `onto` (which may be `target`) if given.

    `together` is the number of rows that Winograd's sums make at once: two or, for inference, four.
    """
    stride = stride or (1,) * len(padding)
    if target.dtype == x.dtype and pointwise(weight, stride):
        into = target.movedim(1, -1).flatten(0, -2)
        x, weight = x.movedim(1, -1).flatten(0, -2), weight.flatten(1).t()
        base = into if onto is None else onto.movedim(1, -1).flatten(0, -2)
        torch.addmm(base, x, weight, beta=int(onto is not None), out=into)
        if bias is not None:
            into += bias
    elif target.dtype == x.dtype and target.shape[2] > 1 and winograd.fits(weight, stride):
        x, padding = winograd.pad_rows(x, padding)
        together = together if target.shape[2] >= together else 2
        some = winograd.convolve_four if together == 4 else winograd.convolve_two
        done = target.shape[2] // together * together
        first = None if onto is None else onto[:, :, :done]
        some(target[:, :, :done], x, weight, bias, padding, first)
        if done < target.shape[2]:
            last = None if onto is None else onto[:, :, done:]
            convolve_into(target[:, :, done:], x[:, :, done:], weight, bias, padding, stride, last)
    elif (
        onto is None
        or target.dtype != x.dtype
        or len(weight) <= 2
        or prod(x.shape[:4]) <= SLOW_KERNEL
    ):
        y = convolve(x, weight, bias, padding, stride)
        if onto is not None and target.dtype == y.dtype:
            torch.add(y, onto, out=target)
        else:
            target.copy_(y if onto is None else y.add_(onto.to(y.dtype)))
    else:
        if onto is not target:
            target.copy_(onto)
        torch.ops.mkldnn._convolution_pointwise_.binary(
            target, x, weight, bias, padding, stride, (1,) * len(padding), 1,
            "add", 1.0, None, [], "",
        )  # fmt: skip


def pointwise(weight: Tensor, stride: Axes) -> bool:
    """Whether a convolution is a matrix product of voxels and weights."""
    return weight[0, 0].numel() == 1 and max(stride) == 1


def zeros_of(layer: Conv | ConvT) -> tuple[tuple[int, int], ...]:
    """Zeros that a convolution adds before and after each axis, also where they go by a name."""
    if not isinstance(layer.padding, str):
        return tuple((p, p) for p in layer.padding)
    axes = zip(layer.dilation, layer.kernel_size, strict=True)
    sums = [d * (k - 1) * (layer.padding == "same") for d, k in axes]
    return tuple((n // 2, n - n // 2) for n in sums)


def few(weight: Tensor, stride: Axes) -> bool:
    """Whether one end has so few channels that oneDNN, which takes sixteen at a time, is wasted."""
    low, high = sorted(weight.shape[:2])
    return low <= 2 and high >= 16 and max(stride) == 1 and weight.dtype == torch.float32


def conv_to_few(x: Tensor, weight: Tensor, bias: Maybe, padding: Axes) -> Tensor:
    """Convolution to few channels: every voxel times the weights of each tap, then shifted sums."""
    out, channels, *kernel = weight.shape
    grid = x.shape[2:]
    taps = weight.flatten(2).permute(2, 0, 1).reshape(-1, channels)
    products = (taps @ x.movedim(1, -1).reshape(-1, channels).t()).view(-1, out, *grid)
    full = x.new_zeros(out, *(n + k - 1 for n, k in zip(grid, kernel, strict=True)))
    for tap, image in zip(product(*map(range, kernel)), products, strict=True):
        axes = zip(kernel, tap, grid, strict=True)
        full[(slice(None), *(slice(k - 1 - t, k - 1 - t + n) for k, t, n in axes))] += image
    axes = zip(kernel, padding, grid, strict=True)
    y = full[(slice(None), *(slice(k - 1 - p, n + p) for k, p, n in axes))]
    if bias is not None:
        y = y + bias.view(-1, *(1,) * len(grid))
    return channels_last(y[None])


def weights_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Axes, stride: Axes = ()
) -> Tensor:
    """Gradient of the weights of a slab's convolution."""
    stride = stride or (1,) * len(padding)
    if pointwise(weight, stride):
        g, x = (t.movedim(1, -1).flatten(0, -2) for t in (grad, x))
        return (g.t() @ x).view_as(weight)
    if few(weight, stride):
        return few_backward(grad, x, weight, padding)
    if winograd.fits(weight, stride) and grad.shape[2] > 1:
        x, padding = winograd.pad_rows(x, padding)
        pairs = grad.shape[2] // 2 * 2
        total = winograd.weights_gradient(grad[:, :, :pairs], x, weight, padding)
        if pairs < grad.shape[2]:
            total += weights_gradient(grad[:, :, pairs:], x[:, :, pairs:], weight, padding)
        return total
    if has_fast_gradients(x):
        return _backward(grad, x, weight, padding, stride, weights=True)
    x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    options = (padding[1:], stride[1:], True)
    seen = planes_seen(x, weight, stride, grad.shape[2])
    planes = [_backward(images(grad), rows, plane, *options) for rows, plane in seen]
    return torch.stack(planes, 2)


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: Axes, stride: Axes) -> Tensor:
    """Gradient of the input of a slab's convolution."""
    if has_fast_gradients(x):
        return _backward(grad, x, weight, padding, stride, weights=False)
    dx = F.pad(torch.zeros_like(x), (0, 0, 0, 0, padding[0], padding[0]))
    for rows, plane in planes_seen(dx, weight, stride, grad.shape[2]):
        rows += _backward(images(grad), rows, plane, padding[1:], stride[1:], weights=False)
    return dx[:, :, padding[0] : dx.shape[2] - padding[0]]


def has_fast_gradients(x: Tensor) -> bool:
    """Whether PyTorch leaves the gradients of a slab's convolution to oneDNN."""
    return x.dim() == 4 or prod(x.shape[:4]) > SLOW_KERNEL


def planes_seen(x: Tensor, weight: Tensor, stride: Axes, count: int) -> Pairs:
    """Each plane of the weights along x, with the rows of a padded slab that it sees.

    For gradients of small slabs: as batches of 2D convolutions they have fast kernels at any size.
    """
    span = (count - 1) * stride[0] + 1
    for start, plane in enumerate(weight.unbind(2)):
        yield images(x)[start : start + span : stride[0]], plane


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Axes, stride: Axes, weights: bool
) -> Tensor:
    """Gradient of the weights, or else of the input, as PyTorch computes it."""
    zeros, ones = (0,) * len(padding), (1,) * len(padding)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, tuple(stride), tuple(padding), ones, False, zeros, 1,
        [not weights, weights, False],
    )[int(weights)]  # fmt: skip


def few_backward(grad: Tensor, x: Tensor, weight: Tensor, padding: Axes) -> Tensor:
    """Gradient of the weights between few channels and many, as one matrix product."""
    kernel, dims = weight.shape[2:], range(2, weight.dim())
    if weight.shape[1] <= 2:  # what each tap sees of the input, times the gradient
        around = [p for p in reversed(padding) for _ in range(2)]
        seen, many = unfold(F.pad(x, around), kernel), grad
    else:  # the taps of a gradient run backwards
        far = [k - 1 - p for k, p in zip(reversed(kernel), reversed(padding), strict=True)]
        seen, many = unfold(F.pad(grad, [p for p in far for _ in range(2)]), kernel), x
    sums = seen @ many.movedim(1, -1).reshape(-1, many.shape[1])
    sums = sums.view(*kernel, -1, len(many[0])).permute(-1, -2, *range(len(kernel)))
    return sums if weight.shape[1] <= 2 else sums.transpose(0, 1).flip(*dims)


def unfold(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """What each tap of a kernel sees of `(1, C, *n)`, `(taps * C, voxels)`."""
    for axis, k in enumerate(kernel, start=2):
        x = x.unfold(axis, k, 1)
    dims = len(kernel)
    x = x[0].permute(*range(1 + dims, 1 + 2 * dims), *range(1 + dims))
    return x.flatten(0, dims).flatten(1)


def pad_uneven(slab: Tensor, pads: Ends) -> tuple[Tensor, list[int]]:
    """Pad what differs between the two ends of an axis; return what is left to pad at both."""
    left = [min(pair) for pair in pads]
    extra = [(near - p, far - p) for (near, far), p in zip(pads, left, strict=True)]
    return surround(slab, extra), left


def empty_like(slab: Tensor, size: Sequence[int], channels: int = 0) -> Tensor:
    """Uninitialized memory for a slab of another size, and of other channels if given."""
    shape, layout = (len(slab), channels or slab.shape[1], *size), CHANNELS_LAST[slab.dim()]
    return torch.empty(shape, dtype=slab.dtype, device=slab.device, memory_format=layout)


def surround(slab: Tensor, zeros: Ends) -> Tensor:
    """A slab with zeros before and after each axis; `F.pad` would write all of it twice."""
    if not any(map(any, zeros)):
        return slab
    size = [n + near + far for n, (near, far) in zip(slab.shape[2:], zeros, strict=True)]
    inner = out = empty_like(slab, size)
    for axis, ((near, far), n) in enumerate(zip(zeros, slab.shape[2:], strict=True), start=2):
        inner.narrow(axis, 0, near).zero_()
        inner.narrow(axis, near + n, far).zero_()
        inner = inner.narrow(axis, near, n)
    inner.copy_(slab)
    return out
