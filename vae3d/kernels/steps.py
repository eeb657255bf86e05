"""Fast paths of the network: the same numbers in less time and memory; those of the CPU are here.

PyTorch runs a network layer by layer over the whole volume and keeps what every layer read. Here
norm, activation, convolution and residual sum are one step, done slab by slab along x, channels
last: the normalized volume exists only as slabs in the processor's cache, the backward pass
computes it again, and oneDNN is called directly, also where PyTorch's own dispatch would choose a
slow kernel. Nearest upsampling by two followed by a convolution becomes one small convolution per
phase on the coarse grid (`upsampling.py`). The memory of large tensors that died serves the next
ones (`Pages`).

GPUs have the same step as kernels of their own (`gpu.py`), in half precision. Where neither applies
(other devices, float64), training keeps as little (`lean.py`). Within `plain()`, and for export,
compile and hooks, the plain layers run; the tests compare both.

Axes: b batch, c channels, x y z space; a slab is a range of x of one sample.
"""

import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from shutil import which
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from vae3d.kernels import convolutions
from vae3d.kernels.convolutions import Axes, Conv, Ends, Maybe
from vae3d.kernels.lean import Context, is_lean, is_replaceable, prepared_conv
from vae3d.kernels.memory import channels_last, empty
from vae3d.kernels.moments import merged, of_groups

SLAB_BYTES = 4 << 20  # per thread, float32; larger than the cache is slower, smaller repeats halos
PIECE = 4096  # voxels of which sums are taken in float32


_enabled = True

Sides = tuple[Tensor, Tensor]  # rows before and after those that a process has, perhaps none


class NormParts(NamedTuple):
    """What a fused step needs to know of a norm and the activation after it."""

    groups: int  # of channels; 0: the root mean square of each voxel, without a bias
    eps: float
    weight: Tensor
    bias: Maybe
    act: nn.Module


class Preparation(nn.Module):
    """Contract of a layer that may become one step with the convolution after it.

    It is cheap and keeps the shape; `vae3d.models.norm.NormAct` is the one there is.
    """

    def repeatable(self) -> bool:
        """Whether the backward pass may compute it again: the same result, and no trace."""
        raise NotImplementedError

    def parts(self) -> NormParts | None:
        """Its parts where it is a group norm or a root mean square, and an activation."""
        raise NotImplementedError


