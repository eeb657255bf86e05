"""`data.region`: a part of each volume, read as if its file held nothing else, in its own place."""

import json
from functools import partial

import numpy as np
import pytest

import vae3d
from loaders import DataConfig, PatchLoader, Preprocess, Reading, VolumeStore, write_volume
from loaders.readers import BrokenVolume, Volume, read_header, read_volume
from tests.stores import UM, array, halved, ome, voxels
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.commands.train import train_3d
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm

RAW = Preprocess(intensity="raw", orient_ras=False)
REGION = [[4, 12], [3, 15], [10, 22]]
BOX = (slice(4, 12), slice(3, 15), slice(10, 22))
# Turned, so that the shift of the affine is along other axes than the region's.
AFFINE = np.array([[0, -2.0, 0, 5], [0, 0, 1.5, 6], [1.0, 0, 0, 7], [0, 0, 0, 1]])


def built(volumes, cache, preprocess=RAW, **reading):
    return VolumeStore.build(
        volumes, cache, preprocess, reading=Reading(**reading), progress=False
    )  # fmt: skip


def test_a_region_of_any_format_is_what_a_file_of_that_part_alone_would_be(tmp_path):
    xyz = voxels(16, 20, 24).astype(np.int16)
    part = AFFINE.copy()
    part[:3, 3] += AFFINE[:3, :3] @ [4, 3, 10]
    write_volume(tmp_path / "a.nii.gz", Volume(xyz[None], AFFINE))
    write_volume(tmp_path / "part.nii.gz", Volume(xyz[BOX][None], part))
    np.save(tmp_path / "a.npy", xyz)
    for preprocess in (Preprocess(), RAW, Preprocess(spacing_mm=(1.0, 1.0, 1.0))):
        ours = built(tmp_path / "a.nii.gz", tmp_path / "cache", preprocess, region=REGION)
        alone = built(tmp_path / "part.nii.gz", tmp_path / "cache", preprocess)
        np.testing.assert_array_equal(ours.read(0), alone.read(0))
        np.testing.assert_allclose(ours.meta(0)["affine"], alone.meta(0)["affine"])
        np.testing.assert_allclose(ours.undo(0, ours.read(0)).affine, part)
    store = built(tmp_path / "a.npy", tmp_path / "cache", region=REGION)
    np.testing.assert_array_equal(store.read(0)[0], xyz[BOX])
    header = read_header(tmp_path / "a.nii.gz", Reading(region=REGION))
    assert header.data.shape == (1, 8, 12, 12) and np.allclose(header.affine, part)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_region_of_a_store_is_read_where_it_lies_turned_and_with_its_levels(
    tmp_path, monkeypatch, in_place
):
    monkeypatch.setattr("loaders.in_place.ENOUGH", 100)
    zyx = voxels(24, 20, 16)
    turned = {"x": "right-to-left", "y": "anterior-to-posterior", "z": "inferior-to-superior"}
    path = ome(tmp_path / "a.zarr", [zyx, halved(zyx)], orientation=turned, unit="millimeter")
    xyz = zyx.transpose(2, 1, 0)
    whole = built(path, tmp_path / "cache", in_place=in_place)
    store = built(path, tmp_path / "cache", region=REGION, in_place=in_place)
    assert store.entries[0].key != whole.entries[0].key
    np.testing.assert_array_equal(store.read(0)[0], xyz[BOX])
    np.testing.assert_array_equal(store.read(0, (slice(1, 3),) * 3)[0], xyz[5:7, 4:6, 11:13])
    corner = np.array(whole.meta(0)["affine"]) @ [4, 3, 10, 1]
    np.testing.assert_allclose(np.array(store.meta(0)["affine"])[:, 3], corner)
    ras = built(path, tmp_path / "cache", Preprocess(intensity="raw"), region=REGION,
                in_place=in_place)  # fmt: skip
    np.testing.assert_array_equal(ras.read(0)[0], xyz[BOX][::-1, ::-1])
    np.testing.assert_allclose(ras.undo(0, ras.read(0)).affine[:, 3], corner)
    low, high = ras.foreground_points(0).min(0), ras.foreground_points(0).max(0)
    assert (low >= 0).all() and (high < [8, 12, 12]).all()
    small = built(path, tmp_path / "cache", region=[[2, 6], [1, 7], [5, 11]], level=1,
                  in_place=in_place)  # fmt: skip
    np.testing.assert_array_equal(small.read(0)[0], xyz[::2, ::2, ::2][2:6, 1:7, 5:11])


