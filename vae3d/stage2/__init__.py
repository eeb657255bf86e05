"""Second stage: latents on disk and diffusion over them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae3d.stage2.diffusion import DiffusionUNet, LatentDiffusion, create_condition_projector
    from vae3d.stage2.latents import LatentDataset

__all__ = ["DiffusionUNet", "LatentDataset", "LatentDiffusion", "create_condition_projector"]

_HOMES = {
    "DiffusionUNet": "vae3d.stage2.diffusion",
    "LatentDataset": "vae3d.stage2.latents",
    "LatentDiffusion": "vae3d.stage2.diffusion",
    "create_condition_projector": "vae3d.stage2.diffusion",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: MONAI takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vae3d.stage2' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
