"""Volumes to latents and back: in one full pass, in blended patches, or exactly in bounded memory.

A reconstruction is what the latent of the volume decodes to, in every mode: the latent that is
measured, exported and diffused is the one that made the picture. In mode patch the latents of
overlapping patches are blended into one, and that one is decoded, in overlapping patches again.
(Blending reconstructions of patches instead would take 8 times the latent values at an overlap of
one half.) A 2D model codes a volume slice by slice; its latent keeps the axis that is sliced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vae3d.exact.executor import check_budget, check_size, decode_exact, encode_exact
from vae3d.inference.stitching import BLENDS, check_patch, overlap_voxels, stitch, tile_faces
from vae3d.models.custom_vae import CustomVAE

MODES = ("full", "patch", "exact")


@dataclass(frozen=True)
class Coding:
    """How a volume goes through a VAE.

    Args:
        mode: full (one pass) | patch (overlapped patches, blended) | exact (equal to full, layer by
            layer in bounded memory).
        patch_size: Patch in voxels for mode patch, a multiple of the model's factor.
        overlap: Overlap of neighboring patches: fraction of the patch (float) or voxels (int), one
            or one per axis.
        blend: hann | gaussian | average | crop.
        batch_size: Patches in a forward pass.
        memory_gb: Memory budget of mode exact in GiB; None takes half of what is free.
        slice_axis: For a 2D model: the axis that slices are cut across.
        num_slices: For a 2D model: neighboring slices that are its input channels.
    """

    mode: str = "full"
    patch_size: Sequence[int] | None = None
    overlap: float | int | Sequence = 0.5
    blend: str = "hann"
    batch_size: int = 1
    memory_gb: float | None = None
    slice_axis: int = 2
    num_slices: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.mode == "patch" and self.patch_size is None:
            raise ValueError("mode patch needs patch_size, for example '[64,64,64]'")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more")
        check_budget(self.memory_gb)
        if self.slice_axis not in (0, 1, 2) or self.num_slices not in range(1, 2**16, 2):
            raise ValueError(
                f"slice_axis is {self.slice_axis} and num_slices {self.num_slices}: use 0 to 2, and"
                " an odd number"
            )
        if self.blend not in BLENDS:
            raise ValueError(f"blend {self.blend!r} is unknown; choose one of {', '.join(BLENDS)}")

    def facts(self) -> dict:
        """What the latents depend on, JSON-able; `Coding(**facts)` decodes alike."""
        names = ["mode", "slice_axis", "num_slices"]
        if self.mode == "patch":
            names += ["patch_size", "overlap", "blend"]
        facts = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}

    @torch.no_grad()
    def encode(self, vae: CustomVAE, x: Tensor, name: str = "the volume") -> tuple[Tensor, Tensor]:
        """Posterior of a volume.

        Args:
            vae: The model, in eval mode.
            x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized as the model was trained; any device.
            name: Of the volume, for messages.

        Returns:
            mean and logvar, `(C', *spatial)`, float32 on the device of `x`.

        Raises:
            ValueError: It is not finite.
        """
        check_finite(x, name)
        return self._encode(vae, x)

    def _encode(self, vae: CustomVAE, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim == 4 and vae.spatial_dims == 2:
            axis, half = 1 + self.slice_axis, self.num_slices // 2
            planes = x.movedim(axis, 0)
            near = torch.arange(len(planes))[:, None] + torch.arange(-half, half + 1)
            stacks = planes[near.clamp(0, len(planes) - 1)].flatten(1, 2)
            parts = [self._encode(vae, stack) for stack in stacks]
            mean, logvar = (torch.stack(part, axis) for part in zip(*parts, strict=True))
            return mean, logvar
        if self.mode == "exact":
            posterior = encode_exact(vae, x, self.memory_gb)
            return posterior.mean.float().to(x.device), posterior.logvar.float().to(x.device)

        def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
            posterior = vae.encode(batch.to(_home(vae)))
            return posterior.mean.float().to(x.device), posterior.logvar.float().to(x.device)

        if self.mode == "full":
            mean, logvar = forward(x[None])
            return mean[0], logvar[0]
        scale = [Fraction(1, f) for f in vae.factor]
        options = (*self._tiling(vae), self.blend, self.batch_size)
        mean, logvar = stitch(forward, x, *options, scale=scale)
        return mean, logvar

    @torch.no_grad()
    def decode(
        self, vae: CustomVAE, z: Tensor, size: Sequence[int] | None = None, name: str = "the latent"
    ) -> Tensor:
        """Reconstruction of a latent.

        Args:
            vae: The model, in eval mode.
            z: `(C', *spatial)`, as `encode` gives its mean; any device.
            size: Voxels per axis of the volume; None for those of the latent times the factor.
            name: Of the latent, for messages.

        Returns:
            `(C, *size)`, normalized intensities, float32 on the device of `z`.

        Raises:
            ValueError: It is not finite.
        """
        check_finite(z, name)
        return self.decode_as_it_is(vae, z, size)

    @torch.no_grad()
    def decode_as_it_is(
        self, vae: CustomVAE, z: Tensor, size: Sequence[int] | None = None
    ) -> Tensor:
        """`decode` of a latent that nobody has looked at."""
        if z.ndim == 4 and vae.spatial_dims == 2:
            axis = 1 + self.slice_axis
            size = size and [n for i, n in enumerate(size) if i != self.slice_axis]
            planes = [self.decode_as_it_is(vae, plane, size) for plane in z.unbind(axis)]
            return torch.stack([self._middle(vae, plane) for plane in planes], axis)
        size = size or [n * f for n, f in zip(z.shape[1:], vae.factor, strict=True)]
        if self.mode == "exact":
            return decode_exact(vae, z, self.memory_gb, size=size).float().to(z.device)

        def forward(batch: Tensor) -> Tensor:
            return vae.decode(batch.to(_home(vae))).float().to(z.device)

        if self.mode == "full":
            x = forward(z[None])[0]
        else:
            tiling = self._tiling(vae)
            tile, overlap = ([n // f for n, f in zip(s, vae.factor, strict=True)] for s in tiling)
            options = (overlap, self.blend, self.batch_size)
            x = stitch(forward, z, tile, *options, scale=list(vae.factor))
        check_size(size, x.shape[1:])
        return x[(slice(None), *(slice(n) for n in size))]

    def factor(self, vae: CustomVAE, dims: int) -> list[int]:
        """Voxels per latent voxel and axis; a 2D model does not shrink the axis that is sliced.

        Args:
            vae: The model.
            dims: Spatial axes of the latents.
        """
        factor = list(vae.factor)
        if dims > len(factor):
            factor.insert(self.slice_axis, 1)
        return factor

    def check(self, vae: CustomVAE) -> None:
        """Refuse patches that do not go with a model, before anything is read or written."""
        if self.mode == "patch":
            assert self.patch_size is not None
            check_patch(self.patch_size, vae.factor)
            ends = [1] * vae.spatial_dims
            tile_faces(ends, self.patch_size, self.overlap, self.blend)  # overlap < patch

    def slices_of(self, vae: CustomVAE) -> int:
        """Slices of a volume that become input channels of the model."""
        return self.num_slices if vae.spatial_dims == 2 else 1

    def _tiling(self, vae: CustomVAE) -> tuple[Sequence[int], Sequence[int]]:
        """Patch and overlap in whole latent voxels, so that both ways have the same tiles."""
        assert self.patch_size is not None  # said on the way in, in mode patch
        check_patch(self.patch_size, vae.factor)
        return self.patch_size, overlap_voxels(self.patch_size, self.overlap, vae.factor)

    def _middle(self, vae: CustomVAE, plane: Tensor) -> Tensor:
        """Of a reconstruction of neighboring slices `(n C, X, Y)`, the middle one."""
        if len(plane) < vae.in_channels:
            return plane  # the model gives one slice for several
        channels = len(plane) // self.num_slices
        first = self.num_slices // 2 * channels
        return plane[first : first + channels]


def check_finite(values: Tensor, name: str) -> None:
    """Refuse a volume or latent that is not finite.

    Statistics of norms would make all of it NaN, and without norms the sums over four rows at once,
    which serve at inference, would carry it to rows that it does not touch.
    """
    if not (finite := values.isfinite()).all():
        count = values.numel() - int(finite.sum())
        raise ValueError(f"{name}: {count} of {values.numel()} values are NaN or infinite")


def coding_of(made_by: dict, **given: Any) -> Coding:
    """The `Coding` with which some latents were made.

    Args:
        made_by: What the latents say of their origin.
        **given: Options of `Coding` that shall differ; those that are None do not.
    """
    names = {field.name for field in fields(Coding)}
    kept = {k: v for k, v in made_by.items() if k in names}
    return Coding(**kept | {k: v for k, v in given.items() if v is not None})


def reconstruct(vae: CustomVAE, x: Tensor, mode: str = "patch", **how: Any) -> Tensor:
    """The reconstruction of one volume through the posterior mean.

    Args:
        vae: The model, in eval mode.
        x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized as the model was trained; any device.
        mode: full | patch | exact.
        **how: Further options of `Coding`.

    Returns:
        `(C, X, Y, Z)` float32 on the device of `x`.
    """
    return autoencode(vae, x, mode, **how)[0]


def autoencode(
    vae: CustomVAE, x: Tensor, mode: str = "patch", name: str = "the volume", **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct one volume through the posterior mean, and return the posterior as well.

    Args:
        vae: The model, in eval mode.
        x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized as the model was trained; any device.
        mode: full | patch | exact.
        name: Of the volume, for messages.
        **how: Further options of `Coding`.

    Returns:
        recon `(C, X, Y, Z)`, and mean and logvar of the latent; float32 on the device of `x`.
    """
    coding = Coding(mode, **how)
    mean, logvar = coding.encode(vae, x, name)
    # What a network that has diverged makes of it is measured, not refused.
    return coding.decode_as_it_is(vae, mean, x.shape[1:]), mean, logvar


def _home(vae: CustomVAE) -> torch.device:
    return next(vae.parameters()).device
