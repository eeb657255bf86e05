"""Terms of the loss, and the loss that they make.

    from vae3d.losses import VAELoss

Names are imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module

_NAMES = {
    "vae_loss": ("VAELoss",),
    "term": ("Term", "Disturbance", "Decoding"),
    "reconstruction": (
        *("L1", "L2", "Charbonnier", "LearnedVariance"),
        *("SSIM", "GradientDifference", "FocalFrequency"),
    ),
    "latents": ("SpectrumMatching", "ScaleEquivariance", "NoiseRobust", "StructuredChannels"),
    "kl": ("KL",),
    "commitment": ("Commitment",),
    "perceptual": ("Perceptual",),
    "adversarial": ("Adversarial", "PatchDiscriminator"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vae3d.losses' has no attribute {name!r}")
    return getattr(import_module(f"vae3d.losses.{_HOMES[name]}"), name)
