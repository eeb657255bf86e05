"""The report's viewer shows the voxels of the volume, and follows mouse, keys and touch."""

import json

import numpy as np
import pytest
from browser import BINARY, Browser
from test_report import evaluation_folder, run_folder

from loaders.layout import Layout
from loaders.readers import Look
from vae3d.reports import viewer
from vae3d.reports.evaluation import write_report
from vae3d.reports.run import write_run_report
from vae3d.tracking.media import ERROR_COLORS
from vae3d.tracking.voxels import eight_bits, read_voxels_json, voxels_file, write_voxels

SHAPE = (1, 22, 18, 14)
BODY = Layout(Look("body"))


def pair(shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(shape, np.float32), rng.random(shape, np.float32)


def with_viewer(folder, case="a", layout=BODY, ranges=((0.0, 1.0),), shape=SHAPE, **how):
    """An evaluation folder with one volume for the viewer."""
    evaluation_folder(folder, [case])
    x, recon = pair(shape)
    write_voxels(folder / "media", case, x, recon, (1, 1, 2), ranges, layout=layout, **how)
    return x, recon


# What lies in the page ----------------------------------------------------------------------------


def test_a_volume_is_kept_at_eight_bits_of_its_window(tmp_path):
    import base64
    import zlib

    x, recon = pair((2, 5, 4, 3))
    ranges = [(0.0, 0.5), (-1.0, 3.0)]
    path = write_voxels(tmp_path, "a/b", x, recon, None, ranges)
    assert path == voxels_file(tmp_path, "a/b") and path.name == "a%2Fb.view.js"
    content = json.loads(read_voxels_json(path))
    raw = zlib.decompress(base64.b64decode(content["input"]))
    levels = np.frombuffer(raw, np.uint8).reshape(x.shape)
    assert (levels[0] == np.rint(np.clip(x[0] / 0.5, 0, 1) * 255)).all()
    assert np.abs(levels[1] / 255 * 4 - 1 - x[1]).max() <= 2 / 255 + 1e-6
    assert eight_bits(np.full((1, 1, 1, 1), np.nan), [(0, 1)]).item() == 0


def test_small_volumes_are_in_the_page_and_others_beside_it(tmp_path, monkeypatch):
    with_viewer(tmp_path, "b c")
    page = write_report(tmp_path).read_text()
    assert page.count('class="viewer"') == 1 and "data-src" not in page
    monkeypatch.setattr(viewer, "SMALL", 1000)
    page = write_report(tmp_path).read_text()
    assert 'data-src="media/b%20c.view.js"' in page
    monkeypatch.undo()
    monkeypatch.setattr(viewer, "MOST_BYTES", 100)
    assert "data-src" in write_report(tmp_path).read_text()


def test_a_page_without_volumes_has_no_viewer(tmp_path):
    page = write_report(evaluation_folder(tmp_path, ["a"])).read_text()
    assert "viewer" not in page and "<img" in page


def test_a_volume_without_pictures_has_its_viewer(tmp_path):
    evaluation_folder(tmp_path, ["a"], media=False)
    write_voxels(tmp_path / "media", "a", *pair(), None, [(0, 1)])
    page = write_report(tmp_path).read_text()
    assert page.count('class="viewer"') == 1 and "Pictures and clip" not in page


def test_a_case_cannot_end_the_script_that_holds_it(tmp_path):
    with_viewer(tmp_path, "</script><b>")
    page = write_report(tmp_path).read_text()
    assert "</script><b>" not in page


def test_a_run_shows_its_newest_volumes(tmp_path):
    run = run_folder(tmp_path / "run")
    write_voxels(run / "media", "site/a", *pair((1, 10, 8, 6)), None, [(0, 1)])
    assert write_run_report([run]).read_text().count('class="viewer"') == 1


# In a browser -------------------------------------------------------------------------------------


def in_chromium(test):
    """A slow test, skipped where no browser is."""
    absent = pytest.mark.skipif(BINARY is None, reason="no chromium on this machine")
    return pytest.mark.slow(absent(test))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(chromium, tmp_path):
    """Open a folder's report and wait for its viewer; no complaint was made until the end."""

    def show(folder=tmp_path):
        chromium.resize(1200, 1000)
        chromium.open(write_report(folder))
        chromium.run("document.querySelector('.viewer').scrollIntoView()")
        chromium.run("document.querySelector('.viewer button:only-child')?.click()")
        chromium.until("document.querySelector('.viewer').viewer")
        chromium.painted()
        return chromium

    yield show
    assert not chromium.complaints


def pixels(browser, plane, column) -> np.ndarray:
    """What a canvas holds, (h, w, 3)."""
    data = browser.run(
        f"(c => [c.height, c.width, ...c.getContext('2d').getImageData(0,0,c.width,c.height).data])"
        f"(document.querySelector('canvas[data-plane={plane}][data-column={column}]'))"
    )
    return np.array(data[2:], np.uint8).reshape(data[0], data[1], 4)[..., :3].astype(int)


def center_of(browser, plane, column="input") -> tuple[float, float]:
    box = browser.run(
        f"(r => [r.left, r.top, r.width, r.height])(document.querySelector("
        f"'canvas[data-plane={plane}][data-column={column}]').getBoundingClientRect())"
    )
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def cursor(browser) -> list:
    return browser.run("document.querySelector('.viewer').viewer.cursor")


def text(browser) -> str:
    return browser.run("document.querySelector('.values').textContent")


AXES = {"axial": 2, "coronal": 1, "sagittal": 0}


@in_chromium
@pytest.mark.parametrize("radiological", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_pixels_are_the_voxels_of_the_volume(opened, tmp_path, monkeypatch, radiological, beside):
    x, recon = with_viewer(tmp_path, layout=BODY.read_by(radiological))
    monkeypatch.setattr(viewer, "SMALL", 0 if beside else 10**9)
    browser = opened()
    a, b = (eight_bits(v, [(0, 1)])[0].astype(int) for v in (x, recon))
    at = cursor(browser)
    for plane, axis in AXES.items():

        def turned(v, axis=axis):
            rows = np.take(v, at[axis], axis).T[::-1]
            return rows[:, ::-1] if radiological else rows

        for column, volume in (("input", a), ("recon", b)):
            assert (pixels(browser, plane, column) == turned(volume)[..., None]).all()
        share = (np.clip(turned(b - a) / 255 / 0.2, -1, 1) + 1) / 2 * 4
        expected = np.stack([np.interp(share, range(5), c) for c in ERROR_COLORS.T], axis=-1)
        assert np.abs(pixels(browser, plane, "error") - expected).max() <= 0.51
        letters = browser.run(
            f"[...document.querySelector('canvas[data-plane={plane}]').parentNode"
            ".querySelectorAll('.side')].map(s => s.textContent)"
        )
        assert letters == list(BODY.read_by(radiological).sides(plane))


@in_chromium
def test_wheel_drag_window_and_values_answer_a_real_mouse(opened, tmp_path):
    x, recon = with_viewer(tmp_path, window_hu=(-1000.0, 1550.0))
    browser = opened()
    a, b = (eight_bits(v, [(0, 1)])[0].astype(int) for v in (x, recon))
    before = cursor(browser)
    place = center_of(browser, "axial")
    browser.mouse("mouseWheel", *place, deltaX=0, deltaY=-120)
    assert cursor(browser) == [before[0], before[1], before[2] + 1], "towards the head"
    z = before[2] + 1
    assert (pixels(browser, "axial", "input")[..., 0] == a[:, :, z].T[::-1]).all()

    browser.mouse("mouseMoved", place[0] + 1, place[1] + 1)
    i, j = 11, 8  # right of and below the middle of 22 x 18
    assert cursor(browser)[:2] == before[:2], "hovering only tells"
    value, other = a[i, j, z] * 10 - 1000, b[i, j, z] * 10 - 1000
    shown = text(browser).replace("\u2212", "-").replace("+", "")
    assert shown == f"x {i} y {j} z {z}input {value}  recon {other}  error {other - value} HU"

    start = (place[0] + 1, place[1] + 1)
    browser.mouse("mousePressed", *start, button="left", buttons=1, clickCount=1)
    width = browser.run("document.querySelector('canvas').getBoundingClientRect().width")
    browser.mouse("mouseMoved", start[0] + 4 * width / 22, start[1], button="left", buttons=1)
    browser.mouse("mouseReleased", *start, button="left")
    assert cursor(browser) == [i + 4, j, z]
    assert (pixels(browser, "sagittal", "input")[..., 0] == a[i + 4].T[::-1]).all(), "linked"

    browser.mouse("mousePressed", *start, button="right", buttons=2, clickCount=1)
    browser.mouse("mouseMoved", start[0] - 60, start[1], button="right", buttons=2)
    browser.mouse("mouseReleased", *start, button="right")
    low, high = browser.run("(v => [v.low, v.high])(document.querySelector('.viewer').viewer)")
    assert (low, high) == (30, 225), "60 pixels to the left: narrower by 60 of 255"
    expected = np.clip((a[:, :, z].T[::-1] - low) / (high - low), 0, 1) * 255
    assert np.abs(pixels(browser, "axial", "input")[..., 0] - expected).max() <= 0.51


@in_chromium
def test_keys_and_sliders_and_touch_do_the_same(opened, tmp_path):
    with_viewer(tmp_path)
    browser = opened()
    x, y, z = cursor(browser)
    browser.run("document.querySelector('canvas[data-plane=axial]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "PageUp"):
        browser.key(key)
    assert cursor(browser) == [x + 2, y + 1, z + 1]
    browser.key("]")
    assert browser.run("document.querySelector('.viewer').viewer.low") < 0
    browser.key("Home")
    assert cursor(browser) == [x, y, z]
    place = center_of(browser, "coronal")
    points = [{"x": place[0] + 1, "y": place[1] + 1}]
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
    points[0]["x"] += 30
    browser.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=points)
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.painted()
    assert cursor(browser)[0] > x and cursor(browser)[1] == y
    browser.run(
        "(s => { s.value = 3; s.dispatchEvent(new Event('input')) })"
        "(document.querySelector('.slider input'))"
    )
    browser.painted()
    assert cursor(browser)[2] == 3
    browser.run("document.querySelector('input[type=checkbox]').click()")
    browser.painted()
    assert browser.run("document.querySelector('.side').textContent") == "R"


@in_chromium
def test_colored_channels_are_merged_and_one_can_be_chosen(opened, tmp_path):
    names = (("nuclei", "00ff00"), ("membrane", "ff00ff"))
    layout = Layout(Look("picture", "um"), channels=names)
    shape = (2, 9, 7, 1)
    x, _ = with_viewer(tmp_path, layout=layout, ranges=((0, 1), (0, 2)), shape=shape)
    browser = opened()
    green, magenta = (eight_bits(x, [(0, 1), (0, 2)])[c, ..., 0].T for c in range(2))
    shown = pixels(browser, "xy", "input")
    assert (shown[..., 1] == green).all() and (shown[..., 0] == magenta).all(), "rows run down"
    assert browser.run("document.querySelectorAll('.viewer canvas').length") == 3, "one plane"
    assert "nuclei: input" in text(browser) and "membrane: input" in text(browser)
    browser.run(
        "(s => { s.selectedIndex = 2; s.dispatchEvent(new Event('change')) })"
        "(document.querySelector('.viewer select'))"
    )
    browser.painted()
    assert (pixels(browser, "xy", "input") == magenta[..., None]).all()


@in_chromium
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_no_label_lies_on_another_at_any_width(opened, tmp_path, width):
    with_viewer(tmp_path, layout=BODY, window_hu=(-1000.0, 1550.0))
    browser = opened()
    browser.resize(width, 900)
    boxes = browser.run(
        "[...document.querySelectorAll('.viewer .name, .viewer .side, .viewer .slider > *, "
        ".viewer .values > *, .viewer button, .viewer label:not(.slider)')]"
        ".filter(e => e.textContent || e.tagName === 'INPUT').map(e => { const r = "
        "e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom, e.className, "
        "e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0] })"
    )
    assert len(boxes) > 30 and all(box[0] >= 0 and box[2] <= width for box in boxes)
    assert not [box for box in boxes if box[5]], "cut off"
    for n, one in enumerate(boxes):
        for other in boxes[:n]:
            apart = (
                one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
            )
            assert apart, (one, other)
    assert browser.run("document.documentElement.scrollWidth") <= width


@in_chromium
def test_a_volume_that_is_gone_is_named_and_the_pictures_stay(
    opened, chromium, tmp_path, monkeypatch
):
    with_viewer(tmp_path)
    monkeypatch.setattr(viewer, "SMALL", 0)
    page = write_report(tmp_path)
    voxels_file(tmp_path / "media", "a").unlink()
    chromium.open(page)
    chromium.run("document.querySelector('.viewer button').click()")
    chromium.until("document.querySelector('.viewer').textContent.includes('not beside')")
    assert chromium.run("document.querySelectorAll('img').length") == 1
    chromium.complaints.clear()  # that the file is not there
