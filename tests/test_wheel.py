"""The wheel as a user installs it: beside other packages, far from the checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(pytest.__file__).resolve().parents[1]


def test_setup_cfg_names_every_package_and_nothing_else():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = setup["options"]["packages"].split()
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ("vae3d", "loaders")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(named) == there | {"vae3d.configs"}


def test_no_module_bears_the_name_of_a_function_exported_beside_it():
    """It would replace the function as soon as somebody imports it."""
    import loaders
    import vae3d
    import vae3d.inference
    import vae3d.stage2

    for package in (vae3d, loaders, vae3d.inference, vae3d.stage2):
        folder = Path(package.__file__).parent
        for name in package.__all__:
            assert not (folder / f"{name}.py").exists() and not (folder / name).exists()
            assert getattr(package, name) is not None


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel, which sees the packages installed here but not this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-deps", "--no-index", "-q"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    (own,) = (folder / "env").glob("lib/python*/site-packages")
    (own / "others.pth").write_text(f"{SITE}\n")  # after ours, and its own .pth files are not read
    return folder / "env" / "bin"


@pytest.mark.slow
def test_the_wheel_trains_and_reports_from_an_empty_folder_beside_another_evaluate(
    installed, tmp_path
):
    pytest.importorskip("datasets", reason="Hugging Face's evaluate is not installed")
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    vae3d = installed / "vae3d"
    run(vae3d, "demo-data", "data", "--num_subjects", "5", "--spacing_mm", "8")
    small = ["--patch_size", "[16,16,16]", "--patches_per_volume", "2", "--max_steps", "3"]
    network = ["--model.channels", "[4,8]", "--val_every", "3", "--media_every", "0"]
    data = ["--data.root", "data", "--data.cache_dir", "cache", "--wandb", "disabled"]
    run(vae3d, "train", "--config", "demo", *data, "--out_dir", "run", *small, *network)
    run(vae3d, "evaluate", "--checkpoint", "run", *data, "--split", "val", "--out_dir", "out")
    run(vae3d, "report", "run")
    assert (tmp_path / "out" / "summary.json").is_file() and (
        tmp_path / "run/report.html"
    ).is_file()
    places = "import evaluate, vae3d; print(evaluate.__file__); print(vae3d.evaluate.__module__)"
    theirs, ours = run(installed / "python", "-c", places).split()
    assert Path(theirs) == SITE / "evaluate" / "__init__.py"
    assert ours == "vae3d.commands.evaluate"
