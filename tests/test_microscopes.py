"""LIF, ND2 and CZI: as bioio's readers tell them, or one line on what is missing."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loaders import find_subjects
from loaders.readers import BrokenVolume, Reading, read_volume

STACK = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)  # (Z, Y, X)


def stand_in(monkeypatch, data: np.ndarray, axes: str, sizes=(2.0, 0.5, 0.25), scenes=1, unit=None,
             names=None):  # fmt: skip
    """Install a reader like bioio's that gives this image, sizes along Z, Y, X."""
    pixel = SimpleNamespace(**dict(zip("ZYX", sizes, strict=True)))
    unit = SimpleNamespace(unit=unit)
    image = SimpleNamespace(
        dims=SimpleNamespace(order=axes), shape=data.shape, dtype=data.dtype, data=data,
        physical_pixel_sizes=pixel, scenes=("image",) * scenes,
        dimension_properties=SimpleNamespace(X=unit, Y=unit, Z=unit), channel_names=names,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "bioio_nd2", SimpleNamespace(Reader=lambda path: image))


@pytest.fixture
def nd2(tmp_path) -> Path:
    (tmp_path / "a.nd2").write_bytes(b"not empty")
    return tmp_path / "a.nd2"


def test_channels_of_a_microscope_keep_their_names_and_the_unit(nd2, monkeypatch):
    stand_in(monkeypatch, np.stack([STACK, STACK]), "CZYX", names=["DAPI", "Channel:0:1"])
    look = read_volume(nd2, Reading(volumes_4d="channels")).look
    assert look.channels == (("DAPI", ""), ("", "")) and look.unit == "um"
    assert look.space == "picture"


@pytest.mark.parametrize(("unit", "mm"), [(None, 1e-3), ("centimeter", 10.0)])
def test_an_image_of_a_microscope_has_its_voxels_and_their_size(nd2, monkeypatch, unit, mm):
    stand_in(monkeypatch, STACK[None, :, None], "TZCYX", unit=unit)
    volume = read_volume(nd2)
    assert np.array_equal(volume.data[0], STACK.T)
    assert volume.spacing_mm == pytest.approx((0.25 * mm, 0.5 * mm, 2 * mm))
    assert volume.notes == ()
    assert [subject.id for subject in find_subjects(nd2.parent)] == ["a"]


def test_times_and_channels_of_a_microscope_need_leave(nd2, monkeypatch):
    data = np.stack([STACK, STACK + 1])[:, :, None]
    stand_in(monkeypatch, data, "TZCYX")
    with pytest.raises(BrokenVolume, match="is 4D"):
        read_volume(nd2)
    volume = read_volume(nd2, Reading(volumes_4d="channels"))
    assert np.array_equal(volume.data, data[:, :, 0].transpose(0, 3, 2, 1))


def test_what_a_microscope_does_not_tell_or_tells_too_much_is_said(nd2, monkeypatch):
    stand_in(monkeypatch, STACK, "ZYX", sizes=(None, 0.5, 0.5), scenes=3)
    volume = read_volume(nd2)
    assert volume.spacing_mm == pytest.approx((0.0005, 0.0005, 0.0005))
    assert volume.notes == (
        "has no voxel size along Z: taken as 0.0005 mm",
        "holds 3 images, of which the first is read",
    )


def test_a_mosaic_that_was_not_stitched_is_refused(nd2, monkeypatch):
    stand_in(monkeypatch, np.stack([STACK, STACK]), "MZYX")
    with pytest.raises(BrokenVolume, match="a mosaic of 2 tiles"):
        read_volume(nd2)
    stand_in(monkeypatch, STACK[None], "MZYX")
    assert np.array_equal(read_volume(nd2).data[0], STACK.T)


