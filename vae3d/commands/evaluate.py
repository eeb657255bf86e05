"""`vae3d evaluate`, `evaluate.py`: checkpoint and volumes -> metrics, pictures, a report."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loaders import Preprocess
from loaders.readers import Reading
from loaders.texts import Record
from vae3d.losses.perceptual import Perceptual
from vae3d.ranges import check_ranges
from vae3d.tracking.options import Tracking
from vae3d.training.options import spread

if TYPE_CHECKING:
    from loaders import Subject, VolumeStore
    from vae3d.inference.baselines import BlockPCA
    from vae3d.inference.evaluation import Evaluator
    from vae3d.inference.reconstruct import Coding
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.training.shares import Shares

PCA_VOLUMES = 16  # training volumes that the block-PCA baseline is fitted on
SHOWN = 4  # volumes whose pictures trackers get
COMPONENTS = 8  # of it per latent channel, for pca_equivalent
HEADLINE = (
    *("psnr", "ssim", "mae", "pooled_psnr", "pca_psnr"),
    *("pca_equivalent", "lattice_score", "seam_score", "patch_gap"),
)


@dataclass
class EvaluationData:
    """Which volumes to evaluate; how they are preprocessed is read from the checkpoint.

    Args:
        root: Folder (searched below), glob, or CSV/JSON manifest with the column `path`.
        cache_dir: Where prepared volumes are kept; null for ~/.cache/vae3d (or $VAE3D_CACHE).
        on_error: Broken file: raise ends the evaluation, skip lists it in skipped.csv.
        preprocess: What you hold for that of the checkpoint, as a check; null to trust it.
        mask: Which voxels count, a manifest column or a pattern as in training; `trained` for that
            of the run, null for all (then name the images by a glob where masks lie beside them).
        region: Part of each volume that is read, [[x0, x1], [y0, y1], [z0, z1]] in voxels of its
            file (of the level), x1 apart; null for the whole, whatever training read.
    """

    root: str
    cache_dir: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    preprocess: Preprocess | None = None
    mask: str | None = "trained"
    region: list[list[int]] | None = None


@spread
def evaluate(
    checkpoint: str,
    data: EvaluationData,
    out_dir: str = "evaluation",
    *,
    mode: Literal["auto", "full", "patch", "exact"] = "auto",
    patch_size: tuple[int, ...] | None = None,
    overlap: int | float | None = None,
    blend: Literal["hann", "gaussian", "average", "crop"] | None = None,
    batch_size: int | None = None,
    memory_gb: float | None = None,
    amp: Literal["off", "bf16", "fp16"] = "off",
    split: Literal["train", "val", "test", "all"] | None = None,
    limit: int | None = None,
    ema: bool = True,
    latent_bits: int = 16,
    patch_gap: bool = True,
    baseline: bool = True,
    perceptual: Callable[[], Perceptual] | None = None,
    labels: str | None = None,
    segmenter: str | None = None,
    verify: bool = False,
    save_recon: bool = True,
    recon_format: Literal["ome-zarr", "nifti", "tiff"] | None = None,
    media: bool = True,
    radiological: bool | None = None,
    sharding: Literal["spatial"] | None = None,
    slab_axis: Literal["x", "y", "z"] = "x",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    trust: tuple[str, ...] = (),
    tracking: Tracking,
) -> None:
    """Measure how well a trained model reconstructs volumes.

        python evaluate.py --checkpoint runs/a --data.root DIR --out_dir out
        torchrun --nproc_per_node=4 evaluate.py --checkpoint runs/a --data.root DIR --out_dir out

    Writes to out_dir: metrics.csv (a row a volume), summary.json, results.md and results.tex (a
    table for a text), recon/<case>.nii.gz, .ome.zarr, .ome.tif or .png (intensities of the file up
    to the window, its affine and size), media/<case>.{png,gif,mp4} (input | recon | error),
    report.html. The same command again continues: finished volumes are kept.

    Args:
        checkpoint: Run folder, checkpoint file, folder of save_pretrained, or hf://owner/name.
        data: Volumes to evaluate.
        out_dir: Where the results go.
        mode: full (one forward pass) | patch (overlapped patches, blended) | exact (equal to full,
            layer by layer in bounded memory) | auto (full where it fits in memory, else exact;
            patch where both are refused, or where the options of patches are given).
        patch_size: Patch per axis [voxels], multiples of the model's factor; null for training's.
        overlap: Overlap of neighboring patches: below 1 a fraction of the patch, else [voxels];
            null for half of it.
        blend: hann | gaussian | average | crop, how overlapping patches are mixed; null for hann.
        batch_size: Patches in a forward pass [patches]; null for 1, on a GPU for as many as fit.
        memory_gb: Memory budget of modes exact and auto on the device [GiB]; null for half of what
            is free.
        amp: off | bf16 | fp16, precision of convolutions and matrix products; validation during
            training runs in that of training.
        split: Subjects of the run's train, val or test part, or all that lie in the folder; null
            for test, or for all where the run has seen none of them.
        limit: Evaluate at most this many volumes [volumes]; null for no limit.
        ema: Use the averaged weights where the run kept some.
        latent_bits: Bits in which a latent value would be kept, for bits_per_voxel [bit].
        patch_gap: In mode patch, compute the exact result too, and the PSNR between the two.
        baseline: Fit a block PCA with as many values as the latent on the run's training volumes.
        perceptual: Perceptual distance and its network; null for none.
        labels: Label maps, in each of whose labels metrics are taken too: a manifest column, or a
            pattern beside the image such as `{name}_seg.nii.gz`; null for a manifest's `label_map`.
        segmenter: What is looked for in input and reconstruction, for the Dice of the two: deepbet
            (the brain in T1 heads), or a class such as my_lab.tasks.Vessels; null for none.
        verify: Compare the exact and the full pass on a crop first, and print the difference.
        save_recon: Write the reconstructions.
        recon_format: ome-zarr | nifti | tiff, what they are written as; null for what came in.
        media: Write pictures, clips and what the report's viewer shows.
        radiological: Draw bodies with their right on the left, as radiologists read them; null for
            as in training.
        sharding: spatial (ranks share each volume, cut into slabs, in mode full) | null (they share
            the volumes out).
        slab_axis: x | y | z, the axis along which they are cut; the longest is the best.
        device: auto | cpu | cuda | mps.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
        tracking: Each option of trackers by its own name, see `vae3d.tracking.options`.
    """
    from loaders import VolumeStore, find_subjects
    from loaders.masks import with_label_maps
    from loaders.store import silent
    from loaders.whole import sweep
    from vae3d.inference.evaluation import Evaluator
    from vae3d.inference.reconstruct import coding_of, of_training
    from vae3d.inference.segmenters import segmenter_named
    from vae3d.tracking.privacy import Aliases
    from vae3d.training.checkpoint import load_checkpoint, vae_of
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import SMALLER_PASSES, telling_of_device
    from vae3d.training.shares import Shares, cut_along

    if isinstance(data, str):
        data = EvaluationData(data)
    check_ranges("evaluate", {"limit": limit, "latent_bits": latent_bits})
    state = load_checkpoint(checkpoint)
    vae = vae_of(state, checkpoint, ema, trust)
    trained = state["config"]
    patching = dict(patch_size=patch_size, overlap=overlap, blend=blend)
    more = dict(batch_size=batch_size, memory_gb=memory_gb, amp=amp)
    # It says what is wrong before anything is written.
    coding, about_mode = coding_of(of_training(trained), mode, patching, **more)
    coding, axis = cut_along(coding, vae, sharding, slab_axis)
    distance = perceptual() if perceptual is not None else None
    judge = segmenter_named(segmenter) if segmenter else None
    coding.check(vae)
    if radiological is None:
        radiological = trained.get("radiological", False)
    if trained.get("hash_cases", False):  # names that a run has kept at home stay there
        tracking = replace(tracking, hash_cases=True)
    reading = replace(Reading.of(trained["data"]).masked(data.mask), region=data.region)
    facts = facts_of(checkpoint, state["step"], ema, reading)
    seen = [id for ids in state["split"].values() for id in ids]
    lines: list[str] = []
    subjects = find_subjects(data.root, reading, seen, lines.append)
    subjects = with_label_maps(subjects, labels, Path(data.root))
    chosen = choose_subjects(subjects, state["split"], split)[:limit]

    with open_world(device) as world, telling_of_device(*SMALLER_PASSES):
        vae.to(world.device)
        for line in lines if world.is_main else ():
            print(line)
        open_store = partial(
            VolumeStore.build,
            cache_dir=data.cache_dir,
            preprocess=Preprocess.of_checkpoint(state["preprocess"], data.preprocess),
            on_error=data.on_error,
            reading=reading,
            in_channels=vae.in_channels,
            num_slices=coding.slices_of(vae),
        )
        out, pca = Path(out_dir), None
        with world.main_first():
            if world.is_main:
                sweep(out / "recon")
            store = open_store(chosen, say=print if world.is_main else silent)
            if baseline:
                fitted_on = [s for s in subjects if s.id in state["split"].get("train", ())]
                fitted_on = fitted_on[:PCA_VOLUMES]
                quiet = partial(open_store, fitted_on, say=silent)
                how_read = [store.preprocess.to_dict(), reading.chosen()]
                kept_in = store.cache_dir if os.access(store.cache_dir, os.W_OK) else out
                pca = block_pca(quiet, fitted_on, how_read, vae, coding.slice_axis, kept_in)
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
            store.write_skipped(out)
        if verify and world.is_main:
            print(verify_exact(vae, store))
        if distance is not None:
            distance.to(world.device).data_range = store.data_range
        evaluator = Evaluator(
            *(vae, store, out, vars(coding), facts, latent_bits, patch_gap, pca, distance),
            save_recon=save_recon,
            media=media,
            radiological=radiological,
            segmenter=judge,
            segmenter_name=(segmenter or "").rpartition(".")[2],
            recon_format=recon_format,
        )
        if tracking.hash_cases:
            evaluator.alias = Aliases(out, store.ids)
        evaluate_each(evaluator, Shares(vae, world, len(store), axis), coding, about_mode)
        world.barrier()
        if world.is_main:
            publish(evaluator, tracking)


def facts_of(checkpoint: str, step: int, ema: bool, reading: Reading) -> Record:
    """What the numbers of an evaluation depend on, beside the volumes and their way through."""
    from vae3d.training.checkpoint import find_checkpoint, fingerprint

    facts: Record = {"checkpoint": str(find_checkpoint(checkpoint)), "step": step, "ema": ema}
    facts["checkpoint_sha256"] = fingerprint(checkpoint)
    if mask := reading.mask or ("finite voxels" if reading.nan == "mask" else None):
        facts["mask"] = mask
    return facts | ({} if reading.region is None else {"region": reading.region})


def evaluate_each(
    evaluator: Evaluator, shares: Shares, coding: Coding, about_mode: list[str]
) -> None:
    """Evaluate this rank's volumes, a line for each.

    Args:
        evaluator: Measures and writes.
        shares: Which volumes.
        coding: How they go through the network.
        about_mode: Lines on how that was chosen.
    """
    from vae3d.inference.estimate import told
    from vae3d.inference.evaluation import headline

    store, mine = evaluator.store, shares.mine
    todo = {i: store.shape(i)[1:] for i in mine if evaluator.finished(i) is None}
    if todo and shares.tells:
        cost = told(coding, evaluator.vae, list(todo.values()), ranks=shares.team.size)
        print(*about_mode, cost, sep="\n", flush=True)
    with shares.at_work("evaluate", todo) as work:
        for done, index in enumerate(mine, start=1):
            with work.on(index):
                row = evaluator.volume(index)
            said = f"{done}/{len(mine)} {row['case']}: {headline(row)}  eta {work.left()}"
            print(said, flush=True)


def publish(evaluator: Evaluator, tracking: Tracking) -> None:
    """Write the report, send numbers and pictures to trackers, and say what was found."""
    from vae3d.tracking.tracker import Tracker

    summary, step = evaluator.finish(), evaluator.facts["step"]
    tracker = Tracker(evaluator.out_dir, tracking, config={**evaluator.facts, **evaluator.how})
    means = {f"eval/{name}": found["mean"] for name, found in summary["metrics"].items()}
    tracker.log(means, step=step)
    if evaluator.media:
        tracker.log_media(evaluator.pictures(SHOWN), step=step)
    tracker.close()
    say_results(summary, evaluator.out_dir)
    print(evaluator.sentence(summary))


def choose_subjects(
    subjects: list[Subject], split: dict[str, list[str]], wanted: str | None
) -> list[Subject]:
    """The subjects of one part of the run's split.

    Args:
        subjects: What lies in the folder.
        split: Subject ids by part, as saved with the checkpoint.
        wanted: train | val | test | all; None for test, or all where the run knows none of them.
    """
    known = {i for ids in split.values() for i in ids}
    if wanted is None:
        wanted = "test" if any(s.id in known for s in subjects) else "all"
    chosen = [s for s in subjects if wanted == "all" or s.id in split.get(wanted, ())]
    if not chosen:
        raise ValueError(
            f"none of the {len(subjects)} subjects is in the run's {wanted} split; "
            "choose another with --split val or --split all"
        )
    return chosen


def block_pca(
    open_store: Callable[[], VolumeStore],
    subjects: list[Subject],
    how_read: list[dict],
    vae: CustomVAE,
    slice_axis: int,
    folder: Path,
) -> BlockPCA | None:
    """The baseline, fitted on the run's training volumes once for all evaluations.

    While their files stay as they are nothing of them is opened again.

    Args:
        open_store: Brings these volumes into the cache.
        subjects: Training volumes.
        how_read: How they are read and prepared.
        vae: Says how many values a block has.
        slice_axis: Axis along which a 2D model is sliced.
        folder: Where it is kept.

    Returns:
        A `BlockPCA`; None where no training volume lies in the folder.
    """
    from loaders.readers import is_there
    from loaders.versions import version_of
    from vae3d.inference.baselines import BlockPCA
    from vae3d.inference.reconstruct import volume_of

    if not subjects:
        print("no pca_psnr: the run's training volumes are not in data.root")
        return None
    factor, count = list(vae.factor), COMPONENTS * vae.latent_channels
    if vae.spatial_dims == 2:
        factor.insert(slice_axis, 1)
    paths = [path for s in subjects for path in (*s.paths, s.mask) if path]
    files = [[str(path.absolute()), version_of(path)] for path in paths if is_there(path)]
    key = json.dumps([files, how_read, factor, count], sort_keys=True)
    path = folder / f"block_pca_{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not path.is_file():
        store = open_store()
        volumes = (volume_of(store, i) for i in range(len(store)))
        folder.mkdir(parents=True, exist_ok=True)
        BlockPCA.fit(volumes, factor, count).save(path)
    return BlockPCA.load(path)


def verify_exact(vae: CustomVAE, store: VolumeStore, size: int = 64) -> str:
    """Compare the exact and the full pass on a crop from the middle of the first volume.

    Args:
        vae: The model.
        store: Volumes.
        size: Longest side of the crop in voxels.

    Returns:
        A line with the largest difference as a part of the output's range.
    """
    import torch

    from vae3d.exact.executor import decode_exact, encode_exact
    from vae3d.kernels.precision import exact_float32

    shape = store.shape(0)[1:]
    cut = [slice((n - min(n, size)) // 2, (n + min(n, size)) // 2) for n in shape]
    x = torch.from_numpy(store.read(0, cut)).to(next(vae.parameters()).device)
    if vae.spatial_dims == 2:
        x = x.select(-1, x.shape[-1] // 2).repeat(vae.in_channels // x.shape[0], 1, 1)
    tile = [16] * vae.spatial_dims
    with torch.no_grad(), exact_float32():
        full, posterior = vae(x[None], sample_posterior=False)
    exact = encode_exact(vae, x, tile=tile)
    recon = decode_exact(vae, exact.mean, size=x.shape[1:], tile=tile).to(full)
    worst = max(
        float((a - b).abs().max() / (b.max() - b.min()))
        for a, b in ((recon, full[0]), (exact.mean, posterior.mean[0]))
    )
    sizes = " x ".join(map(str, x.shape[1:]))
    return f"verify: exact and full pass differ by at most {worst:.1e} of the range on {sizes}"


def say_results(summary: dict[str, Any], out: Path) -> None:
    """Print the headline metrics and where to look."""
    for name in HEADLINE:
        if name in summary["metrics"]:
            value = summary["metrics"][name]
            print(f"{name:<14} {value['mean']:.4g} (sd {value['sd']:.2g}, n {value['n']})")
    beyond = summary["volumes"] - summary["metrics"].get("pca_equivalent", {"n": 0})["n"]
    if beyond and "pca_psnr" in summary["metrics"]:  # infinite: not in the mean
        print(f"pca_equivalent > {COMPONENTS} for {beyond} of {summary['volumes']} volumes")
    print(f"report: {out / 'report.html'}")
    for kind in ("gif", "mp4"):
        for path in sorted((out / "media").glob(f"*.{kind}"))[:1]:
            print(f"{kind}: {path}")
