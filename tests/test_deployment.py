"""The files that bring a run to a cluster or into a container, tried without either."""

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SBATCH = ROOT / "examples" / "train.sbatch"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of two tasks on two nodes: `srun` runs them, `scontrol` notes what it is asked."""

    def tool(name, text):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    tool("scontrol", 'echo "$@" >> asked; [ "$1" = show ] && printf "node7\\nnode8\\n"')
    tool(
        "srun",
        """SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=0 "$@"; wait $first""",
    )
    said = '"$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$@"'
    tool("vae3d", f'printf "%s|" {said} > rank$RANK; [ "$MASTER_PORT" -gt 1024 ] && exit "$CODE"')
    variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2"}

    def submit(code, *argv):
        environment = os.environ | variables | {"CODE": str(code)}
        environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["bash", str(SBATCH), *argv], env=environment, cwd=tmp_path)
        return done.returncode, (tmp_path / "asked").read_text().splitlines()

    return submit


def test_each_task_of_slurm_is_a_rank_with_the_options_as_they_were_given(slurm, tmp_path):
    code, asked = slurm(0, "--config", "ct", "--data.root", "a folder", "--patch_size", "[8,8,8]")
    options = "train|--config|ct|--data.root|a folder|--patch_size|[8,8,8]|"
    assert (tmp_path / "rank0").read_text() == f"0|0|2|node7|{options}"
    assert (tmp_path / "rank1").read_text() == f"1|0|2|node7|{options}"
    assert code == 0 and asked == ["show hostnames node[7-8]"]


@pytest.mark.parametrize(("code", "again"), [(138, True), (0, False), (2, False), (143, False)])
def test_a_job_lines_up_again_after_its_time_limit_alone(slurm, code, again):
    ended, asked = slurm(code)
    assert ended == code
    assert ("requeue 4711" in asked) == again


def test_slurm_signals_in_time_and_keeps_the_log_of_every_life():
    asked = re.findall(r"^#SBATCH --(\S+)", SBATCH.read_text(), re.MULTILINE)
    assert {"signal=USR1@180", "requeue", "open-mode=append"} <= set(asked)


def test_the_image_is_built_of_what_there_is_and_has_every_package():
    copied = {
        word
        for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
        for word in line.split()
    }
    assert all((ROOT / word).exists() for word in copied), copied
    context = (ROOT / ".dockerignore").read_text().splitlines()
    assert context[0] == "*" and {line[1:] for line in context if line[0] == "!"} == copied
    assert {"loaders", "vae3d", "configs", "setup.cfg", "constraints.txt"} <= copied
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.search(r"'\.\[(.+)\]'", DOCKERFILE)[1].split(",")
    assert set(extras) <= set(setup["options.extras_require"])


def test_the_image_takes_cpu_or_cuda_by_one_argument_and_the_tested_versions():
    assert re.search(r"^ARG TORCH=cpu$", DOCKERFILE, re.MULTILINE)
    installs = re.findall(r"^RUN pip install .*$", DOCKERFILE, re.MULTILINE)
    assert all("-c constraints.txt" in line and "--no-cache-dir" in line for line in installs)
    assert ["${TORCH}" in line for line in installs] == [True, False]
    assert re.search(r"^FROM python:3\.\d+-slim$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^USER \d+$", DOCKERFILE, re.MULTILINE), "not root"
