"""The variational autoencoder: two flat chains of layers round a latent, Gaussian or of codes.

Axes: b batch, c channels, x y z space in storage order; 2D is `(B, C, X, Y)`, 3D `(B, C, X, Y, Z)`.
"""

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae3d.kernels.steps import arranged, run
from vae3d.models.attention import Attention
from vae3d.models.blocks import Block, ResBlock
from vae3d.models.conv import conv, per_axis
from vae3d.models.downsample import ConvDown, Down
from vae3d.models.linear_code import LinearCode, added_to_mean, too_large
from vae3d.models.norm import GroupNorm, Norm, NormAct, named, recomputing
from vae3d.models.posterior import DiagonalGaussian, LogVarianceHead, PosteriorHead
from vae3d.models.spec import Described
from vae3d.models.upsample import InterpUp, Up

T = TypeVar("T")
OUTPUTS: dict[str, type[nn.Module]] = {"none": nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
Layers = list[nn.Module]
MakeAttention = Callable[..., Attention] | None
Level = tuple[int, tuple[int, ...], int, MakeAttention]  # width, factor, blocks, attention
Checkpointing = Literal["none", "block", "level"]
# How weights want their volumes prepared, and where they come from, as plain data: preprocess, data
# (how files are read), patch_size, step, subjects, measured, license; see `training.checkpoint`.
Contract = dict[str, Any]


class Chain(nn.Sequential):
    """Layers in a row; runs them one by one, or recomputes them in the backward pass.

    Args:
        levels: The layers, grouped; the groups are the units of `level` checkpointing and leave no
            trace in the names of the parameters.
    """

    def __init__(self, levels: Sequence[Sequence[nn.Module]]):
        super().__init__(*[layer for level in levels for layer in level])
        self.level_sizes = tuple(len(level) for level in levels)
        self.checkpointing: Checkpointing = "none"

    def forward(self, x: Tensor, run: Callable[..., Tensor] = run) -> Tensor:
        """Run every layer in order, by `run(layers, x)`."""
        x = arranged(self, x)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return run(self, x)
        for part in self.levels() if self.checkpointing == "level" else self.blocks():
            if torch.compiler.is_compiling():  # it plans the repetition itself, without contexts
                x = checkpoint(run, part, x, use_reentrant=False)
            else:
                x = checkpoint(run, part, x, use_reentrant=False, context_fn=repetition)
        return x

    def compile(self, **options: object) -> None:
        """Compile the passes that have gradients, anew for each size; `options`: `torch.compile`'s.

        A graph for any size, torch's choice from the second size on, is slower, and for some sizes
        Inductor fails at its backward pass (`Invalid ranges [0:-1]`). Volumes of validation come in
        sizes of their own, each of which would be compiled for one pass: they run as they are.
        """
        super().compile(**{"dynamic": False} | options)
        compiled = self._compiled_call_impl
        assert compiled is not None

        def call(x: Tensor) -> Tensor:
            return compiled(x) if torch.is_grad_enabled() else self._call_impl(x)

        self._compiled_call_impl = call

    def levels(self) -> Iterator[nn.Sequential]:
        """The groups of layers that the chain was made of, empty ones too."""
        layers = iter(self)
        for size in self.level_sizes:
            yield nn.Sequential(*islice(layers, size))

    def blocks(self) -> Sequence[Layers]:
        """Every layer by itself, but the closing norm and convolution, one step, together."""
        layers = list(self)
        return [*([layer] for layer in layers[:-2]), layers[-2:]]

    def __getitem__(self, index: int | slice) -> nn.Module:
        """One layer, or a plain `nn.Sequential` of several."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else list(self)[index]


def door(file: str) -> ModuleType:
    """A file of the room of weights, `vae3d.weights`: the one door from the architecture to it.

    That room knows every network, so it is entered when a network is asked to read or write
    weights, never on import.

    Args:
        file: `convert` or `hub`.
    """
    return import_module(f"vae3d.weights.{file}")


def repetition() -> tuple:
    """Contexts of the forward pass and of its repetition in the backward pass."""
    return nullcontext(), recomputing()


def in_range(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run `layers` in a row; where float16 overflows, and no gradient is asked for, in float32.

    Activations of trained decoders can pass 65504 (some of Stable Diffusion's do), and the next
    norm makes NaN of the whole volume. In training the loss scaler skips such a step.

    Args:
        layers: The layers.
        x: Input of the first.
    """
    y = x
    for layer in layers:
        y = layer(y)
    if y.dtype != torch.float16 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y
    if y.isfinite().all():
        return y
    warnings.warn(
        "activations overflow float16; computed again in float32 (bfloat16 has the range)",
        stacklevel=3,
    )
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        for layer in layers:
            x = copy.deepcopy(layer).float()(x)
    return x.to(y.dtype)


class CustomVAE(Described, nn.Module):
    """Variational autoencoder for 2D and 3D volumes, of which the published ones are presets.

    The encoder is: convolution; per level a down layer where its factor is not 1, then blocks with
    optional attention; a bottleneck; norm, activation, convolution. The decoder mirrors it. Any
    spatial size goes in and the same size comes out.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the volume.
        out_channels: Channels of the reconstruction; None for `in_channels`.
        channels: Channels of each level, finest first.
        factors: Shrink on entering each level, one number or one per axis; None halves every axis
            on entering each level but the first.
        num_res_blocks: Blocks of each level, one number or one per level.
        decoder_res_blocks: The same for the decoder; None for `num_res_blocks`.
        latent_channels: Channels of the latent.
        block: Block class.
        down: Down layer class.
        up: Up layer class.
        norm: Norm class.
        act: Activation: silu, relu, leaky_relu, gelu, elu, mish or none.
        act_before_out: Activation between the last norm and the last convolution of each half.
        attention: Attention class of the levels that `attention_levels` marks.
        attention_levels: One true or false per level; None for no level.
        mid_attention: Attention class of the bottleneck; None for none.
        encoder_mid: Build the encoder's bottleneck (two blocks with `mid_attention` in between).
        decoder_mid: Build the decoder's bottleneck.
        posterior: Class that turns the encoder's output into the posterior: Gaussian, or the
            codes of `FSQ` or `VQ`.
        z_channels: Channels that the decoder starts from; None for `latent_channels`.
        double_z: The encoder ends in as many times `z_channels` as the posterior has moments
            (Stable Diffusion), not in `z_channels` (MONAI).
        stem_channels: Channels after the first convolution; None for those of the first level.
        quant_conv: 1x1 convolutions on both sides of the latent.
        output: Function on the reconstruction: none, tanh or sigmoid.
        linear_code: A linear code of blocks round both networks, which begin at zero; training
            fits it to its volumes before the first step. Blocks are cut by `factors`. None is
            false, but `train_3d` then decides: true where nothing speaks against it.
        latent_scale: Factor of `encode_stage_2_inputs`, so that latents have unit variance.
        latent_shift: Subtracted before scaling.
    """

    frozen: tuple[nn.Module, ...] = ()  # what `freeze` has named

    def __init__(
        self,
        spatial_dims: Literal[2, 3] = 3,
        in_channels: int = 1,
        out_channels: int | None = None,
        channels: tuple[int, ...] = (32, 64, 128),
        factors: tuple[tuple[int, ...], ...] | None = None,
        num_res_blocks: int | tuple[int, ...] = 2,
        decoder_res_blocks: int | tuple[int, ...] | None = None,
        latent_channels: int = 4,
        block: Callable[[int, int, int, Callable[[int], Norm], str], Block] = ResBlock,
        down: Callable[[int, tuple[int, ...], int], Down] = ConvDown,
        up: Callable[[int, tuple[int, ...], int], Up] = InterpUp,
        norm: Callable[[int], Norm] = GroupNorm,
        act: str = "silu",
        act_before_out: bool = True,
        attention: Callable[[int, int, Callable[[int], Norm]], Attention] | None = None,
        attention_levels: tuple[bool, ...] | None = None,
        mid_attention: Callable[[int, int, Callable[[int], Norm]], Attention] | None = None,
        encoder_mid: bool = True,
        decoder_mid: bool = True,
        posterior: Callable[[], PosteriorHead] = LogVarianceHead,
        z_channels: int | None = None,
        double_z: bool = True,
        stem_channels: int | None = None,
        quant_conv: bool = True,
        output: Literal["none", "tanh", "sigmoid"] = "none",
        linear_code: bool | None = None,
        latent_scale: float = 1.0,
        latent_shift: float = 0.0,
    ):
        super().__init__()
        if latent_channels < 1:
            raise ValueError(f"latent_channels is {latent_channels}; give 1 or more")
        levels = len(channels)
        self.contract: Contract | None = None
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.out_channels = out_channels or in_channels
        self.latent_channels = latent_channels
        self.latent_scale, self.latent_shift = latent_scale, latent_shift
        z_channels = z_channels or latent_channels
        given: Sequence[int | tuple[int, ...]] = factors or (1,) + (2,) * (levels - 1)
        shrink = [per_axis(f, spatial_dims, "factors") for f in per_level(given, levels, "factors")]
        self.factor = tuple(prod(axis) for axis in zip(*shrink, strict=True))
        blocks = per_level(num_res_blocks, levels, "num_res_blocks")
        decoder_blocks = per_level(decoder_res_blocks or blocks, levels, "decoder_res_blocks")
        if min(*blocks, *decoder_blocks) < 0:
            raise ValueError(f"num_res_blocks is {num_res_blocks}; give 0 or more")
        marked = per_level(attention_levels or (False,) * levels, levels, "attention_levels")
        if any(marked) and attention is None:
            raise ValueError("attention_levels marks a level, but attention names no class")
        attentions = [attention if mark else None for mark in marked]

        self.head = posterior()
        self.head.fit(latent_channels)
        moments = self.head.num_moments
        encoder_out = z_channels * (moments if double_z else 1)
        parts = _Parts(spatial_dims, block, down, up, norm, act, act_before_out, mid_attention)
        stem_channels = stem_channels or channels[0]
        shrinking = list(zip(channels, shrink, blocks, attentions, strict=True))
        growing = list(zip(channels, shrink, decoder_blocks, attentions, strict=True))
        self.encoder = Chain(
            [
                [conv(spatial_dims, in_channels, stem_channels)],
                *parts.shrinking_levels(stem_channels, shrinking),
                parts.bottleneck(channels[-1]) if encoder_mid else [],
                parts.ending(channels[-1], encoder_out),
            ]
        )
        self.decoder = Chain(
            [
                [conv(spatial_dims, z_channels, channels[-1])],
                parts.bottleneck(channels[-1]) if decoder_mid else [],
                *parts.growing_levels(channels[-1], reversed(growing)),
                parts.ending(channels[0], self.out_channels),
            ]
        )
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = self.quant_conv
        if quant_conv:
            self.quant_conv = conv(spatial_dims, encoder_out, moments * latent_channels, 1)
            self.post_quant_conv = conv(spatial_dims, latent_channels, z_channels, 1)
        elif (encoder_out, z_channels) != (moments * latent_channels, latent_channels):
            raise ValueError(
                "quant_conv=False needs z_channels equal to latent_channels and double_z=True"
            )
        self.output = named(OUTPUTS, output, "output")()
        self.linear_code: LinearCode | None = None
        if linear_code:
            self.add_linear_code()

    def settle_linear_code(self, wanted: bool | None = None) -> None:
        """Decide on the linear code of a network that was not told, before it gets weights.

        Does nothing for one that was told, nor for a published layout, which has no such argument.

        Args:
            wanted: What the weights to come have; None for a new network, which has a linear code
                where there is a place for one.
        """
        parameters = inspect.signature(type(self)).parameters
        if "linear_code" not in parameters or self._arguments.get("linear_code") is not None:
            return
        self._arguments["linear_code"] = not self.no_linear_code() if wanted is None else wanted
        if self._arguments["linear_code"]:
            self.add_linear_code()

    def no_linear_code(self) -> str | None:
        """Why there is no place for a linear code, for a message; None where there is."""
        if not isinstance(self.output, nn.Identity) or self.out_channels != self.in_channels:
            return (
                "linear_code reconstructs its input: it takes output none, and no out_channels"
                " other than in_channels"
            )
        return too_large(self.in_channels, self.factor)

    def add_linear_code(self) -> None:
        """Put the linear code round the networks, and let these begin at zero."""
        if reason := self.no_linear_code():
            raise ValueError(reason)
        shape = (self.spatial_dims, self.in_channels, self.latent_channels, self.factor)
        self.linear_code = LinearCode(*shape)
        self.silence()

    def silence(self) -> None:
        """Let both networks begin at zero: the mean, not its spread, and the reconstruction."""
        last = self.encoder[-1] if isinstance(self.quant_conv, nn.Identity) else self.quant_conv
        for layer, rows in ((last, self.latent_channels), (self.decoder[-1], self.out_channels)):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter[:rows])

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output convolution, at which adversarial losses balance their gradients."""
        return cast(nn.Parameter, self.decoder[-1].weight)

    def set_checkpointing(self, mode: Checkpointing) -> None:
        """Trade time for memory in training: recompute activations in the backward pass.

        Args:
            mode: `none`, `block` (store the input of every layer) or `level` (of every level).
        """
        if mode not in ("none", "block", "level"):
            raise ValueError(f"checkpointing={mode!r} is not one of none, block, level")
        self.encoder.checkpointing = self.decoder.checkpointing = mode

    def freeze(self, part: Literal["encoder", "decoder"]) -> None:
        """Keep half of the network as it is: no gradients, and statistics of norms stay.

        A decoder that is trained on a frozen encoder reads the latents of before, as that of
        Stable Diffusion's ft-mse does.

        Args:
            part: `encoder` (with what makes the posterior) or `decoder`.
        """
        code = self.linear_code
        halves = {
            "encoder": (self.encoder, self.quant_conv, self.head, code and code.analysis),
            "decoder": (self.post_quant_conv, self.decoder, code and code.synthesis),
        }
        self.frozen = tuple(module for module in halves[part] if module is not None)
        for module in self.frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but for what is frozen."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of `(B, C, *spatial)`, padded at the far end to a multiple of `factor`."""
        return self.head(self.moments(self.pad(x)))

    def moments(self, x: Tensor) -> Tensor:
        """What the head makes the posterior of; `x` is padded."""
        moments = in_range([self.encoder, self.quant_conv], x)
        if self.linear_code is None:
            return moments
        return added_to_mean(moments, self.linear_code.encode(x))

    def snapped(self, z: Tensor) -> Tensor:
        """The nearest latent `(B, C, *spatial)` of the codebook; of a Gaussian head `z` itself."""
        return self.head.values(self.head.codes(z)).to(z) if self.head.num_codes else z

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction `(B, out_channels, *spatial * factor)` of a latent `(B, C, *spatial)`."""
        z = z.to(self.last_layer.dtype)  # the posterior is float32, whatever the weights are
        recon = in_range([self.post_quant_conv, self.decoder], z)
        if self.linear_code is not None:
            recon = recon + self.linear_code.decode(z)
        return self.output(recon)

    def forward(
        self, x: Tensor, sample_posterior: bool | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct `x` and return the posterior beside it.

        Args:
            x: `(B, in_channels, *spatial)`, any size.
            sample_posterior: Decode a sample (True) or the mean (False); None samples in training
                mode and takes the mean in evaluation mode.

        Returns:
            `(recon, posterior)`, `recon` of the size of `x`.
        """
        posterior = self.encode(x)
        recon = self.decode(self.draw(posterior, sample_posterior))
        return self.crop(recon, x), posterior

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write `model.safetensors` and `config.json`.

        Args:
            folder: Where to; made when missing.
            **options: Those of `huggingface_hub.ModelHubMixin.save_pretrained`, such as
                `push_to_hub=True, repo_id="me/my-vae"`.
        """
        door("hub").HubFolder(self).save_pretrained(folder, **options)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, trust: Sequence[str] = (), **options: Any
    ) -> "CustomVAE":
        """Rebuild a network from a folder, or from the Hugging Face Hub, in evaluation mode.

        Args:
            name: Folder that `save_pretrained` wrote, or a repository such as `me/my-vae`.
            trust: Prefixes of modules beside `vae3d` that may be imported.
            **options: Those of `huggingface_hub.ModelHubMixin.from_pretrained`.
        """
        try:
            vae = door("hub").HubFolder.from_pretrained(name, trust=trust, **options)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{name}: its config.json is damaged ({error})") from error
        if not isinstance(vae, cls):
            raise ValueError(f"{name} holds a {type(vae).__name__}, not a {cls.__name__}")
        return vae

    def encode_stage_2_inputs(self, x: Tensor) -> Tensor:
        """Scaled latent of `x` for a second-stage model: the mean, or a sample in training mode."""
        return (self.draw(self.encode(x)) - self.latent_shift) * self.latent_scale

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        """Reconstruction of a scaled latent, or of the codes nearest to it."""
        return self.decode(self.snapped(z / self.latent_scale + self.latent_shift))

    def set_latent_scale(self, scale: float) -> None:
        """Take over a measured scale, for `encode_stage_2_inputs` and in what is saved."""
        if "latent_scale" not in inspect.signature(type(self)).parameters:
            raise ValueError(f"a {type(self).__name__} keeps no scale of its latents")
        self.latent_scale = self._arguments["latent_scale"] = scale

    def crop(self, recon: Tensor, x: Tensor) -> Tensor:
        """Cut `recon` to the spatial size of `x`, the inverse of `pad`."""
        return recon[(slice(None), slice(None), *(slice(n) for n in x.shape[2:]))]

    def draw(self, posterior: DiagonalGaussian, sample: bool | None = None) -> Tensor:
        """Sample or mean of `posterior`; None follows the training mode."""
        sample = self.training if sample is None else sample
        return posterior.sample() if sample else posterior.mode()

    def pad(self, x: Tensor) -> Tensor:
        """Repeat the last voxels of each axis up to a multiple of `factor`."""
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("XYZ"[: self.spatial_dims])
            raise ValueError(
                f"the model takes (B, {self.in_channels}, {axes}), not {tuple(x.shape)}"
            )
        missing = [-n % f for n, f in zip(x.shape[2:], self.factor, strict=True)]
        if not any(missing):
            return x
        return F.pad(x, [n for m in reversed(missing) for n in (0, m)], mode="replicate")


@dataclass(frozen=True)
class _Parts:
    """The sockets of one network, and how levels are made of them."""

    spatial_dims: int
    block: Callable[..., Block]
    down: Callable[..., Down]
    up: Callable[..., Up]
    norm: Callable[[int], Norm]
    act: str
    act_before_out: bool
    mid_attention: MakeAttention

    def blocks(self, width_in: int, width: int, count: int, attention: MakeAttention) -> Layers:
        """`count` blocks, each followed by attention where the level has it."""
        layers: Layers = []
        for n in range(count):
            layers.append(self.make_block(width if n else width_in, width))
            if attention is not None:
                layers.append(attention(width, self.spatial_dims, self.norm))
        return layers

    def make_block(self, width_in: int, width: int) -> Block:
        """One block."""
        return self.block(width_in, width, self.spatial_dims, self.norm, self.act)

    def shrinking_levels(self, width_in: int, levels: Iterable[Level]) -> Iterator[Layers]:
        """Levels of the encoder, finest first: down layer, blocks."""
        for width, factor, count, attention in levels:
            down = [self.down(width_in, factor, self.spatial_dims)] if prod(factor) > 1 else []
            yield [*down, *self.blocks(width_in, width, count, attention)]
            width_in = width

    def growing_levels(self, width_in: int, levels: Iterable[Level]) -> Iterator[Layers]:
        """Levels of the decoder, coarsest first: blocks, up layer."""
        for width, factor, count, attention in levels:
            up = [self.up(width, factor, self.spatial_dims)] if prod(factor) > 1 else []
            yield [*self.blocks(width_in, width, count, attention), *up]
            width_in = width

    def bottleneck(self, width: int) -> Layers:
        """Block, attention where there is one, block."""
        layers: Layers = [self.make_block(width, width), self.make_block(width, width)]
        if self.mid_attention:
            layers.insert(1, self.mid_attention(width, self.spatial_dims, self.norm))
        return layers

    def ending(self, width: int, width_out: int) -> Layers:
        """Norm, activation and the last convolution of a half."""
        norm = NormAct(self.norm(width), self.act if self.act_before_out else "none")
        return [norm, conv(self.spatial_dims, width, width_out)]


def per_level(value: int | Sequence[T], levels: int, name: str) -> tuple[int | T, ...]:
    """One entry per level from one value or a sequence of `levels` values."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries for {levels} levels of channels")
    return values
