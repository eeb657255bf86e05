"""Volumes to latents and back: one full pass, blended patches, or the exact bounded-memory pass.

A 2D model codes a volume slice by slice; its latents keep the axis that is sliced unshrunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from vae3d.inference.stitching import check_patch, stitch

MODES = ("full", "patch", "exact")


@dataclass(frozen=True)
class Coding:
    """How a volume goes through a VAE.

    Args:
        mode: full (one pass) | patch (overlapped patches, blended) | exact (as full, in bounded
            memory).
        patch_size: Patch in voxels for mode patch, a multiple of the model's factor.
        overlap: Overlap of neighboring patches as a fraction of the patch, for mode patch.
        blend: hann | gaussian | average | crop, for mode patch.
        memory_gb: Memory budget of mode exact in GiB; None takes half of what is free.
        slice_axis: For a 2D model: the axis that slices are cut across.
        num_slices: For a 2D model: neighboring slices that are its input channels.
    """

    mode: str = "full"
    patch_size: tuple[int, ...] | None = None
    overlap: float = 0.5
    blend: str = "hann"
    memory_gb: float | None = None
    slice_axis: int = 2
    num_slices: int = 1

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.mode == "patch" and self.patch_size is None:
            raise ValueError("mode patch needs --patch_size, for example '[64,64,64]'")

    def facts(self) -> dict:
        """What the latents depend on, JSON-able; `Coding(**facts)` decodes alike."""
        names = ["mode", "slice_axis", "num_slices"]
        if self.mode == "patch":
            names += ["patch_size", "overlap", "blend"]
        facts = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}

    @torch.no_grad()
    def encode(self, vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of a volume, on the CPU.

        Args:
            vae: The model, in eval mode.
            x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized.

        Returns:
            mean and logvar, `(C', *spatial)`.
        """
        if x.ndim == 4 and vae.spatial_dims == 2:
            axis, half = 1 + self.slice_axis, self.num_slices // 2
            planes = x.movedim(axis, 0)
            near = torch.arange(len(planes))[:, None] + torch.arange(-half, half + 1)
            stacks = planes[near.clamp(0, len(planes) - 1)].flatten(1, 2)
            parts = [self.encode(vae, stack) for stack in stacks]
            return tuple(torch.stack(part, axis) for part in zip(*parts, strict=True))
        device = next(vae.parameters()).device

        def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
            posterior = vae.encode(batch.to(device))
            return posterior.mean.float().cpu(), posterior.logvar.float().cpu()

        if self.mode == "patch":
            check_patch(self.patch_size, vae.factor)
            scale = [Fraction(1, f) for f in vae.factor]
            return stitch(forward, x, self.patch_size, self.overlap, self.blend, scale=scale)
        if self.mode == "exact":
            from vae3d.inference.exact import encode_exact

            posterior = encode_exact(vae, x, self.memory_gb)
            return posterior.mean.float().cpu(), posterior.logvar.float().cpu()
        return tuple(part[0] for part in forward(x[None]))

    @torch.no_grad()
    def decode(self, vae: nn.Module, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Reconstruction of a latent, on the CPU.

        Args:
            vae: The model, in eval mode.
            z: `(C', *spatial)`, as `encode` gives its mean.
            size: Voxels per axis of the volume; None for those of the latent times the factor.

        Returns:
            `(C, *size)`, normalized intensities.
        """
        if z.ndim == 4 and vae.spatial_dims == 2:
            axis = 1 + self.slice_axis
            size = size and [n for i, n in enumerate(size) if i != self.slice_axis]
            planes = [self.decode(vae, plane, size) for plane in z.unbind(axis)]
            return torch.stack([self._middle(plane) for plane in planes], axis)
        size = size or [n * f for n, f in zip(z.shape[1:], vae.factor, strict=True)]
        device = next(vae.parameters()).device

        def forward(batch: Tensor) -> Tensor:
            return vae.decode(batch.to(device)).float().cpu()

        if self.mode == "exact":
            from vae3d.inference.exact import decode_exact

            return decode_exact(vae, z, self.memory_gb, size=size)
        if self.mode == "patch":
            check_patch(self.patch_size, vae.factor)
            patch = [p // f for p, f in zip(self.patch_size, vae.factor, strict=True)]
            x = stitch(forward, z, patch, self.overlap, self.blend, scale=list(vae.factor))
        else:
            x = forward(z[None])[0]
        return x[(slice(None), *(slice(n) for n in size))]

    def _middle(self, plane: Tensor) -> Tensor:
        """Of a reconstruction of neighboring slices `(n C, X, Y)`, the middle one."""
        channels = len(plane) // self.num_slices
        first = self.num_slices // 2 * channels
        return plane[first : first + channels]

    def factor(self, vae: nn.Module, dims: int) -> list[int]:
        """Voxels per latent voxel and axis; a 2D model does not shrink the axis that is sliced.

        Args:
            vae: The model.
            dims: Spatial axes of the latents.
        """
        factor = list(vae.factor)
        if dims > len(factor):
            factor.insert(self.slice_axis, 1)
        return factor
