"""Evaluate volumes one by one into a folder; a volume that is done stays done.

A volume's results lie in `rows/<case>.json`, written last. Its key names all that the numbers
depend on (checkpoint, mode, the volume's own bytes), so that a second run computes only what is
missing, and any number of processes can share the volumes out.
"""

import csv
import hashlib
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loaders import VolumeStore
from loaders.layout import Layout
from loaders.texts import misfit, read_json
from loaders.undo import file_written, write_undone
from loaders.versions import version_of
from loaders.whole import write_text
from vae3d.inference.baselines import BlockPCA, pooled
from vae3d.inference.diffusability import diffusability
from vae3d.inference.files import codes_of
from vae3d.inference.metrics import (
    FOREGROUND,
    METRICS,
    by_channel,
    code_summary,
    in_one_unit,
    latent_summary,
    lattice_score,
    psnr,
    seam_score,
)
from vae3d.inference.reconstruct import Coding, autoencode, volume_of
from vae3d.inference.segmenters import Segmenter, overlaps
from vae3d.inference.stitching import tile_faces
from vae3d.kernels import large
from vae3d.kernels.large import Lazy, Values, rows_of, slabs_of, whole_of
from vae3d.kernels.progress import part
from vae3d.models.custom_vae import CustomVAE
from vae3d.reports.evaluation import write_report
from vae3d.reports.tables import sentence, write_tables
from vae3d.tracking.media import case_stem, in_one_range, save_views, write_png
from vae3d.tracking.voxels import write_voxels

VERSION = 5  # of the numbers: raised when the same options give others, so that old rows are redone

SHOWN_VOXELS = 200**3  # of a large volume in pictures
NETWORK = 0.8  # of the time of a volume, for the progress; the rest is metrics and pictures


