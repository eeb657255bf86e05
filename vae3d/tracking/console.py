"""What a run says in the terminal: one progress line, plain lines when it is not a terminal.

console = Console(total_steps=1000, start_step=200)
console.summary({"volumes": "38 train, 5 val, 5 test", "patch": "64 x 64 x 64"})
console.update(step=210, metrics={"train/loss": 0.1, "perf/patches_per_s": 31.0})
console.print("val/psnr 27.1")
console.close()
"""

import sys
import time
from collections.abc import Mapping


class Console:
    """One progress line with step, loss terms, patches/s, time left and memory.

    Args:
        total_steps: Step at which the run ends.
        start_step: Step from which this process starts (above 0 after a resume).
        every_s: Seconds between plain lines when the output is not a terminal.
        stream: Where to write; default standard error, so that pipes get nothing but results.
        enabled: False on every rank but the first.
    """

    def __init__(self, total_steps, start_step=0, every_s=10.0, stream=None, enabled=True):
        from rich.console import Console as Terminal

        self.total, self.start, self.enabled = total_steps, start_step, enabled
        self.every_s, self._next_line = every_s, 0.0
        self._begun, self._progress, self._task = time.monotonic(), None, None
        self.terminal = Terminal(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.live = enabled and self.terminal.is_terminal

    def summary(self, facts: Mapping[str, object], title: str = "vae3d") -> None:
        """Print what the run is about to do, one aligned fact a line."""
        if not self.enabled:
            return
        width = max(map(len, facts), default=0)
        self.terminal.print(f"[bold]{title}[/bold]" if self.live else title)
        for name, fact in facts.items():
            self.terminal.print(f"  {name:<{width}}  {fact}", markup=False)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show `step` and, when given, the newest numbers."""
        if not self.enabled:
            return
        text = _text(metrics or {})
        if self.live:
            self._bar().update(self._task, completed=step, **({"text": text} if text else {}))
        elif text and (time.monotonic() >= self._next_line or step >= self.total):
            self._next_line = time.monotonic() + self.every_s
            self.terminal.print(
                f"step {step}/{self.total}  {text}  eta {self._eta(step)}", markup=False
            )

    def print(self, line: str) -> None:
        """Print a line above the progress line."""
        if self.enabled:
            (self._progress.console if self._progress else self.terminal).print(line, markup=False)

    def close(self) -> None:
        """Leave the progress line as it is and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _bar(self):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            self._progress = Progress(
                TextColumn("[bold]{task.completed:.0f}[/bold]/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.terminal,
            )
            self._task = self._progress.add_task(
                "", total=self.total, completed=self.start, text=""
            )
            self._progress.start()
        return self._progress

    def _eta(self, step: int) -> str:
        done = step - self.start
        if done <= 0:
            return "--:--"
        left = round((time.monotonic() - self._begun) / done * (self.total - step))
        return f"{left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}"


def _text(metrics: Mapping[str, float]) -> str:
    """Short form of the newest numbers: losses first, then speed and memory."""
    parts = []
    for name, value in metrics.items():
        group, _, short = name.rpartition("/")
        if group == "train":
            parts.append(f"{short} {float(value):.4g}")
    if (speed := metrics.get("perf/patches_per_s")) is not None:
        parts.append(f"{float(speed):.1f} patches/s")
    for key, label in (("perf/gpu_memory_gb", "GPU"), ("perf/cpu_memory_gb", "RAM")):
        if metrics.get(key) is not None:
            parts.append(f"{label} {float(metrics[key]):.1f} GB")
    return "  ".join(parts)
