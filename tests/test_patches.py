"""Where patches lie: the grid covers, the samplers see every voxel, groups balance."""

from collections import Counter

import numpy as np
import pytest

from loaders import Preprocess, Subject, VolumeStore
from loaders.patches import (
    ForegroundCorners,
    LabelCorners,
    PatchGrid,
    Sampler,
    UniformCorners,
    plan_epoch,
)
from loaders.readers import Volume, write_volume


class Shapes:
    """A store that knows nothing but shapes."""

    def __init__(self, *shapes):
        self.spatial_shapes = np.array(shapes)

    def __len__(self):
        return len(self.spatial_shapes)


def covered(grid: PatchGrid) -> np.ndarray:
    count = np.zeros(grid.shape, int)
    for corner in grid:
        count[tuple(slice(c, c + p) for c, p in zip(corner, grid.patch_size, strict=True))] += 1
    return count


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9, 3, (0, 0.5, 2)])
@pytest.mark.parametrize("shape", [(16, 16, 16), (15, 17, 33), (5, 40, 16), (1, 16, 100)])
def test_grid_covers_every_voxel_and_stays_inside(shape, overlap):
    grid = PatchGrid(shape, (16, 16, 16), overlap)
    assert covered(grid).min() >= 1 and len(grid) == len(list(grid)) == len(grid.corners())
    assert np.array_equal(grid.corners(), list(grid))
    overlaps = overlap if isinstance(overlap, tuple) else (overlap,) * 3
    for starts, n, o in zip(grid.starts, shape, overlaps, strict=True):
        assert starts[0] == 0 and starts[-1] == max(n - 16, 0)
        steps = np.diff(starts)
        if len(steps):
            voxels = round(o * 16) if isinstance(o, float) else o
            assert steps.max() <= 16 - voxels and steps.max() - steps.min() <= 1


def test_sizes_below_equal_to_and_one_above_the_patch():
    assert [list(PatchGrid((n,), (8,)).starts[0]) for n in (7, 8, 9)] == [[0], [0], [0, 1]]


def test_grid_starts_at_multiples_of_the_factor():
    grid = PatchGrid((50, 50), (16, 16), 0.5, multiple_of=4)
    for starts in grid.starts:
        assert (starts[:-1] % 4 == 0).all() and starts[-1] == 34
    assert covered(grid).min() >= 1


@pytest.mark.parametrize("overlap", [1.0, 1.5, 8, 9, -1, -0.1])
def test_overlap_as_large_as_the_patch_is_told(overlap):
    with pytest.raises(ValueError, match="overlap"):
        PatchGrid((20, 20), (8, 8), overlap)


def test_patch_of_other_dimension_is_told():
    with pytest.raises(ValueError, match="patch_size"):
        PatchGrid((20, 20), (8, 8, 8))


def plan(store, size=(8, 8, 8), patching="random_parts", k=4, seed=0, sampler=None, groups=None):
    rng = np.random.default_rng(seed)
    return plan_epoch(store, size, patching, k, rng, sampler or UniformCorners(), groups)


def test_random_parts_are_exactly_k_per_volume_and_inside():
    store = Shapes((20, 9, 30), (8, 8, 8), (5, 40, 7))
    table = plan(store, k=50)
    assert Counter(table[:, 0].tolist()) == {0: 50, 1: 50, 2: 50}
    last = np.maximum(store.spatial_shapes[table[:, 0]] - 8, 0)
    assert (table[:, 1:] >= 0).all() and (table[:, 1:] <= last).all()
    assert not np.array_equal(table[:, 0], np.sort(table[:, 0]))  # shuffled


def test_full_is_every_patch_of_every_volume_once():
    store = Shapes((20, 9, 30), (8, 8, 8), (5, 40, 7), (20, 9, 30))
    table = plan(store, patching="full")
    rows = Counter(map(tuple, table.tolist()))
    assert set(rows.values()) == {1}
    for volume, shape in enumerate(store.spatial_shapes):
        expected = {(volume, *corner) for corner in PatchGrid(shape, (8, 8, 8))}
        assert {row for row in rows if row[0] == volume} == expected


def test_border_voxels_are_seen():
    """Over 100 epochs at most 0.1 % of the voxels are never in a patch."""
    shape, patch, epochs, k = (64, 64, 48), (16, 16, 16), 100, 8
    seen = np.zeros(shape, bool)
    for epoch in range(epochs):
        for _, x, y, z in plan(Shapes(shape), patch, k=k, seed=epoch):
            seen[x : x + 16, y : y + 16, z : z + 16] = True
    assert (~seen).mean() <= 1e-3


def test_uniform_centers_give_faces_their_share():
    store = Shapes((64,))
    volumes = np.zeros(200_000, int)
    corners = UniformCorners().corners(store, volumes, (16,), np.random.default_rng(0))[:, 0]
    count = np.bincount((corners[:, None] + np.arange(16)).ravel(), minlength=64)
    assert count[0] > 0.5 * count.mean()  # corners from [0, n - p] alone: 0.08
    assert count.min() > 0.45 * count.mean()


