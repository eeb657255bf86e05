"""Stores that are larger than memory are copied piece by piece, with the numbers of the whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loaders import Preprocess, Reading, VolumeStore, find_subjects
from loaders.preprocess import Resampled, resample, resampled_grid
from loaders.readers import BrokenVolume, Volume
from tests.stores import halved, ome, voxels, write
from tests.test_counted import SHAPE, TURNED, ball, listed, weights

pytest.importorskip("tensorstore")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("label", [False, True])
def test_pieces_of_a_resampled_volume_have_the_numbers_of_the_whole(monkeypatch, label):
    monkeypatch.setattr("loaders.preprocess.PIECE", 20_000)
    rng = np.random.default_rng(0)
    affine = np.array([[0, 0.6, 0, 3], [-1.0, 0, 0, 5], [0, 0, 2.0, 7], [0, 0, 0, 1]])
    volume = Volume(rng.random((2, 47, 60, 31)).astype(np.float32), affine)
    for spacing in ((1.7, 0.5, 1.6), (1.0, 0.6, 2.0)):
        grid = resampled_grid(volume, spacing)
        whole = resample(volume, *grid, label=label)
        lazy = Resampled(volume, *grid, label=label)
        np.testing.assert_allclose(lazy.affine, whole.affine)
        np.testing.assert_allclose(lazy[(slice(None),) * 4], whole.data, atol=1e-6)
        box = (slice(1, 2), slice(5, 9), slice(20, None), slice(3, 4))
        np.testing.assert_allclose(lazy[box], whole.data[box], atol=1e-6)


def copied(root, cache, monkeypatch, whole, store, preprocess, **reading) -> VolumeStore:
    monkeypatch.setattr("loaders.streamed.WHOLE", 2**27 if whole else 0)
    how = Reading(in_place=False, **reading)
    return VolumeStore.build(
        find_subjects(root, how), cache, preprocess, reading=how, backend=store, progress=False
    )


OPTIONS = {
    "resampled": {"spacing_mm": (0.7, 1.0, 1.3)},
    "cropped": {"crop_foreground": True, "pad_to_multiple": 7},
    "both": {"spacing_mm": (0.43, 0.61, 2.3), "pad_to_multiple": 8, "orient_ras": False},
}


@pytest.mark.parametrize("store", ["npy", "zarr"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_copy_made_piece_by_piece_is_that_of_the_whole(tmp_path, monkeypatch, options, store):
    monkeypatch.setattr("loaders.cached.ROWS", 3)
    monkeypatch.setattr("loaders.cached.SLAB", 1)
    image, mask = voxels(2, *SHAPE), ball(*SHAPE)
    image[:, mask == 0] = 60_000
    how = {"unit": "millimeter", "orientation": TURNED}
    ome(tmp_path / "a.zarr", [image], axes="czyx", **how)
    ome(tmp_path / "b.zarr", [voxels(*SHAPE, seed=1)], chunks=5, **how)
    ome(tmp_path / "m.zarr", [mask], **how)
    root = listed(tmp_path, "path,fov", "a.zarr;b.zarr,m.zarr")
    preprocess = Preprocess(**OPTIONS[options])
    here, whole = (
        copied(root, tmp_path / str(way), monkeypatch, way, store, preprocess, mask="fov")
        for way in (False, True)
    )
    assert here.entries[0].key == whole.entries[0].key
    np.testing.assert_allclose(here.meta(0)["affine"], whole.meta(0)["affine"])
    for what in ("undo", "statistics", "look", "notes", "shape", "file"):
        assert here.meta(0)[what] == whole.meta(0)[what]
    numbers = [one.array(0)[(slice(None),) * 4].astype(float) for one in (here, whole)]
    assert np.abs(numbers[0] - numbers[1]).max() <= 1  # a tie that was rounded otherwise
    np.testing.assert_array_equal(weights(here), weights(whole))
    assert weights(here).any()
    points = tuple(here.foreground_points(0).T)
    assert len(points[0]) > 500 and (here.read(0)[0][points] > 0).all()
    np.testing.assert_allclose(
        here.undo(0, here.read(0)).data, whole.undo(0, whole.read(0)).data, atol=2
    )


def test_a_level_region_and_time_point_of_a_large_store_are_copied_alone(tmp_path, monkeypatch):
    series = voxels(3, *SHAPE)
    path = ome(tmp_path / "a.zarr", [series, halved(series)], axes="tzyx")
    told = {"level": 1, "time_point": 2, "region": [[1, 7], [2, 9], [0, 11]]}
    raw = Preprocess(intensity="raw", orient_ras=False)
    here = copied(path, tmp_path / "c", monkeypatch, False, "zarr", raw, **told)
    np.testing.assert_array_equal(here.read(0)[0], halved(series)[2].T[1:7, 2:9, 0:11])
    assert here.undo(0, here.read(0)).data.shape == (1, 6, 7, 11)
    (path / "s1" / "c" / "2" / "0" / "0" / "0").write_bytes(b"no zstd stream")
    with pytest.raises(BrokenVolume, match="cannot be read"):
        copied(path, tmp_path / "d", monkeypatch, False, "zarr", raw, level=1, time_point=2)
    assert not list((tmp_path / "d").glob("*.zarr"))


MEMORY = """
import sys, threading, time
from pathlib import Path
from loaders import Preprocess, Reading, VolumeStore
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3
most, done = [0.0], threading.Event()
def watch():
    while not done.wait(0.01):
        most[0] = max(most[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
import loaders.preprocess, loaders.streamed
loaders.streamed.WHOLE = loaders.preprocess.PIECE = 2**20
spacing = Preprocess(spacing_mm=(0.002, 0.002, 0.004))
store = VolumeStore.build(sys.argv[1], sys.argv[2], spacing, backend="zarr", progress=False,
                          reading=Reading(in_place=False), threads=1)
done.set()
print(store.shape(0), most[0])
"""


@pytest.mark.slow
def test_memory_of_a_resampled_copy_does_not_grow_with_the_volume(tmp_path):
    found = []
    for side in (192, 384):  # 14 and 113 MB of uint16
        path, small = tmp_path / f"{side}.zarr", voxels(128, 128, 128)
        ome(path, [small, small], chunks=64, scale=(2.0, 1.0, 1.0))
        write(path / "s0", (side,) * 3, np.uint16, (64,) * 3, (256,) * 3)
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, path, tmp_path / "cache"],
            capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert f"({1}, {side // 2}, {side // 2}, {side // 2})" in run.stdout
        found.append(float(run.stdout.split()[-1]))
    assert found[1] < found[0] + 60
