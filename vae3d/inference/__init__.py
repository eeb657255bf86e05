"""Volumes through a trained model: stitched, whole, measured.

    from vae3d.inference import stitch

Names are imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "stitch": "stitching",
    "iter_slabs": "stitching",
    "Stitcher": "stitching",
    "autoencode": "reconstruct",
    "encode_file": "files",
    "decode_file": "files",
    "METRICS": "metrics",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vae3d.inference' has no attribute {name!r}")
    return getattr(import_module(f"vae3d.inference.{_HOMES[name]}"), name)
