"""Published autoencoders as classes: each is a `CustomVAE` with its own argument names.

| class           | network                                                        |
|-----------------|----------------------------------------------------------------|
| `AutoencoderKL` | Stable Diffusion / CompVis / diffusers, 2D and 3D               |
| `MonaiVAE`      | MONAI `AutoencoderKL`, with the calls of `CustomVAE`            |
| `VAEModel`      | the same network with the calls of MONAI                        |
| `MaisiVAE`      | MAISI (NVIDIA): MONAI with linear upsampling                    |
| `T1LightVAE`    | MAISI's light variant for T1 MR, 112x136x112 to 4x28x34x28      |

Axes: b batch, c channels, x y z space.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from vae3d.models.attention import Attention, BareLinearAttention, GlobalAttention
from vae3d.models.blocks import ResBlock
from vae3d.models.custom_vae import CustomVAE, door
from vae3d.models.downsample import ConvDown, Down, PoolDown
from vae3d.models.norm import GroupNorm, named, wide
from vae3d.models.posterior import MIN_LOGVAR, DiagonalGaussian
from vae3d.models.upsample import InterpUp, TransposeUp

LATENT_SCALE = 0.18215  # one over the standard deviation of Stable Diffusion's latents
ATTENTION_TYPES = {"vanilla": GlobalAttention, "linear": BareLinearAttention, "none": None}
# The keys of a CompVis `ddconfig` under our names.
DDCONFIG = {
    "in_channels": "in_channels",
    "out_ch": "out_channels",
    "resolution": "resolution",
    "ch": "base_ch",
    "ch_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "z_channels": "z_channels",
    "double_z": "double_z",
    "dropout": "dropout",
    "attn_type": "attn_type",
    "resamp_with_conv": "resamp_with_conv",
    "tanh_out": "tanh_out",
}


class AutoencoderKL(CustomVAE):
    """The autoencoder of Stable Diffusion (Rombach et al., 2022), in 2D and 3D.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the reconstruction; None for `in_channels`.
        resolution: Size of the training images, in pixels; only gives `attn_resolutions` a meaning.
        base_ch: Channels of the first convolution.
        ch_mult: Channels of each level as multiples of `base_ch`.
        num_res_blocks: Residual blocks of an encoder level; a decoder level has one more.
        attn_resolutions: Sizes of the feature maps that get attention, in pixels.
        z_channels: Channels of the encoder's output.
        embed_dim: Channels of the latent.
        double_z: The encoder ends in `2 * z_channels`.
        spatial_dims: 2 or 3.
        ckpt_path: Checkpoint to start from, in any layout that `vae3d convert` knows.
        ignore_keys: Prefixes of keys of the checkpoint to leave out.
        dropout: Probability of a dropped value in the blocks.
        attn_type: `vanilla` (softmax), `linear` or `none`.
        mid_attention: Attention in the bottleneck, of type `attn_type`.
        resamp_with_conv: Convolutions in down and up layers; else pooling and interpolation only.
        tanh_out: Tanh on the reconstruction.
        use_quant_conv: 1x1 convolutions on both sides of the latent.
        num_groups: Groups of the norms.
        latent_scale: Factor of `encode(normalize=True)`.
        latent_shift: Subtracted before scaling.
    """

    LATENT_SCALE = LATENT_SCALE
    not_in_spec = ("ckpt_path", "ignore_keys")

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        resolution: int = 256,
        base_ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_resolutions: tuple[int, ...] = (),
        z_channels: int = 4,
        embed_dim: int = 4,
        double_z: bool = True,
        spatial_dims: Literal[2, 3] = 2,
        ckpt_path: str | None = None,
        ignore_keys: tuple[str, ...] = (),
        dropout: float = 0.0,
        attn_type: Literal["vanilla", "linear", "none"] = "vanilla",
        mid_attention: bool = True,
        resamp_with_conv: bool = True,
        tanh_out: bool = False,
        use_quant_conv: bool = True,
        num_groups: int = 32,
        latent_scale: float = LATENT_SCALE,
        latent_shift: float = 0.0,
    ):
        sizes = [resolution // 2**level for level in range(len(ch_mult))]
        attention = named(ATTENTION_TYPES, attn_type, "attn_type")
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=tuple(base_ch * m for m in ch_mult),
            stem_channels=base_ch,
            num_res_blocks=num_res_blocks,
            decoder_res_blocks=num_res_blocks + 1,
            latent_channels=embed_dim,
            block=partial(ResBlock, dropout=dropout),
            down=partial(ConvDown, padding="asymmetric") if resamp_with_conv else PoolDown,
            up=partial(InterpUp, conv_after=resamp_with_conv),
            norm=partial(GroupNorm, num_groups=num_groups),
            attention=attention,
            attention_levels=attended_levels(attn_resolutions, sizes) if attention else None,
            mid_attention=attention if mid_attention else None,
            z_channels=z_channels,
            double_z=double_z,
            quant_conv=use_quant_conv,
            output="tanh" if tanh_out else "none",
            latent_scale=latent_scale,
            latent_shift=latent_shift,
        )
        if ckpt_path is not None:
            door("convert").load_weights(self, ckpt_path, ignore_keys)

    @classmethod
    def from_ddconfig(
        cls,
        ddconfig: dict[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        spatial_dims: Literal[2, 3] = 2,
        **options: Any,
    ) -> "AutoencoderKL":
        """Build from a CompVis-style dictionary (`ch`, `ch_mult`, `attn_type`, ...).

        Args:
            ddconfig: The dictionary.
            embed_dim: Channels of the latent.
            ckpt_path: Checkpoint to start from.
            ignore_keys: Prefixes of keys of the checkpoint to leave out.
            spatial_dims: 2 or 3.
            **options: Further arguments of the class.
        """
        unknown = set(ddconfig) - set(DDCONFIG)
        if unknown:
            raise ValueError(
                f"ddconfig has unknown keys {', '.join(sorted(unknown))}; known are"
                f" {', '.join(DDCONFIG)}"
            )
        missing = {"ch", "ch_mult", "z_channels", "in_channels"} - set(ddconfig)
        if missing:
            raise ValueError(f"ddconfig lacks {', '.join(sorted(missing))}")
        return cls(
            **{DDCONFIG[key]: value for key, value in ddconfig.items()},
            embed_dim=embed_dim,
            ckpt_path=ckpt_path,
            ignore_keys=tuple(ignore_keys),
            spatial_dims=spatial_dims,
            **options,
        )

    @overload
    def encode(self, x: Tensor, normalize: Literal[False] = False) -> DiagonalGaussian: ...

    @overload
    def encode(self, x: Tensor, normalize: bool) -> DiagonalGaussian | Tensor: ...

    def encode(self, x: Tensor, normalize: bool = False) -> DiagonalGaussian | Tensor:
        """Posterior of `x`, or its scaled latent for a diffusion model.

        Args:
            x: `(B, C, *spatial)`.
            normalize: Return the latent (mean, or a sample in training mode) in unit variance.
        """
        if normalize:
            return self.encode_stage_2_inputs(x)
        return super().encode(x)

    def decode(self, z: Tensor, denorm: bool = False) -> Tensor:
        """Reconstruction of a latent.

        Args:
            z: `(B, embed_dim, *spatial)`.
            denorm: `z` is scaled, as `encode(normalize=True)` returns it.
        """
        return super().decode(z / self.latent_scale + self.latent_shift if denorm else z)


def attended_levels(attn_resolutions: Sequence[int], sizes: Sequence[int]) -> tuple[bool, ...]:
    """One true or false per level from the feature-map sizes that get attention.

    Args:
        attn_resolutions: Sizes with attention.
        sizes: Size of each level's feature map.
    """
    for wanted in attn_resolutions:
        if wanted not in sizes:
            text = ", ".join(map(str, sizes))
            hint = f"; for the downsample factor {wanted} write {sizes[0] // wanted}"
            raise ValueError(
                f"attn_resolutions={list(attn_resolutions)}: {wanted} is no feature-map size of"
                f" this network ({text} at resolution {sizes[0]})"
                + (hint if sizes[0] // wanted in sizes else "")
            )
    return tuple(size in attn_resolutions for size in sizes)


class MonaiVAE(CustomVAE):
    """MONAI's `AutoencoderKL`: its arguments and weights, the calls of `CustomVAE`.

    Sizes that are no multiple of the factor are padded here, as in every `CustomVAE`, where MONAI's
    drops voxels: of 9 x 11 at factor 4 the latent is 3 x 3 here and 2 x 2 there, and the
    reconstruction has 9 x 11 here and 8 x 8 there. At multiples of the factor both are equal.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the volume.
        out_channels: Channels of the reconstruction.
        latent_channels: Channels of the latent.
        channels: Channels of each level, finest first.
        num_res_blocks: Blocks of each level, one number or one per level.
        attention_levels: One true or false per level; None for MONAI's default, the last two of
            four levels, and for no level where there are not four.
        norm_num_groups: Groups of the norms.
        norm_eps: Added to the variance in the norms.
        with_encoder_nonlocal_attn: Bottleneck with attention in the encoder.
        with_decoder_nonlocal_attn: Bottleneck with attention in the decoder.
        use_checkpoint: Recompute activations of each level in the backward pass.
        use_convtranspose: Transposed convolutions to upsample.
        include_fc: Linear layer after each attention.
        use_combined_linear: One linear layer for queries, keys and values in MONAI's state dict;
            changes only what is exported.
        use_flash_attention: Accepted; scaled-dot-product attention always runs.
    """

    interpolation: Literal["nearest", "linear"] = "nearest"
    transpose_kernel: int | None = None
    required: tuple[str, ...] = ("spatial_dims",)  # of `from_config`, as of the original

    def __init__(
        self,
        spatial_dims: Literal[2, 3] = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        latent_channels: int = 3,
        channels: tuple[int, ...] = (32, 64, 64, 64),
        num_res_blocks: int | tuple[int, ...] = 2,
        attention_levels: tuple[bool, ...] | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = True,
        with_decoder_nonlocal_attn: bool = True,
        use_checkpoint: bool = False,
        use_convtranspose: bool = False,
        include_fc: bool = True,
        use_combined_linear: bool = False,
        use_flash_attention: bool = False,
    ):
        if attention_levels is None and len(channels) == 4:
            attention_levels = (False, False, True, True)
        attention = partial(GlobalAttention, out_proj=include_fc)
        transpose = partial(TransposeUp, kernel=self.transpose_kernel)
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=tuple(channels),
            num_res_blocks=num_res_blocks,
            latent_channels=latent_channels,
            down=partial(ConvDown, padding="asymmetric"),
            up=transpose if use_convtranspose else partial(InterpUp, mode=self.interpolation),
            norm=partial(GroupNorm, num_groups=norm_num_groups, eps=norm_eps),
            act_before_out=False,
            attention=attention,
            attention_levels=attention_levels,
            mid_attention=attention,
            encoder_mid=with_encoder_nonlocal_attn,
            decoder_mid=with_decoder_nonlocal_attn,
            double_z=False,
        )
        self.use_combined_linear = use_combined_linear
        if use_checkpoint:
            self.set_checkpointing("level")
        self.register_load_state_dict_pre_hook(_accept_monai_names)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from a dictionary of MONAI's arguments.

        Args:
            config: The arguments by name.
        """
        known = cls.__signature__.parameters
        unknown = set(config) - set(known)
        if unknown:
            raise ValueError(
                f"the configuration of {cls.__name__} has unknown keys"
                f" {', '.join(sorted(unknown))}; known are {', '.join(known)}"
            )
        missing = set(cls.required) & set(known) - set(config)
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(sorted(missing))}")
        return cls(**config)