class Neighbors:
    """Contract of other processes, of which each holds some rows of a volume; here there are none.

    All processes make the same calls in the same order. Rows are those along the dimension `dim`.
    """

    dim = 2

    def beside(self, x: Tensor, before: int, after: int) -> Callable[[], Sides]:
        """Begin to fetch so many rows before and after those of `x`, as far as the volume has them.

        What is returned waits for them.
        """
        none = x.narrow(self.dim, 0, 0)
        return lambda: (none, none)

    def merge(self, counts: Tensor, means: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means, and sums of squares round them, of all rows by those of the own ones."""
        return counts, means, m2

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's tensor."""
        return x


NOBODY = Neighbors()


@contextmanager
def plain() -> Iterator[None]:
    """Run the plain layers inside, for example to differentiate twice or to compare."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def run(
    layers: Iterable[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Apply `layers` in order, and add `residual` to the last one's output.

    Args:
        layers: Layers; a `Preparation` and the convolution after it run as one step.
        x: Input of the first, `(B, C, *spatial)`.
        residual: Added at the end; None for nothing.
        overwrite: Whether the sum may take the memory of `residual`.
    """
    layers = list(layers)
    while layers:
        norm_act = preparation(layers, x)
        layer, *layers = layers if norm_act is None else layers[1:]
        if norm_act is not None or is_fast(layer, x):
            last = residual if not layers else None
            x = convolve(layer, x, norm_act=norm_act, residual=last, overwrite=overwrite)
            residual = None if not layers else residual
        else:
            x = layer(x)
    return x if residual is None else x + residual


def preparation(layers: Sequence[nn.Module], x: Tensor) -> Preparation | None:
    """The first layer, if it prepares for the convolution after it and both can be one step."""
    if len(layers) < 2 or not isinstance(layers[0], Preparation) or torch.compiler.is_compiling():
        return None
    before, layer = layers[0], layers[1]
    if any(map(hooked, (*before.modules(), layer))):
        return None
    if is_fast(layer, x):
        parts = before.parts()
        return before if parts and parts.groups and set(layer.stride) == {1} else None
    if is_fused(layer, x, before):
        return before
    return before if before.repeatable() and is_lean(layer, x) else None


def is_fast(layer: nn.Module, x: Tensor) -> TypeGuard[Conv]:
    """Whether `convolve` has a fast path for this layer and input here and now."""
    return (
        # First: what follows breaks torch.compile's graph, and then its rest would be compiled.
        not torch.compiler.is_compiling()
        and (type(layer) is nn.Conv2d or type(layer) is nn.Conv3d)
        and _enabled
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (x.dtype == layer.weight.dtype or torch.is_autocast_enabled("cpu"))
        and torch.backends.mkldnn.is_available()
        and x.dim() == layer.weight.dim()
        and layer.groups == 1
        and set(layer.dilation) == {1}
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not hooked(layer)
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def is_fused(layer: nn.Module, x: Tensor, prepare: Preparation) -> TypeGuard[Conv]:
    """Whether a GPU has norm, activation and this convolution as one step, see `gpu.py`."""
    return has_kernels(prepare) and on_gpu(x) and is_replaceable(layer, x)


def has_kernels(prepare: Preparation) -> bool:
    """Whether a norm and its activation are of those that `gpu.py` has."""
    parts = prepare.parts()
    return parts is not None and type(parts.act) in (nn.SiLU, nn.Identity)


def on_gpu(x: Tensor) -> bool:
    """Whether the fused steps of GPUs are there, and for the precision that `x` is convolved in.

    That is half precision, whose tensor cores read channels innermost.
    """
    return (
        not torch.compiler.is_compiling()
        and _enabled
        and x.is_cuda
        and torch.version.hip is None
        and dtype_of(x) in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)  # of which Triton makes code
        and has_triton()
    )


@cache
def has_triton() -> bool:
    """Whether Triton is there with what it builds with; a warning tells what it lacks."""
    if find_spec("triton") is None:
        return False
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if headers.is_file() and (os.environ.get("CC") or which("gcc") or which("clang")):
        return True
    warnings.warn(
        "the fast steps of GPUs are off: Triton finds no C compiler or no headers of Python;"
        " install gcc and python3-dev",
        stacklevel=2,
    )
    return False


def dtype_of(x: Tensor) -> torch.dtype:
    """Dtype that `x` is convolved in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def arranged(layers: nn.Module, x: Tensor) -> Tensor:
    """`x` with its channels innermost in memory where a GPU has all norms of `layers` in steps.

    What follows keeps the layout; weights stay as they are.
    """
    steps = [layer for layer in layers.modules() if isinstance(layer, Preparation)]
    return channels_last(x) if on_gpu(x) and steps and all(map(has_kernels, steps)) else x


def hooked(layer: nn.Module) -> bool:
    """Whether someone waits for this layer to be called as a module."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def convolve(
    layer: nn.Module,
    x: Tensor,
    *,
    norm_act: Preparation | None = None,
    padding: Ends = (),
    residual: Tensor | None = None,
    overwrite: bool = False,
    neighbors: Neighbors = NOBODY,
) -> Tensor:
    """`layer(pad(norm_act(x))) + residual`.

    Args:
        layer: The convolution; where it has no fast path it is called, whatever it is.
        x: `(B, C, *spatial)`.
        norm_act: Norm and activation before it; None for neither.
        padding: Zeros before and after each axis, in place of the layer's own padding; empty for
            that.
        residual: Added to the output; None for nothing.
        overwrite: Whether the sum may take the memory of `residual`.
        neighbors: Who holds the rest of the volume, if `x` is a slab; for a layer that is fast and
            keeps the rows, of stride 1.
    """
    if not is_fast(layer, x):
        assert neighbors is NOBODY
        if padding:
            x = F.pad(x, [*chain(*reversed(padding))])
        if norm_act is not None and is_fused(layer, x, norm_act):
            return fused(norm_act, layer, x, residual)
        x = layer(x) if norm_act is None else prepared(norm_act, layer, x, norm_act.parameters())
        return x if residual is None else x + residual
    dtype = dtype_of(x)
    added = residual if residual is not None and residual.dtype == dtype else None
    norm = norm_act.parts() if norm_act is not None else None
    step = Step(
        layer.stride,
        tuple(padding or convolutions.zeros_of(layer)),
        dtype,
        overwrite and added is not None and added is channels_last(added),
        2 if torch.is_grad_enabled() else 4,  # rows together
        neighbors,
        *((norm.groups, norm.eps, norm.act) if norm else ()),
    )
    affine = norm[2:4] if norm else ()
    with torch.autocast("cpu", enabled=False):
        out = NormActConv.apply(step, x, layer.weight, layer.bias, added, *affine)
    return out if residual is added else out + residual


