"""Convolutions that keep what they are computed from, not what they read, on any device.

For its backward pass a convolution keeps its input: the normalized and activated volume, or the
upsampled one; norm and activation keep theirs, in float32. Here the step before the convolution is
computed again in the backward pass, and only what it starts from is kept: 2 bytes a value in
bfloat16 where the plain layers keep 10. The numbers are those of the plain layers to the last bit.

CPU and GPU have faster steps of their own (`steps.py`, `gpu.py`); a compiled network leaves this to
the compiler.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from vae3d.kernels.convolutions import Conv
from vae3d.kernels.winograd import Maybe

S = TypeVar("S")
# What is computed before a convolution, the convolution, and the state of autocast.
Plan = tuple[Callable[..., Tensor], Conv, tuple[str, torch.dtype, bool]]


def is_replaceable(layer: nn.Module, x: Tensor) -> TypeGuard[Conv]:
    """Whether a step of ours may take the place of this layer, outside compile and the like."""
    return (
        not torch.compiler.is_compiling()
        and torch.amp.is_autocast_available(x.device.type)  # not on the meta device
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and (type(layer) is nn.Conv2d or type(layer) is nn.Conv3d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def is_lean(layer: nn.Module, x: Tensor) -> TypeGuard[Conv]:
    """Whether `prepared_conv` serves this layer and input: something is to be differentiated."""
    return (
        is_replaceable(layer, x)
        and torch.is_grad_enabled()
        and (x.requires_grad or layer.weight.requires_grad)
    )


def prepared_conv(
    prepare: Callable[..., Tensor],
    layer: Conv,
    x: Tensor,
    parameters: Iterable[Tensor] = (),
) -> Tensor:
    """`layer(prepare(x, *parameters))`, of which only `x` is kept for the backward pass.

    Args:
        prepare: Cheap, without state, and the same whenever it is called.
        layer: A convolution for which `is_lean` holds.
        x: `(B, C, *spatial)`.
        parameters: Those of `prepare`; it takes them from here unless they are its module's own.
    """
    kind = x.device.type
    autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return PreparedConv.apply((prepare, layer, autocast), x, layer.weight, layer.bias, *parameters)


class Context(FunctionCtx, Generic[S]):
    """What the forward pass of a step leaves to its backward pass."""

    step: S
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class PreparedConv(torch.autograd.Function):
    """A convolution of something that is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Context[Plan], step: Plan, x: Tensor, weight: Tensor, bias: Maybe, *parameters: Tensor
    ) -> Tensor:
        """Return `layer(prepare(x))`."""
        ctx.save_for_backward(x, weight, *parameters)
        ctx.step, (prepare, layer, _) = step, step
        return layer._conv_forward(prepare(x, *parameters), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[Plan], grad: Tensor) -> tuple[Maybe, ...]:
        """Return the gradient of every argument of `forward`."""
        x, weight, *parameters = ctx.saved_tensors
        _, need_x, need_w, need_b, *need_p = ctx.needs_input_grad
        (prepare, layer, autocast), zeros = ctx.step, (0,) * (grad.dim() - 2)
        sizes = None if layer.bias is None else layer.bias.shape
        with torch.enable_grad(), torch.autocast(*autocast):
            x = x.detach().requires_grad_(need_x)
            pairs = zip(parameters, need_p, strict=True)  # those of a module stay themselves
            parameters = [p if p.is_leaf else p.detach().requires_grad_(need) for p, need in pairs]
            prepared = prepare(x, *parameters)
        grad_y, grad_w, grad_b = torch.ops.aten.convolution_backward(
            grad, prepared.detach().to(grad.dtype), weight.to(grad.dtype), sizes,
            layer.stride, layer.padding, layer.dilation, False, zeros, layer.groups,
            [prepared.requires_grad, need_w, need_b],
        )  # fmt: skip
        wanted = [t for t, need in zip((x, *parameters), (need_x, *need_p), strict=True) if need]
        found: Iterator[Tensor] = iter(())
        if wanted:
            found = iter(torch.autograd.grad(prepared, wanted, grad_y.to(prepared.dtype)))
        grad_x, *grads = (next(found) if need else None for need in (need_x, *need_p))
        grad_w, grad_b = (None if g is None else g.to(weight.dtype) for g in (grad_w, grad_b))
        return None, grad_x, grad_w, grad_b, *grads
