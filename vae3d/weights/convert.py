"""Weights in and out: recognize a layout, rebuild the network from shapes, rename, check.

`read_model` is what `vae3d convert` calls; `load_weights` fills a network that exists;
`export_state` writes ours in another library's names. No key is ever left out in silence: what is
missing, left over or of another shape is an error, and what is dropped or reshaped is reported.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vae3d.models.custom_vae import CustomVAE
from vae3d.models.presets import DDCONFIG, AutoencoderKL, MaisiVAE, MonaiVAE
from vae3d.weights.hub import check_fit, load_strictly, read_state
from vae3d.weights.layouts import (
    COMPVIS,
    DIFFUSERS,
    GENERATIVE_01,
    GENERATIVE_02,
    LAYOUTS,
    MAISI,
    MEDVAE,
    MONAI,
    Layout,
    Row,
)
from vae3d.weights.rebuild import BUILDERS, COMPVIS_GROUPS, Hints, Weights

State = dict[str, Tensor]
OURS = "vae3d"  # our own layout, which needs no renaming
LINEAR_CODE = "linear_code.analysis.weight"  # of it, where a network has one
# The first convolution of each layout: what stands before this name in a file is a prefix.
FIRST = {
    OURS: "encoder.0.weight",
    COMPVIS.name: "encoder.down.0.block.0.conv1.weight",  # MedVAE's, too, without its adapters
    MEDVAE.name: "encoder.down.0.block.0.conv1.conv.weight",
    DIFFUSERS.name: "encoder.down_blocks.0.resnets.0.conv1.weight",
    MAISI.name: "encoder.blocks.0.conv.conv.weight",
    MONAI.name: "encoder.blocks.0.conv.weight",
}
# Compiling, sharding and checkpointing put these anywhere in a name.
WRAPPER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FEW = 5  # names of weights in a line
NOT_THE_MODEL = ("loss.", "discriminator.", "model_ema.")  # networks beside the autoencoder


@dataclass
class Report:
    """What a conversion did, in lines to print.

    Args:
        layout: Name of the layout.
        lines: What the user should know.
    """

    layout: str
    lines: list[str] = field(default_factory=list)

    def add(self, what: str, keys: Iterable[str]) -> None:
        """Note what happened to some keys, if there are any: how many, and the first of them."""
        keys = sorted(keys)
        if keys:
            first = ", ".join(keys[:FEW]) + ", ..." * (len(keys) > FEW)
            self.lines.append(f"{what} ({len(keys)}): {first}")


# ---------------------------------------------------------------------------------- reading


def read_model(
    state: Mapping[str, object],
    hints: Hints | None = None,
    layout: str | None = None,
    ignore_keys: Sequence[str] = (),
    file: str | Path = "FILE",
) -> tuple[CustomVAE, Report]:
    """Rebuild a network from another library's weights.

    Args:
        state: The weights, as read from a file.
        hints: What the weights do not say; None for nothing.
        layout: Name of the layout; None to recognize it.
        ignore_keys: Prefixes of keys to leave out.
        file: Where they came from, for messages.

    Returns:
        The network in evaluation mode, and what was done.
    """
    weights, report = clean(state, ignore_keys, layout, file)
    if report.layout == OURS:
        raise ValueError(without_recipe(file, len(weights)))
    source = LAYOUTS[report.layout]
    weights, hints = settle_proj_attn(weights, source, hints or Hints(), report)
    weights = modern_names(weights, source)
    vae = BUILDERS[source.name](Weights(weights), source, hints)
    fill(vae, weights, source, report)
    return vae.eval(), report


def load_weights(
    vae: CustomVAE,
    path: str | Path,
    ignore_keys: Sequence[str] = (),
    layout: str | None = None,
    keep: Sequence[str] = (),
) -> Report:
    """Fill a network from a file in any layout; every key must find its place.

    Args:
        vae: The network.
        path: File of weights.
        ignore_keys: Prefixes of keys to leave out.
        layout: Name of the layout; None to recognize it.
        keep: Names of the network's own weights that stay as they are, whatever the file holds:
            beginnings of names, or patterns such as `decoder.*.bias`.
    """
    state = read_state(path)
    if "spec" in state:  # a checkpoint of ours: the averaged weights where there are some
        weights = state.get("ema") or state["model"]
        weights = {k: v for k, v in weights.items() if not k.startswith(tuple(ignore_keys))}
        if FIRST[OURS] not in weights:
            name = str(state["spec"].get("class_path")).rpartition(".")[2]
            raise ValueError(f"{path}: holds a {name}, not a VAE; give the VAE's run")
        vae.settle_linear_code(has_linear_code(weights))
        return load_but(vae, weights, keep, path, Report(OURS))
    state, report = clean(state, ignore_keys, layout, path)
    if report.layout == OURS:
        vae.settle_linear_code(has_linear_code(state))
        return load_but(vae, state, keep, path, report)
    source = LAYOUTS[report.layout]
    state, _ = settle_proj_attn(state, source, Hints(), report)
    fill(vae, modern_names(state, source), source, report, keep)
    return report


def load_but(
    vae: CustomVAE,
    state: Mapping[str, Tensor],
    keep: Sequence[str],
    path: str | Path,
    report: Report,
) -> Report:
    """Fill a network from weights of ours, but for those that are to stay."""
    target = vae.state_dict()
    kept = kept_names(target, keep, state)
    state = {name: value for name, value in state.items() if not named_by(name, keep)}
    load_strictly(vae, {**state, **{name: target[name] for name in kept}}, f"the weights in {path}")
    report.add("kept as they are in the network", kept)
    return report


def kept_names(names: Iterable[str], keep: Sequence[str], others: Iterable[str] = ()) -> list[str]:
    """The names that stay; a pattern that names nothing is the user's mistake."""
    names, others = list(names), list(others)
    for pattern in keep:
        if not any(named_by(name, [pattern]) for name in (*names, *others)):
            raise ValueError(f"--ignore_keys {pattern}: no weight is called that")
    return [name for name in names if named_by(name, keep)]


