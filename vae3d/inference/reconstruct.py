"""Reconstruct whole volumes: one full pass, blended patches, or the exact layer-by-layer pass."""

from collections.abc import Sequence

import torch

from vae3d.inference.stitching import check_patch, stitch

MODES = ("full", "patch")


@torch.no_grad()
def reconstruct(
    vae: torch.nn.Module,
    x: torch.Tensor,
    mode: str = "patch",
    patch_size: Sequence[int] | None = None,
    overlap: float | int | Sequence = 0.5,
    blend: str = "hann",
    batch_size: int = 1,
) -> torch.Tensor:
    """The reconstruction of one volume through the posterior mean.

    Args:
        vae: The model, in eval mode.
        x: (C, X, Y, Z) or (C, X, Y), normalized as the model was trained; any device.
        mode: full (one pass) | patch (overlapped patches, blended).
        patch_size: Patch in voxels, for mode patch; multiples of `vae.factor`.
        overlap: Fraction of the patch (float) or voxels (int); smaller than the patch.
        blend: hann | gaussian | average | crop.
        batch_size: Patches per forward pass.

    Returns:
        (C, X, Y, Z) float32 on the device of x.
    """
    device = next(vae.parameters()).device

    def forward(batch: torch.Tensor) -> torch.Tensor:
        return vae(batch.to(device), sample_posterior=False)[0].float().to(x.device)

    if mode == "full":
        return forward(x[None])[0]
    if mode != "patch":
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if patch_size is None:
        raise ValueError("mode patch needs patch_size, for example '[64,64,64]'")
    check_patch(patch_size, vae.factor)
    return stitch(forward, x, patch_size, overlap, blend, batch_size)
