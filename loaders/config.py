"""The `--data.*` options and the one call that turns them into a store and a split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from loaders.patches import LabelCorners, Sampler, UniformCorners
from loaders.preprocess import FIRST_FIELDS, FIRST_RULES, Augment, Preprocess, is_old
from loaders.readers import Dicom
from loaders.texts import Record

if TYPE_CHECKING:
    from loaders.consistency import Survey
    from loaders.readers import BrokenVolume, Reading
    from loaders.slices import SliceStore
    from loaders.splits import Split
    from loaders.store import VolumeStore
    from loaders.subjects import Subject

Say = Callable[[str], None]


@dataclass
class DataConfig:
    """Which volumes, and how they are read.

    Args:
        root: Folder (searched below), glob, or CSV/JSON manifest with the column `path`.
        cache_dir: Where prepared volumes are kept; null for ~/.cache/vae3d (or $VAE3D_CACHE).
        fractions: Parts of the subjects for train, val and test.
        folds: Cut what does not test into so many folds; null for fractions alone.
        fold: The fold that validates while the others train, from 0.
        stratify_by: Manifest column whose values come in equal shares in every part.
        group_by: Whose volume it is: a manifest column, or a pattern that is searched in the path
            below root, e.g. 'BraTS-GLI-(\\d+)'; null for PatientID, BIDS names and folders.
        preprocess: What is done to each volume.
        on_error: Broken file: raise ends the run, skip lists it in skipped.csv; of a volume that
            stays where it is, skip counts patches that cannot be read, and reads others.
        nan: NaN or infinite voxels: error, fill (with the volume's lowest intensity) or mask (they
            are filled and count nothing).
        volumes_4d: 4D files: error, channels (each volume a channel), first, or samples (each time
            point is a volume of its own, all of one person).
        dicom: How DICOM slices become volumes: tolerance_mm, gaps and series.
        color: Pictures: all gray, all rgb, or as they are, and a mixture is an error.
        stacks: TIFF and PNG slices: files (each is one image), or a folder of them is one volume.
        missing: A subject that lacks one of its files: error, skip (leave it out) or zero (give a
            channel of zeros).
        mask: Which voxels count: a manifest column of files, or a pattern beside the image, such as
            `{name}_mask.nii.gz`. Its values are weights; what is 0 is neither seen nor counted.
        mask_weights: Weights of the values of masks, e.g. {0: 0.1, 1: 1}; null for the values.
        in_place: Whether zarr, HDF5 and large TIFF stay where they are and patches are read out of
            them; else they are copied into the cache like other files.
        level: Of zarr and TIFF with several sizes: which, from 0, the finest; null for the one
            whose voxels are `preprocess.spacing_mm`, else 0.
        channels: Of what stays: which channels, by number or name; null for all.
        time_point: Of what stays: which time point, from 0; null for what `volumes_4d` says.
        region: Part of each volume that is read, [[x0, x1], [y0, y1], [z0, z1]] in voxels of its
            file (of the level), x1 apart; null for the whole.
        cache_gb: Gigabytes of decoded chunks, of zarr and TIFF, that each process keeps in memory.
        store: Cache as npy (fastest), blosc2 (about half the disk space) or zarr (sharded OME-Zarr,
            compressed and with levels, which other programs show; read in chunks).
        slice_axis: For 2D training: the axis that slices are cut across (0, 1 or 2).
        num_slices: For 2D training: neighboring slices that become channels (odd).
        balance_by: Manifest column whose groups come equally often in an epoch.
        sampler: Where random patches lie: UniformCorners, ForegroundCorners or LabelCorners.
        patches_per_read: Random patches that are drawn from the chunks which one of them touches,
            so that these are read once; patches_per_volume is a multiple of it.
        augment: TorchIO transforms for training, e.g. {RandomNoise: {std: [0, 0.05]}}.
        threads: Volumes that are read at once while caching; null for one per core.
    """

    root: str = ""
    cache_dir: str | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    folds: int | None = None
    fold: int = 0
    stratify_by: str | None = None
    group_by: str | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)
    on_error: Literal["raise", "skip"] = "raise"
    nan: Literal["error", "fill", "mask"] = "error"
    volumes_4d: Literal["error", "channels", "first", "samples"] = "error"
    dicom: Dicom = field(default_factory=Dicom)
    color: Literal["error", "gray", "rgb"] = "error"
    stacks: Literal["files", "folder"] = "files"
    missing: Literal["error", "skip", "zero"] = "error"
    mask: str | None = None
    mask_weights: dict[int, float] | None = None
    in_place: bool = True
    level: int | None = None
    channels: list[int | str] | None = None
    time_point: int | None = None
    region: list[list[int]] | None = None
    cache_gb: float = 1.0
    store: Literal["npy", "blosc2", "zarr"] = "npy"
    slice_axis: int = 2
    num_slices: int = 1
    balance_by: str | None = None
    sampler: Callable[[], Sampler] = UniformCorners
    patches_per_read: int = 1
    augment: dict[str, dict[str, Any]] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.num_slices % 2 == 0:
            raise ValueError(f"data.num_slices is {self.num_slices}: use an odd number")
        if self.fold and self.folds is None:
            raise ValueError(f"data.fold is {self.fold}, of how many? Set data.folds")

    @property
    def reading(self) -> Reading:
        """How the files are read."""
        from loaders.readers import Reading

        return Reading.of(vars(self))

    def loader_options(self, threads: int) -> dict[str, Any]:
        """Return what the training loader takes from here: sampler, balance, augmentation.

        Args:
            threads: Of the loader.

        Raises:
            ValueError: One of them cannot be; no volume is needed to know.
        """
        from loaders.guard import require_guard

        self.sampler()
        if self.augment and threads:
            require_guard()
        return {
            "sampler": self.sampler,
            "balance_by": self.balance_by,
            "augment": Augment(self.augment) if self.augment else None,
            "patches_per_read": self.patches_per_read,
            "on_error": self.on_error,
        }


def as_meant(options: Record) -> Record:
    """Return options with what was meant when they were saved, where they are older than a choice.

    A saved configuration is complete. One that tells all of `data.preprocess` as it once was, and
    nothing of the rules, is of a time when there was one rule; what a user writes by hand is not.
    `data.store` was called `data.backend`.
    """
    data = options.get("data")
    if isinstance(data, dict) and "backend" in data:
        data = {"store": data["backend"], **{k: v for k, v in data.items() if k != "backend"}}
        options = {**options, "data": data}
    saved = data.get("preprocess") if isinstance(data, dict) else None
    if isinstance(saved, dict) and is_old(saved) and saved.keys() >= set(FIRST_FIELDS):
        return {**options, "data": {**(data or {}), "preprocess": {**saved, **FIRST_RULES}}}
    return options


def survey_data(
    config: DataConfig,
    spatial_dims: int = 3,
    split: Split | None = None,
    in_channels: int | None = None,
    force: bool = False,
) -> Survey:
    """Find the volumes and split them by person; `Survey` tells whether they go together.

    Args:
        config: The `--data.*` options.
        spatial_dims: 3 for volumes, 2 for their slices.
        split: Ids of train, val and test, as saved by an earlier run; None to split anew.
        in_channels: Channels that the model takes; None for any.
        force: Go on with what is left of `split` although the data have changed since.

    Returns:
        The volumes, their split, and what there is to tell of them.

    Raises:
        ValueError: No volumes, or a split that cannot be made or kept.
    """
    from loaders.consistency import Survey
    from loaders.find import find_subjects
    from loaders.persons import find_persons
    from loaders.splits import changes_since, split_subjects

    if not config.root:
        raise ValueError("data.root is not set: give a folder, a glob or a manifest")
    lines: list[str] = []
    known = [id for ids in split.values() for id in ids] if split is not None else []
    subjects = find_subjects(config.root, config.reading, known, lines.append)
    if split is None:
        subjects, told = find_persons(subjects, folder_of(config.root, subjects), config.group_by)
        fold = (config.folds, config.fold, config.stratify_by)
        split = split_subjects(subjects, config.fractions, *fold)
    else:
        today = {subject.id: subject.split for subject in subjects}
        split, told = changes_since(today, split, force, config.root)
        subjects = [subject for subject in subjects if subject.id in known]
    lacking = [s for s in subjects if config.balance_by not in (None, *s.labels)]
    if lacking:
        raise ValueError(
            f"data.balance_by: the manifest has no {config.balance_by!r} for {lacking[0].id}"
        )
    parts = ", ".join(f"{len(ids)} {name}" for name, ids in split.items())
    return Survey(
        subjects,
        split,
        [*lines, *told, f"split: {parts}"],
        config.reading,
        config.preprocess,
        config.on_error,
        in_channels,
        config.num_slices if spatial_dims == 2 else 1,
        spatial_dims,
        config.root,
    )


def nobody_trains(root: str, split: Split, ranks: int = 1) -> list[BrokenVolume]:
    """Return the fault of a split with too few training volumes, or nothing.

    Args:
        root: Where the volumes come from.
        split: Ids of train, val and test.
        ranks: How many train, each on volumes of its own.
    """
    from loaders.readers import BrokenVolume

    if len(split["train"]) >= ranks:
        return []
    if split["train"]:
        there = f"{ranks} ranks but only {len(split['train'])} volumes to train on"
        remedy = "start fewer, or leave more of them to training (data.fractions)"
        return [BrokenVolume(root, f"{there}: {remedy}")]
    parts = ", ".join(f"{len(ids)} in {name}" for name, ids in split.items() if ids)
    reason = f"no volume is left to train on ({parts}): mend the column split or data.fractions"
    return [BrokenVolume(root, reason)]


def folder_of(root: str, subjects: list[Subject]) -> Path:
    """Return the folder that paths are named below: the root, or what all files lie below."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        return folder
    parents = [os.path.abspath(subject.paths[0].parent) for subject in subjects]
    return Path(os.path.commonpath(parents))