def named_by(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name begins with one of the patterns, or is of it."""
    return any(name.startswith(one) or fnmatchcase(name, one) for one in patterns)


def has_linear_code(weights: Iterable[str]) -> bool:
    """Whether there is one among weights of ours."""
    return LINEAR_CODE in weights


def clean(
    state: Mapping[str, object],
    ignore_keys: Sequence[str],
    layout: str | None,
    file: str | Path = "FILE",
) -> tuple[State, Report]:
    """Take the autoencoder's tensors out of a checkpoint and recognize their layout.

    Args:
        state: What a file held: weights, or a dictionary with weights inside.
        ignore_keys: Prefixes of keys to leave out.
        layout: Name of the layout; None to recognize it.
        file: Where they came from, for messages.
    """
    unwanted = (*NOT_THE_MODEL, *ignore_keys)
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    names = unwrap(tensors, unwanted, file)
    name = layout or _recognize(names)
    inside = {
        k: v
        for k, v in state.items()
        if isinstance(v, dict)
        and not str(k).startswith(unwanted)
        and _recognize(unwrap(v, unwanted))
    }
    if inside and not _recognize(names):
        if len(inside) > 1:
            raise ValueError(several(file, inside))
        cleaned, report = clean(next(iter(inside.values())), ignore_keys, layout, file)
        report.add("left out, beside the weights", tensors)
        return cleaned, report
    if any(".time_conv." in key for key in names):
        raise ValueError(f"{file}: a causal VAE of videos (Wan's kind), which is none of ours")
    known = f"known layouts are {', '.join((OURS, *LAYOUTS))}"
    if not tensors:
        keys = ", ".join(map(str, list(state)[:9])) or "nothing"
        raise ValueError(f"{file}: no weights of an autoencoder among {keys}; {known}")
    if name not in (OURS, *LAYOUTS):
        first = ", ".join(list(names)[:3])
        raise ValueError(
            f"{file}: the names of the weights ({first}, ...) are of no known layout; {known}"
        )
    report = Report(name)
    report.add("left out, not of the autoencoder", set(tensors) - set(names.values()))
    weights = {n: tensors[full] for n, full in names.items()}
    return (without_adapters(weights, report) if name == MEDVAE.name else weights), report


def unwrap(
    names: Iterable[object], unwanted: tuple[str, ...] = (), file: str | Path | None = None
) -> dict[str, str]:
    """Names of the autoencoder's weights without their prefix, and as they stand in the file.

    The prefix is what stands before the first convolution of a layout, whoever put it there.
    Left out are names without it, and numbers beside the layers, such as `scale_factor`.

    Args:
        names: As they stand in the file.
        unwanted: Beginnings of names to leave out, with the prefix or without.
        file: Where they came from, to refuse the weights of several networks; None to accept.
    """
    plain = {WRAPPER.sub("", str(name)): str(name) for name in names}
    plain = {n: full for n, full in plain.items() if not full.startswith(unwanted)}
    prefixes = [
        name[: -len(first)]
        for name in plain
        for first in FIRST.values()
        if f".{name}".endswith(f".{first}")
    ]
    prefixes = [p for p in prefixes if not any(f".{u}" in f".{p}" for u in NOT_THE_MODEL)]
    if not prefixes:
        return plain
    if len(prefixes) > 1 and file is not None:
        raise ValueError(several(file, prefixes))
    inside = {n[len(prefixes[0]) :]: f for n, f in plain.items() if n.startswith(prefixes[0])}
    return {n: f for n, f in inside.items() if "." in n and not n.startswith(unwanted)}


def several(file: str | Path, places: Iterable[object]) -> str:
    """Message about a file with more than one autoencoder."""
    found = sorted(map(str, places), key=lambda place: ("ema" not in place, -len(place)))
    return (
        f"{file}: holds {len(found)} autoencoders ({', '.join(p or 'no prefix' for p in found)});"
        f" leave out all but one: vae3d convert {file} vae.pt --ignore_keys '[{found[0]}]'"
    )


def without_recipe(file: str | Path, count: int) -> str:
    """Message about weights of ours that do not say which network they are of."""
    return (
        f"{file}: {count} weights of vae3d without the recipe of their network; give it as in"
        f" training: vae3d convert {file} vae.pt --model CustomVAE --model.channels '[32,64,128]'"
    )


def _recognize(names: Iterable[str]) -> str | None:
    """Name of the layout that `names` are of, None if of none."""
    names = set(names)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    found = next((name for name, first in FIRST.items() if first in names), None)
    if found == COMPVIS.name and has(r"^channel_proj\."):
        return MEDVAE.name
    if found != MONAI.name:
        return found
    if has(r"blocks\.\d+\.q\.conv\."):
        return GENERATIVE_01.name
    old_up = has(r"decoder\.blocks\.\d+\.conv\.conv\.weight")
    return GENERATIVE_02.name if old_up or has(r"blocks\.\d+\.to_q\.") else MONAI.name


def without_adapters(state: State, report: Report) -> State:
    """Bring MedVAE's weights to those of its autoencoder, which are CompVis's.

    Its models of several channels were tuned by low-rank updates (LoRA): a convolution is `conv`
    plus `lora_up` of `lora_down`, which is one convolution. `channel_proj` makes features for
    classifiers of a latent; what is decoded has not passed it.

    Args:
        state: The weights.
        report: Gets lines on what was done.
    """
    beside = {name for name in state if name.startswith(("channel_ds.", "channel_proj."))}
    report.add("left out, features of a latent that no decoder takes", beside)
    adapted = {name.rpartition(".lora_")[0] for name in state if ".lora_" in name}
    weights = {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".conv.")
        if layer in adapted:
            change = low_rank(Weights(state), layer) if leaf == "weight" else 0
            weights[f"{layer}.{leaf}"] = value + change
        elif name not in beside and ".lora_" not in name:
            weights[name] = value
    if adapted:
        report.lines.append(f"low-rank updates added to their convolutions ({len(adapted)})")
    return weights


def low_rank(state: Weights, layer: str) -> Tensor:
    """What a low-rank update adds to the weight of its convolution.

    Args:
        state: Weights with `conv`, `lora_up` and `lora_down` below `layer`.
        layer: Name of the convolution.
    """
    conv, up, down = (state[f"{layer}.{part}.weight"] for part in ("conv", "lora_up", "lora_down"))
    fitting = (*conv.shape[:1], *down.shape[:1], *(1,) * (conv.dim() - 2))
    if conv.dim() < 4 or up.shape != fitting or down.shape[1:] != conv.shape[1:]:
        raise ValueError(f"the weights of {layer}: its low-rank update does not fit it")
    return torch.tensordot(up.flatten(1), down, dims=1)


def settle_proj_attn(
    state: State, layout: Layout, hints: Hints, report: Report
) -> tuple[State, Hints]:
    """Decide on `proj_attn` of GenerativeModels 0.2 and say so.

    Its AutoencoderKL holds this linear layer and never applies it, so it stays at its random
    start. MONAI's own loader applies it, which changes the output by far more than rounding.

    Args:
        state: The weights.
        layout: Their layout.
        hints: `proj_attn` says what the user wants.
        report: Gets a line on what was done.
    """
    weights = [k for k in state if k.endswith(".proj_attn.weight")]
    if layout is not GENERATIVE_02 or not weights:
        return state, hints
    trained = [k for k in weights if not never_trained(state[k])]
    if hints.proj_attn == "apply":
        report.lines.append("proj_attn is applied, as MONAI's loader does and its source did not")
        return state, hints
    if hints.proj_attn == "auto" and trained:
        raise ValueError(
            f"{', '.join(trained)} looks trained, though GenerativeModels 0.2 never applies it;"
            " say --proj_attn drop (as GenerativeModels computes) or --proj_attn apply"
        )
    gone = {k for k in state if ".proj_attn." in k}
    report.add("left out, never applied by GenerativeModels and never trained", gone)
    return {k: v for k, v in state.items() if k not in gone}, replace(hints, proj_attn="drop")


def never_trained(weight: Tensor) -> bool:
    """Tell whether a linear layer's weight is as `nn.Linear` draws it: uniform within 1/sqrt(C).

    Args:
        weight: `(C_out, C)`.
    """
    bound = weight.shape[1] ** -0.5
    spread = weight.float().std().item() * 3**0.5 / bound
    return weight.abs().max().item() <= bound * (1 + 1e-5) and abs(spread - 1) < 0.2


def modern_names(state: State, layout: Layout) -> State:
    """Rename the attention of diffusers before version 0.17 (`query`, `key`, ...)."""
    if layout is not DIFFUSERS:
        return state
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}.{old[m[2]]}.", k): v for k, v in state.items()}


def fill(
    vae: CustomVAE, state: State, layout: Layout, report: Report, keep: Sequence[str] = ()
) -> None:
    """Load renamed weights; every weight must be there, be used and have its shape.

    Args:
        vae: The network.
        state: Weights in `layout`.
        layout: Their layout.
        report: Gets a line on reshaped weights.
        keep: As for `load_weights`, by our names.
    """
    rows = layout.rows(vae)
    kept = kept_names([row.ours for row in rows], keep)
    left_out = {name for row in rows if row.ours in kept for name in row.theirs}
    report.add("kept as they are in the network", kept)
    rows = [row for row in rows if row.ours not in kept]
    state = {name: value for name, value in state.items() if name not in left_out}
    target = vae.state_dict()
    # Shapes are compared under their names, before anything is renamed.
    expected: State = {}
    for row in rows:
        shape = (*target[row.ours].shape, *(1,) * row.ones)
        shape = (shape[0] // len(row.theirs), *shape[1:])
        expected |= {name: torch.empty(shape, device="meta") for name in row.theirs}
    check_fit(state, expected, f"the {layout.name} weights")
    vae.load_state_dict({**target, **{row.ours: read_row(row, state) for row in rows}})
    joined = {row.theirs[0] for row in rows if row.ones or len(row.theirs) > 1}
    report.add("reshaped or joined", joined)


def read_row(row: Row, state: State) -> Tensor:
    """Make one of our weights from theirs."""
    value = torch.cat([state[name] for name in row.theirs])
    ones = value.dim() - row.ones
    return value.reshape(value.shape[:ones]) if set(value.shape[ones:]) == {1} else value


def from_monai_state(vae: CustomVAE, state: State) -> State:
    """Rename what is MONAI's in a state dict; other names stay, for `load_state_dict` to report.

    Args:
        vae: The network.
        state: MONAI's state dict, or MAISI's for a `MaisiVAE`.
    """
    rows = [row for row in monai_layout(vae).rows(vae) if set(row.theirs) <= set(state)]
    used = {name for row in rows for name in row.theirs}
    return {row.ours: read_row(row, state) for row in rows} | {
        name: value for name, value in state.items() if name not in used
    }


def monai_layout(vae: CustomVAE) -> Layout:
    """MONAI's layout for this preset."""
    return MAISI if isinstance(vae, MaisiVAE) else MONAI


# ---------------------------------------------------------------------------------- writing


def export_state(vae: CustomVAE, layout: Layout) -> State:
    """Write the weights of `vae` under another library's names.

    Args:
        vae: The network.
        layout: One of `layouts.LAYOUTS`.
    """
    ours, state = vae.state_dict(), {}
    for row in layout.rows(vae):
        value = ours[row.ours].detach()
        value = value.reshape(*value.shape, *(1,) * row.ones)
        pieces = value.chunk(len(row.theirs))
        state.update({n: p.clone() for n, p in zip(row.theirs, pieces, strict=True)})
    return state


def export_monai_state(vae: CustomVAE) -> State:
    """State dict that MONAI's AutoencoderKL (MAISI's for a `MaisiVAE`) loads with strict=True.

    Args:
        vae: A MONAI preset.
    """
    if not isinstance(vae, MonaiVAE):
        raise ValueError(
            f"{type(vae).__name__} is not MONAI's network; only MonaiVAE, VAEModel, MaisiVAE and"
            " T1LightVAE can be written for MONAI"
        )
    return export_state(vae, monai_layout(vae))


def export_compvis(vae: CustomVAE) -> dict[str, object]:
    """Checkpoint that latent-diffusion's AutoencoderKL and MedVAE's load, with what builds them.

    Args:
        vae: An `AutoencoderKL`, 2D or 3D.
    """
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"{type(vae).__name__} is not CompVis's network; AutoencoderKL is")
    args = vae.spec["init_args"]
    if args["num_groups"] != COMPVIS_GROUPS or not args["use_quant_conv"]:
        raise ValueError(
            f"CompVis's network has norms of {COMPVIS_GROUPS} groups and convolutions beside the"
            f" latent; this one has num_groups={args['num_groups']} and"
            f" use_quant_conv={args['use_quant_conv']}"
        )
    if not args["mid_attention"] and args["attn_type"] != "none":
        raise ValueError("CompVis's network has attention in the bottleneck, or nowhere at all")
    ddconfig = {theirs: args[ours] for theirs, ours in DDCONFIG.items()}
    return {
        "state_dict": export_state(vae, COMPVIS),
        "ddconfig": ddconfig | {"out_ch": vae.out_channels},
        "embed_dim": args["embed_dim"],
    }


