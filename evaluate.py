"""Evaluate a trained model: metrics, reconstructions, pictures and a report per volume.

    python evaluate.py --checkpoint runs/a --data.root DIR --mode patch --out_dir out
    torchrun --nproc_per_node=4 evaluate.py --checkpoint runs/a --data.root DIR --out_dir out

The same command again continues: finished volumes are kept. Runs on CPU and GPU, by one process or
by many under torchrun (volumes are shared out; the numbers are the same).
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class EvaluationData:
    """Which volumes to evaluate; how they are preprocessed is read from the checkpoint.

    Args:
        root: Folder of volumes, or one volume.
        cache_dir: Where preprocessed volumes are kept between runs; default a folder in `root`'s
            place chosen by the loaders.
    """

    root: str
    cache_dir: str | None = None


def evaluate(
    checkpoint: str,
    data: EvaluationData,
    out_dir: str = "evaluation",
    mode: Literal["full", "patch"] = "patch",
    patch_size: tuple[int, ...] | None = None,
    overlap: float = 0.5,
    blend: Literal["hann", "gaussian", "average", "crop"] = "hann",
    batch_size: int = 1,
    split: Literal["train", "val", "test", "all"] | None = None,
    limit: int | None = None,
    ema: bool = True,
    save_recon: bool = True,
    media: bool = True,
    device: str = "auto",
    wandb: Literal["online", "offline", "disabled"] | None = "disabled",
    trust: tuple[str, ...] = (),
) -> None:
    """Measure how well a trained model reconstructs volumes.

    Writes to `out_dir`: metrics.csv (a row a volume), summary.json, recon/<case>.nii.gz (original
    intensities, affine and size), media/<case>.{png,gif,mp4} (input | recon | error), report.html.

    Args:
        checkpoint: Run folder or checkpoint file.
        data: Volumes to evaluate.
        out_dir: Where the results go.
        mode: full (one forward pass) | patch (overlapped patches, blended).
        patch_size: Patch in voxels, multiples of the model's factor; default that of training.
        overlap: Overlap of neighboring patches as a fraction of the patch, below 1.
        blend: How overlapping patches are mixed.
        batch_size: Patches per forward pass.
        split: Which subjects of the run's split; default test, or all where none was in the run.
        limit: Evaluate at most this many volumes.
        ema: Use the averaged weights where the run kept some.
        save_recon: Write the reconstructions as NIfTI.
        media: Write pictures and clips.
        device: auto | cpu | cuda | mps.
        wandb: online | offline | disabled; logs the summary and the pictures.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
    """
    from loaders import Preprocess, VolumeStore, find_subjects
    from vae3d.training.checkpoint import find_checkpoint, load_checkpoint, load_model
    from vae3d.training.distributed import open_world

    state = load_checkpoint(checkpoint)
    vae = load_model(checkpoint, ema=ema, trust=trust)
    patch_size = tuple(patch_size or state["config"]["patch_size"])
    settings = {
        "checkpoint": str(find_checkpoint(checkpoint)),
        "step": state["step"],
        "ema": ema,
        "mode": mode,
        "patch_size": list(patch_size) if mode == "patch" else None,
        "overlap": overlap if mode == "patch" else None,
        "blend": blend if mode == "patch" else None,
    }
    root = data if isinstance(data, str) else data.root
    subjects = choose_subjects(find_subjects(root), state["split"], split)[:limit]
    with open_world(device) as world:
        vae.to(world.device)
        preprocess = Preprocess.from_dict(state["preprocess"])
        with world.main_first():
            store = VolumeStore.build(subjects, getattr(data, "cache_dir", None), preprocess)
        out = Path(out_dir)
        evaluator = Evaluator(vae, store, out, settings, batch_size, save_recon, media)
        for index in range(world.rank, len(store), world.size):
            row = evaluator.volume(index)
            print(f"{row['case']}: " + headline(row), flush=True)
        world.barrier()
        if world.is_main:
            evaluator.finish()


def choose_subjects(subjects: list, split: dict[str, list[str]], wanted: str | None) -> list:
    """The subjects of one part of the run's split.

    Args:
        subjects: What lies in the folder.
        split: Subject ids by part, as saved with the checkpoint.
        wanted: train | val | test | all; None for test, or all where the run knows none of them.
    """
    known = {i for ids in (split or {}).values() for i in ids}
    if wanted is None:
        wanted = "test" if any(s.id in known for s in subjects) else "all"
    chosen = [s for s in subjects if wanted == "all" or s.id in split.get(wanted, ())]
    if not chosen:
        raise ValueError(
            f"none of the {len(subjects)} subjects is in the run's {wanted} split; "
            "choose another with --split val or --split all"
        )
    return chosen


class Evaluator:
    """Evaluates volumes one by one into a folder; a volume that is done stays done.

    Args:
        vae: The model, in eval mode on its device.
        store: Volumes, preprocessed as in training.
        out_dir: Where results go.
        settings: What the numbers depend on; results of other settings are computed again.
        batch_size: Patches per forward pass.
        save_recon: Write the reconstructions as NIfTI.
        media: Write pictures and clips.
    """

    def __init__(self, vae, store, out_dir, settings, batch_size, save_recon, media):
        self.vae, self.store, self.out_dir, self.settings = vae, store, Path(out_dir), settings
        self.batch_size, self.save_recon, self.media = batch_size, save_recon, media
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def volume(self, index: int) -> dict:
        """The row of metrics of one volume, computed or, when it is finished, read."""
        from vae3d.tracking.media import case_stem

        case = self.store.ids[index]
        done = self.out_dir / "rows" / f"{case_stem(case)}.json"
        if done.is_file():
            record = json.loads(done.read_text())
            if record["key"] == self.key:
                return record["row"]
        row = {"case": case, **self._measure(index, case, case_stem(case))}
        write_json(done, {"key": self.key, "row": row})
        return row

    def _measure(self, index: int, case: str, stem: str) -> dict:
        import torch

        from vae3d.inference.metrics import METRICS
        from vae3d.inference.reconstruct import reconstruct
        from vae3d.tracking.media import save_views

        x = torch.from_numpy(self.store.read(index))
        how = {k: self.settings[k] for k in ("mode", "patch_size", "overlap", "blend")}
        recon = reconstruct(self.vae, x, **how, batch_size=self.batch_size)
        lo, hi = self.store.data_range
        row = {name: metric(x, recon, hi - lo) for name, metric in METRICS.items()}
        if self.save_recon:
            from loaders import write_volume

            path = self.out_dir / "recon" / f"{stem}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(path, self.store.undo(index, recon.numpy()))
        if self.media:
            save_views(
                self.out_dir / "media",
                case,
                x.numpy(),
                recon.numpy(),
                self.store.spacing_mm(index),
                (lo, hi),
                title=f"{case}  {headline(row)}",
            )
        return row

    def finish(self) -> None:
        """Write metrics.csv, summary.json and the report; print where they lie."""
        from vae3d.inference.report import write_report

        rows = [self.volume(i) for i in range(len(self.store))]
        write_csv(self.out_dir / "metrics.csv", rows)
        summary = {**self.settings, "data_range": list(self.store.data_range), **summarize(rows)}
        write_json(self.out_dir / "summary.json", summary)
        report = write_report(self.out_dir)
        print("  ".join(f"{k} {v['mean']:.4g}" for k, v in summary["metrics"].items()))
        print(f"report: {report}")
        for kind in ("gif", "mp4"):
            for path in sorted((self.out_dir / "media").glob(f"*.{kind}"))[:1]:
                print(f"{kind}: {path}")


def summarize(rows: list[dict]) -> dict:
    """Mean, standard deviation and count of every numeric column over the volumes."""
    metrics = {}
    for name in rows[0]:
        values = [r[name] for r in rows if isinstance(r[name], (int, float))]
        values = [v for v in values if math.isfinite(v)]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            metrics[name] = {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}
    return {"volumes": len(rows), "metrics": metrics}


def headline(row: dict) -> str:
    """The three numbers to look at first."""
    return f"PSNR {row['psnr']:.2f} dB  SSIM {row['ssim']:.4f}  MAE {row['mae']:.4g}"


def write_json(path: Path, value: dict) -> None:
    """Write JSON that is either whole or not there; numbers that are not finite become null."""
    _replace(path, json.dumps(_finite(value), indent=1) + "\n")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows that share their columns as CSV, atomically."""
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, text.getvalue())


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    from vae3d.config import main

    main(evaluate)
