"""Networks rebuilt from the shapes and names of another library's weights.

What shapes do not say (the groups of the norms, for one) comes from the user as `Hints`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import gcd
from typing import Literal, NoReturn

from torch import Tensor

from vae3d.models.presets import LATENT_SCALE, AutoencoderKL, MaisiVAE, MonaiVAE
from vae3d.weights.layouts import (
    COMPVIS,
    DIFFUSERS,
    GENERATIVE_01,
    GENERATIVE_02,
    MAISI,
    MEDVAE,
    MONAI,
    Layout,
)

COMPVIS_GROUPS = 32  # of its norms, and of MedVAE's; they know no other number


class Weights(dict[str, Tensor]):
    """Tensors by name; a name that is asked for and not there is the file's fault."""

    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(f"the weights lack {name}; the file is incomplete or of another network")


@dataclass(frozen=True)
class Hints:
    """What weights do not say about their network.

    Args:
        norm_num_groups: Groups of the norms.
        norm_eps: Added to the variance in the norms.
        use_convtranspose: Up layers are transposed convolutions, where the names do not tell.
        proj_attn: What to do with `proj_attn` of GenerativeModels 0.2, whose forward pass never
            applies it: `drop` it, `apply` it, or drop it if it was never trained (`auto`).
        latent_scale: Scale of the latents for a second stage.
        latent_shift: Subtracted before scaling.
    """

    norm_num_groups: int | None = None
    norm_eps: float = 1e-6
    use_convtranspose: bool = False
    proj_attn: Literal["auto", "drop", "apply"] = "auto"
    latent_scale: float | None = None
    latent_shift: float | None = None


def build_monai(state: Weights, layout: Layout, hints: Hints) -> MonaiVAE:
    """Rebuild a network of MONAI's family from its weights.

    Args:
        state: The weights.
        layout: MONAI, MAISI or GenerativeModels.
        hints: What the weights do not say.
    """
    encoder, decoder = (_Half(state, half, layout) for half in ("encoder", "decoder"))
    shrinking, encoder_mid = encoder.levels()
    growing, decoder_mid = decoder.levels()
    if [level[:2] for level in growing[::-1]] != [level[:2] for level in shrinking]:
        raise ValueError(
            "encoder and decoder have different blocks or attention per level"
            f" ({shrinking} and {growing[::-1]}); MONAI's network cannot"
        )
    stem = state[f"encoder.blocks.0.{layout.parts['conv']['']}.weight"]
    if stem.shape[0] != shrinking[0][2]:
        raise ValueError("the first convolution is narrower than the first level; MONAI's is not")
    end = f"decoder.blocks.{len(decoder.letters) - 1}.{layout.parts['conv']['']}.weight"
    channels = tuple(level[2] for level in shrinking)
    transpose = any(".deconv." in name for name in state) or hints.use_convtranspose
    # GenerativeModels' transposed convolutions have MAISI's kernel, 3.
    three = layout is MAISI or (layout in (GENERATIVE_01, GENERATIVE_02) and transpose)
    maisi, monai = partial(MaisiVAE, num_channels=channels), partial(MonaiVAE, channels=channels)
    return (maisi if three else monai)(
        spatial_dims=dims_of(stem),
        in_channels=stem.shape[1],
        out_channels=state[end].shape[0],
        latent_channels=state["quant_conv_mu.conv.weight"].shape[0],
        num_res_blocks=tuple(level[0] for level in shrinking),
        attention_levels=tuple(level[1] for level in shrinking),
        norm_num_groups=asked(hints.norm_num_groups, "norm_num_groups", channels),
        norm_eps=hints.norm_eps,
        with_encoder_nonlocal_attn=encoder_mid,
        with_decoder_nonlocal_attn=decoder_mid,
        use_convtranspose=transpose,
        include_fc=any(re.search(r"\.(out_proj|proj_attn|proj_out)\.", name) for name in state),
        use_combined_linear=any(".attn.qkv." in name for name in state),
    )


class _Half:
    """One half of a MONAI network as a word: C conv, B block, A attention, R resample, N norm."""

    def __init__(self, state: Weights, half: str, layout: Layout):
        names = [name.split(".", 3) for name in state if name.startswith(f"{half}.blocks.")]
        leaves: dict[int, set[str]] = {}
        for *_, index, leaf in names:
            leaves.setdefault(int(index), set()).add(leaf)
        self.half = half
        self.state = state
        conv = f"{layout.parts['conv']['']}.weight"
        self.letters = "".join(_letter(leaves[i], conv) for i in sorted(leaves))

    def levels(self) -> tuple[list[tuple[int, bool, int]], bool]:
        """Blocks, attention and channels of each level in order, and whether there is a bottleneck.

        A level with attention ends in A, so B, A, B at the inner end is the bottleneck.
        """
        if not re.fullmatch(r"C(B[BA]*)(RB[BA]*)*NC", self.letters):
            raise ValueError(
                f"the {self.half} has layers {self.letters} (C conv, B block, A attention,"
                " R resampling, N norm); the file is incomplete or of another network"
            )
        word = self.letters[1:-2]
        if self.half == "encoder":
            bottleneck = word.endswith("BAB")
            start, word = 1, word[: -3 if bottleneck else None]
        else:
            bottleneck = word.startswith("BAB") and not word.startswith("BABA")
            start, word = (4, word[3:]) if bottleneck else (1, word)
        levels, place = [], start
        for level in word.split("R"):
            last = place + level.rindex("B")
            width = self.state[f"{self.half}.blocks.{last}.norm2.weight"].shape[0]
            levels.append((level.count("B"), "A" in level, width))
            place += len(level) + 1
        return levels, bottleneck


