"""Masks, several files and colors of volumes that stay where they are: the numbers of a copy."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders import (
    DataConfig,
    PatchLoader,
    Preprocess,
    Reading,
    SliceStore,
    VolumeStore,
    find_subjects,
    survey_data,
)
from loaders.readers import BrokenVolume, Volume, read_volume, write_volume
from tests.stores import array, halved, ome, voxels
from vae3d import load_model
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.commands.train import train_3d
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm

pytest.importorskip("tensorstore")
SHAPE = (24, 20, 16)  # Z, Y, X
TURNED = {"x": "right-to-left", "y": "anterior-to-posterior", "z": "inferior-to-superior"}
RAW = Preprocess(intensity="raw", orient_ras=False)


def ball(*shape: int) -> np.ndarray:
    """Two values of weights around the middle, 0 elsewhere."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    radius = np.square(grid).sum(0)
    return ((radius < 0.9).astype(np.uint8) + (radius < 0.4)).astype(np.uint8)


def built(root, cache, preprocess=None, **reading) -> VolumeStore:
    how = Reading(**reading)
    subjects = find_subjects(root, how)
    return VolumeStore.build(subjects, cache, preprocess, reading=how, progress=False)


def listed(folder: Path, *rows: str) -> Path:
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder / "list.csv"


def weights(store, index=0) -> np.ndarray:
    out = np.empty((1, *store.shape(index)[1:]), np.float32)
    store.read_weights_into(index, (slice(None),) * 3, out)
    return out[0]


def masked(folder: Path, kind: str, garbage=50_000) -> Path:
    """Write an image with garbage where its mask is 0, and a manifest of both."""
    folder.mkdir(exist_ok=True)
    image, mask = voxels(*SHAPE), ball(*SHAPE)
    image[mask == 0] = garbage
    how = {"unit": "millimeter", "orientation": TURNED}
    path = ome(folder / "a.zarr", [image], **how)
    name = {"coarse": "a_mask.zarr", "file": "a_mask.nii.gz"}.get(kind, "a.zarr/labels/fov")
    if kind == "file":  # on a grid of its own, with axes of its own
        affine = np.diag([0.5, 0.5, 2.0, 1.0])
        write_volume(
            folder / name, Volume(mask.transpose(2, 1, 0)[None, ::-1, ::-1], affine_of(affine))
        )
    elif kind == "coarse":  # a voxel less, half as fine, somewhere else
        ome(folder / name, [mask[::2, 2::2, ::2]], scale=(4.0, 1.0, 1.0), offset=(0, 1.0, 0), **how)
    else:
        ome(path / "labels" / "fov", [mask, halved(mask)], chunks=5, **how)
    return listed(folder, "path,fov", f"a.zarr,{name}")


def affine_of(straight: np.ndarray) -> np.ndarray:
    """Of a volume whose axes x and y run the other way than in the store."""
    affine = straight.copy()
    affine[:2, 3] = [-0.5 * (SHAPE[2] - 1), -0.5 * (SHAPE[1] - 1)]
    return affine


@pytest.mark.parametrize("options", [{}, {"crop_foreground": True, "pad_to_multiple": 7}])
@pytest.mark.parametrize("kind", ["labels", "coarse", "file"])
def test_a_mask_of_a_store_counts_the_voxels_that_it_counts_of_a_copy(tmp_path, kind, options):
    root = masked(tmp_path, kind)
    here, copy = (
        built(root, tmp_path / "c", Preprocess(**options), mask="fov", in_place=way)
        for way in (True, False)
    )
    assert here.chunks(0) == (8, 8, 8) and copy.chunks(0) is None
    assert 0 < weights(here).mean() < 2
    np.testing.assert_array_equal(weights(here), weights(copy))
    np.testing.assert_array_equal(here.read(0), copy.read(0))
    for what in ("affine", "undo", "statistics"):
        assert here.meta(0)[what] == copy.meta(0)[what]
    loaders = [PatchLoader(s, (8, 9, 10), patches_per_volume=9, threads=0) for s in (here, copy)]
    for one, other in zip(*loaders, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.weight, other.weight)
    slices = [SliceStore(store, 1) for store in (here, copy)]
    np.testing.assert_array_equal(*(one.seen(7) for one in slices))