def export_diffusers(vae: CustomVAE) -> tuple[State, dict[str, Any]]:
    """State dict and configuration of diffusers' AutoencoderKL.

    Args:
        vae: A 2D `AutoencoderKL` with softmax attention.
    """
    if not isinstance(vae, AutoencoderKL) or vae.spatial_dims != 2:
        raise ValueError("diffusers has the 2D AutoencoderKL of Stable Diffusion only")
    args = vae.spec["init_args"]
    if not args["resamp_with_conv"] or args["attn_type"] == "linear" or args["tanh_out"]:
        raise ValueError("diffusers has no linear attention, pooling resampling or tanh output")
    sizes = [args["resolution"] // 2**n for n in range(len(args["ch_mult"]))]
    attended = [size in args["attn_resolutions"] for size in sizes]
    if args["base_ch"] != args["base_ch"] * args["ch_mult"][0]:
        raise ValueError("diffusers has no first convolution narrower than the first level")
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.in_channels,
        "out_channels": vae.out_channels,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attended],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attended)],
        "block_out_channels": [args["base_ch"] * m for m in args["ch_mult"]],
        "layers_per_block": args["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": vae.latent_channels,
        "norm_num_groups": args["num_groups"],
        "sample_size": args["resolution"],
        "scaling_factor": args["latent_scale"],
        "shift_factor": args["latent_shift"] or None,
        "use_quant_conv": args["use_quant_conv"],
        "use_post_quant_conv": args["use_quant_conv"],
        "mid_block_add_attention": args["mid_attention"] and args["attn_type"] != "none",
    }
    return export_state(vae, DIFFUSERS), config


