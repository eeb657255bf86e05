"""Distances between a volume and its reconstruction."""

from __future__ import annotations

from torch import Tensor

from vae3d.losses.term import Term


class Pointwise(Term):
    """A distance that each voxel has by itself; the term is its mean over all voxels."""

    def pointwise(self, error: Tensor) -> Tensor:
        """Return the distance of each voxel, same shape as `error = recon - x`."""
        raise NotImplementedError

    def forward(self, x: Tensor, recon: Tensor, posterior=None, step: int = 0) -> Tensor:
        """Return the mean distance over samples, channels and voxels."""
        return self.pointwise(recon - x).mean()


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
