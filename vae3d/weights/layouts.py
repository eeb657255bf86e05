"""What other libraries call the weights that we have: tables of names.

A layout says at which place of its own network each of our layers lies (`places`), and what the
parts of a layer are called there (`parts`). From both follow the rows of names by which weights
are read and written. Where it has several weights in the place of one of ours, they are ours cut
along the first axis.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from vae3d.models.attention import Attention, BareLinearAttention
from vae3d.models.blocks import Block
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.downsample import Down
from vae3d.models.norm import NormAct
from vae3d.models.upsample import TransposeUp, Up

Parts = dict[str, dict[str, str | tuple[str, ...]]]  # by kind of layer: our name of a part, theirs
Place = tuple[str, nn.Module, str, str]  # our prefix, layer, their prefix, kind of layer


@dataclass(frozen=True)
class Row:
    """One of our weights and its names elsewhere.

    Args:
        ours: Our name.
        theirs: Their names; several are concatenated along the first axis.
        ones: Axes of size one that theirs have at the end and ours has not.
    """

    ours: str
    theirs: tuple[str, ...]
    ones: int = 0


@dataclass(frozen=True)
class Layout:
    """How one library names the weights of an autoencoder.

    Args:
        name: The library.
        places: Where each layer lies.
        parts: For each kind of layer, our name of a part and theirs.
        convolved: Attention is made of 1x1 convolutions, not of linear layers.
    """

    name: str
    places: Callable[[CustomVAE], Iterator[Place]]
    parts: Parts = field(repr=False)
    convolved: bool = False

    def rows(self, vae: CustomVAE) -> list[Row]:
        """Every weight of `vae` with its names in this layout.

        Args:
            vae: The network.

        Raises:
            ValueError: The layout has no place for a weight of this network.
        """
        state, rows = vae.state_dict(), []
        for ours, layer, theirs, kind in self._all_places(vae):
            convolved = self.convolved and isinstance(layer, Attention)
            for part, names in self.parts[kind].items():
                names = (names,) if isinstance(names, str) else names
                for leaf in ("weight", "bias"):
                    key = dotted(ours, part, leaf)
                    if key in state:
                        there = tuple(dotted(theirs, name, leaf) for name in names)
                        linear = state[key].dim() == 2
                        rows.append(Row(key, there, vae.spatial_dims * (convolved and linear)))
        homeless = set(state) - {row.ours for row in rows}
        if homeless:
            raise ValueError(
                f"the layout of {self.name} has no place for {', '.join(sorted(homeless)[:4])}"
                f" ({len(homeless)} weights); this network cannot be written in it"
            )
        return rows

    def _all_places(self, vae: CustomVAE) -> Iterator[Place]:
        yield from self.places(vae)
        yield "quant_conv", vae.quant_conv, "", "quant_conv"
        yield "post_quant_conv", vae.post_quant_conv, "", "post_quant_conv"


def dotted(*names: str) -> str:
    """Join the non-empty names with dots."""
    return ".".join(name for name in names if name)


def kind_of(layer: nn.Module) -> str:
    """What `Layout.parts` calls a layer."""
    kinds = {
        Block: "block",
        BareLinearAttention: "linear_attention",
        Attention: "attention",
        Down: "down",
        TransposeUp: "transpose",
        Up: "up",
        NormAct: "norm",
    }
    return next((kind for cls, kind in kinds.items() if isinstance(layer, cls)), "conv")


def flat_places(vae: CustomVAE) -> Iterator[Place]:
    """MONAI counts the layers of each half in one list, as we do."""
    for half in ("encoder", "decoder"):
        chain = getattr(vae, half)
        levels = list(chain.levels())
        mid = levels[-2] if half == "encoder" else levels[1]
        for i, layer in enumerate(chain):
            kind = kind_of(layer)
            if kind == "attention" and getattr(vae, "use_combined_linear", False):
                kind = "combined_attention"
            elif kind == "block" and any(layer is m for m in mid):
                kind = "mid_block"
            yield f"{half}.{i}", layer, f"{half}.blocks.{i}", kind


@dataclass(frozen=True)
class LevelNames:
    """How CompVis and diffusers number levels; `{l}` counts from the finest, `{k}` in order.

    Args:
        down: A level of the encoder.
        up: A level of the decoder.
        block: Block `{j}` of a level.
        attention: Attention `{j}` of a level.
        down_layer: The down layer of a level.
        up_layer: The up layer of a level.
        mid: The two blocks of the bottleneck and the attention between.
        norm_out: The norm before the last convolution.
    """

    down: str
    up: str
    block: str
    attention: str
    down_layer: str
    up_layer: str
    mid: tuple[str, str, str]
    norm_out: str

    def places(self, vae: CustomVAE) -> Iterator[Place]:
        """Where each layer lies."""
        ours = {id(m): name for name, m in vae.named_modules()}
        for half in ("encoder", "decoder"):
            for layer, theirs in self._half(half, [list(x) for x in getattr(vae, half).levels()]):
                yield ours[id(layer)], layer, f"{half}.{theirs}", kind_of(layer)

    def _half(self, half: str, levels: list[list[nn.Module]]) -> Iterator[tuple[nn.Module, str]]:
        yield levels[0][0], "conv_in"
        mid, levels_only = levels[-2], levels[1:-2]
        if half == "decoder":
            mid, levels_only = levels[1], levels[2:-1]
        first, attention, last = self.mid
        for layer in mid:
            is_attention = isinstance(layer, Attention)
            yield layer, attention if is_attention else first if layer is mid[0] else last
        for k, level in enumerate(levels_only):
            fineness = k if half == "encoder" else len(levels_only) - 1 - k
            prefix = (self.down if half == "encoder" else self.up).format(l=fineness, k=k)
            blocks = attentions = 0
            for layer in level:
                if isinstance(layer, Down):  # they count it to the level before
                    yield layer, f"{self.down.format(l=k - 1, k=k - 1)}.{self.down_layer}"
                elif isinstance(layer, Up):
                    yield layer, f"{prefix}.{self.up_layer}"
                elif isinstance(layer, Attention):
                    yield layer, f"{prefix}.{self.attention.format(j=attentions)}"
                    attentions += 1
                else:
                    yield layer, f"{prefix}.{self.block.format(j=blocks)}"
                    blocks += 1
        yield levels[-1][0], self.norm_out
        yield levels[-1][1], "conv_out"


def block_parts(conv: str, shortcut: str) -> dict[str, str | tuple[str, ...]]:
    """Parts of a residual block where a convolution is called `conv1` plus `conv`."""
    return {
        "body.norm1.norm": "norm1",
        "body.conv1": dotted("conv1", conv),
        "body.norm2.norm": "norm2",
        "body.conv2": dotted("conv2", conv),
        "shortcut": dotted(shortcut, conv),
    }


SHARED: Parts = {
    "norm": {"norm": ""},
    "quant_conv": {"": "quant_conv"},
    "post_quant_conv": {"": "post_quant_conv"},
}
MONAI_QUANT: Parts = {
    "quant_conv": {"": ("quant_conv_mu.conv", "quant_conv_log_sigma.conv")},
    "post_quant_conv": {"": "post_quant_conv.conv"},
}
MONAI_ATTENTION: Parts = {
    "attention": {
        "norm": "norm",
        "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "proj": "attn.out_proj",
    },
    "combined_attention": {"norm": "norm", "qkv": "attn.qkv", "proj": "attn.out_proj"},
}
MONAI = Layout(
    "MONAI",
    flat_places,
    SHARED
    | MONAI_QUANT
    | MONAI_ATTENTION
    | {
        "conv": {"": "conv"},
        "block": block_parts("conv", "nin_shortcut"),
        "mid_block": block_parts("conv", "nin_shortcut"),
        "down": {"conv": "conv.conv"},
        "up": {"conv": "postconv.conv"},
        "transpose": {"conv": "deconv"},
    },
)
MAISI = Layout(
    "MAISI",
    flat_places,
    MONAI.parts
    | {
        "conv": {"": "conv.conv"},
        "block": block_parts("conv.conv", "nin_shortcut"),
        "down": {"conv": "conv.conv.conv"},
        "up": {"conv": "conv.conv.conv"},
        "transpose": {"conv": "conv.conv.conv"},
    },
)
GENERATIVE_02 = Layout(
    "GenerativeModels 0.2",
    flat_places,
    MONAI.parts
    | {
        "attention": {"norm": "norm", "qkv": ("to_q", "to_k", "to_v"), "proj": "proj_attn"},
        "up": {"conv": "conv.conv"},
        "transpose": {"conv": "conv.conv"},
    },
)
GENERATIVE_01 = Layout(
    "GenerativeModels 0.1",
    flat_places,
    GENERATIVE_02.parts
    | {
        "attention": {
            "norm": "norm",
            "qkv": ("q.conv", "k.conv", "v.conv"),
            "proj": "proj_out.conv",
        },
    },
    convolved=True,
)
COMPVIS = Layout(
    "CompVis",
    LevelNames(
        down="down.{l}",
        up="up.{l}",
        block="block.{j}",
        attention="attn.{j}",
        down_layer="downsample",
        up_layer="upsample",
        mid=("mid.block_1", "mid.attn_1", "mid.block_2"),
        norm_out="norm_out",
    ).places,
    SHARED
    | {
        "conv": {"": ""},
        "block": block_parts("", "nin_shortcut"),
        "attention": {"norm": "norm", "qkv": ("q", "k", "v"), "proj": "proj_out"},
        "linear_attention": {"qkv": "to_qkv", "proj": "to_out"},
        "down": {"conv": "conv"},
        "up": {"conv": "conv"},
    },
    convolved=True,
)
# What MedVAE's weights are called once `convert.without_adapters` has been over them.
MEDVAE = replace(COMPVIS, name="MedVAE")
DIFFUSERS = Layout(
    "diffusers",
    LevelNames(
        down="down_blocks.{l}",
        up="up_blocks.{k}",
        block="resnets.{j}",
        attention="attentions.{j}",
        down_layer="downsamplers.0",
        up_layer="upsamplers.0",
        mid=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm_out="conv_norm_out",
    ).places,
    COMPVIS.parts
    | {
        "block": block_parts("", "conv_shortcut"),
        "attention": {"norm": "group_norm", "qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0"},
    },
)
LAYOUTS = {
    layout.name: layout
    for layout in (MONAI, MAISI, GENERATIVE_02, GENERATIVE_01, COMPVIS, MEDVAE, DIFFUSERS)
}
