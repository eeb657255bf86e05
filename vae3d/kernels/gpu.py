"""Norm, activation and convolution as one step on GPUs: Triton kernels for channels innermost.

PyTorch's group norm makes such volumes contiguous and casts them to float32 and back, and every
convolution turns them again. Here statistics are one pass over the volume, norm and activation one
more, bias and residual a third. The backward pass computes the activated volume again, in the pass
that sums the gradient, and writes the gradient of the input over that of the activated volume.

Statistics are taken over chunks of voxels in float32, round a voxel of the chunk, and merged in
float64 (Chan et al., 1979). Every pass is an operator that fills memory it is given, so whoever
traces a network (export, counts of bytes) sees what it reads and writes.

Axes: b batch, c channels, k chunks; a volume is `(B, C, *n)`, to kernels V rows of C values for
each sample. A program holds ROWS x WIDTH values, where WIDTH is the power of two that holds C.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from vae3d.kernels.convolutions import Conv
from vae3d.kernels.lean import Context
from vae3d.kernels.memory import CHANNELS_LAST, channels_last
from vae3d.kernels.winograd import Axes, Maybe

TILE = 2048  # values that a program holds at once
CHUNK = 16  # tiles that a program sums


class Norm(NamedTuple):
    """What kernels need to know of a norm and the activation after it."""

    groups: int  # of channels; 0: no statistics, the root mean square of each voxel
    eps: float
    silu: bool  # else no activation


Plan = tuple[Norm, Conv, torch.dtype]  # what a step does, and the dtype that it convolves in


def norm_act_convolve(
    plan: Plan, x: Tensor, scale: Tensor, shift: Maybe, residual: Maybe = None
) -> Tensor:
    """`layer(act(norm(x))) + residual`, of which only `x` is kept for the backward pass.

    Args:
        plan: Norm, convolution, and the dtype of the output.
        x: `(B, C, *n)`.
        scale: Of the norm, `(C,)`.
        shift: Of the norm, `(C,)`; None for none.
        residual: Of the dtype of the output; None for nothing.
    """
    _, layer, _ = plan
    with torch.autocast(x.device.type, enabled=False):
        return NormActConv.apply(plan, x, layer.weight, layer.bias, residual, scale, shift)


class NormActConv(torch.autograd.Function):
    """Norm, activation, convolution, bias and residual sum as one step."""

    @staticmethod
    def forward(
        ctx: Context[Plan],
        plan: Plan,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        residual: Maybe,
        scale: Tensor,
        shift: Maybe,
    ) -> Tensor:
        """Return `conv(act(norm(x))) + bias + residual`."""
        (norm, layer, dtype), x = plan, channels_last(x)
        stats = x.new_empty(2, *x.shape[:2], dtype=torch.float32) if norm.groups else None
        if stats is not None:
            take_statistics(x, norm.groups, norm.eps, stats)
        ctx.step = plan
        known = (t for t in (shift, stats) if t is not None)  # neither, or both
        ctx.save_for_backward(x, weight, scale, *known)
        y = torch.empty_like(x, dtype=dtype)
        apply_norm(x, scale, shift, stats, norm.eps, norm.silu, y)
        out = torch.convolution(y, turned(weight, dtype), None, *options_of(layer))
        if bias is not None or residual is not None:
            out = channels_last(out)
            add(out, bias, None if residual is None else channels_last(residual), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[Plan], grad: Tensor) -> tuple[Maybe, ...]:
        """Return the gradient of every argument of `forward`."""
        x, weight, *saved = ctx.saved_tensors
        (norm, layer, dtype), grad = ctx.step, channels_last(grad)
        _, need_x, need_w, need_b, need_residual, *need_affine = ctx.needs_input_grad
        known, options = (*saved, None, None)[:3], (norm.eps, norm.silu)
        w, y = turned(weight, dtype), torch.empty_like(x, dtype=dtype)
        grads: list[Maybe] = [None] * 5  # of x, weight, bias, scale, shift
        if need_x or any(need_affine):
            dy = channels_last(gradients(layer, grad, y, w, [True, False])[0])  # y: its shape alone
            affine = x.new_empty(2, x.shape[1], dtype=torch.float32)
            means = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
            sum_gradient(x, dy, *known, norm.groups, *options, y, affine, means)
            if need_x:
                grads[0] = dy if x.dtype == dtype else torch.empty_like(x)
                input_gradient(x, dy, *known, means, *options, grads[0])
            grads[3:] = (g if need else None for g, need in zip(affine, need_affine, strict=True))
        elif need_w:
            apply_norm(x, *known, *options, y)
        if need_w:
            grad_w = gradients(layer, grad, y, w, [False, True])[1]
            grads[1] = grad_w.to(weight.dtype, memory_format=torch.contiguous_format)
        if need_b:
            grads[2] = grad.sum([0, *range(2, grad.dim())], dtype=torch.float32)
        return None, *grads[:3], grad if need_residual else None, *grads[3:]


def turned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in the dtype and layout of the volume, in one pass."""
    return weight.to(dtype, memory_format=CHANNELS_LAST[weight.dim()])


