"""The store: whole or absent, built once, read exactly, undone exactly."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import loaders.assemble
import loaders.cached
from loaders import DataConfig, PatchLoader, Preprocess, VolumeStore, open_data, read_volume
from loaders.find import find_subjects
from loaders.readers import BrokenVolume, Reading, Volume, write_volume

PSR = np.array([[0, 0, 2.0, -90], [-2, 0, 0, 100], [0, 2, 0, -60], [0, 0, 0, 1]])


def scan(path: Path, seed=0, shape=(12, 14, 10), dtype=np.int16, scale=1.0, offset=0.0) -> Path:
    rng = np.random.default_rng(seed)
    data = (rng.gamma(2, 20, (1, *shape)) + 3).clip(0, 250).astype(dtype)
    write_volume(path, Volume(data, PSR, scale, offset))
    return path


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    return [scan(tmp_path / "data" / f"s{n}.nii.gz", n, (12 + n, 14, 10)) for n in range(4)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_reading_normalizes_to_the_percentiles_of_the_whole_source(paths, tmp_path):
    store = VolumeStore.build(paths, tmp_path / "cache", Preprocess(percentiles_of="all"))
    for index, path in enumerate(paths):
        source = read_volume(path).intensities()
        low, high = np.percentile(source, (0, 99.5))
        expected = np.clip((source - low) / (high - low), 0, 1)
        x = store.read(index)
        assert x.dtype == np.float32 and x.shape == store.shape(index)
        # PSR -> RAS: source axes are (-Y, Z, X).
        turned = np.flip(expected, 1).transpose(0, 3, 1, 2)
        assert np.allclose(x, turned, atol=1e-6)
        part = (slice(2, 9), slice(0, 5), slice(3, 4))
        assert np.array_equal(store.read(index, part), x[(slice(None), *part)])
    assert store.data_range == (0.0, 1.0) and store.ids == ["s0", "s1", "s2", "s3"]
    assert np.allclose(store.spacing_mm(0), 2)


@pytest.mark.parametrize("dtype", [kind + n for kind in "iuf" for n in "1248" if kind + n != "f1"])
@pytest.mark.parametrize("order", "<>")
def test_every_dtype_and_byte_order_reads_the_same(tmp_path, dtype, order):
    data = np.random.default_rng(0).integers(0, 100, (6, 7, 8)).astype(order + dtype)
    np.save(tmp_path / "a.npy", data)
    store = VolumeStore.build(
        [tmp_path / "a.npy"], tmp_path / "cache", Preprocess(percentiles=(0, 100))
    )
    assert np.allclose(store.read(0)[0], data.astype(float) / 99, atol=1e-6)
    kept = store.entries[0].voxels.dtype
    assert kept.isnative and kept.itemsize <= 4
    if dtype in ("u1", "i1", "i2", "u2"):
        assert kept == np.dtype(dtype)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(percentiles=(0, 100)),
        Preprocess(window_hu=(-500, 900), intensity="symmetric"),
        Preprocess(percentiles=(0, 100), intensity="zscore"),
        Preprocess(intensity="raw"),
        Preprocess(percentiles=(0, 100), crop_foreground=True, pad_to_multiple=8),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.5, -1.5])
def test_undo_gives_back_grid_affine_and_intensities(tmp_path, preprocess, scale):
    path = scan(tmp_path / "a.nii.gz", scale=scale, offset=-20.0)
    store = VolumeStore.build([path], tmp_path / "cache", preprocess)
    source, volume = read_volume(path), store.undo(0, store.read(0))
    assert volume.data.dtype == np.float32 and volume.data.shape == source.data.shape
    assert np.allclose(volume.affine, source.affine)
    threshold = store.meta(0)["statistics"][0]["foreground_threshold"]
    inside = source.intensities() > threshold
    assert np.allclose(volume.data[inside], source.intensities()[inside], atol=1e-2)
    if not preprocess.crop_foreground:
        assert np.allclose(volume.data, source.intensities(), atol=1e-2)


@pytest.mark.parametrize("as_what", [str, Path])
def test_a_folder_a_glob_and_a_manifest_are_built_as_the_paths_in_them(paths, tmp_path, as_what):
    cache, folder = tmp_path / "cache", tmp_path / "data"
    wanted = VolumeStore.build(paths, cache)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in paths))
    for volumes in (folder, folder / "*.nii.gz", tmp_path / "list.csv"):
        store = VolumeStore.build(as_what(volumes), cache)
        assert store.ids == wanted.ids
        assert np.array_equal(store.read(2), wanted.read(2))
    assert VolumeStore.build(as_what(paths[1]), cache).ids == ["s1"]
    with pytest.raises(ValueError, match=r"nowhere: no such folder, glob or manifest"):
        VolumeStore.build(as_what(tmp_path / "nowhere"), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_with_a_gradient_goes_back_to_intensities_and_a_file(paths, tmp_path, dtype):
    store = VolumeStore.build(paths[:1], tmp_path / "cache", Preprocess(percentiles=(0, 100)))
    recon = torch.from_numpy(store.read(0)).to(dtype).requires_grad_()
    write_volume(tmp_path / "recon.nii.gz", store.undo(0, recon))
    source, back = read_volume(paths[0]), read_volume(tmp_path / "recon.nii.gz")
    assert np.allclose(back.affine, source.affine)
    off = np.abs(back.intensities() - source.intensities()).max()
    assert off < (1e-3 if dtype == torch.float32 else 1.0)


def test_raw_intensities_are_those_of_the_file(tmp_path):
    paths = [scan(tmp_path / "a.nii.gz", 0), scan(tmp_path / "b.nii.gz", 1, scale=2.0, offset=5.0)]
    store = VolumeStore.build(paths, tmp_path / "cache", Preprocess(intensity="raw"))
    sources = [read_volume(path).intensities() for path in paths]
    for index, source in enumerate(sources):
        assert np.array_equal(np.sort(store.read(index).ravel()), np.sort(source.ravel()))
    assert store.data_range == (min(s.min() for s in sources), max(s.max() for s in sources))


def test_a_volume_is_read_without_its_clip_too(tmp_path):
    path = scan(tmp_path / "a.nii.gz", scale=2.0, offset=-20.0)
    store = VolumeStore.build([path], tmp_path / "cache", Preprocess(window_hu=(0, 100)))
    x, free = store.read(0), store.read_unclipped(0)
    assert free.min() < 0 and free.max() > 1
    assert np.array_equal(x, free.clip(0, 1))
    assert np.allclose(store.undo(0, free).data, read_volume(path).intensities(), atol=1e-3)


def test_undo_refuses_another_shape(paths, tmp_path):
    store = VolumeStore.build(paths, tmp_path / "cache")
    with pytest.raises(ValueError, match="store grid"):
        store.undo(0, np.zeros((1, 3, 3, 3), np.float32))


def test_changing_the_intensity_mapping_rebuilds_nothing(paths, tmp_path, monkeypatch):
    VolumeStore.build(paths, tmp_path / "cache")
    before = files(tmp_path / "cache")
    monkeypatch.setattr(loaders.assemble, "read_volume", None)
    for preprocess in [
        Preprocess(window_hu=(0, 100)),
        Preprocess(percentiles=(0.5, 99.97), intensity="symmetric"),
        Preprocess(percentiles_of="foreground"),
        Preprocess.from_dict({"intensity": "zscore"}),  # by the first rules
        Preprocess(intensity="zscore"),
    ]:
        store = VolumeStore.build(paths, tmp_path / "cache", preprocess)
    assert files(tmp_path / "cache") == before
    low, high = store.data_range
    assert low < 0 < high
    source = read_volume(paths[0]).intensities()
    inside = source[source > store.meta(0)["statistics"][0]["foreground_threshold"]]
    for of, voxels in {"all": source, "foreground": inside, "auto": inside}.items():
        preprocess = Preprocess(percentiles=(0, 99.97), percentiles_of=of)
        store = VolumeStore.build(paths, tmp_path / "cache", preprocess)
        top = store.undo(0, store.read(0)).data.max()
        assert top == pytest.approx(np.percentile(voxels, 99.97), rel=1e-5)


def test_changing_geometry_or_policy_builds_anew(paths, tmp_path):
    VolumeStore.build(paths, tmp_path / "cache")
    count = len(files(tmp_path / "cache"))
    VolumeStore.build(paths, tmp_path / "cache", Preprocess(pad_to_multiple=4))
    assert len(files(tmp_path / "cache")) > count


def test_changed_source_is_noticed_and_moved_source_is_reused(paths, tmp_path):
    cache = tmp_path / "cache"
    old = VolumeStore.build(paths, cache)
    scan(paths[1], seed=99, shape=(13, 14, 10))
    new = VolumeStore.build(paths, cache)
    assert new.entries[0].key == old.entries[0].key and new.entries[1].key != old.entries[1].key
    count = len(files(cache))
    copied = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    VolumeStore.build(sorted(copied.iterdir()), cache)
    assert len(files(cache)) == count


def test_a_torn_volume_is_built_again(paths, tmp_path):
    store = VolumeStore.build(paths, tmp_path / "cache")
    x, key = store.read(0), store.entries[0].key
    os.truncate(tmp_path / "cache" / f"{key}.npy", 100)
    (tmp_path / "cache" / f"{store.entries[1].key}.json").write_text('{"half')
    (tmp_path / "cache" / "sources.json").write_text("")
    again = VolumeStore.build(paths, tmp_path / "cache")
    assert np.array_equal(again.read(0), x)


def test_read_only_cache_works_and_an_incomplete_one_says_so(paths, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    VolumeStore.build(paths[:3], cache)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(loaders.cached, "open", refuse, raising=False)  # root may write anywhere
    assert len(VolumeStore.build(paths[:3], cache)) == 3
    with pytest.raises(ValueError, match="vae3d prepare"):
        VolumeStore.build(paths, cache)


def test_full_disk_is_one_line_and_leaves_nothing_torn(paths, tmp_path):
    """Files may not grow beyond 2 KB: the same path as a full disk, without filling one."""
    code = f"""
