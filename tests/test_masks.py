"""Masks of data: what does not count is not seen, and what counts is cut along with the image."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from loaders import (
    Augment,
    DataConfig,
    PatchDataset,
    PatchLoader,
    Preprocess,
    SliceStore,
    VolumeStore,
    find_subjects,
    open_data,
    survey_data,
)
from loaders.masks import nearest
from loaders.readers import BrokenVolume, Reading, Volume, read_volume, write_volume
from train_3d import train_3d
from vae3d.config import parse

SHAPE = (12, 10, 9)
AFFINE = np.array([[0, 0, 2.0, -90], [-2, 0, 0, 100], [0, 2, 0, -60], [0, 0, 0, 1]])
BESIDE = Reading(mask="{name}_mask.nii.gz")
RAW = Preprocess(intensity="raw")


def region(seed=0) -> np.ndarray:
    """A ball that touches no face but one."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return (np.square(grid - [6, 4 + seed, 3]).sum(-1) < 17).astype(np.uint8)


def write(folder, garbage=0, count=2, dtype=np.int16, **masks):
    """Images that are alike inside their masks, and hold garbage outside."""
    for n in range(count):
        data = np.random.default_rng(n).integers(10, 200, SHAPE).astype(dtype)
        data[region(n) == 0] = garbage
        write_volume(folder / f"s{n}.nii.gz", Volume(data[None], AFFINE))
        write_volume(folder / f"s{n}_mask.nii.gz", masks.get(f"s{n}") or mask_of(n))
    return folder


def mask_of(n=0) -> Volume:
    return Volume(region(n)[None], AFFINE)


def build(folder, cache, preprocess=None, reading=BESIDE, **options) -> VolumeStore:
    subjects = find_subjects(folder, reading)
    return VolumeStore.build(subjects, cache, preprocess, reading=reading, **options)


def weights(store, index) -> np.ndarray:
    out = np.empty((store.num_weights, *store.shape(index)[1:]), np.float32)
    store.read_weights_into(index, (slice(None),) * (out.ndim - 1), out)
    return out


@pytest.mark.parametrize("intensity", ["unit", "zscore", "raw"])
@pytest.mark.parametrize("backend", ["npy", "blosc2"])
def test_what_lies_under_a_mask_changes_nothing_that_is_read(tmp_path, intensity, backend):
    preprocess = Preprocess(intensity=intensity, spacing_mm=(3, 2, 2), crop_foreground=True)
    stores = [
        build(write(tmp_path / str(garbage), garbage), tmp_path / "c", preprocess, backend=backend)
        for garbage in (0, 30000, -999)
    ]
    for store in stores:
        assert store.ids == ["s0", "s1"] and store.num_weights == 1  # masks are no images
        for index in range(2):
            assert np.array_equal(store.read(index), stores[0].read(index))
            assert np.array_equal(weights(store, index), weights(stores[0], index))
            assert store.meta(index)["statistics"] == stores[0].meta(index)["statistics"]


def test_the_lowest_intensity_that_counts_stands_where_none_does(tmp_path):
    store = build(write(tmp_path / "a", 7), tmp_path / "c", RAW)
    source = read_volume(tmp_path / "a" / "s0.nii.gz").data[0]
    expected = np.where(region(), source, source[region() > 0].min())
    volume = store.undo(0, store.read(0))
    assert np.array_equal(volume.data[0], expected) and np.allclose(volume.affine, AFFINE)
    turned = store.undo(0, weights(store, 0))
    assert np.array_equal(turned.data[0], region())
    assert np.array_equal(store.seen(0), weights(store, 0)[0] > 0)


def test_without_a_mask_nothing_is_weighted_and_the_cache_is_that_of_old(tmp_path):
    folder = write(tmp_path / "a")
    for path in folder.glob("*_mask*"):
        path.unlink()
    store = build(folder, tmp_path / "c", reading=Reading())
    assert store.num_weights == 0 and store.seen(0) is None and "mask" not in store.meta(0)
    assert PatchLoader(store, (4, 4, 4), threads=0).read(range(1)).weight is None
    subjects = find_subjects(folder)
    recipe = [1, Preprocess().geometry(), "error", "error", "npy"]
    from loaders.build import Builder

    assert json.loads(Builder(tmp_path, Preprocess(), Reading()).recipe) == recipe
    assert Builder(tmp_path, Preprocess(), Reading()).key(subjects[0]) == store.entries[0].key


