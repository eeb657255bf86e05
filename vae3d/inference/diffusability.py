"""How fit latents are for a second stage: numbers of one volume, of its posterior mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vae3d.inference.metrics import in_one_unit, latent_moments, psnr
from vae3d.inference.reconstruct import Coding
from vae3d.kernels.large import Lazy, Values
from vae3d.models.custom_vae import CustomVAE
from vae3d.spectrum import (
    COUNTED,
    along_axes,
    high_frequency_share,
    linear,
    linear_rows,
    padded,
    pooled_to,
    resized,
    spectral_gap,
)

HALF = 2  # the size at which the latent is decoded again, per axis


def diffusability(
    vae: CustomVAE,
    coding: Coding,
    x: Values,
    mean: Tensor,
    logvar: Tensor,
    widths: list[float],
    mask: Values | None = None,
    folder: Path | None = None,
) -> dict[str, float]:
    """What a second stage will find hard, and how each channel of a Gaussian latent lies.

    Args:
        vae: The model, in eval mode.
        coding: How its volumes are coded.
        x: `(C, X, Y, Z)` or `(C, X, Y)`, as the model took it.
        mean: Posterior mean `(c, *spatial)`.
        logvar: Log of the posterior variance.
        widths: Of each channel's intensity scale.
        mask: Voxels that count; None for all.
        folder: Where what is large may lie, see `Coding.decode`.
    """
    grid = on_grid(x, mean.shape[1:])[None]
    row = {
        "spectral_gap": float(spectral_gap(grid, mean[None])),
        "high_frequency_share": float(high_frequency_share(mean[None])),
        "input_high_frequency_share": float(high_frequency_share(grid)),
        "scale_psnr": scale_psnr(vae, coding, x, mean, widths, mask, folder),
    }
    if not vae.head.num_codes:  # a codebook has no noise, and no scale that an option would change
        row |= _by_channel(mean, logvar)
    return row


def scale_psnr(
    vae: CustomVAE,
    coding: Coding,
    x: Values,
    mean: Tensor,
    widths: list[float],
    mask: Values | None = None,
    folder: Path | None = None,
) -> float:
    """PSNR of the decoding of the latent at half its size against the volume at half its size.

    Both are resampled linearly; an axis that a 2D model slices keeps its size.

    Args:
        vae: The model.
        coding: How its volumes are coded.
        x: The volume.
        mean: Its latent.
        widths: Of each channel's intensity scale.
        mask: Voxels that count; None for all.
        folder: Where what is large may lie, see `Coding.decode`.
    """
    factor = coding.factor(vae, x.ndim - 1)
    by = [HALF] * vae.spatial_dims
    if len(by) < len(factor):
        by.insert(coding.slice_axis, 1)
    size = [max(n // k, 1) for n, k in zip(mean.shape[1:], by, strict=True)]
    got = coding.decode_as_it_is(vae, resized(mean[None], size)[0], None, folder)
    # The latent stands for whole cells; those at the far end hold less than that of the volume.
    whole = [n * f for n, f in zip(mean.shape[1:], factor, strict=True)]
    wanted = smaller(x, whole, got.shape[1:])
    if mask is not None:
        every = mask
        seen = Lazy((1, *mask.shape), lambda box: every[box[1:]][None].float())
        counts = smaller(seen, whole, got.shape[1:])
        mask = Lazy(counts.shape[1:], lambda box: counts[(slice(1), *box)][0] > COUNTED)
    return psnr(*in_one_unit(wanted, got, widths), mask)


def on_grid(x: Values, size: Sequence[int]) -> Tensor:
    """`pooled_to` of `(C, *spatial)`, row by row."""
    count, rows = size[0], []
    for row in range(count):
        low, high = row * x.shape[1] // count, -(-(row + 1) * x.shape[1] // count)
        rows.append(pooled_to(x[:, low:high][None], (1, *size[1:]))[0])
    return torch.cat(rows, 1)


def smaller(x: Values, whole: Sequence[int], size: Sequence[int]) -> Lazy:
    """`(C, *spatial)` continued to a whole number of cells, then `resized`, where it is sliced."""
    others = [linear(n, m) for n, m in zip(whole[1:], size[1:], strict=True)]

    def read(box: tuple[slice, ...]) -> Tensor:
        low, rows = linear_rows(whole[0], size[0], box[1].start, box[1].stop)
        high = low + rows.shape[1]  # of the continued volume
        held = min(low, x.shape[1] - 1), min(high, x.shape[1])
        part = padded(x[:, slice(*held)][None], [high - held[0], *whole[1:]])
        part = part[:, :, low - held[0] :]
        done = along_axes(part, [rows, *others])[0]
        return done[(box[0], slice(None), *box[2:])]

    return Lazy((x.shape[0], *size), read)


def _by_channel(mean: Tensor, logvar: Tensor) -> dict[str, float]:
    """Noise share and kurtosis over all channels, and mean, std and both of each one."""
    means, variance, fourth, noise = latent_moments(mean, logvar)
    tails = fourth / variance.square().clamp_min(1e-300)
    kurtosis = torch.where(variance > 0, tails - 3, 0.0)  # what is constant has no tails
    share = noise / (noise + variance)
    row = {
        "noise_share": float(noise.sum() / (noise + variance).sum()),
        "kurtosis": float(kurtosis.mean()),
    }
    columns = {
        "latent_mean": means,
        "latent_std": variance.sqrt(),
        "noise_share": share,
        "kurtosis": kurtosis,
    }
    for name, values in columns.items() if len(mean) > 1 else ():
        row |= {f"{name}_z{channel}": value for channel, value in enumerate(values.tolist())}
    return row
