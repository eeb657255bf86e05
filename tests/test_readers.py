"""Readers: every format gives voxels and affine; a damaged file is named with its reason."""

import gzip
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from dicoms import image, save

from loaders.readers import (
    READERS,
    BrokenVolume,
    Reading,
    Volume,
    read_volume,
    volume_suffix,
    write_volume,
)
from loaders.readers.volume import LPS_TO_RAS

SHAPE = (5, 6, 7)
AFFINE = np.array([[0, -1.5, 0, 10], [2, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1.0]])


def numbers(dtype="<i2", shape=SHAPE) -> np.ndarray:
    """Values that encode their position."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def nifti(path: Path, data: np.ndarray, affine=AFFINE, cls=nib.Nifti1Image) -> Path:
    image = cls(data, affine, dtype=data.dtype)
    nib.save(image, path)
    return path


def broken(path: Path, *words: str, **options) -> BrokenVolume:
    """Read a file that must be refused, in one line with its name and these words."""
    with pytest.raises(BrokenVolume) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message, message
    return caught.value


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("cls", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_gives_voxels_and_affine(tmp_path, suffix, cls):
    path = nifti(tmp_path / "plain.nii.gz", numbers(), cls=cls)
    if suffix == ".nii":
        path = tmp_path / "plain.nii"
        path.write_bytes(gzip.decompress((tmp_path / "plain.nii.gz").read_bytes()))
    path = path.rename(tmp_path / f"two.dots and \u00fcml\u00e4ut{suffix}")
    volume = read_volume(path)
    assert volume.data.dtype == np.int16 and volume.data.shape == (1, *SHAPE)
    assert np.array_equal(volume.data[0], numbers())
    assert np.allclose(volume.affine, AFFINE)
    assert np.allclose(volume.spacing_mm, (2, 1.5, 3))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("code", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_nifti_of_every_dtype_and_byte_order(tmp_path, code, order):
    data = numbers(order + code)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(data.dtype)
    image = nib.Nifti1Image(data, AFFINE, header, dtype=data.dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.data.dtype == np.dtype(code)  # native
    assert np.array_equal(volume.data[0], data)


def test_slope_and_intercept_stay_beside_the_stored_numbers(tmp_path):
    image = nib.Nifti1Image(numbers(), AFFINE)
    image.header.set_slope_inter(-2.5, 7)
    image = nib.Nifti1Image(image.dataobj, AFFINE, image.header)
    write_volume(tmp_path / "a.nii.gz", Volume(numbers()[None], AFFINE, -2.5, 7.0))
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.data.dtype == np.int16 and (volume.scale, volume.offset) == (-2.5, 7.0)
    assert np.allclose(volume.intensities()[0], numbers() * -2.5 + 7)
    assert np.allclose(
        nib.load(tmp_path / "a.nii.gz").get_fdata(), volume.intensities()[0], atol=1e-3
    )


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("micron", 1e-3), ("meter", 1e3)])
def test_nifti_in_micrometers_or_meters_becomes_millimeters(tmp_path, unit, factor):
    image = nib.Nifti1Image(numbers(), np.diag([2.0, 2, 2, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    assert np.allclose(read_volume(tmp_path / "a.nii").spacing_mm, 2 * factor)


def test_nifti_pair_reads_the_img_beside_it(tmp_path):
    nib.save(nib.Nifti1Pair(numbers(), AFFINE), tmp_path / "a.hdr")
    assert np.array_equal(read_volume(tmp_path / "a.hdr").data[0], numbers())
    (tmp_path / "a.img").unlink()
    broken(tmp_path / "a.hdr", "lacks a.img")


def test_mgz_equals_what_nibabel_reads(tmp_path):
    nib.save(nib.MGHImage(numbers("f4"), AFFINE), tmp_path / "a.mgz")
    volume = read_volume(tmp_path / "a.mgz")
    assert np.array_equal(volume.data[0], numbers("f4"))
    assert np.allclose(volume.affine, AFFINE, atol=1e-5)


def tilted_image(dtype=np.int16) -> sitk.Image:
    """An oblique image with its own spacing and origin."""
    image = sitk.GetImageFromArray(numbers(dtype).T.copy())
    angle = 0.3
    c, s = np.cos(angle), np.sin(angle)
    image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    image.SetSpacing((0.5, 1.5, 3))
    image.SetOrigin((10, -20, 30))
    return image


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "a.nii.gz"])
def test_formats_of_itk_agree_with_simpleitk(tmp_path, name, dtype, compressed):
    image = tilted_image(dtype)
    sitk.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    volume = read_volume(tmp_path / name)
    assert volume.data.dtype == dtype
    assert np.array_equal(volume.data[0], numbers(dtype))
    for index in [(0, 0, 0), (4, 0, 0), (1, 2, 3)]:
        point = LPS_TO_RAS[:3, :3] @ image.TransformIndexToPhysicalPoint(index)
        assert np.allclose((volume.affine @ [*index, 1])[:3], point, atol=1e-4)


def test_big_endian_nrrd_with_channels_and_no_directions(tmp_path):
    data = numbers(">i2", (2, 3, 4, 5))
    header = (
        "NRRD0004\n# comment\ntype: short\ndimension: 4\nsizes: 2 3 4 5\nencoding: gzip\n"
        "endian: big\nkinds: vector domain domain domain\nspacings: nan 1 2 3\nkey:=value\n\n"
    )
    path = tmp_path / "a.nrrd"
    path.write_bytes(header.encode() + gzip.compress(data.tobytes("F")))
    broken(path, "is 4D", "volumes_4d")
    volume = read_volume(path, Reading(volumes_4d="channels"))
    assert np.array_equal(volume.data, data) and volume.spacing_mm == (1, 2, 3)


def test_npy_and_npz_in_c_and_fortran_order(tmp_path):
    for data in (numbers(), np.asfortranarray(numbers(">f8"))):
        np.save(tmp_path / "a.npy", data)
        assert np.array_equal(read_volume(tmp_path / "a.npy").data[0], data)
        np.savez_compressed(tmp_path / "a.npz", data=data, affine=AFFINE)
        volume = read_volume(tmp_path / "a.npz")
        assert np.array_equal(volume.data[0], data) and np.allclose(volume.affine, AFFINE)
        np.savez(tmp_path / "b.npz", data, spacing_mm=[1, 2, 3])
        assert read_volume(tmp_path / "b.npz").spacing_mm == (1, 2, 3)


def test_tiff_stack_with_imagej_and_ome_voxel_size(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stack = numbers("u2").T.copy()  # (Z, Y, X)
    metadata = {"axes": "ZYX", "spacing": 3.0, "unit": "um"}
    tifffile.imwrite(
        tmp_path / "a.tif", stack, imagej=True, resolution=(2.0, 4.0), metadata=metadata
    )
    volume = read_volume(tmp_path / "a.tif")
    assert np.array_equal(volume.data[0], numbers("u2"))
    assert np.allclose(volume.spacing_mm, (0.0005, 0.00025, 0.003))
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 1, "PhysicalSizeZ": 2}
    tifffile.imwrite(
        tmp_path / "b.ome.tif", stack, metadata={"axes": "ZYX", **sizes}, compression="zlib"
    )
    volume = read_volume(tmp_path / "b.ome.tif")
    assert np.array_equal(volume.data[0], numbers("u2"))
    assert np.allclose(volume.spacing_mm, (0.0005, 0.001, 0.002))


def test_pictures_have_x_to_the_right_and_colors_as_channels(tmp_path):
    from PIL import Image

    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert np.array_equal(read_volume(tmp_path / "a.png").data[0, :, :, 0], gray.T)
    color = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    Image.fromarray(color).save(tmp_path / "b.png")
    volume = read_volume(tmp_path / "b.png")
    assert volume.data.shape == (3, 4, 3, 1)
    assert np.array_equal(volume.data[1, :, :, 0], color[..., 1].T)
    Image.fromarray(gray).save(tmp_path / "c.JPEG")
    assert read_volume(tmp_path / "c.JPEG").data.shape == (1, 4, 3, 1)


def test_folder_of_slices_is_a_stack_in_natural_order(tmp_path):
    from PIL import Image

    planes = np.random.default_rng(0).integers(0, 255, (12, 3, 4), np.uint8)  # (Z, Y, X)
    for z, plane in enumerate(planes):
        Image.fromarray(plane).save(tmp_path / f"slice_{z}.png")
    assert np.array_equal(read_volume(tmp_path).data[0], planes.T)
    Image.fromarray(planes[0, :2]).save(tmp_path / "slice_5.png")
    with pytest.raises(BrokenVolume, match=r"slice_5\.png: differs"):
        read_volume(tmp_path)


def test_four_dimensions_need_leave(tmp_path):
    data = numbers(shape=(3, 4, 5, 2))
    path = nifti(tmp_path / "a.nii.gz", data)
    broken(path, "is 4D (3x4x5x2)", "volumes_4d")
    assert np.array_equal(
        read_volume(path, Reading(volumes_4d="channels")).data, np.moveaxis(data, 3, 0)
    )
    assert np.array_equal(read_volume(path, Reading(volumes_4d="first")).data[0], data[..., 0])
    path = nifti(tmp_path / "b.nii.gz", data[..., :1])  # a trailing 1 is no fourth dimension
    assert read_volume(path).data.shape == (1, 3, 4, 5)


def test_first_suffix_that_fits_decides_the_reader():
    assert volume_suffix("A B.c.NII.gz") == ".nii.gz"
    assert volume_suffix("a.gz") is None
    assert all(suffix == suffix.lower() for suffix in READERS)


# Damaged files ------------------------------------------------------------------------------------


def test_truncated_and_bit_flipped_gzip_are_told(tmp_path):
    path = nifti(
        tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype("i2")
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    broken(path, "truncated gzip")
    path.write_bytes(whole[: len(whole) // 2])
    broken(path)
    for place in (len(whole) // 2, len(whole) - 6, len(whole) - 2):  # data, CRC, length
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        broken(path, "damaged gzip stream")
    path.write_bytes(whole + b"\0" * 100)  # tape padding is harmless
    assert read_volume(path).data.shape == (1, 20, 20, 20)
    path.write_bytes(whole + b"garbage")
    broken(path)


def test_gzip_of_several_members_is_one_stream(tmp_path):
    raw = gzip.decompress(nifti(tmp_path / "a.nii.gz", numbers()).read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw[:500]) + gzip.compress(raw[500:]))
    assert np.array_equal(read_volume(tmp_path / "b.nii.gz").data[0], numbers())


def lying(path: Path, dim: tuple[int, int, int], compress: bool, payload: bytes) -> Path:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(dim)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    raw = header.binaryblock + b"\0" * 4 + payload
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path


def cost_of_refusing(*paths: Path) -> list[tuple[str, float, float]]:
    """Read files that must be refused, each in turn in a process of its own.

    Returns:
        Reason, processor seconds and growth of the peak memory in MB, of each file.
    """
    code = """
