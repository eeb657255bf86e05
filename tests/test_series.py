"""4D series: each time point is a sample, all of one person, and the file is read once."""

import json
from functools import partial

import numpy as np
import pytest
import tifffile
import torch

import loaders.assemble
import vae3d
from loaders import (
    DataConfig,
    PatchLoader,
    Preprocess,
    VolumeStore,
    find_subjects,
    open_data,
    split_subjects,
    survey_data,
)
from loaders.readers import (
    BrokenVolume,
    Reading,
    Volume,
    num_time_points,
    read_volume,
    write_volume,
)
from loaders.series import at_time
from loaders.subjects import TimePoint
from train_3d import train_3d
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm

SHAPE = (8, 9, 10)
AFFINE = np.array([[0, 0, 2.0, -90], [-2, 0, 0, 100], [0, 2, 0, -60], [0, 0, 0, 1]])
SAMPLES = Reading(volumes_4d="samples")
RAW = Preprocess(intensity="raw")


def series(seed=0, count=4) -> np.ndarray:
    """(T, X, Y, Z); no two time points are alike."""
    data = np.random.default_rng(seed).integers(0, 900, (count, *SHAPE))
    return (data + 1000 * np.arange(count)[:, None, None, None]).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    """Two series and one still volume."""
    for name, data in (("bold", series(0, 4)), ("cine", series(1, 12)), ("t1", series(2, 1))):
        write_volume(tmp_path / "data" / f"{name}.nii.gz", Volume(data, AFFINE))
    return tmp_path / "data"


def test_each_time_point_is_a_sample_and_all_of_a_series_are_one_person(folder):
    subjects = find_subjects(folder, SAMPLES)
    ids = [subject.id for subject in subjects]
    assert ids[:5] == ["bold__t000", "bold__t001", "bold__t002", "bold__t003", "cine__t000"]
    assert len(ids) == 17 and ids[-1] == "t1"
    assert {subject.person for subject in subjects} == {"bold", "cine", "t1"}
    split = split_subjects(subjects, (0.34, 0.33, 0.33))
    assert sorted(map(len, split.values())) == [1, 4, 12]


def test_a_time_point_is_read_and_written_back_as_a_volume_of_its_own(folder, tmp_path):
    store = VolumeStore.build(find_subjects(folder, SAMPLES), tmp_path / "c", RAW, reading=SAMPLES)
    for index, expected in enumerate([*series(0, 4), *series(1, 12), *series(2, 1)]):
        volume = store.undo(index, store.read(index))
        assert np.array_equal(volume.data, expected[None]) and np.allclose(volume.affine, AFFINE)
    assert len({store.meta(index)["key"] for index in range(len(store))}) == 17


def test_a_series_is_read_once_to_cache_it_and_never_again(folder, tmp_path, monkeypatch):
    read = []

    def counting(path, reading):
        read.append(path.name)
        return read_volume(path, reading)

    monkeypatch.setattr(loaders.assemble, "read_volume", counting)
    config = DataConfig(str(folder), str(tmp_path / "cache"), volumes_4d="samples")
    store, _ = open_data(config)
    assert sorted(read) == ["bold.nii.gz", "cine.nii.gz", "t1.nii.gz"] and len(store) == 17
    (tmp_path / "cache" / f"{store.entries[3].key}.json").unlink()
    open_data(config)
    assert len(read) == 4  # one time point was missing: its file alone is read
    open_data(config)
    assert len(read) == 4


def test_only_headers_are_read_to_count_time_points(folder, tmp_path, monkeypatch):
    stack = series().transpose(0, 3, 2, 1)  # TZYX
    tifffile.imwrite(tmp_path / "t.tif", stack, imagej=True, metadata={"axes": "TZYX"})
    write_volume(tmp_path / "flat.nii", Volume(series(count=1)))
    monkeypatch.setattr("numpy.memmap", None)
    monkeypatch.setattr("loaders.readers.voxels.decompressed", None)
    assert num_time_points(folder / "cine.nii.gz", SAMPLES) == 12
    assert num_time_points(tmp_path / "t.tif", SAMPLES) == 4
    assert num_time_points(tmp_path / "flat.nii", SAMPLES) == 1
    assert num_time_points(folder / "cine.nii.gz", Reading()) == 1


def test_formats_without_a_time_axis_take_their_fourth(tmp_path):
    np.save(tmp_path / "a.npy", series(3, 3).transpose(1, 2, 3, 0))
    store = VolumeStore.build([tmp_path / "a.npy"], tmp_path / "cache", RAW, reading=SAMPLES)
    assert store.ids == ["a__t000", "a__t001", "a__t002"]
    assert np.array_equal(store.read(1)[0], series(3, 3)[1])


def test_channels_of_a_time_lapse_stay_channels(tmp_path):
    data = np.stack([series(0, 3), 7 + series(1, 3)], 2)  # (T, X, C, Y, Z)
    stack = np.einsum("txcyz->tzcyx", data)
    tifffile.imwrite(tmp_path / "t.tif", stack, imagej=True, metadata={"axes": "TZCYX"})
    store = VolumeStore.build([tmp_path / "t.tif"], tmp_path / "cache", RAW, reading=SAMPLES)
    assert len(store) == 3 and store.num_channels == 2
    assert np.array_equal(store.read(2), [series(0, 3)[2], 7 + series(1, 3)[2]])