def test_whatever_a_reader_raises_over_a_file_is_one_line_that_names_it(nd2, monkeypatch):
    def fails(path):
        raise struct.error("unpack\nrequires 4 bytes")

    monkeypatch.setitem(sys.modules, "bioio_nd2", SimpleNamespace(Reader=fails))
    with pytest.raises(BrokenVolume) as caught:
        read_volume(nd2)
    reason = "bioio_nd2 cannot read it (error: unpack requires 4 bytes)"
    assert str(caught.value) == f"{nd2}: {reason}"


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.lif", "LIF needs `pip install 'vae3d[bio]'`"),
     ("a.ND2", "ND2 needs `pip install 'vae3d[bio]'`"),
     ("a.czi", "CZI needs `pip install 'vae3d[czi]'` (bioio-czi, under the GPL)")],
)  # fmt: skip
def test_a_microscope_whose_reader_is_not_installed_names_the_extra(
    tmp_path, monkeypatch, name, words
):
    for package in ("bioio_lif", "bioio_nd2", "bioio_czi"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"not empty")
    with pytest.raises(BrokenVolume) as caught:
        read_volume(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: {words}"


# With the extras ----------------------------------------------------------------------------------


def block(text: str, data: bytes | None = None) -> bytes:
    """A block of a LIF file: a text, and bytes that are called by it."""
    body = b"" if data is None else b"\x2a" + struct.pack("<Q", len(data))
    body += b"\x2a" + struct.pack("<I", len(text)) + text.encode("utf-16-le")
    return struct.pack("<II", 0x70, len(body)) + body + (data or b"")


def write_lif(path: Path) -> Path:
    """A LIF of one image, voxels 0.5 x 0.5 x 2 micrometers."""
    axes = [(1, 6, 2.5e-6, 1), (2, 5, 2e-6, 6), (3, 4, 6e-6, 30)]  # lengths are between centers
    dims = "".join(
        f'<DimensionDescription DimID="{id}" NumberOfElements="{n}" Origin="0" '
        f'Length="{length}" Unit="m" BitInc="0" BytesInc="{step}"/>'
        for id, n, length, step in axes
    )
    channel = ('<ChannelDescription DataType="0" ChannelTag="0" Resolution="8" Min="0" Max="255" '
               'NameOfMeasuredQuantity="" Unit="" LUTName="Gray" IsLUTInverted="0" '
               'BytesInc="0" BitInc="0"/>')  # fmt: skip
    image = (
        f'<Element Name="a" Visibility="1" UniqueID="1"><Data><Image TextDescription="">'
        f"<ImageDescription><Channels>{channel}</Channels><Dimensions>{dims}</Dimensions>"
        f"</ImageDescription></Image></Data>"
        f'<Memory Size="{STACK.nbytes}" MemoryBlockID="Mem_1"/></Element>'
    )
    xml = (
        f'<LMSDataContainerHeader Version="2"><Element Name="all" Visibility="1" UniqueID="0">'
        f'<Data><Experiment Path="" IsSavedFlag="1"/></Data>'
        f'<Memory Size="0" MemoryBlockID="Mem_0"/><Children>{image}</Children></Element>'
        f"</LMSDataContainerHeader>"
    )
    path.write_bytes(block(xml) + block("Mem_0", b"") + block("Mem_1", STACK.tobytes()))
    return path


def test_a_lif_is_read_through_bioio(tmp_path):
    pytest.importorskip("bioio_lif")
    volume = read_volume(write_lif(tmp_path / "a.lif"))
    assert np.array_equal(volume.data[0], STACK.T)
    assert volume.spacing_mm == pytest.approx((0.0005, 0.0005, 0.002))


def test_a_czi_is_read_through_bioio(tmp_path):
    pytest.importorskip("bioio_czi")
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(tmp_path / "a.czi")) as document:
        for z, plane in enumerate(STACK):
            document.write(data=plane[..., None], plane={"Z": z, "C": 0, "T": 0}, location=(0, 0))
        document.write_metadata("a", scale_x=0.5e-6, scale_y=0.5e-6, scale_z=2e-6)
    volume = read_volume(tmp_path / "a.czi")
    assert np.array_equal(volume.data[0], STACK.T)
    assert volume.spacing_mm == pytest.approx((0.0005, 0.0005, 0.002))