def fused(norm_act: Preparation, layer: Conv, x: Tensor, residual: Tensor | None) -> Tensor:
    """`layer(norm_act(x)) + residual` on a GPU, where `is_fused` holds."""
    from vae3d.kernels import gpu  # Triton, which not every machine has

    parts, dtype = norm_act.parts(), dtype_of(x)
    assert parts is not None
    plan = gpu.Norm(parts.groups, parts.eps, type(parts.act) is nn.SiLU), layer, dtype
    added = residual if residual is not None and residual.dtype == dtype else None
    out = gpu.norm_act_convolve(plan, x, parts.weight, parts.bias, added)
    return out if residual is None or residual is added else out + residual


def prepared(
    prepare: Callable[[Tensor], Tensor],
    layer: nn.Module,
    x: Tensor,
    parameters: Iterable[nn.Parameter] = (),
) -> Tensor:
    """`layer(prepare(x))`, without keeping `prepare(x)` for the backward pass where that can be.

    Args:
        prepare: Cheap and without state.
        layer: The layer after it.
        x: `(B, C, *spatial)`.
        parameters: Those of `prepare`.
    """
    if _enabled and not hooked(layer) and not is_fast(layer, x) and is_lean(layer, x):
        return prepared_conv(lambda x, *_: prepare(x), layer, x, parameters)
    return run([layer], prepare(x))


