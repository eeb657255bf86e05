"""vae3d demo-data, check-data, prepare and patches."""

from types import SimpleNamespace

import numpy as np
import pytest

from loaders import find_subjects, read_volume, split_subjects
from loaders.demo import write_demo


@pytest.fixture
def vae3d(capfd):
    """Run a command in this process; return its exit code and what it wrote."""

    def run(*args) -> SimpleNamespace:
        from vae3d.cli import main

        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=caught.value.code, stdout=out, stderr=err)

    return run


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


def test_prepare_fills_the_cache_and_says_what_is_wrong(demo, tmp_path, vae3d):
    options, empty = ("--data.cache_dir", tmp_path / "cache"), tmp_path / "empty"
    empty.mkdir()
    done = vae3d("prepare", "--data.root", demo, *options)
    assert done.returncode == 0 and "3 volumes" in done.stdout, done.stderr
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 9
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
