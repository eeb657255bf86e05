"""Anomaly maps: where volumes are not what a network that has seen healthy ones makes of them."""

import hashlib
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loaders import VolumeStore, write_volume
from loaders.texts import misfit, read_json
from loaders.undo import undo
from loaders.versions import version_of
from loaders.whole import write_text
from vae3d.inference.evaluation import (
    finite_json,
    foreground_of,
    modes_taken,
    summarize,
    write_csv,
)
from vae3d.inference.healthy import Healthy, magnitude
from vae3d.inference.metrics import auroc, average_precision
from vae3d.inference.reconstruct import Coding, autoencode
from vae3d.kernels.progress import part
from vae3d.models.custom_vae import CustomVAE
from vae3d.tracking.media import case_stem

VERSION = 2  # of the rows: raised when the same options give others, so that old ones are redone


class Finder:
    """Makes the maps of a store's volumes, and measures them.

    Args:
        vae: The model, in eval mode on its device.
        coding: How volumes go through it.
        store: Volumes to look at.
        controls: Healthy ones, for a z-map; None for none.
        out: Where results go.
        facts: What the numbers depend on beside the volumes.
        kind: z | error.
        by_voxel: Whether each voxel has a mean and spread of its own.
        lesions: Labels that are lesions; None for all but 0.
    """

    def __init__(
        self, vae: CustomVAE, coding: Coding, store: VolumeStore, controls: VolumeStore | None,
        out: Path, facts: dict, kind: str, by_voxel: bool, lesions: tuple[int, ...] | None,
    ):  # fmt: skip
        self.vae, self.coding, self.store, self.controls = vae, coding, store, controls
        self.out, self.kind, self.by_voxel, self.lesions = out, kind, by_voxel, lesions
        self.facts = {**facts, "kind": kind}
        healthy = []
        if controls is not None:
            self.facts |= {"calibrated": "voxel" if by_voxel else "pooled"}
            healthy = [controls.meta(i)["key"] for i in range(len(controls))]
        self.key = key_of(VERSION, self.facts, coding.facts(), healthy)
        self.kept = out / f"healthy_{self.key}.pt"
        self.healthy: Healthy | None = None

    def todo(self) -> list[VolumeStore]:
        """Stores whose volumes will go through the network."""
        names = [name for i, name in enumerate(self.store.ids) if self.finished(i) is None]
        stores = [self.store.subset(names)] if names else []
        if self.controls is not None and not self.kept.is_file():
            stores.insert(0, self.controls)
        return stores

    def error(self, store: VolumeStore, index: int) -> tuple[Tensor, Tensor, str]:
        """Volume minus reconstruction `(C, X, Y, Z)`, the voxels that count, and the mode."""
        x = torch.from_numpy(store.read(index))
        coding = self.coding.settled(self.vae, x.shape[1:])
        recon = autoencode(self.vae, x, name=store.ids[index], **vars(coding))[0]
        source = torch.from_numpy(store.read_unclipped(index))
        counts = foreground_of(store, index, source).whole()
        if (seen := store.seen(index)) is not None:
            counts &= torch.from_numpy(seen)
        return x - recon, counts, coding.mode

    def calibrate(self, voxels: int) -> None:
        """Measure the error of the healthy volumes, or read what was measured.

        Args:
            voxels: Of all the work, for the progress.
        """
        if (controls := self.controls) is None:
            return
        if self.kept.is_file():
            self.healthy = Healthy.load(self.kept)
            return
        shape = controls.shape(0)[1:] if self.by_voxel else None
        healthy = Healthy(controls.num_channels, shape)
        for index in range(len(controls)):
            with part(math.prod(controls.shape(index)[1:]) / voxels):
                healthy.add(*self.error(controls, index)[:2])
        self.out.mkdir(parents=True, exist_ok=True)
        healthy.save(self.kept)
        self.healthy = healthy

    def finished(self, index: int) -> dict | None:
        """The row of a volume whose map lies there; None where something is missing."""
        stem = case_stem(self.store.ids[index])
        record, path = self.out / "rows" / f"{stem}.json", self.out / "maps" / f"{stem}.nii.gz"
        if not (record.is_file() and path.is_file()):
            return None
        content = read_json(record)
        if found := misfit(content, {"key": str, "row": {str: (float, str, None)}}):
            raise ValueError(f"{record}: damaged ({found}); delete it, it is made again")
        return content["row"] if content["key"] == self.row_key(index) else None

    def row_key(self, index: int) -> str:
        """Names what a volume's map and row depend on."""
        labels = self.store.entries[index].subject.label_map
        told = (str(labels), version_of(labels)) if labels else None
        return key_of(self.key, self.store.meta(index)["key"], told, self.lesions)

    def volume(self, index: int) -> dict:
        """Write the map of a volume and return its row, unless it is finished."""
        if (row := self.finished(index)) is not None:
            return row
        case = self.store.ids[index]
        error, counts, mode = self.error(self.store, index)
        shown = error if self.healthy is None else self.healthy.z(error)
        if (seen := self.store.seen(index)) is not None:
            shown = shown * torch.from_numpy(seen)
        record = self.store.undo_record(index)
        steps = [s / g for s, g in zip(record["scale"], record["gain"], strict=True)]
        scale = steps if self.kind == "error" else [1.0] * len(shown)
        # A difference: the file's offset does not belong to it, and beyond a crop there is none.
        nothing = [0.0] * len(shown)
        plain = {"gain": [1.0] * len(shown), "bias": nothing, "scale": scale, "offset": nothing}
        path = self.out / "maps" / f"{case_stem(case)}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_volume(path, undo(shown.numpy(), record | plain | {"background": nothing}))
        row = {"case": case, **self.measure(index, magnitude(shown), counts)}
        if self.coding.mode == "auto":
            row["mode"] = mode
        text = json.dumps({"key": self.row_key(index), "row": row}, indent=1)
        write_text(self.out / "rows" / f"{case_stem(case)}.json", text)
        return row

    def measure(self, index: int, score: Tensor, counts: Tensor) -> dict:
        """How anomalous a volume is, and how well the map finds its lesions."""
        inside = score[counts].double()
        row: dict = {f"mean_{self.kind}": float(inside.mean()) if len(inside) else math.nan}
        if self.kind == "z":
            row["beyond_3"] = float((inside > 3).double().mean()) if len(inside) else math.nan
        labels = self.store.label_map(index)
        if labels is None:
            return row
        lesion = labels != 0 if self.lesions is None else np.isin(labels, self.lesions)
        where = counts.numpy() | lesion  # a lesion counts wherever it lies
        if (seen := self.store.seen(index)) is not None:
            where &= seen
        of, truth = score.numpy()[where], lesion[where]
        row["lesion_fraction"] = float(truth.mean()) if truth.size else math.nan
        return row | {
            "auroc": auroc(of, truth),
            "average_precision": average_precision(of, truth),
        }

    def line(self, row: dict) -> str:
        """A volume's numbers for the console."""
        told = [f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)]
        return f"{row['case']}: {'  '.join(t for t in told if not t.endswith(' nan'))}"

    def finish(self) -> str:
        """Write anomaly.csv and summary.json; a sentence on what was found."""
        rows = [self.volume(i) for i in range(len(self.store))]
        write_csv(self.out / "anomaly.csv", rows)
        healthy = None if self.controls is None else self.controls.ids
        how = modes_taken(self.coding, rows)
        summary = {**self.facts, **how, "healthy": healthy, "lesions": self.lesions}
        summary |= summarize(rows)
        text = json.dumps(finite_json(summary), indent=1)
        write_text(self.out / "summary.json", text + "\n")
        found = [row for row in rows if math.isfinite(row.get("auroc", math.nan))]
        line = f"{len(rows)} maps in {self.out / 'maps'}"
        if found:
            area, precision, chance = (
                statistics.fmean(row[name] for row in found)
                for name in ("auroc", "average_precision", "lesion_fraction")
            )
            line += (
                f": over {len(found)} volumes with lesions AUROC {area:.3f}, average precision "
                f"{precision:.3f} (by chance {chance:.3f})"
            )
        return line


def key_of(*parts: object) -> str:
    """A name for what depends on some facts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
