"""Zarr and HDF5 are read where they lie: the same voxels as a copy, and nothing is copied."""

import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from loaders import (
    DataConfig,
    LabelCorners,
    PatchLoader,
    Preprocess,
    Reading,
    SliceStore,
    VolumeStore,
    open_data,
)
from loaders.consistency import Facts
from loaders.in_place import find_in_place
from loaders.readers import BrokenVolume, Volume, read_header, read_volume, write_volume
from loaders.readers.arrays import context, spread
from loaders.subjects import Subject
from tests.stores import UM, Web, array, halved, ome, terabyte, voxels
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.spatial.slabs import own_part
from vae3d.training.distributed import World
from vae3d.training.validate import Validation

tensorstore = pytest.importorskip("tensorstore")
ROOT = Path(__file__).resolve().parents[1]
RAW = Preprocess(intensity="raw", orient_ras=False)


def built(volumes, cache, preprocess=RAW, **reading):
    return VolumeStore.build(
        volumes, cache, preprocess, reading=Reading(**reading), progress=False
    )  # fmt: skip


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_reads_the_same_as_numpy_axes_and_spacing_included(tmp_path, version):
    zyx = voxels(24, 20, 16)
    path = ome(tmp_path / "a.ome.zarr", [zyx, halved(zyx)], version=version)
    store = built(path, tmp_path / "cache")
    assert store.ids == ["a"]
    assert np.allclose(store.spacing_mm(0), [0.5 * UM, 0.5 * UM, 2 * UM])
    np.testing.assert_array_equal(store.read(0)[0], zyx.transpose(2, 1, 0))
    box = (slice(3, 11), slice(5, 20), slice(7, 9))
    np.testing.assert_array_equal(store.read(0, box)[0], zyx.transpose(2, 1, 0)[box])
    assert store.meta(0)["look"]["unit"] == "um"


def test_nothing_of_the_volume_is_copied_into_the_cache(tmp_path):
    path = ome(tmp_path / "a.ome.zarr", [voxels(40, 40, 40)])
    store = built(path, tmp_path / "cache")
    key = store.entries[0].key
    made = {name for name in os.listdir(tmp_path / "cache") if name.startswith(key)}
    assert made == {f"{key}.json", f"{key}.points-2.npy", f"{key}.quantiles.npy"}
    assert sum(f.stat().st_size for f in (tmp_path / "cache").iterdir()) < 64_000 < 2 * 40**3
    assert json.loads((tmp_path / "cache" / f"{key}.json").read_text())["views"]


def test_in_place_and_copied_are_the_same_store_but_for_where_the_voxels_lie(tmp_path):
    zyx = voxels(24, 20, 16)
    turned = {"x": "right-to-left", "y": "anterior-to-posterior", "z": "inferior-to-superior"}
    path = ome(tmp_path / "a.zarr", [zyx], orientation=turned, unit="millimeter")
    here = built(path, tmp_path / "cache", Preprocess())
    copy = built(path, tmp_path / "cache", Preprocess(), in_place=False)
    assert here.entries[0].key != copy.entries[0].key
    assert here.chunks(0) == (8, 8, 8)
    assert copy.chunks(0) is None
    np.testing.assert_array_equal(here.read(0), copy.read(0))
    assert here.meta(0)["affine"] == copy.meta(0)["affine"]
    assert here.meta(0)["undo"] == copy.meta(0)["undo"]
    assert here.meta(0)["look"]["space"] == "body"
    assert here.undo(0, here.read(0)).data.shape == (1, 16, 20, 24)
    # Right to left and front to back in the file, the other way round in RAS+.
    raw = built(path, tmp_path / "cache", Preprocess(intensity="raw"))
    np.testing.assert_array_equal(raw.read(0)[0], zyx.transpose(2, 1, 0)[::-1, ::-1])


def test_axes_come_in_any_order_and_channels_by_name_or_number(tmp_path):
    tczyx = voxels(3, 4, 9, 10, 11)
    names = ("dapi", "gfp", "red", "far")
    path = ome(tmp_path / "a.zarr", [tczyx], axes="tczyx", channels=names)
    store = built(path, tmp_path / "cache", channels=["red", 0], time_point=1)
    assert store.num_channels == 2
    assert [name for name, _ in store.layout(0).channels] == ["red", "dapi"]
    expected = tczyx[1].transpose(0, 3, 2, 1)
    np.testing.assert_array_equal(store.read(0), expected[[2, 0]])
    other = ome(tmp_path / "b.zarr", [tczyx[0].transpose(3, 0, 1, 2)], axes="xczy")
    np.testing.assert_array_equal(
        built(other, tmp_path / "cache").read(0), tczyx[0].transpose(0, 3, 2, 1)
    )
    with pytest.raises(BrokenVolume, match=r"4 channels \(dapi, gfp, red, far\), none is blue"):
        built(path, tmp_path / "cache", channels=["blue"], time_point=1)


def test_time_points_are_chosen_or_samples_and_never_guessed(tmp_path):
    tzyx = voxels(3, 9, 10, 11)
    path = ome(tmp_path / "a.zarr", [tzyx], axes="tzyx")
    with pytest.raises(BrokenVolume, match=r"3 time points: choose one by data\.time_point"):
        built(path, tmp_path / "cache")
    with pytest.raises(BrokenVolume, match="has 3 time points, time point 5 is asked for"):
        built(path, tmp_path / "cache", time_point=5)
    for in_place in (True, False):
        store = built(path, tmp_path / "cache", volumes_4d="samples", in_place=in_place)
        assert store.ids == ["a__t000", "a__t001", "a__t002"]
        for number in range(3):
            np.testing.assert_array_equal(store.read(number)[0], tzyx[number].transpose(2, 1, 0))


def test_the_level_is_chosen_by_number_or_by_the_voxel_size_that_is_asked_for(tmp_path):
    zyx = voxels(24, 20, 16)
    path = ome(tmp_path / "a.zarr", [zyx, halved(zyx)], scale=(1.0, 0.5, 0.5))
    small = halved(zyx).transpose(2, 1, 0)
    np.testing.assert_array_equal(built(path, tmp_path / "cache", level=1).read(0)[0], small)
    wanted = Preprocess(intensity="raw", spacing_mm=(1 * UM, 1 * UM, 2 * UM))
    np.testing.assert_array_equal(built(path, tmp_path / "cache", wanted).read(0)[0], small)
    between = Preprocess(spacing_mm=(0.7 * UM, 0.7 * UM, 1 * UM))
    with pytest.raises(BrokenVolume, match=r"spacing_mm 0\.0007 x .*--data.in_place false copies"):
        built(path, tmp_path / "cache", between)
    assert built(path, tmp_path / "cache", between, in_place=False).shape(0) == (1, 11, 14, 24)
    with pytest.raises(BrokenVolume, match="2 levels, level 2 is asked for"):
        built(path, tmp_path / "cache", level=2)


