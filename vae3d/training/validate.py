"""Validation on fixed volumes, shared out over the ranks, and pictures of a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae3d.inference.metrics import mae, psnr
from vae3d.inference.reconstruct import reconstruct
from vae3d.tracking.tracker import Tracker
from vae3d.training.distributed import World


class Validation:
    """Reconstructs the same whole volumes each time, so that scores of two steps compare.

    Args:
        store: Validation volumes, see `loaders.VolumeStore`.
        world: The ranks; each takes every `world.size`-th volume, none is counted twice.
        patch_size: Patches that are blended [voxels]; None for whole volumes in one pass.
        max_volumes: At most this many volumes, spread evenly over the store; None for all.
        overlap: Overlap of patches, a fraction of the patch.
    """

    def __init__(
        self,
        store: Any,
        world: World,
        patch_size: Sequence[int] | None,
        max_volumes: int | None = None,
        overlap: float = 0.25,
    ):
        self.store, self.world = store, world
        self.patch_size, self.overlap = patch_size, overlap
        count = min(len(store), max_volumes or len(store))
        self.volumes = [i * len(store) // count for i in range(count)]

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Return val/mae and val/psnr, means over the volumes, the same on every rank.

        The peak of the PSNR is the width of the store's data range.
        """
        lo, hi = self.store.data_range
        sums = torch.zeros(2, dtype=torch.float64)
        for i in self.volumes[self.world.rank :: self.world.size]:
            x, recon = self.reconstruct(network, i)
            sums += torch.tensor([mae(x, recon, hi - lo), psnr(x, recon, hi - lo)])
        sums = sum(self.world.gather(sums))
        means = sums / len(self.volumes)
        return {"val/mae": float(means[0]), "val/psnr": float(means[1])}

    def reconstruct(self, network: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a volume `(C, X, Y, Z)` and its reconstruction, both on the CPU."""
        x = torch.from_numpy(self.store.read(index))
        if self.patch_size is None:
            return x, reconstruct(network, x, mode="full")
        return x, reconstruct(
            network, x, mode="patch", patch_size=self.patch_size, overlap=self.overlap
        )

    def show(
        self, network: nn.Module, step: int, tracker: Tracker, folder: Path, count: int
    ) -> None:
        """Write input | recon | error of the first `count` volumes to `folder/step_...`."""
        for i in self.volumes[:count]:
            x, recon = self.reconstruct(network, i)
            tracker.in_background(
                _views,
                folder / f"step_{step:08d}",
                self.store.ids[i],
                x.numpy(),
                recon.numpy(),
                self.store.spacing_mm(i),
                self.store.data_range,
                step=step,
            )


def _views(folder: Path, case: str, *args) -> dict[str, Path]:
    """Write a case's picture and clips; return them by the name of their panel."""
    from vae3d.tracking.media import save_views

    return {f"views/{case}/{kind}": p for kind, p in save_views(folder, case, *args).items()}
