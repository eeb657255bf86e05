"""Pictures among volumes, and pictures for a 3D network: refused before anything is cached."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders import DataConfig, open_data
from loaders.readers import Volume, write_volume
from loaders.slices import SliceStore

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 255, (6, 7), np.uint8)


def pictures(folder: Path, count: int, suffix: str = ".png") -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(SMALL + number).save(folder / f"shot_{number}{suffix}")


def volumes(folder: Path, count: int, depth: int = 8) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        data = RNG.random((1, 8, 8, depth)).astype(np.float32)
        write_volume(folder / f"scan_{number}_{depth}.nii.gz", Volume(data))


def refused(root: Path, cache: Path, *words: str, spatial_dims: int = 3, **options) -> None:
    """The data must be refused by these words, and nothing cached."""
    with pytest.raises(ValueError) as caught:
        open_data(DataConfig(str(root), str(cache), **options), spatial_dims)
    message = str(caught.value)
    assert "\n" not in message and not list(cache.glob("*.npy"))
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_pictures_for_a_network_of_volumes_are_refused_with_the_remedies(tmp_path, suffix):
    pictures(tmp_path / "in", 3, suffix)
    refused(
        tmp_path / "in", tmp_path / "cache", f"shot_0{suffix}: is one voxel thick, as 3 of 3 are",
        "train on slices (--model.spatial_dims 2), or make each folder of slices a volume "
        "(--data.stacks folder)",
    )  # fmt: skip
    store, _ = open_data(DataConfig(str(tmp_path / "in"), str(tmp_path / "cache")), 2)
    assert isinstance(store, SliceStore) and len(store) == 3
    config = DataConfig(str(tmp_path / "in"), str(tmp_path / "new"), stacks="folder")
    store, _ = open_data(config)
    assert store.shape(0) == (1, 7, 6, 3)


def test_screenshots_beside_volumes_are_refused_in_3d_and_in_2d(tmp_path):
    volumes(tmp_path / "in", 3)
    pictures(tmp_path / "in", 1)
    refused(tmp_path / "in", tmp_path / "cache", "shot_0.png: is one voxel thick, as 1 of 4 are",
            "name the volumes alone, by a glob or a manifest (data.root)")  # fmt: skip
    refused(tmp_path / "in", tmp_path / "cache", "shot_0.png: is a picture among 3 volumes",
            spatial_dims=2)  # fmt: skip
    config = DataConfig(str(tmp_path / "in" / "*.nii.gz"), str(tmp_path / "cache"))
    assert len(open_data(config)[0]) == 3


def test_pictures_that_are_named_train_a_network_of_slices_beside_volumes(tmp_path):
    volumes(tmp_path / "in", 1)
    pictures(tmp_path / "in", 1)
    config = DataConfig(str(tmp_path / "in" / "*"), str(tmp_path / "cache"))
    assert len(open_data(config, 2)[0]) == 9


def test_a_nifti_of_one_slice_is_refused_among_volumes_and_taken_among_slices(tmp_path):
    volumes(tmp_path / "in", 2)
    volumes(tmp_path / "in", 1, depth=1)
    refused(tmp_path / "in", tmp_path / "cache", "scan_0_1.nii.gz: is one voxel thick, as 1 of 3")
    assert len(open_data(DataConfig(str(tmp_path / "in"), str(tmp_path / "cache")), 2)[0]) == 17


def test_what_only_reading_tells_to_be_flat_is_refused_too(tmp_path):
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "a.npz", SMALL)
    with pytest.raises(ValueError, match=r"a\.npz: is one voxel thick, as 1 of 1 are"):
        open_data(DataConfig(str(tmp_path / "in"), str(tmp_path / "cache")))


def test_broken_files_are_told_as_such_and_not_as_pictures(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.nii").write_bytes(b"1")
    refused(tmp_path / "in", tmp_path / "cache", "cut.nii: has no NIfTI header")
