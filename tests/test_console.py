"""The terminal shows one line that lives; a log file gets plain lines; a warning is said once."""

import io
import threading
import time
import warnings

import pytest

from vae3d.tracking.console import Console, in_short

NUMBERS = {
    "train/loss": 0.12345678,
    "train/recon": 0.1,
    "train/kl": 3.0,
    "train/lr": 1e-4,
    "perf/patches_per_s": 31.4,
    "perf/gpu_memory_gb": 6.21,
}


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")


def test_a_log_file_gets_plain_lines_now_and_then(monkeypatch):
    out = io.StringIO()
    with Console(100, every_s=3600, stream=out) as console:
        for step in range(1, 101):
            console.update(step, NUMBERS)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2, "the first and the last"
    assert lines[0].startswith("step 1/100  loss 0.1235  recon 0.1  kl 3  31 patches/s  GPU 6.2 GB")
    assert "eta 0:00:0" in lines[0] and "eta" not in lines[1]
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_terminal_gets_one_line_that_lives():
    out = Tty()
    with Console(100, start_step=40, stream=out) as console:
        assert console.live
        console.update(50, NUMBERS)
        console.print("val/psnr 27.1 [dB]")
        console.update(60, NUMBERS)
    shown = out.getvalue()
    assert "60/100" in shown and "31 patches/s" in shown and "GPU 6.2 GB" in shown
    assert "val/psnr 27.1 [dB]" in shown, "no markup is taken from the text"
    assert "eta " in shown and "\x1b[" in shown


def test_time_left_of_a_resumed_run_counts_its_own_steps(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(200, start_step=100, every_s=0, stream=out)
    now[0] += 50
    console.update(110, NUMBERS)
    console.close()
    assert "eta 0:07:30" in out.getvalue()


def test_the_summary_is_aligned():
    out = io.StringIO()
    with Console(1, stream=out) as console:
        console.summary({"volumes": "38 train", "latent": "4 x 16 x 16 x 16 [16x]"}, title="runs/a")
    assert out.getvalue() == "runs/a\n  volumes  38 train\n  latent   4 x 16 x 16 x 16 [16x]\n"


def test_warnings_are_said_once_in_one_line_from_any_thread():
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with Console(1, stream=out):
            for _ in range(3):
                warnings.warn("too\n slow", stacklevel=1)
            thread = threading.Thread(target=warnings.warn, args=("from a thread",))
            thread.start()
            thread.join()
    assert out.getvalue().splitlines() == ["warning: too slow", "warning: from a thread"]


def test_closing_gives_the_warnings_back():
    before = warnings.showwarning
    outer = Console(1, stream=io.StringIO())
    outer.close()
    outer.close()
    assert warnings.showwarning is before


def test_other_ranks_are_silent():
    out = Tty()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with Console(10, stream=out, enabled=False) as console:
            console.summary({"a": 1})
            console.update(5, NUMBERS)
            console.print("line")
            warnings.warn("something", stacklevel=1)
    assert out.getvalue() == ""


def test_the_short_form_names_what_matters():
    assert in_short({"train/lr": 1.0, "train/kl_std": 2.0}) == ""
    assert in_short({"train/skipped_steps": 2.0, "perf/data_wait": 0.25}) == (
        "skipped 2  waits 25% for data"
    )
    assert in_short({"perf/data_wait": 0.05, "perf/patches_per_s": 0.254}) == "0.25 patches/s"
    assert in_short({"perf/latents_per_s": 12.0}) == "12.0 latents/s"
    assert "nan" in in_short({"train/loss": float("nan")})
