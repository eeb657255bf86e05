"""`vae3d convert`: bring weights in from other libraries, or out to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loaders import Preprocess
from loaders.texts import read_json
from vae3d.models.classes import made
from vae3d.models.custom_vae import CustomVAE

if TYPE_CHECKING:
    from vae3d.models.custom_vae import Contract
    from vae3d.weights.convert import Report
    from vae3d.weights.rebuild import Hints


def convert(
    source: str,
    target: Path,
    /,
    to: Literal["vae3d", "monai", "diffusers", "compvis"] = "vae3d",
    layout: str | None = None,
    model: Callable[[], CustomVAE] | None = None,
    norm_num_groups: int | None = None,
    norm_eps: float = 1e-6,
    use_convtranspose: bool = False,
    proj_attn: Literal["auto", "drop", "apply"] = "auto",
    latent_scale: float | None = None,
    measured_scale: Path | None = None,
    inflate: Literal["none", "center", "mean"] = "none",
    ignore_keys: tuple[str, ...] = (),
    preprocess: Preprocess | None = None,
    evaluation: Path | None = None,
    license: str | None = None,
    trust: tuple[str, ...] = (),
) -> None:
    """Convert the weights of an autoencoder between libraries.

    The layout of SOURCE is recognized by the names of its weights: vae3d (a run folder, checkpoint
    or `save_pretrained` folder), MONAI, MAISI, GenerativeModels 0.1 and 0.2, CompVis, MedVAE,
    diffusers; also below the prefixes that DDP, compile and Lightning put before them. Every weight
    must find its place; what is left out or reshaped is printed.

    Examples:
        vae3d convert autoencoder.pt maisi.pt --norm_num_groups 32 --preprocess.intensity unit
        vae3d convert sd-vae-ft-mse vae3d-from-sd --inflate center
        vae3d convert vae_4x_1c_3D.ckpt medvae.pt --preprocess.intensity symmetric
        vae3d convert runs/a autoencoder_for_monai.pt --to monai
        vae3d convert hf://stabilityai/sd-vae-ft-mse sd.pt --preprocess.intensity symmetric
        vae3d convert ours_by_ddp.pt vae.pt --model CustomVAE --model.channels '[32,64,128]'

    Args:
        source: File of weights (.safetensors, .pt, .ckpt), folder, or hf://owner/name[/file] of the
            Hugging Face Hub.
        target: What to write; must not exist. For vae3d a .pt file is a checkpoint that evaluate,
            encode and decode take, and a folder what `from_pretrained` takes. A folder for
            diffusers, a .pt or .safetensors file for monai, a .ckpt file for compvis.
        to: Library to write for; compvis is latent-diffusion and MedVAE.
        layout: Layout of SOURCE, such as "MONAI", where its names are ambiguous.
        model: The network, as in training, for weights of vae3d alone; null to find it out.
        norm_num_groups: Groups of the norms; the weights do not say it.
        norm_eps: Added to the variance in the norms.
        use_convtranspose: The up layers are transposed convolutions (MAISI and GenerativeModels
            name them like the others).
        proj_attn: What to do with `proj_attn` of GenerativeModels 0.2, which its forward pass
            never applies: drop, apply, or auto (drop what was never trained, else ask).
        latent_scale: Scale of the latents for a second stage.
        measured_scale: Folder of latents that `vae3d encode` has made with SOURCE: one over their
            standard deviation becomes latent_scale (scaling_factor of diffusers).
        inflate: Make a 3D network of 2D weights: center (a volume that is constant along the new
            axis gives the 2D result) or mean (kernels spread evenly; so only far from the faces).
        ignore_keys: Prefixes of names to leave out.
        preprocess: How the weights want their volumes prepared, which is kept beside them; null for
            what SOURCE says, else for the defaults.
        evaluation: Folder of `vae3d evaluate` on SOURCE, whose figures go into the model card.
        license: License of the weights, for the model card, such as cc-by-4.0.
        trust: Prefixes of modules besides vae3d whose classes may be imported.
    """
    from vae3d.training.checkpoint import find_checkpoint
    from vae3d.weights.convert import inflate as inflated
    from vae3d.weights.convert import load_weights
    from vae3d.weights.rebuild import Hints

    if target.exists():
        raise ValueError(f"{target} exists; remove it or choose another name")
    if measured_scale is not None and (latent_scale is not None or to == "monai"):
        other = "--to monai, whose file keeps no scale" if to == "monai" else "--latent_scale"
        raise ValueError(f"--measured_scale does not go with {other}; leave one out")
    hints = Hints(
        norm_num_groups=norm_num_groups,
        norm_eps=norm_eps,
        use_convtranspose=use_convtranspose,
        proj_attn=proj_attn,
        latent_scale=latent_scale,
    )
    if model is not None:
        only_default(hints, "--model says it")
        vae = made("--model", model).eval()
        report = load_weights(vae, find_checkpoint(source), ignore_keys, layout)
    else:
        vae, report = read(source, hints, layout, ignore_keys, trust)
    if measured_scale is not None:
        report.lines.append(take_scale(vae, measured_scale))
    if inflate != "none":
        vae = inflated(vae, inflate)
        report.lines.append(f"inflated to 3D ({inflate})")
    if to == "vae3d" and not (preprocess or (vae.contract or {}).get("preprocess")):
        report.lines.append("the defaults of --preprocess go with the weights: they say nothing")
    known = complete(vae, preprocess)
    if evaluation:
        known["measured"] = figures(evaluation, source)
    if license:
        known["license"] = license
    write(vae, target, to)
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"{source}: {report.layout} weights, {parameters / 1e6:.2f} M parameters")
    print(*(f"  {line}" for line in report.lines), sep="\n", end="\n" if report.lines else "")
    print(f"{target}: written for {to}, as {type(vae).__name__} with factor {vae.factor}")


def take_scale(vae: CustomVAE, latents: Path) -> str:
    """Take over the scale of latents that the network has made; a line that tells it.

    Args:
        vae: The network.
        latents: Folder that `vae3d encode` wrote.
    """
    from vae3d.commands.encode import weights_hash
    from vae3d.stage2.latents import read_index, read_statistics

    if read_index(latents)["made_by"].get("checkpoint") != weights_hash(vae):
        raise ValueError(f"{latents}: latents of other weights; encode with the source first")
    scale = read_statistics(latents).scaling_factor
    before, after = vae.latent_scale, scale
    vae.set_latent_scale(scale)
    return f"latent_scale {after:.5g}, measured (it was {before:.5g})"


def complete(vae: CustomVAE, preprocess: Preprocess | None) -> Contract:
    """Say what `vae` wants of its volumes, as far as nobody has said it.

    Args:
        vae: The network; its contract is completed.
        preprocess: What the user says; None for nothing.
    """
    known = vae.contract = dict(vae.contract or {})
    if preprocess or not known.get("preprocess"):
        known["preprocess"] = (preprocess or Preprocess()).to_dict()
    if vae.spatial_dims == 2:
        known.setdefault("data", {"num_slices": vae.in_channels})
    known.setdefault("patch_size", [max(64 // f, 1) * f for f in vae.factor])
    return known


def figures(evaluation: Path, source: str) -> dict[str, float]:
    """Means of what `vae3d evaluate` has measured.

    Args:
        evaluation: Its folder.
        source: The weights; figures of others are refused.
    """
    from vae3d.training.checkpoint import fingerprint

    summary = read_json(evaluation / "summary.json")
    try:
        means = {name: float(value["mean"]) for name, value in summary["metrics"].items()}
        measured, digest = summary["checkpoint"], summary["checkpoint_sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{evaluation / 'summary.json'}: not of vae3d evaluate") from error
    if digest != fingerprint(source):
        raise ValueError(f"{evaluation}: measured {measured}, not {source}")
    return means


def read(
    source: str,
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
    from vae3d.training.checkpoint import load_vae
    from vae3d.weights.convert import OURS, Report, read_model
    from vae3d.weights.hub import DIFFUSERS_WEIGHTS, RECIPE, WEIGHTS, from_hub, read_state

    def ours(path: Path) -> tuple[CustomVAE, Report]:
        if layout not in (None, OURS):
            raise ValueError(f"{source} is of vae3d, not of --layout {layout}; leave that out")
        only_default(hints, f"{source} is of vae3d and says it")
        if ignore_keys:
            raise ValueError(f"--ignore_keys: {source} is of vae3d, whose network needs all of it")
        return load_vae(path, trust=trust), Report(OURS)

    path = from_hub(source) if str(source).startswith("hf://") else Path(source)
    if not path.exists():
        raise ValueError(f"{source}: no such file or folder")
    if path.name in (WEIGHTS, *DIFFUSERS_WEIGHTS) and (path.parent / RECIPE).is_file():
        path = path.parent  # what stands beside them belongs to them
    if path.is_dir() and not (path / RECIPE).is_file():
        return ours(path)
    if path.is_dir():
        recipe = read_json(path / RECIPE)
        if not isinstance(recipe, dict):
            raise ValueError(f"{path / RECIPE}: not the configuration of a network")
        if "class_path" in recipe:
            return ours(path)
        hints = diffusers_hints(hints, recipe)
        present = [path / name for name in DIFFUSERS_WEIGHTS if (path / name).is_file()]
        if not present:
            raise ValueError(f"{path}: none of {', '.join(DIFFUSERS_WEIGHTS)} in it")
        path = present[0]
    state = read_state(path)
    if "spec" in state:
        return ours(path)
    return read_model(state, hints, layout, ignore_keys, path)


def only_default(hints: Hints, why: str) -> None:
    """Refuse what the user says of a network that is known already; it would change nothing."""
    given = [f.name for f in fields(hints) if getattr(hints, f.name) != f.default]
    if given:
        raise ValueError(f"leave out {', '.join(f'--{name}' for name in given)}; {why}")


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


def write(vae: CustomVAE, target: Path, to: str) -> None:
    """Write the network for a library; TARGET appears whole or not at all.

    Args:
        vae: The network.
        target: File or folder.
        to: As for `convert`.
    """
    from loaders.whole import whole_file
    from vae3d.training.checkpoint import checkpoint_of, write_atomic
    from vae3d.weights.convert import export_compvis, export_diffusers, export_monai_state
    from vae3d.weights.hub import DIFFUSERS_WEIGHTS, RECIPE, write_state

    suffixes = {
        "vae3d": ("", ".pt"),
        "monai": (".pt", ".safetensors"),
        "diffusers": ("",),
        "compvis": (".ckpt",),
    }[to]
    if target.suffix not in suffixes:
        kinds = " or ".join(f"a {s} file" if s else "a folder (no suffix)" for s in suffixes)
        raise ValueError(f"{target}: --to {to} writes {kinds}")
    with whole_file(target) as temporary:
        if to == "monai":
            write_state(temporary, export_monai_state(vae))
        elif to == "compvis":
            write_atomic(temporary, export_compvis(vae))
        elif to == "diffusers":
            state, config = export_diffusers(vae)
            temporary.mkdir()
            write_state(temporary / DIFFUSERS_WEIGHTS[0], state)
            (temporary / RECIPE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        elif target.suffix:
            write_atomic(temporary, checkpoint_of(vae.spec, vae.state_dict(), vae.contract or {}))
        else:
            vae.save_pretrained(temporary)
