"""`vae3d convert`: bring weights in from other libraries, or out to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loaders import Preprocess
from loaders.texts import read_json

if TYPE_CHECKING:
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.weights.convert import Report
    from vae3d.weights.rebuild import Hints

DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def convert(
    source: Path,
    target: Path,
    /,
    to: Literal["vae3d", "monai", "diffusers"] = "vae3d",
    layout: str | None = None,
    norm_num_groups: int | None = None,
    norm_eps: float = 1e-6,
    use_convtranspose: bool = False,
    proj_attn: Literal["auto", "drop", "apply"] = "auto",
    latent_scale: float | None = None,
    inflate: Literal["none", "center", "mean"] = "none",
    ignore_keys: tuple[str, ...] = (),
    preprocess: Preprocess = Preprocess(),  # noqa: B008 - frozen
    trust: tuple[str, ...] = (),
) -> None:
    """Convert the weights of an autoencoder between libraries.

    The layout of SOURCE is recognized by the names of its weights: vae3d (a run folder, checkpoint
    or `save_pretrained` folder), MONAI, MAISI, GenerativeModels 0.1 and 0.2, CompVis, diffusers.
    Every weight must find its place; what is left out or reshaped is printed.

    Examples:
        vae3d convert autoencoder.pt maisi.pt --norm_num_groups 32 --preprocess.intensity unit
        vae3d convert sd-vae-ft-mse vae3d-from-sd --inflate center
        vae3d convert runs/a autoencoder_for_monai.pt --to monai

    Args:
        source: File of weights (.safetensors, .pt, .ckpt), or folder.
        target: What to write; must not exist. For vae3d a .pt file is a checkpoint that evaluate,
            encode and decode take, and a folder what `from_pretrained` takes. A folder for
            diffusers, a .pt or .safetensors file for monai.
        to: Library to write for.
        layout: Layout of SOURCE, such as "MONAI", where its names are ambiguous.
        norm_num_groups: Groups of the norms; the weights do not say it.
        norm_eps: Added to the variance in the norms.
        use_convtranspose: The up layers are transposed convolutions (MAISI and GenerativeModels
            name them like the others).
        proj_attn: What to do with `proj_attn` of GenerativeModels 0.2, which its forward pass
            never applies: drop, apply, or auto (drop what was never trained, else ask).
        latent_scale: Scale of the latents for a second stage.
        inflate: Make a 3D network of 2D weights: center (a volume that is constant along the new
            axis gives the 2D result) or mean (kernels spread evenly; so only far from the faces).
        ignore_keys: Prefixes of names to leave out.
        preprocess: How the weights want their volumes prepared; kept in a checkpoint.
        trust: Prefixes of modules besides vae3d whose classes may be imported.
    """
    from vae3d.weights.convert import inflate as inflated
    from vae3d.weights.rebuild import Hints

    if target.exists():
        raise ValueError(f"{target} exists; remove it or choose another name")
    hints = Hints(
        norm_num_groups=norm_num_groups,
        norm_eps=norm_eps,
        use_convtranspose=use_convtranspose,
        proj_attn=proj_attn,
        latent_scale=latent_scale,
    )
    vae, report = read(source, hints, layout, ignore_keys, trust)
    if inflate != "none":
        vae = inflated(vae, inflate)
        report.lines.append(f"inflated to 3D ({inflate})")
    write(vae, target, to, preprocess)
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"{source}: {report.layout} weights, {parameters / 1e6:.2f} M parameters")
    print(*(f"  {line}" for line in report.lines), sep="\n", end="\n" if report.lines else "")
    print(f"{target}: written for {to}, as {type(vae).__name__} with factor {vae.factor}")


def read(
    source: Path,
    hints: Hints,
    layout: str | None,
    ignore_keys: tuple[str, ...],
    trust: tuple[str, ...],
) -> tuple[CustomVAE, Report]:
    """Rebuild the network that SOURCE holds.

    Args:
        source: File or folder.
        hints: What the weights do not say.
        layout: Name of the layout; None to recognize it.
        ignore_keys: Prefixes of names to leave out.
        trust: Prefixes of modules whose classes may be imported.
    """
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.training.checkpoint import load_vae
    from vae3d.weights.convert import Report, read_model
    from vae3d.weights.hub import RECIPE, read_state

    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_dir() and not (source / RECIPE).is_file():
        return load_vae(source, trust=trust), Report("vae3d")
    if source.is_dir():
        recipe = read_json(source / RECIPE)
        if "class_path" in recipe:
            return CustomVAE.from_pretrained(source, trust=trust), Report("vae3d")
        hints = diffusers_hints(hints, recipe)
        present = [source / name for name in DIFFUSERS_WEIGHTS if (source / name).is_file()]
        if not present:
            raise ValueError(f"{source}: none of {', '.join(DIFFUSERS_WEIGHTS)} in it")
        source = present[0]
    state = read_state(source)
    if "spec" in state:
        return load_vae(source, trust=trust), Report("vae3d")
    return read_model(state, hints, layout, ignore_keys)


def diffusers_hints(hints: Hints, config: dict[str, Any]) -> Hints:
    """Complete the user's hints from diffusers' config.json.

    Args:
        hints: What the user said; it wins.
        config: The file's content.
    """
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"config.json is of a {config.get('_class_name')}, not an AutoencoderKL")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ValueError(f"act_fn {config['act_fn']} is not of this network, which has silu")
    found: dict[str, Any] = {
        "norm_num_groups": config.get("norm_num_groups"),
        "latent_scale": config.get("scaling_factor"),
        "latent_shift": config.get("shift_factor"),
    }
    return replace(hints, **{k: v for k, v in found.items() if getattr(hints, k) is None})


def write(vae: CustomVAE, target: Path, to: str, preprocess: Preprocess) -> None:
    """Write the network for a library; TARGET appears whole or not at all.

    Args:
        vae: The network.
        target: File or folder.
        to: `vae3d`, `monai` or `diffusers`.
        preprocess: Kept in a checkpoint of vae3d.
    """
    from loaders.whole import whole_file
    from vae3d.training.checkpoint import write_atomic
    from vae3d.weights.convert import export_diffusers, export_monai_state
    from vae3d.weights.hub import RECIPE, write_state

    suffixes = {"vae3d": ("", ".pt"), "monai": (".pt", ".safetensors"), "diffusers": ("",)}[to]
    if target.suffix not in suffixes:
        kinds = " or ".join(f"a {s} file" if s else "a folder (no suffix)" for s in suffixes)
        raise ValueError(f"{target}: --to {to} writes {kinds}")
    with whole_file(target) as temporary:
        if to == "monai":
            write_state(temporary, export_monai_state(vae))
        elif to == "diffusers":
            state, config = export_diffusers(vae)
            temporary.mkdir()
            write_state(temporary / DIFFUSERS_WEIGHTS[0], state)
            (temporary / RECIPE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        elif target.suffix:
            write_atomic(temporary, checkpoint_of(vae, preprocess))
        else:
            vae.save_pretrained(temporary)


def checkpoint_of(vae: CustomVAE, preprocess: Preprocess) -> dict[str, Any]:
    """What a training run would have saved: a checkpoint of step 0 without subjects.

    Args:
        vae: The network.
        preprocess: How its volumes are prepared.
    """
    from loaders import DataConfig
    from vae3d.training.checkpoint import FORMAT, versions

    data = DataConfig(num_slices=vae.in_channels if vae.spatial_dims == 2 else 1)
    kept = ("root", "cache_dir", "on_error", "nan", "volumes_4d", "slice_axis", "num_slices")
    patch_size = [max(64 // f, 1) * f for f in vae.factor]
    return {
        "format": FORMAT,
        "step": 0,
        "spec": vae.spec,
        "model": vae.state_dict(),
        "ema": None,
        "preprocess": preprocess.to_dict(),
        "config": {"data": {k: getattr(data, k) for k in kept}, "patch_size": patch_size},
        "split": {"train": [], "val": [], "test": []},
        "versions": versions(),
    }