@pytest.mark.parametrize("turn", ["flipped", "permuted", "shifted", "finer"])
def test_a_mask_on_another_grid_is_aligned_by_its_affine(tmp_path, turn):
    data, affine = region()[None], AFFINE.copy()
    if turn == "flipped":
        data = data[:, ::-1].copy()
        affine[:3, 3] += affine[:3, 0] * (SHAPE[0] - 1)
        affine[:3, 0] *= -1
    if turn == "permuted":
        data, affine = data.transpose(0, 3, 1, 2), affine[:, [2, 0, 1, 3]]
    if turn == "shifted":  # the mask's field of view is another
        data = np.pad(data, [(0, 0), (2, 0), (0, 0), (0, 1)])
        affine[:3, 3] -= 2 * affine[:3, 0]
    if turn == "finer":
        data = data.repeat(2, 1).repeat(2, 2).repeat(2, 3)
        affine[:3, 3] -= affine[:3, :3] @ np.full(3, 0.25)
        affine[:3, :3] /= 2
    folder = write(tmp_path / "a", s0=Volume(data, affine))
    store = build(folder, tmp_path / "c", RAW)
    assert np.array_equal(store.undo(0, weights(store, 0)).data[0], region())


def test_a_mask_without_a_place_in_space_is_taken_voxel_by_voxel(tmp_path):
    folder = write(tmp_path / "a")
    for n in range(2):
        np.save(folder / f"s{n}_fov.npy", region(n))
    reading = Reading(mask="{name}_fov.npy")
    for path in folder.glob("*_mask*"):
        path.unlink()
    store = build(folder, tmp_path / "c", RAW, reading)
    assert store.ids == ["s0", "s1"]
    assert np.array_equal(store.undo(1, weights(store, 1)).data[0], region(1))


def test_nearest_neighbors_hold_for_an_oblique_grid():
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(0, 9, (2, 5, 6, 7)).astype(np.uint8), AFFINE)
    angle = np.deg2rad(17)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine, shape = turn @ AFFINE, (6, 5, 8)
    out = nearest(volume, shape, affine).data
    for index in np.ndindex(shape):
        at = np.rint(np.linalg.inv(AFFINE) @ affine @ [*index, 1])[:3].astype(int)
        inside = ((at >= 0) & (at < volume.data.shape[1:])).all()
        expected = volume.data[(slice(None), *at)] if inside else [0, 0]
        assert np.array_equal(out[(slice(None), *index)], expected)


def test_patches_and_their_weights_are_cut_alike_and_padding_counts_nothing(tmp_path):
    folder = write(tmp_path / "a")
    store = build(folder, tmp_path / "c", replace(RAW, pad_to_multiple=8))
    assert store.shape(0)[1:] == (16, 16, 16)  # RAS: the source's 9 x 12 x 10
    whole = [weights(store, index)[0] for index in range(2)]
    assert all(w[9:].sum() == w[:, 12:].sum() == w[:, :, 10:].sum() == 0 for w in whole)
    size = (8, 20, 4)  # reaches over the end
    batch = PatchLoader(store, size, patches_per_volume=20, batch_size=40, threads=0).read(
        range(40)
    )
    assert batch.weight.shape == (40, 1, *size) and batch.weight[:, :, :, 16:].sum() == 0
    assert batch.weight.sum() > 0
    for weight, volume, corner in zip(batch.weight, batch.volume, batch.corner, strict=True):
        x, y, z = corner.tolist()
        expected = whole[volume][x : x + 8, y : y + 20, z : z + 4]
        assert np.array_equal(weight[0, :, :16], expected)
    item = PatchDataset(store, size, patches_per_volume=20)[3]
    assert torch.equal(item["weight"], batch.weight[3])


def test_whole_volumes_of_a_batch_are_padded_with_voxels_that_do_not_count(tmp_path):
    folder = write(tmp_path / "a", count=1)
    small = Volume(np.arange(60, dtype=np.int16).reshape(1, 5, 4, 3))
    write_volume(folder / "tiny.nii.gz", small)
    write_volume(folder / "tiny_mask.nii.gz", Volume(np.ones((1, 5, 4, 3), np.uint8)))
    store = build(folder, tmp_path / "c", RAW)
    batch = PatchLoader(store, None, patching=None, batch_size=2, threads=0).read(range(2))
    row = batch.volume.tolist().index(1)
    assert batch.weight[row].sum() == 60 and batch.weight[row, 0, :5, :4, :3].min() == 1