@dataclass
class Evaluator:
    """Measures how well a model reconstructs the volumes of a store.

    Args:
        vae: The model, in eval mode on its device.
        store: Volumes, preprocessed as in training; see `loaders.VolumeStore`.
        out_dir: Where results go.
        how: Options of `autoencode`: mode, patch_size, overlap, blend and so on.
        facts: What else the numbers depend on, for the key and summary.json.
        latent_bits: Bits in which a latent value is kept.
        patch_gap: In mode patch, compare with the exact result.
        pca: Baseline fitted on the training volumes; None for none.
        perceptual: Perceptual distance `(x, recon) -> scalar`; None for none.
        save_recon: Write reconstructions.
        media: Write pictures and clips.
        radiological: Draw bodies with their right on the left.
        alias: What a case is called in pictures and in trackers.
        segmenter: What finds something in volumes and in their reconstructions; None for none.
        segmenter_name: What its column is called.
        recon_format: What reconstructions are written as, see `loaders.undo.file_written`.
        codings: How volumes of a size go through the network; filled as they come.
    """

    vae: CustomVAE
    store: VolumeStore
    out_dir: Path
    how: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    latent_bits: int = 16
    patch_gap: bool = True
    pca: BlockPCA | None = None
    perceptual: Any = None
    save_recon: bool = True
    media: bool = True
    radiological: bool = False
    alias: Callable[[str], str] = str
    segmenter: Segmenter | None = None
    segmenter_name: str = ""
    recon_format: str | None = None
    codings: dict[tuple[int, ...], Coding] = field(default_factory=dict)

    @property
    def widths(self) -> list[float]:
        """Width of each channel's intensity scale, from the preprocessing, never from an image."""
        return [hi - lo for lo, hi in self.store.channel_ranges]

    def key(self, index: int) -> str:
        """Hash of what the numbers of a volume depend on."""
        parts = {
            "version": VERSION,
            # The checkpoint's bytes, not its place.
            **{k: v for k, v in self.facts.items() if k != "checkpoint"},
            "how": self._matters(),
            "volume": self.store.meta(index)["key"],
            "data_range": self.store.channel_ranges,
            "names": self.store.channel_names,
            "columns": [
                self.latent_bits,
                self.patch_gap,
                self.pca and self.pca.key,
                self._perceptual_key,
            ],
            **(self._drawn(self.store.ids[index]) if self.media else {}),
            **self._judged(index),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _matters(self) -> dict[str, object]:
        """The options that the numbers depend on; `amp` where it is one, so that old keys hold."""
        matters = {k: v for k, v in self.how.items() if k not in ("batch_size", "memory_gb")}
        return {k: v for k, v in matters.items() if (k, v) != ("amp", "off")}

    def _judged(self, index: int) -> dict[str, object]:
        """Label map and segmenter; nothing where there is none, so that old keys hold."""
        path = self.store.entries[index].subject.label_map
        judged: dict[str, object] = {}
        if path is not None:
            judged["labels"] = [str(path), *version_of(path)]
        return judged | ({"segmenter": self.segmenter_name} if self.segmenter else {})

    def _drawn(self, case: str) -> dict[str, object]:
        """What pictures show beside the numbers; nothing where that is the usual."""
        shown_as = self.alias(case)  # pictures may have been sent
        drawn: dict[str, object] = {} if shown_as == case else {"shown_as": shown_as}
        return drawn | ({"radiological": True} if self.radiological else {})

    @cached_property
    def _perceptual_key(self) -> str | None:
        """Names the perceptual distance, its network's weights included; None for none."""
        if self.perceptual is None:
            return None
        network = self.perceptual.network
        about = hashlib.sha256(f"{self.perceptual.num_slices} {network}".encode())
        for value in network.state_dict().values():
            about.update(value.cpu().numpy().tobytes())
        return about.hexdigest()[:16]

    def finished(self, index: int) -> dict | None:
        """The row of a volume whose files all lie there; None where something is missing."""
        stem = case_stem(self.store.ids[index])
        record = self.out_dir / "rows" / f"{stem}.json"
        wanted = [self.recon_file(index)] * self.save_recon
        kinds = ("png", "gif", "mp4") * self.media
        wanted += [self.out_dir / "media" / f"{stem}.{kind}" for kind in kinds]
        if not record.is_file() or not all(path.exists() for path in wanted):
            return None
        try:
            content = read_json(record)
        except ValueError as error:
            raise ValueError(f"{error}; delete it, it is made again") from error
        if found := misfit(content, {"key": str, "row": {str: (float, str, None)}}):
            raise ValueError(f"{record}: damaged ({found}); delete it, it is made again")
        return content["row"] if content["key"] == self.key(index) else None

    def recon_file(self, index: int) -> Path:
        """Where the reconstruction of a volume is written; a folder where that is a store."""
        _, suffix = file_written(self.store.undo_record(index), self.recon_format)
        return self.out_dir / "recon" / f"{case_stem(self.store.ids[index])}{suffix}"

    def volume(self, index: int) -> dict:
        """Evaluate a volume, unless it is finished; its row of metrics."""
        if (row := self.finished(index)) is None:
            case = self.store.ids[index]
            x = volume_of(self.store, index, self.out_dir)
            coding, folder = self.coding(index), self.out_dir
            with part(NETWORK):
                recon, *latent = autoencode(self.vae, x, name=case, folder=folder, **vars(coding))
            row = {"case": case, **self.measure(index, x, recon, *latent)}
            if self.how["mode"] == "auto":
                row["mode"] = coding.mode
            self._write_files(index, x, recon, row)
            # Last, so that a volume with a row has everything; JSON's Infinity reads back.
            text = json.dumps({"key": self.key(index), "row": row}, indent=1)
            write_text(self.out_dir / "rows" / f"{case_stem(case)}.json", text)
        return row

    def measure(
        self, index: int, volume: Values, reconstruction: Tensor, mean: Tensor, logvar: Tensor
    ) -> dict:
        """All columns of a volume but its name, slab by slab.

        With a mask they are of the voxels that count: for metrics that know none, the others are
        taken from the volume into the reconstruction, so that there is no error.
        """
        source = Lazy.of(volume_of(self.store.unclipped(index), 0, self.out_dir))
        x, recon = Lazy.of(volume), Lazy.of(reconstruction)
        foreground, mask = foreground_of(self.store, index, source), seen_of(self.store, index)
        if mask is not None:
            counts = mask
            foreground = foreground.map(torch.logical_and, mask)
            blank, given = recon, x  # for the metrics that know no mask
            recon = Lazy(x.shape, lambda box: torch.where(counts[box[1:]], blank[box], given[box]))
        a, b, width = in_one_unit(x, recon, self.widths)
        row = {name: metric(a, b, width, mask) for name, metric in METRICS.items()}
        row |= self._baselines(x, recon, mask)
        row |= {f"foreground_{m}": METRICS[m](a, b, width, foreground) for m in FOREGROUND}
        row |= self._original_units(index, x, recon, mask)
        row |= self._against_source(index, x, recon, source, foreground, mask)
        if mask is not None:
            row["mask_fraction"] = share(mask)
        row |= self._latent(mean, logvar, math.prod(x.shape[1:]))
        coding = self.coding(index)
        latent = mean, logvar, self.widths
        row |= diffusability(self.vae, coding, x, *latent, mask, self.out_dir)
        if coding.mode == "patch":
            faces, factor = self.faces(x.shape[1:]), self.factor(x.ndim - 1)
            row["seam_score"] = seam_score(x, recon, faces, factor)
            if self.patch_gap and self.how["mode"] == "patch":  # not where exact was refused
                how = {**self.how, "mode": "exact", "amp": "off"}
                with part(1 - NETWORK):
                    exact = autoencode(self.vae, x, folder=self.out_dir, **how)[0]
                row["patch_gap"] = psnr(*in_one_unit(exact, recon, self.widths), mask)
        if self.perceptual is not None:
            device = next(self.vae.parameters()).device
            with torch.no_grad():
                pair = (v.whole()[None].to(device) for v in (x, recon))
                distance = self.perceptual(*pair)
            row["perceptual"] = float(distance)
        names = self.store.channel_names
        row |= by_channel(x, recon, self.widths, names, mask=mask)
        inside = by_channel(x, recon, self.widths, names, FOREGROUND, foreground)
        row |= {f"foreground_{name}": value for name, value in inside.items()}
        row |= self._by_label(index, x, recon, mask)
        if self.segmenter is not None:
            spacing = self.store.spacing_mm(index)
            found = (self.segmenter(volume.whole(), spacing) for volume in (x, recon))
            row |= overlaps(self.segmenter_name, *found)
        return row

    def _latent(self, mean: Tensor, logvar: Tensor, voxels: int) -> dict:
        """What a Gaussian latent says, or the codes."""
        if (codes := codes_of(self.vae, mean)) is None:
            return latent_summary(mean, logvar, voxels, self.latent_bits)
        return code_summary(codes, self.vae.head.num_codes, voxels)

    def _by_label(self, index: int, x: Lazy, recon: Lazy, mask: Lazy | None) -> dict[str, float]:
        """Metrics within each label of the volume's label map, of all channels and of each."""
        labels = self.store.label_map(index)
        row: dict[str, float] = {}
        pair = in_one_unit(x, recon, self.widths)
        for label in [] if labels is None else np.unique(labels[labels != 0]).tolist():
            region = Lazy.of(torch.from_numpy(labels == label))
            region = region if mask is None else region.map(torch.logical_and, mask)
            of_label = {name: METRICS[name](*pair, region) for name in FOREGROUND}
            names = self.store.channel_names
            of_label |= by_channel(x, recon, self.widths, names, FOREGROUND, region)
            row |= {f"{name}_label_{label}": value for name, value in of_label.items()}
        return row

    def coding(self, index: int) -> Coding:
        """How a volume goes through the network: with mode auto settled, once for a size."""
        shape = tuple(self.store.shape(index)[1:])
        if shape not in self.codings:
            self.codings[shape] = Coding(**self.how).settled(self.vae, shape)
        return self.codings[shape]

    def factor(self, dims: int) -> list[int]:
        """Voxels of a cell of the latent grid, per axis of a volume of `dims` axes."""
        return Coding(**self.how).factor(self.vae, dims)

    def faces(self, shape: Sequence[int]) -> list[list[int]]:
        """Per axis of a volume the voxels at which patches begin or end."""
        how = self.how
        if self.vae.spatial_dims == len(shape):
            unit = self.vae.factor
            return tile_faces(shape, how["patch_size"], how["overlap"], how["blend"], unit)
        axis = how["slice_axis"]
        plane = [n for i, n in enumerate(shape) if i != axis]
        faces = tile_faces(plane, how["patch_size"], how["overlap"], how["blend"], self.vae.factor)
        return [*faces[:axis], [], *faces[axis:]]

    def finish(self) -> dict:
        """Write metrics.csv, summary.json and report.html; the summary."""
        rows = [self.volume(i) for i in range(len(self.store))]
        write_csv(self.out_dir / "metrics.csv", rows)
        how = modes_taken(Coding(**self.how), rows)
        if self.vae.spatial_dims == 3:
            how = {k: v for k, v in how.items() if "slice" not in k}
        summary = {**self.facts, **how, "data_range": list(self.store.data_range)}
        if len(self.store.channel_names) > 1:
            ranges = zip(self.store.channel_names, self.store.channel_ranges, strict=True)
            summary["channel_ranges"] = {name: list(ends) for name, ends in ranges}
        summary["latent_channels"] = self.vae.latent_channels
        summary["linear_code"] = self.vae.linear_code is not None
        codes = self.vae.head.num_codes
        summary |= {"num_codes": codes} if codes else {"latent_bits": self.latent_bits}
        summary |= summarize(rows)
        write_text(self.out_dir / "summary.json", json.dumps(finite_json(summary), indent=1) + "\n")
        write_tables(self.out_dir, summary["metrics"], self.sentence(summary) + ".")
        write_report(self.out_dir)
        return summary

    def sentence(self, summary: dict) -> str:
        """What was found, for a person."""
        return sentence(summary["metrics"], summary["volumes"], self.store.num_channels)

    def pictures(self, count: int) -> dict[str, Path]:
        """The picture and clips of the first `count` volumes, by panel."""
        return {
            f"eval/{self.alias(case)}/{kind}": self.out_dir / "media" / f"{case_stem(case)}.{kind}"
            for case in self.store.ids[:count]
            for kind in ("png", "gif", "mp4")
        }

    def _baselines(self, x: Lazy, recon: Lazy, mask: Lazy | None) -> dict[str, float]:
        """Linear codes of the same size, and how many of their numbers would do as well."""
        factor, channels = self.factor(x.ndim - 1), self.vae.latent_channels
        row = {"lattice_score": lattice_score(x, recon, factor)}
        row["pooled_psnr"] = psnr(*in_one_unit(x, pooled(x, factor), self.widths), mask)
        if self.pca is not None:
            row["pca_psnr"] = psnr(*in_one_unit(x, self.pca.coded(x, channels), self.widths), mask)
            row["pca_equivalent"] = self.pca.equivalent(x, recon, mask) / channels
        return row

    def _in_original_units(self, index: int, *volumes: Lazy) -> list[Lazy]:
        """Volumes in steps of the source file's intensities (HU for CT): the mapping is linear."""
        record = self.store.undo_record(index)
        steps = [s / g for s, g in zip(record["scale"], record["gain"], strict=True)]
        factors = torch.tensor(steps).abs().reshape(-1, *[1] * (volumes[0].ndim - 1)).float()
        return [v.map_channels(lambda part, c: part * factors[c]) for v in volumes]

    def _each(self, name: str, measure: Callable[[int], float]) -> dict[str, float]:
        """A column a channel, since their units differ; one without a suffix where it is alone."""
        names = self.store.channel_names
        if len(names) == 1:
            return {name: measure(0)}
        return {f"{name}_{suffix}": measure(c) for c, suffix in enumerate(names)}

    def _original_units(
        self, index: int, x: Lazy, recon: Lazy, mask: Lazy | None
    ) -> dict[str, float]:
        """Errors in the intensities of the source file, against what the model was given."""
        a, b = self._in_original_units(index, x, recon)
        return self._errors("original", a, b, mask)

    def _against_source(
        self, index: int, x: Lazy, recon: Lazy, source: Lazy, foreground: Lazy, mask: Lazy | None
    ) -> dict[str, float]:
        """What the clip takes away, and errors against the volume from before it."""
        # Where nothing is clipped the two differ by rounding.
        clipped = x.map(torch.sub, source)
        places = [beyond(clipped, c, width) for c, width in enumerate(self.widths)]
        row = self._each("clipped", lambda c: share(places[c], mask))
        row |= self._each("foreground_clipped", lambda c: share(places[c], foreground))
        a, b = self._in_original_units(index, source, recon)
        return row | self._errors("source", a, b, mask)

    def _errors(self, against: str, a: Lazy, b: Lazy, mask: Lazy | None) -> dict[str, float]:
        """Mean absolute and root mean squared error of each channel."""
        pairs = [(a.picked([c]), b.picked([c])) for c in range(a.shape[0])]
        row = self._each(f"mae_{against}", lambda c: METRICS["mae"](*pairs[c], 1.0, mask))
        return row | self._each(
            f"rmse_{against}", lambda c: math.sqrt(METRICS["mse"](*pairs[c], 1.0, mask))
        )

    def _write_files(self, index: int, x: Values, recon: Tensor, row: dict) -> None:
        case = row["case"]
        if self.save_recon:
            record, folder = self.store.undo_record(index), self.out_dir / "recon"
            write_undone(folder, case_stem(case), recon, record, self.recon_format)
        if self.media:
            layout = self.store.layout(index).read_by(self.radiological)
            if self.coding(index).mode == "patch" and 1 not in x.shape[1:]:
                picture = seam_picture(x, recon, self.faces(x.shape[1:]), self.widths[0], layout)
                path = self.out_dir / "media" / f"{case_stem(case)}.seams.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_png(path, picture)
            step = step_of(x.shape)
            spacing = [mm * n for mm, n in zip(self.store.spacing_mm(index), step, strict=True)]
            few = coarse(x, step).numpy(), coarse(recon, step).numpy()
            a, b, ends = in_one_range(self.store.channel_ranges, *few)
            pair = (a, b, spacing, ends)
            folder, hu = self.out_dir / "media", self.store.preprocess.drawn_hu
            title = f"{self.alias(case)}  {headline(row)}"
            save_views(folder, case, *pair, title=title, layout=layout, window_hu=hu)
            volumes, ranges = (*few, spacing), self.store.channel_ranges
            write_voxels(folder, case, *volumes, ranges, layout=layout, window_hu=hu)


def seen_of(store: VolumeStore, index: int) -> Lazy | None:
    """Which voxels (X, Y, Z) of a volume count; None where nothing was said of that."""
    if not store.num_weights:
        return None
    shape = store.shape(index)[1:]
    return Lazy(shape, lambda box: torch.from_numpy(store.seen_in(index, box)))


def beyond(clipped: Lazy, channel: int, width: float) -> Lazy:
    """Where (X, Y, Z) the clip has changed a channel, by more than rounding does."""
    pick = slice(channel, channel + 1)
    shape = clipped.shape[1:]
    return Lazy(shape, lambda box: clipped[(pick, *box)][0].abs() > 1e-4 * width)


def share(of: Lazy, among: Lazy | None = None) -> float:
    """Part of the voxels (X, Y, Z) where something holds, among those that count."""
    hits = total = 0
    for rows in slabs_of(of.shape, 0):
        holds = of[rows] if among is None else of[rows][among[rows]]
        hits, total = hits + int(holds.sum()), total + holds.numel()
    return hits / total if total else math.nan


def step_of(shape: Sequence[int]) -> list[int]:
    """Voxels along each axis that are one in pictures of a volume (C, X, Y, Z): 1, if not large."""
    small = 4 * math.prod(shape) <= large.LARGE
    step = 1 if small else math.ceil((math.prod(shape) / SHOWN_VOXELS) ** (1 / 3))
    return [min(step, n) for n in shape[1:]]


def coarse(x: Values, step: Sequence[int]) -> Tensor:
    """Means over blocks of a volume (C, X, Y, Z), what is left over at the far end apart."""
    if set(step) == {1}:
        return whole_of(x)
    rows = rows_of(x.shape[1] // step[0] * step[0], step[0])
    return torch.cat([F.avg_pool3d(x[:, one], tuple(step)) for one in rows], 1)


def seam_picture(
    x: Values, recon: Tensor, faces: list[list[int]], data_range: float, layout: Layout
) -> np.ndarray:
    """The error of the middle slice, white at 10 % of the range, under the tile grid in orange.

    Args:
        x: (C, X, Y, Z).
        recon: Its reconstruction.
        faces: Per axis the voxels at which tiles begin or end.
        data_range: Width of the intensity scale.
        layout: Which way is up.

    Returns:
        uint8 picture (H, W, 3), three pixels a voxel.
    """
    middle = slice(0, 1), slice(None), slice(None), slice(x.shape[3] // 2, x.shape[3] // 2 + 1)
    error = (recon[middle] - x[middle])[0, :, :, 0].abs() / (0.1 * data_range)
    gray = (error.clamp(0, 1) * 255).round().byte().numpy().repeat(3, 0).repeat(3, 1)
    picture = np.repeat(gray[..., None], 3, axis=-1)
    for face in faces[0]:
        picture[3 * face, ::2] = (230, 96, 30)
    for face in faces[1]:
        picture[::2, 3 * face] = (230, 96, 30)
    colors = layout.arranged(picture.transpose(2, 0, 1)[..., None])
    (_, axis), *_ = layout.planes(colors.shape[1:])
    return np.stack([layout.upright(color.squeeze(axis)) for color in colors], axis=-1)


def foreground_of(store: VolumeStore, index: int, x: Values) -> Lazy:
    """Voxels (X, Y, Z) above Otsu's threshold of the source's first channel, as the loaders say.

    Args:
        store: Volumes.
        index: Which of them.
        x: It, as `read_unclipped` gives it.
    """
    record, statistics = store.undo_record(index), store.meta(index)["statistics"][0]
    stored = (statistics["foreground_threshold"] - record["offset"][0]) / record["scale"][0]
    threshold = stored * record["gain"][0] + record["bias"][0]
    return Lazy(x.shape[1:], lambda box: x[(slice(0, 1), *box)][0] > threshold)


def modes_taken(coding: Coding, rows: list[dict]) -> dict:
    """How volumes went through the network; where mode auto took several, which how often."""
    if coding.mode != "auto":
        return coding.facts()
    taken = Counter(row["mode"] for row in rows)
    if len(taken) > 1:
        return {**coding.facts(), "modes": dict(taken)}
    return {**replace(coding, mode=next(iter(taken))).facts(), "mode_asked": "auto"}


def summarize(rows: list[dict]) -> dict:
    """Mean, standard deviation and count of every numeric column over the volumes."""
    metrics = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [r[name] for r in rows if isinstance(r.get(name), (int, float))]
        values = [v for v in values if math.isfinite(v)]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            metrics[name] = {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}
    return {"volumes": len(rows), "metrics": metrics}


def headline(row: dict) -> str:
    """The three numbers to look at first."""
    return f"PSNR {row['psnr']:.2f} dB  SSIM {row['ssim']:.4f}  MAE {row['mae']:.4g}"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def finite_json(value: object) -> object:
    """JSON knows no infinity: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {k: finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
