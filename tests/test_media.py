"""Pictures and clips show what the volumes hold, in true proportions, and never each other's."""

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest

from vae3d.tracking import media
from vae3d.tracking.media import (
    COLUMNS,
    case_stem,
    save_views,
    scroll_frames,
    three_planes,
    write_gif,
    write_mp4,
    write_png,
)


def blob(shape=(24, 20, 16), seed=0) -> np.ndarray:
    """A smooth volume `(1, *shape)` in [0, 1] without symmetry."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    center = np.random.default_rng(seed).uniform(-0.3, 0.3, len(shape))
    distance = sum(
        (a - c) ** 2 * (1 + i) for i, (a, c) in enumerate(zip(axes, center, strict=True))
    )
    return np.exp(-3 * distance)[None].astype(np.float32)


def panels(x, recon, column, axis, index, **view):
    """The slice as it is drawn, without the frame round it."""
    scene = media._Scene(x, recon, None, (0, 1), 0.2, None, max(x.shape[1:]), **view)
    return scene.panel(column, (0,), axis, index)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_panel_at_its_own_size_is_the_slice_upright(axis):
    x = blob()
    drawn = panels(x, x, "input", axis, 5)
    expected = np.take(x[0], 5, axis).T[::-1]
    assert np.abs(drawn[..., 0] / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_anterior_and_superior_are_up_and_right_is_right():
    x = np.zeros((1, 8, 8, 8), np.float32)
    x[0, 7, :, :] = 1  # the right side of the patient
    assert panels(x, x, "input", 2, 4)[:, -1].min() == 255
    x = np.zeros((1, 8, 8, 8), np.float32)
    x[0, :, 7, :] = 1  # anterior
    assert panels(x, x, "input", 2, 4)[0].min() == 255
    x = np.zeros((1, 8, 8, 8), np.float32)
    x[0, :, :, 7] = 1  # superior
    assert panels(x, x, "input", 1, 4)[0].min() == 255
    assert panels(x, x, "input", 0, 4)[0].min() == 255


def test_error_is_signed_with_a_fixed_scale():
    x = np.full((1, 8, 8, 8), 0.5, np.float32)
    same, high, low, far = (panels(x, x + d, "error", 2, 4)[4, 4] for d in (0, 0.1, -0.1, 9))
    assert np.abs(same.astype(int) - media.BACKGROUND).max() <= 2
    assert high[0] > high[2] + 60, "too high is orange"
    assert low[2] > low[0] + 60, "too low is blue"
    assert (far == media.ERROR_COLORS[-1]).all(), "beyond the scale is its last color"


def test_anisotropic_voxels_keep_their_proportions():
    x = blob((40, 40, 10))
    flat = media._Scene(x, x, (1.0, 1.0, 5.0), (0, 1), 0.2, None, 200)
    assert flat.panel_size(2) == (160, 160)
    assert flat.panel_size(1) == (160, 200)  # 40 mm wide, 50 mm tall
    assert flat.panel("input", (0,), 1, 3).shape[:2] == (200, 160)


def test_slices_go_through_the_center_of_mass():
    x = np.zeros((1, 30, 20, 10), np.float32)
    x[0, 24:27, 3:6, 7:10] = 1
    assert media.center_of_mass(x) == (25, 4, 8)
    assert media.center_of_mass(np.zeros((1, 30, 20, 10))) == (15, 10, 5)
    assert media.center_of_mass(np.full((1, 3, 3), np.nan)) == (1, 1)


def test_a_window_in_hu_is_printed_in_hu():
    x = blob()
    plain = three_planes(x, x, data_range=(0, 1))
    window = three_planes(x, x, data_range=(0, 1), window_hu=(-160, 240))
    foot = media.FOOT + media.GAP
    assert (plain[:-foot] == window[:-foot]).all()
    assert (plain[-foot:] != window[-foot:]).any()


def test_intensities_outside_the_data_range_are_clipped_and_nan_is_black():
    x = np.array([-5.0, 0.0, 0.5, 1.0, 7.0, np.nan], np.float32).reshape(1, 6, 1)
    assert media.gray_colors(x[0])[:, 0, 0].tolist() == [0, 0, 128, 255, 255, 0]


@pytest.mark.parametrize("shape", [(13, 9, 7), (16, 16, 16), (31, 5), (8, 8)])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_size_and_channel_count_gives_even_pictures(shape, channels):
    x = np.concatenate([blob(shape, c) for c in range(channels)])
    picture = three_planes(x, x * 0.9, (0.7, 1.3, 3.1)[: len(shape)], title="a case")
    frames = scroll_frames(x, x * 0.9, (0.7, 1.3, 3.1)[: len(shape)])
    for image in (picture, *frames):
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert image.shape[0] % 2 == 0 and image.shape[1] % 2 == 0
    assert len({frame.shape for frame in frames}) == 1
    assert len(frames) == (shape[2] if len(shape) == 3 else 2)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 4\) and \(1, 4, 4, 5\)"):
        three_planes(np.zeros((1, 4, 4, 4)), np.zeros((1, 4, 4, 5)))


def test_torch_tensors_are_welcome():
    import torch

    x = torch.from_numpy(blob())
    assert (three_planes(x, x) == three_planes(x.numpy(), x.numpy())).all()


def test_long_volumes_are_shown_in_even_steps_from_end_to_end():
    x = np.zeros((1, 8, 8, 101), np.float32)
    x[0] += np.linspace(0, 1, 101, dtype=np.float32)
    frames = scroll_frames(x, x, columns=("input",), max_frames=11)
    middle = [int(np.median(f[100:-100, 60:-60])) for f in frames]
    assert len(frames) == 11
    assert np.abs(np.diff(middle) - 25.5).max() <= 1.5 and middle[0] == 0 and middle[-1] == 255


def test_png_decodes_to_the_picture(tmp_path):
    picture = three_planes(blob(), blob() * 0.9)
    assert (iio.imread(write_png(tmp_path / "a.png", picture)) == picture).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gif_and_mp4_decode_to_the_slices_of_the_volume(tmp_path, axis):
    x = blob((24, 20, 16))
    frames = scroll_frames(x, x, axis=axis, columns=("input",), panel_px=240)
    gif = iio.imread(write_gif(tmp_path / "a.gif", frames), plugin="pillow", mode="RGB")
    mp4 = np.stack(list(iio.imiter(write_mp4(tmp_path / "a.mp4", frames), plugin="FFMPEG")))
    assert gif.shape == mp4.shape == np.stack(frames).shape
    scene = media._Scene(x, x, None, (0, 1), 0.2, None, 240, None, axis)
    width, height = scene.panel_size(axis)
    top, left = media.GAP + 20, media.GAP
    for i in range(x.shape[1 + axis]):
        expected = scene.panel("input", (0,), axis, i).astype(int)
        shown = (slice(top + 20, top + height), slice(left + 20, left + width - 20))
        inner = (slice(20, height), slice(20, width - 20))  # without the labels
        assert np.abs(gif[i][shown].astype(int) - expected[inner]).mean() < 2.0  # 256 colors
        assert np.abs(mp4[i][shown].astype(int) - expected[inner]).mean() < 2.5


def test_gif_loops_forever_at_the_speed_asked_for(tmp_path):
    from PIL import Image

    x = blob((8, 8, 6))
    with Image.open(write_gif(tmp_path / "a.gif", scroll_frames(x, x), fps=10)) as gif:
        assert gif.info["loop"] == 0 and gif.info["duration"] == 100 and gif.n_frames == 6


def test_mp4_is_what_browsers_play(tmp_path):
    x = blob((9, 7, 5))
    path = write_mp4(tmp_path / "a.mp4", scroll_frames(x, x), fps=12)
    meta = iio.immeta(path, plugin="FFMPEG")
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 12
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "plays before it is all there"


def test_views_of_one_case_are_one_file_per_kind(tmp_path):
    x = blob((8, 9, 6))
    paths = save_views(tmp_path, "IXI002", x, x, (2, 2, 2), (0, 1), separate=True, title="a")
    assert {k: p.name for k, p in paths.items()} == {
        "png": "IXI002.png",
        "gif": "IXI002.gif",
        "mp4": "IXI002.mp4",
        "input_gif": "IXI002.input.gif",
        "input_mp4": "IXI002.input.mp4",
        "recon_gif": "IXI002.recon.gif",
        "recon_mp4": "IXI002.recon.mp4",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths.values())


def test_no_case_overwrites_another(tmp_path):
    cases = ["a/b", "a_b", "a%2Fb", "a b", "a.b", "a\\b", "ä", "a"]
    assert len({case_stem(case) for case in cases}) == len(cases)
    assert all("/" not in case_stem(case) and "\\" not in case_stem(case) for case in cases)
    bright, dark = np.ones((1, 4, 4, 4)), np.zeros((1, 4, 4, 4))
    one = save_views(tmp_path, "site/a", bright, bright)
    two = save_views(tmp_path, "site_a", dark, dark)
    assert one["png"].read_bytes() != two["png"].read_bytes()


def test_2d_pairs_blink_between_input_and_recon(tmp_path):
    x = blob((20, 14))
    paths = save_views(tmp_path, "a", x, np.zeros_like(x), (1, 1))
    gif = iio.imread(paths["gif"], plugin="pillow", mode="RGB")
    assert len(gif) == 2 and gif[0].max() > gif[1][40:-40].max()
    assert iio.imread(paths["png"]).shape[1] > 2 * gif.shape[2], "three columns"


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    frames = scroll_frames(blob((8, 8, 4)), blob((8, 8, 4)))
    path = write_mp4(tmp_path / "a.mp4", frames)
    old = path.read_bytes()

    def cut_short():
        yield frames[0]
        raise KeyboardInterrupt

    for write, target in ((write_mp4, path), (write_gif, tmp_path / "b.gif")):
        with pytest.raises(KeyboardInterrupt):
            write(target, cut_short())
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_real_head_fills_its_picture(real_volumes):
    path = sorted((real_volumes / "ixi_t1_2mm").glob("*.nii.gz"))[0]
    head = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32)
    x = (head / np.percentile(head, 99.5)).clip(0, 1)[None]
    picture = three_planes(x, x, (2, 2, 2))
    assert (picture.max(axis=2) > 60).mean() > 0.15
    assert COLUMNS == ("input", "recon", "error")