def test_augmentation_moves_image_and_weights_together():
    x = torch.rand(2, 8, 9, 10) + 1
    weight = (x[:1] > 1.5).float()
    x = x * weight
    augment = Augment({"RandomFlip": {"axes": [0, 1, 2], "flip_probability": 0.5}})
    for n in range(6):
        image, moved = augment(x, (0, n), (1, 1, 1), weight)
        assert torch.equal(image[0] > 0, moved[0] > 0)
        assert torch.equal(image, augment(x, (0, n), (1, 1, 1)))  # the same draw as without
    affine = Augment({"RandomAffine": {"degrees": 40, "translation": 3}})
    image, moved = affine(x, (0, 0), (1, 1, 1), torch.full_like(weight, 2.5))
    assert set(moved.unique().tolist()) == {0.0, 2.5} and image.shape == x.shape
    noisy, same = Augment({"RandomNoise": {"std": 1}})(x, (0, 0), (1, 1, 1), weight)
    assert torch.equal(same, weight) and not torch.equal(noisy, x)
    flat, moved = augment(x[..., 0], (0, 1), (1, 1), weight[..., 0])
    assert flat.shape == (2, 8, 9) and torch.equal(flat[0] > 0, moved[0] > 0)


@pytest.mark.parametrize("num_slices", [1, 3])
def test_slices_have_the_weights_of_their_volume(tmp_path, num_slices):
    store = build(write(tmp_path / "a"), tmp_path / "c", RAW)
    slices = SliceStore(store, 1, num_slices)
    assert slices.num_weights == num_slices
    for index in (0, 5, 14):
        volume, number = slices.locate(index)
        near = range(number - num_slices // 2, number + num_slices // 2 + 1)
        near = np.clip(near, 0, store.shape(volume)[2] - 1)
        expected = weights(store, volume)[0][:, near].transpose(1, 0, 2)
        assert np.array_equal(weights(slices, index), expected)
        assert np.array_equal(slices.seen(index), weights(store, volume)[0][:, number] > 0)
    batch = PatchLoader(slices, (4, 4), batch_size=5, threads=0).read(range(5))
    assert batch.weight.shape == batch.image.shape == (5, num_slices, 4, 4)


def test_voxels_that_are_not_finite_do_not_count_where_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for n in range(2):
        data = rng.normal(size=(*SHAPE, 2)).astype(np.float32)
        if n == 0:
            data[2, 3, 4, 1], data[5, 5, 5, 0] = np.nan, np.inf
        np.save(tmp_path / "a" / f"v{n}.npy", data)
    reading = Reading(nan="mask", volumes_4d="channels")
    store = build(tmp_path / "a", tmp_path / "c", RAW, reading)
    seen = np.ones(SHAPE, bool)
    seen[2, 3, 4] = seen[5, 5, 5] = False
    assert np.array_equal(store.seen(0), seen) and store.seen(1).all()
    data = np.load(tmp_path / "a" / "v0.npy").transpose(3, 0, 1, 2)
    lowest = data[:, seen].min(1)
    assert np.array_equal(store.read(0)[:, seen], data[:, seen])
    assert np.array_equal(store.read(0)[:, 2, 3, 4], lowest)
    assert store.entries[1].mask is None and store.num_weights == 1  # all count: nothing is kept
    with pytest.raises(
        BrokenVolume, match=r"2 voxels .* infinite: set data.nan to fill or to mask"
    ):
        build(tmp_path / "a", tmp_path / "c", RAW, Reading(volumes_4d="channels"))


def test_nan_under_a_mask_is_no_error(tmp_path):
    folder = write(tmp_path / "a", np.nan, dtype=np.float32)
    assert np.isfinite(build(folder, tmp_path / "c", RAW).read(0)).all()


def test_a_column_of_the_manifest_names_masks_and_weights_stand_for_their_values(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "m.csv").write_text("path,fov\ns0.nii.gz,s0_mask.nii.gz\ns1.nii.gz,s1_mask.nii.gz\n")
    reading = Reading(mask="fov", mask_weights={0: 0.25, 1: 2})
    store = build(folder / "m.csv", tmp_path / "c", RAW, reading)
    expected = np.where(region(1), 2, 0.25)
    assert np.array_equal(store.undo(1, weights(store, 1)).data[0], expected)
    assert store.seen(1).all() and store.read(1).min() == 0  # what counts little is seen
    plain = build(folder / "m.csv", tmp_path / "c", RAW, Reading(mask="fov"))
    assert {e.key for e in plain.entries}.isdisjoint(e.key for e in store.entries)
    (folder / "m.csv").write_text("path,fov\ns0.nii.gz,s0_mask.nii.gz\ns1.nii.gz,\n")
    with pytest.raises(ValueError, match=r"s1 has no mask: the column is empty \(data.mask 'fov'"):
        find_subjects(folder / "m.csv", reading)


@pytest.mark.parametrize("written", ["masks\\s0.nii.gz", "~/masks/s0.nii.gz"])
def test_a_column_of_masks_is_read_like_that_of_images(tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "s0.nii.gz").touch()
    (tmp_path / "m.csv").write_text(f"path;fov\ns0.nii.gz;{written}\n")
    (subject,) = find_subjects(tmp_path / "m.csv", Reading(mask="fov"))
    assert subject.mask == tmp_path / "masks" / "s0.nii.gz"


def test_a_mask_that_changed_is_read_again(tmp_path):
    folder = write(tmp_path / "a")
    before = weights(build(folder, tmp_path / "c", RAW), 0)
    write_volume(folder / "s0_mask.nii.gz", Volume(region()[None] * 3, AFFINE))
    assert np.array_equal(weights(build(folder, tmp_path / "c", RAW), 0), 3 * before)


def test_time_points_have_masks_of_their_own_or_one_for_all(tmp_path):
    data = np.random.default_rng(0).integers(1, 99, (3, *SHAPE)).astype(np.int16)
    moving = np.stack([region(n) for n in range(3)])
    for name, mask in (("still", region()[None]), ("moving", moving)):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(data))
        write_volume(tmp_path / f"{name}_mask.nii.gz", Volume(mask))
    reading = replace(BESIDE, volumes_4d="samples")
    store = build(tmp_path, tmp_path / "c", RAW, reading)
    assert store.ids[0] == "moving__t000" and len(store) == 6
    found = np.stack([store.seen(index) for index in range(6)])
    assert np.array_equal(found[:3], moving > 0) and (found[3:] == (region() > 0)).all()


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (Volume(np.zeros((1, *SHAPE), np.uint8), AFFINE), "no voxel counts"),
        (Volume(np.ones((1, *SHAPE), np.uint8)), "no voxel counts"),  # lies somewhere else
        (Volume(-region()[None].astype(np.int16), AFFINE), "at least 0"),
        (Volume(region()[None, :-1], AFFINE), "is 11x10x9, its image 12x10x9 at the same place"),
        (Volume(np.stack([region()] * 2), AFFINE), "a mask of 2 volumes"),
    ],
)
def test_a_mask_that_cannot_be_right_is_told_by_name(tmp_path, mask, word):
    folder = write(tmp_path / "a", s0=mask)
    survey = survey_data(DataConfig(str(folder), mask=BESIDE.mask))
    survey.read_voxels()
    (error,) = survey.faults
    assert word in str(error) and "s0" in str(error)
    with pytest.raises(BrokenVolume, match=word):
        build(folder, tmp_path / "c")


