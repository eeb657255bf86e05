"""The `--data.*` options and the one call that turns them into a store and a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from loaders.patches import Sampler, UniformCorners
from loaders.preprocess import Augment, Preprocess

if TYPE_CHECKING:
    from loaders.readers import Reading
    from loaders.slices import SliceStore
    from loaders.store import VolumeStore

Split = dict[str, list[str]]  # train, val and test -> the ids of their volumes


@dataclass
class DataConfig:
    """Which volumes, and how they are read.

    Args:
        root: Folder (searched below), glob, or CSV/JSON manifest with the column `path`.
        cache_dir: Where prepared volumes are kept; null for ~/.cache/vae3d (or $VAE3D_CACHE).
        fractions: Parts of the subjects for train, val and test.
        preprocess: What is done to each volume.
        on_error: Broken file: raise ends the run, skip lists it in skipped.csv.
        nan: NaN or infinite voxels: error, fill (with the volume's lowest intensity) or mask (they
            are filled and count nothing).
        volumes_4d: 4D files: error, channels (each volume a channel), first, or samples (each time
            point is a volume of its own, all of one person).
        mask: Which voxels count: a manifest column of files, or a pattern beside the image, such as
            `{name}_mask.nii.gz`. Its values are weights; what is 0 is neither seen nor counted.
        mask_weights: Weights of the values of masks, e.g. {0: 0.1, 1: 1}; null for the values.
        backend: Cache as npy (fastest), or blosc2 (about half the disk space).
        slice_axis: For 2D training: the axis that slices are cut across (0, 1 or 2).
        num_slices: For 2D training: neighboring slices that become channels (odd).
        balance_by: Manifest column whose groups come equally often in an epoch.
        sampler: Where random patches lie: UniformCorners, ForegroundCorners or LabelCorners.
        augment: TorchIO transforms for training, e.g. {RandomNoise: {std: [0, 0.05]}}.
        threads: Volumes that are read at once while caching; null for one per core.
    """

    root: str = ""
    cache_dir: str | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    preprocess: Preprocess = field(default_factory=Preprocess)
    on_error: Literal["raise", "skip"] = "raise"
    nan: Literal["error", "fill", "mask"] = "error"
    volumes_4d: Literal["error", "channels", "first", "samples"] = "error"
    mask: str | None = None
    mask_weights: dict[int, float] | None = None
    backend: Literal["npy", "blosc2"] = "npy"
    slice_axis: int = 2
    num_slices: int = 1
    balance_by: str | None = None
    sampler: Callable[[], Sampler] = UniformCorners
    augment: dict[str, dict[str, Any]] | None = None
    threads: int | None = None

    @property
    def reading(self) -> Reading:
        """How the files are read."""
        from loaders.readers import Reading

        return Reading.of(vars(self))

    def loader_options(self) -> dict[str, Any]:
        """Return what the training loader takes from here: sampler, balance, augmentation."""
        return {
            "sampler": self.sampler,
            "balance_by": self.balance_by,
            "augment": Augment(self.augment) if self.augment else None,
        }


@overload
def open_data(
    config: DataConfig,
    spatial_dims: Literal[3] = 3,
    split: Split | None = None,
    in_channels: int | None = None,
) -> tuple[VolumeStore, Split]: ...
@overload
def open_data(
    config: DataConfig,
    spatial_dims: int,
    split: Split | None = None,
    in_channels: int | None = None,
) -> tuple[VolumeStore | SliceStore, Split]: ...
def open_data(
    config: DataConfig,
    spatial_dims: int = 3,
    split: Split | None = None,
    in_channels: int | None = None,
) -> tuple[VolumeStore | SliceStore, Split]:
    """Find the volumes, split them by subject, and bring them into the cache.

    Args:
        config: The `--data.*` options.
        spatial_dims: 3 for volumes, 2 for their slices.
        split: Ids of train, val and test, as saved by an earlier run; None to split anew.
        in_channels: Channels that the model takes, checked before anything is cached; None for any.

    Returns:
        (store, split): a `VolumeStore` of all volumes (a `SliceStore` in 2D), and the ids of the
        volumes as {"train": [...], "val": [...], "test": [...]}.

    Raises:
        ValueError: No volumes, one that is broken, or one of the given split that is gone.

    Example:
        >>> store, split = open_data(DataConfig(root="data/demo"))
        >>> train = store.subset(split["train"])
    """
    from loaders.find import find_subjects
    from loaders.slices import SliceStore
    from loaders.splits import split_subjects
    from loaders.store import VolumeStore

    if not config.root:
        raise ValueError("data.root is not set: give a folder, a glob or a manifest")
    subjects = find_subjects(config.root, config.reading)
    if split is None:
        split = split_subjects(subjects, config.fractions)
    vanished = {id for ids in split.values() for id in ids} - {subject.id for subject in subjects}
    if vanished:
        raise ValueError(
            f"{config.root}: of this run's split.json {len(vanished)} are gone, first "
            f"{min(vanished)!r}; put them back, or begin anew with --fresh"
        )
    store = VolumeStore.build(
        subjects,
        config.cache_dir,
        config.preprocess,
        on_error=config.on_error,
        reading=config.reading,
        backend=config.backend,
        threads=config.threads,
        in_channels=in_channels,
        num_slices=config.num_slices if spatial_dims == 2 else 1,
    )
    skipped = {row[0] for row in store.skipped}
    split = {name: [id for id in ids if id not in skipped] for name, ids in split.items()}
    if spatial_dims == 2:
        return SliceStore(store, config.slice_axis, config.num_slices), split
    return store, split
