"""What the pages show works: snippets run, commands have the options shown, links lead somewhere.

Notebooks run too, and the site is built of it all without a network."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import BINARY, Browser

import loaders
import vae3d
from loaders import Volume, read_volume, write_volume
from vae3d import config
from vae3d.cli import COMMANDS
from vae3d.commands.convert import convert
from vae3d.commands.encode import encode
from vae3d.commands.train import train_3d
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = re.compile("(vae3d|python|torchrun|sbatch) ")
SCRIPTS = {"train_3d.py": "train", "evaluate.py": "evaluate", "examples/train.sbatch": "train"}
ELSEWHERE = {"train": "--config demo --data.root DIR --out_dir runs/a"}  # what `...` stands for

TINY = partial(
    CustomVAE, channels=(4, 8, 8), num_res_blocks=1, norm=partial(GroupNorm, num_groups=4)
)
QUICK = dict(
    model=TINY, patch_size=(8, 8, 8), batch_size=1, max_steps=1, val_every=0, media_every=0,
    wandb="disabled", device="cpu", fresh=True,
)  # fmt: skip


def quick_train(data, out_dir, **options):
    """What a snippet trains, in a size for tests."""
    return train_3d(data, out_dir, **(options | QUICK))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the snippets find there: DIR, scan.nii.gz, runs/demo, runs/a, latents, my-vae."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    for i in range(4):
        x = np.random.default_rng(i).integers(-1000, 400, (1, 20, 16, 12)).astype(np.int16)
        write_volume(home / "DIR" / f"{i}.nii.gz", Volume(x, np.diag([2.0, 2.0, 3.0, 1.0])))
    write_volume(home / "scan.nii.gz", read_volume(home / "DIR" / "0.nii.gz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VAE3D_CACHE", str(home / "cache"))
        quick_train("DIR", "runs/demo")
        shutil.copytree("runs/demo", "runs/a")
        convert("runs/demo", Path("my-vae"))
        encode("runs/demo", "latents", device="cpu")
    return home


def snippets(page):
    return [code for language, code in BLOCK.findall(page.read_text()) if language == "python"]


def run_snippets(page, home, monkeypatch, **known):
    """Run the snippets of a page in turn; what an earlier one made is there for the next."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("VAE3D_CACHE", str(home / "cache"))
    monkeypatch.setattr(vae3d, "train_3d", quick_train, raising=False)
    monkeypatch.setattr(vae3d, "CustomVAE", TINY, raising=False)
    for code in snippets(page):
        exec(compile(code, page.name, "exec"), known)
    return known


QUICK_PAGES = [page for page in PAGES if snippets(page) and page.name != "two_stages.md"]


