"""What the pages show works: Python snippets run as they stand, commands have the options shown."""

import re
import shlex
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

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
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = re.compile("(vae3d|python|torchrun|sbatch) ")
SCRIPTS = {"train_3d.py": "train", "evaluate.py": "evaluate", "examples/train.sbatch": "train"}
ELSEWHERE = {"train": "--config demo --data.root DIR --out_dir runs/a"}  # what `...` stands for

TINY = partial(
    CustomVAE, channels=(4, 8, 8), num_res_blocks=1, norm=partial(GroupNorm, num_groups=4)
)
QUICK = dict(
    model=TINY, patch_size=(8, 8, 8), batch_size=1, max_steps=1, val_every=0, media_every=0,
    wandb="disabled", device="cpu",
)  # fmt: skip


def quick_train(data, out_dir, **options):
    """What a snippet trains, in a size for tests."""
    return train_3d(data, out_dir, **(options | QUICK))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the snippets find there: DIR, scan.nii.gz, runs/demo and its latents, my-vae."""
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
        convert("runs/demo", Path("my-vae"))
        encode("runs/demo", "latents", device="cpu")
    return home


def snippets(page):
    return [code for language, code in BLOCK.findall(page.read_text()) if language == "python"]


def run_snippets(page, home, monkeypatch, **known):
    monkeypatch.chdir(home)
    monkeypatch.setenv("VAE3D_CACHE", str(home / "cache"))
    monkeypatch.setattr(vae3d, "train_3d", quick_train, raising=False)
    monkeypatch.setattr(vae3d, "CustomVAE", TINY, raising=False)
    for code in snippets(page):
        exec(compile(code, page.name, "exec"), known)
    return known


def test_the_snippets_of_the_readme_run_and_give_back_what_they_say(home, monkeypatch):
    x = torch.rand(1, 1, 20, 16, 12)
    after = run_snippets(ROOT / "README.md", home, monkeypatch, vae3d=vae3d, x=x)
    assert after["batch"].image.shape == (4, 1, 64, 64, 64)
    scan, recon = read_volume(home / "scan.nii.gz"), read_volume(home / "recon.nii.gz")
    assert recon.data.shape == scan.data.shape and np.array_equal(recon.affine, scan.affine)
    assert recon.data.std() > 100, "HU, not parts of the window"
    assert after["volume"].data.shape == scan.data.shape
    assert np.array_equal(after["volume"].affine, scan.affine)


def test_the_segmenter_of_the_page_on_evaluation_is_one(home, monkeypatch):
    after = run_snippets(ROOT / "docs" / "evaluation.md", home, monkeypatch)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_snippet_that_no_test_runs(page):
    assert page.name in ("README.md", "two_stages.md", "evaluation.md") or not snippets(page)


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
