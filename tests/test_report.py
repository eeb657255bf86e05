"""Reports are one file each, say what stands out, and open in a browser without a network."""

import csv
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import BINARY, Browser

from vae3d import cli
from vae3d.reports import page
from vae3d.reports.comparison import differences
from vae3d.reports.evaluation import write_report
from vae3d.reports.evaluation_health import find as find_in_evaluation
from vae3d.reports.meanings import MEANINGS, better, meaning
from vae3d.reports.run import write_run_report
from vae3d.reports.run_data import RunData, read_run
from vae3d.reports.run_health import find
from vae3d.tracking.media import save_views, write_png
from vae3d.tracking.options import Tracking
from vae3d.tracking.tracker import Tracker


class Document(html.parser.HTMLParser):
    """Tags, links and text of a page; refuses tags that do not close."""

    def __init__(self, path):
        super().__init__()
        self.links, self.words, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], f"unclosed {self.open}"

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "data", "poster")]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def evaluation_folder(folder, cases=("a", "b/c", "<b>"), spoil=None, media=True):
    """An evaluation folder as evaluate.py writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x = rng.random((1, 10, 8, 6), dtype=np.float32)
    rows = []
    for i, case in enumerate(cases):
        if media:
            save_views(folder / "media", case, x, x * (0.9 - 0.1 * i), title=case)
        rows.append({"case": case, "psnr": 30.0 - i, "ssim": 0.9, "mae": 0.01 * (i + 1)})
    if spoil:
        rows[0] |= spoil
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"checkpoint": "runs/a", "mode": "patch", "patch_size": [64, 64, 64], "step": 7}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def run_folder(folder, steps=40, psnr=lambda s: 20 + s / 4, config=None, media=True, **series):
    """A run folder as train_3d.py writes it."""
    x = np.random.default_rng(0).random((1, 10, 8, 6), dtype=np.float32)
    with Tracker(folder, Tracking(wandb="disabled")) as tracker:
        for step in range(1, steps + 1):
            extra = {key.replace("__", "/"): f(step) for key, f in series.items()}
            tracker.log({"train/loss": 1 / step, "train/lr": 1e-4, **extra}, step)
            if step % 10 == 0:
                tracker.log({"val/psnr": psnr(step)}, step)
                tracker.log_table("val/volumes", [{"case": "a", "psnr": psnr(step)}], step)
        if media:
            for step in (10, 20):
                out = folder / "media" / f"step_{step:08d}"
                save_views(out, "site/a", x, x * step / 20)
                write_png(out / "latent_channels.png", np.zeros((8, 8, 3), np.uint8))
    config = config or {"max_steps": steps, "model": {"init_args": {"latent_channels": 4}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def offline(document: Document) -> bool:
    return all(link.startswith("data:") for link in document.links)


def levels(found):
    return [level for level, _ in found]


def test_evaluation_page_is_one_file_with_every_volume_worst_first(tmp_path):
    path = write_report(evaluation_folder(tmp_path))
    assert path == tmp_path / "report.html"
    document = Document(path)
    assert offline(document) and len(document.links) == 6  # a picture and a clip each
    assert "runs/a" in document.text and "64 x 64 x 64" in document.text
    views = document.text.split("Views")[1]
    assert views.index("<b>") < views.index("b/c") < views.index("All volumes")
    assert "29" in document.text and "0.9" in document.text


def test_evaluation_page_names_what_is_not_finite_and_what_is_far_off(tmp_path):
    cases = [f"case{i}" for i in range(8)]
    path = write_report(evaluation_folder(tmp_path, cases, {"psnr": float("nan")}, media=False))
    assert "psnr is not finite for case0" in Document(path).text
    rows = [{"case": c, "psnr": 30.0 + i / 10} for i, c in enumerate(cases)]
    rows[3]["psnr"] = 12.0
    found = find_in_evaluation(rows, ["psnr"], "psnr")
    assert levels(found)[0] == "warn" and "case3" in found[0][1]
    rows = [{"case": c, "mae": 0.1 + i / 1000} for i, c in enumerate(cases)]
    rows[3]["mae"] = 0.001  # far off, but on the good side
    assert "warn" not in levels(find_in_evaluation(rows, ["mae"], "mae"))


@pytest.mark.parametrize(
    ("psnr", "lattice", "level", "words"),
    [
        (20.0, 1.0, "bad", "average pooling"),
        (25.0, 1.0, "warn", "linear code"),
        (30.0, 1.4, "warn", "grid of latent cells"),
        (30.0, 1.0, "good", "pooling 22.0 dB and the best linear code of the same size 26.0 dB"),
    ],
)
def test_evaluation_page_says_when_a_linear_code_would_do_better(psnr, lattice, level, words):
    row = {"case": "a", "psnr": psnr, "pooled_psnr": 22.0, "pca_psnr": 26.0}
    row |= {"lattice_score": lattice, "pca_equivalent": float("inf")}
    found = find_in_evaluation([row], list(row)[1:], "psnr")
    assert found[0][0] == level and words in found[0][1]
    assert not any("finite" in text for _, text in found)


def test_a_linear_code_is_advised_only_to_a_model_without_one():
    row = {"case": "a", "psnr": 25.0, "pca_psnr": 26.0}
    advice = [
        find_in_evaluation([row], ["psnr", "pca_psnr"], "psnr", {"linear_code": has})[0][1]
        for has in (False, True)
    ]
    assert ["--model.linear_code true" in text for text in advice] == [True, False]
    assert all("--max_steps" in text for text in advice)


@pytest.mark.parametrize(
    ("row", "summary", "words"),
    [
        ({"active_channels": 5.0}, {"latent_channels": 8}, "3 of 8 latent channels are"),
        ({"latent_std": 4.0}, {}, "--model.latent_scale 0.25"),
        ({"latent_std": 0.0}, {}, "target_std 1</code>."),
        ({"seam_score": 1.5}, {}, "--mode exact"),
        ({"psnr": 30.0, "patch_gap": 33.0}, {}, "near the error itself"),
        ({"foreground_clipped": 0.02}, {}, "--data.preprocess.percentiles"),
    ],
)
def test_evaluation_page_says_which_option_to_change(row, summary, words):
    row = {"case": "a", **row}
    level, text = find_in_evaluation([row], list(row)[1:], None, summary)[0]
    assert level == "warn" and words in text and "<code>--" in text


def test_a_sound_evaluation_raises_no_alarm():
    row = {"case": "a", "psnr": 30.0, "pca_psnr": 27.0, "pooled_psnr": 22.0, "seam_score": 1.01}
    row |= {"patch_gap": 60.0, "active_channels": 8.0, "latent_std": 1.0, "lattice_score": 1.0}
    found = find_in_evaluation([row], list(row)[1:], "psnr", {"latent_channels": 8})
    assert set(levels(found)) == {"good"}


def test_metrics_are_grouped_and_explained_with_their_baselines(tmp_path):
    folder = evaluation_folder(tmp_path, spoil={}, media=False)
    rows = [{"case": "a", "psnr": 30.0, "pooled_psnr": 22.0, "pca_psnr": 27.0, "mae": 0.01,
             "lattice_score": 1.02, "psnr_ct": 31.0, "own": 3.0}]  # fmt: skip
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = Document(write_report(folder)).text
    said = text.split("What the numbers say")[1]
    assert "psnr 30 0 dB higher pooled_psnr 22, pca_psnr 27 Peak signal" in said
    assert "lattice_score 1.02 0 ideal 1 How much" in said
    assert said.index("Against what the network") < said.index("Channel by channel")
    assert said.index("Against linear codes") < said.index("Others own 3")
    assert "Spread over the volumes" not in text, "one volume has none"


def test_a_spread_is_drawn_of_what_differs_between_enough_volumes(tmp_path):
    cases = [f"case{i}" for i in range(6)]
    page = write_report(evaluation_folder(tmp_path / "many", cases, media=False)).read_text()
    assert page.count("<figure") == 2, "psnr and mae; ssim is the same for all"
    page = write_report(evaluation_folder(tmp_path / "few", cases[:4], media=False)).read_text()
    assert "<figure" not in page


def test_what_a_metric_means_is_known_also_of_a_channel_and_of_the_foreground():
    from vae3d.inference.metrics import METRICS

    assert set(METRICS) <= set(MEANINGS)
    assert better("foreground_psnr") == better("psnr_t1_post") == "higher"
    assert better("mae_source_ct") == "lower" and meaning("mae_source_ct").unit == "of the file"
    assert better("pooled_psnr") == better("lattice_score") == "" and meaning("own") is None


def test_a_case_called_like_a_number_stays_a_name(tmp_path):
    text = Document(write_report(evaluation_folder(tmp_path, ["007", "1e3"], media=False))).text
    assert "007" in text and "1e3" in text


def test_large_media_are_linked_not_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr("vae3d.reports.evaluation.MAX_EMBEDDED_BYTES", 0)
    document = Document(write_report(evaluation_folder(tmp_path, ["b/c"])))
    assert sorted(document.links) == ["media/b%252Fc.mp4", "media/b%252Fc.png"]


def test_an_evaluation_without_media_still_has_a_page(tmp_path):
    evaluation_folder(tmp_path, media=False)
    assert "All volumes" in Document(write_report(tmp_path)).text


def test_a_folder_that_is_no_evaluation_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics.csv"):
        write_report(tmp_path)


def test_run_page_has_curves_media_table_and_configuration(tmp_path):
    run = run_folder(tmp_path / "first")
    path = write_run_report([run])
    assert path == run / "report.html"
    document, source = Document(path), path.read_text()
    assert offline(document)
    for name in ("val/psnr", "train/loss", "What each channel holds", "site/a", "latent_channels"):
        assert name in document.text, name
    assert "best val/psnr 30 at step 40" in document.text
    assert "Constant: train/lr 0.0001" in document.text
    data = [json.loads(d) for d in re.findall(r'application/json">(.*?)</script>', source)]
    assert data[0]["series"][0]["points"] == [[s, 20 + s / 4] for s in (10, 20, 30, 40)]
    assert source.count('data-step="') == 4, "two volumes' pictures at two steps"


def test_several_runs_share_curves_and_list_their_differences(tmp_path):
    a = run_folder(tmp_path / "a", media=False, config={"lr": 1e-4, "seed": 0})
    b = run_folder(tmp_path / "b", media=False, config={"lr": 3e-4, "seed": 0})
    path = write_run_report([a, b], tmp_path / "both" / "page.html")
    document, source = Document(path), path.read_text()
    differences = document.text.split("What differs between the runs")[1].split("Config")[0]
    assert "lr" in differences and "seed" not in differences
    beside = document.text.split("Side by side")[1].split("Look at first")[0]
    assert "best val/psnr 30 at 40 30 at 40" in beside and "last train/loss 0.025 0.025" in beside
    chart = json.loads(re.findall(r'application/json">(.*?)</script>', source)[0])
    assert [series["name"] for series in chart["series"]] == ["a", "b"]


def test_an_option_that_no_run_sets_is_no_difference():
    configs = ({"augment": {"noise": 0.1}}, {"augment": None}, {"lr": None})
    runs = [RunData(name, Path(), [], {}, of) for name, of in zip("abc", configs, strict=True)]
    rows = re.findall("<tr><th>(.*?)</th>", differences(runs))
    assert rows == ["option", "augment.noise"]


def test_the_best_of_several_runs_is_marked(tmp_path):
    a = run_folder(tmp_path / "a", media=False)
    b = run_folder(tmp_path / "b", media=False, psnr=lambda s: 24 + s / 8, val__mae=lambda s: 1 / s)
    page = write_run_report([a, b], tmp_path / "page.html").read_text()
    rows = dict(re.findall("<tr><th>(best [^<]+)</th>(.*?)</tr>", page))
    psnr, mae = rows["best val/psnr"], rows["best val/mae"]
    assert psnr.index(">30 ") > psnr.index('<td class="n best">') and psnr.count("best") == 1
    assert "best" not in mae and ">0.025 <small>at 40" in mae, "only one run has it"


def test_a_run_of_a_diffusion_model_shows_its_samples(tmp_path):
    run = run_folder(tmp_path / "ldm", media=False)
    (run / "media").mkdir()
    for step in (10, 20):
        write_png(run / "media" / f"samples_{step:08d}.png", np.zeros((8, 8, 3), np.uint8))
    text = write_run_report([run]).read_text()
    assert re.findall(r'data-step="(\d+)"', text) == ["10", "20"]
    assert text.count("data:image/png") == 2 and "Samples" in text


def test_pictures_of_several_runs_stand_side_by_side(tmp_path):
    runs = [run_folder(tmp_path / name) for name in "ab"]
    source = write_run_report(runs, tmp_path / "page.html").read_text()
    cards = [c for c in source.split("<article")[1:] if "<h4>" in c]
    assert len(cards) == 2, "a volume and a latent picture"
    for title, card in zip(("site/a", "What each channel holds"), cards, strict=True):
        assert card.count(title) == 1 and re.findall("<h4>(.*?)</h4>", card) == ["a", "b"]
        assert card.count('class="stepper"') == 2
    alone = write_run_report(runs[:1], tmp_path / "one.html").read_text()
    assert "<h4>" not in alone and alone.count('class="stepper"') == 2


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [run_folder(tmp_path / p / "run", 10, media=False) for p in ("x", "y")]
    text = Document(write_run_report(runs)).text
    assert str(runs[0]) in text and str(runs[1]) in text


def test_secrets_of_the_configuration_are_not_in_the_page(tmp_path):
    run = run_folder(tmp_path / "a", 3, media=False, config={"my_token": "verysecret", "lr": 1})
    assert "verysecret" not in write_run_report([run]).read_text()


@pytest.mark.parametrize(
    ("case", "series", "level", "words"),
    [
        ("nan", {"train__recon": lambda s: float("nan") if s > 30 else 1.0}, "bad", "not finite"),
        ("skipped", {"train__skipped_steps": lambda s: float(s > 5)}, "warn", "skipped"),
        (
            "jump",
            {"train__norm__generator": lambda s: 900.0 if s == 33 else 1.0},
            "warn",
            "norm jumped",
        ),
        ("data", {"perf__data_wait": lambda s: 0.4}, "warn", "waits 40%"),
        (
            "dead",
            {"latent__channels": lambda s: 4.0, "latent__active_channels": lambda s: 2.0},
            "warn",
            "2 of 4 latent channels",
        ),
        ("scale", {"latent__mean_std": lambda s: 9.0}, "warn", "latent_scale"),
        ("overfit", {"psnr": lambda s: 30 - s / 4}, "warn", "overfitting"),
        (
            "worse",
            {"psnr": lambda s: 30 - s / 4, "train__recon": lambda s: 1 + s},
            "warn",
            "and so did train/recon: lower <code>--lr",
        ),
        ("rising", {"psnr": lambda s: 20 + s}, "good", "still improving"),
    ],
)
def test_what_stands_out_is_said_first(tmp_path, case, series, level, words):
    run = read_run(run_folder(tmp_path / case, media=False, **series))
    found = find(run)
    assert found[0][0] == level and words in found[0][1]


def test_a_good_run_raises_no_alarm(tmp_path):
    flat = read_run(run_folder(tmp_path / "a", media=False, psnr=lambda s: 30 - 1 / s))
    assert levels(find(flat)) == ["good"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    with Tracker(tmp_path, Tracking(wandb="disabled")) as tracker:
        Document(write_run_report([tmp_path]))
        tracker.log({"train/loss": 1.0}, 1)
        assert "train/loss" in Document(write_run_report([tmp_path])).text


def test_the_command_takes_run_folders_and_says_where_the_page_is(tmp_path, capsys):
    runs = [str(run_folder(tmp_path / name, 5, media=False)) for name in "ab"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *runs, "--out", str(tmp_path / "c.html")])
    assert not stop.value.code
    assert str(tmp_path / "c.html") in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path / "nothing")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "nothing" in error and error.count("\n") == 1


def test_a_long_curve_is_averaged_with_its_range_behind(tmp_path):
    x = list(range(10_000))
    y = [float(i % 2) for i in x]
    y[4000:6000] = [None] * 2000
    svg = page.chart("train/loss", [page.Series("a", x, y)])
    assert len(svg) < 30_000 and svg.count("<polyline") == 2 and svg.count('class="band"') == 2
    data = json.loads(re.search(r'application/json">(.*?)</script>', svg)[1])
    finite = [mean for _, mean in data["series"][0]["points"] if mean is not None]
    assert np.allclose(finite, 0.5, atol=0.05)
    assert "nan" not in svg.lower() and page.chart("none", [page.Series("a", [1], [None])]) == ""


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (-3e-7, 5e9, False), (1e-6, 1e3, True), (2, 2, False)]
)
def test_axes_have_a_few_round_ticks_inside(low, high, log):
    svg = page.chart("a", [page.Series("a", [0, 10], [low, high])], log=log)
    ticks = re.findall(r'class="t e" x="45" y="([\d.]+)">([^<]+)<', svg)
    assert 1 <= len(ticks) <= 8
    assert all(page.TOP - 4 <= float(at) <= page.HEIGHT - page.BOTTOM + 8 for at, _ in ticks)


def test_numbers_are_written_for_people():
    written = {0: "0", 12345678: "12\u202f345\u202f678", 0.000123456: "0.0001235", 2.0: "2"}
    assert {n: page.number(n) for n in written} == written
    assert page.number(float("nan")) == page.number(None) == "not finite"


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="no chromium on this machine")
def test_pages_open_in_a_browser_without_a_network_and_without_errors(tmp_path):
    run = run_folder(tmp_path / "run", latent__kl=lambda s: s)
    other = run_folder(tmp_path / "other", config={"max_steps": 9, "lr": 1})
    pages = [write_run_report([run]), write_report(evaluation_folder(tmp_path))]
    pages += [write_run_report([run, other], tmp_path / "both.html")]
    with Browser(tmp_path / "profile") as browser:
        for path in pages:
            for width in (390, 800, 1280):
                browser.resize(width, 1000)
                browser.open(path)
                assert browser.run("document.documentElement.scrollWidth") <= width
        assert not browser.complaints
        # The script runs: of a slider's two pictures the older one is hidden.
        browser.open(pages[0])
        hidden = (
            "[...document.querySelectorAll('[data-step]')].map(e => [e.dataset.step, e.hidden])"
        )
        assert browser.run(hidden)[:2] == [["10", True], ["20", False]]
        assert "step 20" in browser.run("document.querySelector('.steps output').textContent")