TURNED = {"x": "right-to-left", "y": "anterior-to-posterior", "z": "inferior-to-superior"}


@pytest.mark.parametrize(
    "options",
    [
        {"crop_foreground": True},
        {"crop_foreground": True, "crop_margin_mm": 2.0},
        {"pad_to_multiple": 32},
        {"pad_to_multiple": 7, "crop_foreground": True, "crop_margin_mm": 0.6},
    ],
)
def test_crop_and_padding_are_views_with_the_numbers_of_a_copy(tmp_path, options):
    path = ome(tmp_path / "a.zarr", [voxels(24, 20, 16)], orientation=TURNED, unit="millimeter")
    here = built(path, tmp_path / "cache", Preprocess(**options))
    copy = built(path, tmp_path / "cache", Preprocess(**options), in_place=False)
    assert here.chunks(0) == (8, 8, 8) and copy.chunks(0) is None
    assert here.shape(0) == copy.shape(0) != (1, 16, 20, 24)
    x = here.read(0)
    np.testing.assert_array_equal(x, copy.read(0))
    for box in itertools.product((slice(0, 3), slice(5, 9)), (slice(2, 9),), (slice(3, None),)):
        np.testing.assert_array_equal(here.read(0, box), x[(slice(None), *box)])
    for what in ("affine", "undo", "statistics"):
        assert here.meta(0)[what] == copy.meta(0)[what]
    np.testing.assert_array_equal(here.undo(0, x).data, copy.undo(0, x).data)
    raw = np.array([here.array(0)[(slice(None), *(slice(n, n + 1) for n in point))].item()
                    for point in here.foreground_points(0)[:50].tolist()])  # fmt: skip
    assert (raw > here.meta(0)["statistics"][0]["foreground_threshold"]).all()
    loaders = [PatchLoader(s, (8, 8, 8), patches_per_volume=9, threads=0) for s in (here, copy)]
    for one, other in zip(*loaders, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_the_foreground_is_looked_for_in_a_coarse_level_and_refused_without(tmp_path, monkeypatch):
    monkeypatch.setattr("loaders.in_place.ENOUGH", 100)
    monkeypatch.setattr("loaders.in_place.MOST", 2000)
    zyx = np.full((24, 20, 16), 100, np.uint16)
    zyx[7:13, 4:10, 5:12] = 1000
    levels = [zyx, halved(zyx)]
    crop = Preprocess(intensity="raw", orient_ras=False, crop_foreground=True)
    store = built(ome(tmp_path / "a.zarr", levels), tmp_path / "cache", crop)
    # Every other voxel from the first one on: its box in voxels of the finest level, outward.
    assert store.meta(0)["undo"]["crop"] == [[6, 4, 8], [12, 10, 14]]
    np.testing.assert_array_equal(store.read(0)[0], zyx[8:14, 4:10, 6:12].T)
    with pytest.raises(BrokenVolume, match=r"crop_foreground without a level of at most 2000 vox"):
        built(ome(tmp_path / "b.zarr", [zyx]), tmp_path / "cache", crop)
    assert built(tmp_path / "b.zarr", tmp_path / "cache", crop, in_place=False)


def test_statistics_come_from_the_coarsest_level_that_suffices_and_points_are_scaled(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("loaders.in_place.ENOUGH", 12 * 10 * 8)
    zyx = voxels(24, 20, 16)
    coarse = halved(zyx) + 7  # so that it can be told which was measured
    path = ome(tmp_path / "a.zarr", [zyx, coarse, halved(coarse)])
    store = built(path, tmp_path / "cache", Preprocess())
    assert store.meta(0)["statistics"][0]["min"] == coarse.min()
    assert store.shape(0) == (1, 16, 20, 24)
    points = store.foreground_points(0)
    assert len(points) > 100
    # The blob fills the middle half of each axis.
    assert (points >= np.array([4, 5, 6]) - 1).all() and (points <= np.array([12, 15, 18])).all()


def test_a_large_volume_without_levels_is_measured_on_a_seeded_sample_of_chunks(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("loaders.in_place.MOST", 1000)
    zyx = voxels(40, 48, 56)
    path = array(tmp_path / "a.zarr", zyx, (8, 8, 8), names="zyx")
    found = find_in_place(Subject("a", (path,)), Reading(), Preprocess())
    sample = found.sample()
    np.testing.assert_array_equal(sample.data, found.sample().data)
    assert sample.data.shape == (1, 64 * 8, 8, 8)
    assert (sample.corners % 8 == 0).all()  # each block is one chunk
    store = built(path, tmp_path / "cache", Preprocess())
    volume = zyx.transpose(2, 1, 0)
    points = store.foreground_points(0)
    threshold = store.meta(0)["statistics"][0]["foreground_threshold"]
    assert len(points) > 100 and (volume[tuple(points.T)] > threshold).all()


def test_blocks_are_drawn_again_where_all_are_padding_and_told_where_all_stay_so(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("loaders.in_place.MOST", 1000)
    monkeypatch.setattr("loaders.in_place.BLOCKS", 2)
    zyx = np.zeros((64, 64, 64), np.uint16)
    zyx[:10, :10, :10] = voxels(10, 10, 10)
    path = array(tmp_path / "a.zarr", zyx, (8, 8, 8), names="zyx")
    monkeypatch.setattr("loaders.in_place.DRAWS", 1)
    with pytest.raises(BrokenVolume, match="all voxels of 2 blocks drawn at random are 0; a level"):
        built(path, tmp_path / "cache")
    monkeypatch.setattr("loaders.in_place.DRAWS", 200)
    store = built(path, tmp_path / "cache")
    assert store.meta(0)["statistics"][0]["max"] > 0


def test_plain_zarr_and_hdf5_are_zyx_where_they_name_no_axes_and_that_is_told(tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    zyx = voxels(12, 10, 8)
    array(tmp_path / "a.zarr", zyx, (4, 4, 4), version=2)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        made = file.create_dataset("deep/raw", data=zyx, chunks=(4, 4, 4), compression="gzip")
        made.attrs["element_size_um"] = [2.0, 0.5, 0.5]
    store = built([tmp_path / "a.zarr", tmp_path / "b.h5:/deep/raw"], tmp_path / "cache")
    assert store.ids == ["a", "b.h5__deep__raw"]
    for index in range(2):
        np.testing.assert_array_equal(store.read(index)[0], zyx.transpose(2, 1, 0))
    assert store.spacing_mm(0) == (1, 1, 1)
    assert np.allclose(store.spacing_mm(1), [0.5 * UM, 0.5 * UM, 2 * UM])
    assert "names no axes: taken as ZYX" in capsys.readouterr().err
    with pytest.raises(BrokenVolume, match=r"no such dataset; those of the file are b.h5:/deep/r"):
        built(tmp_path / "b.h5:/other", tmp_path / "cache")


def test_folders_globs_and_manifests_name_stores_beside_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        ome(data / f"{name}.ome.zarr", [voxels(12, 10, 8)])
        with h5py.File(data / f"{name}.h5", "w") as file:
            file["raw"] = voxels(12, 10, 8)
    np.save(data / "c.npy", voxels(8, 10, 12))
    assert built(data, tmp_path / "cache").ids == ["a", "b", "c"]
    assert len(built(str(data / "*.zarr"), tmp_path / "cache")) == 2
    assert len(built(str(data / "*.h5:/raw"), tmp_path / "cache")) == 2
    (data / "list.csv").write_text("path,id\na.ome.zarr,one\nb.h5:/raw,two\nc.npy,three\n")
    store = built(data / "list.csv", tmp_path / "cache")
    assert store.ids == ["one", "two", "three"]
    assert [store.chunks(i) is None for i in range(3)] == [False, False, True]


def test_patches_are_the_same_on_any_number_of_threads_and_ranks(tmp_path):
    for name in "ab":
        ome(tmp_path / f"{name}.zarr", [voxels(24, 20, 16, seed=ord(name))], shards=(24, 24, 16))
    store = built(tmp_path, tmp_path / "cache", Preprocess())
    found = []
    for threads, world in ((0, 1), (2, 1), (1, 2)):
        patches = {}
        for rank in range(world):
            loader = PatchLoader(store, (8, 8, 8), patches_per_volume=6, batch_size=3,
                                 threads=threads, rank=rank, world_size=world)  # fmt: skip
            for batch in loader:
                pairs = zip(batch.index.tolist(), batch.image.clone(), strict=True)
                patches.update(pairs)
        found.append(np.stack([patches[row] for row in sorted(patches)]))
    assert found[0].shape == (12, 1, 8, 8, 8)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_store_that_was_named_relative_to_one_folder_is_read_from_another(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    zyx = voxels(12, 10, 8)
    ome(tmp_path / "here" / "a.zarr", [zyx])
    with h5py.File(tmp_path / "here" / "b.h5", "w") as file:
        file["raw"] = zyx
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first = built(["a.zarr", "b.h5:/raw"], tmp_path / "cache")
    monkeypatch.chdir(tmp_path / "there")
    again = built(["../here/a.zarr", "../here/b.h5:/raw"], tmp_path / "cache")
    for index in range(2):
        assert again.entries[index].key == first.entries[index].key
        np.testing.assert_array_equal(again.read(index)[0], zyx.transpose(2, 1, 0))


class Louder:
    """An augmentation that processes can be given."""

    def __call__(self, patch, key, spacing_mm):
        return patch + 1000


@pytest.mark.slow
def test_processes_that_augment_read_in_place_and_hand_over_what_is_broken(tmp_path):
    zyx = voxels(16, 16, 16)
    path = ome(tmp_path / "a.zarr", [zyx])
    store = built(path, tmp_path / "cache")
    options = {"patching": "full", "batch_size": 8, "threads": 1}
    loader = PatchLoader(store, (8, 8, 8), augment=Louder(), **options)
    (batch,) = list(loader)
    for image, (x, y, z) in zip(batch.image.numpy(), batch.corner.tolist(), strict=True):
        box = zyx[z : z + 8, y : y + 8, x : x + 8].transpose(2, 1, 0)
        np.testing.assert_array_equal(image[0], box + 1000.0)
    (path / "s0" / "c" / "1" / "1" / "1").write_bytes(b"no zstd stream")
    with pytest.raises(BrokenVolume, match="c/1/1/1"):
        list(PatchLoader(built(path, tmp_path / "cache"), (8, 8, 8), augment=Louder(), **options))


def test_patches_of_one_read_touch_the_same_chunks_and_neighborhoods_take_turns(tmp_path):
    path = array(tmp_path / "a.zarr", voxels(96, 80, 72), (16, 16, 16), names="zyx")
    store = built(path, tmp_path / "cache")
    options = {"patches_per_volume": 64, "patches_per_read": 4, "threads": 0}
    table = PatchLoader(store, (16, 16, 16), **options).plan.table(0)
    assert table.shape == (64, 4)
    last = np.array(store.shape(0)[1:]) - 16
    assert (table[:, 1:] >= 0).all() and (table[:, 1:] <= last).all()
    for block in table[:, 1:].reshape(2, 4, 8, 3):  # two blocks of four rounds of eight reads
        first = block[0]  # corners of the patches that lead
        low, high = first // 16 * 16, -(-(first + 16) // 16) * 16
        assert (block >= low).all() and (block + 16 <= high).all()
        assert len(np.unique(low, axis=0)) > 4
    again = PatchLoader(store, (16, 16, 16), **options, world_size=1).plan.table(0)
    np.testing.assert_array_equal(table, again)
    with pytest.raises(ValueError, match=r"patches_per_volume \(64\) has to be a multiple of it"):
        PatchLoader(store, (16, 16, 16), **options | {"patches_per_read": 5})


def test_slices_are_cut_out_of_a_3d_store(tmp_path):
    zyx = voxels(12, 10, 8)
    slices = SliceStore(built(ome(tmp_path / "a.zarr", [zyx]), tmp_path / "cache"), axis=2)
    assert len(slices) == 12
    assert slices.chunks(0) == (8, 8)
    np.testing.assert_array_equal(slices.read(5)[0], zyx[5].T)


def test_labels_in_the_store_tell_the_sampler_where_patches_lie(tmp_path):
    zyx = voxels(24, 20, 16)
    path = ome(tmp_path / "a.zarr", [zyx])
    labels = np.zeros((12, 10, 8), np.uint8)
    labels[2:4, 3:5, 5:7] = 3
    ome(path / "labels" / "cells", [labels], scale=(4.0, 1.0, 1.0))
    (tmp_path / "list.csv").write_text("path,label_map\na.zarr,a.zarr/labels/cells\n")
    store = built(tmp_path / "list.csv", tmp_path / "cache")
    points = store.label_points(0)
    assert sorted(points) == [0, 3]
    assert sorted(map(tuple, points[3].tolist())) == sorted(
        (x, y, z) for x in (10, 12) for y in (6, 8) for z in (4, 6)
    )
    loader = PatchLoader(store, (4, 4, 4), sampler=LabelCorners, threads=0, patches_per_volume=20)
    assert all(labels[z // 2, y // 2, x // 2] == 3
               for batch in loader for x, y, z in (batch.corner + 2).tolist())  # fmt: skip


def test_a_small_file_tells_the_labels_of_a_volume_that_stays_where_it_is(tmp_path, monkeypatch):
    ome(tmp_path / "a.zarr", [voxels(24, 20, 16)], unit="millimeter")
    labels = np.zeros((1, 8, 10, 12), np.uint8)
    labels[0, 5:7, 3:5, 2:4] = 3
    write_volume(tmp_path / "a.nii.gz", Volume(labels, np.diag([1.0, 1.0, 4.0, 1.0])))
    (tmp_path / "list.csv").write_text("path,label_map\na.zarr,a.nii.gz\n")
    points = built(tmp_path / "list.csv", tmp_path / "cache").label_points(0)
    assert sorted(map(tuple, points[3].tolist())) == sorted(
        (x, y, z) for x in (10, 12) for y in (6, 8) for z in (4, 6)
    )
    monkeypatch.setattr("loaders.counted.MOST", 100)
    with pytest.raises(BrokenVolume, match=r"a\.nii\.gz: tells no size of at most 100 voxels"):
        built(tmp_path / "list.csv", tmp_path / "other").label_points(0)


def test_nan_is_an_error_that_says_where_or_filled(tmp_path):
    zyx = voxels(12, 10, 8).astype(np.float64)
    zyx[3, 2, 1] = np.nan
    path = ome(tmp_path / "a.zarr", [zyx])
    with pytest.raises(BrokenVolume, match=r"are NaN or infinite: set data\.nan to fill"):
        built(path, tmp_path / "cache")
    filled = built(path, tmp_path / "cache", nan="fill").read(0)[0]
    assert filled[1, 2, 3] == np.nanmin(zyx)
    zyx[3, 2, 1] = np.nanmin(zyx)
    np.testing.assert_array_equal(filled, zyx.transpose(2, 1, 0).astype(np.float32))


def test_missing_chunks_are_the_fill_value_and_damaged_ones_one_line(tmp_path):
    zyx = voxels(16, 16, 16)
    path = ome(tmp_path / "a.zarr", [zyx])
    (path / "s0" / "c" / "0" / "0" / "0").unlink()
    store = built(path, tmp_path / "cache")
    expected = zyx.copy()
    expected[:8, :8, :8] = 0
    np.testing.assert_array_equal(store.read(0)[0], expected.transpose(2, 1, 0))
    (path / "s0" / "c" / "1" / "1" / "1").write_bytes(b"no zstd stream")
    again = built(path, tmp_path / "cache")
    again.read(0, (slice(0, 8),) * 3)
    with pytest.raises(BrokenVolume) as error:
        again.read(0, (slice(8, 16),) * 3)
    line = str(error.value)
    assert "a.zarr/s0" in line and "c/1/1/1" in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize("name", ["ngff_zarr_04", "ngff_zarr_05", "ome_zarr_04", "ome_zarr_05"])
def test_stores_of_other_libraries_read_the_same_as_numpy(tmp_path, name):
    """As `ngff-zarr` 0.50 and `ome-zarr` 0.18 wrote them, see tests/data/make_stores.py."""
    with zipfile.ZipFile(Path(__file__).parent / "data" / f"{name}.zip") as archive:
        archive.extractall(tmp_path / "a.ome.zarr")
    czyx = np.arange(2 * 12 * 10 * 8, dtype=np.uint16).reshape(2, 12, 10, 8)
    store = built(tmp_path / "a.ome.zarr", tmp_path / "cache")
    np.testing.assert_array_equal(store.read(0), czyx.transpose(0, 3, 2, 1))
    small = built(tmp_path / "a.ome.zarr", tmp_path / "cache", level=1)
    of_ngff = name.startswith("ngff")  # the other names no unit and leaves the planes as many
    unit, planes = (UM, 6) if of_ngff else (1.0, 12)
    assert store.meta(0)["look"]["unit"] == ("um" if of_ngff else "px")
    assert np.allclose(store.spacing_mm(0), [0.5 * unit, 0.5 * unit, 2 * unit])
    place = np.array(store.meta(0)["affine"])[:3, 3]
    assert np.allclose(place, [3 * UM, 2 * UM, 1 * UM] if of_ngff else 0)
    assert small.shape(0) == (2, 4, 5, planes)
    assert np.allclose(small.spacing_mm(0), [unit, unit, 24 / planes * unit])


def converted(path: Path, images: list[np.ndarray]) -> Path:
    """Lay out a folder as bioformats2raw does: its README's layout 3, big-endian planes in tiles.

    https://github.com/glencoesoftware/bioformats2raw; the files of OME are there for what they are
    called, OME-XML as Bio-Formats wrote it is not needed.
    """
    (path / "OME").mkdir(parents=True)
    for folder in (path, path / "OME"):
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (path / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    series = json.dumps({"series": [str(n) for n in range(len(images))]})
    (path / "OME" / ".zattrs").write_text(series)
    (path / "OME" / "METADATA.ome.xml").write_text("<OME/>")
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    window = {"min": 0, "max": 65535, "start": 0, "end": 4000}
    for number, tczyx in enumerate(images):
        image, datasets = path / str(number), []
        for level, data in enumerate([tczyx, tczyx[..., ::2, ::2]]):
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{image / str(level)}/"},
                "metadata": {
                    "shape": list(data.shape), "chunks": [1, 1, 1, 8, 8], "dtype": ">u2",
                    "fill_value": 0, "order": "C", "dimension_separator": "/", "filters": None,
                    "compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1,
                                   "blocksize": 0},
                },
            }  # fmt: skip
            tensorstore.open(spec, create=True).result().write(data).result()
            scale = [1.0, 1.0, 1.5, 0.25 * 2**level, 0.25 * 2**level]
            step = [{"type": "scale", "scale": scale}]
            datasets.append({"path": str(level), "coordinateTransformations": step})
        told = {"multiscales": [{
            "metadata": {"method": "loci.common.image.SimpleImageScaler", "version": "6.13.0"},
            "axes": axes, "name": "a", "datasets": datasets, "version": "0.4",
        }]}  # fmt: skip
        told["omero"] = {
            "channels": [{"color": color, "coefficient": 1, "active": True, "label": name,
                          "window": window, "family": "linear", "inverted": False}
                         for name, color in (("DAPI", "0000FF"), ("FITC", "00FF00"))],
            "rdefs": {"defaultT": 0, "model": "color", "defaultZ": 0},
        }  # fmt: skip
        (image / ".zgroup").write_text('{"zarr_format": 2}')
        (image / ".zattrs").write_text(json.dumps(told))
    return path


def test_a_store_of_a_microscope_vendors_converter_reads_the_same_as_numpy(tmp_path):
    tczyx = np.stack([voxels(2, 6, 20, 24, seed=t) for t in range(2)])
    path = converted(tmp_path / "a.zarr", [tczyx])
    store = built(path, tmp_path / "cache", time_point=1)
    assert store.ids == ["a"] and store.chunks(0) == (8, 8, 1)
    np.testing.assert_array_equal(store.read(0), tczyx[1].transpose(0, 3, 2, 1))
    assert np.allclose(store.spacing_mm(0), [0.25 * UM, 0.25 * UM, 1.5 * UM])
    assert store.meta(0)["look"]["unit"] == "um"
    assert store.layout(0).channels == (("DAPI", "0000ff"), ("FITC", "00ff00"))
    small = built(path, tmp_path / "cache", time_point=0, level=1, channels=["FITC"])
    np.testing.assert_array_equal(small.read(0)[0], tczyx[0, 1, :, ::2, ::2].transpose(2, 1, 0))
    assert np.allclose(small.spacing_mm(0), [0.5 * UM, 0.5 * UM, 1.5 * UM])
    several = converted(tmp_path / "b.zarr", [tczyx, tczyx + 1])
    with pytest.raises(BrokenVolume, match=r"several images: name one, b\.zarr/0, or all by"):
        built(several, tmp_path / "cache", time_point=0)
    both = built(f"{several}/[0-9]", tmp_path / "cache", time_point=0)
    assert both.ids == ["0", "1"]
    np.testing.assert_array_equal(both.read(1), both.read(0) + 1)


def test_stores_of_different_sizes_chunks_and_formats_are_one_data_set(tmp_path):
    h5py = pytest.importorskip("h5py")
    tifffile = pytest.importorskip("tifffile")
    sizes = {"a": (24, 20, 16), "b": (17, 33, 40), "c": (9, 50, 31)}
    volumes = {name: voxels(*size, seed=ord(name)) for name, size in sizes.items()}
    ome(tmp_path / "a.zarr", [volumes["a"]], shards=(16, 16, 16))
    with h5py.File(tmp_path / "b.ims", "w") as file:  # of Imaris, whose files are HDF5
        file.create_dataset("DataSet/Data", data=volumes["b"], chunks=(4, 16, 16))
    tifffile.imwrite(tmp_path / "c.tif", volumes["c"], bigtiff=True, tile=(16, 32),
                     photometric="minisblack")  # fmt: skip
    (tmp_path / "list.csv").write_text("path,id\na.zarr,a\nb.ims:/DataSet/Data,b\nc.tif,c\n")
    store = built(tmp_path / "list.csv", tmp_path / "cache")
    assert [store.chunks(n) for n in range(3)] == [(8, 8, 8), (16, 16, 4), (31, 16, 1)]
    for loaded, size in ((store, (8, 8, 8)), (SliceStore(store, 0), (8, 8))):
        loader = PatchLoader(loaded, size, patches_per_volume=2, batch_size=4, threads=1)
        seen = set()
        for batch in loader:
            for image, item, corner in zip(batch.image, batch.volume, batch.corner, strict=True):
                number, at = int(item), corner.tolist()
                if loaded is not store:
                    number, plane = loaded.locate(number)
                    at = [plane, *at]
                seen.add(number)
                box = tuple(slice(a, a + 8) for a in at)
                box = box if loaded is store else (at[0], *box[1:])
                expected = volumes[store.ids[number]].transpose(2, 1, 0)[box]
                np.testing.assert_array_equal(image[0], expected)
        assert seen == {0, 1, 2}


def spoil(path, change):
    """Change the metadata of a store."""
    file = path / "zarr.json"
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


def sizes(ome):
    """Of the voxels of the finest level."""
    return ome["datasets"][0]["coordinateTransformations"][0]


BROKEN = {
    "axes are not understood": lambda ome: ome["axes"][0].update(name="q"),
    "its level s7 is no array": lambda ome: ome["datasets"][0].update(path="s7"),
    "leads out of the store": lambda ome: ome["datasets"][0].update(path="../b.zarr"),
    "metadata are not understood": lambda ome: ome.pop("axes"),
    "names no level": lambda ome: ome.update(datasets=[]),
    "voxel size or place of level 0 is 0": lambda ome: sizes(ome)["scale"].__setitem__(0, 0.0),
    "level 0 is 0 or no number": lambda ome: sizes(ome)["scale"].__setitem__(0, float("nan")),
    "has 3 axes, its metadata name": lambda ome: ome["axes"].insert(0, {"name": "c"}),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_metadata_are_one_line(tmp_path, reason):
    path = ome(tmp_path / "a.zarr", [voxels(12, 10, 8)])
    if "has 3 axes" in reason:  # an axis more than there are numbers for it
        scale = [1.0, 2.0, 0.5, 0.5]
        change = {"type": "scale", "scale": scale}
        spoil(path, lambda held: held["attributes"]["ome"]["multiscales"][0]["datasets"][0].update(
            coordinateTransformations=[change]))  # fmt: skip
    spoil(path, lambda held: BROKEN[reason](held["attributes"]["ome"]["multiscales"][0]))
    with pytest.raises(BrokenVolume, match=r"a\.zarr") as error:
        built(path, tmp_path / "cache")
    expected = reason if reason != "axes are not understood" else "are not understood: t, c, z"
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_voxels_of_imaris_have_their_size_and_those_that_fill_its_chunks_are_told(tmp_path, capsys):
    """As its files are laid out: text is letters, chunks are filled up with zeros."""
    h5py = pytest.importorskip("h5py")
    zyx = voxels(6, 20, 24)
    with h5py.File(tmp_path / "a.ims", "w") as file:
        channel = file.create_group("DataSet/ResolutionLevel 0/TimePoint 0/Channel 0")
        held = np.pad(zyx, [(0, 2), (0, 12), (0, 8)])
        channel.create_dataset("Data", data=held, chunks=(8, 16, 16), compression="gzip")
        letters = {f"ImageSize{axis}": str(n) for axis, n in zip("ZYX", zyx.shape, strict=True)}
        image = {"Unit": "um"}
        for axis, (start, size) in enumerate([(5, 0.5), (-3, 0.25), (0, 2)]):
            n = zyx.shape[2 - axis]
            image |= {f"ExtMin{axis}": f"{start:.3f}", f"ExtMax{axis}": f"{start + n * size:.3f}"}
        for node, texts in ((channel, letters), (file.create_group("DataSetInfo/Image"), image)):
            for name, text in texts.items():
                node.attrs[name] = np.frombuffer(text.encode(), "S1")
    path = tmp_path / "a.ims:/DataSet/ResolutionLevel 0/TimePoint 0/Channel 0/Data"
    assert built(path, tmp_path / "cache").shape(0) == (1, 32, 32, 8)
    assert "--data.region '[[0, 24], [0, 20], [0, 6]]' takes that" in capsys.readouterr().err
    store = built(path, tmp_path / "cache", region=[[0, 24], [0, 20], [0, 6]])
    np.testing.assert_array_equal(store.read(0)[0], zyx.T)
    assert np.allclose(store.spacing_mm(0), [0.5 * UM, 0.25 * UM, 2 * UM])


OTHERS = {
    "plate": ({"plate": {"wells": [{"path": "A/1"}]}}, r"is a plate: .*'a\.zarr/\*/\*/\[0-9\]\*'"),
    "well": ({"well": {"images": [{"path": "0"}]}}, r"is a well of a plate: .*'a\.zarr/\[0-9\]\*'"),
    "labels": ({"labels": ["cells"]}, r"holds label images: name one, a\.zarr/cells"),
    "nothing": ({}, "is a group without OME metadata: name an array or image in it"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_holds_images_and_is_none_tells_what_to_name(tmp_path, kind):
    held, reason = OTHERS[kind]
    path = tmp_path / "a.zarr"
    ome(path / "A" / "1" / "0", [voxels(12, 10, 8)])
    node = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": held}}
    for folder in (path, path / "A", path / "A" / "1"):
        (folder / "zarr.json").write_text(json.dumps(node))
    with pytest.raises(BrokenVolume, match=reason):
        built(path, tmp_path / "cache")
    assert built(f"{path}/*/*/[0-9]*", tmp_path / "cache").shape(0) == (1, 8, 10, 12)
    (path / "zarr.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BrokenVolume, match="is a Git LFS pointer"):
        built(path, tmp_path / "cache")


def test_the_first_versions_of_ome_zarr_name_no_axes_and_no_sizes(tmp_path, capsys):
    tczyx = voxels(1, 2, *(24, 20, 16))
    path = ome(tmp_path / "a.zarr", [tczyx, halved(tczyx)], axes="tczyx", version="0.4")
    image = json.loads((path / ".zattrs").read_text())["multiscales"][0]
    datasets = [{"path": level["path"]} for level in image["datasets"]]
    for told in ({}, {"axes": list("tczyx")}):  # 0.1 and 0.3
        held = {"multiscales": [{"datasets": datasets, **told}]}
        (path / ".zattrs").write_text(json.dumps(held))
        store = built(path, tmp_path / "cache", Preprocess(intensity="raw", spacing_mm=(2, 2, 2)))
        np.testing.assert_array_equal(store.read(0), halved(tczyx)[0].transpose(0, 3, 2, 1))
        assert "tells no voxel size: taken as 1 mm" in capsys.readouterr().err


def test_links_out_of_a_store_unknown_codecs_and_empty_folders_are_one_line(tmp_path):
    outside = array(tmp_path / "outside", voxels(12, 10, 8))
    path = ome(tmp_path / "a.zarr", [voxels(12, 10, 8), voxels(6, 5, 4)])
    os.rename(path / "s1", tmp_path / "moved")
    os.symlink(outside, path / "s1")
    with pytest.raises(BrokenVolume, match="its level s1 leads out of the store"):
        built(path, tmp_path / "cache")
    other = ome(tmp_path / "b.zarr", [voxels(12, 10, 8)])
    spoil(other / "s0", lambda held: held["codecs"].append({"name": "lossy9"}))
    with pytest.raises(BrokenVolume, match=r"b.zarr/s0: cannot be opened: .*lossy9"):
        built(other, tmp_path / "cache")
    (tmp_path / "c.zarr").mkdir()
    with pytest.raises(BrokenVolume, match=r"c\.zarr: holds no zarr metadata"):
        built(tmp_path / "c.zarr", tmp_path / "cache")
    with pytest.raises(BrokenVolume, match=r"d\.zarr: no such store"):
        built(tmp_path / "d.zarr", tmp_path / "cache")
    with pytest.raises(BrokenVolume, match=r"odd://box/a\.zarr: cannot be .*Protocol not known"):
        built("odd://box/a.zarr", tmp_path / "cache")


def test_a_chunk_that_stays_unreadable_is_counted_and_the_next_patch_stands_in(tmp_path, capsys):
    path = ome(tmp_path / "a.zarr", [voxels(32, 32, 32)])
    store = built(path, tmp_path / "cache")
    (path / "s0" / "c" / "1" / "1" / "1").write_bytes(b"no zstd stream")
    context.cache_clear()
    options = {"patches_per_volume": 40, "batch_size": 8}
    plan = PatchLoader(store, (8, 8, 8), threads=0, **options).plan.table(0)[:, 1:]
    touches = ((plan < 16) & (plan + 8 > 8)).all(axis=1)
    assert touches.any()
    with pytest.raises(BrokenVolume, match=r"a\.zarr/s0: cannot be read: .*c/1/1/1"):
        list(PatchLoader(store, (8, 8, 8), threads=0, **options))
    found = []
    for threads in (0, 2):
        loader = PatchLoader(store, (8, 8, 8), threads=threads, on_error="skip", **options)
        batches = list(loader)
        assert loader.unread == sum(len(batch.unread) for batch in batches) >= touches.sum()
        rows = np.concatenate([batch.index.numpy() for batch in batches])
        assert len(rows) == 40 and not touches[rows].any()
        assert (rows[~touches] == np.flatnonzero(~touches)).all()
        found.append(rows)
        for batch in batches:
            np.testing.assert_array_equal(batch.corner.numpy(), plan[batch.index.numpy()])
    np.testing.assert_array_equal(*found)
    lines = capsys.readouterr().err.splitlines()
    assert len(set(lines)) == 1 and len(lines) == 2 and "other patches stand in" in lines[0]
    for file in (path / "s0" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"none is whole")
    context.cache_clear()
    fresh = built(path, tmp_path / "cache")
    with pytest.raises(BrokenVolume, match="cannot be read"):
        next(iter(PatchLoader(fresh, (8, 8, 8), threads=0, on_error="skip")))


@pytest.mark.parametrize("kind", ["zarr", "h5"])
def test_what_is_read_is_counted_in_bytes_and_in_chunks_that_were_in_memory(tmp_path, kind):
    zyx = voxels(32, 32, 32)
    if kind == "zarr":
        path = array(tmp_path / "a.zarr", zyx, (16, 16, 16), names="zyx")
        size = sum(f.stat().st_size for f in (path / "c").rglob("*") if f.is_file())
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("raw", data=zyx, chunks=(16, 16, 16))
        path, size = tmp_path / "a.h5:/raw", zyx.nbytes
    store = built(path, tmp_path / "cache")
    context.cache_clear()
    loader = PatchLoader(store, (32, 32, 32), "full", threads=0)
    before = loader.traffic()
    next(iter(loader))
    once = loader.traffic() - before
    assert size <= once.num_bytes < size + 2000 and once.hits == 0
    next(iter(loader))
    again = loader.traffic() - before
    if kind == "zarr":  # all eight chunks were kept
        assert (again.num_bytes, again.hits, again.misses) == (once.num_bytes, 8, once.misses)
    else:
        assert again.num_bytes == 2 * size


@pytest.mark.slow
def test_training_in_place_tells_what_it_reads_and_what_it_could_not(tmp_path):
    from vae3d.commands.train import train_3d

    for name in "abc":
        ome(tmp_path / "data" / f"{name}.zarr", [voxels(32, 32, 32)], chunks=16)
    data = DataConfig(str(tmp_path / "data"), str(tmp_path / "cache"), (1.0, 0.0, 0.0),
                      on_error="skip", preprocess=RAW)  # fmt: skip
    open_data(data, say=None)
    for name in "abc":
        damaged = tmp_path / "data" / f"{name}.zarr" / "s0" / "c" / "1" / "1" / "1"
        damaged.write_bytes(b"no zstd stream")
    context.cache_clear()
    model = partial(CustomVAE, channels=(4, 8), norm=partial(GroupNorm, num_groups=4))
    train_3d(data, str(tmp_path / "run"), model=model,
             patch_size=(8, 8, 8), patches_per_volume=16, batch_size=2, max_steps=8, log_every=4,
             threads=1, media_every=0, device="cpu", wandb="disabled")  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [found for found in map(json.loads, lines) if "perf/read_mb_s" in found][-1]
    assert last["perf/read_mb_s"] >= 0 and 0 < last["perf/cache_hits"] <= 1
    assert last["perf/unread_patches"] > 0


def test_another_array_in_the_same_place_is_another_volume(tmp_path):
    zyx = voxels(12, 10, 8)
    path = ome(tmp_path / "a.zarr", [zyx])
    first = built(path, tmp_path / "cache")
    assert built(path, tmp_path / "cache").entries[0].key == first.entries[0].key
    ome(path, [voxels(14, 10, 8)])
    second = built(path, tmp_path / "cache")
    assert second.shape(0) == (1, 8, 10, 14)
    assert second.entries[0].key != first.entries[0].key


def test_options_of_stores_change_no_key_of_other_volumes_and_are_refused_for_them(tmp_path):
    np.save(tmp_path / "a.npy", voxels(8, 10, 12))
    key = built(tmp_path / "a.npy", tmp_path / "cache").entries[0].key
    copied = built(tmp_path / "a.npy", tmp_path / "cache", in_place=False)
    assert copied.entries[0].key == key
    with pytest.raises(BrokenVolume, match=r"data\.level is of zarr, HDF5 and TIFF that"):
        read_volume(tmp_path / "a.npy", Reading(level=1))


def test_headers_tell_what_a_store_is_before_a_voxel_is_read(tmp_path):
    path = ome(tmp_path / "a.zarr", [voxels(2, 12, 10, 8)], axes="czyx")
    facts = Facts.of(read_header(path))
    assert (facts.channels, facts.shape, facts.dtype) == (2, (8, 10, 12), "uint16")


def test_the_options_reach_the_store_from_the_command_line(tmp_path):
    for name in "abc":
        ome(tmp_path / f"{name}.zarr", [voxels(2, 12, 10, 8, seed=ord(name))], axes="czyx")
    config = DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), channels=[1],
                        fractions=(0.4, 0.3, 0.3), preprocess=RAW, cache_gb=0.001)  # fmt: skip
    store, split = open_data(config, say=None)
    assert [len(ids) for ids in split.values()] == [1, 1, 1]
    assert store.num_channels == 1
    assert store.entries[0].voxels.cache_gb == 0.001


@pytest.fixture
def quick_retries(monkeypatch):
    retries = {"max_retries": 6, "initial_delay": "10ms", "max_delay": "50ms"}
    monkeypatch.setattr("loaders.readers.arrays.RETRIES", retries)
    context.cache_clear()
    yield
    context.cache_clear()


def test_a_store_on_the_web_is_read_chunk_by_chunk_and_outlives_a_shaky_network(
    tmp_path, quick_retries
):
    zyx = voxels(32, 32, 32)
    ome(tmp_path / "web" / "a.ome.zarr", [zyx], chunks=8, shards=(16, 16, 16))
    with Web(tmp_path / "web") as web:
        web.mood = "shaky"
        store = built(f"{web.url}/a.ome.zarr", tmp_path / "cache")
        assert store.ids == ["a"]
        np.testing.assert_array_equal(store.read(0)[0], zyx.transpose(2, 1, 0))
        context.cache_clear()
        web.mood, web.paths = "well", []
        fresh = built(f"{web.url}/a.ome.zarr", tmp_path / "cache")
        fresh.read(0, (slice(0, 8), slice(0, 8), slice(0, 8)))
        assert {path for path in web.paths if "/c/" in path} == {"/a.ome.zarr/s0/c/0/0/0"}
        asked = len(web.paths)
        fresh.read(0, (slice(0, 8), slice(0, 8), slice(0, 8)))  # kept in memory
        assert len(web.paths) == asked


def test_an_epoch_fetches_the_inner_chunks_that_it_touches_and_never_whole_shards(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**16, (128, 128, 128)).astype(np.uint16)
    path = array(tmp_path / "a.zarr", noise, (16, 16, 16), (64, 64, 64), names="zyx")
    store = built(path, tmp_path / "cache")
    context.cache_clear()
    loader = PatchLoader(store, (16, 16, 16), patches_per_volume=12, batch_size=4, threads=0)
    before = loader.traffic()
    for _ in loader:
        pass
    touched = {
        chunk
        for corner in loader.plan.table(0)[:, 1:]
        for chunk in itertools.product(*(range(c // 16, (c + 15) // 16 + 1) for c in corner))
    }
    size = len(touched) * 16**3 * 2
    assert size < (loader.traffic() - before).num_bytes < 1.1 * size < noise.nbytes / 4


def chunks_asked(web) -> list[str]:
    """Which chunks, or shards of them, a server was asked for since the last call."""
    asked, web.paths = [path for path in web.paths if "/c/" in path], []
    return asked


def test_an_epoch_out_of_a_huge_sparse_store_asks_for_its_own_shards_alone(tmp_path):
    terabyte(tmp_path / "a.zarr")
    with Web(tmp_path) as web:
        store = built(f"{web.url}/a.zarr", tmp_path / "cache", Preprocess(intensity="raw"))
        assert all("/s1/" in path for path in chunks_asked(web))  # statistics are of the coarse one
        loader = PatchLoader(store, (16, 16, 16), patches_per_volume=60, batch_size=4, threads=2)
        for batch in loader:
            assert batch.image.abs().max() == 0
        touched = {
            "/a.zarr/s0/c/" + "/".join(map(str, place[::-1]))
            for corner in loader.plan.table(0)[:, 1:].tolist()
            for place in itertools.product(*(range(c // 512, (c + 15) // 512 + 1) for c in corner))
        }
        assert set(chunks_asked(web)) == touched and len(touched) < 100 < 16**3


def test_each_rank_asks_for_the_chunks_of_its_patches_and_a_slab_for_those_of_its_rows(tmp_path):
    web_root = tmp_path / "web"
    for name in "ab":
        array(web_root / f"{name}.zarr", voxels(32, 32, 32), (16, 16, 16), names="zyx")
    files = [file for file in web_root.rglob("*") if "c" in file.parts and file.is_file()]
    sizes = {f"/{file.relative_to(web_root)}": file.stat().st_size for file in files}
    with Web(web_root) as web:
        urls = [f"{web.url}/{name}.zarr" for name in "ab"]
        store = VolumeStore.build(urls, tmp_path / "cache", RAW, cache_gb=0)
        loaders = [PatchLoader(store, (16, 16, 16), "full", batch_size=4, threads=1, rank=rank,
                               world_size=2) for rank in (0, 1)]  # fmt: skip
        halves = partial(own_part, factor=(1, 1, 1), parts=2)
        loaders += [
            PatchLoader(store, patching=None, threads=0, part=partial(halves, rank=rank))
            for rank in (0, 1)
        ]
        asked = []
        for loader in loaders:
            store.array(0), store.array(1)  # their metadata count, too
            chunks_asked(web)
            before = loader.traffic().num_bytes
            for _ in loader:
                pass
            asked.append(chunks_asked(web))
            assert loader.traffic().num_bytes - before == sum(sizes[path] for path in asked[-1])
    for one, two in (asked[:2], asked[2:]):
        assert len(one) == len(two) == 8 and sorted(one + two) == sorted(sizes)


def test_training_validates_on_a_part_of_what_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("loaders.store.MOST_AT_ONCE", 1000)
    monkeypatch.setattr("loaders.store.PART", 8)
    zyx = voxels(24, 20, 16)
    path = ome(tmp_path / "a.zarr", [zyx])
    store = built(path, tmp_path / "cache", Preprocess())
    box = store.part(0)
    assert [s.stop - s.start for s in box] == [8, 8, 8]
    middle = [(s.start + s.stop) / 2 for s in box]  # that of the blob
    assert np.abs(np.array(middle) - [8, 10, 12]).max() < 3
    shapes = []

    def identity(_network, x, **_how):
        shapes.append(tuple(x.shape))
        return x + 0.1

    monkeypatch.setattr("vae3d.training.validate.reconstruct", identity)
    scores = Validation(store, World(), (8, 8, 8))(None, 1)
    assert shapes == [(1, 8, 8, 8)]
    assert abs(scores["val/mae"] - 0.1) < 1e-6
    copied = built(path, tmp_path / "cache", Preprocess(), in_place=False)
    assert copied.part(0) == (slice(None),) * 3


def test_requests_to_a_store_overlap(tmp_path, quick_retries):
    zyx = voxels(32, 32, 32)
    ome(tmp_path / "web" / "a.zarr", [zyx], chunks=16)
    with Web(tmp_path / "web") as web:
        store = VolumeStore.build(f"{web.url}/a.zarr", tmp_path / "cache", RAW, cache_gb=0)
        web.latency_s = 0.2
        start = time.perf_counter()
        store.read(0)  # 8 chunks would take 1.6 s one after the other
        assert time.perf_counter() - start < 0.9


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_planes_that_were_read_lie_an_odd_number_of_cache_lines_apart(dtype):
    for shape in ((64, 64, 64), (2, 3, 63, 32), (5, 7, 9)):
        found = spread(shape, np.dtype(dtype))
        assert found.shape == shape and found.dtype == dtype
        assert found.strides[-3] % 128 == 64 and found[0, 0].flags.c_contiguous


def test_all_patches_of_a_batch_are_fetched_at_once(tmp_path, quick_retries):
    ome(tmp_path / "web" / "a.zarr", [voxels(32, 32, 32)], chunks=16)
    with Web(tmp_path / "web") as web:
        store = VolumeStore.build(f"{web.url}/a.zarr", tmp_path / "cache", RAW, cache_gb=0)
        web.latency_s, web.most_at_once = 0.1, 0
        options = {"patching": "full", "batch_size": 4, "threads": 1, "prefetch": 1}
        for batch in PatchLoader(store, (16, 16, 16), **options):  # a patch is a chunk
            for image, corner in zip(batch.image.numpy(), batch.corner.tolist(), strict=True):
                box = tuple(slice(c, c + 16) for c in corner)
                np.testing.assert_array_equal(image, store.read(0, box))
        assert web.most_at_once >= 4


@pytest.mark.parametrize(
    ("mood", "line"),
    [("closed", r"a\.zarr: cannot be read: .*403.*; credentials are taken from the URL itself"),
     ("short", r"a\.zarr/s0: cannot be read: .*c/")],
)  # fmt: skip
def test_what_stays_unreadable_on_the_web_is_one_line(tmp_path, quick_retries, mood, line):
    ome(tmp_path / "web" / "a.zarr", [voxels(16, 16, 16)])
    with Web(tmp_path / "web") as web:
        web.mood = mood
        with pytest.raises(BrokenVolume, match=line) as error:
            built(f"{web.url}/a.zarr", tmp_path / "cache")
    assert "\n" not in str(error.value)


TERABYTE = """
import sys, time
from loaders import DataConfig, PatchLoader, open_data
root, cache = sys.argv[1:]
start = time.perf_counter()
store, _ = open_data(DataConfig(root=root, cache_dir=cache, fractions=(1, 0, 0)))
loader = PatchLoader(store, (64, 64, 64), patches_per_volume=10_000, batch_size=4)
assert next(iter(loader.stream())).image.shape == (4, 1, 64, 64, 64)
took = time.perf_counter() - start
status = open("/proc/self/status").read().split("RssAnon:")[1]
print(took, int(status.split()[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux counts its memory")
def test_a_terabyte_is_opened_planned_and_read_from_in_five_seconds_and_half_a_gigabyte(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", TERABYTE, terabyte(tmp_path / "a.zarr"), tmp_path / "cache"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seconds, megabytes = map(float, run.stdout.split()[-2:])
    assert seconds < 5 and megabytes < 500
