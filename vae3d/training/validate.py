"""Validation on fixed volumes, shared out over the ranks, and pictures of a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

import numpy as np
import torch

from vae3d.inference.metrics import by_channel, in_one_unit, mae, psnr
from vae3d.inference.reconstruct import reconstruct
from vae3d.models.custom_vae import CustomVAE
from vae3d.tracking.media import View, in_one_range, save_views
from vae3d.tracking.probes import LatentProbes
from vae3d.tracking.tracker import Tracker
from vae3d.tracking.voxels import SMALL, write_voxels
from vae3d.training.distributed import World
from vae3d.training.passes import together


class Validation:
    """Reconstructs the same whole volumes each time, so that scores of two steps compare.

    Of a volume that stays where it is and is too large for that it is a part, see
    `VolumeStore.part`.

    Args:
        store: Validation volumes, see `loaders.VolumeStore`.
        world: The ranks, which share the volumes out; none is counted twice.
        patch_size: Patches that are blended [voxels]; None for whole volumes in one pass.
        max_volumes: At most this many volumes, spread evenly over the store; None for all.
        pictured: The first so many are shown; their reconstructions stay in memory from one
            validation to the next, so that pictures of the same step cost no second pass.
        overlap: Overlap of patches, a fraction of the patch.
        radiological: Draw bodies with their right on the left.
        team: Ranks that share the passes of a volume in slabs; None for none.
        axis: The axis along which they cut it.
    """

    def __init__(
        self,
        store: Any,
        world: World,
        patch_size: Sequence[int] | None,
        max_volumes: int | None = None,
        pictured: int = 0,
        overlap: float = 0.25,
        radiological: bool = False,
        team: World | None = None,
        axis: int = 0,
    ):
        self.store, self.world, self.team, self.axis = store, world, team or World(), axis
        self.patch_size, self.overlap = patch_size, overlap
        self.radiological = radiological
        count = min(len(store), max_volumes or len(store))
        self.volumes = [i * len(store) // count for i in range(count)]
        self.shown = self.volumes[:pictured]
        self.kept: dict[tuple[int, int], torch.Tensor] = {}  # by step and volume
        self.rows: list[dict[str, Any]] = []
        self.probes: LatentProbes | None = None

    def mine(self) -> list[int]:
        """Volumes of this rank; those that are shown belong to the first, which draws them."""
        hands = [list(self.shown), *([] for _ in range(self.world.size // self.team.size - 1))]
        for i in self.volumes[len(self.shown) :]:
            min(hands, key=len).append(i)
        return hands[self.world.rank // self.team.size]

    def __call__(self, network: CustomVAE, step: int) -> dict[str, float]:
        """Return val/mae and val/psnr, means over the volumes, the same on every rank.

        Of several channels each has its own besides (val/psnr_ct). With masks only the voxels that
        count are measured. The peak of the PSNR is the width of the store's range. `rows` keeps the
        scores of each volume.
        """
        with together(network, self.team, self.axis) as works:
            scores = self.scores(network, step) if works else {}
        for part in self.world.gather(scores):
            scores |= part
        self.rows = [{"case": self.store.ids[i], **scores[i]} for i in self.volumes if i in scores]
        names = [name for name in self.rows[0] if name != "case"]
        return {f"val/{name}": fmean(row[name] for row in self.rows) for name in names}

    def scores(self, network: CustomVAE, step: int) -> dict[int, dict[str, float]]:
        """Scores of the volumes of this rank, or team."""
        scores, self.kept = {}, {}
        for i in self.mine():
            x, recon = self.reconstruct(network, i)
            if i in self.shown:
                self.kept[step, i] = recon
            seen = self.store.seen(i, self.store.part(i))
            if seen is None or seen.any():  # a slice of which nothing counts has no score
                mask = None if seen is None else torch.from_numpy(seen)
                scores[i] = self.score(x, recon, mask)
        return scores

    def score(
        self, x: torch.Tensor, recon: torch.Tensor, mask: torch.Tensor | None = None
    ) -> dict[str, float]:
        """Return mae and psnr of a volume, and of each channel where there are several."""
        ranges = self._ranges(len(x))
        pair = in_one_unit(x, recon, [hi - lo for lo, hi in ranges])
        scores = {"mae": mae(*pair, mask), "psnr": psnr(*pair, mask)}
        if len(x) > 1:
            widths, names = [hi - lo for lo, hi in ranges], self.store.channel_names
            scores |= by_channel(x, recon, widths, names, ("mae", "psnr"), mask)
        return scores

    def _ranges(self, channels: int) -> list[tuple[float, float]]:
        return self.store.channel_ranges if channels > 1 else [self.store.data_range]

    def reconstruct(
        self, network: CustomVAE, index: int, recon: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a volume `(C, X, Y, Z)` and its reconstruction, `recon` if given, on the CPU."""
        x = torch.from_numpy(self.store.read(index, self.store.part(index)))
        if recon is None:
            mode = "full" if self.patch_size is None else "patch"
            patches = {"patch_size": self.patch_size, "overlap": self.overlap}
            recon = reconstruct(network, x, mode=mode, **patches)
        return x, recon

    def show(self, network: CustomVAE, step: int, tracker: Tracker | None, folder: Path) -> None:
        """Write input | recon | error of the shown volumes, and probes of the latents.

        The forward passes happen here, as far as validation has not just done them; drawing and
        encoding happen on the tracker's thread. Nothing happens on a rank of several that has none.
        """
        if self.world.rank < self.team.size:
            with together(network, self.team, self.axis) as works:
                if works:
                    self._show(network, step, tracker, folder)

    def _show(self, network: CustomVAE, step: int, tracker: Tracker | None, folder: Path) -> None:
        folder = folder / f"step_{step:08d}"
        for i in self.shown:
            x, recon = self.reconstruct(network, i, self.kept.pop((step, i), None))
            if tracker is None:  # a rank that only lends its part of the weights
                continue
            case = self.store.ids[i]
            name = tracker.alias(case)
            tracker.in_background(
                _views,
                folder,
                case,
                x.numpy(),
                recon.numpy(),
                self.store.spacing_mm(i),
                self._ranges(len(x)),
                step=step,
                panel=f"views/{name}",
                title=f"{name}   step {step}",
                window_hu=self.store.preprocess.drawn_hu,
                layout=self.store.layout(i).read_by(self.radiological),
            )
        if not self.shown:
            return
        if self.probes is None:
            read = [self.store.read(i, self.store.part(i)) for i in self.volumes[:2]]
            probed = [torch.from_numpy(x) for x in read]
            self.probes = LatentProbes(
                probed,
                self.patch_size,
                self.store.spacing_mm(self.shown[0]),
                self._ranges(len(probed[0]))[0],  # pictures are of the first channel
                layout=self.store.layout(self.shown[0]).read_by(self.radiological),
            )
        measured = self.probes.measure(network)
        if tracker is not None:
            tracker.log(measured.numbers, step)
            tracker.in_background(self.probes.draw, measured, folder, step=step)


def _views(
    folder: Path,
    case: str,
    x: np.ndarray,
    recon: np.ndarray,
    spacing: Sequence[float],
    ranges: Sequence[tuple[float, float]],
    panel: str,
    **view: Unpack[View],
) -> dict[str, Path]:
    """Write a case's picture and clips, and what the report's viewer shows of the newest step.

    Returns:
        Pictures and clips by the name of their panel.
    """
    a, b, ends = in_one_range(ranges, x, recon)
    files = save_views(folder, case, a, b, spacing, ends, separate=True, **view)
    if x.size <= SMALL:
        layout, hu = view.get("layout"), view.get("window_hu")
        pair = (x, recon, spacing, ranges)
        write_voxels(folder.parent, case, *pair, layout=layout, window_hu=hu)
    return {f"{panel}/{kind}": path for kind, path in files.items()}
