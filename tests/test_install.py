"""What installs the package: the lock and its hashes, what is said to be tested, the Dockerfile."""

import configparser
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
LOCK = (ROOT / "requirements.lock").read_text()
PYPI = "https://pypi.org/simple"
SMALL = ("einops", "docstring-parser", "rich", "nibabel", "wrapt")  # of the lock, quickly fetched


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement.strip())[0].lower().replace("_", "-")


def locked():
    """Each requirement of the lock: its name, its version and its block of lines."""
    for block in re.findall(r"^[\w.-]+==.*\n(?: {4}--hash=.*\n?)*", LOCK, re.MULTILINE):
        name, version = re.match(r"([\w.-]+)==([\w.+!-]+)", block).groups()
        yield name_of(name), version, block


def wanted():
    """What setup.cfg asks for, with the extras that the Dockerfile installs."""
    extras = re.search(r"'\.\[(.+)\]'", (ROOT / "Dockerfile").read_text())[1].split(",")
    lines = SETUP["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += SETUP["options.extras_require"][extra].splitlines()
    return {name_of(line) for line in lines if line.strip() and not line.strip().startswith("#")}


def tool(name):
    return shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)


@pytest.fixture(scope="module")
def index():
    """Skips where PyPI cannot be reached."""
    try:
        urllib.request.urlopen(f"{PYPI}/einops/", timeout=10).close()
    except (urllib.error.URLError, TimeoutError) as error:
        pytest.skip(f"no index: {error}")


def test_the_lock_has_all_that_setup_cfg_wants_at_the_tested_versions():
    versions = {name: version for name, version, _ in locked()}
    assert wanted() <= versions.keys()
    tested = dict(
        (name_of(line), line.partition("==")[2])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert {n: v for n, v in versions.items() if n in tested and v != tested[n]} == {}


def test_every_file_of_the_lock_has_its_hash_and_no_index_has_an_address():
    blocks = [block for *_, block in locked()]
    assert len(blocks) > 40
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)
    rest = LOCK
    for block in blocks:
        rest = rest.replace(block, "")
    assert "make lock" in rest and all(line.startswith("#") for line in rest.splitlines() if line)
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", LOCK)


@pytest.mark.slow
def test_the_whole_lock_would_be_installed_as_it_stands(index, tmp_path):
    uv = tool("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    command = [uv, "pip", "install", "--dry-run", "--require-hashes", "--default-index", PYPI]
    command += ["--python", sys.executable, "--target", str(tmp_path / "there")]
    command += ["--cache-dir", str(tmp_path / "cache"), "-r", str(ROOT / "requirements.lock")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    would = set(re.findall(r"^ \+ ([\w.-]+)==", done.stderr, re.MULTILINE))
    assert wanted() <= {name_of(name) for name in would}


@pytest.mark.slow
def test_pip_finds_the_hashes_of_the_lock_in_the_files_of_the_index(index, tmp_path):
    """Of a few small packages: pip fetches a file to compare its hash, also in a dry run."""
    blocks = [block for name, _, block in locked() if name in SMALL]
    assert len(blocks) >= 4
    lock = tmp_path / "some.lock"
    lock.write_text("".join(blocks))
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    pip += ["--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stdout

    lock.write_text(re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", "".join(blocks)))
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode != 0 and "DO NOT MATCH" in done.stderr, "and no other file is taken"


def test_the_page_says_of_no_python_that_it_was_tested_but_of_that_of_the_tests():
    page = (ROOT / "docs" / "install.md").read_text()
    tested = re.findall(r"^\| ([\d., ]+) \| the whole test suite passes", page, re.MULTILINE)
    assert tested == ["3.11"] and SETUP["options"]["python_requires"] == ">=3.11"
    image = re.search(r"^FROM python:(\d+\.\d+)-slim$", (ROOT / "Dockerfile").read_text(), re.M)
    assert image[1] in tested
    told = [line for line in page.splitlines() if line.startswith("| 3.12")]
    assert told and all("not tested" in line for line in told)


def test_every_extra_of_setup_cfg_is_on_the_page():
    page = (ROOT / "docs" / "install.md").read_text()
    for extra in SETUP["options.extras_require"]:
        assert re.search(rf"^\|.*`{extra}`", page, re.MULTILINE), extra


def test_the_dockerfile_is_lint_free():
    hadolint = tool("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
