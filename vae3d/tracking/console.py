"""What a run says in the terminal: one progress line, plain lines when it is not a terminal.

    console = Console(total_steps=1000, start_step=200)
    console.summary({"volumes": "38 train, 5 val, 5 test", "patch": "64 x 64 x 64"})
    console.update(step=210, metrics={"train/loss": 0.1, "perf/patches_per_s": 31.0})
    console.print("val/psnr 27.1")
    console.close()

Warnings that arise while a console is open are shown once each, as one line above the progress.
"""

import math
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task, TaskID

TERMS = (
    *("loss", "recon", "kl", "commitment", "perceptual", "adversarial", "discriminator_loss"),
    "perplexity",
)
UNITS = ("patches", "latents")  # that training counts, by its stage
MEMORY = (("perf/gpu_memory_gb", "GPU"), ("perf/cpu_memory_gb", "RAM"))


class Console:
    """One progress line with step, loss terms, speed, time left and memory.

    Args:
        total_steps: Step at which the run ends.
        start_step: Step from which this process starts (above 0 after a resume).
        every_s: Seconds between plain lines when the output is not a terminal.
        stream: Where to write; default standard error, so that pipes get nothing but results.
        enabled: False on every rank but the first, which then shows nothing, warnings included.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        every_s: float = 10.0,
        stream: IO[str] | None = None,
        enabled: bool = True,
    ):
        from rich.console import Console as Terminal

        self.total, self.start, self.enabled = total_steps, start_step, enabled
        self.every_s, self._next_line = every_s, 0.0
        self._begun, self._text = time.monotonic(), ""
        self._shown: tuple[Progress, TaskID] | None = None
        self.terminal = Terminal(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.live = enabled and self.terminal.is_terminal
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._showwarning = warnings.showwarning
        warnings.showwarning = self._warn

    def summary(self, facts: Mapping[str, object], title: str = "vae3d") -> None:
        """Print what the run is about to do, one aligned fact a line."""
        if not self.enabled:
            return
        width = max(map(len, facts), default=0)
        self.terminal.print(title, style="bold", markup=False)
        for name, fact in facts.items():
            self.terminal.print(f"  {name:<{width}}  {fact}", markup=False)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show `step` and, when given, the newest numbers."""
        if not self.enabled:
            return
        text = in_short(metrics or {})
        if self.live:
            progress, task = self._bar()
            self._text = text or self._text
            progress.update(task, completed=step, text=self._text)
        elif text and (time.monotonic() >= self._next_line or step >= self.total):
            self._next_line = time.monotonic() + self.every_s
            line = f"step {step}/{self.total}  {text}  {self._time_left(step)}"
            self.terminal.print(line.rstrip(), markup=False)

    def print(self, line: str) -> None:
        """Print a line above the progress line."""
        if self.enabled:
            (self._shown[0].console if self._shown else self.terminal).print(line, markup=False)

    def close(self) -> None:
        """Leave the progress line as it is, give the terminal and the warnings back."""
        if self._shown is not None:
            self._shown[0].stop()
            self._shown = None
        if warnings.showwarning == self._warn:
            warnings.showwarning = self._showwarning

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _warn(self, message: Warning | str, *where: object, **how: object) -> None:
        text = " ".join(str(message).split())
        with self._lock:  # the media and W&B threads warn too
            known = text in self._warned
            self._warned.add(text)
        if not known:
            self.print(f"warning: {text}")

    def _bar(self) -> "tuple[Progress, TaskID]":
        if self._shown is None:
            from rich.progress import BarColumn, Progress, TextColumn

            progress = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}", style="bold"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                _TimeLeft(self),
                console=self.terminal,
                refresh_per_second=4,
            )
            task = progress.add_task("", total=self.total, completed=self.start, text="")
            self._shown = progress, task
            progress.start()
        return self._shown

    def _time_left(self, step: int) -> str:
        """Time to the end at the mean speed since the start, a resume counted from its own."""
        done = step - self.start
        if done <= 0 or step >= self.total:
            return ""
        left = round((time.monotonic() - self._begun) / done * (self.total - step))
        return f"eta {spelled(left)}"


class Gauge:
    """How far work on volumes has come, within each of them, with the time that is left.

    In a terminal one line lives, on standard error; elsewhere a plain line comes now and then, so
    that a log of short work has none.

        with Gauge("evaluate") as gauge, watched(gauge.add):
            ...

    Args:
        what: What is done.
        every_s: Seconds between plain lines where the output is no terminal.
        stream: Where to write; default standard error.
        enabled: False on every rank but the first.
    """

    def __init__(
        self,
        what: str,
        every_s: float = 30.0,
        stream: IO[str] | None = None,
        enabled: bool = True,
    ):
        from rich.console import Console as Terminal

        self.what, self.every_s, self.enabled = what, every_s, enabled
        self.done, self._begun = 0.0, time.monotonic()
        self._next_line = self._begun + every_s
        self.terminal = Terminal(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._bar: tuple[Progress, TaskID] | None = None

    def add(self, amount: float) -> None:
        """Tell that this part of the whole work, of 1, has passed."""
        self.done = min(self.done + amount, 1.0)
        if not self.enabled:
            return
        if self.terminal.is_terminal:
            progress, task = self._shown()
            progress.update(task, completed=self.done, left=f"eta {self.left()}")
        elif self.done < 1 and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self.every_s
            line = f"{self.what}: {self.done:.0%}  eta {self.left()}"
            self.terminal.print(line, markup=False)

    def left(self) -> str:
        """Time to the end, at the speed since the beginning."""
        if not self.done:
            return "unknown"
        elapsed = time.monotonic() - self._begun
        return spelled(round(elapsed / self.done * (1 - self.done)))

    def _shown(self) -> "tuple[Progress, TaskID]":
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn

            progress = Progress(
                TextColumn(self.what, markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[left]}"),
                console=self.terminal,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays there
                refresh_per_second=4,
            )
            self._bar = progress, progress.add_task("", total=1.0, left="")
            progress.start()
        return self._bar

    def __enter__(self) -> "Gauge":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


def spelled(seconds: int) -> str:
    """A duration as a clock shows it."""
    return f"{seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _TimeLeft(console: Console) -> "ProgressColumn":
    """A column of rich's progress line; a function because rich is imported late."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        def render(self, task: "Task") -> Text:
            return Text(console._time_left(int(task.completed)), style="bold")

    return TimeLeft()


def in_short(metrics: Mapping[str, float]) -> str:
    """Short form of the newest numbers: loss terms, then speed, waiting and memory."""
    parts = [
        f"{term} {float(metrics[f'train/{term}']):.4g}"
        for term in TERMS
        if metrics.get(f"train/{term}") is not None
    ]
    if skipped := metrics.get("train/skipped_steps"):
        parts.append(f"skipped {float(skipped):.0f}")
    for unit in UNITS:
        if (speed := metrics.get(f"perf/{unit}_per_s")) is not None:
            parts.append(f"{_speed(float(speed))} {unit}/s")
    if (wait := metrics.get("perf/data_wait")) is not None and wait > 0.1:
        parts.append(f"waits {float(wait):.0%} for data")
    for key, label in MEMORY:
        if metrics.get(key) is not None:
            parts.append(f"{label} {float(metrics[key]):.1f} GB")
    return "  ".join(parts)


def _speed(value: float) -> str:
    """Three digits: 0.25, 3.1, 31, 1240."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if value >= 30 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
