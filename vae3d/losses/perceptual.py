"""Perceptual distance: how far apart two volumes are in the features of a frozen network.

Zhang et al. 2018, eq. 1: features are scaled to unit length along channels, their squared
differences weighted per channel, averaged over space and summed over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.losses.features import DeepBet, FeatureNetwork
from vae3d.losses.slices import draw_slices, mean_over_slices, take_slices
from vae3d.losses.term import Term, add_up, mean
from vae3d.models.norm import wide

EPS = 1e-6  # under the root: at a zero feature vector its gradient would be NaN


class Perceptual(Term):
    """Distance in the features of a network that is neither trained nor saved.

    Args:
        weight: Factor of the term in the total.
        view: `slices` shows a 2D network random slices of the three planes (2.5D), `volume` shows a
            3D network the whole patch.
        network: The frozen network, see `features.py`.
        num_slices: Slices of each volume a step, over all planes together.
        data_range: Lowest and highest intensity of the volumes; the networks see it as [0, 1].
        seed: Seed of the slice positions.
    """

    autocast = True
    weighted = True

    def __init__(
        self,
        weight: float = 0.1,
        view: Literal["slices", "volume"] = "volume",
        network: Callable[[], FeatureNetwork] = DeepBet,
        num_slices: int = 6,
        data_range: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ):
        super().__init__(weight)
        if num_slices < 1 or data_range[0] >= data_range[1]:
            raise ValueError(
                f"Perceptual.num_slices {num_slices} must be at least 1 and data_range "
                f"{tuple(data_range)} must rise"
            )
        # In a list, so that it is no submodule: its weights are neither saved nor trained.
        self._network = [network().eval().requires_grad_(False)]
        dims = {"slices": 2, "volume": 3}[view]
        if self.network.spatial_dims != dims:
            raise ValueError(
                f"Perceptual.view {view!r} needs a {dims}D network, "
                f"{type(self.network).__name__} is {self.network.spatial_dims}D"
            )
        self.num_slices, self.data_range, self.seed = num_slices, data_range, seed

    @property
    def network(self) -> FeatureNetwork:
        """The frozen network."""
        return self._network[0]

    def check(self, shape: Sequence[int]) -> None:
        """See `Term`."""
        if len(shape) == 3 and self.network.spatial_dims == 3:
            raise ValueError("Perceptual.view is 'volume' but the volumes are 2D; set it to slices")

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: object = None,
        step: int = 0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the distance, mean over samples, channels and slices.

        With a mask a feature weighs what the voxels under it do on average.
        """
        self.check(x.shape[1:])
        dims = self.network.spatial_dims
        if weight is not None:
            weight = weight.expand_as(x)
        if x.ndim == 2 + dims:
            return self.distance(x, recon, weight)
        picks = draw_slices(tuple(x.shape[2:]), self.num_slices, step, self.seed)
        cuts = [take_slices(volume, picks) for volume in (x, recon, weight) if volume is not None]
        return mean_over_slices([self.distance(*cut) for cut in zip(*cuts, strict=True)], picks)

    def distance(self, x: Tensor, recon: Tensor, weight: Tensor | None = None) -> Tensor:
        """Distance of `(N, C, *spatial)` at the network's own dimensions, a scalar."""
        low, high = self.data_range
        x, recon = (((t - low) / (high - low)).flatten(0, 1).unsqueeze(1) for t in (x, recon))
        with torch.no_grad():
            wanted = self.network(x)
        got = self.network(recon)
        weights: Sequence[Tensor | float] = self.network.layer_weights or [1.0] * len(got)
        with torch.autocast(x.device.type, enabled=False):
            return add_up(
                mean((w * (_unit(a) - _unit(b)).square()).sum(1), _pooled(weight, a.shape[2:]))
                for w, a, b in zip(weights, wanted, got, strict=True)
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the network along with `.to(device)`."""
        self.network._apply(fn)
        return super()._apply(fn, recurse)


def _pooled(weight: Tensor | None, size: Sequence[int]) -> Tensor | None:
    """Bring weights `(N, C, *spatial)` to a map of features, `(N * C, *size)`."""
    if weight is None:
        return None
    weight = weight.flatten(0, 1).unsqueeze(1)
    return F.interpolate(weight, tuple(size), mode="area").squeeze(1)


def _unit(features: Tensor) -> Tensor:
    """Scale `(N, C, ...)` to unit length along C, in float32 or float64."""
    features = wide(features)
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()