def _accept_monai_names(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """Rename a state dict of MONAI, on its way into `load_state_dict`, to our names."""
    if any(key.startswith(f"{prefix}encoder.blocks.") for key in state):
        theirs = {k[len(prefix) :]: state.pop(k) for k in list(state) if k.startswith(prefix)}
        ours = door("convert").from_monai_state(module, theirs)
        state.update({prefix + key: value for key, value in ours.items()})


class MeanAndStd(DiagonalGaussian):
    """A posterior that unpacks as MONAI's pair, `z_mu, z_sigma = posterior`."""

    def __iter__(self) -> Iterator[Tensor]:
        """Mean, then standard deviation."""
        return iter((self.mean, self.std))

    def __getitem__(self, index: int) -> Tensor:
        """Mean (0) or standard deviation (1)."""
        return (self.mean, self.std)[index]


class VAEModel(MonaiVAE):
    """MONAI's `AutoencoderKL` with MONAI's calls: `vae(x)` returns `(recon, z_mu, z_sigma)`.

    Odd sizes are padded where MONAI's drops voxels, see `MonaiVAE`.
    """

    def encode(self, x: Tensor) -> MeanAndStd:
        """Posterior of `x`, which unpacks as `(z_mu, z_sigma)`."""
        posterior = super().encode(x)
        return MeanAndStd(posterior.mean, posterior.logvar)

    def sampling(self, z_mu: Tensor, z_sigma: Tensor) -> Tensor:
        """Draw from the posterior, with one `randn_like(z_sigma)` of the global generator."""
        layout = self.noise_layout(z_sigma)
        return z_mu + torch.randn_like(z_sigma, memory_format=layout) * z_sigma

    def noise_layout(self, z_sigma: Tensor) -> torch.memory_format:
        """The layout that `z_sigma` has in MONAI; `randn_like` fills memory in order.

        It is contiguous, but for attention on the CPU, which leaves channels innermost. The norm
        that follows undoes that for a single volume, and for a single image unless two attentions
        stand at one resolution.
        """
        attentions = [0]  # at each resolution of the encoder
        for layer in self.encoder:
            attentions += [0] * isinstance(layer, Down)
            attentions[-1] += isinstance(layer, Attention)
        flat = self.spatial_dims == 2
        kept = max(attentions) > (len(z_sigma) == 1) and (flat or len(z_sigma) > 1)
        if z_sigma.device.type != "cpu" or not kept:
            return torch.contiguous_format
        return torch.channels_last if flat else torch.preserve_format

    def forward(self, x: Tensor, sample_posterior: bool | None = None) -> tuple:
        """Reconstruct a sample, as MONAI does.

        Args:
            x: `(B, in_channels, *spatial)`.
            sample_posterior: When given, decode a sample (True) or the mean (False) and return
                what `CustomVAE` returns, `(recon, posterior)`.

        Returns:
            `(recon, z_mu, z_sigma)`.
        """
        if sample_posterior is not None:
            return super().forward(x, sample_posterior)
        z_mu, z_sigma = self.encode(x)
        recon = self.crop(self.decode(self.sampling(z_mu, z_sigma)), x)
        return recon, z_mu, z_sigma

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct the posterior mean of `x`."""
        return self.crop(self.decode(self.encode(x)[0]), x)

    def encode_stage_2_inputs(self, x: Tensor) -> Tensor:
        """Sample of the posterior of `x`, for a second-stage model."""
        return self.sampling(*self.encode(x))

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        """Reconstruction of a latent of a second-stage model."""
        return self.decode(z)


def compute_kl_loss(z_mu: Tensor, z_sigma: Tensor) -> Tensor:
    """KL divergence to the standard normal, summed over the latent, averaged over the batch.

    The convention of MONAI's tutorials; `DiagonalGaussian.kl("sum")` gives the same value, and
    `kl()` the mean over latent elements, which does not grow with the patch.

    Args:
        z_mu: Mean `(B, C, *spatial)`.
        z_sigma: Standard deviation, same shape.
    """
    # The floor is that of the clamped log-variance; sigma = 0 stays finite.
    logvar = 2 * torch.log(wide(z_sigma).clamp(min=math.exp(MIN_LOGVAR / 2)))
    return DiagonalGaussian(wide(z_mu), logvar).kl("sum")


class MaisiVAE(MonaiVAE):
    """MAISI's autoencoder (Guo et al., 2024): MONAI's with linear upsampling.

    Weights of one fit the other key by key and reconstruct wrongly; convert them instead.

    Args:
        num_channels: Channels of each level, finest first.
        attention_levels: One true or false per level; None for no level.
        use_checkpointing: Recompute activations of each level in the backward pass.
        use_convtranspose: Transposed convolutions (kernel 3) to upsample.
    """

    interpolation = "linear"
    transpose_kernel = 3
    required = ("spatial_dims", "in_channels", "out_channels", "latent_channels")
    # How MAISI computes, not what: splits of its convolutions, precision and printing.
    ignored = ("num_splits", "dim_split", "norm_float16", "print_info", "save_mem")

    def __init__(
        self,
        spatial_dims: Literal[2, 3] = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        latent_channels: int = 4,
        num_channels: tuple[int, ...] = (64, 128, 256),
        num_res_blocks: int | tuple[int, ...] = 2,
        attention_levels: tuple[bool, ...] | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = False,
        with_decoder_nonlocal_attn: bool = False,
        include_fc: bool = False,
        use_combined_linear: bool = False,
        use_flash_attention: bool = False,
        use_checkpointing: bool = False,
        use_convtranspose: bool = False,
    ):
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            channels=num_channels,
            num_res_blocks=num_res_blocks,
            attention_levels=attention_levels or (False,) * len(num_channels),
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            with_encoder_nonlocal_attn=with_encoder_nonlocal_attn,
            with_decoder_nonlocal_attn=with_decoder_nonlocal_attn,
            use_checkpoint=use_checkpointing,
            use_convtranspose=use_convtranspose,
            include_fc=include_fc,
            use_combined_linear=use_combined_linear,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from a dictionary of MAISI's arguments.

        Args:
            config: The arguments by name; those that only say how to compute are left out.
        """
        return super().from_config({k: v for k, v in config.items() if k not in cls.ignored})


class T1LightVAE(MaisiVAE):
    """The light MAISI variant for T1 MR: 2.93 M parameters, 112x136x112 to 4x28x34x28."""

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        latent_channels: int = 4,
        num_channels: tuple[int, ...] = (32, 64, 128),
        num_res_blocks: int | tuple[int, ...] = 1,
        norm_num_groups: int = 32,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            num_channels=num_channels,
            num_res_blocks=num_res_blocks,
            norm_num_groups=norm_num_groups,
        )
