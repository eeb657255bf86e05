"""Numbers that compare a reconstruction with its volume, each with a stated data range.

Every entry of `METRICS` is `metric(x, recon, data_range, mask=None) -> float` on (C, X, Y, Z) or
(C, X, Y). `data_range` is the width of the intensity scale (1.0 for intensities in 0..1, 4071 for
the whole HU scale); it is never guessed from an image, and intensities are never clamped. Sums are
in float64. `mask` (X, Y, Z), bool, restricts the mean to those voxels.
"""

import math
from collections.abc import Callable

import torch

Metric = Callable[..., float]


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> float:
    """Mean in float64 of (C, *spatial) over the mask."""
    if mask is not None:
        values = values[:, mask]
    return float(values.mean(dtype=torch.float64)) if values.numel() else math.nan


def mae(x, recon, data_range: float, mask=None) -> float:
    """Mean absolute error, in the units of x."""
    return _mean((x - recon).abs(), mask)


def mse(x, recon, data_range: float, mask=None) -> float:
    """Mean squared error, in the squared units of x."""
    return _mean((x - recon).square(), mask)


def psnr(x, recon, data_range: float, mask=None) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / MSE); inf for equal volumes."""
    error = mse(x, recon, data_range, mask)
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def ssim(x, recon, data_range: float, mask=None) -> float:
    """Structural similarity over all spatial axes (Wang et al. 2004).

    Gaussian window of sigma 1.5 and 11 voxels (cut to the axis where that is shorter), K1 0.01,
    K2 0.03, population covariance, windows inside the volume only: the settings of MONAI's
    SSIMMetric and of scikit-image with gaussian_weights=True, use_sample_covariance=False.
    """
    similarity, _, margins = _ssim_maps(x.double(), recon.double(), data_range)
    if mask is not None:
        mask = mask[tuple(slice(m, n - m) for m, n in zip(margins, mask.shape, strict=True))]
    return _mean(similarity, mask)


METRICS: dict[str, Metric] = {"mae": mae, "mse": mse, "psnr": psnr, "ssim": ssim}


def _gaussian_window(size: int, sigma: float = 1.5) -> list[float]:
    weights = [math.exp(-0.5 * ((i - (size - 1) / 2) / sigma) ** 2) for i in range(size)]
    return [w / sum(weights) for w in weights]


def _local_mean(v: torch.Tensor, windows: list[list[float]]) -> torch.Tensor:
    """Weighted mean of every window that lies inside the volume, axis by axis."""
    for axis, window in enumerate(windows, start=1):
        n = v.shape[axis] - len(window) + 1
        out = v.narrow(axis, 0, n) * window[0]
        for i, w in enumerate(window[1:], start=1):
            out.add_(v.narrow(axis, i, n), alpha=w)
        v = out
    return v


def _ssim_maps(x, y, data_range: float) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """SSIM and contrast-structure maps (C, *inner), and the margin lost on each axis."""
    sizes = [min(11, n if n % 2 else n - 1) for n in x.shape[1:]]
    windows = [_gaussian_window(s) for s in sizes]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = _local_mean(x, windows), _local_mean(y, windows)
    vxx = _local_mean(x * x, windows) - mx * mx
    vyy = _local_mean(y * y, windows) - my * my
    vxy = _local_mean(x * y, windows) - mx * my
    structure = (2 * vxy + c2) / (vxx + vyy + c2)
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return luminance * structure, structure, [s // 2 for s in sizes]