import resource, signal, errno, builtins, loaders.cached as cached
from loaders import VolumeStore
real = open
class Full:
    def __init__(self, file): self.file, self.room = file, 2000
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()
    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0: raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)
cached.open = lambda path, mode="r": Full(real(path, mode)) if mode == "wb" else real(path, mode)
try:
    VolumeStore.build({[str(p) for p in paths]!r}, {str(tmp_path / "cache")!r})
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "disk full" in out.stdout and "data.cache_dir" in out.stdout
    assert len(out.stdout.strip().splitlines()) == 1
    left = files(tmp_path / "cache")
    assert not [
        name
        for name in left
        if (".partial." in name or name.endswith(".json")) and "sources" not in name
    ]
    assert len(VolumeStore.build(paths, tmp_path / "cache")) == 4


def test_broken_file_raises_or_is_skipped_and_listed(paths, tmp_path, capsys):
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    with pytest.raises(BrokenVolume, match=r"s1.*--data\.on_error skip leaves"):
        VolumeStore.build(paths, tmp_path / "cache")
    with pytest.raises(BrokenVolume) as error:  # nothing would be left
        VolumeStore.build(paths[1:2], tmp_path / "cache")
    assert "on_error" not in str(error.value)
    store = VolumeStore.build(paths, tmp_path / "cache", on_error="skip")
    assert store.ids == ["s0", "s2", "s3"] and "1 of 4 volumes skipped" in capsys.readouterr().err
    store.write_skipped(tmp_path)
    header, row = (tmp_path / "skipped.csv").read_text().splitlines()
    assert header == "id,path,reason" and row.startswith("s1,") and "gzip" in row
    assert store.subset(["s1", "s2"]).ids == ["s2"]
    with pytest.raises(ValueError, match="'nobody'"):
        store.subset(["nobody"])
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 4"):
        VolumeStore.build(paths, tmp_path / "other", on_error="skip")