def test_files_of_one_subject_give_the_same_time_points_as_channels(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(series(seed)))
    write_volume(tmp_path / "c.nii.gz", Volume(series(2, 3)))
    (tmp_path / "m.csv").write_text("path\na.nii.gz;b.nii.gz\n")
    store = VolumeStore.build(
        find_subjects(tmp_path / "m.csv", SAMPLES), tmp_path / "cache", RAW, reading=SAMPLES
    )
    assert np.array_equal(store.read(3), [series(0)[3], series(1)[3]])
    (tmp_path / "m.csv").write_text("path\na.nii.gz;c.nii.gz\n")
    with pytest.raises(BrokenVolume, match=r"c\.nii\.gz: has 3 time points, another .* 4"):
        find_subjects(tmp_path / "m.csv", SAMPLES)


def test_a_broken_time_point_or_series_is_told_by_name_and_may_be_skipped(folder, tmp_path, capsys):
    data = series(5)
    data[2] = 7
    write_volume(folder / "dead.nii.gz", Volume(data))
    (folder / "torn.nii.gz").write_bytes((folder / "cine.nii.gz").read_bytes()[:-9])
    survey = survey_data(DataConfig(str(folder), volumes_4d="samples"))
    survey.read_voxels()
    told = [str(error) for error in survey.faults]
    assert len(survey.subjects) == 33 and len(told) == 13
    assert any("dead.nii.gz: time point 2: all voxels are 7" in text for text in told)
    config = DataConfig(str(folder), str(tmp_path / "c"), volumes_4d="samples")
    with pytest.raises(BrokenVolume, match=r"time point 2.*on_error skip"):
        open_data(config)
    config.on_error = "skip"
    store, _ = open_data(config)
    assert len(store) == 20 and "dead__t002" not in store.ids
    capsys.readouterr()


@pytest.mark.slow
def test_a_series_trains_encodes_and_is_evaluated_as_its_time_points(folder, tmp_path):
    (folder / "t1.nii.gz").unlink()
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, latent_channels=2)
    data = DataConfig(
        str(folder), str(tmp_path / "cache"), fractions=(0.5, 0.0, 0.5), volumes_4d="samples"
    )
    quiet = dict(device="cpu", wandb="disabled")
    train_3d(data, str(tmp_path / "run"), model=model, patch_size=(8, 8, 8), batch_size=1,
             max_steps=1, threads=0, media_every=0, **quiet)  # fmt: skip
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    held_out = split["test"]
    assert len({id.split("__t")[0] for id in held_out}) == 1
    evaluate(
        str(tmp_path / "run"), EvaluationData(str(folder), str(tmp_path / "cache")),
        str(tmp_path / "out"), limit=2, baseline=False, patch_gap=False, media=False, **quiet,
    )  # fmt: skip
    name = held_out[1]
    recon = read_volume(tmp_path / "out" / "recon" / f"{name}.nii.gz")
    assert recon.data.shape == (1, *SHAPE) and np.allclose(recon.affine, AFFINE)
    encode(
        str(tmp_path / "run"), str(tmp_path / "z"), VolumeSource(cache_dir=str(tmp_path / "cache")),
        split="test", device="cpu",
    )  # fmt: skip
    index = json.loads((tmp_path / "z" / "latents.json").read_text())
    assert sorted(index["subjects"]) == held_out
    vae = vae3d.load_model(str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"cine\.nii\.gz: a series of 12 time points"):
        vae3d.encode_file(vae, folder / "cine.nii.gz")


def test_patches_of_time_points_come_from_their_own_volume(folder, tmp_path):
    store = VolumeStore.build(
        find_subjects(folder, SAMPLES), tmp_path / "cache", RAW, reading=SAMPLES
    )
    batch = PatchLoader(store, (4, 4, 4), batch_size=40, threads=0).read(range(40))
    for image, volume in zip(batch.image, batch.volume.tolist(), strict=True):
        time = store.entries[volume].subject.time
        assert torch.all(image // 1000 == (time.number if time else 0))


def test_gray_and_colored_series_are_colored_alike_at_each_time(tmp_path):
    gray = np.random.default_rng(0).integers(0, 255, (2, 3, 5, 6), np.uint8)  # T, Z, Y, X
    colors = np.stack([gray, gray // 2, gray // 3], -1)
    tifffile.imwrite(tmp_path / "g.ome.tif", gray, metadata={"axes": "TZYX"})
    tifffile.imwrite(tmp_path / "c.ome.tif", colors, photometric="rgb", metadata={"axes": "TZYXS"})
    reading = Reading(volumes_4d="samples", color="rgb")
    for name, stored in (("g", gray[..., None].repeat(3, -1)), ("c", colors)):
        volume = read_volume(tmp_path / f"{name}.ome.tif", reading)
        for number in range(2):
            found = at_time(volume, TimePoint(name, number, 2)).data
            assert np.array_equal(found, stored[number].T)


def test_a_series_that_lacks_a_modality_has_all_its_time_points(tmp_path):
    stored = np.random.default_rng(0).integers(1, 900, (3, 4, 5, 6), np.uint16)  # T, Z, Y, X
    for name in ("a0", "b0", "a1"):
        tifffile.imwrite(tmp_path / f"{name}.tif", stored, metadata={"axes": "TZYX"})
    (tmp_path / "m.csv").write_text('path;id\n"a0.tif;b0.tif";s0\n"a1.tif;b1.tif";s1\n')
    reading = Reading(volumes_4d="samples", missing="zero")
    subjects = find_subjects(tmp_path / "m.csv", reading)
    store = VolumeStore.build(subjects, tmp_path / "cache", RAW, reading=reading)
    assert store.ids == [f"s{n}__t00{t}" for n in range(2) for t in range(3)]
    for number in range(6):
        x, at = store.read(number), stored[number % 3].T
        assert np.array_equal(x, [at, at * (number < 3)])
