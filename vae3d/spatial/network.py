"""A VAE over a volume that several ranks hold in slabs: the numbers of one process.

    layout = Layout((512, 512, 512), vae.factor)        # of the whole volume
    slabs = SlabVAE(vae, layout)
    posterior = slabs.encode(x)                         # x (B, C, own rows, Y, Z)
    recon = slabs.decode(posterior.mean)

The model's own modules are walked as exact mode walks them, by what `vae3d.models.reach` knows of a
layer: it is run as it is on a slab with the rows of its neighbors that it sees, and what it made of
zeros of its own at a face between two slabs is cut off. Statistics of norms are those of all ranks,
keys and values of global attention go round. A layer of which nothing is known is refused.

Gradients of parameters are each rank's part of the sum; the caller adds them up (DDP does).

Axes: b batch, c channels, x y z space, h heads, n tokens, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vae3d.kernels import steps
from vae3d.kernels.convolutions import Conv, zeros_of
from vae3d.kernels.lean import is_lean, prepared_conv
from vae3d.kernels.memory import channels_last
from vae3d.kernels.moments import of_groups
from vae3d.kernels.upsampling import upsample_convolve
from vae3d.models import attention, blocks, custom_vae, norm, upsample
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.linear_code import LinearCode, added_to_mean
from vae3d.models.norm import wide
from vae3d.models.posterior import DiagonalGaussian, Quantized, use_of
from vae3d.models.reach import Reach, handler_of, reach_of
from vae3d.spatial import ring
from vae3d.spatial.slabs import Layout, Rows, SharedMoments

Function = Callable[[Tensor], Tensor]
OfSlab = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class SlabCodes(Quantized):
    """Codes of this rank's rows, whose use is that of all.

    Args:
        total: Sum over the ranks.
    """

    total: Function = torch.clone

    def use(self) -> tuple[Tensor, Tensor]:
        """See `Quantized`."""
        return use_of(self.codes, self.num_codes, self.total)


class SlabVAE:
    """A VAE as one of several ranks runs it, on its slab of each sample.

    Args:
        vae: The network, the same on all ranks.
        layout: Who holds which rows.

    Raises:
        ValueError: A layer of the network cannot be run in slabs; it is named.
    """

    def __init__(self, vae: CustomVAE, layout: Layout):
        check(vae)
        self.vae, self.layout = vae, layout
        self.last_layer, self.crop, self.head = vae.last_layer, vae.crop, vae.head

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """This rank's rows of the posterior; see `CustomVAE.encode`."""
        posterior = self.head(self.moments(self.vae.pad(x)))
        if isinstance(posterior, Quantized):
            return SlabCodes(**vars(posterior), total=self.layout.sum)
        return posterior

    def moments(self, x: Tensor) -> Tensor:
        """This rank's rows of what the head makes the posterior of; `x` is padded."""
        moments = self.run([self.vae.encoder, self.vae.quant_conv], x)
        if (linear := self.vae.linear_code) is None:
            return moments
        return added_to_mean(moments, wide(self.walk(linear.analysis, x)))

    def decode(self, z: Tensor) -> Tensor:
        """This rank's rows of the reconstruction; see `CustomVAE.decode`."""
        z = z.to(self.vae.last_layer.dtype)
        recon = self.run([self.vae.post_quant_conv, self.vae.decoder], z)
        if self.vae.linear_code is not None:
            recon = recon + self.walk(self.vae.linear_code.synthesis, z)
        return self.vae.output(recon)

    def run(
        self,
        layers: Iterable[nn.Module],
        x: Tensor,
        residual: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Apply layers in order; a norm, its activation and the convolution after it are one.

        Args:
            layers: The layers.
            x: This rank's rows.
            residual: Added at the end; None for nothing.
            overwrite: Whether the sum may take the memory of `residual`.
        """
        layers = list(layers)
        while layers:
            layer, *layers = layers
            after = layers[0] if layers else None
            if not isinstance(layer, norm.NormAct) or not isinstance(after, (nn.Conv2d, nn.Conv3d)):
                x = self.walk(layer, x)
                continue
            del layers[0]
            if is_step(layer, after, x, self.layout.axis):
                added, residual = (None, residual) if layers else (residual, None)
                x = steps.convolve(
                    after,
                    x,
                    norm_act=layer,
                    residual=added,
                    overwrite=overwrite,
                    neighbors=self.layout,
                )
            else:
                x = self.prepared(layer, after, x)
        return x if residual is None else x + residual

    def walk(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run a module on a slab: by its handler, or by what it sees."""
        handler = handler_of(module, HANDLERS)
        return self.elementary(module, x) if handler is None else handler(self, module, x)

    def elementary(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run a layer by what it sees."""
        reach = reach_of(module, x.dim() - 2)
        assert reach is not None, f"`check` lets no {type(module).__name__} pass"
        return self.within_reach(lambda slab, _: steps.run([module], slab), reach, x)

    def within_reach(self, function: OfSlab, reaches: Sequence[Reach], x: Tensor) -> Tensor:
        """Run what sees a limited number of rows: on the slab with them, and cut its own rows.

        Args:
            function: Is given a slab, and the first and last of its rows that are this rank's.
            reaches: What it sees along each axis.
            x: This rank's rows.
        """
        owned, me, dim = self.layout.owned(x), self.layout.rank, self.layout.dim
        reach, n = reaches[self.layout.axis], owned[-1][1]
        if any(hi * reach.size(n) % n for _, hi in owned):
            raise ValueError(
                f"sharding spatial: a layer makes {reach.size(n)} rows of {n}, which cannot be cut "
                "where those are"
            )
        made = [(lo * reach.size(n) // n, hi * reach.size(n) // n) for lo, hi in owned]
        seen = [reach.wants(*rows) for rows in made]
        wanted = [(reach.begins(max(lo, 0))[0], hi) for lo, hi in seen]
        first = min(wanted[me][0], owned[me][0])
        own = owned[me][0] - first, owned[me][1] - first
        y = function(self.layout.extended(x, wanted), own)
        begin = reach.begins(first)[1]
        lo, hi = (edge - begin for edge in made[me])
        if (lo, hi) == (0, y.shape[dim]):
            return y
        y = self.layout.part(y, lo, hi)
        return channels_last(y) if y.device.type == "cpu" else y  # once, not by all that read it

    def prepared(self, before: norm.NormAct, layer: Conv, x: Tensor) -> Tensor:
        """`layer(before(x))` of which only `x`, with the rows that are seen beside it, is kept."""
        reach = reach_of(layer, x.dim() - 2)
        assert reach is not None, f"`check` lets no {type(layer).__name__} pass"
        scaled = partial(scaled_and_activated, before.act)

        def function(slab: Tensor, own: Rows) -> Tensor:
            affine = self.affine(before.norm, slab, own)
            if affine is None:
                return steps.run([before, layer], slab)
            if is_lean(layer, slab):
                return prepared_conv(scaled, layer, slab, affine)
            return layer(scaled(slab, *affine))

        return self.within_reach(function, reach, x)

    def affine(self, layer: norm.Norm, x: Tensor, own: Rows | None = None) -> list[Tensor] | None:
        """Mean, scale and shift per channel `(B or 1, C)` that a norm comes to; None for others.

        They are in the precision of the norm, and differentiable.

        Args:
            layer: The norm.
            x: A slab.
            own: First and last of its rows that are this rank's; None for all.
        """
        dim = self.layout.dim
        where = dim, own or (0, x.shape[dim])
        if isinstance(layer, norm.GroupNorm):
            mean, var, _ = SharedMoments.apply(x, self.layout.group, False, *where)
            mean, var = of_groups(mean, var, layer.num_groups)
        elif isinstance(layer, norm.BatchNorm) and layer.training:  # of all ranks, as ever
            mean, var, count = SharedMoments.apply(x, None, True, *where)
            layer.remember(mean[0], var[0], count[0])
        elif isinstance(layer, norm.BatchNorm):
            mean, var = layer.running_mean[None].double(), layer.running_var[None].double()
        else:
            return None
        scale = layer.weight.double() * torch.rsqrt(var + layer.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        shift = layer.bias.double().expand_as(scale)
        return [t.to(dtype) for t in (mean, scale, shift)]


def is_step(before: norm.NormAct, layer: Conv, x: Tensor, axis: int) -> bool:
    """Whether both are one fast step on a slab, which then keeps its rows."""
    if not steps.is_fast(layer, x) or steps.preparation([before, layer], x) is None:
        return False
    return sum(zeros_of(layer)[axis]) == layer.kernel_size[axis] - 1


def scaled_and_activated(act: Function | None, x: Tensor, *affine: Tensor) -> Tensor:
    """`act((x - mean) * scale + shift)` in the precision of norms, in the dtype of `x`."""
    mean, scale, shift = (t.view(len(t), -1, *(1,) * (x.dim() - 2)) for t in affine)
    y = torch.addcmul(shift, wide(x) - mean, scale)
    return (y if act is None else act(y)).to(x.dtype)


# Handlers: how modules that are no elementary layer of limited reach are run ---------------------


def _chain(run: SlabVAE, module: custom_vae.Chain, x: Tensor) -> Tensor:
    return custom_vae.Chain.forward(module, x, run.run)


def _sequential(run: SlabVAE, module: nn.Sequential, x: Tensor) -> Tensor:
    return run.run(module, x)


def _block(run: SlabVAE, module: blocks.Block, x: Tensor) -> Tensor:
    return blocks.Block.forward(module, x, run.run)


def _interpolated(run: SlabVAE, module: upsample.InterpUp, x: Tensor) -> Tensor:
    """Where interpolation is folded into the convolution, of the own rows alone."""
    conv = module.folded(x)
    if conv is None:
        return run.elementary(module, x)
    owned = run.layout.owned(x)
    (lo, hi), rows = owned[run.layout.rank], owned[-1][1]
    slab = run.layout.extended(x, [(lo - 1, hi + 1) for lo, hi in owned])
    beside = min(lo, 1), min(rows - hi, 1)
    return upsample_convolve(conv, slab, module.factor, beside, run.layout.dim)


def _norm(run: SlabVAE, module: norm.GroupNorm | norm.BatchNorm, x: Tensor) -> Tensor:
    affine = run.affine(module, x)
    assert affine is not None
    return scaled_and_activated(None, x, *affine)


def _norm_act(run: SlabVAE, module: norm.NormAct, x: Tensor) -> Tensor:
    affine = run.affine(module.norm, x)
    return module(x) if affine is None else scaled_and_activated(module.act, x, *affine)


def _attention(run: SlabVAE, module: attention.Attention, x: Tensor) -> Tensor:
    """`x + proj(mix(qkv(norm(x))))`, mixed over the volume."""
    mix = handler_of(module, MIXES)
    assert mix is not None
    update = mix(run, module, run.walk(module.norm, x))
    return update if type(module).forward is attention.BareLinearAttention.forward else update + x


def _mix_all(run: SlabVAE, module: attention.GlobalAttention, normed: Tensor) -> Tensor:
    mixed = ring.attend(run.layout, *module.heads(normed), normed.shape[2:], module.bias)
    return module.joined(mixed, normed.shape)


def _mix_windows(run: SlabVAE, module: attention.PatchAttention, normed: Tensor) -> Tensor:
    """Windows that cross a face are computed on both sides of it."""

    def mixed(slab: Tensor, own: Rows) -> Tensor:
        return module.joined(module.mix(*module.heads(slab), slab.shape[2:]), slab.shape)

    reach = reach_of(module, normed.dim() - 2)
    assert reach is not None, "of windows it is known"
    return run.within_reach(mixed, reach, normed)


def _mix_linearly(run: SlabVAE, module: attention.LinearAttention, normed: Tensor) -> Tensor:
    """The softmax of keys runs over the tokens of all ranks."""
    q, k, v = module.heads(normed)
    weights = (wide(k) - run.layout.largest(wide(k).amax(2, keepdim=True))).exp()
    context = run.layout.sum(torch.einsum("bhnd,bhne->bhde", weights, wide(v)))
    total = run.layout.sum(weights.sum(2, keepdim=True))
    context = (context / total.transpose(2, 3)).to(q.dtype)
    return module.joined(torch.einsum("bhnd,bhde->bhne", q, context), normed.shape)


HANDLERS: dict[type, Callable[..., Tensor]] = {
    nn.Sequential: _sequential,
    custom_vae.Chain: _chain,
    blocks.Block: _block,
    upsample.InterpUp: _interpolated,
    norm.GroupNorm: _norm,
    norm.BatchNorm: _norm,
    norm.NormAct: _norm_act,
    **dict.fromkeys(
        (
            *(attention.GlobalAttention, attention.PatchAttention),
            *(attention.LinearAttention, attention.BareLinearAttention),
        ),
        _attention,
    ),
}
MIXES: dict[type, Callable[..., Tensor]] = {
    attention.GlobalAttention: _mix_all,
    attention.PatchAttention: _mix_windows,
    attention.LinearAttention: _mix_linearly,
    attention.BareLinearAttention: _mix_linearly,
}


def check(vae: CustomVAE) -> None:
    """Refuse a network with a layer that cannot be run in slabs.

    Raises:
        ValueError: It names the layer.
    """
    for name in ("encode", "moments", "decode", "pad", "crop"):
        if not getattr(type(vae), name).__module__.startswith("vae3d.models."):
            raise ValueError(f"sharding spatial: {type(vae).__name__} has a {name} of its own")
    for name, layer in unknown(vae, vae.spatial_dims, ""):
        raise ValueError(
            f"sharding spatial: it is not known what {name}, a {type(layer).__name__}, sees of a "
            "volume; describe it in vae3d.models.reach, or give it a `halo`"
        )
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Dropout) and layer.p > 0 and layer.training:
            raise ValueError(
                f"sharding spatial: {name} drops values, and each rank would draw others; set "
                "dropout to 0"
            )


def unknown(module: nn.Module, dims: int, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Layers of a module that can be run in slabs neither by a handler nor by what they see."""
    if isinstance(module, (CustomVAE, LinearCode)) or handler_of(module, HANDLERS):
        for child, layer in module.named_children():
            if not isinstance(module, attention.Attention) or child == "norm":
                yield from unknown(layer, dims, f"{name}.{child}".lstrip("."))
    elif reach_of(module, dims) is None:
        yield name, module