@pytest.mark.parametrize(("spatial_dims", "takes", "option"), [(3, 2, 1), (2, 1, 3)])
def test_channels_that_the_model_does_not_take_are_refused_before_caching(
    paths, tmp_path, spatial_dims, takes, option
):
    def config(cache):
        return DataConfig(str(paths[0].parent), str(tmp_path / cache), num_slices=3)

    with pytest.raises(ValueError, match=f"--model.in_channels {option}$"):
        open_data(config("new"), spatial_dims, in_channels=takes)
    assert not list((tmp_path / "new").glob("*.npy"))
    open_data(config("old"), spatial_dims, in_channels=option)
    with pytest.raises(ValueError, match=f"gives {option} channels, the model takes {takes}"):
        open_data(config("old"), spatial_dims, in_channels=takes)


@pytest.mark.parametrize("terminal", [True, False])
def test_building_shows_a_bar_on_a_terminal_only(paths, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert len(VolumeStore.build(paths, tmp_path / "cache")) == 4
    assert ("caching volumes" in capsys.readouterr().err) == terminal


def test_constant_and_nan_volumes_follow_the_policy(tmp_path):
    np.save(tmp_path / "flat.npy", np.full((5, 5, 5), 7, np.int16))
    with pytest.raises(BrokenVolume, match="all voxels are 7"):
        VolumeStore.build([tmp_path / "flat.npy"], tmp_path / "cache")
    data = np.random.default_rng(0).random((6, 6, 6)) + 1
    data[0, 0, 0], data[1, 1, 1] = np.nan, np.inf
    np.save(tmp_path / "nan.npy", data)
    with pytest.raises(BrokenVolume, match="2 voxels are NaN or infinite"):
        VolumeStore.build([tmp_path / "nan.npy"], tmp_path / "cache")
    store = VolumeStore.build(
        [tmp_path / "nan.npy"], tmp_path / "cache", reading=Reading(nan="fill")
    )
    x = store.read(0)
    assert np.isfinite(x).all() and x[0, 0, 0, 0] == 0 and x[0, 1, 1, 1] == 0
    np.save(tmp_path / "all.npy", np.full((5, 5, 5), np.nan))
    with pytest.raises(BrokenVolume, match="all voxels are NaN"):
        VolumeStore.build([tmp_path / "all.npy"], tmp_path / "cache", reading=Reading(nan="fill"))
    np.save(tmp_path / "huge.npy", np.full((5, 5, 5), 1e300))
    with pytest.raises(BrokenVolume, match="all voxels are beyond the range"):
        VolumeStore.build([tmp_path / "huge.npy"], tmp_path / "cache", reading=Reading(nan="fill"))


def test_data_of_another_intensity_contract_is_told(paths, tmp_path, capsys):
    with pytest.raises(BrokenVolume, match="Hounsfield"):
        VolumeStore.build(paths, tmp_path / "cache", Preprocess(window_hu=(1000, 2000)))
    VolumeStore.build(paths, tmp_path / "cache", Preprocess(window_hu=(0, 400)))
    assert capsys.readouterr().err == ""
    VolumeStore.build(paths, tmp_path / "cache", Preprocess(window_hu=(-1000, 400)))
    (line,) = capsys.readouterr().err.splitlines()
    assert str(paths[0]) in line and "Hounsfield" in line and "4 of 4 volumes" in line
    ct = scan(tmp_path / "ct.nii.gz", offset=-1024.0)
    VolumeStore.build([ct], tmp_path / "cache", Preprocess(window_hu=(-1000, 400)))
    assert capsys.readouterr().err == ""


def test_files_of_a_subject_become_channels_with_their_own_scale(tmp_path):
    from loaders import Subject

    t1 = scan(tmp_path / "t1.nii.gz", 0)
    t2 = scan(tmp_path / "t2.nii.gz", 1, scale=3.0)
    store = VolumeStore.build([Subject("p", (t1, t2))], tmp_path / "cache")
    assert store.shape(0)[0] == 2 and store.num_channels == 2
    assert store.read(0).max(axis=(1, 2, 3)).tolist() == [1, 1]
    other = scan(tmp_path / "other.nii.gz", 2, (9, 9, 9))
    with pytest.raises(BrokenVolume, match="does not share the grid"):
        VolumeStore.build([Subject("p", (t1, other))], tmp_path / "cache")
    micro = [tmp_path / f"{n}.npz" for n in range(3)]  # of 0.1 micrometers
    for path, edge in zip(micro, (1e-4, 1e-4, 5e-4), strict=True):
        np.savez(path, data=np.arange(60.0).reshape(3, 4, 5), spacing_mm=[edge] * 3)
    VolumeStore.build([Subject("p", tuple(micro[:2]))], tmp_path / "cache")
    with pytest.raises(BrokenVolume, match=r"2\.npz: does not share the grid"):
        VolumeStore.build([Subject("p", tuple(micro[1:]))], tmp_path / "cache")
    with pytest.raises(ValueError, match="channels"):
        VolumeStore.build([Subject("p", (t1, t2)), Subject("q", (t1,))], tmp_path / "cache")


def head() -> np.ndarray:
    """A noisy ball of a tenth of the volume, on a noisy ground."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 24, 18)), indexing="ij"))
    noise = np.random.default_rng(0).normal(20, 5, (20, 24, 18)) + 800 * (
        np.linalg.norm(grid, axis=0) < 0.6
    )
    return noise.clip(0, None).astype(np.float32)


def test_each_channel_has_its_own_window_background_and_range(tmp_path):
    from loaders import Subject

    np.save(tmp_path / "ct.npy", head() - 1000)
    np.save(tmp_path / "pet.npy", head() / 100)
    subject = Subject("p", (tmp_path / "ct.npy", tmp_path / "pet.npy"))
    preprocess = Preprocess(
        channels=("ct", "pet"),
        window_hu={"ct": (-1000, 400), "pet": (0, 20)},
        intensity={"pet": "symmetric"},
        crop_foreground=True,
    )
    store = VolumeStore.build([subject], tmp_path / "cache", preprocess)
    assert store.channel_names == ["ct", "pet"]
    assert store.channel_ranges == [(0, 1), (-1, 1)] and store.data_range == (-1, 1)
    low, high = store.meta(0)["undo"]["crop"]
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    assert np.allclose(store.read(0)[0], head()[inside] / 1400, atol=1e-5)
    assert np.allclose(store.read(0)[1], head()[inside] / 1000 - 1, atol=1e-5)
    back = store.undo(0, store.read(0)).data
    assert np.allclose(back[0][inside], (head() - 1000)[inside], atol=1e-2)
    assert back[:, 0, 0, 0] == pytest.approx([head().min() - 1000, head().min() / 100])
    zscore = Preprocess(intensity={"1": "zscore"})
    ranges = VolumeStore.build([subject], tmp_path / "cache", zscore).channel_ranges
    assert ranges[0] == (0, 1) and ranges[1][0] < -10 and ranges[1][1] > 2
    with pytest.raises(ValueError, match=r"ct\.npy: has 2 channels, .* 3 names"):
        VolumeStore.build([subject], tmp_path / "cache", Preprocess(channels=("a", "b", "c")))


def test_a_record_of_old_opens_an_old_cache_and_reads_the_numbers_of_its_time(
    tmp_path, monkeypatch
):
    """The numbers, and the key, are those of commit 2c89f8d."""
    hot = head()
    hot[1, 2, 3] = 8e5
    path = tmp_path / "h.npy"
    np.save(path, hot)
    old = Preprocess.from_dict({"crop_foreground": True, "intensity": "zscore"})
    store = VolumeStore.build([path], tmp_path / "cache", old)
    (entry,) = store.entries
    assert entry.key == "f3b1d68e8b153de0c86f37a7" and entry.shape == (1, 15, 17, 11)
    assert entry.gain[0] == pytest.approx(0.00120848, rel=1e-5)
    assert entry.bias[0] == pytest.approx(-966.7875)
    points = store.foreground_points(0)
    sidecar = tmp_path / "cache" / f"{entry.key}.json"
    meta = json.loads(sidecar.read_text())
    for stats in meta["statistics"]:
        del stats["robust"]  # as that commit wrote it
    sidecar.write_text(json.dumps(meta))
    with monkeypatch.context() as patched:
        patched.setattr(loaders.assemble, "read_volume", None)
        again = VolumeStore.build([path], tmp_path / "cache", old)
        assert np.array_equal(again.read(0), store.read(0))
        assert np.array_equal(again.foreground_points(0), points)
    # What is new is measured, once, and then serves both.
    today = VolumeStore.build([path], tmp_path / "cache", Preprocess(crop_foreground=True))
    assert today.shape(0) == (1, 12, 14, 10) and today.entries[0].key != entry.key


def test_an_old_cache_is_measured_anew_for_rules_of_today(tmp_path, monkeypatch):
    np.save(tmp_path / "h.npy", head())
    store = VolumeStore.build([tmp_path / "h.npy"], tmp_path / "cache")
    sidecar = tmp_path / "cache" / f"{store.entries[0].key}.json"
    meta = json.loads(sidecar.read_text())
    for stats in meta["statistics"]:
        del stats["robust"]
    sidecar.write_text(json.dumps(meta))
    again = VolumeStore.build([tmp_path / "h.npy"], tmp_path / "cache")
    assert again.entries[0].key == store.entries[0].key
    assert np.array_equal(again.read(0), store.read(0))
    monkeypatch.setattr(loaders.assemble, "read_volume", None)
    old = VolumeStore.build([tmp_path / "h.npy"], tmp_path / "cache", Preprocess.from_dict({}))
    for store in (again, old):  # points of the rules that the cache was not filled by are drawn
        points = store.foreground_points(0)
        assert len(points) == 1024
        values = head()[tuple(points.T)]
        assert (values > store.meta(0)["statistics"][0]["foreground_threshold"]).all()


def test_a_sparse_signal_is_not_clipped_away_unless_percentiles_are_of_all_voxels(tmp_path):
    """As in a stack of a few stained cells: 0.3 % of the voxels are the signal."""
    rng = np.random.default_rng(0)
    data = rng.normal(100, 10, (40, 40, 40))
    signal = rng.random(data.shape) < 0.003
    data[signal] = rng.uniform(1000, 4000, signal.sum())
    np.save(tmp_path / "a.npy", data.astype(np.uint16))
    whole = {}
    for of in ("all", "foreground", "auto"):
        store = VolumeStore.build(
            [tmp_path / "a.npy"], tmp_path / "cache", Preprocess(percentiles_of=of)
        )
        whole[of] = float((store.read(0)[0][signal] == 1).mean())
        assert len(store.foreground_points(0)) > 100
        assert signal[tuple(store.foreground_points(0).T)].all()
    assert whole["all"] == 1 and whole["foreground"] == whole["auto"] < 0.02


def test_caching_tells_what_the_clip_takes_small_foregrounds_and_hot_voxels(tmp_path, capsys):
    sparse = np.random.default_rng(0).normal(100, 5, (40, 40, 40)).astype(np.float32)
    sparse[5:8, 5:8, 5] = 5000  # 9 of 64000 voxels
    sparse[20:24, 20:24, 20] = 3000  # and 16
    hot = head()
    hot[1, 2, 3] = 8e5
    for name, data in {"head": head(), "sparse": sparse, "hot": hot}.items():
        np.save(tmp_path / f"{name}.npy", data)
    paths = sorted(tmp_path.glob("*.npy"))
    VolumeStore.build(paths, tmp_path / "cache")
    small, warm = capsys.readouterr().err.splitlines()
    assert "less than 0.1 % of 1 of 3 volumes" in small and "sparse.npy 0.0391 %" in small
    assert "hot voxels" in warm and "1 of 3 volumes" in warm and "hot.npy 1 voxels" in warm
    VolumeStore.build(paths, tmp_path / "other", Preprocess(percentiles_of="all"))
    told = capsys.readouterr().err
    clip = told.splitlines()[0]
    assert "more than 0.5 % of the foreground is lost to the clip in 3 of 3 volumes" in clip
    assert "sparse.npy 100 %" in clip and "percentiles_of" in clip
    VolumeStore.build(paths, tmp_path / "other", Preprocess(percentiles_of="all"))
    assert capsys.readouterr().err == told  # a cache tells it again


def build_in_process(paths, cache, queue):
    store = VolumeStore.build(paths, cache, progress=False)
    queue.put([float(store.read(i).sum()) for i in range(len(store))])


def test_processes_that_build_at_once_share_one_cache(paths, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=build_in_process, args=(paths, tmp_path / "cache", queue))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums[0] == sums[1] == sums[2]
    assert len([name for name in files(tmp_path / "cache") if name.endswith(".json")]) == 5
    assert not [name for name in files(tmp_path / "cache") if ".partial." in name]


def test_a_killed_build_blocks_nobody_and_is_taken_up(paths, tmp_path):
    cache = tmp_path / "cache"
    code = (
        "import time, loaders.build as build; from loaders import VolumeStore\n"
        "real = build.write_whole\n"
        "def slow(path, *rest):\n"
        "    real(path, *rest)\n"
        "    if path.suffix == '.json': print('one', flush=True); time.sleep(60)\n"
        "build.write_whole = slow\n"
        f"VolumeStore.build({[str(p) for p in paths]!r}, {str(cache)!r}, threads=1)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert victim.stdout.readline() == b"one\n"
    (cache / ".12.partial.torn.npy").write_bytes(b"half")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    start = time.monotonic()
    assert len(VolumeStore.build(paths, cache)) == 4 and time.monotonic() - start < 50
    assert not [name for name in files(cache) if ".partial." in name]


def test_many_volumes_need_few_file_descriptors_and_little_memory(tmp_path):
    """10,000 entries over a few real files: the store must not hold a descriptor for each."""
    import dataclasses

    path = scan(tmp_path / "a.nii.gz")
    store = VolumeStore.build([path], tmp_path / "cache")
    (entry,) = store.entries
    entries = [
        dataclasses.replace(entry, subject=dataclasses.replace(entry.subject, id=f"s{n}"))
        for n in range(10_000)
    ]
    many = VolumeStore(entries, store.cache_dir, store.preprocess)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(0, 10_000, 37):
        many.read(index, (slice(0, 2),) * 3)
    assert len(os.listdir("/proc/self/fd")) - before <= loaders.store.OPEN_VOLUMES


def test_store_beyond_four_gigabytes_reads_its_far_end(tmp_path):
    """A sparse file: the sidecar of a small volume, told that the array is huge."""
    import dataclasses

    path = scan(tmp_path / "a.nii.gz")
    store = VolumeStore.build([path], tmp_path / "cache", Preprocess(window_hu=(0, 100)))
    (entry,) = store.entries
    shape = (1, 1100, 2048, 1024)
    entry = dataclasses.replace(entry, voxels=dataclasses.replace(entry.voxels, shape=shape))
    with open(tmp_path / "cache" / f"{entry.key}.npy", "r+b") as file:
        file.truncate(entry.voxels.start + 2 * int(np.prod(shape)))
        file.seek(entry.voxels.start + 2 * (int(np.prod(shape)) - 1))
        file.write(np.int16(50).tobytes())
    big = VolumeStore([entry], store.cache_dir, store.preprocess)
    end = tuple(slice(n - 2, n) for n in shape[1:])
    x = big.read(0, end)
    assert x[0, 1, 1, 1] == 0.5 and x.sum() == 0.5


def test_store_survives_pickling_for_worker_processes(paths, tmp_path):
    import pickle

    store = VolumeStore.build(paths, tmp_path / "cache")
    store.read(0)
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read(2), store.read(2))


def test_open_data_finds_splits_and_builds(paths, tmp_path):
    config = DataConfig(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    store, split = open_data(config)
    assert sorted(id for part in split.values() for id in part) == store.ids
    assert all(split.values())
    given = {"train": ["s0"], "val": ["s1"], "test": ["s2"]}
    assert open_data(config, split=given)[1] == given
    with pytest.raises(ValueError, match=r"data\.root"):
        open_data(DataConfig())
    meta = store.meta(0)
    assert json.loads(json.dumps(meta)) == meta and meta["id"] == "s0"


def test_importing_the_configuration_is_quick_and_light():
    code = (
        "import sys; from loaders import DataConfig; DataConfig()\n"
        "heavy = {'torch', 'torchio', 'nibabel', 'SimpleITK', 'scipy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_heads_are_normalized_by_their_own_slope(real_volumes, tmp_path):
    path = real_volumes / "ixi_t1_2mm" / "IXI013-HH-1212_T1.nii.gz"
    store = VolumeStore.build([path], tmp_path / "cache", Preprocess(percentiles_of="all"))
    source = read_volume(path)
    assert store.entries[0].voxels.dtype == np.uint8 and store.shape(0) == (1, 90, 120, 120)
    top = np.percentile(source.intensities(), 99.5)
    volume = store.undo(0, store.read(0))
    assert np.allclose(volume.affine, source.affine)
    assert np.abs(volume.data - np.minimum(source.intensities(), top)).max() < 0.01


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_compressed_backend_reads_the_same_in_every_thread(tmp_path, dtype):
    from concurrent.futures import ThreadPoolExecutor

    pytest.importorskip("blosc2")
    paths = [scan(tmp_path / f"s{n}.nii.gz", n, (70, 30, 20), dtype) for n in range(2)]
    plain = VolumeStore.build(paths, tmp_path / "cache")
    packed = VolumeStore.build(paths, tmp_path / "cache", backend="blosc2")
    sizes = [
        os.path.getsize(tmp_path / "cache" / s.entries[0].voxels.file) for s in (plain, packed)
    ]
    assert packed.entries[0].voxels.file.endswith(".b2nd")
    assert dtype != np.int16 or sizes[1] < 0.8 * sizes[0]  # noise of 8 bits does not shrink
    part = (slice(3, 19), slice(60, 65), slice(1, 30))
    part = tuple(
        slice(s.start, min(s.stop, n)) for s, n in zip(part, plain.shape(0)[1:], strict=True)
    )
    with ThreadPoolExecutor(4) as pool:
        for index in (0, 1):
            expected = plain.read(index, part)
            for found in pool.map(lambda i: packed.read(i, part), [index] * 20):
                assert np.array_equal(found, expected)
    assert np.array_equal(packed.read(1), plain.read(1))
    again = VolumeStore.build(paths, tmp_path / "cache", backend="blosc2")
    assert [entry.key for entry in again.entries] == [entry.key for entry in packed.entries]


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_cache_of_sharded_ome_zarr_has_the_same_numbers_as_one_of_npy(tmp_path, dtype):
    """Training from it reads chunks; turned, oblique, resampled, cropped, padded and masked."""
    pytest.importorskip("tensorstore")
    rng = np.random.default_rng(0)
    data = rng.integers(0, 120, (2, 30, 26, 22)).astype(dtype)
    data[:, 5:25, 4:20, 3:19] += 7
    affine = np.diag([-1.0, 1.5, 2.0, 1.0])
    affine[:3, 3] = 4, 5, 6
    affine[0, 1] = 0.3
    mask = np.zeros((1, 30, 26, 22), np.uint8)
    mask[:, 8:22, 6:18, 5:17] = 1
    write_volume(tmp_path / "data" / "a.nii.gz", Volume(data, affine, 0.5, -3.0))
    write_volume(tmp_path / "data" / "a_mask.nii.gz", Volume(mask, affine))
    how = Preprocess(spacing_mm=(2.0, 2.0, 2.0), crop_foreground=True, pad_to_multiple=4)
    reading = Reading(volumes_4d="channels", mask="{name}_mask.nii.gz")
    folder = str(tmp_path / "data")
    npy, zarr = (
        VolumeStore.build(folder, tmp_path / "cache", how, reading=reading, backend=backend,
                          progress=False)
        for backend in ("npy", "zarr")
    )  # fmt: skip
    assert npy.chunks(0) is None and zarr.chunks(0) == zarr.shape(0)[1:]
    assert zarr.entries[0].voxels.file.endswith(".ome.zarr")
    np.testing.assert_array_equal(zarr.read(0), npy.read(0))
    np.testing.assert_array_equal(zarr.seen(0), npy.seen(0))
    assert zarr.meta(0)["affine"] == npy.meta(0)["affine"]
    np.testing.assert_array_equal(zarr.undo(0, zarr.read(0)).data, npy.undo(0, npy.read(0)).data)
    loaders = [PatchLoader(s, (8, 8, 8), patches_per_volume=8, threads=1) for s in (npy, zarr)]
    for one, other in zip(*loaders, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.weight, other.weight)
    again = VolumeStore.build(folder, tmp_path / "cache", how, reading=reading, backend="zarr")
    assert again.entries[0].key == zarr.entries[0].key
    stored = read_volume(tmp_path / "cache" / zarr.entries[0].voxels.file)
    assert np.allclose(stored.spacing_mm, (2, 2, 2)) and stored.look.space == "body"
    (tmp_path / "cache" / zarr.entries[0].voxels.file / "zarr.json").unlink()
    rebuilt = VolumeStore.build(folder, tmp_path / "cache", how, reading=reading, backend="zarr")
    np.testing.assert_array_equal(rebuilt.read(0), npy.read(0))


def test_missing_blosc2_says_how_to_get_it(paths, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ValueError, match=r"vae3d\[blosc2\]"):
        VolumeStore.build(paths, tmp_path / "cache", backend="blosc2")


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "f4"])
@pytest.mark.parametrize("intensity", ["unit", "symmetric", "zscore", "raw"])
def test_reading_by_torch_and_by_numpy_is_the_same_to_the_bit(tmp_path, dtype, intensity):
    """Which of the two reads depends on the number of torch's threads, and nothing else does."""
    import warnings

    import torch

    data = np.random.default_rng(0).gamma(2, 20, (9, 8, 7)).clip(0, 120).astype(dtype)
    np.save(tmp_path / "a.npy", data)
    options = Preprocess(percentiles=(1, 98), intensity=intensity)
    store = VolumeStore.build([tmp_path / "a.npy"], tmp_path / "cache", options)
    part = (slice(1, 8), slice(0, 8, 2), slice(3, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of read-only memory
        by_torch = store.read(0, part)
    try:
        torch.set_num_threads(2)
        by_numpy = store.read(0, part)
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(by_torch, by_numpy)


def test_a_cache_and_a_run_below_the_volumes_are_no_volumes(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.arange(120, dtype=np.float32).reshape(4, 5, 6))
    VolumeStore.build(find_subjects(tmp_path), tmp_path / "cache", progress=False)
    for name in ("metrics.jsonl", "recon/a.npy"):
        path = tmp_path / "runs/a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert [subject.id for subject in find_subjects(tmp_path)] == ["a"]
    assert "passed over 2 files: 1 cache, 1 run" in capsys.readouterr().err
