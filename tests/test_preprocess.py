"""Preprocessing: what it does, and that it can be undone."""

import json
import random

import numpy as np
import pytest
import torch

from loaders.intensities import clip_loss
from loaders.preprocess import (
    Augment,
    Preprocess,
    label_to_store_grid,
    orient,
    resample,
    resampled_grid,
    to_store_grid,
)
from loaders.readers import Volume, ras_axes
from loaders.statistics import PERCENTILES, otsu, statistics
from loaders.undo import undo

PSR = np.array([[0, 0, 2.0, -90], [-2, 0, 0, 100], [0, 2, 0, -60], [0, 0, 0, 1]])


def from_store_grid(volume, record, background):
    """Undo what `to_store_grid` did, intensities as they are."""
    count = len(volume.data)
    nothing, ones = [0.0] * count, [1.0] * count
    told = {"gain": ones, "bias": nothing, "scale": ones, "offset": nothing,
            "affine": volume.affine.tolist(), "geometry": record,
            "background": np.broadcast_to(background, (count,)).tolist()}  # fmt: skip
    return undo(volume.data, told)


def ball(shape=(20, 24, 18), affine=None, dtype=np.int16) -> Volume:
    """A bright smooth ball off the center on a dark ground, in scanner-like numbers."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    radius = np.linalg.norm(grid - np.array([0.1, -0.1, 0.2])[:, None, None, None], axis=0)
    data = 1000 * np.clip(1.4 - 2 * radius, 0, 1) + 5
    return Volume(data.astype(dtype)[None], np.eye(4) if affine is None else affine)


def test_ras_is_exact_and_keeps_every_voxel_in_its_place():
    volume = Volume(np.arange(120, dtype=np.uint8).reshape(1, 4, 5, 6), PSR)
    turned = orient(volume, *ras_axes(PSR))
    assert np.allclose(turned.affine[:3, :3], np.diag([2, 2, 2]))
    for index in np.ndindex(4, 5, 6):
        world = PSR @ [*index, 1]
        there = np.rint(np.linalg.inv(turned.affine) @ world).astype(int)[:3]
        assert turned.data[(0, *there)] == volume.data[(0, *index)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_foreground": True, "crop_margin_mm": 2.0},
        {"pad_to_multiple": 16},
        {"orient_ras": False},
        {"crop_foreground": True, "pad_to_multiple": 8},
    ],
)
def test_geometry_without_interpolation_is_undone_exactly(options):
    volume = ball(affine=PSR)
    stored, record = to_store_grid(volume, Preprocess(**options), threshold=200)
    if "pad_to_multiple" in options:
        assert all(n % options["pad_to_multiple"] == 0 for n in stored.data.shape[1:])
    if options.get("crop_foreground"):
        assert min(record["crop"][0]) > 0
    back = from_store_grid(stored, record, background=5)
    assert back.data.shape == volume.data.shape and np.allclose(back.affine, PSR)
    inside = volume.data > 200
    assert np.array_equal(back.data[inside], volume.data[inside])
    if not options.get("crop_foreground"):
        assert np.array_equal(back.data, volume.data)


def test_outside_a_crop_stands_each_channels_own_background():
    volume = ball()
    volume = Volume(np.concatenate([volume.data, volume.data]))
    stored, record = to_store_grid(volume, Preprocess(crop_foreground=True), threshold=200)
    back = from_store_grid(stored, record, background=[-1000, 7])
    assert back.data[:, 0, 0, 0].tolist() == [-1000, 7]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 3.0, 3.0), (2.0, 1.5, 4.0)])
def test_resampling_is_undone_up_to_interpolation(spacing):
    volume = ball((40, 44, 36), PSR, np.float32)
    stored, record = to_store_grid(volume, Preprocess(spacing_mm=spacing))
    assert np.allclose(stored.spacing_mm, spacing)
    back = from_store_grid(stored, record, background=0)
    assert back.data.shape == volume.data.shape and np.allclose(back.affine, PSR)
    assert np.abs(back.data - volume.data).mean() < 15  # of 1000


def test_resampled_values_stand_where_the_affine_says():
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (20, 22, 24)), indexing="ij")
    affine = np.diag([2.0, 1.0, 1.5, 1])
    affine[:3, 3] = (5, -7, 9)
    ramp = Volume((3 * (2 * x + 5) - 2 * (y - 7) + (1.5 * z + 9))[None], affine)
    shape, grid = resampled_grid(ramp, (1.3, 0.7, 1.1))
    out = resample(ramp, shape, grid).data[0]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).reshape(3, -1)
    world = grid[:3, :3] @ index + grid[:3, 3:]
    expected = np.array([3, -2, 1]) @ world
    inner = tuple(slice(3, -3) for _ in range(3))
    error = np.abs(out - expected.reshape(shape))[inner]
    assert error.max() < 1e-2


def test_shrinking_smooths_first():
    noise = np.random.default_rng(0).normal(0, 1000, (1, 32, 32, 32)).astype(np.float32)
    shape, grid = resampled_grid(Volume(noise), (4.0, 4.0, 4.0))
    assert resample(Volume(noise), shape, grid).data.std() < 250  # picking voxels keeps 1000


def test_the_border_of_a_ct_stays_air_after_resampling():
    air = Volume(np.full((1, 10, 10, 10), -1024, np.int16))
    for spacing in ((0.7,) * 3, (2.3,) * 3):
        stored, record = to_store_grid(air, Preprocess(spacing_mm=spacing))
        assert stored.data.dtype == np.int16 and (stored.data == -1024).all()
        back = from_store_grid(Volume(stored.data.astype(np.float32), stored.affine), record, 0)
        assert np.allclose(back.data, -1024)


def test_label_map_follows_its_volume():
    volume = ball((40, 48, 36), PSR)
    options = Preprocess(spacing_mm=(1.5, 1.5, 1.5), crop_foreground=True)
    stored, record = to_store_grid(volume, options, threshold=300)
    label = Volume((volume.data > 300).astype(np.uint8), PSR)
    moved = label_to_store_grid(label, record)
    assert moved.data.shape == stored.data.shape and set(np.unique(moved.data)) == {0, 1}
    assert ((stored.data > 300) == moved.data).mean() > 0.95


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_percentiles_are_those_of_numpy(dtype, scale):
    rng = np.random.default_rng(0)
    data = np.abs(rng.normal(60, 40, (11, 12, 13))).clip(0, 255).astype(dtype)
    if dtype == np.int32:
        data = data * 10**6
    stats, (table, of_foreground) = statistics(data, scale, 3.0)
    expected = np.percentile(data.astype(np.float64) * scale + 3, PERCENTILES)
    assert np.allclose(table, expected, rtol=1e-5, atol=1e-3)
    intensities = data.astype(np.float64) * scale + 3
    inside = intensities[intensities > stats["robust"]["foreground_threshold"]]
    assert stats["robust"]["foreground_fraction"] == pytest.approx(
        inside.size / data.size, abs=1e-3
    )
    assert np.allclose(
        of_foreground[1000:], np.percentile(inside, PERCENTILES)[1000:], rtol=1e-2, atol=1e-3
    )
    assert stats["min"] == pytest.approx(expected[0]) and stats["max"] == pytest.approx(
        expected[-1]
    )
    assert stats["mean"] == pytest.approx((data * scale + 3.0).mean(), rel=1e-4)
    assert stats["std"] == pytest.approx(abs(scale) * data.astype(float).std(), rel=1e-2)


def test_zscore_uses_the_foreground_not_the_background():
    volume = ball((30, 30, 30))
    stats, _ = statistics(volume.data[0], 1, 0)
    above = volume.data[volume.data > stats["foreground_threshold"]]
    assert 100 < stats["foreground_threshold"] < 900
    assert stats["foreground_mean"] == pytest.approx(above.mean())
    assert stats["foreground_std"] == pytest.approx(above.std())


def head(dtype=np.float32) -> np.ndarray:
    """A noisy ball of a tenth of the volume, on a noisy ground."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 24, 18)), indexing="ij"))
    noise = np.random.default_rng(0).normal(20, 5, (20, 24, 18)).clip(0, None)
    return (noise + 800 * (np.linalg.norm(grid, axis=0) < 0.6)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_voxel_at_a_thousand_times_the_rest_moves_neither_threshold_nor_zscore_nor_crop(
    dtype, scale
):
    data = (head(np.float32) / scale).astype(dtype)
    hot = data.copy()
    hot[1, 2, 3] = np.iinfo(np.int16).max * np.sign(scale) if dtype == np.int16 else 8e5 / scale
    found, touched = (statistics(x, scale, 0.0)[0]["robust"] for x in (data, hot))
    assert found["hot_voxels"] == 0 and touched["hot_voxels"] == 1
    assert 20 < found["foreground_threshold"] < 800
    assert 20 < touched["foreground_threshold"] < 800
    for name in ("foreground_mean", "foreground_std", "foreground_fraction"):
        assert touched[name] == pytest.approx(found[name], rel=0.03)
    boxes = []
    for x, stats in ((data, found), (hot, touched)):
        bounds = [stats[f"foreground_{name}"] / scale for name in ("threshold", "limit")]
        volume = Volume(x[None], scale=scale)
        boxes.append(to_store_grid(volume, Preprocess(crop_foreground=True), *bounds)[1]["crop"])
    assert boxes[0] == boxes[1] == [[4, 5, 4], [16, 19, 14]]


def test_a_sparse_foreground_is_found_and_its_percentiles_are_its_own():
    rng = np.random.default_rng(0)
    data = rng.normal(100, 10, (40, 40, 40)).clip(0, None)
    where = rng.choice(data.size, 200, replace=False)  # 0.3 %
    data.flat[where] = rng.uniform(1000, 4000, 200)
    for dtype in (np.uint16, np.float32):
        stored = data.astype(dtype)
        stats, (_, of_foreground) = statistics(stored, 1.0, 0.0)
        found = stats["robust"]
        assert found["foreground_fraction"] == pytest.approx(200 / data.size, rel=0.4)
        inside = stored[stored > found["foreground_threshold"]]
        assert np.allclose(of_foreground, np.percentile(inside, PERCENTILES), rtol=2e-3)
        assert clip_loss(stats, Preprocess(percentiles_of="all").channel(0)) == 1
        half = Preprocess(window_hu=(0, float(np.median(inside)))).channel(0)
        assert clip_loss(stats, half) == pytest.approx(0.5, abs=0.02)
        assert clip_loss(stats, Preprocess().channel(0)) == pytest.approx(0.005)


def test_otsu_splits_two_heaps_between_them():
    values = np.array([0, 1, 2, 50, 51, 52.0])
    assert otsu(values, np.array([5, 9, 5, 4, 8, 4])) == 2


def test_intensity_mappings():
    stats = {"min": 0.0, "max": 100.0, "foreground_mean": 50.0, "foreground_std": 10.0}

    def mapped(value, **options):
        gain, bias, low, high = Preprocess(**options).mapping(stats, lambda p: p)
        return float(np.clip(value * gain + bias, low, high))

    assert mapped(99.5) == pytest.approx(1) and mapped(200) == 1 and mapped(-5) == 0
    assert mapped(99.5 / 2) == pytest.approx(0.5)
    assert mapped(0, intensity="symmetric") == -1 and mapped(1e3, intensity="symmetric") == 1
    assert mapped(-1000, window_hu=(-1000, 400)) == pytest.approx(0)
    assert mapped(-300, window_hu=(-1000, 400)) == pytest.approx(0.5)
    assert mapped(60, intensity="zscore") == pytest.approx(1)


def test_the_upper_percentile_is_of_the_foreground_where_background_is_most_of_the_volume():
    def top(fraction, of):
        stats = {"min": 0.0, "max": 100.0, "foreground_fraction": fraction}
        quantile = lambda p, of_foreground=False: 90.0 if of_foreground else p / 2  # noqa: E731
        return Preprocess(percentiles_of=of).channel(0).clip(stats, quantile)

    assert top(0.2, "all") == (0, 49.75) and top(0.2, "foreground") == (0, 90)
    assert top(0.2, "auto") == (0, 90) and top(0.6, "auto") == (0, 49.75)


def test_volume_that_is_nearly_all_background_keeps_its_object():
    stats = {"min": 0.0, "max": 80.0}
    gain, bias, _, _ = Preprocess().mapping(stats, lambda p: 0.0)
    assert 80 * gain + bias == pytest.approx(1)


def test_contract_goes_through_json_and_differences_are_one_line():
    import json

    ct = Preprocess(spacing_mm=(2, 2, 2), window_hu=(-1000, 400))
    assert Preprocess.from_dict(json.loads(json.dumps(ct.to_dict()))) == ct
    assert ct.difference(ct) is None
    line = ct.difference(Preprocess())
    assert "window_hu is (-1000.0, 400.0), not None" in line and "\n" not in line
    with pytest.raises(ValueError, match="unknown keys"):
        Preprocess.from_dict({"windows": 1})


def test_settings_are_for_all_channels_or_for_one_by_number_or_name():
    both = Preprocess(
        channels=("ct", "pet"),
        window_hu={"ct": [-1000, 400]},
        intensity={1: "zscore"},
        percentiles=[0, 99],
    )
    ct, pet = both.channel(0), both.channel(1)
    assert ct.window_hu == (-1000, 400) and pet.window_hu is None
    assert ct.intensity == "unit" and pet.intensity == "zscore"
    assert ct.percentiles == pet.percentiles == (0, 99)
    assert [both.name(c) for c in (0, 1)] == ["ct", "pet"] and Preprocess().name(1) == "1"
    assert Preprocess.from_dict(both.to_dict()) == both
    both.check_channels(2, "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii: has 3 channels, .* 2 names"):
        both.check_channels(3, "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii: has 1 channels, .* channel 1"):
        Preprocess(window_hu={"1": (0, 5)}).check_channels(1, "a.nii")


def test_a_record_without_the_rules_means_those_of_its_time():
    old = Preprocess.from_dict({"intensity": "symmetric"})
    assert (old.percentiles_of, old.rules) == ("all", 1)
    assert (Preprocess().percentiles_of, Preprocess().rules) == ("auto", 2)
    assert Preprocess.from_dict(Preprocess().to_dict()) == Preprocess()
    told = {"intensity": "symmetric"}
    assert Preprocess.of_checkpoint(told, Preprocess(intensity="symmetric")) == old
    with pytest.raises(ValueError, match="percentiles_of is foreground, not all"):
        Preprocess.of_checkpoint(
            told, Preprocess(intensity="symmetric", percentiles_of="foreground")
        )
    assert "rules" not in Preprocess().geometry()
    cropped = Preprocess(crop_foreground=True).geometry()
    assert cropped == Preprocess.from_dict({"crop_foreground": True}).geometry() | {"rules": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"spacing_mm": (1, 2)},
        {"spacing_mm": (1, 0, 1)},
        {"window_hu": (400, -1000)},
        {"percentiles": (5, 5)},
        {"percentiles": (0, 99.555)},
        {"percentiles": (-1, 99)},
        {"intensity": "minmax"},
        {"pad_to_multiple": 0},
        {"percentiles_of": "brain"},
        {"rules": 3},
        {"percentiles_of": "auto", "rules": 1},
        {"channels": ("ct", "ct")},
        {"channels": ("0", "1")},
        {"window_hu": {"ct": (0, 1)}},
        {"window_hu": {"0": (1, 0)}},
        {"percentiles": {"pet": (0, 101)}, "channels": ("ct", "pet")},
        {"intensity": {1: "minmax"}},
    ],
)
def test_wrong_options_name_themselves(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Preprocess(**options)


NOISE = {"RandomNoise": {"std": 0.1}, "RandomGamma": {}}


def test_augmentation_depends_on_its_key_alone_and_leaves_random_state_alone():
    augment, patch = Augment(NOISE), torch.rand(1, 8, 9, 10)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = augment(patch, (0, 1, 2), (1.0, 1.0, 1.0))
    assert torch.equal(first, augment(patch, (0, 1, 2), (1.0, 1.0, 1.0)))
    assert not torch.equal(first, augment(patch, (0, 1, 3), (1.0, 1.0, 1.0)))
    assert not torch.equal(first, patch)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def test_augmentation_of_slices_and_its_mistakes():
    flip = Augment({"RandomFlip": {"axes": [0], "flip_probability": 1.0}})
    patch = torch.rand(2, 8, 9)
    assert torch.equal(flip(patch, (0,), (1.0, 1.0)), patch.flip(1))
    with pytest.raises(ValueError, match="no transform 'Nonsense'"):
        Augment({"Nonsense": {}})
    with pytest.raises(ValueError, match="RandomNoise"):
        Augment({"RandomNoise": {"sdt": 1}})
    with pytest.raises(ValueError, match="must keep the shape"):
        Augment({"Crop": {"cropping": 1}})(torch.rand(1, 8, 8, 8), (0,), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("unit", [1.0, 1e-5])
def test_resampling_is_the_same_in_millimeters_and_in_nanometers(unit):
    data = np.random.default_rng(0).normal(size=(1, 12, 14, 10)).astype(np.float32)
    shear = np.array([[1, 0, 0.3, 5], [0, 1.1, -0.8, 7], [0, 0, 2, -9], [0, 0, 0, 1 / unit]]) * unit
    volume = Volume(data, shear)
    preprocess = Preprocess(spacing_mm=tuple(np.array(volume.spacing_mm) * (1.3, 0.7, 1.001)))
    stored, record = to_store_grid(volume, preprocess)
    straight, _ = to_store_grid(
        Volume(data), Preprocess(spacing_mm=tuple(np.array([1.3, 0.7, 1.001])))
    )
    assert np.allclose(stored.data, straight.data, atol=1e-4) and stored.data.shape[2] == 20
    back = from_store_grid(stored, json.loads(json.dumps(record)), 0.0)
    assert np.allclose(back.affine, shear, rtol=1e-9) and back.data.shape == data.shape