def _letter(leaves: set[str], conv: str) -> str:
    """Kind of a layer from the names of its weights."""
    if "norm1.weight" in leaves:
        return "B"
    if "norm.weight" in leaves:
        return "A"
    if conv in leaves:
        return "C"
    return "N" if leaves == {"weight", "bias"} else "R"


def build_compvis(state: Weights, layout: Layout, hints: Hints) -> AutoencoderKL:
    """Rebuild an autoencoder of Stable Diffusion from its weights: CompVis, MedVAE, diffusers.

    Args:
        state: The weights.
        layout: CompVis, MedVAE or diffusers.
        hints: What the weights do not say.
    """
    diffusers = layout is DIFFUSERS
    level = r"encoder\.down_blocks\.(\d+)\." if diffusers else r"encoder\.down\.(\d+)\."
    block = level + (r"resnets" if diffusers else r"block") + r"\.(\d+)\.conv1\.weight"
    found = sorted((int(m[1]), int(m[2]), m[0]) for name in state if (m := re.match(block, name)))
    levels = [[name for *_, name in group] for _, group in groupby(found, lambda f: f[0])]
    attention = level + ("attentions" if diffusers else "attn") + r"\."
    attended = {int(m[1]) for name in state if (m := re.match(attention, name))}
    if not attended <= set(range(len(levels))) or not levels:
        raise ValueError("the encoder lacks blocks; the file is incomplete or of another network")
    if len({len(names) for names in levels}) != 1:
        raise ValueError("the levels have different numbers of blocks; Stable Diffusion's do not")
    channels = [state[names[-1]].shape[0] for names in levels]
    stem = state["encoder.conv_in.weight"]
    base = stem.shape[0]
    if gcd(base, *channels) != base:
        raise ValueError(f"channels {channels} are no multiples of the first convolution's {base}")
    sizes = [256 // 2**n for n in range(len(levels))]
    has = partial(_has, state)
    mid = has(r"encoder\.mid(_block\.attentions|\.attn_1)")
    z_channels = state["decoder.conv_in.weight"].shape[1]
    quant = "quant_conv.weight" in state
    groups = hints.norm_num_groups or (None if diffusers else COMPVIS_GROUPS)
    return AutoencoderKL(
        in_channels=stem.shape[1],
        out_channels=state["decoder.conv_out.weight"].shape[0],
        resolution=sizes[0],
        base_ch=base,
        ch_mult=tuple(c // base for c in channels),
        num_res_blocks=len(levels[0]),
        attn_resolutions=tuple(sizes[n] for n in sorted(attended)),
        z_channels=z_channels,
        embed_dim=state["post_quant_conv.weight"].shape[1] if quant else z_channels,
        double_z=state["encoder.conv_out.weight"].shape[0] == 2 * z_channels,
        spatial_dims=dims_of(stem),
        attn_type="linear" if has(r"to_qkv") else "vanilla" if mid or attended else "none",
        mid_attention=mid,
        resamp_with_conv=len(levels) == 1 or has(r"(downsample|downsamplers\.0)\.conv\."),
        use_quant_conv=quant,
        num_groups=asked(groups, "norm_num_groups", channels),
        latent_scale=LATENT_SCALE if hints.latent_scale is None else hints.latent_scale,
        latent_shift=hints.latent_shift or 0.0,
    )


def _has(state: Weights, pattern: str) -> bool:
    return any(re.search(pattern, name) for name in state)


def dims_of(kernel: Tensor) -> Literal[2, 3]:
    """Spatial axes of a convolution's weight, `(C_out, C_in, *kernel)`."""
    if kernel.dim() not in (4, 5):
        raise ValueError(f"a first convolution of shape {tuple(kernel.shape)}; ours are 2D or 3D")
    return 2 if kernel.dim() == 4 else 3


def asked(value: int | None, name: str, channels: Sequence[int]) -> int:
    """A hint that the weights cannot replace, or an error that asks for it.

    Args:
        value: What the user said.
        name: The hint.
        channels: Channels of the levels, for the message.
    """
    if value is None:
        raise ValueError(
            f"the weights do not say {name}; add --{name} N (a divisor of the channels"
            f" {', '.join(map(str, channels))}; the libraries' default is 32)"
        )
    return value


BUILDERS = {
    MONAI.name: build_monai,
    MAISI.name: build_monai,
    GENERATIVE_01.name: build_monai,
    GENERATIVE_02.name: build_monai,
    COMPVIS.name: build_compvis,
    MEDVAE.name: build_compvis,
    DIFFUSERS.name: build_compvis,
}