def test_patches_of_one_read_keep_to_the_chunks_of_the_store_in_a_turned_region(tmp_path):
    path = array(tmp_path / "a.zarr", voxels(96, 80, 72), (16, 16, 16), names="zyx")
    region = [[3, 70], [5, 80], [7, 90]]
    for preprocess in (RAW, Preprocess(intensity="raw")):
        store = built(path, tmp_path / "cache", preprocess, region=region)
        flips = store.entries[0].voxels.views[0].flips
        options = {"patches_per_volume": 64, "patches_per_read": 4, "threads": 0}
        table = PatchLoader(store, (16, 16, 16), **options).plan.table(0)[:, 1:]
        ends = zip(region, flips, table.T, strict=True)
        place = np.stack([b - 16 - at if flip else a + at for (a, b), flip, at in ends], axis=1)
        assert (place >= np.array(region)[:, 0]).all()
        assert (place + 16 <= np.array(region)[:, 1]).all()
        for block in place.reshape(2, 4, 8, 3):
            low, high = block[0] // 16, (block[0] + 15) // 16
            assert (block // 16 >= low).all() and ((block + 15) // 16 <= high).all()


def test_masks_and_label_maps_lie_beside_the_region_of_their_volume(tmp_path):
    xyz, rng = voxels(16, 20, 24).astype(np.int16), np.random.default_rng(0)
    labels = rng.integers(0, 4, xyz.shape).astype(np.uint8)
    for suffix, affine in ((".nii.gz", AFFINE), (".npy", None)):
        folder = tmp_path / suffix
        folder.mkdir()
        for name, data in (("a", xyz), ("fov", labels > 1), ("map", labels)):
            path = folder / f"{name}{suffix}"
            if affine is None:
                np.save(path, data.astype(np.uint8) if name != "a" else data)
            else:
                write_volume(path, Volume(data[None].astype(np.int16), affine))
        row = f"path,fov,label_map\na{suffix},fov{suffix},map{suffix}\n"
        (folder / "m.csv").write_text(row)
        # The corner of a region may be that of the volume, so that nothing is shifted.
        for region in (REGION, [[0, 8], [0, 12], [0, 12]]):
            box = tuple(slice(*pair) for pair in region)
            store = built(folder / "m.csv", tmp_path / "cache", mask="fov", region=region)
            np.testing.assert_array_equal(store.seen(0), labels[box] > 1)
            np.testing.assert_array_equal(store.label_map(0), labels[box])
            for label, points in store.label_points(0).items():
                assert (labels[box][tuple(points.T)] == label).all() and len(points)


def test_a_region_that_leaves_a_volume_or_is_none_is_one_line(tmp_path):
    path = ome(tmp_path / "a.zarr", [voxels(24, 20, 16)])
    np.save(tmp_path / "b.npy", voxels(16, 20, 24))
    for given in (path, tmp_path / "b.npy"):
        with pytest.raises(BrokenVolume, match=r"has 16 x 20 x 24 voxels, which data\.region"):
            built(given, tmp_path / "cache", region=[[4, 17], [3, 15], [10, 22]])
    for odd in ([[0, 4], [0, 4]], [[0, 4], [4, 4], [0, 4]], [[-1, 4], [0, 4], [0, 4]], [[0.5, 4]]):
        with pytest.raises(ValueError, match=r"data\.region is .*the first below the second"):
            Reading(region=odd)


@pytest.mark.slow
def test_training_evaluation_and_encoding_of_a_region(tmp_path):
    zyx, cache = voxels(24, 20, 16), str(tmp_path / "cache")
    for name in "abc":
        ome(tmp_path / "data" / f"{name}.zarr", [zyx])
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, latent_channels=2)
    quiet = dict(device="cpu", wandb="disabled")
    data = DataConfig(str(tmp_path / "data"), cache, (0.4, 0.3, 0.3), region=REGION)
    train_3d(data, str(tmp_path / "run"), model=model, patch_size=(8, 8, 8), batch_size=1,
             max_steps=1, threads=0, media_every=0, **quiet)  # fmt: skip
    other = [[0, 8], [0, 16], [8, 24]]
    plain = dict(baseline=False, patch_gap=False, media=False, split="all", limit=1)
    evaluate(str(tmp_path / "run"), EvaluationData(data.root, cache, region=other),
             str(tmp_path / "out"), **plain, **quiet)  # fmt: skip
    (file,) = (tmp_path / "out" / "recon").iterdir()
    recon = read_volume(file)
    assert recon.data.shape == (1, 8, 16, 16)
    assert np.allclose(recon.affine[:3, 3], [0, 0, 8 * 2 * UM])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["region"] == other
    shapes = {}
    for name, source in {
        "run": VolumeSource(cache_dir=cache),
        "other": VolumeSource(cache_dir=cache, region=other),
        "whole": VolumeSource(data.root, cache),
    }.items():
        encode(str(tmp_path / "run"), str(tmp_path / name), source, device="cpu", mode="exact")
        (latent, *_) = sorted((tmp_path / name).glob("*.safetensors"))
        shapes[name] = vae3d.stage2.latents.read_latent(latent).info["volume_shape"]
    assert shapes == {"run": [1, 8, 12, 12], "other": [1, 8, 16, 16], "whole": [1, 16, 20, 24]}
    assert "region" not in vae3d.load_model(str(tmp_path / "run")).contract["data"]
