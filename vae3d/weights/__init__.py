"""Weights in and out: files of ours, layouts of other libraries, folders of Hugging Face.

The networks do not import this room, which knows them all; see `vae3d.models.custom_vae.door`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae3d.weights.convert import from_monai_state, load_weights
    from vae3d.weights.hub import HubFolder

__all__ = ["HubFolder", "from_monai_state", "load_weights"]

_HOMES = {
    "HubFolder": "vae3d.weights.hub",
    "from_monai_state": "vae3d.weights.convert",
    "load_weights": "vae3d.weights.convert",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: huggingface_hub takes its time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vae3d.weights' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
