"""Where patches lie: the regular grid, the random samplers, and the plan of an epoch.

Corners are voxel indices of a patch's lowest corner. A plan is one integer table per epoch, rows
(volume, corner...), keyed by (seed, epoch) alone: ranks are slices of it, threads do not change
it, and resuming needs one integer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

TURNS = 8  # neighborhoods whose patches alternate, see `gathered`


class PatchGrid:
    """Evenly spread patches that cover a volume.

    Steps are even and the last patch ends at the border, so patches overlap by at least what is
    asked for. An axis shorter than the patch has one patch, at 0, that reaches over its end.

    Args:
        shape: Spatial shape of the volume in voxels.
        patch_size: Spatial shape of a patch in voxels.
        overlap: Fraction of the patch below 1, or a number of voxels (int); one for all axes or one
            an axis.
        multiple_of: Patches start at multiples of this (the model's factor), the last one apart.

    Example:
        >>> PatchGrid((100, 64), (64, 64), 0.5).starts
        (array([ 0, 18, 36]), array([0]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch_size: Sequence[int],
        overlap: float | int | Sequence[float | int] = 0,
        multiple_of: int | Sequence[int] = 1,
    ):
        dims = len(shape)
        if len(patch_size) != dims:
            raise ValueError(
                f"patch_size {tuple(patch_size)} has {len(patch_size)} axes, the volume has {dims}"
            )
        overlaps = overlap if isinstance(overlap, (list, tuple)) else (overlap,) * dims
        multiples = multiple_of if isinstance(multiple_of, (list, tuple)) else (multiple_of,) * dims
        self.shape = tuple(int(n) for n in shape)
        self.patch_size = tuple(int(p) for p in patch_size)
        axes = zip(self.shape, self.patch_size, overlaps, multiples, strict=True)
        self.starts = tuple(axis_starts(*axis) for axis in axes)

    def __len__(self) -> int:
        return int(np.prod([len(starts) for starts in self.starts]))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Yield the corners in C order."""
        return itertools.product(*(starts.tolist() for starts in self.starts))

    def corners(self) -> np.ndarray:
        """Return all corners, (N, dims) int32, in C order."""
        axes = np.meshgrid(*self.starts, indexing="ij")
        return np.stack([axis.ravel() for axis in axes], 1).astype(np.int32)


def axis_starts(size: int, patch: int, overlap: float | int, multiple: int) -> np.ndarray:
    """Starts along one axis: even steps of at most patch - overlap, first 0, last at the end."""
    if patch < 1:
        raise ValueError(f"patch_size {patch} must be at least 1")
    voxels = round(overlap * patch) if isinstance(overlap, float) else int(overlap)
    if (isinstance(overlap, float) and overlap >= 1) or overlap < 0 or voxels >= patch:
        raise ValueError(
            f"overlap {overlap} must be at least 0 and smaller than the patch: a fraction below 1, "
            f"or a number of voxels below {patch}"
        )
    last = size - patch
    if last <= 0:
        return np.zeros(1, int)
    count = 1 + -(-last // (patch - voxels))
    starts = np.rint(np.arange(count) * (last / (count - 1))).astype(int)
    if multiple > 1:
        step = max((patch - voxels) // multiple, 1) * multiple
        starts = np.append(np.arange(0, last, step), last)
    return starts


# --------------------------------------------------------------------------------------------------
# Samplers for patching="random_parts".


class Store(Protocol):
    """What loaders and samplers ask of a `VolumeStore` or `SliceStore`; items are (C, *spatial)."""

    spatial_shapes: np.ndarray  # (number of items, dims)

    def __len__(self) -> int: ...

    @property
    def ids(self) -> list[str]:
        """Names of the items."""

    @property
    def num_channels(self) -> int:
        """Channels of every item."""

    def shape(self, index: int) -> tuple[int, ...]:
        """(C, *spatial) of an item."""

    def spacing_mm(self, index: int) -> tuple[float, ...]:
        """Voxel size in millimeters."""

    def labels(self, index: int) -> dict[str, str]:
        """Return the manifest's further columns of an item."""

    def read(self, index: int, slices: Sequence[slice]) -> np.ndarray:
        """Return float32 voxels (C, *shape of the slices)."""

    def read_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read as `read` into a float32 buffer."""

    def foreground_points(self, index: int) -> np.ndarray:
        """Return remembered foreground voxels (N, dims)."""

    def label_points(self, index: int) -> dict[int, np.ndarray]:
        """Return remembered voxels (N, dims) of each label."""


@runtime_checkable
class Weighted(Store, Protocol):
    """A `Store` whose voxels may count more or less, or not at all."""

    @property
    def num_weights(self) -> int:
        """Channels of the weights, 1 or as many as the items; 0 where all voxels count alike."""

    def read_weights_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read how much voxels count into a float32 buffer (num_weights, *shape of the slices)."""


@runtime_checkable
class Chunked(Store, Protocol):
    """A `Store` of which some items may be read chunk by chunk from where they lie."""

    def chunks(self, index: int) -> tuple[int, ...] | None:
        """Voxels of an item that are read at once; None where each is as near as any other."""

    def lead(self, index: int) -> tuple[int, ...] | None:
        """Voxels of an item's first chunk that lie before its first voxel."""


class Sampler:
    """Draws patch corners; subclass it for another way to choose them.

    `corners` must draw from `rng` alone, so that a plan depends on (seed, epoch) only, and must
    keep to 0 <= corner <= max(shape - patch, 0) on each axis.
    """

    def corners(
        self, store: Store, volumes: np.ndarray, patch_size: Sequence[int], rng: np.random.Generator
    ) -> np.ndarray:
        """Draw one corner for each entry of `volumes`.

        Args:
            store: The volumes; `store.spatial_shapes` is (number of volumes, dims).
            volumes: Index of the volume of each patch, (N,).
            patch_size: Spatial shape of a patch.
            rng: The only source of randomness.

        Returns:
            Corners (N, dims).
        """
        raise NotImplementedError


class UniformCorners(Sampler):
    """Every voxel is seen, faces too: the patch's center is uniform over the volume.

    Corners are drawn from [-p/2, n - p/2] and moved inside; drawn from [0, n - p] alone, the
    voxels at the border would hardly ever be seen.
    """

    def corners(
        self, store: Store, volumes: np.ndarray, patch_size: Sequence[int], rng: np.random.Generator
    ) -> np.ndarray:
        """See `Sampler`."""
        shapes, patch = store.spatial_shapes[volumes], np.array(patch_size)
        corners = rng.integers(-(patch // 2), shapes - patch // 2 + 1)
        return np.clip(corners, 0, np.maximum(shapes - patch, 0))


class ForegroundCorners(Sampler):
    """A share of the patches is centered on foreground voxels (above Otsu's threshold).

    Args:
        probability: Share of the patches on foreground; the others are uniform.
    """

    def __init__(self, probability: float = 0.5):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}: use 0 to 1")
        self.probability = probability

    def centers(
        self, store: Store, volume: int, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw patch centers (count, dims) in a volume; none where it has nothing to offer."""
        points = store.foreground_points(volume)
        return points[rng.integers(0, len(points), count)] if len(points) else points

    def corners(
        self, store: Store, volumes: np.ndarray, patch_size: Sequence[int], rng: np.random.Generator
    ) -> np.ndarray:
        """See `Sampler`."""
        corners = UniformCorners().corners(store, volumes, patch_size, rng)
        patch, shapes = np.array(patch_size), store.spatial_shapes
        chosen = np.flatnonzero(rng.random(len(volumes)) < self.probability)
        # Sorted by volume, so that each volume's points are fetched once.
        chosen = chosen[np.argsort(volumes[chosen], kind="stable")]
        for volume, group in itertools.groupby(chosen, key=lambda row: int(volumes[row])):
            rows = list(group)
            centers = self.centers(store, volume, len(rows), rng)
            if len(centers):
                last = np.maximum(shapes[volume] - patch, 0)
                corners[rows] = np.clip(centers - patch // 2, 0, last)
        return corners


class LabelCorners(ForegroundCorners):
    """A share of the patches is centered on a voxel of a label drawn by weight.

    Label maps are files in the manifest's column `label_map`; their affines say where they lie.

    Args:
        weights: Label -> weight, for example {0: 1, 2: 3}; None for all labels but 0 alike.
        probability: Share of the patches on a label; the others are uniform.
    """

    def __init__(self, weights: dict[int, float] | None = None, probability: float = 1.0):
        super().__init__(probability)
        if weights is not None and (not weights or min(weights.values()) < 0):
            raise ValueError(f"weights are {weights}: give weights of at least 0")
        self.weights = weights

    def centers(
        self, store: Store, volume: int, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """See `ForegroundCorners`."""
        points = store.label_points(volume)
        weights = {
            label: (float(label != 0) if self.weights is None else self.weights.get(label, 0.0))
            for label in points
            if len(points[label])
        }
        total = sum(weights.values())
        if total == 0:  # none of the labels is in this volume
            return np.empty((0, 3), int)
        drawn = rng.choice(list(weights), count, p=[w / total for w in weights.values()])
        return np.stack([points[n][rng.integers(len(points[n]))] for n in drawn])


# --------------------------------------------------------------------------------------------------


def plan_epoch(
    store: Store,
    patch_size: Sequence[int] | None,
    patching: str | None,
    patches_per_volume: int,
    rng: np.random.Generator,
    sampler: Sampler,
    groups: Sequence[str] | None = None,
    patches_per_read: int = 1,
) -> np.ndarray:
    """Return the table of an epoch, rows (volume, corner...), in the order of training.

    Args:
        store: The volumes.
        patch_size: Spatial shape of a patch; None for whole volumes.
        patching: full, random_parts, or None for whole volumes.
        patches_per_volume: Patches of each volume with random_parts.
        rng: Keyed by seed and epoch.
        sampler: Draws the corners with random_parts.
        groups: Group of each volume, to make the groups equally frequent.
        patches_per_read: Patches from the chunks that one of them touches.
    """
    volumes = np.arange(len(store))
    if patch_size is None or patching is None:
        corners = np.zeros_like(store.spatial_shapes)
    elif patching == "random_parts":
        volumes = np.repeat(volumes, patches_per_volume // patches_per_read)
        volumes = volumes[arranged(volumes, groups, rng)]
        corners = sampler.corners(store, volumes, patch_size, rng)
        if patches_per_read > 1:
            volumes, corners = gathered(store, volumes, corners, patch_size, patches_per_read, rng)
        return np.concatenate([volumes[:, None], corners], 1).astype(np.int32)
    else:
        shapes, kind = np.unique(store.spatial_shapes, axis=0, return_inverse=True)
        grids = [PatchGrid(shape, patch_size).corners() for shape in shapes.tolist()]
        volumes = np.repeat(volumes, [len(grids[k]) for k in kind.ravel()])
        corners = np.concatenate([grids[k] for k in kind.ravel()])
    table = np.concatenate([volumes[:, None], corners], 1).astype(np.int32)
    return table[arranged(volumes, groups, rng)]


def gathered(
    store: Store,
    volumes: np.ndarray,
    corners: np.ndarray,
    patch_size: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each patch that many, all in the chunks that it touches.

    `TURNS` neighborhoods take turns: patches that follow each other are of different ones, and of
    so many ranks each reads neighborhoods of its own.

    Args:
        store: The volumes; where they have no chunks, chunks of the patch's size are thought of.
        volumes: Of the patches that lead, (N,).
        corners: Of these, (N, dims).
        patch_size: Spatial shape of a patch.
        count: Patches of each neighborhood, with the one that leads.
        rng: The only source of randomness.

    Returns:
        Volumes and corners of the N * count patches.
    """
    patch = np.array(patch_size)
    known = [
        (store.chunks(i), store.lead(i)) if isinstance(store, Chunked) else (None, None)
        for i in range(len(store))
    ]
    chunks = np.array([chunk or patch_size for chunk, _ in known])[volumes]
    lead = np.array([before or [0] * len(patch) for _, before in known])[volumes]
    shapes = store.spatial_shapes[volumes]
    low = (corners + lead) // chunks * chunks - lead
    high = np.minimum(-(-(corners + lead + patch) // chunks) * chunks - lead, shapes)
    low = np.maximum(np.minimum(low, shapes - patch), 0)
    last = np.maximum(high - patch, low)
    others = rng.integers(low[:, None], last[:, None] + 1, (len(corners), count - 1, len(patch)))
    drawn = np.concatenate([corners[:, None], others], axis=1)
    order = [
        (read, number)
        for first in range(0, len(corners), TURNS)
        for number in range(count)
        for read in range(first, min(first + TURNS, len(corners)))
    ]
    read, number = np.array(order).T
    return volumes[read], drawn[read, number]


def arranged(
    volumes: np.ndarray, groups: Sequence[str] | None, rng: np.random.Generator
) -> np.ndarray:
    """Return a random order of the rows; with groups, one in which each is equally frequent.

    The largest group comes once; rows of smaller ones repeat, each as often as any other of its
    group, give or take one. Any run of as many rows as there are groups, counted from the start,
    holds each group once.
    """
    if groups is None:
        return rng.permutation(len(volumes))
    labels = np.array(groups)[volumes]
    names, counts = np.unique(labels, return_counts=True)
    size = int(counts.max())
    columns = []
    for name in names:
        rows = np.flatnonzero(labels == name)
        rounds = [rng.permutation(rows) for _ in range(-(-size // len(rows)))]
        columns.append(np.concatenate(rounds)[:size])
    return rng.permuted(np.stack(columns, 1), axis=1).ravel()
