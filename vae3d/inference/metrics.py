"""Numbers that compare a reconstruction with its volume, each with a stated data range.

Every entry of `METRICS` is `metric(x, recon, data_range, mask=None) -> float` on (C, X, Y, Z) or
(C, X, Y). `data_range` is the width of the intensity scale (1.0 for intensities in 0..1, 4071 for
the whole HU scale); it is never guessed from an image, and intensities are never clamped. Sums are
in float64, over slabs, so that large volumes cost little memory: `x`, `recon` and the mask may be
`Lazy`. `mask` (X, Y, Z), bool, restricts the mean to those voxels.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.kernels.large import MOST, ROWS, Lazy, Values, rows_of, slabs_of

Metric = Callable[..., float]

# Exponents of the five scales (Wang et al. 2003, section 3.2).
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def check_pair(x: Values, recon: Values, mask: Values | None = None) -> None:
    """Raise ValueError unless a volume, its reconstruction and a mask are of the same size."""
    if x.shape != recon.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, recon {tuple(recon.shape)}")
    if mask is not None and mask.shape != x.shape[1:]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, not {tuple(x.shape[1:])}")


def mae(x: Values, recon: Values, data_range: float, mask: Values | None = None) -> float:
    """Mean absolute error, in the units of x."""
    return _mean(x, recon, mask, lambda d: d.abs())


def mse(x: Values, recon: Values, data_range: float, mask: Values | None = None) -> float:
    """Mean squared error, in the squared units of x."""
    return _mean(x, recon, mask, lambda d: d.square())


def psnr(x: Values, recon: Values, data_range: float, mask: Values | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / MSE); inf for equal volumes."""
    error = mse(x, recon, data_range, mask)
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def ssim(x: Values, recon: Values, data_range: float, mask: Values | None = None) -> float:
    """Structural similarity over all spatial axes (Wang et al. 2004).

    Gaussian window of sigma 1.5 and 11 voxels (on a shorter axis the largest odd number that fits),
    K1 0.01, K2 0.03, population covariance, windows inside the volume only: the settings of MONAI's
    SSIMMetric and of scikit-image with gaussian_weights=True, use_sample_covariance=False.
    """
    return _ssim_means(x, recon, data_range, mask)[0]


def ms_ssim(x: Values, recon: Values, data_range: float, mask: Values | None = None,
            weights: Sequence[float] = MS_SSIM_WEIGHTS) -> float:  # fmt: skip
    """Multi-scale SSIM (Wang et al. 2003): contrast and structure at several scales.

    A volume that is too small for all scales (a window of 11 voxels at 1/16 size) uses the finer
    ones, their exponents scaled to the same sum. It knows no mask: all windows count.
    """
    scales = [k for k in range(len(weights)) if min(x.shape[1:]) >> k >= 11] or [0]
    used = [weights[k] for k in scales]
    used = [w * sum(weights) / sum(used) for w in used]
    result = 1.0
    for k, weight in zip(scales, used, strict=True):
        full, structure = _ssim_means(x, recon, data_range, None)
        result *= max(full if k == scales[-1] else structure, 0.0) ** weight
        if k != scales[-1]:
            x, recon = halved(x), halved(recon)
    return result


