"""What is measured of a data set, on volumes whose facts are known."""

import csv

import numpy as np
import pytest

from loaders.find import find_subjects
from loaders.fingerprint import ChannelFacts, measure
from loaders.readers import BrokenVolume, Volume, write_volume


def write(path, data, spacing=(1.0, 1.0, 1.0), axes=(0, 1, 2)):
    """A NIfTI of (X, Y, Z); `axes` are the axes of the world that its own run along."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for own, world in enumerate(axes):
        affine[world, own] = spacing[own]
    write_volume(path, Volume(np.asarray(data)[None], affine))


def half_bright(shape, low=0, high=1000, dtype=np.int16):
    """Half of the voxels are low, half are high."""
    data = np.full(shape, low, dtype)
    data[shape[0] // 2 :] = high
    return data


def test_shape_and_spacing_are_medians_with_axes_turned_to_ras(tmp_path):
    for number, edge in enumerate((1.0, 2.0, 3.0)):
        shape = (8 + 2 * number, 12, 20)
        write(tmp_path / f"{number}.nii", half_bright(shape), (0.5, edge, 4.0), axes=(2, 0, 1))
    found = measure(find_subjects(tmp_path))
    assert found.shape == (12, 20, 10)
    assert found.spacing_mm == (2.0, 4.0, 0.5)
    assert found.size_mm == (24.0, 80.0, 5.0)
    assert found.spread == (3.0, 1.0, 1.0)
    assert (found.spatial_dims, found.anisotropy) == (3, 8.0)


def test_each_channel_has_its_own_range_and_foreground(tmp_path):
    with open(tmp_path / "all.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path"])
        for number in range(2):
            for name, high in (("a", 100), ("b", 3000)):
                data = np.zeros((10, 8, 6), np.int16)
                data[: 2 if name == "a" else 5] = high + number
                write(tmp_path / f"{number}_{name}.nii", data)
            rows.writerow([f"{number}_a.nii;{number}_b.nii"])
    found = measure(find_subjects(tmp_path / "all.csv"))
    a, b = found.channels
    assert (a.lowest, a.highest, b.highest) == (0, 101, 3001)
    assert (a.foreground, b.foreground) == (pytest.approx(0.2), pytest.approx(0.5))
    assert (a.high, b.high) == (100.5, 3000.5)  # medians
    assert found.foreground == b.foreground
    assert not found.several_in_a_file


@pytest.mark.parametrize(
    "data, hounsfield",
    [
        (half_bright((8, 8, 8), -1024, 60), True),  # padded to the lowest number of 12 bits
        (half_bright((8, 8, 8), -998, 60), True),
        (half_bright((8, 8, 8), -998.0, 60.0, np.float32), True),
        (half_bright((8, 8, 8), -998.5, 60.0, np.float32), False),
        (half_bright((8, 8, 8), 0, 1000), False),  # MR
        (half_bright((8, 8, 8), -500, 500), False),
        (half_bright((8, 8, 8), -32768, 32767), False),
        (half_bright((8, 8, 8), -3000, -1000), False),  # nothing as dense as water
    ],
)
def test_ct_is_known_by_whole_numbers_with_air_at_minus_1000(data, hounsfield):
    assert ChannelFacts.of(data, 1.0, 0.0).hounsfield == hounsfield


def test_air_is_found_inside_the_circle_that_a_scanner_pads_with_lower_numbers():
    data = half_bright((8, 8, 8), -3024, 60)
    data[3] = -1000
    assert ChannelFacts.of(data, 1.0, 0.0).hounsfield


def test_the_scale_of_the_file_decides_what_hounsfield_units_are():
    stored = half_bright((8, 8, 8), 0, 1060, np.uint16)
    assert ChannelFacts.of(stored, 1.0, -1024.0).hounsfield
    assert not ChannelFacts.of(stored, 1.0, 0.0).hounsfield
    assert not ChannelFacts.of(stored, 0.5, -1024.0).whole_numbers


def test_pictures_and_few_slices_are_two_dimensional(tmp_path):
    write(tmp_path / "a.nii", half_bright((16, 3, 20)))
    found = measure(find_subjects(tmp_path))
    assert (found.spatial_dims, found.thinnest, found.kept_axes) == (2, 1, (0, 2))


def test_colors_of_a_picture_come_from_one_file(tmp_path):
    from PIL import Image

    color = np.zeros((12, 10, 3), np.uint8)
    color[4:] = (10, 20, 250)
    Image.fromarray(color).save(tmp_path / "a.png")
    found = measure(find_subjects(tmp_path))
    assert found.several_in_a_file
    assert [channel.highest for channel in found.channels] == [10, 20, 250]
    assert found.shape == (10, 12, 1)


def test_at_most_as_many_volumes_are_read_as_asked_for_and_the_same_ones_again(
    tmp_path, monkeypatch
):
    for number in range(9):
        write(tmp_path / f"{number}.nii", half_bright((8, 8, 8), high=1000 + number))
    read = []
    of = ChannelFacts.of
    monkeypatch.setattr(ChannelFacts, "of", lambda *args: read.append(args) or of(*args))
    subjects = find_subjects(tmp_path)
    found = measure(subjects, most=4)
    assert (found.num_volumes, found.num_measured, len(read)) == (9, 4, 4)
    assert measure(subjects, most=4) == found
    assert measure(subjects, most=4, seed=1) != found


def test_broken_volumes_and_odd_numbers_of_channels_are_told_and_left_out(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.nii", half_bright((8, 8, 8)))
    (tmp_path / "3.nii").write_bytes(b"no header")
    np.save(tmp_path / "4.npy", np.zeros((8, 8, 8), np.float32))
    write_volume(tmp_path / "5.nii", Volume(np.stack([half_bright((8, 8, 8), high=9)] * 2)))
    found = measure(find_subjects(tmp_path))
    assert sorted(error.path[-5:] for error in found.broken) == ["3.nii", "4.npy"]
    assert (found.num_others, len(found.channels), found.channels[0].highest) == (1, 1, 1000)
    text = "\n".join(found.lines())
    assert "6 (6 measured, 2 of them broken)" in text
    assert "1 (1 volumes have another number)" in text
    assert "all voxels are 0" in text


def test_what_is_not_finite_is_told_and_not_measured(tmp_path):
    data = half_bright((8, 8, 8), 1.5, 7.0, np.float32)
    data[0, 0] = np.nan
    write(tmp_path / "a.nii", data)
    found = measure(find_subjects(tmp_path))
    assert found.holes
    assert (found.channels[0].lowest, found.channels[0].highest) == (1.5, 7.0)


def test_a_data_set_of_broken_volumes_alone_is_an_error(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"no header")
    with pytest.raises(BrokenVolume, match=r"a\.nii"):
        measure(find_subjects(tmp_path))
