"""Nearest upsampling and the convolution after it as one fast step, on the coarse grid.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import product

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from vae3d.kernels import convolutions
from vae3d.kernels.convolutions import Axes, Conv, Maybe, Pairs
from vae3d.kernels.lean import Context
from vae3d.kernels.memory import channels_last, empty, release
from vae3d.kernels.steps import compute_dtype, dtype_of, rows, slabs

# Per factor: which of the 3 weights (last axis) each tap (middle) of each phase (first) sums.
FOLD = {
    1: torch.eye(3)[None],
    2: torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]),
}
# Per axis; voxels before and after those that are wanted, along which dimension.
Growth = tuple[Axes, tuple[int, int], int]


class UpsampleConv(torch.autograd.Function):
    """Nearest upsampling by two, then a 3-wide convolution, as convolutions of the coarse grid.

    Along an axis that doubles, the output at 2 i + p sees two coarse voxels, i + p - 1 and i + p,
    through sums of the three weights (phase p); all phases of y and z are channels of one
    convolution, those of x are two convolutions.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Context[Growth],
        step: Growth,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return `conv(upsample(x))`."""
        x = channels_last(x)
        ctx.save_for_backward(x, weight)
        ctx.step = factor, beside, dim = step
        own = x.narrow(dim, beside[0], x.shape[dim] - sum(beside))
        up = Phases(weight, factor, compute_dtype(dtype), beside, dim)
        b = None if bias is None else bias.to(up.compute).repeat(up.per_row)
        size = [n * f for n, f in zip(own.shape[2:], factor, strict=True)]
        out = empty((len(x), len(weight), *size), dtype)
        for n, start, stop in slabs(own, out):
            for phase, w in enumerate(up.weights):
                slab, pad = up.read(x[n : n + 1], up.near + start, up.near + stop, phase)
                y = convolutions.convolve(slab, w, b, pad)
                for target, grid in up.pairs(out[n : n + 1], start, stop, phase, y):
                    target.copy_(grid)
        release(x)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Context[Growth], grad: Tensor) -> tuple[Maybe, ...]:
        """Return the gradient of every argument of `forward`."""
        x, weight = ctx.saved_tensors
        grad = channels_last(grad)
        factor, beside, dim = ctx.step
        up = Phases(weight, factor, compute_dtype(grad.dtype), beside, dim)
        _, need_x, need_w, need_b, _ = ctx.needs_input_grad
        grad_x = empty(x.shape, x.dtype).zero_() if need_x else None
        grads_w = [torch.zeros_like(w, dtype=torch.float32) for w in up.weights]
        grad_b = torch.zeros(len(weight)) if need_b else None
        for (n, start, stop), phase in product(slabs(x, grad), range(len(up.weights))):
            w = up.weights[phase]
            lo, hi = start - up.offset(phase) - w.shape[2] + 1, stop - up.offset(phase)
            g = up.grid(grad[n : n + 1], lo - up.near, hi - up.near, phase)
            inner = channels_last(g[:, :, start - lo : stop - lo])
            if grad_b is not None:
                total = inner.sum([0, *range(2, g.dim())], dtype=torch.float32)
                grad_b += total.view(up.per_row, -1).sum(0)
            if need_w:
                slab, pad = up.read(x[n : n + 1], start, stop, phase)
                grads_w[phase] += convolutions.weights_gradient(inner, slab, w, pad)
            if grad_x is not None:
                flipped = channels_last(w.transpose(0, 1).flip(*range(2, w.dim())))
                target = grad_x[n : n + 1, :, start:stop]
                axes = zip(w.shape[3:], up.pads[1:], strict=True)
                pads = [(k - 1 - near, k - 1 - far) for k, (near, far) in axes]
                g, pad = convolutions.pad_uneven(g, [(0, 0), *pads])
                convolutions.convolve_into(target, g, flipped, None, pad, onto=target)
            del g, inner  # before the next ones are made
        grad_w = up.unfold(grads_w).to(weight.dtype) if need_w else None
        grad_b = None if grad_b is None else grad_b.to(weight.dtype)
        release(x)
        return None, grad_x, grad_w, grad_b, None


class Phases:
    """The convolutions of a coarse grid that equal a convolution of the upsampled one."""

    def __init__(
        self,
        weight: Tensor,
        factor: Axes,
        compute: torch.dtype,
        beside: tuple[int, int] = (0, 0),
        dim: int = 2,
    ):
        self.factor, self.compute = factor, compute
        self.near = beside[0] if dim == 2 else 0  # rows of x before those that are wanted
        self.pads = [(1, 1) for _ in factor]  # zeros before and after each axis
        if dim > 2:
            self.pads[dim - 2] = 1 - beside[0], 1 - beside[1]
        fold = reduce(torch.kron, (FOLD[f] for f in factor))  # (phases, taps, weights)
        self.fold = fold.to(weight.device)
        self.per_row = torch.Size(factor[1:]).numel()
        # Voxel by voxel, channels of the input innermost, as the convolutions read them.
        planes = weight.double().flatten(2).permute(2, 0, 1)  # (weights, o, i)
        taps = torch.einsum("ptw,woi->ptoi", self.fold.double(), planes).transpose(1, 2)  # p o t i
        taps = taps.to(compute, memory_format=torch.contiguous_format)
        taps = taps.unflatten(2, [FOLD[f].shape[1] for f in factor])
        taps = taps.unflatten(0, (factor[0], -1)).flatten(1, 2)
        self.weights = [w.movedim(-1, 1) for w in taps]  # per x-phase: (phases of y, z; o), i, ...

    def unfold(self, grads: list[Tensor]) -> Tensor:
        """Gradient of the 3-wide weights from those of the phases."""
        taps = torch.stack(grads).flatten(3).unflatten(1, (self.per_row, -1)).flatten(0, 1)
        return torch.einsum("poit,ptw->oiw", taps, self.fold).unflatten(2, (3,) * len(self.factor))

    def offset(self, phase: int) -> int:
        """Coarse row, relative to its own, that the first tap of an x-phase reads."""
        return phase - 1

    def read(self, x: Tensor, start: int, stop: int, phase: int) -> tuple[Tensor, list[int]]:
        """Coarse rows that an x-phase needs for rows `start` to `stop`, and padding of y and z."""
        lo = start + self.offset(phase)
        hi = stop + self.offset(phase) + self.weights[phase].shape[2] - 1
        slab, pads = rows(x, lo, hi, self.pads)
        return convolutions.pad_uneven(slab.to(self.compute), pads)

    def pairs(self, fine: Tensor, start: int, stop: int, phase: int, y: Tensor) -> Pairs:
        """Views of the fine volume and of the coarse output that belong together."""
        fx = self.factor[0]
        fine = fine[:, :, fx * start + phase : fx * stop : fx]
        grids = torch.cartesian_prod(*(torch.arange(f) for f in self.factor[1:]))
        shifts = grids.view(self.per_row, -1).tolist()
        for p, part in zip(shifts, y.chunk(self.per_row, 1), strict=True):
            grid = fine
            for axis, (shift, f) in enumerate(zip(p, self.factor[1:], strict=True), start=3):
                size = fine.shape[axis] // f
                grid = grid[(slice(None),) * axis + (slice(shift, None, f),)]
                part = part.narrow(axis, shift, size)
            yield grid, part

    def grid(self, grad: Tensor, lo: int, hi: int, phase: int) -> Tensor:
        """Gradient of rows `lo` to `hi` of an x-phase's output; zero outside the volume."""
        rows_in, *others = (n // f for n, f in zip(grad.shape[2:], self.factor, strict=True))
        size = [n + f - 1 for n, f in zip(others, self.factor[1:], strict=True)]
        shape = (1, self.per_row * grad.shape[1], hi - lo, *size)
        out = empty(shape, self.compute).zero_()
        first, last = max(lo, 0), min(hi, rows_in)
        inner = out[:, :, first - lo : last - lo]
        for source, target in self.pairs(grad, first, last, phase, inner):
            target.copy_(source)
        return out


def upsample_convolve(
    layer: Conv, x: Tensor, factor: Sequence[int], beside: tuple[int, int] = (0, 0), dim: int = 2
) -> Tensor:
    """`layer(nearest upsampling of x)` for factors of one and two; see `UpsampleConv`.

    Args:
        layer: A convolution of width 3 that keeps the size, for which `is_fast` holds.
        x: `(B, C, *spatial)`.
        factor: Growth per axis, 1 or 2.
        beside: Rows of `x` before and after those that are wanted, 0 or 1.
        dim: The dimension of these rows.
    """
    with torch.autocast("cpu", enabled=False):
        return UpsampleConv.apply((factor, beside, dim), x, layer.weight, layer.bias, dtype_of(x))