def test_what_lies_under_a_mask_of_a_store_is_not_seen(tmp_path):
    read = []
    for garbage in (0, 50_000):
        root = masked(tmp_path / str(garbage), "labels", garbage)
        read.append(built(root, tmp_path / "c", mask="fov").read(0))
    np.testing.assert_array_equal(*read)


def test_garbage_that_is_not_finite_is_no_error_under_a_mask_and_one_beside_it(tmp_path):
    image, mask = voxels(*SHAPE).astype(np.float32), ball(*SHAPE)
    image[mask == 0] = np.nan
    ome(tmp_path / "a.zarr", [image])
    ome(tmp_path / "a.zarr" / "labels" / "fov", [mask])
    root = listed(tmp_path, "path,fov", "a.zarr,a.zarr/labels/fov")
    store = built(root, tmp_path / "c", RAW, mask="fov")
    read = store.read(0)[0]
    assert read.min() == image[mask > 0].min() == read[0, 0, 0]
    mask[0, 0, 0] = 1  # nobody has measured this one
    ome(tmp_path / "a.zarr" / "labels" / "fov", [mask])
    with pytest.raises(BrokenVolume, match=r"1 voxels are NaN or infinite: set data\.nan to"):
        built(root, tmp_path / "c", RAW, mask="fov")


def test_voxels_that_are_not_finite_do_not_count_patch_by_patch(tmp_path):
    images = [voxels(*SHAPE, seed=n).astype(np.float32) for n in range(2)]
    images[0][3, 2, 1] = np.nan  # of one channel is enough
    images[1][20:, 10:, :4] = np.inf
    path = ome(tmp_path / "a.zarr", [np.stack(images)], axes="czyx")
    options = Preprocess(pad_to_multiple=7)
    here, copy = (
        built(path, tmp_path / "c", options, nan="mask", in_place=way) for way in (True, False)
    )
    np.testing.assert_array_equal(here.read(0), copy.read(0))
    np.testing.assert_array_equal(weights(here), weights(copy))
    inside = weights(here)[: SHAPE[2], : SHAPE[1], : SHAPE[0]]
    np.testing.assert_array_equal(inside, np.isfinite(images).all(0).transpose(2, 1, 0))
    loader = PatchLoader(here, (5, 6, 7), patches_per_volume=5, threads=2)
    for batch in loader:
        box = tuple(slice(a, a + n) for a, n in zip(batch.corner[0], (5, 6, 7), strict=True))
        np.testing.assert_array_equal(batch.weight[0, 0], weights(here)[box])
    whole = ome(tmp_path / "b.zarr", [voxels(*SHAPE)])  # of integers all count
    assert built(whole, tmp_path / "c", nan="mask").num_weights == 0


