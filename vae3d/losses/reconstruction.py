"""Distances between a volume and its reconstruction.

Axes: b samples, c channels, then the two or three spatial axes. Every distance is taken per sample
and averaged over samples; none depends on the number of voxels. With a mask the average is weighted
(see `Term`): a window weighs what its middle voxel does, an edge what the lesser of its ends does,
both over the mean weight of the voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vae3d.losses.term import Term, add_up, mean


class Pointwise(Term):
    """A distance that each voxel has by itself; the term is its mean over all voxels."""

    weighted = True

    def pointwise(self, error: Tensor) -> Tensor:
        """Return the distance of each voxel, same shape as `error = recon - x`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: object = None,
        step: int = 0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the mean distance over samples, channels and voxels."""
        return mean(self.pointwise(recon - x), weight)


class L1(Pointwise):
    """Mean absolute error.

    Args:
        weight: Factor of the term in the total.
    """

    def pointwise(self, error: Tensor) -> Tensor:
        """Return |error|."""
        return error.abs()


class L2(Pointwise):
    """Mean squared error.

    Args:
        weight: Factor of the term in the total.
    """

    def pointwise(self, error: Tensor) -> Tensor:
        """Return error^2."""
        return error.square()


class Charbonnier(Pointwise):
    """Smooth L1: sqrt(error^2 + eps^2), with a gradient that is continuous at 0.

    Args:
        weight: Factor of the term in the total.
        eps: Width of the round bottom, in intensity units.
    """

    def __init__(self, weight: float = 1.0, eps: float = 1e-3):
        super().__init__(weight)
        self.eps = eps

    def pointwise(self, error: Tensor) -> Tensor:
        """Return sqrt(error^2 + eps^2)."""
        return (error.square() + self.eps**2).sqrt()


class LearnedVariance(Term):
    """Pointwise distance under a learned log-variance per output channel, as in the SD family.

    The term is the negative log-likelihood `distance / exp(logvar) + logvar`; its optimum has
    `exp(logvar)` equal to the mean distance. Latent diffusion divides the perceptual term by the
    same variance, and so does `VAELoss`. `logvar` is trained by the generator's optimizer.

    Args:
        weight: Factor of the term in the total.
        base: Distance of each voxel.
        channels: Output channels of the model; 1 also serves any number of channels together.
        logvar_init: Log-variance at the start.
    """

    weighted = True

    def __init__(
        self,
        weight: float = 1.0,
        base: Callable[[], Pointwise] = L1,
        channels: int = 1,
        logvar_init: float = 0.0,
    ):
        super().__init__(weight)
        self.base = base()
        self.logvar = nn.Parameter(torch.full((channels,), float(logvar_init)))

    @property
    def precision(self) -> Tensor:
        """Inverse variance that other distances in intensity space are multiplied with."""
        return (-self.logvar).exp().mean()

    def check(self, shape: Sequence[int]) -> None:
        """See `Term`."""
        if len(self.logvar) not in (1, shape[0]):
            raise ValueError(
                f"LearnedVariance.channels is {len(self.logvar)}, the model has {shape[0]} "
                f"output channels; set it to {shape[0]} or 1"
            )

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: object = None,
        step: int = 0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the negative log-likelihood, mean over samples, channels and voxels."""
        self.check(x.shape[1:])
        distance = self.base.pointwise(recon - x)
        if weight is not None:
            distance = distance * weight
        distance = distance.transpose(0, 1).flatten(1).mean(1)  # (c,)
        self.scalars = {"distance": distance.mean().detach(), "logvar": self.logvar.mean().detach()}
        return (distance * (-self.logvar).exp() + self.logvar).mean()


