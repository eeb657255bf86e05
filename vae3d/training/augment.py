"""Random changes of training patches on the device, so that a GPU need not wait for processes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders import Batch
from vae3d.training.task import noise_of_sample


@dataclass(frozen=True)
class Augmentation:
    """Flips, rotations, scalings and noise of training patches, made on the device.

    What happens to a sample depends on the seed, the step and the sample alone.

    Args:
        flip: Axes along which half of the patches are mirrored, e.g. [0] for left and right.
        rotation_deg: Largest rotation about each axis [degrees], on the grid of voxels; of slices
            about their one axis, the last.
        scaling: Largest change in size, as a part of it.
        noise: Largest standard deviation of Gaussian noise, in normalized intensities.
    """

    flip: tuple[int, ...] = ()
    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scaling: float = 0.0
    noise: float = 0.0

    def check(self, dims: int) -> None:
        """Raise ValueError unless these are augmentations of patches with `dims` axes."""
        if min(self.rotation_deg) < 0 or not 0 <= self.scaling < 1 or self.noise < 0:
            raise ValueError(
                "--augment: rotation_deg and noise must be at least 0, scaling from 0 to below 1"
            )
        if set(self.flip) - set(range(dims)):
            raise ValueError(
                f"--augment.flip {list(self.flip)}: the model has the axes {list(range(dims))}"
            )
        if dims == 2 and any(self.rotation_deg[:2]):
            raise ValueError(
                f"--augment.rotation_deg {list(self.rotation_deg)}: slices turn about their one"
                f" axis, the last: [0, 0, {max(self.rotation_deg):g}]"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch, seed: int, step: int) -> Batch:
        """The batch with its samples changed; the weights of voxels move with these.

        Args:
            batch: On the device.
            seed: Of the run.
            step: Number of optimizer updates done.
        """
        draws = [random.Random(f"{seed}/{step}/{int(index)}") for index in batch.index]
        x, weight, dims = batch.image, batch.weight, batch.image.ndim - 2
        axes = [[a for a in self.flip if a < dims and draw.random() < 0.5] for draw in draws]
        x, weight = mirrored(x, axes), None if weight is None else mirrored(weight, axes)
        if max(*self.rotation_deg, self.scaling) > 0:
            maps = torch.stack([self.affine(draw, x.shape[2:]) for draw in draws])
            maps = maps.to(x.device, non_blocking=True)
            x = resampled(x, maps, "bilinear", "reflection")
            weight = None if weight is None else resampled(weight, maps, "nearest", "zeros")
        if self.noise:
            x = x + torch.stack([self.noise_of(draw, x[i], seed, step, int(batch.index[i]))
                                 for i, draw in enumerate(draws)])  # fmt: skip
        return replace(batch, image=x, weight=weight)

    def affine(self, draw: random.Random, shape: Sequence[int]) -> Tensor:
        """A drawn map from voxels of the result to voxels of the patch, as `affine_grid` takes it.

        Args:
            draw: Random numbers of the sample.
            shape: Of the patch [voxels].
        """
        dims = len(shape)
        matrix = torch.eye(dims) / (1 + draw.uniform(-self.scaling, self.scaling))
        for axis, most in enumerate(self.rotation_deg):
            angle = math.radians(draw.uniform(-most, most))
            plane = [a for a in range(3) if a != axis]
            if max(plane) < dims:
                matrix = matrix @ rotation(angle, plane, dims)
        sizes = torch.tensor([float(n) for n in shape])
        matrix = matrix * sizes / sizes[:, None]  # coordinates run from -1 to 1 along every axis
        return F.pad(matrix.flip(0, 1), (0, 1))  # the last axis comes first there

    def noise_of(self, draw: random.Random, x: Tensor, seed: int, step: int, index: int) -> Tensor:
        """Drawn noise for one sample."""
        return draw.uniform(0, self.noise) * noise_of_sample(
            x.shape, f"augmentation of {seed}", step, index, x.device
        )


def rotation(angle: float, plane: Sequence[int], dims: int) -> Tensor:
    """Matrix that rotates by `angle` [rad] in the plane of two axes."""
    a, b = plane
    matrix = torch.eye(dims)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def mirrored(x: Tensor, axes: Sequence[Sequence[int]]) -> Tensor:
    """`(B, C, *n)` with each sample mirrored along axes of its own."""
    if not any(axes):
        return x
    return torch.stack([s.flip([1 + a for a in own]) for s, own in zip(x, axes, strict=True)])


def resampled(x: Tensor, maps: Tensor, mode: str, outside: str) -> Tensor:
    """`(B, C, *n)` read where `maps` point to, with what lies `outside` reflected or zeros."""
    grid = F.affine_grid(maps, [len(x), 1, *x.shape[2:]], align_corners=False)
    return F.grid_sample(x, grid, mode, outside, align_corners=False)
