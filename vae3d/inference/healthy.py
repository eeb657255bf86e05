"""What is left of healthy volumes by a network that was trained on such, to hold others against.

The signed error is the volume minus its reconstruction, so what is positive is brighter than
expected. It is not alike everywhere in healthy volumes (edges, noise, what no code keeps), so a
z-map divides what is left of it after the healthy mean by the healthy spread: of the voxel where
all volumes share a grid and there are enough of them, else of the whole foreground.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from loaders.whole import whole_file

ENOUGH = 10  # healthy volumes from which each voxel has a mean and a spread of its own
PRIOR = 4  # volumes' worth of the foreground's spread in that of a voxel


class Healthy:
    """What the error is in healthy volumes: count, mean and sum of squared deviations (Welford).

    Args:
        channels: Of the volumes.
        shape: Spatial shape that all share, for a mean and spread of each voxel; None for none.
    """

    def __init__(self, channels: int, shape: Sequence[int] | None = None):
        self.volumes = 0
        # Over the foreground of all volumes, by channel.
        self.count = 0
        self.total, self.square = torch.zeros(2, channels, dtype=torch.float64)
        self.mean = None if shape is None else torch.zeros(channels, *shape)
        self.spread = None if shape is None else torch.zeros(channels, *shape)

    def add(self, error: Tensor, foreground: Tensor) -> None:
        """Take a healthy volume's error into account.

        Args:
            error: (C, X, Y, Z).
            foreground: Voxels of the pooled mean and spread, bool (X, Y, Z).
        """
        self.volumes += 1
        inside = error[:, foreground].double()
        self.count += inside.shape[1]
        self.total += inside.sum(1)
        self.square += inside.square().sum(1)
        if self.mean is not None and self.spread is not None:
            off = error - self.mean
            self.mean += off / self.volumes
            self.spread += off * (error - self.mean)

    @property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the error over the foreground, by channel."""
        if self.count < 2:
            raise ValueError("the healthy volumes have no foreground to calibrate on")
        mean = self.total / self.count
        variance = (self.square / self.count - mean.square()).clamp(min=0)
        return mean.float(), variance.sqrt().float().clamp(min=torch.finfo(torch.float32).tiny)

    def z(self, error: Tensor) -> Tensor:
        """How many healthy standard deviations an error lies off the healthy mean, signed.

        The variance of a voxel, from few volumes, is drawn to that of the foreground, as if there
        were `PRIOR` volumes more of that: else voxels in which the few happen to agree, such as
        those of air, would be infinitely far off. One plus one over n is for the mean, which is of
        n volumes itself.

        Args:
            error: (C, X, Y, Z).
        """
        mean, sd = (v.reshape(-1, *[1] * (error.ndim - 1)) for v in self.pooled)
        if self.mean is None or self.spread is None:
            return (error - mean) / sd
        freedom = self.volumes - 1
        variance = (self.spread + PRIOR * sd.square()) / (freedom + PRIOR)
        return (error - self.mean) / (variance * (1 + 1 / self.volumes)).sqrt()

    def save(self, path: Path) -> None:
        """Write to a file, whole or not at all."""
        with whole_file(path) as temporary:
            torch.save(vars(self), temporary)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written."""
        try:
            known = torch.load(path, weights_only=True)
            healthy = cls(len(known["total"]))
            healthy.__dict__.update({name: known[name] for name in vars(healthy)})
        except (RuntimeError, TypeError, EOFError, LookupError, ValueError, OSError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, it is made again") from error
        return healthy


def magnitude(z: Tensor) -> Tensor:
    """How anomalous each voxel is, (X, Y, Z): root mean square over the channels."""
    return z.square().mean(0).sqrt()
