"""How far the work on many volumes is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")
LINE_EVERY_S = 30.0  # in a log, while volumes are cached


def num_threads() -> int:
    """Return how many volumes to read at once: one per core that is ours, 8 at most."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def progress_bar(
    tasks: list[Future[Result]], title: str, show: bool
) -> Iterator[Future[Result]]:  # fmt: skip
    """Iterate over tasks as they end, with a bar on a terminal and now and then a line in a log."""
    if not show:
        yield from tasks
    elif not sys.stderr.isatty():
        yield from with_lines(tasks, title)
    else:
        from rich.console import Console
        from rich.progress import track

        yield from track(tasks, title, console=Console(stderr=True), transient=True)


def with_lines(tasks: list[Future[Result]], title: str) -> Iterator[Future[Result]]:
    """Iterate over tasks and say every `LINE_EVERY_S` how far they are; quick ones say nothing."""
    begun = told = time.monotonic()
    for task in tasks:
        ended = False
        while not ended:
            pause = max(0.0, told + LINE_EVERY_S - time.monotonic())
            ended = not wait([task], timeout=pause).not_done
            now = time.monotonic()
            if now - told >= LINE_EVERY_S:
                told = now
                done = sum(one.done() for one in tasks)
                per_volume = (now - begun) / max(done, 1)
                left = f", {per_volume * (len(tasks) - done) / 60:.0f} min left" if done else ""
                line = f"{title}: {done} of {len(tasks)} after {(now - begun) / 60:.1f} min"
                print(line + left, file=sys.stderr, flush=True)
        yield task