def options_of(layer: Conv) -> tuple[Axes, Axes, Axes, bool, Axes, int]:
    """Stride, padding, dilation, transposed, padding of the output and groups of a convolution."""
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    assert not isinstance(padding, str)
    return stride, padding, dilation, False, [0] * len(stride), layer.groups


def gradients(
    layer: Conv, grad: Tensor, y: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input and the weights of a convolution, as far as they are `wanted`."""
    options = options_of(layer)
    return torch.ops.aten.convolution_backward(grad, y, weight, None, *options, [*wanted, False])


def operator(*written: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function an operator of PyTorch that fills the arguments named `written`.

    `torch.library.custom_op` does the same; its calls take eight times as long (measured).
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = f"vae3d::{function.__name__}"
        library.define(name, library.infer_schema(function, mutates_args=written))
        library.impl(name, "default", function)
        library.register_fake(name, lambda *_: None)
        return getattr(torch.ops.vae3d, function.__name__).default

    return register


@operator("stats")
def take_statistics(x: Tensor, groups: int, eps: float, stats: Tensor) -> None:
    """Mean and 1 / standard deviation of each group, for each of its channels, `(2, B, C)`."""
    batch, channels, voxels, rows, width = sizes(x)
    chunk, size = rows * CHUNK, channels // groups
    chunks = triton.cdiv(voxels, chunk)
    parts = x.new_empty(2, batch, chunks, channels, dtype=torch.float32)
    volume = voxels, channels, chunk
    launch(moments_kernel, (chunks, batch), x, parts, *volume, rows, width)
    options = batch, chunks, eps, *volume, size, *tile_of(size)
    launch(merge_moments_kernel, (groups, batch), parts, stats, *options)


@operator("y")
def apply_norm(
    x: Tensor, scale: Tensor, shift: Maybe, stats: Maybe, eps: float, silu: bool, y: Tensor
) -> None:
    """`y = act(norm(x))`."""
    batch, channels, voxels, rows, width = sizes(x)
    grid, tile = (triton.cdiv(voxels, rows), batch), (rows, width)
    launch(norm_kernel, grid, x, scale, shift, stats, y, eps, voxels, channels, silu, *tile)


@operator("y", "affine", "means")
def sum_gradient(
    x: Tensor,
    dy: Tensor,
    scale: Tensor,
    shift: Maybe,
    stats: Maybe,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    affine: Tensor,
    means: Tensor,
) -> None:
    """From the gradient `dy` of `y = act(norm(x))`, and `y` itself again:

    gradients of scale and shift, `affine` `(2, C)`, and what `input_gradient` needs of each group,
    `means` `(2, B, C)`.
    """
    batch, channels, voxels, rows, width = sizes(x)
    chunk, groups = rows * CHUNK, groups or channels
    chunks, size = triton.cdiv(voxels, chunk), channels // groups
    parts = x.new_empty(2, batch, chunks, channels, dtype=torch.float32)
    volume = voxels, channels, chunk
    known = x, dy, scale, shift, stats
    launch(sums_kernel, (chunks, batch), *known, y, parts, eps, *volume, silu, rows, width)
    options = batch, chunks, voxels, channels, size, *tile_of(size)
    launch(merge_sums_kernel, (groups,), parts, scale, affine, means, *options)


@operator("dx")
def input_gradient(
    x: Tensor,
    dy: Tensor,
    scale: Tensor,
    shift: Maybe,
    stats: Maybe,
    means: Tensor,
    eps: float,
    silu: bool,
    dx: Tensor,
) -> None:
    """Gradient of `x`, where `dx` may be `dy`."""
    batch, channels, voxels, rows, width = sizes(x)
    grid, known = (triton.cdiv(voxels, rows), batch), (x, dy, scale, shift, stats, means)
    launch(gradient_kernel, grid, *known, dx, eps, voxels, channels, silu, rows, width)


@operator("out")
def add(x: Tensor, bias: Maybe, residual: Maybe, out: Tensor) -> None:
    """`out = x + bias + residual`, where `out` may be `x`."""
    batch, channels, voxels, rows, width = sizes(x)
    grid = triton.cdiv(voxels, rows), batch
    launch(add_kernel, grid, x, bias, residual, out, voxels, channels, rows, width)


def sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """B, C, V, ROWS and WIDTH."""
    batch, channels, *grid = x.shape
    return batch, channels, prod(grid), *tile_of(channels)


def tile_of(channels: int) -> tuple[int, int]:
    """ROWS and WIDTH."""
    width = triton.next_power_of_2(channels)
    return max(TILE // width, 1), width


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], x: Tensor, *arguments: Tensor | float | None
) -> None:
    """Start a program for each point of the grid, where `x` is."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments)


@triton.jit
def tile(
    start, count, SIZE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Where the first SIZE of C values lie in the rows from `start` on, and which are there."""
    row, channel = start + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    return row.to(tl.int64) * C + channel, (row < count) & (channel < SIZE)


@triton.jit
def row_of(values, C: tl.constexpr, WIDTH: tl.constexpr):
    """A number for each channel."""
    channel = tl.arange(0, WIDTH)[None, :]
    return tl.load(values + channel, channel < C, 0.0).to(tl.float32)


@triton.jit
def normalized(v, stats, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    """Rows less their mean over their standard deviation, and 1 over it; for this sample."""
    if stats is None:  # the root mean square of each row
        rstd = tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / C + eps)
        v *= rstd
    else:
        mean = stats + tl.program_id(1) * C
        rstd = row_of(mean + tl.num_programs(1) * C, C, WIDTH)
        v = (v - row_of(mean, C, WIDTH)) * rstd
    return v, rstd


@triton.jit
def scaled(v, scale, shift, C: tl.constexpr, WIDTH: tl.constexpr):
    """Normalized rows as the norm gives them."""
    v *= row_of(scale, C, WIDTH)
    if shift is not None:
        v += row_of(shift, C, WIDTH)
    return v


@triton.jit
def before_silu(dy, z):
    """Gradient of `z` from that of `silu(z)`."""
    s = tl.sigmoid(z)
    return dy * s * (1 + z * (1 - s))


@triton.jit
def moments_kernel(
    x, parts, V, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Mean, and sum of squares round it, of each channel in a chunk."""
    k, b = tl.program_id(0), tl.program_id(1)
    n = tl.minimum(V - k * CHUNK, CHUNK)
    x += (b.to(tl.int64) * V + k * CHUNK) * C
    pivot = row_of(x, C, WIDTH)  # about the mean, so that the sums stay small
    s, q = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, CHUNK, ROWS):
        at, there = tile(start, n, C, C, ROWS, WIDTH)
        d = tl.where(there, tl.load(x + at, there, 0.0).to(tl.float32) - pivot, 0.0)
        s += d
        q += d * d
    s1, q1 = tl.sum(s, 0, keep_dims=True), tl.sum(q, 0, keep_dims=True)
    store_parts(parts, pivot + s1 / n, q1 - s1 * s1 / n, C, WIDTH)


@triton.jit
def store_parts(parts, first, second, C: tl.constexpr, WIDTH: tl.constexpr):
    """Write a program's two rows of sums into `(2, B, K, C)`."""
    K, B, channel = tl.num_programs(0), tl.num_programs(1), tl.arange(0, WIDTH)[None, :]
    at = parts + (tl.program_id(1) * K + tl.program_id(0)) * C + channel
    tl.store(at, first, channel < C)
    tl.store(at + B * K * C, second, channel < C)


@triton.jit
def merge_moments_kernel(
    parts, stats, B, K, eps, V, C: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of a group of SIZE channels, from the moments of chunks."""
    b, first = tl.program_id(1), tl.program_id(0) * SIZE
    means, squares = parts + b * K * C + first, parts + (B + b) * K * C + first
    total, around = tl.zeros((ROWS, WIDTH), tl.float64), tl.zeros((ROWS, WIDTH), tl.float64)
    count = tl.full((1, 1), SIZE, tl.float64) * V
    for start in range(0, K, ROWS):
        at, there = tile(start, K, SIZE, C, ROWS, WIDTH)
        n = tl.minimum(V - (start + tl.arange(0, ROWS)[:, None]) * CHUNK, CHUNK)
        total += n * tl.load(means + at, there, 0.0).to(tl.float64)
    mean = tl.sum(total) / count
    for start in range(0, K, ROWS):
        at, there = tile(start, K, SIZE, C, ROWS, WIDTH)
        n = tl.minimum(V - (start + tl.arange(0, ROWS)[:, None]) * CHUNK, CHUNK)
        d = tl.where(there, tl.load(means + at, there, 0.0).to(tl.float64) - mean, 0.0)
        around += tl.load(squares + at, there, 0.0).to(tl.float64) + n * d * d
    channel = tl.arange(0, WIDTH)[None, :]
    at = stats + b * C + first + channel
    tl.store(at, mean.to(tl.float32), channel < SIZE)
    rstd = 1 / tl.sqrt(tl.sum(around) / count + eps)
    tl.store(at + B * C, rstd.to(tl.float32), channel < SIZE)


@triton.jit
def norm_kernel(
    x, scale, shift, stats, y, eps, V, C: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`y = act(norm(x))`."""
    at, there = tile(tl.program_id(0) * ROWS, V, C, C, ROWS, WIDTH)
    at += tl.program_id(1).to(tl.int64) * V * C
    v = tl.load(x + at, there, 0.0).to(tl.float32)
    v, _ = normalized(v, stats, eps, C, WIDTH)
    z = scaled(v, scale, shift, C, WIDTH)
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), there)