@pytest.mark.parametrize("page", QUICK_PAGES, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run_and_give_back_what_they_say(page, home, monkeypatch):
    (home / "recon.nii.gz").unlink(missing_ok=True)
    after = run_snippets(page, home, monkeypatch, x=torch.rand(1, 1, 20, 16, 12))
    scan = read_volume(home / "scan.nii.gz")
    if "batch" in after:
        assert after["batch"].image.shape == (4, 1, 64, 64, 64)
    if (home / "recon.nii.gz").exists():
        recon = read_volume(home / "recon.nii.gz")
        assert recon.data.shape == scan.data.shape and np.array_equal(recon.affine, scan.affine)
        assert recon.data.std() > 100, "HU, not parts of the window"
    if "volume" in after:
        assert after["volume"].data.shape == scan.data.shape
        assert np.array_equal(after["volume"].affine, scan.affine)


def test_readme_shows_a_volume_on_its_way_back_and_weights_a_file(home):
    assert "write_volume(" in "".join(snippets(ROOT / "README.md"))
    assert "decode_file(" in "".join(snippets(ROOT / "docs" / "weights.md"))


def test_the_segmenter_of_the_page_on_evaluation_is_one(home, monkeypatch):
    volume = torch.rand(1, 1, 20, 16, 12)
    after = run_snippets(ROOT / "docs" / "evaluation.md", home, monkeypatch, x=volume)
    x = torch.rand(1, 6, 5, 4)
    assert np.array_equal(after["Vessels"]()(x, (1, 1, 1)), (x[0] > 0.8).numpy())


@pytest.mark.slow
def test_the_snippets_of_the_two_stages_run(home, monkeypatch):
    import lightning

    def short(max_steps):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        return lightning_trainer(max_steps=1, accelerator="cpu", **quiet)

    lightning_trainer = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", short)
    after = run_snippets(ROOT / "docs" / "two_stages.md", home, monkeypatch)
    assert after["prediction"].shape == after["noise"].shape
    assert after["lit"].updates == 1


def slug(heading):
    """The anchor that MkDocs, and GitHub alike, give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_are_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", target.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {link}"


def test_every_page_can_be_reached_from_readme_or_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"- {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu or (
            f"{page.relative_to(ROOT / 'docs').as_posix()}," in menu.replace("]", ",")
        ), page


def commands():
    """Each command line of the pages, as the command and its arguments."""
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            lines = [] if language == "python" else block.replace("\\\n", " ").splitlines()
            for line in filter(STARTS.match, lines):
                words = shlex.split(line, comments=True)
                names = [SCRIPTS.get(word, word) for word in words]
                at = next((i for i, n in enumerate(names) if n in (*SCRIPTS.values(), "vae3d")), -1)
                if at >= 0:
                    name, rest = names[at], words[at + 1 :]
                    if name == "vae3d":
                        name, *rest = rest
                    yield pytest.param(name, rest, id=f"{page.stem}: {' '.join(words)}"[:90])


@pytest.mark.parametrize(("name", "argv"), commands())
def test_the_options_of_every_command_shown_are_there(name, argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    there = ["demo" if word == "recipe.yaml" else word for word in argv if word != "..."]
    if len(there) < len(argv):
        there = [*ELSEWHERE[name].split(), *there]
    module, function = COMMANDS[name][0].split(".")
    config.parse(getattr(import_module(f"vae3d.commands.{module}"), function), there)


def test_nothing_in_docs_and_examples_is_larger_than_a_megabyte():
    for path in [*(ROOT / "docs").rglob("*"), *(ROOT / "examples").rglob("*")]:
        assert not path.is_file() or path.stat().st_size < 1_000_000, path


def code_cells(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_as_they_ran_with_nothing_of_the_machine(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    said = "".join("".join(output.get("text", "")) for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not re.search(r"/(tmp|home|root|work|Users)/", said), said
    assert 'DATA = "../data/demo' in "".join(cells[0]["source"]), "of demo volumes, which are free"


SMALL = {
    "own_loop": dict(CACHE="cache", STEPS=2, PATCH=(8, 8, 8)),
    "two_stages": dict(
        DATA="demo",
        WORK="work",
        SPACING_MM=8.0,
        SUBJECTS=8,
        PATCH=(16, 16, 16),
        STEPS=(2, 2),
        SAMPLES=2,
    ),
}
ELSEWHERE_RUN = {"visualize_reconstruction"}  # by test_watching.py


def test_every_notebook_is_run_by_a_test():
    assert {path.stem for path in NOTEBOOKS} == SMALL.keys() | ELSEWHERE_RUN


@pytest.mark.slow
@pytest.mark.parametrize(
    "notebook", [n for n in NOTEBOOKS if n.stem in SMALL], ids=lambda n: n.stem
)
def test_a_notebook_runs_and_shows_what_it_is_committed_with(notebook, home, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VAE3D_CACHE", str(home / "cache"))
    ours = nbformat.read(notebook, as_version=4)
    parameters = next(c for c in ours.cells if "parameters" in c.metadata.get("tags", ()))
    small = {"DATA": "DIR"} | SMALL[notebook.stem]
    assert set(small) <= set(re.findall(r"^(\w+) = ", parameters.source, re.MULTILINE))
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    NotebookClient(ours, timeout=300, resources={"metadata": {"path": str(home)}}).execute()

    def pictures(cells):
        return [sum("image/png" in o.get("data", ()) for o in cell["outputs"]) for cell in cells]

    ran = [cell for cell in ours.cells if cell.cell_type == "code"]
    assert sum(pictures(ran)) and pictures(ran) == pictures(code_cells(notebook))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built with every connection refused."""
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    alone = (
        "import socket\n"
        "def refused(*_): raise OSError('the build asked for a network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--quiet', '--site-dir', {str(out)!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-c", alone], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return out


def anchors(page):
    return set(re.findall(r' id="([^"]+)"', page.read_text()))


@pytest.mark.slow
def test_the_site_has_every_command_with_every_option_and_every_public_name(site):
    for name, (place, _) in COMMANDS.items():
        module, function = place.split(".")
        command = getattr(import_module(f"vae3d.commands.{module}"), function)
        page = site / "commands" / f"{name}.html"
        options = set(inspect.signature(command).parameters)
        groups = {option for option in options if f"--{option}." in page.read_text()}
        assert options - groups <= anchors(page), name
    evaluate = (site / "commands" / "evaluate.html").read_text()
    assert "recon/&lt;case&gt;.nii.gz" in evaluate and "data-root" in evaluate
    for package in (vae3d, loaders):
        shown = anchors(site / "python" / f"{package.__name__}.html")
        titles = {name.rpartition(".")[2] for name in shown}
        assert set(package.__all__) <= titles


@pytest.mark.slow
def test_pages_of_the_site_ask_no_other_server_and_pictures_are_there(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        for tag in tags:
            address = re.search(r'(?:src|href)="([^"]+)"', tag)
            if address and page.name != "404.html" and not address[1].startswith("data:"):
                assert not re.match(r"(\w+:)?//", address[1]), f"{page}: {tag}"
                assert (page.parent / address[1].partition("?")[0]).exists(), f"{page}: {tag}"
    for notebook in NOTEBOOKS:
        assert "<img" in (site / "notebooks" / f"{notebook.stem}.html").read_text()
    assert list((site / "files" / "configs" / "train").glob("*.html"))


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="no browser")
def test_no_page_of_the_site_scrolls_sideways_on_a_phone_or_elsewhere(site, tmp_path):
    kinds = ["index", "data", "benchmarks", "recipes", "commands/train", "python/vae3d", "LOG"]
    kinds += ["how/exact", "notebooks/own_loop", "files/CONTRIBUTING", "files/Dockerfile"]
    with Browser(tmp_path) as browser:
        for kind in kinds:
            browser.open(site / f"{kind}.html")
            for width in (400, 900, 1600):
                browser.resize(width, 1000)
                assert browser.run("document.documentElement.scrollWidth") <= width, (kind, width)
        assert not browser.complaints