class SSIM(Term):
    """1 - SSIM in 2D or 3D: Wang et al. 2004, eq. 13, over every window that fits.

    Equal to scikit-image (`gaussian_weights=True, use_sample_covariance=False`, or a uniform
    window) and to MONAI's SSIMLoss at the same settings.

    Args:
        weight: Factor of the term in the total.
        data_range: Largest minus smallest intensity.
        window: Length of the window in voxels, odd.
        sigma: Standard deviation of the Gaussian window in voxels; None for a uniform window.
    """

    weighted = True

    def __init__(
        self,
        weight: float = 1.0,
        data_range: float = 1.0,
        window: int = 11,
        sigma: float | None = 1.5,
    ):
        super().__init__(weight)
        if window % 2 == 0 or window < 3:
            raise ValueError(f"SSIM.window is {window}; it must be odd and at least 3")
        self.c1, self.c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        taps = torch.arange(window) - window // 2
        kernel = torch.ones(window) if sigma is None else torch.exp(-0.5 * (taps / sigma) ** 2)
        self.kernel = (kernel / kernel.sum()).tolist()

    def check(self, shape: Sequence[int]) -> None:
        """See `Term`."""
        size, smallest = len(self.kernel), min(shape[1:])
        if smallest < size:
            raise ValueError(
                f"SSIM.window {size} is larger than the patch {tuple(shape[1:])}; "
                f"set a window of at most {smallest}"
            )

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: object = None,
        step: int = 0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return 1 - SSIM, mean over samples, channels and windows."""
        self.check(x.shape[1:])
        maps = torch.stack((x, recon, x * x, recon * recon, x * recon))
        mean_x, mean_r, xx, rr, xr = self._smooth(maps.flatten(0, 1)).unflatten(0, (5, -1))
        var_x, var_r, cov = xx - mean_x**2, rr - mean_r**2, xr - mean_x * mean_r
        structure = (2 * cov + self.c2) / (var_x + var_r + self.c2)
        luminance = (2 * mean_x * mean_r + self.c1) / (mean_x**2 + mean_r**2 + self.c1)
        if weight is None:
            return 1 - (structure * luminance).mean()
        for axis in range(2, x.ndim):  # to the middles of the windows
            weight = weight.narrow(axis, len(self.kernel) // 2, structure.shape[axis])
        return mean(1 - structure * luminance, weight)

    def _smooth(self, image: Tensor) -> Tensor:
        """Weighted mean in each window, one axis after the other; only windows that fit."""
        size = len(self.kernel)
        for axis in range(2, image.ndim):
            # Shifted sums: exact in float32 everywhere (a GPU's conv may use TF32, which the
            # difference E[x^2] - E[x]^2 does not survive) and faster than one-channel convolutions.
            num = image.shape[axis] - size + 1
            image = sum(tap * image.narrow(axis, i, num) for i, tap in enumerate(self.kernel))
        return image


class GradientDifference(Term):
    """Difference of edge strengths along each axis: Mathieu et al. 2016, eq. 6.

    Args:
        weight: Factor of the term in the total.
        power: Exponent alpha of the difference, 1 or 2.
    """

    weighted = True

    def __init__(self, weight: float = 1.0, power: int = 1):
        super().__init__(weight)
        self.power = power

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: object = None,
        step: int = 0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return | |dx| - |drecon| |^power, mean over voxels, then over axes."""
        axes = [axis for axis in range(2, x.ndim) if x.shape[axis] > 1]
        return add_up(self.gap(x, recon, axis, weight) for axis in axes) / len(axes)

    def gap(self, x: Tensor, recon: Tensor, axis: int, weight: Tensor | None = None) -> Tensor:
        """Return the mean along one axis."""
        gap = (x.diff(dim=axis).abs() - recon.diff(dim=axis).abs()).abs().pow(self.power)
        return mean(gap, None if weight is None else lesser(weight, axis))


def lesser(weight: Tensor, axis: int) -> Tensor:
    """The lesser of each two weights that are neighbors along an axis."""
    n = weight.shape[axis] - 1
    return torch.minimum(weight.narrow(axis, 0, n), weight.narrow(axis, 1, n))


class FocalFrequency(Term):
    """Squared distance of spectra that weighs badly fitted frequencies more: Jiang et al. 2021.

    Args:
        weight: Factor of the term in the total.
        alpha: Exponent of the weights; 0 weighs all frequencies alike (then this is L2).
    """

    weighted = True

    def __init__(self, weight: float = 1.0, alpha: float = 1.0):
        super().__init__(weight)
        self.alpha = alpha

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: object = None,
        step: int = 0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted squared distance, mean over samples, channels and frequencies."""
        axes = tuple(range(2, x.ndim))
        # The squared spectrum of sqrt(w) e has the mean of w e^2.
        error = recon - x if weight is None else (recon - x) * weight.sqrt()
        gap = torch.fft.fftn(error, dim=axes, norm="ortho")
        power = gap.real.square() + gap.imag.square()  # no abs(): its gradient at 0 is undefined
        focus = power.detach().pow(self.alpha / 2)
        focus = focus / focus.amax(axes, keepdim=True).clamp_min(1e-12)
        return (focus * power).mean()