class Step(NamedTuple):
    """What a fused step does beside its tensors."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after, per axis
    dtype: torch.dtype  # of the output
    overwrite: bool = False  # the residual with the output
    together: int = 2  # rows that a convolution makes at once; more round more, see winograd.py
    neighbors: Neighbors = NOBODY
    groups: int = 0  # 0: no norm and no activation
    eps: float = 0.0
    act: nn.Module = nn.Identity()


class NormActConv(torch.autograd.Function):
    """Group norm, activation, convolution and residual sum as one step that keeps its input only.

    Forward and backward follow Wu and He, 2018, section 3, with statistics in float64; the
    normalized and activated volume is computed again, slab by slab, in the backward pass.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Context[Step],
        step: Step,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        residual: Maybe,
        *affine: Tensor,
    ) -> Tensor:
        """Return `conv(act(norm(x))) + residual`."""
        x = channels_last(x)
        dim = step.neighbors.dim
        arrived = step.neighbors.beside(x, *step.padding[dim - 2])
        scaling = (*affine, *statistics(x, step.groups, step.neighbors)) if affine else ()
        sides = arrived()
        ctx.save_for_backward(x, weight, *sides, *scaling)
        ctx.step = step
        compute = compute_dtype(step.dtype)
        w, b = channels_last(weight.to(compute)), None if bias is None else bias.to(compute)
        axes = zip(x.shape[2:], step.padding, w.shape[2:], step.stride, strict=True)
        shape = (len(x), len(w), *((n + sum(pad) - k) // s + 1 for n, pad, k, s in axes))
        out = empty(shape, step.dtype) if residual is None or not step.overwrite else residual
        if step.overwrite:
            ctx.mark_dirty(out)
        norm = Slabs(Rows(x, sides, dim), step, scaling, compute)
        for n, start, stop in slabs(out, x, step.together):
            _, y, pad = norm.read(n, *reach(start, stop, w, step), keep=False)
            target = out[n : n + 1, :, start:stop]
            onto = None if residual is None else residual[n : n + 1, :, start:stop]
            onto = target if step.overwrite else onto
            convolutions.convolve_into(target, y, w, b, pad, step.stride, onto, step.together)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Context[Step], grad: Tensor) -> tuple[Maybe, ...]:
        """Return the gradient of every argument of `forward`."""
        x, weight, before, after, *scaling = ctx.saved_tensors
        step, grad = ctx.step, channels_last(grad)
        compute = compute_dtype(step.dtype)
        w = channels_last(weight.to(compute))
        _, need_x, need_w, need_b, need_residual, *need_affine = ctx.needs_input_grad
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        grad_b = torch.zeros(len(weight)) if need_b else None
        grad_x = empty(x.shape, x.dtype) if need_x or any(need_affine) else None
        strided = max(step.stride) > 1
        if grad_x is not None and strided:
            grad_x.zero_()
        dim = step.neighbors.dim
        norm = Slabs(Rows(x, (before, after), dim), step, scaling, compute)
        back = Backward(w, step, compute)
        others = step.neighbors if grad_x is not None else NOBODY
        grad_rows = Rows(grad, others.beside(grad, *back.padding[others.dim - 2])(), others.dim)
        sums = torch.zeros(2, *x.shape[:2], dtype=torch.float64)  # of dn * normalized, of dn
        for n, start, stop in slabs(grad, x):
            lo, hi = reach(start, stop, w, step)
            normalized, y, pad = norm.read(n, lo, hi, keep=grad_x is not None)
            g = grad[n : n + 1, :, start:stop].to(compute)
            if grad_b is not None:
                grad_b += g.sum([0, *range(2, g.dim())], dtype=torch.float32)
            if grad_w is not None:
                grad_w += convolutions.weights_gradient(g, y, w, pad, step.stride)
            if grad_x is None:
                continue
            if strided:
                back.scatter(g, y, pad, grad_x[n : n + 1], lo, hi)
                continue
            target = grad_x[n : n + 1, :, start:stop]
            own = target.dtype == (torch.float32 if step.groups else compute)
            wide = target if own else norm.buffer("gradient", stop - start)
            back.gather(grad_rows, n, start, stop, wide)
            if normalized is not None:
                inner = normalized[:, :, start - lo : stop - lo]
                if dim > 2:
                    inner = inner.narrow(dim, step.padding[dim - 2][0], x.shape[dim])
                act_backward(step.act, inner, wide)
            if wide is not target:
                target.copy_(wide)
            if step.groups:
                sums[:, n] += norm.sums(n, start, stop, target)
        grads = sums.sum(1).to(scaling[0].dtype) if scaling else ()
        if grad_x is not None and scaling and need_x:
            voxels = torch.full_like(sums[:1], x[0, 0].numel())
            norm.finish(grad_x, *step.neighbors.sum(torch.cat([sums, voxels])))
        grad_w = None if grad_w is None else grad_w.to(weight.dtype)
        grad_b = None if grad_b is None else grad_b.to(weight.dtype)
        return None, grad_x, grad_w, grad_b, grad if need_residual else None, *grads


class Rows:
    """Reads rows of x of a volume of which other processes may have what is beside the own part.

    Args:
        own: `(B, C, *spatial)`.
        sides: What was fetched of before and after it.
        dim: The dimension along which they lie beside it.
    """

    def __init__(self, own: Tensor, sides: Sides, dim: int):
        self.own, self.sides, self.dim = own, sides, dim

    def read(self, n: int, lo: int, hi: int, padding: Ends) -> tuple[Tensor, list[tuple[int, int]]]:
        """Rows of sample `n` that there are from `lo` to `hi`, and the zeros to add on every axis.

        Rows are counted from the first own one. Another axis than x, with others beside, comes with
        its zeros.
        """
        slab, pads = rows(self.own[n : n + 1], lo, hi, padding)
        before, after = (side[n : n + 1] for side in self.sides)
        if self.dim > 2:
            axis, size = self.dim - 2, slab.shape[self.dim]
            near, width = pads[axis][0], before.shape[self.dim]
            zeros = [pad if i == axis else (0, 0) for i, pad in enumerate(pads)]
            slab = convolutions.surround(slab, zeros)
            before, after = (rows(side, lo, hi, padding)[0] for side in (before, after))
            slab.narrow(self.dim, near - width, width).copy_(before)
            slab.narrow(self.dim, near + size, after.shape[self.dim]).copy_(after)
            pads[axis] = 0, 0
            return slab, pads
        near, far = min(pads[0][0], before.shape[2]), min(pads[0][1], after.shape[2])
        if near or far:
            others = before[:, :, before.shape[2] - near :], after[:, :, :far]
            slab = channels_last(torch.cat([others[0], slab, others[1]], 2))
        return slab, [(pads[0][0] - near, pads[0][1] - far), *pads[1:]]

    def nowhere(self, padding: Ends) -> tuple[int, int]:
        """How much of the zeros along `dim` nobody has, before and after."""
        sides = zip(padding[self.dim - 2], self.sides, strict=True)
        near, far = (pad - side.shape[self.dim] for pad, side in sides)
        return near, far


class Slabs:
    """Reads slabs of a volume, normalized and activated where the step has a norm.

    Args:
        rows: The volume.
        step: What is done.
        scaling: Scale and shift of the norm, `(C,)`, then mean and variance, `(B, C)`; or nothing.
        compute: Dtype of what is read.
    """

    def __init__(self, rows: Rows, step: Step, scaling: Sequence[Tensor], compute: torch.dtype):
        self.rows, self.x, self.step, self.compute = rows, rows.own, step, compute
        self.memory: dict[str, Tensor] = {}
        if scaling:
            gamma, beta, self.mean, self.var = scaling
            self.gamma, self.beta = gamma.float(), beta.float()

    def buffer(
        self, name: str, rows: int, dtype: torch.dtype = torch.float32, plane: Sequence[int] = ()
    ) -> Tensor:
        """Memory for a slab, the same at every call; `plane` is that of `x` where none is given."""
        shape = (1, self.x.shape[1], rows, *(plane or self.x.shape[3:]))
        if name not in self.memory or self.memory[name].shape[2] < rows:
            spare = (*shape[:2], rows + 1, *shape[3:])  # slabs differ by a row
            self.memory[name] = empty(spare, dtype)
        return self.memory[name][:, :, :rows]

    def read(self, n: int, lo: int, hi: int, keep: bool) -> tuple[Tensor | None, Tensor, list[int]]:
        """Rows `lo` to `hi` of sample `n`; rows outside the volume become padding.

        Args:
            n: Sample.
            lo: First row.
            hi: Row after the last.
            keep: Whether the normalized slab is of use; else it may be overwritten.

        Returns:
            The normalized slab in float32, the activated and padded slab, the padding left to the
            convolution.
        """
        slab, pads = self.rows.read(n, lo, hi, self.step.padding)
        if not self.step.groups:
            return None, *convolutions.pad_uneven(slab.to(self.compute), pads)
        plane, size = slab.shape[3:], hi - lo
        activated = self.buffer("activated", size, self.compute, plane)
        wide = activated
        if self.compute != torch.float32:
            wide = self.buffer("wide", size, plane=plane)
        normalized = self.buffer("normalized", size, plane=plane) if keep else wide
        near, far = pads[0]
        inside = slice(near, hi - lo - far)
        self.batch_norm(n, slab, self.gamma, self.beta, normalized[:, :, inside])
        activate(self.step.act, normalized[:, :, inside], wide[:, :, inside])
        if wide is not activated:
            activated[:, :, inside] = wide[:, :, inside]
        activated[:, :, :near].zero_()
        activated[:, :, inside.stop :].zero_()
        if (dim := self.rows.dim) > 2:
            near, far = self.rows.nowhere(self.step.padding)
            activated.narrow(dim, 0, near).zero_()
            activated.narrow(dim, activated.shape[dim] - far, far).zero_()
        return normalized, activated, [0, *(near for near, _ in pads[1:])]

    def batch_norm(self, n: int, slab: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        """`out = (slab - mean) / sqrt(var + eps) * scale + shift` per channel, in one pass."""
        if slab.dtype != out.dtype:
            slab = out.copy_(slab)
        unused = torch.empty(0)
        torch.ops.aten.native_batch_norm.out(
            slab, scale, shift, self.mean[n], self.var[n], False, 0.0, self.step.eps,
            out=out, save_mean=unused, save_invstd=unused,
        )  # fmt: skip

    def sums(self, n: int, start: int, stop: int, grad: Tensor) -> Tensor:
        """Per channel, a slab's sums of `grad * (x - mean) / std` and of `grad`, `(2, C)`."""
        x = self.x[n : n + 1, :, start:stop]
        std = (self.var[n] + self.step.eps).sqrt()
        _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
            grad, x, torch.ones_like(std), None, None, self.mean[n], 1 / std,
            True, self.step.eps, [False, True, True],
        )  # fmt: skip
        return torch.stack([scaled, plain])

    def finish(self, grad: Tensor, scaled: Tensor, plain: Tensor, voxels: Tensor) -> None:
        """Turn the gradient of the normalized volume into that of `x`, in place.

        With r = 1/std and means over a group of n values:
        dx = r * (gamma dn - mean(gamma dn) - xhat * mean(gamma dn xhat)).

        Args:
            grad: That of the normalized volume, dn.
            scaled: Sums over the volume of dn * xhat `(B, C)`.
            plain: Those of dn.
            voxels: Their number.
        """
        gamma = self.gamma.double()
        means = torch.stack([scaled, plain]) / voxels * gamma
        grouped = means.unflatten(2, (self.step.groups, -1)).mean(3)
        scaled, plain = grouped.repeat_interleave(len(gamma) // self.step.groups, 2)  # (B, C)
        r = (self.var.double() + self.step.eps).rsqrt()
        shape = (1, -1, *(1,) * (grad.dim() - 2))
        for n, start, stop in slabs(grad, grad):
            dx = self.buffer("dx", stop - start, self.compute)
            scale, shift = (-(r * t)[n].float() for t in (scaled, plain))
            self.batch_norm(n, self.x[n : n + 1, :, start:stop], scale, shift, dx)
            target = grad[n : n + 1, :, start:stop]
            scale = (r[n] * gamma).to(dx.dtype).view(shape)
            if target.dtype == dx.dtype:
                torch.addcmul(dx, target, scale, out=target)
            else:  # torch is slow where dtypes meet
                target.copy_(dx.addcmul_(target.to(dx.dtype), scale))


class Backward:
    """Gradient of a convolution with respect to its input, by slabs."""

    def __init__(self, weight: Tensor, step: Step, compute: torch.dtype):
        self.weight, self.step, self.compute = weight, step, compute
        self.flipped = channels_last(weight.transpose(0, 1).flip(*range(2, weight.dim())))
        axes = zip(weight.shape[2:], step.padding, strict=True)
        self.padding = tuple((k - 1 - near, k - 1 - far) for k, (near, far) in axes)

    def gather(self, grad: Rows, n: int, start: int, stop: int, target: Tensor) -> None:
        """Write rows `start` to `stop` of the input's gradient to `target`, for stride 1."""
        near = self.padding[0][0]
        lo, hi = start - near, stop - near + self.flipped.shape[2] - 1
        slab, pads = grad.read(n, lo, hi, self.padding)
        slab, pad = convolutions.pad_uneven(slab.to(self.compute), pads)
        convolutions.convolve_into(target, slab, self.flipped, None, pad)

    def scatter(self, g: Tensor, y: Tensor, pad: Axes, target: Tensor, lo: int, hi: int) -> None:
        """Add the gradient of rows `lo` to `hi` of the input to `target`, for any stride."""
        dx = convolutions.input_gradient(g, y, self.weight, pad, self.step.stride)
        _, pads = rows(target, lo, hi, self.step.padding)
        extra = [(near - p, far - p) for (near, far), p in zip(pads, pad, strict=True)]
        inner = [slice(near, n - far) for (near, far), n in zip(extra, dx.shape[2:], strict=True)]
        target[:, :, max(lo, 0) : hi] += dx[(slice(None), slice(None), *inner)]


def statistics(x: Tensor, groups: int, neighbors: Neighbors = NOBODY) -> tuple[Tensor, Tensor]:
    """Mean and variance of the groups of each sample, repeated per channel, `(B, C)` float32.

    Few voxels at a time, and these merged in float64 (Chan et al., 1979), so that the result does
    not lose digits as volumes grow.
    """
    moments = []
    wide = None if x.dtype == torch.float32 else torch.empty(PIECE, x.shape[1])
    for sample in x:
        pieces = sample.movedim(0, -1).flatten(0, -2).split(PIECE)  # (voxels, C) each
        count = torch.tensor([len(p) for p in pieces], dtype=torch.float64)[:, None]
        stats = []
        for p in pieces:  # one float32 copy for all: small results would lie between many
            p = p if wide is None else wide[: len(p)].copy_(p)
            image = p.t()[None, :, :, None]
            stats.append(torch.batch_norm_update_stats(image, None, None, 0.0))
        mean, var = (torch.stack(s).double() for s in zip(*stats, strict=True))  # (pieces, C)
        voxels = torch.full_like(mean[0], sample[0].numel())
        moments.append((voxels, *merged(count, mean, count * var)))
    own = (torch.stack(t) for t in zip(*moments, strict=True))
    count, mean, m2 = neighbors.merge(*own)
    mean, var = of_groups(mean, m2 / count, groups)
    return mean.float(), var.float()


def slabs(rows_of: Tensor, other: Tensor, together: int = 2) -> Iterator[tuple[int, int, int]]:
    """Sample, first and last row of slabs that cover `rows_of` and stay in the cache.

    Args:
        rows_of: What is covered.
        other: What is read or written together with it.
        together: Rows that no two slabs share, but for the last ones.
    """
    size = rows_of.shape[2]
    row = max(t[0].numel() // size for t in (rows_of, other))
    count = max(SLAB_BYTES * torch.get_num_threads() // (4 * row), 1)
    parts = max(min(round(size / count), size // together), 1)
    edges = [size * i // parts // together * together for i in range(parts)] + [size]
    for n in range(len(rows_of)):
        for start, stop in pairwise(edges):
            yield n, start, stop


def reach(start: int, stop: int, weight: Tensor, step: Step) -> tuple[int, int]:
    """Input rows that output rows `start` to `stop` see; they may lie outside the volume."""
    stride, near = step.stride[0], step.padding[0][0]
    return start * stride - near, (stop - 1) * stride - near + weight.shape[2]


def rows(x: Tensor, lo: int, hi: int, padding: Ends) -> tuple[Tensor, list[tuple[int, int]]]:
    """Rows of `x` that exist between `lo` and `hi`, and the zeros to add around every axis."""
    size = x.shape[2]
    outside = (max(-lo, 0), max(hi - size, 0))
    return x[:, :, max(lo, 0) : min(hi, size)], [outside, *padding[1:]]


def activate(act: nn.Module, x: Tensor, out: Tensor) -> None:
    """`out = act(x)`; `out` may be `x`."""
    if type(act) is nn.SiLU:
        torch.ops.aten.silu.out(x, out=out)
    else:
        out.copy_(act(x))


def act_backward(act: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Take `grad` back through `act` at `x`, in place."""
    if type(act) is nn.SiLU:
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
        return
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        grad.copy_(torch.autograd.grad(act(x), x, grad)[0])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic: half precision only where the processor multiplies it itself.

    Elsewhere float32 convolutions are faster than bfloat16 ones, and more exact.
    """
    instructions = {
        torch.bfloat16: (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported),
        torch.float16: (torch.cpu._is_amx_fp16_supported,),
    }
    return dtype if any(has() for has in instructions.get(dtype, ())) else torch.float32
