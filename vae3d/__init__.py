"""Train variational autoencoders on 3D and 2D volumes that do not fit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae3d.commands.evaluate import evaluate
    from vae3d.commands.train import train_3d
    from vae3d.inference.files import decode_file, encode_file
    from vae3d.inference.stitching import stitch
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.training.checkpoint import load_model

__all__ = [
    "CustomVAE", "decode_file", "encode_file", "evaluate", "load_model", "stitch", "train_3d"
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "CustomVAE": "vae3d.models.custom_vae",
    "evaluate": "vae3d.commands.evaluate",
    "train_3d": "vae3d.commands.train",
    "load_model": "vae3d.training.checkpoint",
    "stitch": "vae3d.inference.stitching",
    "encode_file": "vae3d.inference.files",
    "decode_file": "vae3d.inference.files",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use, so that `import vae3d` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vae3d' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
