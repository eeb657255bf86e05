"""Convolutions that keep what they are computed from, not what they read, on any device.

For its backward pass a convolution keeps its input: the normalized and activated volume, or the
upsampled one; norm and activation keep theirs, in float32. Here the step before the convolution is
computed again in the backward pass, and only what it starts from is kept: 2 bytes a value in
bfloat16 where the plain layers keep 10. The numbers are those of the plain layers to the last bit.

The CPU has faster steps of its own (`steps.py`); a compiled network leaves this to the compiler.

Axes: b batch, c channels, x y z space.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FUNCTION = {nn.Conv2d: nn.functional.conv2d, nn.Conv3d: nn.functional.conv3d}


def is_lean(layer: nn.Module, x: Tensor) -> bool:
    """Whether `prepared_conv` serves this layer and input: something is to be differentiated."""
    return (
        not torch.compiler.is_compiling()
        and torch.amp.is_autocast_available(x.device.type)  # not on the meta device
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and type(layer) in FUNCTION
        and torch.is_grad_enabled()
        and (x.requires_grad or layer.weight.requires_grad)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def prepared_conv(
    prepare: Callable[[Tensor], Tensor],
    layer: nn.Conv2d | nn.Conv3d,
    x: Tensor,
    parameters: Iterable[nn.Parameter] = (),
) -> Tensor:
    """`layer(prepare(x))`, of which only `x` is kept for the backward pass.

    Args:
        prepare: Cheap, without state, and the same whenever it is called.
        layer: A convolution for which `is_lean` holds.
        x: `(B, C, *spatial)`.
        parameters: Those of `prepare`.
    """
    return PreparedConv.apply(x, layer.weight, layer.bias, prepare, layer, *parameters)


class PreparedConv(torch.autograd.Function):
    """A convolution of something that is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, prepare, layer, *parameters):
        """Return `layer(prepare(x))`."""
        ctx.save_for_backward(x, weight, *parameters)
        ctx.prepare, ctx.layer, ctx.bias = prepare, layer, None if bias is None else bias.shape
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return FUNCTION[type(layer)](prepare(x), weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of every argument of `forward`."""
        x, weight, *parameters = ctx.saved_tensors
        need_x, need_w, need_b, _, _, *need_p = ctx.needs_input_grad
        layer, zeros = ctx.layer, (0,) * (grad.dim() - 2)
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            x = x.detach().requires_grad_(need_x)
            prepared = ctx.prepare(x)
        grad_y, grad_w, grad_b = torch.ops.aten.convolution_backward(
            grad, prepared.detach().to(grad.dtype), weight.to(grad.dtype), ctx.bias,
            layer.stride, layer.padding, layer.dilation, False, zeros, layer.groups,
            [prepared.requires_grad, need_w, need_b],
        )  # fmt: skip
        wanted = [t for t, need in zip((x, *parameters), (need_x, *need_p), strict=True) if need]
        found = iter(())
        if wanted:
            found = iter(torch.autograd.grad(prepared, wanted, grad_y.to(prepared.dtype)))
        grad_x, *grads = (next(found) if need else None for need in (need_x, *need_p))
        grad_w, grad_b = (None if g is None else g.to(weight.dtype) for g in (grad_w, grad_b))
        return grad_x, grad_w, grad_b, None, None, *grads
