"""vae3d demo-data, check-data, prepare and patches."""

import numpy as np
import pytest
from dicoms import write_series

from loaders import DataConfig, find_subjects, read_volume, split_subjects
from loaders.build import Builder
from loaders.demo import write_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("nilearn")
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, num_subjects=3, spacing_mm=8.0)
    return folder


def test_demo_volumes_are_the_same_bytes_each_time(demo, tmp_path, vae3d):
    done = vae3d("demo-data", tmp_path, "--num_subjects", 3, "--spacing_mm", 8)
    assert done.returncode == 0, done.stderr
    for path in sorted(demo.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    stamp = (tmp_path / "sub-01_T1w.nii.gz").stat().st_mtime_ns
    write_demo(tmp_path, 3, 8.0)
    assert (tmp_path / "sub-01_T1w.nii.gz").stat().st_mtime_ns == stamp  # kept
    write_demo(tmp_path, 3, 8.0, seed=1)
    other = read_volume(tmp_path / "sub-01_T1w.nii.gz").data
    assert not np.array_equal(other, read_volume(demo / "sub-01_T1w.nii.gz").data)


def test_demo_subjects_differ_and_look_like_a_brain(demo):
    volumes = [read_volume(subject.paths[0]) for subject in find_subjects(demo)]
    assert len(volumes) == 3 and volumes[0].data.shape == (1, 20, 24, 21)
    assert np.allclose(volumes[0].spacing_mm, 8)
    a, b = (volume.data[0].astype(float) for volume in volumes[:2])
    assert 0.6 < np.corrcoef(a.ravel(), b.ravel())[0, 1] < 0.99
    assert a[7:13, 8:16, 8:13].mean() > 5 * a[:, :1].mean()


def test_the_24_demo_subjects_fall_into_every_split():
    from loaders import Subject

    subjects = [Subject(f"sub-{n:02d}_T1w", ()) for n in range(1, 25)]
    sizes = {name: len(ids) for name, ids in split_subjects(subjects).items()}
    assert sizes["train"] >= 16 and min(sizes.values()) >= 2


def test_check_data_lists_every_bad_file_at_once(demo, tmp_path, vae3d):
    for path in sorted(demo.glob("*.nii.gz")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert vae3d("check-data", tmp_path).returncode == 0
    cut = tmp_path / "sub-02_T1w.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "page.nii").write_text("<html>")
    np.save(tmp_path / "flat.npy", np.zeros((4, 4, 4)))
    done = vae3d("check-data", tmp_path)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "2 of 5 volumes are sound" in done.stderr
    for name, reason in [("sub-02", "gzip"), ("page", "web page"), ("flat", "all voxels are 0")]:
        assert any(name in line and reason in line for line in lines)


def test_every_kind_of_broken_file_is_listed_and_none_stops_the_check(tmp_path, vae3d):
    import gzip
    import os

    from loaders import write_volume
    from loaders.readers import Volume

    data = np.random.default_rng(0).integers(0, 99, (9, 9, 9)).astype(np.int16)
    write_volume(tmp_path / "good.nii.gz", Volume(data[None]))
    good = (tmp_path / "good.nii.gz").read_bytes()
    raw = gzip.decompress(good)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    claims = bytearray(raw)
    claims[42:48] = np.array([9000, 9000, 900], "<i2").tobytes()
    singular = bytearray(raw)
    singular[280:328] = bytes(48)
    singular[252:254] = bytes(2)  # no quaternion either
    files = {
        "cut.nii.gz": (good[:-9], "truncated"),
        "flipped.nii.gz": (bytes(flipped), "damaged"),
        "lying.nii.gz": (gzip.compress(bytes(claims)), "claims"),
        "singular.nii": (bytes(singular), "singular"),
        "empty.nii": (b"", "0 bytes"),
        "page.nii.gz": (b"<html><body>404", "web page"),
        "pointer.nii.gz": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    arrays = {
        "nan": (np.where(data == 5, np.nan, data), "NaN or infinite"),
        "flat": (np.full((5, 5, 5), 3), "all voxels are 3"),
        "complex": (data.astype(np.complex64), "complex"),
        "objects": (np.array([{}], dtype=object), "object"),
        "four": (np.stack([data, data], 3), "is 4D"),
    }
    for name, (array, _) in arrays.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    words = {name: reason for name, (_, reason) in files.items()}
    words |= {f"{name}.npy": reason for name, (_, reason) in arrays.items()}
    words |= {"pipe.nii": "not a regular file", "gone.nii": "dangling", "loop.nii": "loop.nii"}
    done = vae3d("check-data", tmp_path)
    lines = {line.split(": ")[0].split(os.sep)[-1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 2 and set(lines) == set(words), set(lines) ^ set(words)
    assert f"1 of {len(words) + 1} volumes are sound" in done.stderr
    for name, reason in words.items():
        assert reason in lines[name], lines[name]


def test_check_data_reads_files_at_the_same_time(tmp_path, monkeypatch):
    """Two readers wait for each other: one after the other they would wait for ever."""
    import threading

    from loaders import assemble, survey_data

    for n in range(2):
        np.save(tmp_path / f"{n}.npy", np.arange(8.0).reshape(2, 2, 2))
    both, real = threading.Barrier(2, timeout=20), assemble.read_subject
    monkeypatch.setattr(assemble, "read_subject", lambda *a: (both.wait(), real(*a))[1])
    survey = survey_data(DataConfig(root=str(tmp_path)))
    assert survey.read_voxels(threads=2) == survey.faults == [] and len(survey.subjects) == 2


def test_a_broken_file_ends_a_command_in_one_line_or_is_skipped_and_counted(demo, tmp_path, vae3d):
    for path in sorted(demo.glob("*.nii.gz")):
        (tmp_path / "data" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "data" / "sub-02_T1w.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-100])
    options = ("--data.root", tmp_path / "data", "--data.cache_dir", tmp_path / "cache")
    done = vae3d("prepare", *options)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert str(cut) in done.stderr and "truncated gzip" in done.stderr
    done = vae3d("prepare", *options, "--data.on_error", "skip")
    assert done.returncode == 0 and "2 volumes" in done.stdout
    assert "1 of 3 volumes skipped" in done.stderr and str(cut) in done.stderr


def test_prepare_fills_the_cache_and_says_what_is_wrong(demo, tmp_path, vae3d):
    options, empty = ("--data.cache_dir", tmp_path / "cache"), tmp_path / "empty"
    empty.mkdir()
    done = vae3d("prepare", "--data.root", demo, *options)
    assert done.returncode == 0 and "3 volumes" in done.stdout, done.stderr
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 9
    done = vae3d("prepare", "--data.root", demo, *options, "--spatial_dims", 2)
    assert done.returncode == 0 and "3 volumes as 63 slices" in done.stdout, done.stderr
    for root, word in [(tmp_path / "nowhere", "no such folder"), (empty, "holds no volumes")]:
        done = vae3d("prepare", "--data.root", root, *options)
        assert done.returncode == 2 and word in done.stderr and str(root) in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_patches_writes_a_sheet_and_the_corners(demo, tmp_path, vae3d):
    from PIL import Image

    for size, picture in [("[8,10,6]", "a.png"), ("[8,8]", "b.png")]:
        done = vae3d(
            "patches", demo, "--n", 5, "--patch_size", size, "--out", tmp_path / picture,
            "--data.cache_dir", tmp_path / "cache",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        sheet = np.asarray(Image.open(tmp_path / picture))
        assert sheet.ndim == 3 and sheet.std() > 20
        lines = (tmp_path / picture).with_suffix(".csv").read_text().splitlines()
        assert len(lines) == 6 and lines[0].startswith("volume,x,y")


@pytest.mark.parametrize("out", ["", "hf://me/sheet", "sheet.txt", "sheet"])
def test_patches_writes_png_and_says_so_before_it_reads(out, tmp_path, vae3d, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vae3d("patches", "no-such-folder", "--out", out)
    assert done.returncode == 2 and "--out" in done.stderr and ".png" in done.stderr
    assert not list(tmp_path.iterdir())


def test_patches_draws_what_training_draws(demo, tmp_path, vae3d):
    from loaders import DataConfig, PatchLoader, open_data

    vae3d("patches", demo, "--n", 4, "--patch_size", "[8,8,8]", "--out", tmp_path / "a.png",
          "--data.cache_dir", tmp_path / "cache")  # fmt: skip
    store, _ = open_data(DataConfig(root=str(demo), cache_dir=str(tmp_path / "cache")))
    batch = next(iter(PatchLoader(store, (8, 8, 8), batch_size=4, threads=0)))
    expected = [
        ",".join([store.ids[v], *map(str, corner)])
        for v, corner in zip(batch.volume.tolist(), batch.corner.tolist(), strict=True)
    ]
    assert (tmp_path / "a.csv").read_text().splitlines()[1:] == expected


def test_several_dicom_series_in_a_folder_are_told_and_options_take_them(tmp_path, vae3d):
    folder = write_series(tmp_path / "data" / "p1", 5, SeriesDescription="T1")
    write_series(folder, 3, series="1.2.9", SeriesDescription="T2")
    run = vae3d("check-data", tmp_path / "data")
    assert run.returncode == 2 and "set data.dicom.series to largest or all" in run.stdout
    run = vae3d("check-data", tmp_path / "data", "--data.dicom.series", "all")
    assert run.returncode == 0 and "2 of 2 volumes are sound" in run.stderr
    prepare = ("prepare", "--data.root", tmp_path / "data", "--data.cache_dir", tmp_path / "c")
    run = vae3d(*prepare, "--data.dicom", '{"series": "largest", "tolerance_mm": 0.2}')
    assert run.returncode == 0 and "\n1 volumes in" in run.stdout, run.stderr
    run = vae3d(*prepare, "--data.dicom.gaps", "fill")
    assert run.returncode == 2 and "gaps" in run.stderr


def test_a_signal_while_caching_keeps_the_finished_volumes_and_the_next_run_makes_the_rest(
    tmp_path, vae3d, signal_at, monkeypatch
):
    root, cache = tmp_path / "volumes", tmp_path / "cache"
    root.mkdir()
    for n in range(5):
        image = np.random.default_rng(n).integers(0, 99, (8, 8, 8))
        np.save(root / f"v{n}.npy", image.astype(np.int16))
    argv = ["prepare", "--data.root", root, "--data.cache_dir", cache, "--data.threads", "1"]
    signal_at(Builder, "build_one", 3)
    done = vae3d(*argv)
    assert done.returncode == 143
    assert done.stderr == "stopped by SIGTERM: what was finished is kept\n"
    finished = len([path for path in cache.glob("*.json") if path.name != "sources.json"])
    assert 2 <= finished < 5 and not list(cache.glob("*.partial.*"))
    monkeypatch.undo()
    made = []
    real = Builder.build_one
    monkeypatch.setattr(
        Builder, "build_one", lambda self, *given: (made.append(given[0].id), real(self, *given))[1]
    )
    assert vae3d(*argv).returncode == 0
    assert len(made) == 5 - finished