@triton.jit
def sums_kernel(
    x, dy, scale, shift, stats, y, parts, eps, V, C: tl.constexpr, CHUNK: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`y` again; with the gradient dz of what the norm gave, sums of dz xhat and of dz."""
    s, q = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, CHUNK, ROWS):
        at, there = tile(tl.program_id(0) * CHUNK + start, V, C, C, ROWS, WIDTH)
        at += tl.program_id(1).to(tl.int64) * V * C
        v = tl.load(x + at, there, 0.0).to(tl.float32)
        dz = tl.load(dy + at, there, 0.0).to(tl.float32)
        v, _ = normalized(v, stats, eps, C, WIDTH)
        z = scaled(v, scale, shift, C, WIDTH)
        if SILU:
            dz = before_silu(dz, z)
            z *= tl.sigmoid(z)
        tl.store(y + at, z.to(y.dtype.element_ty), there)
        s += dz * v
        q += dz
    store_parts(parts, tl.sum(s, 0, keep_dims=True), tl.sum(q, 0, keep_dims=True), C, WIDTH)


@triton.jit
def merge_sums_kernel(
    parts, scale, affine, means, B, K, V, C: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of a group: gradients of scale and shift; with dn = dz scale, means of dn xhat and of dn."""
    first, channel = tl.program_id(0) * SIZE, tl.arange(0, WIDTH)[None, :]
    weight = row_of(scale + first, SIZE, WIDTH).to(tl.float64)
    count = tl.full((1, 1), SIZE, tl.float64) * V
    dscale, dshift = tl.zeros((1, WIDTH), tl.float64), tl.zeros((1, WIDTH), tl.float64)
    for b in range(B):
        s, q = tl.zeros((ROWS, WIDTH), tl.float64), tl.zeros((ROWS, WIDTH), tl.float64)
        for start in range(0, K, ROWS):
            at, there = tile(start, K, SIZE, C, ROWS, WIDTH)
            at += b * K * C + first
            s += tl.load(parts + at, there, 0.0).to(tl.float64)
            q += tl.load(parts + B * K * C + at, there, 0.0).to(tl.float64)
        s1, q1 = tl.sum(s, 0, keep_dims=True), tl.sum(q, 0, keep_dims=True)
        at = means + b * C + first + channel
        tl.store(at, (tl.sum(weight * s1) / count).to(tl.float32), channel < SIZE)
        tl.store(at + B * C, (tl.sum(weight * q1) / count).to(tl.float32), channel < SIZE)
        dscale += s1
        dshift += q1
    tl.store(affine + first + channel, dscale.to(tl.float32), channel < SIZE)
    tl.store(affine + C + first + channel, dshift.to(tl.float32), channel < SIZE)


@triton.jit
def gradient_kernel(
    x, dy, scale, shift, stats, means, dx, eps, V, C: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """With r = 1/std and means over a group: dx = r (dn - mean(dn) - xhat mean(dn xhat))."""
    at, there = tile(tl.program_id(0) * ROWS, V, C, C, ROWS, WIDTH)
    at += tl.program_id(1).to(tl.int64) * V * C
    v = tl.load(x + at, there, 0.0).to(tl.float32)
    dn = tl.load(dy + at, there, 0.0).to(tl.float32)
    v, rstd = normalized(v, stats, eps, C, WIDTH)
    if SILU:
        dn = before_silu(dn, scaled(v, scale, shift, C, WIDTH))
    dn *= row_of(scale, C, WIDTH)
    if stats is None:
        dn -= v * (tl.sum(dn * v, 1, keep_dims=True) / C)
    else:
        mean = means + tl.program_id(1) * C
        dn -= v * row_of(mean, C, WIDTH) + row_of(mean + tl.num_programs(1) * C, C, WIDTH)
    tl.store(dx + at, (rstd * dn).to(dx.dtype.element_ty), there)


@triton.jit
def add_kernel(x, bias, residual, out, V, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`out = x + bias + residual`."""
    at, there = tile(tl.program_id(0) * ROWS, V, C, C, ROWS, WIDTH)
    at += tl.program_id(1).to(tl.int64) * V * C
    v = tl.load(x + at, there, 0.0).to(tl.float32)
    if bias is not None:
        v += row_of(bias, C, WIDTH)
    if residual is not None:
        v += tl.load(residual + at, there, 0.0).to(tl.float32)
    tl.store(out + at, v.to(out.dtype.element_ty), there)
