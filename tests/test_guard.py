"""Scripts that augment: what spawned processes would run again is refused before they start."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import multiprocessing, sys
from loaders import PatchLoader, VolumeStore
from loaders.preprocess import Augment

def work():
    multiprocessing.set_start_method("spawn")
    store = VolumeStore.build(["{folder}/a.npy"], "{folder}/cache", progress=False)
    augment = Augment({{"RandomFlip": {{"axes": [0]}}}})
    loader = PatchLoader(store, (4, 4, 4), patches_per_volume=2, augment=augment, threads=1)
    print([tuple(batch.image.shape) for batch in loader])

{start}
"""


def run(folder: Path, start: str) -> subprocess.CompletedProcess:
    np.save(folder / "a.npy", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    (folder / "script.py").write_text(SCRIPT.format(start=start, folder=folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, folder / "script.py"], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_a_script_without_a_guard_ends_in_one_message_before_any_process(tmp_path):
    done = run(tmp_path, "work()")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: {tmp_path / 'script.py'}, line 13: augmentation starts processes, and by "
        "spawn each runs this script again: put what the script does under "
        '`if __name__ == "__main__":` (or threads=0)'
    )


@pytest.mark.slow
def test_a_script_with_a_guard_augments_in_spawned_processes(tmp_path):
    done = run(tmp_path, 'if __name__ == "__main__":\n    work()')
    assert done.stdout == "[(1, 1, 4, 4, 4), (1, 1, 4, 4, 4)]\n", done.stderr


GUARDED = 'import loaders.guard\nif __name__ == "__main__":\n    loaders.guard.require_guard()\n'


@pytest.mark.parametrize(
    ("way", "guarded", "refused"),
    [("spawn", True, False), ("spawn", False, True), ("forkserver", False, True),
     ("fork", False, False)],
)  # fmt: skip
def test_the_guard_is_looked_for_around_the_line_that_runs(tmp_path, way, guarded, refused):
    text = GUARDED if guarded else GUARDED.replace("    loaders", "    pass\nloaders")
    (tmp_path / "script.py").write_text(text)
    code = (
        "import multiprocessing, runpy, sys\n"
        "multiprocessing.set_start_method(sys.argv[2])\n"
        "try: runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "script.py", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (f"line 4: augmentation starts processes, and by {way}" in done.stdout) is refused
