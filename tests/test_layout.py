"""Pictures are as the file shows them: its way up, its sides, its unit, its channels."""

import json

import numpy as np
import pytest
from dicoms import image, save
from PIL import Image

from loaders import Preprocess, SliceStore, VolumeStore, find_subjects, write_volume
from loaders.layout import Layout
from loaders.readers import Look, Reading, Volume, read_volume
from vae3d.tracking import media
from vae3d.tracking.media import save_views, scroll_frames, three_planes

tifffile = pytest.importorskip("tifffile")


def page(height=24, width=16) -> np.ndarray:
    """Pixels (rows, columns) as on a screen: bright at the top left, dark below."""
    rows, columns = np.mgrid[:height, :width]
    return (250 - 8 * rows - 3 * columns).clip(0).astype(np.uint8)


def store(folder, tmp_path, preprocess=None, reading=None) -> VolumeStore:
    reading = reading or Reading()
    subjects = find_subjects(folder, reading)
    return VolumeStore.build(subjects, tmp_path / "cache", preprocess, reading=reading)


def drawn(store, index=0, **view) -> np.ndarray:
    """The input's first panel, a pixel a voxel."""
    x = store.read(index)
    shape = [n for n in x.shape[1:] if n > 1]
    how = (None, store.data_range, 0.2, None, max(shape), store.layout(index))
    scene = media._Scene(x, x, *how)
    channels, (_, axis) = scene.groups[0], scene.planes[0]
    return scene.panel("input", channels, axis, scene.shape[axis] // 2)


def as_grays(pixels) -> np.ndarray:
    pixels = pixels.astype(float)
    return (pixels - pixels.min()) / np.ptp(pixels) * 255


UNIT = Preprocess(intensity="unit", percentiles=(0, 100), percentiles_of="all")


@pytest.mark.parametrize("kind", ["png", "tif", "stack", "dicom"])
def test_pictures_x_rays_and_stacks_stand_as_their_file_shows_them(tmp_path, kind):
    folder, pixels = tmp_path / "data", page()
    folder.mkdir()
    if kind == "png":
        Image.fromarray(pixels).save(folder / "a.png")
    elif kind == "dicom":
        film = image("DX", pixels.astype(np.uint16))
        del film.PixelSpacing
        save(film, folder / "a.dcm")
    else:
        tifffile.imwrite(folder / "a.tif", pixels if kind == "tif" else np.stack([pixels] * 5))
    volumes = store(folder, tmp_path, UNIT)
    assert np.abs(drawn(volumes)[..., 0] - as_grays(pixels)).max() <= 1
    layout = volumes.layout(0)
    assert layout.look.unit == "px" and layout.look.space == "picture"
    names = [name for name, _ in layout.planes(layout.arranged(volumes.read(0)).shape[1:])]
    assert names == (["xy", "xz", "yz"] if kind == "stack" else ["xy"])
    assert all(layout.sides(name) == ("", "") for name in names)


def test_a_body_has_its_planes_and_sides_however_its_axes_are_stored(tmp_path):
    data = np.zeros((1, 8, 10, 12), np.float32)
    data[0, :, :4, 9:] = 1  # of the file: axis 1 runs to the left, axis 2 to the front
    affine = np.array([[0, -2.0, 0, 0], [0, 0, 2.0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    write_volume(tmp_path / "a.nii.gz", Volume(data, affine))
    for orient in (True, False):
        volumes = store(tmp_path / "a.nii.gz", tmp_path, Preprocess(orient_ras=orient))
        layout = volumes.layout(0)
        assert layout.arranged(volumes.read(0)).shape == (1, 10, 12, 8)  # right, front, head
        panel = drawn(volumes)[..., 0]
        assert panel[0, -1] > 200 and panel[-1, -1] < 50 and panel[0, 0] < 50
        assert layout.planes((10, 12, 8)) == (("axial", 2), ("coronal", 1), ("sagittal", 0))
        assert layout.sides("axial") == ("L", "R") and layout.sides("sagittal") == ("P", "A")


def test_radiologists_see_the_right_on_the_left_and_are_told(tmp_path):
    x = np.zeros((1, 20, 20, 20), np.float32)
    x[0, 15:, 15:] = 1  # right and front
    layout = Layout(Look("body")).read_by(True)
    assert layout.sides("axial") == ("R", "L") and layout.sides("sagittal") == ("A", "P")
    scene = media._Scene(x, x, None, (0, 1), 0.2, None, 20, layout)
    for axis, low in ((2, 0), (1, 10)):  # axial is bright in front, coronal from head to foot
        panel = scene.panel("input", (0,), axis, 17)[..., 0]
        assert panel[low, 0] == 255 and panel[low, -1] == 0
    assert scene.panel("input", (0,), 0, 17)[10, 0, 0] == 255, "the front is on the left"
    plain = three_planes(x, x, layout=layout.read_by(False))
    told = three_planes(x, x, layout=layout)
    assert (plain[40:60, 60:200] != told[40:60, 60:200]).any(), "R on the left"


def test_nifti_without_a_place_has_no_sides(tmp_path):
    import nibabel

    image = nibabel.Nifti1Image(np.random.default_rng(0).random((6, 7, 8), np.float32), None)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii.gz")
    look = read_volume(tmp_path / "a.nii.gz").look
    assert look == Look("array", "um")
    assert Layout(look).planes((6, 7, 8))[0] == ("xy", 2)


@pytest.mark.parametrize(
    ("header", "look"),
    [
        ("space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)", "body mm"),
        ("space dimension: 3\nspace directions: (1,0,0) (0,1,0) (0,0,1)", "picture mm"),
        ('spacings: 1 1 1\nunits: "um" "um" "um"', "picture um"),
        ("kinds: domain domain domain", "picture px"),
    ],
)
def test_nrrd_is_a_body_only_where_its_space_is_one(tmp_path, header, look):
    pytest.importorskip("pint")
    head = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 3 4\nencoding: raw\n{header}\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + bytes(range(24)))
    found = read_volume(tmp_path / "a.nrrd").look
    assert f"{found.space} {found.unit}" == look


def cells(path, **told):
    """An OME stack of two channels, 0.5 um a pixel."""
    pixels = np.stack([np.stack([page()] * 4), np.stack([page()[:, ::-1]] * 4)])
    sizes = {f"PhysicalSize{a}": 0.5 for a in "XYZ"} | {f"PhysicalSize{a}Unit": "µm" for a in "XYZ"}
    tifffile.imwrite(path, pixels, metadata={"axes": "CZYX", **sizes, **told})


def test_channels_of_a_microscope_have_their_names_and_colors(tmp_path):
    pytest.importorskip("pint")
    channels = {"Name": ["nuclei", "membrane"], "Color": [0x0000FFFF, -16776961]}  # RGBA
    cells(tmp_path / "cells.ome.tif", Channel=channels)
    reading = Reading(volumes_4d="channels")
    volumes = store(tmp_path / "cells.ome.tif", tmp_path, UNIT, reading)
    layout = volumes.layout(0)
    assert layout.channels == (("nuclei", "0000ff"), ("membrane", "ff0000"))
    assert layout.look.unit == "um" and layout.spacing((0.0005, 0.0005, 0.0005)) == (0.5, 0.5, 0.5)
    picture = drawn(volumes)
    assert np.abs(picture[..., 2] - as_grays(page())).max() <= 1, "nuclei are blue"
    assert np.abs(picture[..., 0] - as_grays(page()[:, ::-1])).max() <= 1, "membranes are red"
    assert not picture[..., 1].any()


def test_channels_of_a_microscope_without_colors_get_some_and_those_of_mr_stay_gray(tmp_path):
    pytest.importorskip("pint")
    cells(tmp_path / "cells.ome.tif")
    reading = Reading(volumes_4d="channels")
    named = Preprocess(channels=("GFP", "DsRed"))
    layout = store(tmp_path / "cells.ome.tif", tmp_path, named, reading).layout(0)
    assert layout.channels == (("GFP", "00ff00"), ("DsRed", "ff00ff"))
    rng = np.random.default_rng(0)
    write_volume(tmp_path / "mr.nii.gz", Volume(rng.random((2, 6, 7, 8), np.float32)))
    volumes = store(tmp_path / "mr.nii.gz", tmp_path, Preprocess(channels=("t1", "t2")), reading)
    assert volumes.layout(0).channels == (("t1", ""), ("t2", ""))
    x = volumes.read(0)
    scene = media._Scene(x, x, None, (0, 1), 0.2, None, 50, volumes.layout(0))
    assert scene.groups == [(0,), (1,)] and scene.layout.name(1) == "t2"
    assert Layout().name(1) == "channel 1"


def test_a_photo_is_one_picture_in_its_colors(tmp_path):
    colors = np.stack([page(), page()[::-1], page()[:, ::-1]], axis=-1)
    Image.fromarray(colors).save(tmp_path / "a.png")
    volumes = store(tmp_path / "a.png", tmp_path, UNIT)
    expected = np.stack([as_grays(c) for c in np.moveaxis(colors, 2, 0)], axis=2)
    assert np.abs(drawn(volumes) - expected).max() <= 1
    x = volumes.read(0)
    assert len(scroll_frames(x, x, layout=volumes.layout(0))) == 2, "input, recon"
    assert three_planes(x, x, layout=volumes.layout(0)).shape[0] < 350, "one row"


def test_colors_of_a_gif_are_those_of_its_channels(tmp_path):
    layout = Layout(Look("picture", "um"), channels=(("a", "00ff00"), ("b", "ff00ff")))
    x = np.random.default_rng(0).random((2, 40, 40, 4), np.float32).round()
    paths = save_views(tmp_path, "a", x, x, layout=layout)
    import imageio.v3 as iio

    frame = iio.imread(paths["gif"], plugin="pillow", mode="RGB")[0].reshape(-1, 3).astype(int)
    for color in ((0, 255, 0), (255, 0, 255), (255, 255, 255)):
        assert np.abs(frame - color).sum(1).min() < 30


def test_slices_of_a_body_know_their_plane(tmp_path):
    rng = np.random.default_rng(0)
    write_volume(tmp_path / "a.nii.gz", Volume(rng.random((1, 6, 7, 8), np.float32)))
    volumes = store(tmp_path / "a.nii.gz", tmp_path)
    for cut, name in enumerate(("sagittal", "coronal", "axial")):
        slices = SliceStore(volumes, cut)
        x, layout = slices.read(3), slices.layout(3)
        assert layout.planes(layout.arranged(x).shape[1:]) == ((name, cut),)
        assert len(scroll_frames(x, x, slices.spacing_mm(3), layout=layout)) == 2
        scene = media._Scene(x, x, slices.spacing_mm(3), (0, 1), 0.2, None, 8, layout)
        whole = media._Scene(volumes.read(0), volumes.read(0), None, (0, 1), 0.2, None, 8,
                             volumes.layout(0), cut)  # fmt: skip
        expected = whole.panel("input", (0,), cut, 3)
        assert (scene.panel("input", (0,), cut, 0) == expected).all()


def test_a_cache_that_knows_nothing_of_looks_is_asked_what_its_file_has(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", page())
    volumes = store(tmp_path / "a.tif", tmp_path)
    for sidecar in (tmp_path / "cache").glob("*.json"):
        content = json.loads(sidecar.read_text())
        content.pop("look", None)
        sidecar.write_text(json.dumps(content))
    assert volumes.layout(0).look == Look("picture", "px")


def test_names_do_not_keep_the_ome_of_a_suffix_unless_a_run_has_it_so(tmp_path):
    for name in ("cells.ome.tif", "cells.tif", "other.ome.tiff"):
        tifffile.imwrite(tmp_path / name, page())
    assert [s.id for s in find_subjects(tmp_path)] == ["cells.ome.tif", "cells.tif", "other"]
    known = find_subjects(tmp_path, named=["other.ome"])
    assert [s.id for s in known] == ["cells.ome.tif", "cells.tif", "other.ome"]


def test_sheets_of_samples_and_latents_stand_as_their_source(tmp_path):
    from vae3d.stage2.sheet import scroll, three_slices

    tifffile.imwrite(tmp_path / "a.tif", np.stack([page()] * 5))
    volumes = store(tmp_path / "a.tif", tmp_path, UNIT)
    layout = Layout.of_record(json.loads(json.dumps(volumes.undo_record(0))))
    assert layout == volumes.layout(0)
    x = volumes.read(0)
    sheet = three_slices(x, (1, 1, 1), layout=layout, panel_px=24)
    assert np.abs(sheet[:24, 4:20, 0] - as_grays(page())).max() <= 1
    frames = scroll(x, (1, 1, 1), layout=layout, panel_px=24)
    assert len(frames) == 5 and np.abs(frames[0][20:, :, 0] - as_grays(page())).max() <= 1
    record = volumes.undo_record(0)
    del record["look"]
    assert Layout.of_record(record).look == Look(), "latents of old are bodies, as they were"


def test_sheets_show_every_channel_in_a_column_of_its_own():
    from vae3d.stage2.sheet import three_slices

    x = np.random.default_rng(0).random((3, 6, 5, 4)).astype(np.float32)
    alone = [three_slices(x[c : c + 1], (1, 1, 1), panel_px=24) for c in range(3)]
    together = three_slices(x, (1, 1, 1), panel_px=24)
    width = alone[0].shape[1]
    step = (together.shape[1] - width) // 2
    assert step > width
    for c, one in enumerate(alone):
        assert np.array_equal(together[:, c * step : c * step + width], one)


def test_patches_are_shown_as_their_file_shows_them(tmp_path):
    from vae3d.commands.patches import planes

    tifffile.imwrite(tmp_path / "a.tif", page())
    volumes = store(tmp_path / "a.tif", tmp_path, UNIT)
    patch = volumes.read(0)[0]
    assert (planes(patch, volumes.layout(0)) == patch[..., 0].T).all()
    upward = planes(np.arange(24).reshape(2, 3, 4), Layout(Look("body")))
    assert upward.shape == (4, 2 + 2 + 3) and upward[0, 0] == 2 * 4 + 2  # y 2, z 2
