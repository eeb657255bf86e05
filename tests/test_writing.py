"""Volumes are written as they came: read back the same, by us and by others, piece by piece."""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from loaders import DataConfig, Preprocess, VolumeStore, read_volume, write_volume
from loaders.readers import BrokenVolume, Look, Reading, Volume, ngff_writer
from loaders.readers.volume import RGB
from loaders.undo import Undone, undo, write_undone
from tests.stores import UM, array, ome, voxels, write
from train_3d import train_3d
from vae3d.commands.decode import decode
from vae3d.commands.encode import encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.commands.sample import sample
from vae3d.inference import baselines, metrics
from vae3d.inference.baselines import BlockPCA, pooled
from vae3d.inference.evaluation import Evaluator
from vae3d.inference.metrics import METRICS, lattice_score, seam_score
from vae3d.inference.reconstruct import Coding
from vae3d.kernels import large
from vae3d.kernels.large import Lazy
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm, NoNorm

pytest.importorskip("tensorstore")
ROOT = Path(__file__).resolve().parents[1]
QUIET = {"device": "cpu", "wandb": "disabled"}
CHANNELS = (("nuclei", "ff0000"), ("membrane", ""))
MICROSCOPE = Look("picture", "um", CHANNELS)
ALL = Reading(volumes_4d="channels")


def picture(*shape, dtype=np.uint8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_ome_zarr_reads_back_the_same_by_us_by_zarr_and_by_ngff_zarr(tmp_path):
    import ngff_zarr
    import zarr

    data = picture(2, 70, 41, 33, dtype=np.uint16).astype(np.float32)
    affine = np.diag([0.5 * UM, 0.25 * UM, 2 * UM, 1.0])
    affine[:3, 3] = 1.0, 2.0, 3.0
    path = tmp_path / "a.ome.zarr"
    write_volume(path, Volume(data, affine, look=MICROSCOPE))
    back = read_volume(path, ALL)
    assert np.array_equal(back.data, data) and back.look == MICROSCOPE and back.notes == ()
    np.testing.assert_allclose(back.affine, affine, rtol=1e-12)
    group = zarr.open_group(path, mode="r")
    assert group["0"].shape == (2, 33, 41, 70) and group["0"].shards == (1, 33, 41, 128)
    assert group["0"].metadata.dimension_names == ("c", "z", "y", "x")
    np.testing.assert_array_equal(group["0"][:], data.transpose(0, 3, 2, 1))
    fine, coarse = ngff_zarr.from_ngff_zarr(str(path), validate=True, version="0.5").images
    assert fine.dims == ("c", "z", "y", "x") and fine.axes_units["z"] == "micrometer"
    assert fine.scale == pytest.approx({"c": 1, "z": 2, "y": 0.25, "x": 0.5})
    assert fine.translation == pytest.approx({"c": 0, "z": 3000, "y": 2000, "x": 1000})
    np.testing.assert_array_equal(np.asarray(fine.data), data.transpose(0, 3, 2, 1))
    assert coarse.scale["x"] == 1 and coarse.translation["x"] == 1000.25  # between two voxels
    means = data.reshape(2, 35, 2, 41, 33).mean(2)
    np.testing.assert_allclose(np.asarray(coarse.data), means.transpose(0, 3, 2, 1), rtol=1e-6)


def test_levels_are_halved_along_long_axes_to_a_chunk_and_odd_ends_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ngff_writer, "CHUNK", 8)
    monkeypatch.setattr(ngff_writer, "ROWS", 3)
    data = picture(1, 37, 18, 7, dtype=np.uint16)
    write_volume(tmp_path / "a.zarr", Volume(data))
    read = [read_volume(tmp_path / "a.zarr", Reading(level=n)) for n in range(4)]
    assert [one.data.shape[1:] for one in read] == [
        (37, 18, 7), (19, 9, 7), (10, 5, 7), (5, 5, 7),
    ]  # fmt: skip
    assert [one.spacing_mm for one in read] == [(1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 4, 1)]
    pairs = data[0].astype(float).reshape(37, 9, 2, 7).mean(2)
    wanted = np.concatenate([pairs[:-1].reshape(18, 2, 9, 7).mean(1), pairs[-1:]])
    assert np.abs(read[1].data[0] - wanted).max() <= 0.5  # rounded


