"""Weights as files: safetensors, plain PyTorch state dicts, and folders as Hugging Face keeps them.

The only importer of huggingface_hub.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae3d.models.custom_vae import Contract, CustomVAE
from vae3d.models.spec import build
from vae3d.ranges import check_ranges

WEIGHTS, RECIPE = "model.safetensors", "config.json"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MAX_EXPANSION = 100  # of an archive; small tensors have large entries in its table
# What a contract holds beside the recipe.
KINDS = {
    "preprocess": dict,
    "data": dict,
    "patch_size": list,
    "step": int,
    "subjects": int,
    "measured": dict,
    "license": str,
}
# A repository of the hub, and a file or folder in it.
ADDRESS = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)/?(.*)")


class HubFolder(PyTorchModelHubMixin):
    """`model.safetensors` and `config.json` of a VAE, in a folder or on the Hugging Face Hub.

    Args:
        vae: The network; its `spec` becomes `config.json`.
    """

    def __init__(self, vae: CustomVAE):
        self.vae = vae

    def _save_pretrained(self, save_directory: Path) -> None:
        write_state(save_directory / WEIGHTS, self.vae.state_dict())
        recipe = json.dumps(self.vae.spec | (self.vae.contract or {}), indent=2)
        (save_directory / RECIPE).write_text(recipe + "\n", encoding="utf-8")

    def generate_model_card(
        self, *_: object, license: str | None = None, **more: object
    ) -> ModelCard:
        """The README.md of the folder: what is known of the network and nothing else."""
        license = license or (self.vae.contract or {}).get("license")
        about = ModelCardData(license=license, library_name="vae3d").to_yaml()
        lines = [*described(self.vae), *(f"\n{name}: {value}" for name, value in more.items())]
        return ModelCard("\n".join(["---", about, "---", "", *lines, ""]))

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # the network itself, not its folder
        cls,
        *,
        model_id: str,
        config: dict | None = None,
        trust: Sequence[str] = (),
        **download: Any,
    ) -> nn.Module:
        if not config or "class_path" not in config:
            raise ValueError(
                f"{model_id}: no {RECIPE} of vae3d there; weights of other libraries are read by"
                " vae3d convert"
            )
        spec, contract = recipe_of(config)
        check_ranges(RECIPE, {"spec": spec}, f"{model_id}: its ")
        vae = build(spec, trust)
        vae.contract = contract
        folder = Path(model_id)
        if folder.is_dir():
            path = folder / WEIGHTS
        else:
            path = Path(hf_hub_download(model_id, WEIGHTS, **download))
        load_strictly(vae, read_state(path), f"the weights in {path}")
        return vae.eval()


def recipe_of(config: dict[str, object]) -> tuple[dict[str, object], Contract | None]:
    """Take a `config.json` apart: the network's recipe, and its contract if there is one."""
    spec = {k: v for k, v in config.items() if k in ("class_path", "init_args")}
    contract = {k: v for k, v in config.items() if k in KINDS and v is not None}
    for name, value in contract.items():
        whole = all(isinstance(n, int) for n in value) if isinstance(value, list) else True
        if not (isinstance(value, KINDS[name]) and whole):
            raise ValueError(f"{RECIPE}: its {name} is {value!r}, which is damaged")
    return spec, contract or None


def described(vae: CustomVAE) -> list[str]:
    """Lines of a model card: what a network takes, was trained on and is measured to do."""
    known = vae.contract or {}
    axes = ", ".join("XYZ"[: vae.spatial_dims])
    factor = " x ".join(map(str, vae.factor))
    prepared = known.get("preprocess") or {}
    use = ["import vae3d", "", 'vae = vae3d.load_model("<this folder>")']
    if prepared:
        use += ['latent = vae3d.encode_file(vae, "scan.nii.gz")', "vae3d.decode_file(vae, latent)"]
    told = {
        "training volumes": "subjects",
        "training steps": "step",
        "patch [voxels]": "patch_size",
    }
    measured = known.get("measured") or {}
    parts = {
        "Takes": [
            f"- `(B, {vae.in_channels}, {axes})` of any size",
            f"- gives {vae.latent_channels} latent channels, a latent voxel for {factor}",
            *(f"- {name}: {value}" for name, value in prepared.items()),
        ],
        "Trained on": [f"- {what}: {known[k]}" for what, k in told.items() if known.get(k)]
        * bool(known.get("step")),
        "Measured": [f"- {name}: {value:.4g}" for name, value in measured.items()],
        "Use": ["```python", *use, "```"],
    }
    lines = [f"# {type(vae).__name__}", "", "A variational autoencoder, written by vae3d."]
    for title, part in parts.items():
        lines += ["", f"## {title}", "", *part] if part else []
    return lines