@overload
def open_data(
    config: DataConfig,
    spatial_dims: Literal[3] = 3,
    split: Split | None = None,
    in_channels: int | None = None,
    say: Say | None = print,
    force: bool = False,
    ranks: int = 0,
) -> tuple[VolumeStore, Split]: ...
@overload
def open_data(
    config: DataConfig,
    spatial_dims: int,
    split: Split | None = None,
    in_channels: int | None = None,
    say: Say | None = print,
    force: bool = False,
    ranks: int = 0,
) -> tuple[VolumeStore | SliceStore, Split]: ...
def open_data(
    config: DataConfig,
    spatial_dims: int = 3,
    split: Split | None = None,
    in_channels: int | None = None,
    say: Say | None = print,
    force: bool = False,
    ranks: int = 0,
) -> tuple[VolumeStore | SliceStore, Split]:
    """Find the volumes, split them by subject, and bring them into the cache.

    Args:
        config: The `--data.*` options.
        spatial_dims: 3 for volumes, 2 for their slices.
        split: Ids of train, val and test, as saved by an earlier run; None to split anew.
        in_channels: Channels that the model takes, checked before anything is cached; None for any.
        say: Takes the lines on the data set; None for a rank that follows another, which has told
            and checked already.
        force: Go on with what is left of `split` although the data have changed since.
        ranks: How many train on it, each on volumes of its own; 0 for none.

    Returns:
        (store, split): a `VolumeStore` of all volumes (a `SliceStore` in 2D), and the ids of the
        volumes as {"train": [...], "val": [...], "test": [...]}.

    Raises:
        ValueError: No volumes, one that is broken, or one of the given split that is gone.

    Example:
        >>> store, split = open_data(DataConfig(root="data/demo"))
        >>> train = store.subset(split["train"])
    """
    from loaders.consistency import missing_label_maps, refuse
    from loaders.flat import flat_faults
    from loaders.slices import SliceStore
    from loaders.store import VolumeStore, silent

    survey = survey_data(config, spatial_dims, split, in_channels, force)
    if say is not None:
        for line in survey.lines:
            say(line)
        if isinstance(config.sampler(), LabelCorners):
            refuse(missing_label_maps(survey.subjects), say)
    needed = ranks if spatial_dims == 3 else min(ranks, 1)  # slices of one volume go to many
    refuse(nobody_trains(config.root, survey.split, needed), silent)
    store = VolumeStore.build(
        survey.subjects,
        config.cache_dir,
        config.preprocess,
        on_error=config.on_error,
        reading=config.reading,
        backend=config.store,
        threads=config.threads,
        in_channels=in_channels,
        num_slices=survey.num_slices,
        say=say or silent,
        survey=survey,
        cache_gb=config.cache_gb,
    )
    thickness = dict(zip(store.ids, store.spatial_shapes.min(axis=1).tolist(), strict=True))
    for fault in flat_faults(survey.subjects, thickness, spatial_dims, config.root):
        raise fault  # of a format that told nothing before it was read
    skipped = {row[0] for row in store.skipped}
    split = {name: [i for i in ids if i not in skipped] for name, ids in survey.split.items()}
    refuse(nobody_trains(config.root, split, needed), silent)  # some may have been skipped
    if spatial_dims == 2:
        return SliceStore(store, config.slice_axis, config.num_slices), split
    return store, split
