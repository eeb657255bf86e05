"""Volumes seen slice by slice, for 2D networks."""

import numpy as np
import pytest

from loaders import DataConfig, ForegroundCorners, PatchLoader, SliceStore, VolumeStore, open_data
from loaders.readers import Volume, write_volume

SHAPES = [(8, 9, 10), (6, 7, 5)]
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


@pytest.fixture
def volumes(tmp_path) -> VolumeStore:
    for n, shape in enumerate(SHAPES):
        data = np.random.default_rng(n).integers(0, 99, (1, *shape)).astype(np.int16)
        write_volume(tmp_path / "data" / f"v{n}.nii.gz", Volume(data, AFFINE))
    return VolumeStore.build(sorted((tmp_path / "data").iterdir()), tmp_path / "cache")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_slice_of_each_volume_is_an_item(volumes, axis):
    slices = SliceStore(volumes, axis)
    assert len(slices) == sum(shape[axis] for shape in SHAPES)
    assert len(slices.ids) == len(set(slices.ids)) == len(slices)
    for index in range(len(slices)):
        volume, number = slices.locate(index)
        expected = volumes.read(volume).take(number, axis=1 + axis)
        assert np.array_equal(slices.read(index), expected)
        assert slices.shape(index) == expected.shape
        assert slices.ids[index] == f"v{volume}__{number:03d}"
    part = (slice(1, 4), slice(2, 3))
    assert np.array_equal(slices.read(0, part), slices.read(0)[:, 1:4, 2:3])
    spacing = [1.0, 2.0, 3.0]
    del spacing[axis]
    assert slices.spacing_mm(0) == tuple(spacing)


def test_neighboring_slices_become_channels_and_ends_repeat(volumes):
    slices, x = SliceStore(volumes, 2, num_slices=3), volumes.read(1)[0]
    first, last = 10, 14
    assert slices.num_channels == 3 and slices.shape(first) == (3, 6, 7)
    assert np.array_equal(slices.read(first), np.stack([x[..., 0], x[..., 0], x[..., 1]]))
    assert np.array_equal(slices.read(last), np.stack([x[..., 3], x[..., 4], x[..., 4]]))


@pytest.mark.parametrize("patching", ["full", "random_parts", None])
def test_loader_cuts_patches_out_of_slices(volumes, patching):
    slices = SliceStore(volumes.subset(["v0"]), 1)
    for batch in PatchLoader(slices, (4, 12), patching, batch_size=2, threads=1):
        assert batch.corner.shape[1] == 2 and batch.image.ndim == 4
        for image, index, corner in zip(batch.image, batch.volume, batch.corner, strict=True):
            x = slices.read(int(index))
            size = image.shape[1:]
            part = x[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
            assert np.array_equal(image[:, : part.shape[1], : part.shape[2]].numpy(), part)


def test_subset_is_by_volume_and_open_data_gives_slices(volumes, tmp_path):
    config = DataConfig(
        root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), slice_axis=0
    )
    store, split = open_data(config, spatial_dims=2)
    assert isinstance(store, SliceStore) and split["train"]
    assert len(store.subset(["v1"])) == 6 and len(store.subset([])) == 0


def test_undo_of_a_slice_has_intensities_and_its_place(volumes, tmp_path):
    slices = SliceStore(volumes, 2)
    volume = slices.undo(3, slices.read(3))
    whole = volumes.undo(0, volumes.read(0))
    assert np.allclose(volume.data[0, :, :, 0], whole.data[0, :, :, 3])
    assert np.allclose(volume.affine @ [1, 1, 0, 1], whole.affine @ [1, 1, 3, 1])
    with pytest.raises(ValueError, match="the slice is"):
        slices.undo(3, np.zeros((1, 2, 2), np.float32))
    assert slices.meta(3)["slice"] == 3


def test_foreground_sampling_works_on_slices(volumes):
    slices = SliceStore(volumes, 2)
    one = PatchLoader(slices, (3, 3), sampler=ForegroundCorners, batch_size=1, threads=0)
    for batch in one:
        corner = batch.corner[0].numpy()
        assert (corner >= 0).all() and (corner + 3 <= slices.shape(int(batch.volume[0]))[1:]).all()


def test_wrong_options_are_told(volumes):
    with pytest.raises(ValueError, match="slice_axis"):
        SliceStore(volumes, 3)
    with pytest.raises(ValueError, match="num_slices"):
        SliceStore(volumes, 2, 2)


def test_pictures_train_in_2d(tmp_path):
    from PIL import Image

    for n in range(3):
        picture = np.random.default_rng(n).integers(0, 255, (12, 16, 3), np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "data" / f"p{n}.png")
    config = DataConfig(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    store, _ = open_data(config, spatial_dims=2)
    assert len(store) == 3 and store.shape(0) == (3, 16, 12)
    batch = next(iter(PatchLoader(store, (8, 8), batch_size=4, threads=0)))
    assert batch.image.shape == (4, 3, 8, 8)
