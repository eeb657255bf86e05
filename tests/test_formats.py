"""Microscopes, pictures and stacks: units, colors and slices as their writers meant them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders import DataConfig, VolumeStore, find_subjects, survey_data
from loaders.readers import BrokenVolume, Reading, read_volume, write_volume

tifffile = pytest.importorskip("tifffile")

STACK = np.arange(4 * 3 * 2, dtype=np.uint16).reshape(4, 3, 2)  # (Z, Y, X)


def ome(path: Path, **told: object) -> Path:
    """An OME stack with these attributes of Pixels, in any spelling of a unit."""
    sizes = {f"PhysicalSize{axis}": 1.0 for axis in "XYZ"} | told
    sizes = {key: value for key, value in sizes.items() if value is not None}
    words = " ".join(f'{key}="{value}"' for key, value in sizes.items())
    tifffile.imwrite(path, STACK, metadata={"axes": "ZYX"}, ome=True)
    with tifffile.TiffFile(path) as tiff:
        old = tiff.ome_metadata
    new = old.replace("<Pixels ", f"<Pixels {words} ", 1)
    tifffile.imwrite(path, STACK, description=new.encode(), metadata=None)
    return path


def imagej(path: Path, unit: str, **more: object) -> Path:
    metadata = {"axes": "ZYX", "unit": unit, "spacing": 3.0} | more
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tifffile.imwrite(path, STACK, imagej=True, resolution=(2.0, 4.0), metadata=metadata)
    return path


# Units --------------------------------------------------------------------------------------------

# OME's whole list of lengths: https://www.openmicroscopy.org/Schemas/OME/2016-06 (UnitsLength).
POWERS = {"Y": 24, "Z": 21, "E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1,
          "d": -1, "c": -2, "m": -3, "µ": -6, "n": -9, "p": -12, "f": -15, "a": -18, "z": -21,
          "y": -24}  # fmt: skip
OME_MM = {f"{prefix}m": 10.0 ** (power + 3) for prefix, power in POWERS.items()} | {
    "m": 1e3, "Å": 1e-7, "thou": 0.0254, "li": 25.4 / 12, "in": 25.4, "ft": 304.8, "yd": 914.4,
    "mi": 1609344.0, "ua": 1.495978707e14, "ly": 9.4607304725808e18, "pc": 3.0856775814913673e19,
    "pt": 25.4 / 72, "\u03bcm": 1e-3, "\u212b": 1e-7,
}  # fmt: skip


@pytest.mark.parametrize("unit", OME_MM)
def test_every_unit_of_ome_is_a_length_in_millimeters(unit):
    from loaders.readers.tiff import OME_UNITS
    from loaders.readers.units import millimeters

    assert millimeters(Path("a.tif"), unit, OME_UNITS) == pytest.approx(OME_MM[unit], rel=1e-6)


@pytest.mark.parametrize(
    ("unit", "mm"),
    [("\u03bcm", 1e-3), ("m", 1e3), ("in", 25.4), ("cm", 10.0), ("pt", 25.4 / 72), (None, 1e-3)],
)
def test_ome_sizes_are_read_in_the_unit_that_the_file_names(tmp_path, unit, mm):
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 2.0, "PhysicalSizeZ": 3.0}
    volume = read_volume(ome(tmp_path / "a.ome.tif", **sizes, **units))
    assert volume.spacing_mm == pytest.approx((0.5 * mm, 2 * mm, 3 * mm))
    assert np.array_equal(volume.data[0], STACK.T) and volume.notes == ()


def test_each_axis_may_have_a_unit_of_its_own(tmp_path):
    path = ome(tmp_path / "a.ome.tif", PhysicalSizeX=500, PhysicalSizeXUnit="nm",
               PhysicalSizeY=0.5, PhysicalSizeYUnit="\u00b5m", PhysicalSizeZ=0.002,
               PhysicalSizeZUnit="mm")  # fmt: skip
    assert read_volume(path).spacing_mm == pytest.approx((0.0005, 0.0005, 0.002))


@pytest.mark.parametrize(
    ("unit", "mm"),
    [("millimeter", 1.0), ("microns", 1e-3), ("micrometer", 1e-3), ("micron", 1e-3), ("um", 1e-3),
     ("\\u00B5m", 1e-3), ("inch", 25.4), ("Inches", 25.4), ("Micron", 1e-3),
     ("Angstrom", 1e-7), ("nm", 1e-6)],
)  # fmt: skip
def test_imagej_units_are_read_in_any_spelling(tmp_path, unit, mm):
    from loaders.readers.tiff import imagej_sizes

    with tifffile.TiffFile(imagej(tmp_path / "a.tif", unit)) as tiff:
        sizes, *_ = imagej_sizes(tmp_path / "a.tif", tiff)
    assert sizes == pytest.approx({"X": 0.5 * mm, "Y": 0.25 * mm, "Z": 3 * mm})


@pytest.mark.parametrize("unit", ["smoot", "kg", "mm^2", "9**9**9", '"', "2"])
def test_an_unknown_unit_is_a_broken_file_that_is_named_with_its_unit(tmp_path, unit):
    with pytest.raises(BrokenVolume) as caught:
        read_volume(imagej(tmp_path / "a.tif", unit))
    assert str(caught.value) == (
        f"{tmp_path / 'a.tif'}: gives its voxel size in {unit!r}, which is no known unit of length"
    )
    if unit == "smoot":
        with pytest.raises(BrokenVolume, match="'smoot', which is no known unit"):
            read_volume(ome(tmp_path / "b.ome.tif", PhysicalSizeXUnit="smoot"))


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ('space units: "um" "um" "um"', (0.5e-3, 1e-3, 3e-3)),
        ('space units: "m" "m" "m"', (500, 1000, 3000)),
        ('space units: "mm" "mm" "???"', (0.5, 1, 3)),
        ("", (0.5, 1, 3)),
    ],
)
def test_nrrd_counts_in_the_units_of_its_header(tmp_path, units, expected):
    lines = [
        "NRRD0004", "type: short", "dimension: 3", "sizes: 2 3 4", "encoding: raw", "space: RAS",
        "endian: little", "space directions: (0.5,0,0) (0,1,0) (0,0,3)",
        "space origin: (2,0,0)", *([units] if units else []),
    ]  # fmt: skip
    (tmp_path / "a.nrrd").write_bytes("\n".join([*lines, "", ""]).encode() + STACK.tobytes())
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.spacing_mm == pytest.approx(expected)
    assert volume.affine[0, 3] == pytest.approx(4 * expected[0])


def test_nrrd_has_a_unit_for_each_of_its_axes_and_times_are_no_lengths(tmp_path):
    header = (
        "NRRD0004\ntype: short\ndimension: 4\nsizes: 2 2 3 2\nencoding: raw\nendian: little\n"
        'kinds: list domain domain domain\nspacings: nan 1 2 3\nunits: "s" "cm" "um" "mm"\n\n'
    )
    (tmp_path / "a.nrrd").write_bytes(header.encode() + STACK.tobytes())
    volume = read_volume(tmp_path / "a.nrrd", Reading(volumes_4d="first"))
    assert volume.spacing_mm == pytest.approx((10, 0.002, 3))


def test_a_missing_axis_is_like_the_others_and_told(tmp_path):
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": None}
    volume = read_volume(ome(tmp_path / "a.ome.tif", **sizes))
    assert volume.spacing_mm == pytest.approx((0.0005, 0.0005, 0.0005))
    assert volume.notes == ("has no voxel size along Z: taken as 0.0005 mm",)
    # ImageJ leaves out what is 1 unit.
    volume = read_volume(imagej(tmp_path / "b.tif", "micron", spacing=None))
    assert volume.spacing_mm == pytest.approx((0.0005, 0.00025, 0.001))
    assert volume.notes == ("has no voxel size along Z: taken as 0.001 mm",)


@pytest.mark.parametrize("unit", ["pixel", "reference frame"])
def test_a_size_in_pixels_is_none_and_told(tmp_path, unit):
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
    volume = read_volume(ome(tmp_path / "a.ome.tif", PhysicalSizeX=0.5, **units))
    assert volume.spacing_mm == (1, 1, 1)
    assert volume.notes == ("has no voxel size along X, Y, Z: taken as 1 mm",)
    volume = read_volume(imagej(tmp_path / "b.tif", unit))
    assert volume.spacing_mm == (1, 1, 1) and len(volume.notes) == 1
    tifffile.imwrite(tmp_path / "c.tif", STACK[0])  # a picture has no size that anybody would miss
    assert read_volume(tmp_path / "c.tif").notes == ()


def test_what_readers_assumed_is_told_once_for_all_volumes_also_from_the_cache(tmp_path, capsys):
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        path = tmp_path / "in" / f"{name}.tif"
        tifffile.imwrite(path, STACK + ord(name), photometric="minisblack")
    first = tmp_path / "in" / "a.tif"
    line = f"{first}: has no voxel size along X, Y, Z: taken as 1 mm (2 of 2 volumes)\n"
    for _ in range(2):
        VolumeStore.build(find_subjects(tmp_path / "in"), tmp_path / "cache")
        assert capsys.readouterr().err.startswith(line)


def test_check_data_tells_what_readers_assumed(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    survey = survey_data(DataConfig(root=str(tmp_path)))
    assert survey.read_voxels() == survey.faults == []
    told = "a.tif: has no voxel size along X, Y, Z: taken as 1 mm (1 of 1"
    assert any(told in line for line in survey.lines)


def test_micrometers_survive_the_way_through_a_nifti(tmp_path):
    sizes = {"PhysicalSizeX": 0.65, "PhysicalSizeY": 0.325, "PhysicalSizeZ": 2.0}
    volume = read_volume(ome(tmp_path / "a.ome.tif", **sizes))
    write_volume(tmp_path / "a.nii.gz", volume)
    back = read_volume(tmp_path / "a.nii.gz")
    assert back.spacing_mm == pytest.approx((0.00065, 0.000325, 0.002), rel=1e-5)
    assert np.array_equal(back.data, volume.data)


def test_damaged_ome_metadata_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, description=b"<OME xmlns='x'><Pixels </OME>",
                     metadata=None)  # fmt: skip
    with pytest.raises(BrokenVolume, match=r"a\.tif: its OME metadata is not XML"):
        read_volume(tmp_path / "a.tif")


def test_channels_on_grids_of_other_voxel_size_are_refused_also_in_micrometers(tmp_path):
    from loaders.subjects import Subject

    for name, size in (("a", 0.5), ("b", 0.6)):
        sizes = {f"PhysicalSize{axis}": size for axis in "XYZ"}
        ome(tmp_path / f"{name}.ome.tif", **sizes)
    both = Subject("both", (tmp_path / "a.ome.tif", tmp_path / "b.ome.tif"))
    with pytest.raises(BrokenVolume, match="does not share the grid"):
        VolumeStore.build([both], tmp_path / "cache")


def test_a_file_of_several_images_says_that_the_first_is_read(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(STACK, photometric="minisblack")
        tiff.write(STACK[:, :, :1], photometric="minisblack")
    volume = read_volume(tmp_path / "a.tif")
    assert volume.data.shape == (1, 2, 3, 4)
    assert "holds 2 images, of which the first is read" in volume.notes


def test_a_set_of_files_that_lacks_one_is_told_and_not_filled_with_zeros(tmp_path):
    uuid = "urn:uuid:{}0000000-0000-0000-0000-000000000000"
    planes = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" FirstC="0" FirstT="0" PlaneCount="1">'
        f'<UUID FileName="z{z}.ome.tif">{uuid.format(z)}</UUID></TiffData>'
        for z in range(4)
    )
    for z, plane in enumerate(STACK):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME '
            'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{uuid.format(z)}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            'DimensionOrder="XYZCT" Type="uint16" SizeX="2" SizeY="3" SizeZ="4" SizeC="1" '
            f'SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image>'
            "</OME>"
        )
        path = tmp_path / f"z{z}.ome.tif"
        tifffile.imwrite(path, plane, description=xml.encode(), metadata=None)
    assert np.array_equal(read_volume(tmp_path / "z0.ome.tif").data[0], STACK.T)
    (tmp_path / "z2.ome.tif").unlink()
    with pytest.raises(BrokenVolume, match="1 of its pages are in other files, which are not"):
        read_volume(tmp_path / "z0.ome.tif")


# Compression --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["lzw", "zstd", "jpeg2000", "lzma", "packbits", "zlib"])
def test_compressed_tiff_is_read(tmp_path, codec):
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression=codec, photometric="minisblack")
    assert np.array_equal(read_volume(tmp_path / "a.tif").data[0], STACK.T)


def test_a_codec_that_is_not_installed_is_named_with_its_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zstd", photometric="minisblack")
    script = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from loaders import read_volume\n"
        "try: read_volume(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.tif")],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert told == (
        f"{tmp_path / 'a.tif'}: is compressed by ZSTD: `pip install 'vae3d[formats]'` brings "
        "imagecodecs\n"
    )


# Colors -------------------------------------------------------------------------------------------

COLORS = np.random.default_rng(0).integers(0, 255, (3, 4, 4), np.uint8)  # (Y, X, RGBA)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_no_channel_of_data(tmp_path, suffix):
    Image.fromarray(COLORS).save(tmp_path / f"a{suffix}")
    data = read_volume(tmp_path / f"a{suffix}").data
    assert np.array_equal(data[..., 0], COLORS[..., :3].transpose(2, 1, 0))
    Image.fromarray(COLORS[..., :2], "LA").save(tmp_path / f"b{suffix}")
    data = read_volume(tmp_path / f"b{suffix}").data
    assert np.array_equal(data[..., 0], COLORS[None, ..., 0].transpose(0, 2, 1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_gray_and_colored_pictures_become_what_the_user_wants(tmp_path, suffix):
    rgb = Image.fromarray(COLORS[..., :3])
    rgb.save(tmp_path / f"a{suffix}")
    rgb.convert("L").save(tmp_path / f"b{suffix}")
    expected = np.asarray(rgb.convert("L")).T
    for name in "ab":
        gray = read_volume(tmp_path / f"{name}{suffix}", Reading(color="gray")).data
        assert gray.shape == (1, 4, 3, 1) and gray.dtype == np.uint8
        assert np.abs(gray[0, ..., 0].astype(int) - expected).max() <= 1
    for name in "ab":
        assert read_volume(tmp_path / f"{name}{suffix}", Reading(color="rgb")).data.shape[0] == 3
    assert [len(read_volume(tmp_path / f"{name}{suffix}").data) for name in "ab"] == [3, 1]


def test_fluorescence_channels_are_no_colors(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", np.stack([STACK] * 3), metadata={"axes": "CZYX"})
    reading = Reading(volumes_4d="channels", color="gray")
    assert read_volume(tmp_path / "a.ome.tif", reading).data.shape == (3, 2, 3, 4)


def test_a_stack_of_colors_becomes_gray_without_further_leave(tmp_path):
    stack = np.random.default_rng(0).integers(0, 255, (5, 3, 4, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb")
    with pytest.raises(BrokenVolume, match="is 4D"):
        read_volume(tmp_path / "a.tif")
    gray = read_volume(tmp_path / "a.tif", Reading(color="gray")).data
    assert gray.shape == (1, 4, 3, 5)
    expected = np.rint(stack @ [0.299, 0.587, 0.114]).astype(np.uint8)
    assert np.array_equal(gray[0], expected.T)


def test_a_color_of_its_own_reads_anew_and_the_default_keeps_its_key(tmp_path):
    from loaders.build import Builder
    from loaders.preprocess import Preprocess

    keys = {
        color: json.loads(Builder(tmp_path, Preprocess(), Reading(color=color)).recipe)
        for color in ("error", "gray", "rgb")
    }
    assert keys["error"] == [1, Preprocess().geometry(), "error", "error", "npy"]
    assert keys["gray"][5:] == [{"color": "gray"}] and keys["rgb"][5:] == [{"color": "rgb"}]


def test_pictures_of_phones_are_turned_as_their_exif_says(tmp_path):
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    data = read_volume(tmp_path / "a.png").data
    assert data.shape == (1, 3, 4, 1)
    assert np.array_equal(data[0, ..., 0].T, np.rot90(np.asarray(picture), -1))


def test_colors_of_16_bits_are_told_to_be_halved_and_grays_are_not(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(COLORS[..., :3].astype("u2") * 257))
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(COLORS[..., 0].astype("u2") * 257))
    volume = read_volume(tmp_path / "a.png")
    assert np.array_equal(volume.data[..., 0], COLORS[..., :3].transpose(2, 1, 0))
    assert volume.notes == (
        "has 16 bits a color, of which 8 are read: save it as TIFF to keep them",
    )
    volume = read_volume(tmp_path / "b.png")
    assert np.array_equal(volume.data[0, ..., 0], COLORS[..., 0].astype("u2").T * 257)
    assert volume.notes == ()


def test_a_picture_of_print_colors_becomes_red_green_and_blue(tmp_path):
    Image.fromarray(COLORS, "CMYK").save(tmp_path / "a.jpg")
    assert read_volume(tmp_path / "a.jpg").data.shape == (3, 4, 3, 1)


# Stacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_folder_of_slices_is_offered_as_one_volume(tmp_path, suffix):
    planes = np.random.default_rng(0).integers(0, 255, (12, 3, 4), np.uint8)  # (Z, Y, X)
    for person in ("p1", "p2"):
        (tmp_path / person).mkdir()
        for z, plane in enumerate(planes):
            Image.fromarray(plane).save(tmp_path / person / f"slice_{z}{suffix}")
    np.save(tmp_path / "whole.npy", planes)
    assert len(find_subjects(tmp_path)) == 25
    reading = Reading(stacks="folder")
    subjects = find_subjects(tmp_path, reading)
    assert [subject.id for subject in subjects] == ["p1", "p2", "whole"]
    volume = read_volume(subjects[0].paths[0], reading)
    assert np.array_equal(volume.data[0], planes.T)
    assert volume.notes == ("is a folder of slices, taken as 1 mm apart",)


def test_a_folder_whose_files_are_stacks_themselves_names_the_remedy(tmp_path):
    for name in "ab":
        tifffile.imwrite(tmp_path / f"{name}.tif", STACK, photometric="minisblack")
    (folder,) = find_subjects(tmp_path, Reading(stacks="folder"))
    with pytest.raises(BrokenVolume, match=r"a\.tif: is a stack itself: --data\.stacks files"):
        read_volume(folder.paths[0])


def test_gray_among_colored_pictures_names_the_option(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.fromarray(COLORS[..., :3]).save(paths[0])
    Image.fromarray(COLORS[..., 0]).save(paths[1])
    with pytest.raises(ValueError, match=r"--data\.color gray or rgb makes pictures alike"):
        VolumeStore.build(paths, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"a\.png: gives 3 channels.*--data\.color gray or rgb"):
        VolumeStore.build(paths, tmp_path / "new", in_channels=1)
    store = VolumeStore.build(
        paths, tmp_path / "cache", reading=Reading(color="gray"), in_channels=1
    )
    assert store.num_channels == 1 and len(store) == 2


def test_colored_slices_form_a_stack_where_they_are_to_be_gray(tmp_path):
    for z in range(3):
        Image.fromarray(COLORS[..., :3] + z).save(tmp_path / f"{z}.png")
    assert read_volume(tmp_path, Reading(color="gray")).data.shape == (1, 4, 3, 3)
    assert read_volume(tmp_path).data.shape == (3, 4, 3, 3)


def test_a_folder_of_slices_is_a_stack_whatever_lies_beside_them(tmp_path):
    folder = tmp_path / "stack"
    folder.mkdir()
    stored = np.random.default_rng(0).integers(0, 255, (3, 6, 5), np.uint8)  # Z, Y, X
    for number in range(3):
        Image.fromarray(stored[number]).save(folder / f"z{number}.png")
    for number in range(9):
        (folder / f"note{number}.txt").touch()
    (subject,) = find_subjects(tmp_path, Reading(stacks="folder"))
    read = read_volume(subject.paths[0], Reading(stacks="folder"))
    assert np.array_equal(read.data[0], stored.T)
