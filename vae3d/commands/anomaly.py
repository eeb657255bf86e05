"""`vae3d anomaly`: maps of what is unlike healthy volumes, in the grid of the files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from loaders import Subject, VolumeStore
    from loaders.readers import Reading

SAME_GRID = 1e-3  # mm that affines may differ by


@dataclass
class AnomalyData:
    """Which volumes; how they are preprocessed is read from the checkpoint.

    Args:
        root: Volumes to look at: folder, glob or manifest.
        healthy: Healthy volumes that the network was not trained on: folder, glob or manifest; null
            for the validation volumes of the run, which have to be healthy then.
        cache_dir: Where prepared volumes are kept; null for ~/.cache/vae3d (or $VAE3D_CACHE).
        mask: Which voxels count, a manifest column or a pattern as in training; `trained` for that
            of the run, null for all.
        region: Part of each volume that is read, [[x0, x1], [y0, y1], [z0, z1]] in voxels of its
            file (of the level), x1 apart; null for the whole, whatever training read.
    """

    root: str
    healthy: str | None = None
    cache_dir: str | None = None
    mask: str | None = "trained"
    region: list[list[int]] | None = None


def anomaly(
    checkpoint: str,
    data: AnomalyData,
    out_dir: str = "anomaly",
    *,
    kind: Literal["z", "error"] = "z",
    calibrate: Literal["auto", "voxel", "pooled"] = "auto",
    labels: str | None = None,
    lesions: tuple[int, ...] | None = None,
    mode: Literal["auto", "full", "patch", "exact"] = "auto",
    patch_size: tuple[int, ...] | None = None,
    memory_gb: float | None = None,
    limit: int | None = None,
    ema: bool = True,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    trust: tuple[str, ...] = (),
) -> None:
    """Show where volumes are unlike the healthy ones that a network was trained on.

        vae3d anomaly --checkpoint runs/healthy --data.root PATIENTS --data.healthy CONTROLS
        vae3d anomaly --checkpoint runs/healthy --data.root PATIENTS --labels '{name}_lesion.nii.gz'

    Writes to out_dir: maps/<case>.nii.gz on the grid of the file, with its affine; anomaly.csv (a
    row a volume); summary.json. A map is positive where a volume is brighter than expected. Where
    there are label maps of lesions, AUROC and average precision over the voxels that count tell how
    well the map finds them. The same command again continues.

    Args:
        checkpoint: Run folder, checkpoint file or folder of save_pretrained, or hf://owner/name, of
            a network trained on healthy volumes.
        data: Volumes to look at, and healthy ones.
        out_dir: Where the results go.
        kind: z (how many healthy standard deviations off the healthy mean) | error (volume minus
            reconstruction, in the intensities of the file).
        calibrate: voxel (mean and spread of each voxel; all volumes share a grid) | pooled (of the
            foreground) | auto (voxel where a grid is shared and healthy volumes are enough).
        labels: Label maps of lesions: a manifest column, or a pattern beside the image such as
            `{name}_seg.nii.gz`; null for a manifest's `label_map`.
        lesions: Labels that are lesions; null for all but 0.
        mode: How volumes go through the network, as in evaluate.
        patch_size: Patch per axis for mode patch [voxels]; null for training's.
        memory_gb: Memory budget of modes exact and auto on the device [GiB]; null for half of what
            is free.
        limit: Look at most at this many volumes [volumes]; null for no limit.
        ema: Use the averaged weights where the run kept some.
        device: auto | cpu | cuda | mps.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
    """
    from loaders import Preprocess, VolumeStore
    from loaders.readers import Reading
    from vae3d.inference.anomaly import Finder
    from vae3d.inference.estimate import told
    from vae3d.inference.reconstruct import coding_of, of_training
    from vae3d.kernels.progress import part, watched
    from vae3d.ranges import check_ranges
    from vae3d.tracking.console import Gauge
    from vae3d.training.checkpoint import fingerprint, load_checkpoint, vae_of
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import SMALLER_PASSES, telling_of_device

    check_ranges("anomaly", {"limit": limit, "lesions": lesions})
    state = load_checkpoint(checkpoint)
    vae = vae_of(state, checkpoint, ema, trust)
    trained = state["config"]
    patching = dict(patch_size=patch_size)
    coding, lines = coding_of(of_training(trained), mode, patching, memory_gb=memory_gb)
    coding.check(vae)
    reading = replace(Reading.of(trained["data"]).masked(data.mask), region=data.region)
    with open_world(device) as world, telling_of_device(*SMALLER_PASSES):
        if world.size > 1:
            raise ValueError("vae3d anomaly runs in one process: start it without torchrun")
        vae.to(world.device)
        build = partial(
            VolumeStore.build,
            cache_dir=data.cache_dir,
            preprocess=Preprocess.of_checkpoint(state["preprocess"]),
            reading=reading,
            in_channels=vae.in_channels,
            num_slices=coding.slices_of(vae),
        )
        found, healthy = find_volumes(state, data, reading, labels, kind == "z")
        store = build(found[:limit])
        controls = build(healthy) if healthy else None
        by_voxel = controls is not None and chosen_calibration(calibrate, store, controls)
        facts = {"checkpoint_sha256": fingerprint(checkpoint), "ema": ema}
        finder = Finder(vae, coding, store, controls, Path(out_dir), facts, kind, by_voxel, lesions)
        shapes = [s.shape(i)[1:] for s in finder.todo() for i in range(len(s))]
        if shapes:
            print(*lines, told(coding, vae, shapes), sep="\n", flush=True)
        voxels = max(sum(math.prod(shape) for shape in shapes), 1)
        with Gauge("anomaly") as gauge, watched(gauge.add):
            finder.calibrate(voxels)
            for index in range(len(store)):
                new = finder.finished(index) is None
                with part(new * math.prod(store.shape(index)[1:]) / voxels):
                    print(finder.line(finder.volume(index)), flush=True)
        print(finder.finish())


def find_volumes(
    state: dict, data: AnomalyData, reading: Reading, labels: str | None, calibrated: bool
) -> tuple[list[Subject], list[Subject]]:
    """The volumes to look at, and healthy ones: none is both, and none was trained on.

    Args:
        state: The checkpoint.
        data: Where they lie.
        reading: How files are read.
        labels: Where label maps lie.
        calibrated: Whether healthy ones are wanted.
    """
    from loaders import find_subjects
    from loaders.masks import with_label_maps

    split = state["split"] or {}
    known = [id for ids in split.values() for id in ids]
    found = with_label_maps(find_subjects(data.root, reading, known), labels, Path(data.root))
    if not calibrated:
        return found, []
    if data.healthy is not None:
        healthy = find_subjects(data.healthy, reading, known)
        of = f"data.healthy {data.healthy}"
    else:
        root = state["config"]["data"]["root"]
        healthy = find_subjects(root, reading, known)
        healthy = [s for s in healthy if s.id in split.get("val", ())]
        of = f"the run's validation volumes in {root}"
    if trained_on := [s.id for s in healthy if s.id in split.get("train", ())]:
        print(f"{len(trained_on)} healthy volumes are left out: the network was trained on them")
    looked_at = {path.absolute() for s in found for path in s.paths}
    healthy = [
        s for s in healthy
        if s.id not in trained_on and not looked_at & {path.absolute() for path in s.paths}
    ]  # fmt: skip
    if not healthy:
        raise ValueError(
            f"{of}: no healthy volume that the network was not trained on, and that is not looked "
            "at; name some by --data.healthy"
        )
    return found, healthy


def chosen_calibration(wanted: str, store: VolumeStore, controls: VolumeStore) -> bool:
    """Whether each voxel has a mean and spread of its own; says why, in a line."""
    import numpy as np

    from vae3d.inference.healthy import ENOUGH

    grids = [
        (of.shape(i), np.array(of.meta(i)["affine"]))
        for of in (controls, store)
        for i in range(len(of))
    ]
    shape, affine = grids[0]
    shared = all(s == shape and np.abs(a - affine).max() < SAME_GRID for s, a in grids)
    if wanted == "voxel" and not shared:
        raise ValueError(
            "--calibrate voxel: volumes differ in size or place; bring them to one grid "
            "(registered, or data.preprocess of training), or take --calibrate pooled"
        )
    if wanted == "voxel" and len(controls) < 2:
        raise ValueError("--calibrate voxel: needs 2 healthy volumes or more; take pooled")
    by_voxel = wanted == "voxel" or (wanted == "auto" and shared and len(controls) >= ENOUGH)
    few = "" if not shared or wanted == "pooled" else f", {ENOUGH} or more would have one each"
    how = "each voxel, as all share a grid" if by_voxel else f"the foreground{few}"
    print(f"calibrated on {len(controls)} healthy volumes: mean and spread of {how}", flush=True)
    return by_voxel
