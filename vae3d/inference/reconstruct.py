"""Reconstruct whole volumes: in one full pass, in blended patches, or exactly in bounded memory."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from vae3d.inference.exact import decode_exact, encode_exact
from vae3d.inference.stitching import Stitcher, add_batch, check_patch, tile_batches

MODES = ("full", "patch", "exact")


def reconstruct(vae: torch.nn.Module, x: Tensor, mode: str = "patch", **how) -> Tensor:
    """The reconstruction of one volume through the posterior mean.

    Args:
        vae: The model, in eval mode.
        x: (C, X, Y, Z) or (C, X, Y), normalized as the model was trained; any device.
        mode: full | patch | exact.
        **how: Further options of `autoencode`.

    Returns:
        (C, X, Y, Z) float32 on the device of x.
    """
    return autoencode(vae, x, mode, **how)[0]


@torch.no_grad()
def autoencode(
    vae: torch.nn.Module,
    x: Tensor,
    mode: str = "patch",
    patch_size: Sequence[int] | None = None,
    overlap: float | int | Sequence = 0.5,
    blend: str = "hann",
    batch_size: int = 1,
    memory_gb: float | None = None,
    slice_axis: int = 2,
    num_slices: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct one volume through the posterior mean, and return the posterior as well.

    Args:
        vae: The model, in eval mode.
        x: (C, X, Y, Z) or (C, X, Y), normalized as the model was trained; any device. A 2D model
            takes a volume slice by slice.
        mode: full (one pass) | patch (overlapped patches, blended) | exact (equal to full, layer by
            layer in bounded memory).
        patch_size: Patch in voxels, for mode patch; multiples of `vae.factor`.
        overlap: Fraction of the patch (float) or voxels (int); smaller than the patch.
        blend: hann | gaussian | average | crop.
        batch_size: Patches per forward pass.
        memory_gb: Budget of mode exact in GiB; None takes half of what is free.
        slice_axis: For a 2D model: the axis that slices are cut across.
        num_slices: For a 2D model: neighboring slices that are its input channels.

    Returns:
        recon (C, X, Y, Z), and mean and logvar of the latent; float32 on the device of x.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode == "patch":
        if patch_size is None:
            raise ValueError("mode patch needs patch_size, for example '[64,64,64]'")
        check_patch(patch_size, vae.factor)

    def one(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if mode == "exact":
            posterior = encode_exact(vae, part, memory_gb)
            recon = decode_exact(vae, posterior.mean, memory_gb, size=part.shape[1:])
            return tuple(t.float().to(x.device) for t in (recon, posterior.mean, posterior.logvar))
        if mode == "full":
            return tuple(t[0] for t in _forward(vae, part[None]))
        return _patches(vae, part, patch_size, overlap, blend, batch_size)

    if vae.spatial_dims == 2 and x.ndim == 4:
        return _by_slices(one, x, slice_axis, num_slices)
    return one(x)


def _forward(vae, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """recon, mean and logvar of `(B, C, *spatial)`, float32, where the batch was."""
    recon, posterior = vae(batch.to(next(vae.parameters()).device), sample_posterior=False)
    parts = (recon, posterior.mean, posterior.logvar)
    return tuple(t.float().to(batch.device) for t in parts)


def _patches(vae, x, patch_size, overlap, blend, batch_size) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the patches gives the volume and, on its coarser grid, the latent."""
    tiling = (x.shape[1:], patch_size, overlap, blend)
    volume = Stitcher(*tiling, unit=vae.factor)
    latent = Stitcher(*tiling, scale=[Fraction(1, f) for f in vae.factor])
    for corners, tiles in tile_batches(x, volume, batch_size):
        recon, *moments = _forward(vae, tiles)
        add_batch(volume, corners, recon)
        add_batch(latent, corners, moments)
    return volume.result(), *latent.result()


def _by_slices(one, x: Tensor, axis: int, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slice by slice through a volume; of stacked neighbors the middle one is kept."""
    planes = x.movedim(1 + axis, 0)  # (N, C, a, b)
    last, half, channels = len(planes) - 1, num_slices // 2, x.shape[0]
    results = []
    for i in range(len(planes)):
        near = [min(max(k, 0), last) for k in range(i - half, i + half + 1)]
        recon, mean, logvar = one(planes[near].flatten(0, 1))
        if len(recon) == num_slices * channels:
            recon = recon[half * channels : (half + 1) * channels]
        results.append((recon, mean, logvar))
    return tuple(torch.stack(parts, 1 + axis) for parts in zip(*results, strict=True))
