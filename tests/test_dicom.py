"""DICOM: values and places as the headers tell them, slice by slice; what is no image is left."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import (
    COLUMNS,
    ROWS,
    dataset,
    frame,
    image,
    save,
    segment_frame,
    shared,
    stored_slice,
    write_series,
)
from pydicom.pixels import apply_modality_lut, apply_rescale
from pydicom.sequence import Sequence

from loaders import (
    DataConfig,
    Preprocess,
    VolumeStore,
    find_subjects,
    open_data,
    read_volume,
    survey_data,
)
from loaders.build import FORMAT, Builder
from loaders.readers import BrokenVolume, Dicom, Reading, Volume, write_volume

ALL, LARGEST = Reading(dicom=Dicom(series="all")), Reading(dicom=Dicom(series="largest"))
RESAMPLE, LONGEST = Reading(dicom=Dicom(gaps="resample")), Reading(dicom=Dicom(gaps="longest"))


def stack(count: int) -> np.ndarray:
    """Stored numbers (X, Y, Z) of `write_series`."""
    return np.stack([stored_slice(n).T for n in range(count)], -1)


def by_pydicom(folder: Path) -> np.ndarray:
    """The intensities (X, Y, Z) of a series as pydicom gives them, sorted by height."""
    slices = [pydicom.dcmread(file) for file in folder.iterdir()]
    slices.sort(key=lambda data: data.ImagePositionPatient[2])
    return np.stack([apply_rescale(data.pixel_array, data).T for data in slices], -1)


# Values -------------------------------------------------------------------------------------------


def test_series_is_sorted_by_position_and_rescaled(tmp_path):
    folder = write_series(tmp_path / "a", RescaleSlope=2, RescaleIntercept=-1000)
    volume = read_volume(folder)
    assert volume.data.shape == (1, COLUMNS, ROWS, 4)
    assert np.array_equal(volume.intensities()[0], stack(4) * 2 - 1000)
    assert np.allclose(volume.spacing_mm, (0.5, 1.5, 3))
    assert np.allclose(volume.affine[:3, 3], (-10, 20, 30))


@pytest.mark.parametrize("slopes", [(1, 0.001, 0.001, 0.002), (1, 700, 900, 1.5), (0.5, 2, 1, 1)])
def test_each_slice_of_a_pet_has_its_own_slope_as_in_pydicom(tmp_path, slopes):
    def each(number):
        return {"RescaleSlope": slopes[number], "RescaleIntercept": number}

    volume = read_volume(write_series(tmp_path / "pet", kind="PT", each=each))
    expected = by_pydicom(tmp_path / "pet").astype(np.float32)
    assert volume.data.dtype == np.float32 and (volume.scale, volume.offset) == (1, 0)
    assert np.array_equal(volume.data[0], expected)
    assert expected[-1, -1, -1] == np.float32(slopes[3] * 329 + 3)


def test_slices_that_agree_keep_their_stored_integers(tmp_path):
    folder = write_series(tmp_path / "a", kind="MR", RescaleSlope=0.25, RescaleIntercept=-3)
    volume = read_volume(folder)
    assert volume.data.dtype == np.int16 and (volume.scale, volume.offset) == (0.25, -3)
    assert np.array_equal(volume.data[0], stack(4))
    assert np.array_equal(volume.intensities()[0], by_pydicom(folder).astype(np.float32))


@pytest.mark.parametrize("offsets", [[0, 3, 6, 9], [0, -3, -6, -9], [30, 33, 36, 39]])
def test_dose_is_scaled_by_its_grid_scaling_and_lies_where_its_offsets_say(tmp_path, offsets):
    frames = np.stack([stored_slice(n) for n in range(4)]).astype("<u4")
    data = image(
        "RTDOSE", frames, DoseGridScaling="0.0001", GridFrameOffsetVector=offsets,
        ImagePositionPatient=[10, -20, 30], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
    )  # fmt: skip
    volume = read_volume(save(data, tmp_path / "dose.dcm"))
    up = offsets[1] > offsets[0]
    assert np.allclose(volume.affine[:3, 3], (-10, 20, 30 if up else 21))
    expected = frames.T if up else frames.T[..., ::-1]
    assert np.allclose(volume.intensities()[0], expected * 1e-4, rtol=1e-6)
    assert np.allclose(volume.spacing_mm, (0.5, 1.5, 3))


def test_frames_of_an_enhanced_file_have_their_own_slope_and_place(tmp_path):
    frames = np.stack([stored_slice(n) for n in range(3)])
    groups = [
        frame([10, -20, 30 + 3 * z], slope=slope, intercept=z)
        for z, slope in ((2, 4), (0, 0.5), (1, 2))  # not in order of height
    ]
    data = image(
        "enhanced MR", frames,
        PerFrameFunctionalGroupsSequence=Sequence(groups), SharedFunctionalGroupsSequence=shared(),
    )  # fmt: skip
    volume = read_volume(save(data, tmp_path / "a.dcm"))
    expected = [frames[1] * 0.5, frames[2] * 2 + 1, frames[0] * 4 + 2]
    assert np.array_equal(volume.data[0], np.stack([plane.T for plane in expected], -1))
    assert np.allclose(volume.affine, np.diag([-0.5, -1.5, 3, 1]) + np.outer(
        [1, 1, 1, 0], [0, 0, 0, 1]) * [[-10], [20], [30], [0]])  # fmt: skip


@pytest.mark.parametrize(
    "dtype, name", [("<f4", "FloatPixelData"), ("<f8", "DoubleFloatPixelData")]
)
def test_a_parametric_map_of_floats_is_read(tmp_path, dtype, name):
    values = np.random.default_rng(0).normal(size=(3, ROWS, COLUMNS)).astype(dtype)
    data = image("map", values, Modality="MR", SliceThickness=2, **{name: values.tobytes()})
    del data.PixelData
    volume = read_volume(save(data, tmp_path / "a.dcm"))
    assert np.array_equal(volume.data[0], values.T) and volume.spacing_mm == (0.5, 1.5, 2)


def test_frames_of_nuclear_medicine_lie_where_their_detector_says(tmp_path):
    detector = pydicom.Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [1, 2, 9], [1, 0, 0, 0, 1, 0]
    frames = np.stack([stored_slice(n) for n in range(3)])
    data = image(
        "NM", frames, SpacingBetweenSlices=-4, DetectorInformationSequence=Sequence([detector])
    )
    volume = read_volume(save(data, tmp_path / "a.dcm"))
    assert np.array_equal(volume.data[0], frames[::-1].T)  # counted downwards
    assert np.allclose(volume.affine[:3, 2:], [[0, -1], [0, -2], [4, 1]])


def test_frames_of_several_orientations_are_no_volume(tmp_path):
    groups = [frame([0, 0, 3 * z]) for z in range(3)]
    turned = shared()[0].PlaneOrientationSequence[0]
    turned.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    groups[1].PlaneOrientationSequence = Sequence([turned])
    data = image(
        "enhanced MR", np.stack([stored_slice(n) for n in range(3)]),
        PerFrameFunctionalGroupsSequence=Sequence(groups), SharedFunctionalGroupsSequence=shared(),
    )  # fmt: skip
    path = save(data, tmp_path / "a.dcm")
    with pytest.raises(BrokenVolume, match=r"mixes 2 series, sizes or orientations"):
        read_volume(path)
    assert np.array_equal(read_volume(path, LARGEST).data[0], stack(3)[..., ::2])


def segmentation(path: Path, segments: list[int], heights: list[float], frames: np.ndarray) -> Path:
    groups = [segment_frame([0, 0, z], n) for z, n in zip(heights, segments, strict=True)]
    data = image(
        "SEG", frames.astype(np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0,
        PixelData=np.packbits(frames, bitorder="little").tobytes() + b"\0",
        SegmentationType="BINARY", SharedFunctionalGroupsSequence=shared(),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
    )  # fmt: skip
    return save(data, path)


def test_segmentation_is_0_and_1_and_planes_that_it_leaves_out_are_empty(tmp_path):
    frames = np.random.default_rng(0).random((3, ROWS, COLUMNS)) > 0.5
    volume = read_volume(segmentation(tmp_path / "a.dcm", [1, 1, 1], [12, 0, 3], frames))
    assert volume.data.shape == (1, COLUMNS, ROWS, 5) and set(np.unique(volume.data)) == {0, 1}
    assert np.array_equal(volume.data[0][..., [4, 0, 1]], frames.T) and volume.scale == 1
    assert not volume.data[0][..., 2:4].any() and volume.spacing_mm[2] == pytest.approx(3)


def test_several_segments_are_told_apart_by_their_numbers(tmp_path):
    frames = np.zeros((3, ROWS, COLUMNS), bool)
    frames[0, :2], frames[1, 2:4], frames[2, :3] = True, True, True
    volume = read_volume(segmentation(tmp_path / "a.dcm", [1, 4, 4], [0, 0, 3], frames))
    assert volume.data.shape[3] == 2
    assert list(volume.data[0, 0, :, 0]) == [1, 1, 4, 4, 0, 0]
    assert list(volume.data[0, 0, :, 1]) == [4, 4, 4, 0, 0, 0]


def test_an_x_ray_whose_low_numbers_are_white_is_turned_and_a_pet_is_not(tmp_path):
    stored = stored_slice(1).astype("<u2")
    how = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    x_ray = read_volume(save(image("DX", stored, **how), tmp_path / "a.dcm"))
    assert np.array_equal(x_ray.intensities()[0, ..., 0], 4095 - stored.T)
    pet = read_volume(save(image("PT", stored, **how), tmp_path / "b.dcm"))
    assert np.array_equal(pet.intensities()[0, ..., 0], stored.T)


def test_a_table_of_intensities_is_applied_as_in_pydicom(tmp_path):
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [400, 0, 16])
    table.add_new("LUTData", "US", [int(v) for v in np.arange(400) ** 2 % 60000])
    table.ModalityLUTType = "US"
    data = image("DX", stored_slice(2).astype("<u2"), ModalityLUTSequence=Sequence([table]))
    path = save(data, tmp_path / "a.dcm")
    expected = apply_modality_lut(data.pixel_array, data)
    assert np.array_equal(read_volume(path).intensities()[0, ..., 0], expected.T)
    assert expected[0, 3] == 203**2


def test_bits_beside_the_stored_ones_are_no_intensities(tmp_path):
    values = np.arange(-15, 15, dtype="<i2").reshape(ROWS, COLUMNS)
    overlay = (values & 0x0FFF) | 0x5000  # 12 bits, two's complement, and an overlay above them
    how = {"BitsStored": 12, "HighBit": 11}
    path = save(image("CT", overlay.astype("<i2"), **how), tmp_path / "a.dcm")
    assert np.array_equal(read_volume(path).data[0, ..., 0], values.T)
    unsigned = image("CT", (np.abs(values) | 0x5000).astype("<u2"), **how)
    path = save(unsigned, tmp_path / "b.dcm")
    assert np.array_equal(read_volume(path).data[0, ..., 0], np.abs(values).T)


@pytest.mark.parametrize("slope", [1, 0.001])
def test_compressed_slices_are_read_like_others(tmp_path, slope):
    def each(number):  # GDCM takes no run lengths of 6 x 5 pixels
        noise = np.random.default_rng(number).integers(-999, 999, (64, 48), np.int16)
        return {"Rows": 64, "Columns": 48, "PixelData": noise.tobytes()}

    how = {"RescaleSlope": slope, "RescaleIntercept": 7}
    plain = write_series(tmp_path / "plain", kind="PT", each=each, **how)
    (tmp_path / "rle").mkdir()
    for file in plain.iterdir():
        data = pydicom.dcmread(file)
        data.compress(pydicom.uid.RLELossless)
        data.save_as(tmp_path / "rle" / file.name)
    volume, expected = read_volume(tmp_path / "rle"), read_volume(plain)
    assert np.array_equal(volume.data, expected.data) and volume.data.dtype == np.int16
    assert (volume.scale, volume.offset) == (slope, 7)
    file = next((tmp_path / "rle").iterdir())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BrokenVolume, match="truncated: a compressed fragment is cut"):
        read_volume(tmp_path / "rle")


@pytest.mark.parametrize("name", ["MR_small_bigendian", "MR_small_implicit", "MR_small_padded",
    "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_RLE"])  # fmt: skip
def test_every_way_of_writing_the_numbers_gives_the_same(name):
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    expected = read_volume(folder / "MR_small.dcm")
    volume = read_volume(folder / f"{name}.dcm")
    assert np.array_equal(volume.data, expected.data) and volume.data.std() > 100
    assert np.array_equal(volume.affine, expected.affine)


def test_times_at_one_position_are_the_fourth_dimension(tmp_path):
    def each(number):  # slices 0 and 1 at time 0, then the same again
        place = {"ImagePositionPatient": [0, 0, 3 * (number % 2)]}
        return place | {"RescaleSlope": 1 + number // 2, "RescaleIntercept": 0}

    folder = write_series(tmp_path / "a", each=each)
    with pytest.raises(BrokenVolume, match=r"is 4D \(5x6x2x2\): set volumes_4d"):
        read_volume(folder)
    volume = read_volume(folder, Reading(volumes_4d="channels"))
    assert np.array_equal(volume.data[0], stack(2))
    assert np.array_equal(volume.data[1], stack(4)[..., 2:] * 2)


def test_threads_read_series_at_once(tmp_path):
    folders = [
        write_series(tmp_path / f"s{n}", 6, RescaleSlope=n + 1, RescaleIntercept=0)
        for n in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        volumes = list(pool.map(read_volume, folders * 3))
    for number, volume in enumerate(volumes):
        assert np.array_equal(volume.intensities()[0], stack(6) * (number % 8 + 1))


# Places -------------------------------------------------------------------------------------------

TILT = np.deg2rad(20)


def tilted(folder: Path, count: int = 12) -> Path:
    """Slices tilted by 20 degrees, their positions straight along z."""
    across = [1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)]
    return write_series(folder, count, ImageOrientationPatient=across)


def test_a_tilted_gantry_gives_a_sheared_affine_that_puts_each_slice_in_its_place(tmp_path):
    volume = read_volume(tilted(tmp_path / "a"))
    for number in range(12):
        assert np.allclose(
            volume.affine @ [0, 0, number, 1], [-10, 20, 30 + 3 * number, 1], atol=1e-9
        )
        corner = volume.affine @ [4, 5, number, 1]
        down = 7.5 * np.array([0, -np.cos(TILT), -np.sin(TILT)])
        assert np.allclose(corner[:3], [-12, 20, 30 + 3 * number] + down, atol=1e-9)
    assert np.array_equal(volume.data[0], stack(12))


def test_what_cannot_hold_a_shear_is_not_given_one(tmp_path):
    volume = read_volume(tilted(tmp_path / "a"))
    write_volume(tmp_path / "a.nii", volume)
    image = nib.load(tmp_path / "a.nii")
    assert np.allclose(image.affine, volume.affine, atol=1e-5)
    assert image.header["qform_code"] == 0  # a reader that takes the qform would be 11 mm off
    again = read_volume(tmp_path / "a.nii")
    assert np.allclose(again.affine, volume.affine, atol=1e-5)
    write_volume(tmp_path / "b.nii", Volume(volume.data, np.diag([2.0, 3, 4, 1])))
    assert nib.load(tmp_path / "b.nii").header["qform_code"] == 1


@pytest.mark.parametrize("options", [{}, {"spacing_mm": (0.7, 1.1, 1.3)}, {"pad_to_multiple": 4}])
def test_a_sheared_volume_is_oriented_resampled_and_brought_back(tmp_path, options):
    def each(number):  # intensity = height of the voxel in millimeters, times 100
        height = 30 + 3 * number + np.arange(16)[:, None] * 1.5 * -np.sin(TILT) + np.zeros(24)
        numbers = np.rint(100 * height).astype("<i2").tobytes()
        return {"PixelData": numbers, "Rows": 16, "Columns": 24}

    folder = write_series(
        tmp_path / "a", 12, each=each,
        ImageOrientationPatient=[1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)],
    )  # fmt: skip
    preprocess = Preprocess(intensity="raw", **options)
    store = VolumeStore.build([folder], tmp_path / "cache", preprocess)
    x, affine = store.read(0), np.array(store.meta(0)["affine"])
    inside = np.indices(x.shape[1:])[:, 4:-6, 4:-6, 4:-6].reshape(3, -1)
    heights = (affine @ np.vstack([inside, np.ones(inside.shape[1])]))[2]
    assert inside.shape[1] > 50 and np.allclose(x[0][tuple(inside)], 100 * heights, atol=3)
    back, source = store.undo(0, x), read_volume(folder)
    assert back.data.shape == source.data.shape and np.allclose(back.affine, source.affine)
    middle = (0, slice(1, -1), slice(1, -1), slice(1, -1))
    assert np.allclose(back.data[middle], source.data[middle], atol=60)  # 0.6 mm of a ramp


def test_a_drift_within_the_tolerance_is_rounding_and_no_tilt(tmp_path):
    def each(number):
        return {"ImagePositionPatient": [10 + 0.004 * number, -20, 30 + 3 * number]}

    affine = read_volume(write_series(tmp_path / "a", each=each)).affine
    assert np.array_equal(affine[:3, :3], np.diag([-0.5, -1.5, 3]))


def test_rounded_orientations_and_positions_are_within_the_tolerance(tmp_path):
    def each(number):
        return {
            "ImageOrientationPatient": [1, 1e-6 * number, 0, 0, 1, -1e-6 * number],
            "ImagePositionPatient": [0, 0, round(0.623 * number, 2)],
        }

    volume = read_volume(write_series(tmp_path / "a", 9, each=each))
    assert np.array_equal(volume.data[0], stack(9))
    assert np.allclose(volume.affine, np.diag([-0.5, -1.5, round(0.623 * 8, 2) / 8, 1]), atol=1e-5)
    with pytest.raises(BrokenVolume, match=r"mixes 9 series, sizes or orientations"):
        read_volume(tmp_path / "a", Reading(dicom=Dicom(tolerance_mm=1e-7)))


def uneven(heights: list[float]):
    return lambda number: {"ImagePositionPatient": [0, 0, heights[number]]}


def test_uneven_slices_are_told_and_resampled_where_asked_for(tmp_path, capsys):
    heights = [0, 3, 5, 8, 11, 14.0]
    ramp = lambda number: {  # noqa: E731
        "ImagePositionPatient": [0, 0, heights[number]],
        "PixelData": np.full((ROWS, COLUMNS), 100 * heights[number], "<i2").tobytes(),
    }
    folder = write_series(tmp_path / "a", 6, each=ramp)
    with pytest.raises(BrokenVolume, match=r"2 to 3 mm apart; set data\.dicom\.gaps to resample"):
        read_volume(folder)
    volume = read_volume(folder, RESAMPLE)
    assert volume.data.dtype == np.int16 and volume.data.shape[3] == 6
    assert volume.spacing_mm[2] == pytest.approx(2.8)
    assert np.allclose(volume.data[0, 2, 2], 280 * np.arange(6), atol=0.5)  # the ramp stays one
    assert "6 slices are resampled to 6 even ones" in capsys.readouterr().err
    read_volume(folder, Reading(dicom=Dicom(tolerance_mm=0.7)))  # as even, said the user


def test_a_missing_slice_is_an_error_filled_or_cut_away(tmp_path, capsys):
    folder = write_series(tmp_path / "a", 8, each=lambda number: None if number == 2 else {})
    with pytest.raises(BrokenVolume) as caught:
        read_volume(folder)
    assert "gap of 6 mm after 1.2.3.7 (slices are 3 mm apart)" in str(caught.value)
    assert "set data.dicom.gaps to resample or longest" in str(caught.value)
    filled = read_volume(folder, RESAMPLE)
    assert np.array_equal(filled.data[0], stack(8))  # the stored numbers are a ramp, too
    longest = read_volume(folder, LONGEST)
    assert np.array_equal(longest.data[0], stack(8)[..., 3:])
    assert np.allclose(longest.affine[:3, 3], (-10, 20, 39))
    assert "5 of 7 slices are without a gap" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1e-3, 1])
def test_a_missing_slice_is_found_however_small_the_voxels(tmp_path, scale):
    folder = write_series(
        tmp_path / "a", 6, PixelSpacing=[scale, scale],
        each=lambda n: None if n == 3 else {"ImagePositionPatient": [0, 0, n * scale]},
    )  # fmt: skip
    with pytest.raises(BrokenVolume, match="slices are missing"):
        read_volume(folder)


def test_slices_beside_a_line_and_slices_twice_are_told(tmp_path):
    def each(number):
        return {"ImagePositionPatient": [4 * (number == 2), 0, 3 * number]}

    with pytest.raises(BrokenVolume, match=r"beside a straight line, so no grid holds them"):
        read_volume(write_series(tmp_path / "aside", each=each))
    folder = write_series(tmp_path / "twice")
    (folder / "again").write_bytes((folder / "1.2.3.2").read_bytes())
    with pytest.raises(BrokenVolume, match=r"same position, 1\.2\.3\.2 and again"):
        read_volume(folder)
    folder = write_series(tmp_path / "all twice")
    for file in list(folder.iterdir()):
        (folder / f"copy of {file.name}").write_bytes(file.read_bytes())
    with pytest.raises(BrokenVolume, match=r"same position, 1\.2\.3\.4 and copy of 1\.2\.3\.4"):
        read_volume(folder)
    folder = write_series(tmp_path / "nowhere", ImagePositionPatient=None)
    with pytest.raises(BrokenVolume, match="does not tell where it lies"):
        read_volume(folder)


# Series -------------------------------------------------------------------------------------------


@pytest.fixture
def two_series(tmp_path) -> Path:
    folder = write_series(tmp_path / "data" / "p1", 5, SeriesDescription="T1 MPRAGE/sag")
    write_series(folder, 3, series="1.2.9", SeriesDescription="T2", RescaleSlope=2,
                 RescaleIntercept=1)  # fmt: skip
    write_series(tmp_path / "data" / "p2", 4, series="1.2.7", SeriesDescription="T1")
    return tmp_path / "data"


def test_several_series_are_an_error_that_names_the_option(two_series, capsys):
    with pytest.raises(BrokenVolume) as caught:
        read_volume(two_series / "p1")
    assert "mixes 2 series, sizes or orientations: T1_MPRAGE_sag (5), T2 (3)" in str(caught.value)
    assert "set data.dicom.series to largest or all" in str(caught.value)
    assert np.array_equal(read_volume(two_series / "p1", LARGEST).data[0], stack(5))
    assert "T1_MPRAGE_sag, 5 slices, is taken of 2 series" in capsys.readouterr().err


def test_each_series_is_a_volume_named_by_its_description(two_series, tmp_path):
    subjects = find_subjects(two_series, ALL)
    assert [subject.id for subject in subjects] == ["p1__T1_MPRAGE_sag", "p1__T2", "p2"]
    store = VolumeStore.build(subjects, tmp_path / "cache", Preprocess(
        intensity="raw", orient_ras=False), reading=ALL)  # fmt: skip
    assert np.array_equal(store.read(0)[0], stack(5))
    assert np.array_equal(store.read(1)[0], stack(3) * 2 + 1)
    assert np.array_equal(store.read(2)[0], stack(4))
    again = VolumeStore.build(subjects, tmp_path / "cache", store.preprocess, reading=ALL)
    assert [entry.key for entry in again.entries] == [entry.key for entry in store.entries]
    config = DataConfig(root=str(two_series), cache_dir=str(tmp_path / "c"), dicom=ALL.dicom)
    opened, split = open_data(config)
    assert sorted(opened.ids) == sorted(id for ids in split.values() for id in ids)
    survey = survey_data(config)
    assert len(opened) == 3 == len(survey.subjects)
    assert survey.read_voxels() == survey.faults == []


def test_series_of_one_description_and_files_of_that_name_stay_apart(tmp_path):
    folder = write_series(tmp_path / "p1", 4, SeriesDescription="T1")
    write_series(folder, 3, series="1.2.9", SeriesDescription="T1")
    np.save(tmp_path / "p1__T1.npy", np.ones((2, 2, 2)))
    ids = [subject.id for subject in find_subjects(tmp_path, ALL)]
    assert sorted(ids) == ["p1__T1", "p1__T1_2", "p1__T1_3"]


def test_a_series_is_named_in_a_manifest_by_its_uid(two_series, tmp_path):
    (two_series / "m.csv").write_text("path\np1#1.2.9\np2\n")
    first, second = find_subjects(two_series / "m.csv")
    assert np.array_equal(read_volume(first.paths[0]).data[0], stack(3))
    assert np.array_equal(read_volume(second.paths[0]).data[0], stack(4))
    (subject,) = find_subjects(f"{two_series / 'p1'}#1.2.3")
    assert np.array_equal(read_volume(subject.paths[0]).data[0], stack(5))
    with pytest.raises(BrokenVolume, match=r"no such series; the folder holds 1\.2\.3 1\.2\.9"):
        read_volume(f"{two_series / 'p1'}#1.2.8")


def test_a_scout_in_a_series_is_a_part_of_its_own(tmp_path):
    folder = write_series(tmp_path / "a", 4)
    scout = image(
        "CT", stored_slice(0), InstanceNumber=9, ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1], SeriesDescription="scout",
    )  # fmt: skip
    save(scout, folder / "scout")
    with pytest.raises(BrokenVolume, match=r"mixes 2 series, sizes or orientations"):
        read_volume(folder)
    assert np.array_equal(read_volume(folder, LARGEST).data[0], stack(4))
    paths = [subject.paths[0].name for subject in find_subjects(tmp_path, ALL)]
    assert paths == ["a#1.2.3", "a#1.2.3-2"]
    assert read_volume(tmp_path / "a#1.2.3-2").data.shape == (1, 5, 6, 1)


def test_a_color_capture_beside_a_series_is_a_series_of_its_own(tmp_path):
    folder = write_series(tmp_path / "a", 4, SeriesDescription="head")
    capture = image(
        "CT", np.zeros((3 * ROWS, COLUMNS), np.uint8), Rows=ROWS, SamplesPerPixel=3,
        PlanarConfiguration=0, PhotometricInterpretation="RGB", SeriesInstanceUID="1.5",
        SeriesDescription="dose report",
    )  # fmt: skip
    save(capture, folder / "z")
    with pytest.raises(BrokenVolume, match=r"head \(4\), dose_report \(1\); set data"):
        read_volume(folder)
    assert np.array_equal(read_volume(folder, LARGEST).data[0], stack(4))
    with pytest.raises(BrokenVolume, match="holds colors"):
        read_volume(tmp_path / "a#1.5")


def test_a_broken_folder_does_not_end_the_search_for_series(two_series):
    write_series(two_series / "p3", 2, BitsAllocated=12, BitsStored=12, HighBit=11)
    assert [subject.id for subject in find_subjects(two_series, ALL)][-1] == "p3"
    survey = survey_data(DataConfig(root=str(two_series), dicom=ALL.dicom))
    survey.read_voxels()
    assert len(survey.subjects) == 4 and "12 bits" in str(survey.faults[0])


# Finding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["{}.IMA", "1.3.12.2.1107.5.2.{}", "MR.1.2.840.{}", "{}.dicom", "IM{}", "{}.DCM"]
)
def test_dicom_is_found_by_asking_the_file_not_its_name(tmp_path, name):
    write_series(tmp_path / "p1" / "scan", 3, name=lambda number: name.format(number))
    (subject,) = find_subjects(tmp_path)
    assert subject.id == "p1__scan" and subject.paths == (tmp_path / "p1" / "scan",)
    assert np.array_equal(read_volume(subject.paths[0]).data[0], stack(3))
    file = tmp_path / "p1" / "scan" / name.format(1)
    assert np.array_equal(read_volume(file).data[0, ..., 0], stored_slice(1).T)
    assert len(find_subjects(tmp_path / "p1" / "scan" / "*")) == 3


def test_a_folder_without_volumes_says_what_it_holds_instead(tmp_path):
    save(dataset("RTSTRUCT"), tmp_path / "rs.dcm")
    (tmp_path / "cells.oib").touch()
    with pytest.raises(ValueError, match=r"holds no volumes .* passed over 2 files: 1 \.oib, 1 RT"):
        find_subjects(tmp_path)


def test_objects_without_an_image_are_passed_over_and_listed_in_one_line(tmp_path, capsys):
    folder = write_series(tmp_path / "data" / "p1", 3)
    for number, kind in enumerate(["RTSTRUCT", "SR", "PR", "PR", "CSA"]):
        save(dataset(kind, SeriesInstanceUID=f"1.9.{number}"), folder / f"object{number}.dcm")
    save(dataset("DICOMDIR"), tmp_path / "data" / "DICOMDIR")
    save(dataset("RTSTRUCT"), tmp_path / "data" / "plans" / "rs.dcm")
    for name in ("cells.oib", "more.OIB", "p1/README", "brain.n5/0/0", "m.raw", "m.mhd"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"x")
    assert [subject.id for subject in find_subjects(tmp_path / "data")] == ["m", "p1"]
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'data'}: passed over 11 files: 2 .oib, 1 .n5, 1 without suffix, 2 "
        f"Grayscale Softcopy Presentation State, 2 RT Structure Set, 1 Basic Text SR, 1 Media "
        f"Storage Directory, 1 private object 1.3.12.2.1107.5.9.1"
    ]
    assert np.array_equal(read_volume(folder).data[0], stack(3))
    find_subjects(tmp_path / "data" / "p1" / "object0.dcm")  # named by the user: told when read
    with pytest.raises(BrokenVolume, match="holds no DICOM image"):
        read_volume(folder / "object0.dcm")


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path, capsys):
    write_series(tmp_path / "p1", 3)
    find_subjects(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_file_that_claims_to_be_dicom_and_is_none_is_no_missing_slice(tmp_path):
    folder = write_series(tmp_path / "a", name=lambda number: f"{number}.dcm")
    (folder / "3.dcm").write_bytes(b"\0" * 5000)
    with pytest.raises(BrokenVolume, match=r"3\.dcm: "):
        read_volume(folder)
    bare = pydicom.dcmread(write_series(tmp_path / "b") / "1.2.3.1")
    (tmp_path / "old").mkdir()
    for name in ("old/a.dcm", "old/b"):  # of before the 128 bytes that stand in front
        pydicom.dcmwrite(
            tmp_path / name, bare, force_encoding=True, implicit_vr=False, little_endian=True
        )
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[raw.index(b"\x08\0\x16\0UI") :])
    (tmp_path / "old" / "b").unlink()
    assert np.array_equal(read_volume(tmp_path / "old").data[0, ..., 0], stored_slice(3).T)


@pytest.mark.parametrize("attributes, words", [
    ({"Rows": 60000, "Columns": 60000}, "header claims 7200000000 bytes"),
    ({"NumberOfFrames": 400000}, "header claims"),
    ({"Rows": 12}, "header claims"),
    ({"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11}, "12 bits"),
    ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "holds colors"),
    ({"PixelData": None}, "holds no pixels"),
    ({"RescaleSlope": 0}, "intensity scale is 0"),
    ({"PixelSpacing": [0, 1]}, "affine"),
])  # fmt: skip
def test_lying_headers_are_told(tmp_path, attributes, words):
    data = image("CT", stored_slice(0), **attributes)
    if data.PixelData is None:
        del data.PixelData
    with pytest.raises(BrokenVolume, match=words) as caught:
        read_volume(save(data, tmp_path / "a.dcm"))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# Options ------------------------------------------------------------------------------------------


def test_options_at_their_defaults_leave_the_names_of_cached_volumes_as_they_were(tmp_path):
    preprocess = Preprocess()
    old = json.dumps([FORMAT, preprocess.geometry(), "error", "error", "npy"], sort_keys=True)
    assert Builder(tmp_path, preprocess, Reading()).recipe == old
    others = {Builder(tmp_path, preprocess, how).recipe for how in (ALL, LARGEST, RESAMPLE)}
    assert len(others) == 3 and old not in others


def test_dicom_in_a_cache_of_before_is_read_anew_and_nothing_else(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(60.0).reshape(3, 4, 5))
    paths = [tmp_path / "a.npy", write_series(tmp_path / "b")]
    monkeypatch.setattr("loaders.build.holds_dicom", lambda path: False)
    before = [entry.key for entry in VolumeStore.build(paths, tmp_path / "c").entries]
    monkeypatch.undo()
    after = [entry.key for entry in VolumeStore.build(paths, tmp_path / "c").entries]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_record_without_the_options_means_their_defaults():
    assert Reading.of({"nan": "fill"}) == Reading(nan="fill")
    told = json.loads(json.dumps({"dicom": {"gaps": "longest"}}))
    assert Reading.of(told) == Reading(dicom=Dicom(gaps="longest"))
    for wrong in ({"gaps": "fill"}, {"series": "first"}, {"tolerance_mm": -1}):
        with pytest.raises(ValueError, match=r"data\.dicom\."):
            Dicom(**wrong)