@pytest.fixture
def store(tmp_path) -> VolumeStore:
    """Two volumes with a small bright box, and label maps that mark two corners."""
    subjects = []
    for n in range(2):
        data = np.random.default_rng(n).integers(0, 10, (1, 40, 40, 40)).astype(np.int16)
        data[:, 30:36, 4:10, 20:26] = 1000
        label = np.zeros((1, 40, 40, 40), np.uint8)
        label[:, 2:4, 2:4, 2:4], label[:, 35:37, 35:37, 35:37] = 1, 2
        affine = np.diag([-1.0, 1, 1, 1])  # stored left to right: X is flipped in the store
        write_volume(tmp_path / f"s{n}.nii.gz", Volume(data, affine))
        write_volume(tmp_path / f"label{n}.nii.gz", Volume(label, affine))
        path, labels = tmp_path / f"s{n}.nii.gz", {"label_map": str(tmp_path / f"label{n}.nii.gz")}
        subjects.append(Subject(f"s{n}", (path,), None, labels))
    return VolumeStore.build(subjects, tmp_path / "cache", Preprocess(percentiles=(0, 100)))


def test_foreground_patches_hold_foreground(store):
    table = plan(store, k=100, sampler=ForegroundCorners(0.7))
    hits = [
        store.read(v, tuple(slice(c, c + 8) for c in corner)).max() > 0.9 for v, *corner in table
    ]
    assert 0.6 < np.mean(hits) < 0.85
    assert Counter(table[:, 0].tolist()) == {0: 100, 1: 100}


def test_label_patches_are_weighted_by_label(store):
    table = plan(store, k=200, sampler=LabelCorners({1: 3, 2: 1}))
    # X is flipped: label 1 lies at x 36..38, label 2 at x 3..5.
    near_one = (table[:, 1] > 20) & (table[:, 2] < 10) & (table[:, 3] < 10)
    near_two = (table[:, 1] < 10) & (table[:, 2] > 20) & (table[:, 3] > 20)
    assert (near_one | near_two).all() and 0.68 < near_one.mean() < 0.82
    every = plan(store, k=200, sampler=LabelCorners())
    assert 0.4 < (every[:, 1] > 20).mean() < 0.6
    nothing = plan(store, k=50, sampler=LabelCorners({9: 1}))
    assert len(nothing) == 100  # a label that is nowhere: uniform


def test_label_sampler_without_label_maps_says_so(store):
    bare = [Subject("s0", store.entries[0].subject.paths)]
    bare = VolumeStore.build(bare, store.cache_dir)
    with pytest.raises(ValueError, match="column label_map"):
        plan(bare, sampler=LabelCorners())


@pytest.mark.parametrize("sampler", Sampler.__subclasses__() + ForegroundCorners.__subclasses__())
def test_every_sampler_depends_on_its_generator_alone_and_stays_inside(store, sampler):
    tables = [plan(store, k=20, seed=5, sampler=sampler()) for _ in range(2)]
    assert np.array_equal(*tables)
    assert not np.array_equal(tables[0], plan(store, k=20, seed=6, sampler=sampler()))
    assert (tables[0][:, 1:] >= 0).all() and (tables[0][:, 1:] <= 32).all()


@pytest.mark.parametrize("patching", ["random_parts", "full", None])
@pytest.mark.parametrize("sizes", [(1,), (5, 5), (7, 2, 1), (1, 1, 10, 3)])
def test_groups_are_equally_frequent(patching, sizes):
    groups = [f"g{g}" for g, n in enumerate(sizes) for _ in range(n)]
    store = Shapes(*[(9, 8, 8)] * len(groups))
    table = plan(store, patching=patching, groups=groups)
    names = [groups[v] for v in table[:, 0]]
    count = Counter(names)
    assert len(count) == len(sizes) and len(set(count.values())) == 1
    per_volume = {None: 1, "full": 2, "random_parts": 4}[patching]
    assert count["g0"] == max(sizes) * per_volume
    # Every run of G rows holds each group once; volumes of a group differ by one visit at most.
    runs = np.array(names).reshape(-1, len(sizes))
    assert all(len(set(run)) == len(sizes) for run in runs)
    for group in count:
        visits = [int((table[:, 0] == v).sum()) for v, g in enumerate(groups) if g == group]
        assert max(visits) - min(visits) <= per_volume


def test_balanced_batches_never_repeat_a_row_of_the_largest_group():
    groups = ["a"] * 6 + ["b"] * 2
    table = plan(Shapes(*[(30, 30, 30)] * 8), patching="full", groups=groups)
    rows = Counter(map(tuple, table[table[:, 0] < 6].tolist()))
    assert set(rows.values()) == {1}
