"""Signals that ask to stop: what they end at once, what they wait for, and who sees to it."""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toys import on_ranks

from vae3d import cli, config
from vae3d.stop import CODES, Stopped, asked, listening
from vae3d.training import distributed


def be_signalled(number=signal.SIGTERM):
    """Send this process a signal and work on for a while."""
    os.kill(os.getpid(), number)
    time.sleep(30)


@pytest.mark.parametrize("number, code", CODES.items())
def test_a_signal_ends_a_command_with_its_code_and_one_line(capsys, number, code):
    def command():
        """Work."""
        be_signalled(number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        config.main(command, [])
    assert end.value.code == code == 128 + number
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name}: what was finished is kept\n"
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1


def test_what_is_held_comes_to_its_end_and_what_is_released_in_it_does_not_begin():
    done = []
    with pytest.raises(Stopped) as stopped, listening() as stop, stop.held():
        os.kill(os.getpid(), signal.SIGUSR1)
        done.append(f"step {stop.code}")
        with stop.released():
            done.append("validation")
    assert done == ["step 138"] and stopped.value.code == 138


def test_a_released_part_is_ended_where_it_is():
    done = []
    with listening() as stop, stop.held():
        with pytest.raises(Stopped), stop.released():
            done.append("validation")
            be_signalled()
            done.append("score")
        done.append(f"held again, asked {asked()}")
    assert done == ["validation", "held again, asked 143"] and asked() == 0


def test_a_library_that_hangs_is_ended_in_time():
    """A loop in C with one call from Python: no handler of Python's runs before it returns."""
    assert run_script(
        "stop.GRACE_S = 0.2",
        "with stop.listening():",
        "    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()",
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    ) == (143, "stopped by SIGTERM: what was finished is kept\n")


def test_a_second_signal_ends_even_what_is_held_at_once():
    assert run_script(
        "with stop.listening() as request, request.held():",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    while not request.code: pass",
        "    time.sleep(0.1)",
        "    os.kill(os.getpid(), signal.SIGINT)",
        "    time.sleep(30)",
    ) == (130, "")


def run_script(*lines):
    code = "\n".join(
        ["import hashlib, os, signal, threading, time; from vae3d import stop", *lines]
    )
    environ = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    return done.returncode, done.stderr


class TellsLate:
    """Another rank was asked to stop; to hear of it takes a while."""

    def __init__(self):
        self.begun = threading.Event()

    def tell(self, code):
        raise AssertionError("nobody was asked here")

    def heard(self):
        self.begun.set()
        time.sleep(0.3)
        return CODES[signal.SIGUSR1]


def test_what_another_rank_was_asked_comes_too_late_for_one_that_has_ended(capsys):
    def command():
        """Work."""
        with listening() as stop, stop.heard_by(ranks):
            ranks.begun.wait()

    ranks = TellsLate()
    with pytest.raises(SystemExit) as end:
        config.main(command, [])
    assert end.value.code == 0 and capsys.readouterr().err == ""
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_child_has_the_signals_as_they_were():
    before = [signal.getsignal(number) for number in CODES]
    with listening():
        child = os.fork()
        if not child:
            same = [signal.getsignal(number) for number in CODES] == before and not asked()
            os._exit(0 if same and signal.set_wakeup_fd(-1) == -1 else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0


def wait_for_the_first(world):
    """Rank 0 works alone, the other is sent a signal."""
    if not world.is_main:
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
    begun = time.monotonic()
    try:
        with world.main_first():
            if world.is_main:
                time.sleep(30)
    except Stopped as stopped:
        return stopped.code, time.monotonic() - begun < 8


def wait_for_all(world):
    """Rank 0 is sent a signal while the other waits for it in the library."""
    begun = time.monotonic()
    try:
        if world.is_main:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
            time.sleep(30)
        world.barrier()
    except Stopped as stopped:
        return stopped.code, time.monotonic() - begun < 8
    except RuntimeError as error:  # rank 0 has left: `open_world` knows that it was asked to stop
        return world.heard(), "gloo" in str(error)


@pytest.mark.parametrize("work", [wait_for_the_first, wait_for_all])
def test_a_signal_to_one_rank_stops_all_that_wait(work):
    assert on_ranks(2, work) == [(143, True), (143, True)]


def test_a_rank_that_leaves_has_told_the_others_before(monkeypatch):
    """Its thread may not have had its turn; without the word they would call it lost."""
    happened = []

    class Store:
        def set(self, key, value):
            happened.append((key, value))

    monkeypatch.setattr(distributed, "asked", lambda: 143)
    monkeypatch.setattr(
        distributed.dist.distributed_c10d, "_abort_process_group", lambda: happened.append("left")
    )
    distributed._leave(distributed.World(1, 2, store=Store()), wait=False)
    assert happened == [("stop", "143"), ("stop/1", "told"), "left"]


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, name):
    monkeypatch.setattr(f"torch.{'cuda' if name == 'cuda' else 'backends.mps'}.is_available", bool)
    with pytest.raises(ValueError, match=f"--device {name}: torch sees no {name.upper()} device"):
        distributed._device(name, 0)


def test_a_signal_while_libraries_are_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("vae3d.cli.import_module", lambda name: be_signalled(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "runs/a"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT: nothing was begun\n"


@pytest.mark.parametrize("script", ["train_3d.py", "evaluate.py"])
def test_a_script_hears_signals_while_its_libraries_are_imported(capsys, monkeypatch, script):
    monkeypatch.setattr("vae3d.cli.import_module", lambda name: be_signalled(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).resolve().parents[1] / script), run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT: nothing was begun\n"