def test_masks_that_are_missing_or_named_wrong_are_told_before_anything_is_cached(tmp_path):
    folder = write(tmp_path / "a")
    config = DataConfig(str(folder), str(tmp_path / "c"), mask="brain")
    with pytest.raises(ValueError, match=r"data.mask is 'brain': neither a column .* nor"):
        open_data(config)
    config.mask = "{name}_mask.nii.gz"
    (folder / "s1_mask.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"s1 has no mask: .*s1_mask.nii.gz does not exist"):
        open_data(config)
    assert not (tmp_path / "c").exists()
    config.mask_weights = {1: 1.0}
    write_volume(folder / "s1_mask.nii.gz", Volume(np.ones((1, *SHAPE), np.uint8), AFFINE))
    with pytest.raises(BrokenVolume, match=r"holds 0, which data.mask_weights does not name"):
        open_data(config)


def test_masks_without_an_image_are_refused_in_one_line(tmp_path):
    folder = write(tmp_path / "a")
    config = DataConfig(f"{folder}/*_mask.nii.gz", mask="{name}.nii.gz")
    with pytest.raises(ValueError, match=r"holds masks alone, no image \(data.root, data.mask"):
        open_data(config)


def test_options_of_masks_come_from_the_command_line_and_survive_a_saved_run(tmp_path):
    argv = ["--data.root", "d", "--out_dir", "o", "--data.mask", "fov", "--data.nan", "mask"]
    kwargs = parse(train_3d, [*argv, "--data.mask_weights", "{0: 0.1, 1: 1}"])
    data = kwargs["data"]
    assert data.reading == Reading(nan="mask", mask="fov", mask_weights={0: 0.1, 1: 1.0})
    told = json.loads(json.dumps(asdict(data.reading)))  # keys become texts
    assert Reading.of(told).masked("trained").mask_weights.keys() == {"0", "1"}
    folder = write(tmp_path / "a")
    stores = [
        build(folder, tmp_path / "c", RAW, replace(BESIDE, mask_weights=weights))
        for weights in ({0: 0.5, 1: 1}, {"0": 0.5, "1": 1.0})
    ]
    assert stores[0].entries[0].key == stores[1].entries[0].key