def test_objects_of_a_label_image_weigh_one_each_and_values_what_is_said_of_them(tmp_path):
    labels = ball(*SHAPE).astype(np.uint16) * 300
    ome(tmp_path / "a.zarr", [voxels(*SHAPE)])
    path = ome(tmp_path / "a.zarr" / "labels" / "cells", [labels])
    held = json.loads((path / "zarr.json").read_text())
    root = listed(tmp_path, "path,cells", "a.zarr,a.zarr/labels/cells")
    keys = []
    for change, values, told in (
        ({}, (0, 300, 600), {}),
        ({"image-label": {}}, (0, 1, 1), {}),
        ({"image-label": {}}, (0.5, 0, 2), {"mask_weights": {0: 0.5, 300: 0, 600: 2}}),
    ):
        held["attributes"]["ome"].update(change)
        (path / "zarr.json").write_text(json.dumps(held))
        expected = np.array(values, np.float32)[labels // 300].transpose(2, 1, 0)
        for way in (True, False):
            store = built(root, tmp_path / "c", mask="cells", in_place=way, **told)
            np.testing.assert_array_equal(weights(store), expected)
            keys.append(store.entries[0].key)
    assert len(set(keys)) == 6
    with pytest.raises(BrokenVolume, match=r"holds 300, which data\.mask_weights does not"):
        built(root, tmp_path / "c", mask="cells", mask_weights={0: 0, 600: 2})


def test_a_mask_takes_the_coarsest_level_that_is_fine_enough(tmp_path):
    fine, mask = voxels(*SHAPE), ball(*SHAPE)
    ome(tmp_path / "a.zarr", [fine, halved(fine)])
    ome(tmp_path / "m.zarr", [mask, 10 + halved(mask), 20 + halved(halved(mask))])
    root = listed(tmp_path, "path,fov", "a.zarr,m.zarr")
    for level, smallest in ((0, 0), (1, 10)):
        store = built(root, tmp_path / "c", mask="fov", level=level)
        assert weights(store).min() == smallest


def test_a_mask_that_tells_no_place_is_taken_voxel_by_voxel_or_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    mask = ball(*SHAPE)
    ome(tmp_path / "a.zarr", [voxels(*SHAPE), halved(voxels(*SHAPE))])
    array(tmp_path / "m.zarr", halved(mask), (4, 4, 4))
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["fov"] = mask
    root = listed(tmp_path, "path,one,two", "a.zarr,m.h5:/fov,m.zarr")
    for in_place in (True, False):
        store = built(root, tmp_path / "c", mask="one", in_place=in_place)
        np.testing.assert_array_equal(weights(store), mask.transpose(2, 1, 0))
        with pytest.raises(BrokenVolume, match=r"m\.zarr: is 8x10x12, its image 16x20x24 at the"):
            built(root, tmp_path / "c", mask="two", in_place=in_place)
        coarse = built(root, tmp_path / "c", mask="two", level=1, in_place=in_place)
        np.testing.assert_array_equal(weights(coarse), halved(mask).transpose(2, 1, 0))


def test_a_mask_lies_beside_the_region_and_the_time_point_of_its_volume(tmp_path):
    series, masks = voxels(2, *SHAPE), np.stack([ball(*SHAPE), 2 + ball(*SHAPE)])
    ome(tmp_path / "a.zarr", [series], axes="tzyx")
    ome(tmp_path / "m.zarr", [masks], axes="tzyx")
    ome(tmp_path / "n.zarr", [masks[0]])
    root = listed(tmp_path, "path,each,all", "a.zarr,m.zarr,n.zarr")
    box = [[2, 12], [3, 19], [4, 20]]
    cut = tuple(slice(*ends) for ends in box)
    for column, expected in (("each", masks), ("all", masks[[0, 0]])):
        told = {"mask": column, "volumes_4d": "samples", "region": box}
        store = built(root, tmp_path / "c", **told)
        for time in range(2):
            np.testing.assert_array_equal(weights(store, time), expected[time].T[cut])
    ome(tmp_path / "a.zarr", [series[0]])
    with pytest.raises(BrokenVolume, match=r"m\.zarr: is a mask of 2 time points, its image has"):
        built(root, tmp_path / "c", mask="each")


def test_a_mask_of_a_large_volume_is_asked_where_blocks_were_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("loaders.in_place.MOST", 1000)
    image, mask = np.full((40, 48, 56), 60_000, np.uint16), np.zeros((40, 48, 56), np.uint8)
    mask[8:32, 8:40, 8:40] = 1
    image[mask > 0] = voxels(24, 32, 32).ravel()
    array(tmp_path / "a.zarr", image, (8, 8, 8), names="zyx")
    array(tmp_path / "m.zarr", mask, (5, 48, 56), names="zyx")
    root = listed(tmp_path, "path,fov", "a.zarr,m.zarr")
    store = built(root, tmp_path / "c", mask="fov")
    assert store.meta(0)["statistics"][0]["max"] < 2000
    assert mask.T[tuple(store.foreground_points(0).T)].all()
    assert store.read(0)[0][mask.T == 0].max() < 1e-6
    monkeypatch.setattr("loaders.in_place.DRAWS", 2)
    array(tmp_path / "m.zarr", mask * 0, (5, 48, 56), names="zyx")
    with pytest.raises(BrokenVolume, match="no voxel counts in 128 blocks drawn at random"):
        built(root, tmp_path / "c", mask="fov")


def test_what_no_mask_can_be_is_told_by_name(tmp_path, monkeypatch):
    ome(tmp_path / "a.zarr", [voxels(*SHAPE)], unit="millimeter")
    turned = np.array([[0.4, -0.3, 0, 0], [0.3, 0.4, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]])
    write_volume(tmp_path / "oblique.nii.gz", Volume(ball(*SHAPE)[None], turned))
    ome(tmp_path / "two.zarr", [np.stack([ball(*SHAPE)] * 2)], axes="czyx", unit="millimeter")
    ome(tmp_path / "less.zarr", [-ball(*SHAPE).astype(np.int16)], unit="millimeter")
    ome(tmp_path / "far.zarr", [ball(*SHAPE)], unit="millimeter", offset=(0, 900.0, 0))
    names = ("oblique.nii.gz", "two.zarr", "less.zarr", "far.zarr")
    root = listed(tmp_path, "path,oblique,two,less,far", f"a.zarr,{','.join(names)}")
    reasons = {
        "oblique": r"oblique\.nii\.gz: lies oblique to its image.*--data.in_place false",
        "two": r"two\.zarr: is a mask of 2 volumes: give one",
        "less": r"less\.zarr: weights of a mask are finite and at least 0",
        "far": "no voxel counts: its mask is 0 wherever the volume is",
    }
    for column, reason in reasons.items():
        with pytest.raises(BrokenVolume, match=reason):
            built(root, tmp_path / "c", mask=column)
    monkeypatch.setattr("loaders.counted.MOST", 100)
    with pytest.raises(BrokenVolume, match="tells no size of at most 100 voxels, as a mask of a"):
        built(root, tmp_path / "c", mask="oblique")


def channels(folder: Path) -> Path:
    """Two files of a volume, of other dtypes, chunks and codecs, with two levels, in a manifest."""
    one, two = voxels(*SHAPE), voxels(2, *SHAPE, seed=1).astype(np.float32) / 7
    ome(folder / "a.zarr", [one, halved(one)])
    ome(folder / "b.zarr", [two, halved(two)], axes="czyx", chunks=5, version="0.4")
    return listed(folder, "path", "a.zarr;b.zarr")


@pytest.mark.parametrize("options", [{}, {"crop_foreground": True, "pad_to_multiple": 7}])
def test_several_stores_are_channels_where_they_lie_as_in_a_copy(tmp_path, options):
    root = channels(tmp_path)
    here, copy = (
        built(root, tmp_path / "c", Preprocess(**options), in_place=way) for way in (True, False)
    )
    assert here.num_channels == 3 and here.chunks(0) == (8, 8, 8) and copy.chunks(0) is None
    np.testing.assert_array_equal(here.read(0), copy.read(0))
    for what in ("affine", "undo", "statistics", "look", "notes"):
        assert here.meta(0)[what] == copy.meta(0)[what]
    for box in ((slice(1, 2), slice(0, 3)), (slice(1, 3), slice(4, 9))):
        found = here.array(0)[(box[0], box[1], slice(None), slice(2, 5))]
        np.testing.assert_array_equal(
            found, copy.array(0)[(box[0], box[1], slice(None), slice(2, 5))]
        )
    small = built(root, tmp_path / "c", RAW, level=1)
    np.testing.assert_array_equal(small.read(0)[0], halved(voxels(*SHAPE)).T)


def test_files_that_are_no_channels_of_one_volume_are_refused_by_name(tmp_path):
    channels(tmp_path)
    ome(tmp_path / "moved.zarr", [voxels(*SHAPE)], offset=(0, 0, 3.0))
    ome(tmp_path / "short.zarr", [voxels(20, 20, 16)])
    write_volume(tmp_path / "c.nii.gz", Volume(voxels(*SHAPE)[None]))
    for name, reason in {
        "moved.zarr": r"moved\.zarr: does not share the grid of .*a\.zarr",
        "short.zarr": r"short\.zarr: does not share the grid of .*a\.zarr",
        "c.nii.gz": r"c\.nii\.gz: is copied, another file of .*does not allow: --data\.in_place",
        "gone.zarr": r"gone\.zarr: .*lacks this file, its 2\. of 2: --data\.missing skip",
    }.items():
        root = listed(tmp_path, "path", f"a.zarr;{name}")
        with pytest.raises(BrokenVolume, match=reason):
            built(root, tmp_path / "c")
    both = listed(tmp_path, "path,id", "a.zarr;gone.zarr,one", "a.zarr;b.zarr,two")
    with pytest.raises(BrokenVolume, match=r"data\.missing zero does not allow"):
        built(both, tmp_path / "c", missing="zero")
    store = built(both, tmp_path / "c", missing="skip")
    assert len(store) == 1 and store.num_channels == 3


def test_two_columns_of_stores_and_a_mask_are_surveyed_as_they_are_trained_on(tmp_path):
    channels(tmp_path)
    ome(tmp_path / "m.zarr", [ball(*SHAPE)])
    listed(tmp_path, "path,fov", "a.zarr;b.zarr,m.zarr")
    config = DataConfig(str(tmp_path / "list.csv"), str(tmp_path / "c"), (1, 0, 0), mask="fov")
    survey = survey_data(config)
    survey.ask_headers()
    assert not survey.faults and survey.read_voxels() == [] and not survey.faults
    assert [facts.channels for facts in survey.facts.values()] == [3]


def test_colors_in_place_become_gray_and_gray_becomes_colors_as_in_a_copy(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    rgba = np.random.default_rng(0).integers(0, 255, (60, 70, 4), np.uint8)
    how = {"bigtiff": True, "tile": (16, 32)}
    tifffile.imwrite(
        tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], **how
    )
    tifffile.imwrite(tmp_path / "b.tif", rgba[..., 0], photometric="minisblack", **how)
    czyx = rgba.transpose(2, 0, 1)[:, None]
    path = ome(tmp_path / "c.zarr", [czyx], axes="czyx", channels=("R", "G", "B", "alpha"))
    held = json.loads((path / "zarr.json").read_text())
    told = held["attributes"]["ome"]["omero"]["channels"]
    for channel, color in zip(told, ("FF0000", "00FF00", "0000FF", "FFFFFF"), strict=True):
        channel["color"] = color
    (path / "zarr.json").write_text(json.dumps(held))
    ome(tmp_path / "d.zarr", [czyx[0]])
    root = listed(tmp_path, "path", "a.tif", "b.tif", "c.zarr", "d.zarr")
    for color, count in (("gray", 1), ("rgb", 3)):
        here, copy = (
            built(root, tmp_path / "c", RAW, color=color, in_place=way) for way in (True, False)
        )
        for index in range(4):
            assert here.shape(index) == (count, 70, 60, 1) and here.chunks(index)
            np.testing.assert_array_equal(here.read(index), copy.read(index))
            colors = [shown for _, shown in here.layout(index).channels if shown]
            assert colors == (["ff0000", "00ff00", "0000ff"] if color == "rgb" else [])
        np.testing.assert_array_equal(here.read(0), here.read(2))  # opacity is no color
        np.testing.assert_array_equal(here.read(1), here.read(3))
    one = built(path, tmp_path / "c", RAW, color="gray", channels=["G"])
    np.testing.assert_array_equal(one.read(0)[0, ..., 0], rgba[..., 1].T)


@pytest.mark.slow
def test_garbage_under_the_mask_of_a_store_changes_no_weight_and_no_number(tmp_path):
    rows, states = [], []
    model = partial(CustomVAE, channels=(4, 8), norm=partial(GroupNorm, num_groups=4))
    for garbage in (0, 50_000):
        folder = tmp_path / str(garbage)
        masked(folder, "labels", garbage)
        twice = ("id,split,path,fov", "a,train,a.zarr,a.zarr/labels/fov",
                 "b,val,a.zarr,a.zarr/labels/fov")  # fmt: skip
        data = DataConfig(str(listed(folder, *twice)), str(folder / "c"), mask="fov")
        quiet = {"device": "cpu", "wandb": "disabled"}
        train_3d(data, str(folder / "run"), model=model, patch_size=(8, 8, 8), batch_size=2,
                 max_steps=3, val_every=3, media_every=0, threads=1, **quiet)  # fmt: skip
        states.append(load_model(str(folder / "run")).state_dict())
        told = EvaluationData(data.root, data.cache_dir)
        evaluate(str(folder / "run"), told, str(folder / "out"), split="all", media=False,
                 patch_size=(8, 8, 8), recon_format="ome-zarr", **quiet)  # fmt: skip
        rows.append((folder / "out" / "metrics.csv").read_text())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert rows[0] == rows[1]
    (row, _) = csv.DictReader(rows[0].splitlines())
    assert float(row["mask_fraction"]) == pytest.approx((ball(*SHAPE) > 0).mean())
    assert read_volume(folder / "out" / "recon" / "a.ome.zarr").data.shape == (1, *SHAPE[::-1])
