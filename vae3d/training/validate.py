"""Validation on fixed volumes, shared out over the ranks, and pictures of a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from vae3d.inference.metrics import mae, psnr
from vae3d.inference.reconstruct import reconstruct
from vae3d.tracking.media import save_views
from vae3d.tracking.probes import LatentProbes
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
        self.rows: list[dict[str, Any]] = []
        self.probes: LatentProbes | None = None

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Return val/mae and val/psnr, means over the volumes, the same on every rank.

        The peak of the PSNR is the width of the store's data range. `rows` keeps the scores of
        each volume.
        """
        lo, hi = self.store.data_range
        scores = {}
        for i in self.volumes[self.world.rank :: self.world.size]:
            x, recon = self.reconstruct(network, i)
            scores[i] = {"mae": mae(x, recon, hi - lo), "psnr": psnr(x, recon, hi - lo)}
        for part in self.world.gather(scores):
            scores |= part
        self.rows = [{"case": self.store.ids[i], **scores[i]} for i in self.volumes]
        return {f"val/{name}": fmean(row[name] for row in self.rows) for name in ("mae", "psnr")}

    def reconstruct(self, network: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a volume `(C, X, Y, Z)` and its reconstruction, both on the CPU."""
        x = torch.from_numpy(self.store.read(index))
        if self.patch_size is None:
            return x, reconstruct(network, x, mode="full")
        return x, reconstruct(
            network, x, mode="patch", patch_size=self.patch_size, overlap=self.overlap
        )

    def show(
        self, network: nn.Module, step: int, tracker: Tracker | None, folder: Path, count: int
    ) -> None:
        """Write input | recon | error of the first `count` volumes, and probes of the latents.

        The forward passes happen here; drawing and encoding happen on the tracker's thread.
        """
        folder = folder / f"step_{step:08d}"
        shown = self.volumes[:count]
        for i in shown:
            x, recon = self.reconstruct(network, i)
            if tracker is None:  # a rank that only lends its part of the weights
                continue
            tracker.in_background(
                _views,
                folder,
                self.store.ids[i],
                x.numpy(),
                recon.numpy(),
                self.store.spacing_mm(i),
                self.store.data_range,
                step=step,
                title=f"{self.store.ids[i]}   step {step}",
                window_hu=self._window_hu(),
            )
        if not shown:
            return
        if self.probes is None:
            self.probes = LatentProbes(
                [torch.from_numpy(self.store.read(i)) for i in self.volumes[:2]],
                self.patch_size,
                self.store.spacing_mm(shown[0]),
                self.store.data_range,
            )
        measured = self.probes.measure(network)
        if tracker is not None:
            tracker.log(measured.numbers, step)
            tracker.in_background(self.probes.draw, measured, folder, step=step)

    def _window_hu(self) -> tuple[float, float] | None:
        """HU of the ends of the data range, where it has such."""
        preprocess = self.store.preprocess
        return preprocess.window_hu if preprocess.intensity in ("unit", "symmetric") else None


def _views(folder: Path, case: str, *args, **view) -> dict[str, Path]:
    """Write a case's picture and clips; return them by the name of their panel."""
    files = save_views(folder, case, *args, separate=True, **view)
    return {f"views/{case}/{kind}": path for kind, path in files.items()}