def halved(x: Values) -> Values:
    """Means of 2 voxels along each axis (C, *spatial), what is left over at the far end apart."""
    pool = F.avg_pool3d if x.ndim == 4 else F.avg_pool2d
    if isinstance(x, Tensor):
        return pool(x, 2)
    sizes = [n // 2 for n in x.shape[1:]]

    def read(box: tuple[slice, ...]) -> Tensor:
        return pool(x[(box[0], *(slice(2 * one.start, 2 * one.stop) for one in box[1:]))], 2)

    return Lazy((x.shape[0], *sizes), read)


METRICS: dict[str, Metric] = {
    "mae": mae,
    "mse": mse,
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
}
FOREGROUND = ("mae", "psnr", "ssim")  # those that are also measured inside a mask


def by_channel(
    x: Values, recon: Values, widths: Sequence[float], names: Sequence[str],
    metrics: Sequence[str] = tuple(METRICS), mask: Values | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return `<metric>_<channel>` for each channel; nothing where there is only one.

    Args:
        x: (C, X, Y, Z) or (C, X, Y).
        recon: Its reconstruction.
        widths: Width of each channel's intensity scale.
        names: Of the channels; those of one name (neighboring slices) are one.
        metrics: Names in `METRICS`.
        mask: As in `METRICS`.
    """
    scores = {}
    for name in dict.fromkeys(names) if len(set(names)) > 1 else ():
        of_name = [c for c, other in enumerate(names) if other == name]
        for metric in metrics:
            pair = (Lazy.of(v).picked(of_name) for v in (x, recon))
            scores[f"{metric}_{name}"] = METRICS[metric](*pair, widths[of_name[0]], mask)
    return scores


def in_one_unit(x: Values, recon: Values, widths: Sequence[float]) -> tuple[Values, Values, float]:
    """Bring channels of different scales to parts of each one's scale, so that means have a sense.

    Args:
        x: (C, X, Y, Z) or (C, X, Y).
        recon: Its reconstruction.
        widths: Width of each channel's intensity scale.

    Returns:
        The two, untouched where the scales are equal, and the width of the common scale.
    """
    if len(set(widths)) == 1:
        return x, recon, widths[0]
    scale = torch.tensor(widths).reshape(-1, *[1] * (x.ndim - 1))
    x, recon = (Lazy.of(v).map_channels(lambda part, c: part / scale[c]) for v in (x, recon))
    return x, recon, 1.0


def seam_score(
    x: Values, recon: Values, faces: Sequence[Sequence[int]], factor: Sequence[int] | None = None
) -> float:
    """How much the error jumps across tile faces: 1 where tiles leave no seam.

    The mean absolute difference of the error between the two voxels on either side of a face,
    divided by that between neighbors anywhere else. A decoder's error jumps at the borders of its
    cells, tiles or not, so only neighbors at the same place of a cell are compared.

    Args:
        x: (C, X, Y, Z) or (C, X, Y).
        recon: Its reconstruction.
        faces: Per axis the voxels that begin a tile (`stitching.tile_faces`).
        factor: Per axis the voxels of a cell, the model's factor; None for 1.

    Returns:
        The ratio; nan where there are no faces or no error.
    """
    check_pair(x, recon)
    if len(faces) != x.ndim - 1:
        raise ValueError(f"faces has {len(faces)} entries, the volume has {x.ndim - 1} axes")
    sums, counts = [0.0, 0.0], [0, 0]  # inside, across
    for axis, (where, cell) in enumerate(zip(faces, factor or [1] * len(faces), strict=True), 1):
        profile = _jumps(x, recon, axis)
        places = {i % cell for i in where}
        inside = {i for i in range(1, len(profile) + 1) if i % cell in places} - set(where)
        if inside:  # else every cell begins a tile, and there is nothing to compare with
            for across, rows in ((0, inside), (1, where)):
                sums[across] += sum(profile[i - 1] for i in rows)
                counts[across] += len(rows)
    if not all(counts) or not sums[0]:
        return math.nan
    return (sums[1] / counts[1]) / (sums[0] / counts[0])


def _jumps(x: Values, recon: Values, axis: int) -> list[float]:
    """Mean absolute difference of the error between neighbors along an axis, by their place."""
    total = torch.zeros(x.shape[axis] - 1, dtype=torch.float64)
    for rows in slabs_of(x.shape, 1):
        last = rows.stop + 1 if axis == 1 else rows.stop  # one more row to compare with
        wide = slice(rows.start, min(last, x.shape[1]))
        gaps = (recon[:, wide] - x[:, wide]).diff(dim=axis).abs_().transpose(0, axis).flatten(1)
        place = slice(rows.start, rows.start + len(gaps)) if axis == 1 else slice(None)
        total[place] += gaps.sum(1, dtype=torch.float64).cpu()
    return (total * x.shape[axis] / math.prod(x.shape)).tolist()


def lattice_score(x: Values, recon: Values, factor: Sequence[int]) -> float:
    """How much the grid of latent cells shows in a reconstruction: 1 where it does not.

    Power along each axis at the frequencies of the cells (k / factor, k = 1, 2, ... up to half a
    cycle a voxel) over that at the three next to each on either side (their geometric mean), in the
    reconstruction over the same in the input; the mean over frequencies and axes.

    Args:
        x: Volume (C, *spatial).
        recon: Its reconstruction.
        factor: Per axis the voxels of a cell of the latent grid.

    Returns:
        The mean ratio; nan where no axis has cells.
    """
    check_pair(x, recon)
    ratios = []
    for axis, cell in enumerate(factor, start=1):
        size = x.shape[axis] // cell * cell  # whole cells, so that their frequencies are bins
        peaks = [k * size // cell for k in range(1, cell // 2 + 1)]
        power = [_power(v, axis, size) for v in (x, recon)] if peaks else []
        for peak in peaks:
            near = [n for n in range(peak - 3, peak + 4) if 0 < n <= size // 2 and n not in peaks]
            ours, theirs = (p[peak] / p[near].log().mean().exp() for p in reversed(power))
            ratios.append(float(ours / theirs))
    return sum(ratios) / len(ratios) if ratios else math.nan


def _power(v: Values, axis: int, size: int) -> Tensor:
    """Power of each frequency along an axis of `size` voxels, summed over the lines; never 0."""
    total = torch.zeros(size // 2 + 1, dtype=torch.float64)
    across = 2 if axis == 1 else 1  # slabs hold whole lines
    for rows in slabs_of(v.shape, across, 0.25):  # of complex numbers, and several
        box = [slice(None)] * v.ndim
        box[across], box[axis] = rows, slice(size)
        lines = v[tuple(box)].movedim(axis, -1).double()
        spectrum = torch.fft.rfft(lines - lines.mean(-1, keepdim=True)).abs().square()
        total += spectrum.flatten(0, -2).sum(0).cpu()
    return total.clamp(min=1e-300)


def latent_summary(mean: Tensor, logvar: Tensor, num_values: int, latent_bits: int) -> dict:
    """What a posterior says: how far from the prior, how spread, how large.

    Args:
        mean: (C', *spatial) of one volume.
        logvar: Same shape.
        num_values: Voxels of the volume, padding apart.
        latent_bits: Bits in which a latent value is kept, for the rate.

    Returns:
        kl: nats per latent element; kl_sum: nats of the volume; latent_mean and latent_std: of the
        posterior mean, over the volume; posterior_std: mean standard deviation; active_channels:
        channels whose mean has a variance above 0.01 (Burda et al. 2016); bits_per_voxel.
    """
    from vae3d.models.posterior import DiagonalGaussian

    pairs = zip(mean, logvar, strict=True)  # in float64 a channel at a time
    kl = statistics.mean(float(DiagonalGaussian(a.double(), b.double()).kl()) for a, b in pairs)
    means, variances, _, _ = latent_moments(mean, logvar).tolist()
    return {
        "kl": kl,
        "kl_sum": kl * mean.numel(),
        "latent_mean": statistics.mean(means),
        "latent_std": math.sqrt(statistics.mean(variances) + statistics.pvariance(means)),
        "posterior_std": float((logvar / 2).exp().mean(dtype=torch.float64)),
        "active_channels": sum(variance > 0.01 for variance in variances),
        "bits_per_voxel": mean.numel() * latent_bits / num_values,
    }


def latent_moments(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of each channel: mean, variance, fourth central moment, variance of the noise, in float64.

    Args:
        mean: Posterior mean (C, *spatial) of one volume.
        logvar: Same shape.

    Returns:
        (4, C).
    """
    found = []
    for ours, spread in zip(mean, logvar, strict=True):  # latents may be large
        center = ours.mean(dtype=torch.float64)
        squares = (ours.double() - center).square_()
        variance, noise = squares.mean(), spread.double().exp().mean()
        found.append([*map(float, (center, variance, squares.square_().mean(), noise))])
    return torch.tensor(found, dtype=torch.float64).T


def code_summary(codes: Tensor, num_codes: int, num_values: int) -> dict:
    """What the codes of a volume say: how they lie over the codebook, and how large they are.

    Args:
        codes: (codes of a latent voxel, *spatial) of one volume.
        num_codes: Size of the codebook.
        num_values: Voxels of the volume, padding apart.

    Returns:
        code_perplexity and code_usage, see `vae3d.models.posterior.use_of`; bits_per_voxel, of
        which a code has log2(num_codes).
    """
    from vae3d.models.posterior import use_of

    perplexity, usage = use_of(codes[None], num_codes)
    return {
        "code_perplexity": float(perplexity),
        "code_usage": float(usage),
        "bits_per_voxel": codes.numel() * math.log2(num_codes) / num_values,
    }


def ranked(score: np.ndarray, lesion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lesion and other voxels at or above each score that occurs, from the highest on."""
    order = np.argsort(-score, kind="stable")
    score, lesion = score[order], lesion[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # ties are taken together
    hits = np.cumsum(lesion, dtype=np.int64)[last]
    return hits, last + 1 - hits


def auroc(score: np.ndarray, lesion: np.ndarray) -> float:
    """Area under the ROC curve: how often a lesion's voxel scores above another; ties half.

    Args:
        score: (N,), higher is more anomalous.
        lesion: (N,), bool.

    Returns:
        The area; nan where all voxels, or none, are of a lesion.
    """
    if lesion.all() or not lesion.any():
        return math.nan
    hits, misses = (np.concatenate([[0], v]) for v in ranked(score, lesion))
    return float(np.trapezoid(hits / hits[-1], misses / misses[-1]))


def average_precision(score: np.ndarray, lesion: np.ndarray) -> float:
    """Mean precision over the lesion's voxels; by chance it is the part that they are of all.

    Args:
        score: (N,), higher is more anomalous.
        lesion: (N,), bool.

    Returns:
        The sum of precision times the step in recall; nan where there is no lesion.
    """
    if not lesion.any():
        return math.nan
    hits, misses = ranked(score, lesion)
    return float(np.sum(np.diff(hits, prepend=0) * (hits / (hits + misses))) / hits[-1])


def _mean(
    x: Values, recon: Values, mask: Values | None, function: Callable[[Tensor], Tensor]
) -> float:
    """Mean in float64 of a function of the difference, over the mask; nan where it is empty."""
    check_pair(x, recon, mask)
    total, count = 0.0, 0
    for rows in slabs_of(x.shape, 1):
        values = function((x[:, rows] - recon[:, rows]).double())
        if mask is not None:
            values = values[:, mask[rows]]
        total, count = total + float(values.sum()), count + values.numel()
    return total / count if count else math.nan


def _gaussian_window(size: int, sigma: float = 1.5) -> list[float]:
    weights = [math.exp(-0.5 * ((i - (size - 1) / 2) / sigma) ** 2) for i in range(size)]
    return [w / sum(weights) for w in weights]


def _local_mean(v: Tensor, windows: list[list[float]]) -> Tensor:
    """Weighted mean of every window that lies inside the volume, axis by axis."""
    for axis, window in enumerate(windows, start=1):
        n = v.shape[axis] - len(window) + 1
        out = v.narrow(axis, 0, n) * window[0]
        for i, w in enumerate(window[1:], start=1):
            out.add_(v.narrow(axis, i, n), alpha=w)
        v = out
    return v


def _ssim_means(
    x: Values, recon: Values, data_range: float, mask: Values | None
) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure over all windows, or those centered in the mask."""
    check_pair(x, recon, mask)
    windows = [_gaussian_window(min(11, n if n % 2 else n - 1)) for n in x.shape[1:]]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    totals, count = [0.0, 0.0], 0
    for box in _blocks(x.shape, windows):
        ends = [slice(b.start, b.stop + len(w) - 1) for b, w in zip(box, windows, strict=True)]
        a, b = (v[(slice(None), *ends)].double() for v in (x, recon))
        ma, mb = _local_mean(a, windows), _local_mean(b, windows)
        covariance = _local_mean(a * b, windows) - ma * mb
        # The two variances are only needed as their sum.
        variances = _local_mean(a * a + b * b, windows) - ma * ma - mb * mb
        structure = (2 * covariance + c2) / (variances + c2)
        similarity = (2 * ma * mb + c1) / (ma * ma + mb * mb + c1) * structure
        inside = None
        if mask is not None:
            shifts = [len(w) // 2 for w in windows]  # to the windows' centers
            moved = zip(box, shifts, strict=True)
            inside = mask[tuple(slice(b.start + s, b.stop + s) for b, s in moved)]
        for i, values in enumerate((similarity, structure)):
            totals[i] += float((values if inside is None else values[:, inside]).sum())
        count += structure.numel() if inside is None else int(inside.sum()) * len(structure)
    return (totals[0] / count, totals[1] / count) if count else (math.nan, math.nan)


def _blocks(shape: Sequence[int], windows: list[list[float]]) -> list[tuple[slice, ...]]:
    """Cut the places of windows in a volume (C, *spatial) into blocks that take little memory."""
    first, second, *rest = (n - len(w) + 1 for n, w in zip(shape[1:], windows, strict=True))
    lines = shape[0] * math.prod(shape[3:]) * (ROWS + len(windows[0]) - 1)
    wide = max(ROWS, MOST // 4 // lines)  # of the second axis
    return [
        (rows, columns, *(slice(0, n) for n in rest))
        for rows in rows_of(first, ROWS)
        for columns in rows_of(second, wide)
    ]