# ------------------------------------------------------------------------------- 2D to 3D


def inflate(vae: CustomVAE, how: Literal["center", "mean"] = "center") -> CustomVAE:
    """Make a 3D network of a 2D one.

    What is promised: a volume that is constant along the new axis gives the 2D result. `center`
    keeps it in every slice: each kernel lies in the middle slice, where padding cannot reach it (a
    strided kernel takes the mean of its cell). `mean` spreads each kernel evenly over its slices,
    which is exact without borders only: the zeros beyond the two new faces dim the slices there,
    and norms and attention carry that to all others.

    Args:
        vae: A 2D network.
        how: `center` or `mean`.
    """
    from vae3d.models.spec import build

    if vae.spatial_dims != 2:
        raise ValueError("only a 2D network can be inflated; this one is 3D")
    if vae.linear_code is not None:
        raise ValueError("blocks of a linear code cannot be inflated; train in 3D from the start")
    spec = vae.spec
    spec["init_args"]["spatial_dims"] = 3
    volume = build(spec)
    if vae.contract:  # slices are gone, and what was measured on them
        kept = ("preprocess", "license")
        volume.contract = {k: v for k, v in vae.contract.items() if k in kept}
    target = volume.state_dict()
    modules = dict(volume.named_modules())
    state = {}
    for name, value in vae.state_dict().items():
        if target[name].dim() == value.dim() + 1:
            layer = modules[name.rpartition(".")[0]]
            value = value[..., None] * kernel_profile(layer, how).to(value)
        state[name] = value
    volume.load_state_dict(state)
    return volume.train(vae.training)


def kernel_profile(layer: torch.nn.Module, how: str) -> Tensor:
    """Weights along the new axis that sum to one, for a convolution of the 3D network.

    Args:
        layer: The convolution.
        how: `center` or `mean`.
    """
    if not isinstance(layer, torch.nn.Conv3d):
        raise ValueError("transposed convolutions cannot be inflated")
    size, stride = layer.kernel_size[-1], layer.stride[-1]
    if how == "mean":
        return torch.full((size,), 1 / size)
    first = int(layer.padding[-1])  # the tap on the first voxel of the cell
    profile = torch.zeros(size)
    profile[first : first + stride] = 1 / stride
    return profile