import json, resource, sys, time
from loaders.readers import BrokenVolume, read_volume
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime
for path in sys.argv[1:2] + sys.argv[1:]:  # the first one twice: it also pays for the imports
    before = used()
    try:
        read_volume(path)
        raise SystemExit(path + " was read")
    except BrokenVolume as error:
        after = used()
        print(json.dumps([str(error), after[1] - before[1], after[0] - before[0]]))
"""
    command = [sys.executable, "-c", code, *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [tuple(json.loads(line)) for line in lines[1:]]


def test_lying_headers_and_bombs_are_refused_in_time_and_memory(tmp_path):
    noise = np.random.default_rng(0).bytes(10**6)
    zeros = gzip.compress(b"\0" * 2**22, 9) * 128  # half a gigabyte in half a megabyte
    cases = {}
    for n, dim in enumerate([(500, 500, 500), (30000, 30000, 3000)]):
        cases[lying(tmp_path / f"a{n}.nii.gz", dim, True, noise)] = "header claims"
        cases[lying(tmp_path / f"a{n}.nii", dim, False, noise)] = "header claims"
    small = lying(tmp_path / "small.nii.gz", (10, 10, 10), True, b"\0" * 2000)
    small.write_bytes(small.read_bytes() + zeros)
    cases[small] = "stream holds more"
    honest = lying(tmp_path / "honest.nii.gz", (1024, 1024, 256), True, b"")
    honest.write_bytes(honest.read_bytes() + zeros)
    cases[honest] = "cannot hold an image"
    # 240 MB that would be believed: noise between zeros, its end cut off.
    believed = lying(tmp_path / "cut.nii.gz", (500, 500, 480), True, noise + b"\0" * 239 * 10**6)
    believed.write_bytes(believed.read_bytes()[:-20])
    cases[believed] = "gzip stream"
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 500 500 500\nencoding: "
    nrrd = tmp_path / "a.nrrd"
    nrrd.write_bytes(header.encode() + b"gzip\n\n" + gzip.compress(noise))
    cases[nrrd] = "header claims"
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 500 500 500\nElementType = MET_SHORT\n"
    (tmp_path / "a.mha").write_bytes(f"{meta}ElementDataFile = LOCAL\n".encode() + noise)
    cases[tmp_path / "a.mha"] = "header claims"
    fields = {"descr": "<i2", "fortran_order": False, "shape": (500, 500, 500)}
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("data.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, fields)
        for _ in range(250):
            file.write(bytes(10**6))
    cases[tmp_path / "a.npz"] = "expands"
    pixels = np.frombuffer(noise[: 2 * 500 * 500], "<i2").reshape(500, 500)
    for number, lie in enumerate([{"Rows": 30000, "Columns": 30000}, {"NumberOfFrames": 9999}]):
        cases[save(image("CT", pixels, **lie), tmp_path / f"{number}.dcm")] = "header claims"
    run_lengths = image("CT", np.zeros((64, 64), "<i2"))
    run_lengths.compress(pydicom.uid.RLELossless)
    for number, (frames, size) in enumerate([(1, 5600), (99999, 64)]):
        run_lengths.NumberOfFrames, run_lengths.Rows, run_lengths.Columns = frames, size, size
        cases[save(run_lengths, tmp_path / f"rle{number}.dcm")] = "RLE" if frames == 1 else "claims"
    for (path, words), (message, seconds, megabytes) in zip(
        cases.items(), cost_of_refusing(*cases), strict=True
    ):
        assert str(path) in message and words in message, message
        assert seconds < 2 and megabytes < 200, (message, seconds, megabytes)


def patched(path: Path, at: int, value: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    return path


def test_bad_nifti_headers_are_told(tmp_path):
    def fresh(name: str) -> Path:
        return nifti(tmp_path / name, numbers())

    broken(patched(fresh("a.nii"), 0, b"\1\2\3\4"), "no NIfTI header")
    broken(patched(fresh("b.nii"), 70, struct.pack("<h", 32)), "complex64")
    broken(patched(fresh("c.nii"), 70, struct.pack("<h", 128)), "RGB")
    broken(patched(fresh("d.nii"), 70, struct.pack("<h", 9999)), "datatype 9999 is none that is")
    broken(patched(fresh("e.nii"), 42, struct.pack("<h", -5)), "shape")
    broken(patched(fresh("f.nii"), 108, struct.pack("<f", 100.0)), "inside itself")
    broken(patched(fresh("g.nii"), 280, struct.pack("<12f", *([0.0] * 12))), "singular")
    broken(patched(fresh("h.nii"), 280, struct.pack("<f", np.nan)), "not finite")
    path = fresh("i.nii")
    path.write_bytes(path.read_bytes()[:300])
    broken(path)
    path = fresh("j.nii")
    path.write_bytes(path.read_bytes() + b"\1" * 10**5)
    broken(path, "more than its header claims")


@pytest.mark.parametrize("edge", [8e-6, 65e-6, 1e-3])
def test_voxels_of_nanometers_are_not_singular_and_flat_ones_are(tmp_path, edge):
    affine = np.diag([edge, edge, 3 * edge, 1]) @ AFFINE
    volume = read_volume(nifti(tmp_path / "a.nii", numbers(), affine))
    assert np.allclose(volume.affine, affine, rtol=1e-5) and volume.spacing_mm[2] > 2.9 * edge
    np.savez(tmp_path / "b.npz", data=numbers(), spacing_mm=[edge, edge, edge])
    assert read_volume(tmp_path / "b.npz").spacing_mm == pytest.approx((edge,) * 3)
    flat = affine.copy()
    flat[:3, 1] = flat[:3, 0] * 2
    broken(nifti(tmp_path / "c.nii", numbers(), flat), "singular")


def test_a_bad_mgh_type_is_told(tmp_path):
    path = tmp_path / "a.mgh"
    nib.MGHImage(numbers().astype(np.float32), np.eye(4)).to_filename(path)
    broken(patched(path, 20, struct.pack(">i", 99)), "type 99 is none that is known")


def test_arrays_are_of_native_byte_order_and_torch_takes_them(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    data = numbers().astype(">i2")
    for name in ("a.nii", "a.nii.gz"):
        nib.Nifti1Image(data, np.eye(4), header).to_filename(tmp_path / name)
        volume = read_volume(tmp_path / name)
        assert torch.from_numpy(np.array(volume.data)).shape == volume.data.shape
        np.testing.assert_array_equal(volume.data[0], data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_volume_without_a_finite_voxel_is_broken_and_one_voxel_suffices(tmp_path, value):
    data = np.full((4, 5, 6), value, np.float32)
    np.save(tmp_path / "a.npy", data)
    broken(tmp_path / "a.npy", "all voxels are NaN or infinite")
    data[3, 4, 5] = 1
    np.save(tmp_path / "b.npy", data)
    assert read_volume(tmp_path / "b.npy").data.shape == (1, 4, 5, 6)


def test_things_that_are_no_volume_are_told(tmp_path):
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    broken(file("a.nii.gz", b""), "0 bytes")
    broken(file("b.nii.gz", b"<!DOCTYPE html><html>404</html>"), "web page")
    broken(file("c.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull")
    broken(file("d.nii.gz", b"just some text"), "not a gzip stream")
    broken(file("e.xyz", b"1"), "unknown format", ".nrrd")
    broken(tmp_path / "missing.nii", "No such file")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere")
    broken(tmp_path / "dangling.nii", "dangling link")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    broken(tmp_path / "loop.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    broken(tmp_path / "pipe.nii", "not a regular file")


def test_damaged_npy_and_npz_are_told_and_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    broken(tmp_path / "a.npy", "object")
    np.savez(tmp_path / "a.npz", data=np.array([Bomb()], dtype=object))
    broken(tmp_path / "a.npz", "object")
    assert not (tmp_path / "pwned").exists()
    np.save(tmp_path / "b.npy", numbers())
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-3])
    broken(tmp_path / "b.npy", "claims")
    np.save(tmp_path / "c.npy", np.zeros((3, 3, 3), [("a", "i2"), ("b", "f4")]))
    broken(tmp_path / "c.npy", "structured")
    np.savez_compressed(tmp_path / "d.npz", data=np.random.default_rng(0).random((9, 9, 9)))
    raw = bytearray((tmp_path / "d.npz").read_bytes())
    raw[2000] ^= 1
    (tmp_path / "d.npz").write_bytes(raw)
    broken(tmp_path / "d.npz", "damaged")
    np.savez(tmp_path / "e.npz", one=numbers(), two=numbers())
    broken(tmp_path / "e.npz", "name the volume")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_truncated_itk_files_are_told_where_simpleitk_may_be_silent(tmp_path, name):
    for compressed in (False, True):
        path = tmp_path / name
        sitk.WriteImage(tilted_image(), str(path), useCompression=compressed)
        path.write_bytes(path.read_bytes()[:-30])
        broken(path)


def test_broken_volume_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(BrokenVolume("a.nii", "is\nempty")))
    assert str(error) == "a.nii: is empty" and isinstance(error, ValueError)


# Writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "sub/a.nii.gz"])
def test_written_volumes_read_back_equal_here_and_in_nibabel(tmp_path, name):
    data = numbers("f4", (2, *SHAPE))
    write_volume(tmp_path / name, Volume(data, AFFINE))
    volume = read_volume(tmp_path / name, Reading(volumes_4d="channels"))
    assert np.array_equal(volume.data, data) and np.allclose(volume.affine, AFFINE, atol=1e-5)
    image = nib.load(tmp_path / name)
    assert np.array_equal(np.moveaxis(np.asarray(image.dataobj), 3, 0), data)
    assert np.allclose(image.affine, AFFINE) and image.header.get_xyzt_units()[0] == "mm"
    first = sitk.ReadImage(str(tmp_path / name))
    assert np.allclose(first.GetSpacing()[:3], (2, 1.5, 3))


def test_the_same_volume_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, Volume(numbers()[None], AFFINE))
        time.sleep(0.01)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    with pytest.raises(ValueError, match=r"\.nii"):
        write_volume(tmp_path / "a.mha", Volume(numbers()[None]))


def test_real_scans_agree_with_simpleitk(real_volumes):
    for path in (
        real_volumes / "ixi_t1_2mm" / "IXI013-HH-1212_T1.nii.gz",
        real_volumes / "ct" / "LIDC-IDRI-0314_chest_2mm.nii.gz",
    ):
        volume = read_volume(path)
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
        assert volume.data.dtype.itemsize <= 2  # native, not scaled to float
        assert np.allclose(volume.intensities()[0], expected, atol=1e-2)
