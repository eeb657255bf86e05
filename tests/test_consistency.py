"""Whether a data set goes together: told before it is cached, the same by every command."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from loaders import (
    BrokenVolume,
    DataConfig,
    Facts,
    LabelCorners,
    Preprocess,
    Reading,
    Subject,
    Volume,
    VolumeStore,
    facts_of,
    find_subjects,
    open_data,
    read_volume,
    survey_data,
    write_volume,
)
from loaders.readers import HEADED, READERS, read_header
from loaders.store import silent


def scan(path: Path, seed: int = 0, shape=(1, 5, 4, 3), affine=None) -> Path:
    data = np.random.default_rng(seed).integers(0, 99, shape).astype(np.int16)
    write_volume(path, Volume(data, np.eye(4) if affine is None else affine))
    return path


def modalities(root: Path, lacking: tuple[str, ...] = ()) -> Path:
    """Four subjects with two modalities in a manifest, but for the files that are lacking."""
    rows = ["path,id"]
    for n in range(4):
        names = [f"s{n}_{kind}.nii.gz" for kind in ("t1", "t2")]
        for k, name in enumerate(names):
            if name not in lacking:
                scan(root / name, 10 * n + k)
        rows.append(f"{';'.join(names)},s{n}")
    (root / "m.csv").write_text("\n".join(rows) + "\n")
    return root / "m.csv"


# --------------------------------------------------------------------------------------------------
# Facts of headers.


def test_headers_tell_what_reading_tells_and_no_voxel_is_read(tmp_path, monkeypatch):
    import gzip

    import loaders.readers.voxels as voxels

    affine = np.array([[0, 0, 2, 5], [-1.5, 0, 0, 7], [0, 3, 0, 9], [0, 0, 0, 1]], float)
    data = np.random.default_rng(0).integers(0, 99, (1, 5, 4, 3)).astype(np.int16)
    write_volume(tmp_path / "a.nii.gz", Volume(data, affine, 2.0, 1.0))
    (tmp_path / "b.nii").write_bytes(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    np.save(tmp_path / "c.npy", data[0].astype(">f4"))
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 4 3\nspacings: 1 2 4\nencoding: gzip\n"
    packed = gzip.compress(data[0].tobytes("F"))
    (tmp_path / "d.nrrd").write_bytes(header.encode() + b"endian: little\n\n" + packed)
    fields = "NDims = 3\nDimSize = 5 4 3\nElementType = MET_SHORT\nElementSpacing = 1 2 4\n"
    meta = fields.encode() + b"ElementDataFile = LOCAL\n"
    (tmp_path / "e.mha").write_bytes(meta + data[0].tobytes("F"))
    subjects = find_subjects(tmp_path)
    read = [Facts.of(read_volume(s.paths[0])) for s in subjects]
    assert read[0] == Facts((5, 4, 3), 1, (1.5, 3.0, 2.0), "int16", "PSR") and len(read) == 5
    monkeypatch.setattr(voxels, "decompressed", lambda *a: pytest.fail("voxels are read"))
    assert [facts_of(s) for s in subjects] == read
    assert read_header(tmp_path / "a.nii.gz").data.strides == (0, 0, 0, 0)


def test_a_header_costs_no_memory_whatever_it_claims(tmp_path):
    import tracemalloc

    path = tmp_path / "a.nii.gz"
    write_volume(path, Volume(np.zeros((1, 400, 400, 100), np.int16)))
    tracemalloc.start()
    header = read_header(path)
    assert header.data.shape == (1, 400, 400, 100)
    assert tracemalloc.get_traced_memory()[1] < 4e6  # 32 MB of voxels
    tracemalloc.stop()


def test_formats_whose_headers_tell_are_readers_and_the_others_say_nothing(tmp_path):
    assert set(READERS) > HEADED
    np.savez(tmp_path / "a.npz", data=np.arange(60.0).reshape(5, 4, 3))
    assert facts_of(Subject("a", (tmp_path / "a.npz",))) is None


def test_facts_know_pictures_from_volumes():
    assert Facts.of(Volume(np.zeros((3, 9, 8, 1)))).dims == 2
    assert Facts.of(Volume(np.zeros((3, 9, 8, 2)))).dims == 3


# --------------------------------------------------------------------------------------------------
# What does not fit, all at once, before anything is cached.


def test_mixed_channels_are_named_all_at_once_before_anything_is_cached(tmp_path, capsys):
    manifest = modalities(tmp_path)
    lines = manifest.read_text().splitlines()
    for n, name in [(1, "s0_t1.nii.gz,s0"), (3, "s2_t2.nii.gz,s2")]:
        lines[n] = name
    manifest.write_text("\n".join([*lines, "s0_t1.nii.gz;s1_t1.nii.gz,x"]))
    config = DataConfig(root=str(manifest), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="2 volumes do not fit, all listed above"):
        open_data(config)
    out = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 's0_t1.nii.gz'}: s0 has 1 channels, 3 others have 2" in out
    assert f"{tmp_path / 's2_t2.nii.gz'}: s2 has 1 channels, 3 others have 2" in out
    with pytest.raises(ValueError, match="s0 has 1 channels, the model takes 2"):
        open_data(config, in_channels=2)
    assert not (tmp_path / "cache").exists()


def test_mixed_channels_of_formats_without_headers_are_named_all_at_once_too(tmp_path, capsys):
    for n in range(5):
        shape = (5, 4, 3, 2) if n in (1, 3) else (5, 4, 3)
        np.savez(tmp_path / f"s{n}.npz", data=np.random.default_rng(n).random(shape))
    config = DataConfig(
        root=str(tmp_path), cache_dir=str(tmp_path / "cache"), volumes_4d="channels"
    )
    with pytest.raises(ValueError, match="2 volumes do not fit"):
        open_data(config)
    out = capsys.readouterr().out
    assert "5 of 5 are of formats whose headers tell too little" in out
    assert "s1 has 2 channels, 3 others have 1" in out and "s3 has 2 channels" in out
    assert "volumes: 5 x 4 x 3 voxels of 1 x 1 x 1 mm; 1-2 channels" in out  # once they were read


def test_missing_modalities_are_named_all_at_once_with_the_remedy(tmp_path, capfd, vae3d):
    manifest = modalities(tmp_path, ("s1_t2.nii.gz", "s3_t1.nii.gz"))
    config = DataConfig(root=str(manifest), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="2 volumes do not fit"):
        open_data(config)
    out = capfd.readouterr().out
    assert f"{tmp_path / 's1_t2.nii.gz'}: s1 lacks this file, its 2. of 2" in out
    assert f"{tmp_path / 's3_t1.nii.gz'}: s3 lacks this file, its 1. of 2" in out
    assert "--data.missing skip" in out and not (tmp_path / "cache").exists()
    done = vae3d("check-data", manifest)
    assert done.returncode == 2 and done.stdout.count("lacks this file") == 2
    assert len(done.stdout.splitlines()) == 2 and "2 of 4 volumes are sound" in done.stderr


def test_a_row_without_one_of_its_files_lacks_it(tmp_path):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    (tmp_path / "m.csv").write_text("path\na.nii.gz;b.nii.gz\n;b.nii.gz\n")
    lacking = find_subjects(tmp_path / "m.csv")[1]
    assert lacking.id == "b"
    with pytest.raises(BrokenVolume, match=r"m.csv/row 2, file/1: b lacks this file, its 1. of 2"):
        facts_of(lacking)
    (tmp_path / "m.json").write_text(json.dumps([{"path": ["a.nii.gz", None]}]))
    assert facts_of(find_subjects(tmp_path / "m.json")[0], Reading(missing="zero")).channels == 2


def test_a_subject_that_lacks_a_modality_is_skipped_and_listed(tmp_path):
    manifest = modalities(tmp_path, ("s1_t2.nii.gz",))
    config = DataConfig(root=str(manifest), cache_dir=str(tmp_path / "cache"), missing="skip")
    lines: list[str] = []
    store, split = open_data(config, say=lines.append)
    assert store.ids == ["s0", "s2", "s3"] and any(
        "missing: 1 subjects lack a file" in line for line in lines
    )
    assert sorted(id for ids in split.values() for id in ids) == store.ids
    assert [row[0] for row in store.skipped] == ["s1"] and "s1_t2" in store.skipped[0][1]


@pytest.mark.parametrize("intensity", ["unit", "symmetric", "zscore", "raw"])
@pytest.mark.parametrize("lacking", ["s1_t1.nii.gz", "s1_t2.nii.gz"])
def test_a_missing_modality_is_zeros_whatever_the_normalization(tmp_path, lacking, intensity):
    manifest = modalities(tmp_path, (lacking,))
    preprocess = Preprocess(intensity=intensity, crop_foreground=True)
    config = DataConfig(
        root=str(manifest), cache_dir=str(tmp_path / "cache"), missing="zero", preprocess=preprocess
    )
    lines: list[str] = []
    store, _ = open_data(config, say=lines.append)
    x, gone = store.read(1), int("t2" in lacking)
    assert x.shape[0] == 2 and not x[gone].any() and x[1 - gone].std() > 0
    assert "missing: 1 subjects lack a file and get a channel of zeros: s1" in lines
    assert len(store.foreground_points(1))
    back = store.undo(1, x).data
    source = read_volume(tmp_path / f"s1_t{2 - gone}.nii.gz").intensities()[0]
    assert np.corrcoef(back[1 - gone].ravel(), source.ravel())[0, 1] > 0.9
    assert not back[gone].any()
    scan(tmp_path / lacking, 99)  # it has come: the volume is another one
    again, _ = open_data(config, say=lines.append)
    assert again.read(1)[gone].std() > 0 and again.entries[0].key == store.entries[0].key


def test_nothing_is_told_of_intensities_that_no_file_holds(tmp_path):
    manifest = modalities(tmp_path, ("s1_t1.nii.gz",))
    for path in tmp_path.glob("*_t1.nii.gz"):
        volume = read_volume(path)
        write_volume(path, Volume(volume.intensities() - 50, volume.affine))
    preprocess = Preprocess(channels=("ct", "t2"), window_hu={"ct": (-999, 999), "t2": (0, 999)})
    config = DataConfig(
        root=str(manifest), cache_dir=str(tmp_path / "cache"), missing="zero", preprocess=preprocess
    )
    lines: list[str] = []
    open_data(config, say=lines.append)
    assert "missing: 1 subjects lack a file" in str(lines)
    assert "below 0" not in str(lines) and "foreground" not in str(lines)


def test_keys_of_the_cache_are_those_of_before(tmp_path):
    scan(tmp_path / "a.nii.gz")
    keys = {
        VolumeStore.build([tmp_path / "a.nii.gz"], tmp_path / "cache", reading=reading)
        .entries[0]
        .key
        for reading in (Reading(), Reading(missing="zero"), Reading(missing="skip"))
    }
    assert len(keys) == 1


def test_what_headers_give_away_ends_a_run_before_it_caches_the_others(tmp_path, capsys):
    for n in range(3):
        scan(tmp_path / f"s{n}.nii.gz", n)
    (tmp_path / "page.nii.gz").write_text("<html>")
    (tmp_path / "short.nii").write_bytes(b"abc")
    config = DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="2 volumes do not fit"):
        open_data(config)
    out = capsys.readouterr().out
    assert "web page" in out and "short.nii" in out and "--data.on_error skip" in out
    assert not (tmp_path / "cache").exists()
    config.on_error = "skip"
    assert open_data(config)[0].ids == ["s0", "s1", "s2"]


# --------------------------------------------------------------------------------------------------
# The same lines everywhere.


def test_check_data_and_who_caches_say_the_same_lines_first(tmp_path, vae3d):
    for n in range(4):
        affine = np.diag([-1.0 if n == 3 else 1, 1, 4.0 if n == 2 else 1, 1])
        scan(tmp_path / "data" / f"s{n}.nii.gz", n, affine=affine)
    scan(tmp_path / "data" / "s0_seg.nii.gz", 9)
    options = ("--data.preprocess.orient_ras", "false")
    checked = vae3d("check-data", tmp_path / "data", *options)
    said = checked.stderr.splitlines()
    assert checked.returncode == 0 and said[-1] == "4 of 4 volumes are sound"
    lines = said[:-1]
    assert [line.split(":")[0] for line in lines] == [
        "left out", "persons", "split", "volumes", "spacing", "orientation",
        lines[6].split(":")[0],
    ]  # fmt: skip
    assert lines[6].startswith("more than 0.5 % of the foreground is lost to the clip in 2 of 4 ")
    assert lines[3] == (
        "volumes: 5 x 4 x 3 voxels of 1 x 1 x 1-4 mm; 1 channel; int16; 3 RAS, 1 LAS"
    )
    assert "1 mm (s0) to 4 mm (s2) along Z; --data.preprocess.spacing_mm" in lines[4]
    where = ("--data.root", tmp_path / "data", "--data.cache_dir", tmp_path / "cache", *options)
    for _ in range(2):  # whether or not the volumes lie in the cache
        assert vae3d("prepare", *where).stdout.splitlines()[: len(lines)] == lines


def test_check_data_tells_of_hot_voxels_and_of_the_clip_as_caching_does(tmp_path, vae3d):
    scans = tmp_path / "scans"
    scans.mkdir()
    for n in range(2):
        data = np.random.default_rng(n).normal(100, 5, (20, 20, 20))
        data[:4, :4, :4] = 200 + np.arange(64).reshape(4, 4, 4)
        data[9, 9, 9] = 1e6
        np.save(scans / f"{n}.npy", data)
    options = ("--data.preprocess.percentiles_of", "all")
    said = vae3d("check-data", scans, *options).stderr.splitlines()[:-1]
    clip, hot = (next(line for line in said if word in line) for word in ("clip in", "hot voxels"))
    assert "2 of 2 volumes" in clip and "0.npy 1 voxels" in hot and "1.npy 1 voxels" in hot
    where = ("--data.root", scans, "--data.cache_dir", tmp_path / "cache", *options)
    for _ in range(2):  # whether or not the volumes lie in the cache
        assert vae3d("prepare", *where).stdout.splitlines()[:-1] == said


def test_a_cache_tells_what_another_window_clips(tmp_path, vae3d):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(100, 5, (20, 20, 20)))
    where = ("--data.root", tmp_path / "a.npy", "--data.cache_dir", tmp_path / "cache")
    narrow = ("--data.preprocess.window_hu", "[-10, 90]")
    assert "a.npy 9" not in vae3d("prepare", *where).stdout
    assert "lost to the clip in 1 of 1 volumes" in vae3d("prepare", *where, *narrow).stdout


def test_a_channel_that_is_missing_has_no_small_foreground(tmp_path, vae3d):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    (tmp_path / "m.csv").write_text("path,id\na.nii.gz;b.nii.gz,1\na.nii.gz;c.nii.gz,2\n")
    said = vae3d("check-data", tmp_path / "m.csv", "--data.missing", "zero").stderr
    assert "2 of 2 volumes are sound" in said and "foreground is less than" not in said
    said = vae3d("check-data", tmp_path / "m.csv", "--data.missing", "skip").stderr
    assert said.endswith("1 of 2 volumes are sound\n")


def test_check_data_names_the_remedy_for_a_broken_volume_that_training_names(tmp_path, vae3d):
    np.save(tmp_path / "a.npy", np.arange(60.0).reshape(5, 4, 3))
    np.save(tmp_path / "b.npy", np.full((5, 4, 3), 7.0))
    checked = vae3d("check-data", tmp_path)
    trained = vae3d("prepare", "--data.root", tmp_path, "--data.cache_dir", tmp_path / "cache")
    assert (
        checked.returncode == trained.returncode == 2 and "--data.on_error skip" in checked.stdout
    )
    assert checked.stdout.strip() in trained.stderr


def test_a_file_that_a_manifest_names_twice_counts_as_two_channels(tmp_path, vae3d):
    for n in range(3):
        scan(tmp_path / f"{n}.nii.gz", n)
    rows = ["0.nii.gz;1.nii.gz,a", "1.nii.gz;2.nii.gz,b", "1.nii.gz;2.nii.gz;2.nii.gz,c"]
    (tmp_path / "m.csv").write_text("\n".join(["path,id", *rows]))
    done = vae3d("check-data", tmp_path / "m.csv")
    assert done.returncode == 2 and "c has 3 channels, 2 others have 2" in done.stdout


def test_evaluation_says_its_lines_once_and_a_rank_that_follows_says_nothing(tmp_path, capsys):
    scan(tmp_path / "a.nii.gz")
    narrow = Preprocess(window_hu=(-10, 1))
    lines: list[str] = []
    for say in (lines.append, silent):
        VolumeStore.build([tmp_path / "a.nii.gz"], tmp_path / "cache", narrow, say=say)
    assert sum("lost to the clip" in line for line in lines) == 1
    (tmp_path / "b.nii").write_bytes(b"")
    paths = [tmp_path / "a.nii.gz", tmp_path / "b.nii"]
    store = VolumeStore.build(paths, tmp_path / "cache", on_error="skip", say=silent)
    assert store.skipped[0][0] == "b" and capsys.readouterr().err == ""


def test_check_data_still_takes_its_options_by_their_old_names(tmp_path, vae3d):
    data = np.arange(60.0).reshape(5, 4, 3)
    np.save(tmp_path / "a.npy", np.where(data == 7, np.nan, data))
    np.save(tmp_path / "b.npy", np.stack([data, data + 1], 3))
    assert vae3d("check-data", tmp_path).returncode == 2
    old = ("--nan", "fill", "--volumes_4d=first", "--threads", 1)
    assert vae3d("check-data", tmp_path, *old).returncode == 0


def test_a_rank_that_follows_another_says_nothing(tmp_path, capsys):
    scan(tmp_path / "data" / "a.nii.gz")
    config = DataConfig(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    open_data(config, say=None)
    out, err = capsys.readouterr()
    assert out == err == ""


def test_lines_say_nothing_that_the_preprocessing_mends(tmp_path):
    for n in range(2):
        scan(tmp_path / f"s{n}.nii.gz", n, affine=np.diag([-1.0 if n else 1, 1, 3.0 * n + 1, 1]))
    preprocess = Preprocess(spacing_mm=(1, 1, 1))
    survey = survey_data(DataConfig(root=str(tmp_path), preprocess=preprocess))
    survey.ask_headers()
    assert [line.split(":")[0] for line in survey.lines] == ["persons", "split", "volumes"]


def test_check_data_for_programs_is_one_json_object(tmp_path, vae3d):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    done = vae3d("check-data", tmp_path, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["consistent"] and found["faults"] == []
    assert found["persons"] == 2 and found["lines"] == done.stderr.splitlines()[:-1]
    assert found["volumes"]["a"]["shape"] == [5, 4, 3] and found["volumes"]["a"]["dtype"] == "int16"
    (tmp_path / "c.nii").write_bytes(b"")
    done = vae3d("check-data", tmp_path, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 2 and not found["consistent"]
    assert (
        found["faults"][0]["path"].endswith("c.nii") and "0 bytes" in found["faults"][0]["reason"]
    )


def test_check_data_exits_as_training_would(tmp_path, vae3d):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    (tmp_path / "c.nii").write_bytes(b"")
    assert vae3d("check-data", tmp_path).returncode == 2
    done = vae3d("check-data", tmp_path, "--data.on_error", "skip")
    assert done.returncode == 0 and "not used: " in done.stderr and "0 bytes" in done.stderr
    (tmp_path / "c.nii").unlink()
    done = vae3d("check-data", tmp_path, "--in_channels", 2)
    assert done.returncode == 2 and "--model.in_channels 1" in done.stdout
    (tmp_path / "m.csv").write_text("path,split\na.nii.gz,val\nb.nii.gz,test\n")
    done = vae3d("check-data", tmp_path / "m.csv")
    assert (
        done.returncode == 2
        and "no volume is left to train on (1 in val, 1 in test)" in done.stdout
    )


# --------------------------------------------------------------------------------------------------
# Label maps.


def with_label(root: Path, label: Volume, name: str = "label.nii.gz") -> VolumeStore:
    """A volume of 12 x 10 x 8 voxels, 2 mm, somewhere in space, with a label map."""
    scan(root / "a.nii.gz", shape=(1, 12, 10, 8), affine=AFFINE)
    if name.endswith(".npy"):
        np.save(root / name, label.data[0])
    else:
        write_volume(root / name, label)
    (root / "m.csv").write_text(f"path,label\na.nii.gz,{name}\n")
    return VolumeStore.build(find_subjects(root / "m.csv"), root / "cache")


AFFINE = np.array([[2.0, 0, 0, -40], [0, 2, 0, 10], [0, 0, 2, 5], [0, 0, 0, 1]])
BOX = (slice(3, 5), slice(1, 4), slice(6, 7))  # of label 7, on the volume's grid


def boxed(shape=(12, 10, 8)) -> np.ndarray:
    data = np.zeros((1, *shape), np.uint8)
    data[(0, *BOX)] = 7
    return data


def voxels_of(box) -> list[list[int]]:
    return np.argwhere(boxed()[0]).tolist() if box is BOX else box


def test_a_label_map_stored_the_other_way_round_lies_where_its_affine_says(tmp_path):
    flipped = AFFINE.copy()
    flipped[0, 0], flipped[0, 3] = -2, -40 + 2 * 11
    for number, label in enumerate([
        Volume(boxed(), AFFINE),
        Volume(boxed()[:, ::-1], flipped),
        Volume(boxed().swapaxes(1, 3), AFFINE[:, [2, 1, 0, 3]]),
        Volume(boxed()[:, 2:7, :, 4:], AFFINE @ shifted(2, 0, 4)),  # a part of the volume
        Volume(boxed().repeat(2, 1).repeat(2, 2).repeat(2, 3),
               AFFINE @ shifted(-0.25, -0.25, -0.25) @ np.diag([0.5, 0.5, 0.5, 1])),
    ]):  # fmt: skip
        store = with_label(tmp_path / str(number), label)
        found = store.label_points(0)
        assert sorted(found[7].tolist()) == np.argwhere(boxed()[0] == 7).tolist(), number
        assert set(found) == {0, 7}


def shifted(*by: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = by
    return matrix


def test_a_label_map_with_a_shifted_origin_marks_the_shifted_place(tmp_path):
    store = with_label(tmp_path, Volume(boxed(), AFFINE @ shifted(0, 2, -1)))
    expected = (np.argwhere(boxed()[0]) + [0, 2, -1]).tolist()
    assert sorted(store.label_points(0)[7].tolist()) == expected


def test_a_format_without_a_place_is_taken_voxel_by_voxel(tmp_path):
    store = with_label(tmp_path / "a", Volume(boxed()), "label.npy")
    assert sorted(store.label_points(0)[7].tolist()) == np.argwhere(boxed()[0]).tolist()
    store = with_label(tmp_path / "b", Volume(boxed()[:, 1:]), "label.npy")
    with pytest.raises(BrokenVolume, match=r"label.npy: is .*not both say where"):
        store.label_points(0)
    np.save(tmp_path / "c.npy", np.random.default_rng(0).random((12, 10, 8)))
    write_volume(tmp_path / "map.nii.gz", Volume(boxed(), AFFINE))  # of a volume without a place
    labels = {"label_map": str(tmp_path / "map.nii.gz")}
    subject = Subject("c", (tmp_path / "c.npy",), None, labels)
    store = VolumeStore.build([subject], tmp_path / "cache")
    assert sorted(store.label_points(0)[7].tolist()) == np.argwhere(boxed()[0]).tolist()


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (Volume(boxed() * np.float32(0.37), AFFINE), "holds 2.59, no whole number"),
        (Volume(boxed(), AFFINE, 0.5), "holds 3.5, no whole number"),
        (Volume(boxed(), AFFINE @ shifted(100, 0, 0)), "lies beside its volume in space"),
    ],
)
def test_label_maps_that_are_none_are_refused(tmp_path, vae3d, label, words):
    with pytest.raises(BrokenVolume, match=words):
        with_label(tmp_path, label).label_points(0)
    told = vae3d("check-data", tmp_path / "m.csv")
    assert told.returncode == 0 and "not used: " in told.stderr and words in told.stderr
    used = vae3d("check-data", tmp_path / "m.csv", "--data.sampler", "LabelCorners")
    assert used.returncode == 2 and words in used.stdout


def test_a_sampler_by_labels_without_all_label_maps_is_refused_before_caching(tmp_path, capsys):
    for n in range(3):
        scan(tmp_path / f"s{n}.nii.gz", n)
    (tmp_path / "m.csv").write_text(
        "path,label\ns0.nii.gz,s1.nii.gz\ns1.nii.gz,x.nii\ns2.nii.gz,\n"
    )
    where = (str(tmp_path / "m.csv"), str(tmp_path / "cache"))
    config = DataConfig(*where, sampler=LabelCorners)
    with pytest.raises(ValueError, match="2 volumes do not fit"):
        open_data(config)
    out = capsys.readouterr().out
    assert "x.nii: no such file (column label_map of s1)" in out and "s2 has no label map" in out
    assert not (tmp_path / "cache").exists()


def test_whole_numbers_stored_as_floats_are_labels(tmp_path):
    store = with_label(tmp_path, Volume(boxed().astype(np.float32), AFFINE, 2.0))
    assert set(store.label_points(0)) == {0, 14}


# --------------------------------------------------------------------------------------------------
# Progress in a log.


def test_caching_says_how_far_it_is_in_a_log_also_while_one_volume_takes_long(
    tmp_path, monkeypatch, capsys
):
    from loaders import assemble, progress

    subjects = [Subject(f"s{n}", (scan(tmp_path / f"s{n}.nii.gz", n),)) for n in range(4)]
    real, release = assemble.read_subject, threading.Event()

    def slow(subject, reading):
        if subject.id == "s0":
            threading.Timer(0.4, release.set).start()  # from now: starting up may take as long
            release.wait(10)
        return real(subject, reading)

    monkeypatch.setattr(assemble, "read_subject", slow)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    VolumeStore.build(subjects, tmp_path / "cache", threads=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "caching" in line]
    assert lines[0].startswith("caching volumes: ") and 3 <= len(lines) <= 12
    assert any("3 of 4 after 0.0 min, 0 min left" in line for line in lines)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 30.0)
    begun = time.monotonic()
    VolumeStore.build(subjects, tmp_path / "other", threads=2)  # quick: not a word
    assert "caching volumes" not in capsys.readouterr().err and time.monotonic() - begun < 10


def test_foreground_is_drawn_where_a_file_is_also_when_another_rule_filled_the_cache(tmp_path):
    scan(tmp_path / "t2.nii.gz", seed=1)
    subject = Subject("s", (tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz"))
    zeros = Reading(missing="zero")
    for rules, of in ((1, "all"), (2, "auto")):
        preprocess = Preprocess(rules=rules, percentiles_of=of)
        store = VolumeStore.build([subject], tmp_path / "cache", preprocess, reading=zeros)
        points = store.foreground_points(0)
        assert len(points) and not store.read(0)[0].any()
        threshold = store.meta(0)["statistics"][1]["foreground_threshold"]
        assert (store.undo(0, store.read(0)).data[1][tuple(points.T)] > threshold - 1).all()