def from_hub(address: str) -> Path:
    """Bring weights from the Hugging Face Hub into its cache, with the `config.json` beside them.

    Args:
        address: `owner/name`, also with `hf://` before it and a folder or file behind.

    Returns:
        The file of weights in the cache; without a network, what the cache holds.

    Raises:
        ValueError: There is no such repository or file, or it cannot be reached.
    """
    found = ADDRESS.fullmatch(address)
    if not found:
        raise ValueError(
            f"{address}: an address of the hub is hf://owner/name or hf://owner/name/file"
        )
    repo, inside = found[1], found[2].strip("/")
    is_file = bool(Path(inside).suffix)
    folder = str(Path(inside).parent) if is_file else inside
    names = [Path(inside).name] if is_file else [WEIGHTS, *DIFFUSERS_WEIGHTS]

    def download(name: str) -> Path:
        where = None if folder in ("", ".") else folder
        return Path(hf_hub_download(repo, name, subfolder=where))

    try:
        download(RECIPE)
    except (OSError, ValueError, EntryNotFoundError):
        if not is_file:
            names = names[:1]  # what is missing is told once, below
    reason: Exception | None = None
    for name in names:
        try:
            return download(name)
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = reason or error
    told = " ".join(str(reason).split())
    raise ValueError(
        f"{address}: not on the Hugging Face Hub, nor in its cache ({told})"
    ) from reason


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a file of weights: `.safetensors`, or anything `torch.load(weights_only=True)` reads.

    Args:
        path: The file.

    Raises:
        ValueError: Damaged, or holds code besides weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, it holds more than plain weights; save its state_dict() alone,"
            " best as .safetensors"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not a file of weights, or damaged ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights")
    return state


def check_archive(path: str | Path) -> None:
    """Verify the checksums of a zip file: `torch.load` returns flipped bits without a word.

    Raises:
        ValueError: Damaged, cut short, or not a zip file.
        OSError: The file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
                if claimed > MAX_EXPANSION * os.path.getsize(path):  # torch stores as it is
                    raise ValueError(f"it claims to hold {claimed} bytes")
                damaged = archive.testzip()
        except Exception as error:  # BadZipFile, EOFError, OSError ...: damage has no one type
            raise ValueError(f"cut short, or not an archive ({error})") from error
    if damaged:
        raise ValueError(f"damaged, the checksum of its entry {damaged} is wrong")


def load_strictly(vae: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """`vae.load_state_dict(state)`, where what does not fit is the user's mistake.

    Args:
        vae: The network.
        state: Weights under our names.
        what: What `state` is, for the message.
    """
    check_fit(state, vae.state_dict(), what)
    vae.load_state_dict(state)


def check_fit(state: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise an error that names every missing, unexpected and misshaped weight.

    Args:
        state: What there is.
        expected: What there should be.
        what: What `state` is, for the message.
    """
    wrong = {
        "missing": set(expected) - set(state),
        "unexpected": set(state) - set(expected),
        "misshaped": {
            f"{name} {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
            for name in set(state) & set(expected)
            if state[name].shape != expected[name].shape
        },
    }
    problems = "; ".join(f"{what}: {', '.join(sorted(k))}" for what, k in wrong.items() if k)
    if not problems:
        return
    both = [(state[name].dim(), expected[name].dim()) for name in set(state) & set(expected)]
    if (4, 5) in both and (5, 5) not in both:
        problems += "; 2D weights become 3D ones by vae3d convert --inflate center"
    raise ValueError(f"{what} do not fit this network: {problems}")


def write_state(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write weights as `.safetensors`, or by `torch.save` under any other suffix.

    Args:
        path: The file.
        state: Tensors by name.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
