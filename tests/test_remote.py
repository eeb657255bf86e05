"""Stores behind URLs: a real S3 server (moto) that is slow, fails and lies; nothing hangs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loaders import DataConfig, PatchLoader, Preprocess, Reading, VolumeStore, open_data
from loaders.readers import BrokenVolume
from loaders.readers.arrays import context
from tests.stores import Bucket, ome, voxels

pytest.importorskip("tensorstore")
pytest.importorskip("moto")
pytest.importorskip("s3fs")
ROOT = Path(__file__).resolve().parents[1]
RAW = Preprocess(intensity="raw", orient_ras=False)
ZYX = voxels(32, 32, 32)
XYZ = ZYX.transpose(2, 1, 0)


def built(volumes, cache, **reading):
    return VolumeStore.build(volumes, cache, RAW, reading=Reading(**reading), progress=False)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A bucket with two stores and an HDF5 file, none of them at its top."""
    h5py = pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("bucket")
    ome(folder / "data" / "a.ome.zarr", [ZYX], chunks=8, shards=(16, 16, 16))
    ome(folder / "data" / "deep" / "b.zarr", [ZYX], chunks=16, version="0.4")
    ome(folder / "data" / "deep" / "noname", [ZYX], chunks=16)
    with h5py.File(folder / "data" / "c.h5", "w") as file:
        file["raw"] = ZYX
    with Bucket() as bucket:
        bucket.upload(folder)
        yield bucket


@pytest.fixture
def bucket(filled, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", filled.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    retries = {"max_retries": 6, "initial_delay": "10ms", "max_delay": "50ms"}
    monkeypatch.setattr("loaders.readers.arrays.RETRIES", retries)
    context.cache_clear()
    filled.mood, filled.latency_s, filled.paths = "well", 0.0, []
    yield filled
    filled.mood, filled.latency_s = "well", 0.0
    context.cache_clear()


def test_stores_of_a_bucket_are_named_by_url_folder_glob_and_manifest(bucket, tmp_path):
    cache = tmp_path / "cache"
    for root, ids in {
        "s3://box/data/a.ome.zarr": ["a"],
        "s3://box/data/deep/noname": ["noname"],
        "s3://box/data": ["a", "deep__b", "deep__noname"],
        "s3://box/data/*.zarr": ["a"],
        "s3://box/data/**/*.zarr": ["a", "deep__b"],
        "s3://box/*/*/no*": ["data__deep__noname"],
        "s3://box/data/*.h5:/raw": ["c.h5__raw"],
        "s3://box/data/c.h5:/raw": ["c.h5__raw"],
    }.items():
        store = built(root, cache)
        assert store.ids == ids, root
        np.testing.assert_array_equal(store.read(0)[0], XYZ)
    several = built(["s3://box/data/a.ome.zarr", "s3://box/data/deep/b.zarr"], cache)
    assert several.ids == ["a", "deep__b"]
    (tmp_path / "list.csv").write_text(
        "path,id,label_map\ns3://box/data/deep/b.zarr,one,s3://box/data/deep/noname\n"
        "s3://box/data/c.h5:/raw,two,s3://box/data/a.ome.zarr\n"
    )
    config = DataConfig(str(tmp_path / "list.csv"), str(cache), (1, 0, 0), preprocess=RAW)
    store, _ = open_data(config, say=None)
    assert store.ids == ["one", "two"]
    assert not any("/c/" in path and path.count("/") > 6 and "list-type" in path
                   for path in bucket.paths)  # fmt: skip
    for root in ("s3://box/data/nothing", "s3://box/data/*.n5", "s3://nobox/data"):
        with pytest.raises(ValueError, match=root.replace("*", r"\*")) as error:
            built(root, cache)
        assert "\n" not in str(error.value)


def test_any_file_system_of_fsspec_is_read_through_zarr_python(tmp_path):
    import fsspec

    memory, folder = fsspec.filesystem("memory"), tmp_path / "a.zarr"
    ome(folder, [ZYX], chunks=8, shards=(16, 16, 16))
    memory.put(str(folder), "/vol/a.zarr", recursive=True)
    for root in ("memory://vol/a.zarr", "memory://vol", f"file://{tmp_path}/a.zarr"):
        store = built(root, tmp_path / "cache")
        assert store.ids == ["a"] and store.chunks(0) == (8, 8, 8)
        np.testing.assert_array_equal(store.read(0)[0], XYZ)
    memory.pipe_file("/vol/a.zarr/s0/c/0/0/0", b"no shard")
    with pytest.raises(BrokenVolume, match=r"memory://vol/a\.zarr/s0: cannot be read: "):
        built("memory://vol/a.zarr", tmp_path / "cache").read(0)
    memory.rm("/vol", recursive=True)


@pytest.mark.parametrize("mood", ["slow", "shaky"])
def test_a_run_outlives_latency_500s_and_resets(bucket, tmp_path, mood):
    store = built("s3://box/data/a.ome.zarr", tmp_path / "cache")
    context.cache_clear()
    bucket.mood, bucket.latency_s = mood, 0.02 * (mood == "slow")
    loader = PatchLoader(store, (8, 8, 8), patches_per_volume=16, batch_size=4, threads=2)
    for batch in loader:
        for image, (x, y, z) in zip(batch.image[:, 0].numpy(), batch.corner.tolist(), strict=True):
            np.testing.assert_array_equal(image, XYZ[x : x + 8, y : y + 8, z : z + 8])


@pytest.mark.parametrize(("mood", "reason"), [("failing", "500"), ("short", "Truncated")])
def test_an_object_that_stays_unreadable_ends_in_one_line_or_is_counted(
    bucket, tmp_path, mood, reason
):
    store = built("s3://box/data/deep/b.zarr", tmp_path / "cache")
    context.cache_clear()
    bucket.mood = mood
    with pytest.raises(BrokenVolume, match=rf"s3://box/data/deep/b\.zarr/s0: .*{reason}") as error:
        list(PatchLoader(store, (32, 32, 32), "full", threads=1))
    assert "\n" not in str(error.value) and re.search(r"s0/\d/\d/\d", str(error.value))


def test_no_credentials_is_one_line_and_public_buckets_are_asked_without(
    bucket, tmp_path, monkeypatch
):
    bucket.mood = "denied"
    for root in ("s3://box/data/a.ome.zarr", "s3://box/data"):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
        with pytest.raises(BrokenVolume, match=r"credentials are taken from AWS_ACCESS_KEY_ID"):
            built(root, tmp_path / "cache")
    bucket.mood = "well"
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    context.cache_clear()
    assert len(built("s3://box/data", tmp_path / "cache")) == 3


SILENT = """
import sys, time
from loaders.readers import arrays
arrays.RETRIES = {"max_retries": 1, "initial_delay": "10ms"}
from loaders import read_volume
start = time.monotonic()
try:
    read_volume("s3://box/data/a.ome.zarr")
except ValueError as error:
    print(round(time.monotonic() - start, 1), error)
"""


@pytest.mark.slow
def test_a_server_that_falls_silent_is_given_up(bucket):
    bucket.mood = "silent"
    quick = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True,
                         env=os.environ | quick, timeout=120)  # fmt: skip
    seconds, _, line = run.stdout.strip().partition(" ")
    assert float(seconds) < 20 and line.startswith("s3://box/data/a.ome.zarr/s0: cannot be read")