def test_bodies_keep_their_directions_in_ome_zarr_and_oblique_ones_are_told(tmp_path):
    affine = np.array([[0, 2.0, 0, 5], [-1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    data = picture(1, 9, 8, 7)
    write_volume(tmp_path / "a.zarr", Volume(data, affine))
    back = read_volume(tmp_path / "a.zarr")
    assert np.array_equal(back.data, data) and back.look.space == "body"
    np.testing.assert_allclose(back.affine, affine, atol=1e-12)
    affine[:2, :2] = [[0.6, -0.8], [0.8, 0.6]]
    with pytest.warns(UserWarning, match="oblique"):
        write_volume(tmp_path / "b.zarr", Volume(data, affine))


def test_tiff_reads_back_the_same_by_us_and_by_tifffile(tmp_path):
    import tifffile

    data = picture(2, 9, 8, 7, dtype=np.uint16)
    affine = np.diag([0.5 * UM, 0.25 * UM, 2 * UM, 1.0])
    write_volume(tmp_path / "a.ome.tif", Volume(data, affine, look=MICROSCOPE))
    back = read_volume(tmp_path / "a.ome.tif", ALL)
    assert back.data.dtype == np.uint16 and np.array_equal(back.data, data)
    assert back.look == MICROSCOPE and np.allclose(back.affine, affine, rtol=1e-12)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert tiff.is_ome and tiff.series[0].axes == "CZYX"
        assert 'PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00b5m"' in tiff.ome_metadata
        np.testing.assert_array_equal(tiff.asarray(), data.transpose(0, 3, 2, 1))
    colors = Volume(picture(3, 9, 8, 1), look=Look("picture", "px", RGB))
    write_volume(tmp_path / "b.tif", colors)
    assert Image.open(tmp_path / "b.tif").mode == "RGB"  # as any viewer shows it
    assert np.array_equal(read_volume(tmp_path / "b.tif").data, colors.data)


SOURCES = {
    "gray.png": lambda path: Image.fromarray(picture(8, 12)).save(path),
    "deep.png": lambda path: Image.fromarray(picture(8, 12, dtype=np.uint16)).save(path),
    "colors.png": lambda path: Image.fromarray(picture(8, 12, 3)).save(path),
    "stack.tif": lambda path: write_volume(
        path, Volume(picture(1, 12, 8, 6, dtype=np.uint16), np.diag([0.1, 0.1, 0.5, 1.0]),
                     look=Look("picture", "um"))),
    "colors.tif": lambda path: write_volume(
        path, Volume(picture(3, 12, 8, 1), look=Look("picture", "px", RGB))),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_picture_that_an_identity_reconstructs_is_written_pixel_for_pixel(tmp_path, name):
    SOURCES[name](tmp_path / name)
    unit = Preprocess(percentiles=(0, 100))
    store = VolumeStore.build([tmp_path / name], tmp_path / "cache", unit, progress=False)
    path = write_undone(
        tmp_path / "out", "a", torch.from_numpy(store.read(0)), store.undo_record(0)
    )
    assert path.name == ("a.png" if name.endswith("png") else "a.ome.tif")
    source, back = read_volume(tmp_path / name), read_volume(path)
    assert back.data.dtype == source.data.dtype and np.array_equal(back.data, source.data)
    assert back.look.unit == source.look.unit and back.spacing_mm == source.spacing_mm
    if name.endswith("png"):
        np.testing.assert_array_equal(Image.open(path), Image.open(tmp_path / name))


def test_what_is_no_picture_is_not_written_as_one(tmp_path):
    for data in (picture(1, 4, 4, 2), picture(2, 4, 4, 1), np.ones((1, 4, 4, 1), np.float32)):
        with pytest.raises(ValueError, match="is no picture"):
            write_volume(tmp_path / "a.png", Volume(data))
    write_volume(tmp_path / "a.zarr", Volume(np.eye(4, dtype=bool)[None, ..., None]))
    assert np.array_equal(
        read_volume(tmp_path / "a.zarr").data[0, ..., 0], np.eye(4, dtype=np.uint8)
    )
    shutil.rmtree(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="volumes are written as"):
        write_volume(tmp_path / "a.mha", Volume(picture(1, 4, 4, 4)))
    assert os.listdir(tmp_path) == []


def test_a_box_of_an_undone_volume_is_that_of_the_whole_one(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    data = rng.normal(50, 5, (24, 20, 16)).astype(np.float32)
    data[6:19, 5:13, 4:11] += 900  # a foreground to crop to
    affine = np.array([[0, 0, 3.0, 1], [-1, 0, 0, 2], [0, 2, 0, 3], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "a.nii.gz")
    resampled = {"spacing_mm": (2, 2, 2), "crop_foreground": True, "pad_to_multiple": 7}
    for more in ({}, {"crop_foreground": True}, {"pad_to_multiple": 7}, resampled, resampled):
        preprocess = Preprocess(percentiles=(0, 100), **more)
        store = VolumeStore.build([tmp_path / "a.nii.gz"], tmp_path / "cache", preprocess,
                                  progress=False)  # fmt: skip
        x, record = store.read(0), json.loads(json.dumps(store.undo_record(0)))
        undone, whole = Undone(x, record), undo(x, record)
        assert undone.shape == (1, 24, 20, 16) and np.array_equal(undone.affine, whole.affine)
        if "spacing_mm" not in more:
            inside = data[6:19, 5:13, 4:11]
            np.testing.assert_allclose(whole.data[0, 6:19, 5:13, 4:11], inside, rtol=1e-5)
        for _ in range(8):
            ends = [sorted(rng.integers(0, n + 1, 2)) for n in undone.shape[1:]]
            box = (slice(0, 1), *(slice(a, b) for a, b in ends))
            np.testing.assert_allclose(undone[box], whole.data[box], rtol=1e-6)
        monkeypatch.setattr("loaders.undo.WHOLE", 0 if "spacing_mm" in more else 2**27)


def test_a_write_that_fails_leaves_the_old_store_and_nothing_else(tmp_path, monkeypatch):
    path, first = tmp_path / "a.ome.zarr", Volume(picture(1, 9, 8, 7))
    write_volume(path, first)

    class Broken(Volume):
        def __getitem__(self, box):
            raise BrokenVolume("there", "is gone")

    with pytest.raises(BrokenVolume, match="is gone"):
        write_volume(path, Broken(picture(1, 9, 8, 7, seed=1)))
    assert os.listdir(tmp_path) == ["a.ome.zarr"]
    assert np.array_equal(read_volume(path).data, first.data)
    second = Volume(picture(1, 9, 8, 7, seed=1))
    write_volume(path, second)  # takes the old one's place
    assert np.array_equal(read_volume(path).data, second.data)
    assert os.listdir(tmp_path) == ["a.ome.zarr"]


# From end to end ----------------------------------------------------------------------------------


tiny_vae = partial(
    CustomVAE, channels=(4, 8), num_res_blocks=1, norm=partial(GroupNorm, num_groups=4),
    latent_channels=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on a small store of a microscope, and the store."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("writing")
    data = voxels(2, 12, 16, 20)
    path = ome(root / "a.ome.zarr", [data], "czyx", channels=("a", "b"), offset=(0, 3.0, 2.0, 1.0))
    config = DataConfig(str(path), cache_dir=str(root / "cache"), fractions=(1, 0, 0))
    code = train_3d(
        config, str(root / "run"), model=partial(tiny_vae, in_channels=2), patch_size=(8, 8, 8),
        batch_size=1, max_steps=1, threads=0, val_every=0, media_every=0, **QUIET,
    )  # fmt: skip
    assert code == 0
    return root


def test_a_store_comes_back_as_one_from_evaluate_decode_and_sample(run, capsys):
    source = read_volume(run / "a.ome.zarr", ALL)
    common = EvaluationData(str(run / "a.ome.zarr"), str(run / "cache"))
    evaluate(str(run / "run"), common, str(run / "eval"), media=False, split="all",
             **QUIET)  # fmt: skip
    encode(str(run / "run"), str(run / "z"), device="cpu")
    decode(str(run / "z"), str(run / "run"), str(run / "dec"), device="cpu")
    sample(str(run / "run"), latents=str(run / "z"), out_dir=str(run / "new"), n=1, media=False,
           prior="standard", device="cpu")  # fmt: skip
    read = [
        read_volume(path, ALL)
        for path in (
            run / "eval" / "recon" / "a.ome.zarr",
            run / "dec" / "a.ome.zarr",
            run / "new" / "standard" / "sample_000.ome.zarr",
        )
    ]
    for one in read:
        assert one.data.shape == source.data.shape and one.look == source.look
        np.testing.assert_allclose(one.affine, source.affine, rtol=1e-9)
    np.testing.assert_allclose(read[0].data, read[1].data, rtol=1e-4, atol=0.1)
    for form, name in (("nifti", "a.nii.gz"), ("tiff", "a.ome.tif")):
        out = run / form
        decode(str(run / "z"), str(run / "run"), str(out), recon_format=form, device="cpu")
        other = read_volume(out / name, ALL)
        assert np.array_equal(other.data, read[1].data)
        assert other.spacing_mm == pytest.approx(source.spacing_mm)


@pytest.mark.parametrize("dims", [3, 2])
@pytest.mark.parametrize("mode", ["patch", "exact"])
def test_a_volume_too_large_for_memory_has_the_same_numbers(tmp_path, monkeypatch, mode, dims):
    path = array(tmp_path / "a.zarr", voxels(7, 11, 18), (8, 8, 8), names="zyx")
    store = VolumeStore.build([path], tmp_path / "cache", progress=False)
    torch.manual_seed(0)
    vae = tiny_vae(spatial_dims=dims).eval()
    how = vars(Coding("patch", patch_size=(8,) * dims, overlap=2))
    rows: list[dict] = []
    read = counted(VolumeStore, monkeypatch)
    for name, limit in (("memory", large.LARGE), ("disk", 0)):
        monkeypatch.setattr(large, "LARGE", limit)
        all_of_it = mode == "patch" and dims == 3
        evaluator = Evaluator(
            vae, store, tmp_path / name, how, patch_gap=all_of_it, media=all_of_it
        )
        before = sum(read)
        rows.append(evaluator.volume(0))
        assert rows[-1].pop("case") == "a"
        assert sum(read) - before == 2 * 7 * 11 * 18  # out of its chunks as clipped, and as it is
    assert rows[1] == pytest.approx(rows[0], rel=1e-5, abs=1e-7, nan_ok=True)
    one, two = (
        read_volume(tmp_path / name / "recon" / "a.ome.zarr").data for name in ("memory", "disk")
    )
    np.testing.assert_allclose(one, two, rtol=1e-6)
    assert not [
        p for p in (tmp_path / "disk").iterdir() if p.name not in ("recon", "rows", "media")
    ]


def counted(kind, monkeypatch) -> list[int]:
    """Voxels of each read of a kind of store, from here on."""
    sizes, read_into = [], kind.read_into

    def counting(self, index, slices, out):
        sizes.append(out.size)
        read_into(self, index, slices, out)

    monkeypatch.setattr(kind, "read_into", counting)
    return sizes


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest memory behind what operations return, some apart."""

    def __init__(self):
        super().__init__()
        self.bytes, self.apart = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.apart:
                    self.bytes = max(self.bytes, storage.nbytes())
        return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["patch", "exact"])
def test_an_evaluation_makes_no_tensor_of_the_size_of_a_volume(tmp_path, monkeypatch, mode):
    path = array(tmp_path / "a.zarr", voxels(24, 24, 512), (24, 24, 64), names="zyx")
    store = VolumeStore.build([path], tmp_path / "cache", progress=False, cache_gb=0)
    volume = 4 * 24 * 24 * 512
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(large, "MOST", 2**14)
    monkeypatch.setattr(metrics, "MOST", 2**14)
    monkeypatch.setattr(baselines, "SLAB", 2**14)
    vae = tiny_vae(channels=(2, 4, 4), norm=NoNorm).eval()
    how = vars(Coding(mode, patch_size=(32, 24, 24), overlap=4))
    largest, room = LargestTensor(), large.room

    def on_disk(shape, folder=None):
        assert folder is not None
        with _disable_current_modes():
            tensor = room(shape, folder)
        largest.apart.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr("vae3d.inference.reconstruct.room", on_disk)
    monkeypatch.setattr(large, "room", on_disk)
    evaluator = Evaluator(vae, store, tmp_path / "out", how, patch_gap=False, media=False)
    with largest:
        evaluator.volume(0)
    assert largest.apart and 0 < largest.bytes < volume / 2
    back = read_volume(tmp_path / "out" / "recon" / "a.ome.zarr")
    assert back.data.shape == (1, 512, 24, 24)


def test_slabs_of_any_thickness_give_the_same_numbers(monkeypatch):
    x = torch.rand(2, 23, 17, 14).cumsum(1) / 23
    recon = x + 0.05 * torch.randn_like(x)
    mask = torch.rand(23, 17, 14) > 0.3

    def numbers() -> dict:
        pca = BlockPCA.fit([Lazy.of(x)], (2, 2, 2), 6, most=200)
        found = {name: metric(x, recon, 1.0, mask) for name, metric in METRICS.items()}
        found["seams"] = seam_score(x, recon, [[8], [8], [8]])
        found["lattice"] = lattice_score(x, recon, (4, 2, 2))
        found["pooled"] = METRICS["psnr"](x, pooled(x, (4, 2, 2)), 1.0)
        found["pca"] = METRICS["psnr"](x, pca.coded(x, 4), 1.0)
        return found | {"equivalent": pca.equivalent(Lazy.of(x), recon, mask)}

    wanted = numbers()
    monkeypatch.setattr(baselines, "SLAB", 1)
    for name, value in (("ROWS", 3), ("MOST", 500)):
        monkeypatch.setattr(large, name, value)
        monkeypatch.setattr(metrics, name, value)
    assert numbers() == pytest.approx(wanted, rel=1e-6)


MEMORY = """
import sys, torch
from functools import partial
from pathlib import Path
from loaders import VolumeStore
from vae3d.inference.evaluation import Evaluator
from vae3d.inference.reconstruct import Coding
from vae3d.kernels import large
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import NoNorm
large.LARGE = 2**20
torch.manual_seed(0)
vae = CustomVAE(channels=(2, 4, 4), num_res_blocks=1, norm=NoNorm, latent_channels=1).eval()
path, out = sys.argv[1:]
store = VolumeStore.build([path], f"{out}/cache", progress=False, cache_gb=0.02)
how = vars(Coding("patch", patch_size=(64, 64, 64), overlap=0))
print("ready", flush=True)
sys.stdin.readline()
Evaluator(vae, store, Path(out), how, patch_gap=False, media=False).volume(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux counts its memory")
def test_neither_input_nor_output_of_an_evaluation_is_whole_in_memory(tmp_path):
    shape = (96, 128, 3072)  # z, y, x: 151 MB as float32; its length must not matter
    made = write(tmp_path / "a.zarr", shape, np.uint16, (64, 64, 64), names="zyx")
    plane = np.add.outer(np.arange(shape[1]), np.arange(shape[2])).astype(np.uint16)
    made.write(np.broadcast_to(plane, shape)).result()
    # What is in use is counted, not what glibc keeps of what was.
    kept = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "262144")
    environment = {**os.environ, **kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", MEMORY, tmp_path / "a.zarr", tmp_path / "out"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    started = peak = anonymous(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    done = threading.Event()
    threading.Thread(target=lambda: (child.wait(), done.set()), daemon=True).start()
    while not done.wait(0.02):
        peak = max(peak, anonymous(child.pid))
    assert child.returncode == 0
    assert peak - started < 250  # MB; volume, reconstruction and source together have 453
    assert read_volume(tmp_path / "out" / "recon" / "a.ome.zarr").data.shape == (1, *shape[::-1])


def anonymous(pid: int) -> float:
    """Megabytes that a process holds and no file does; 0 when it has gone."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024 if "RssAnon" in status else 0.0
