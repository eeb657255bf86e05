"""Trackers are guests: each is called on a thread of its own, and none stands in a run's way.

A guest may be slow, down or broken; a bounded queue and a warning are all that a run has of it.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MAX_FAILURES = 3  # calls that fail in a row before a guest is left alone

Config = Mapping[str, object]
Rows = Sequence[Mapping[str, object]]


class Guest(ABC):
    """A tracker beside the run folder; a `Host` calls it, each time from the same thread.

    Its library is imported in `start`, never before: a run without it does not pay for it.
    """

    name: str

    @abstractmethod
    def start(self, config: Config) -> None:
        """Open the run, the same as in an earlier life of the run folder, and show its options."""

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Show numbers by name; one that is not finite may be left out."""

    @abstractmethod
    def log_table(self, name: str, rows: Rows, step: int) -> None:
        """Show rows with the same columns."""

    @abstractmethod
    def log_media(self, files: Mapping[str, Path], step: int) -> None:
        """Show files by panel, those of a kind that it knows (.png, .gif, .mp4)."""

    @abstractmethod
    def finish(self) -> None:
        """Write or send what is left."""

    def leave(self, finished: bool) -> str:
        """Return what a user should know at the end, or nothing. Called by the run's own thread.

        Args:
            finished: Whether `finish` came to its end in time.
        """
        return "" if finished else f"{self.name} did not finish; metrics.jsonl has all numbers"


class Worker:
    """One thread that runs calls in order behind a bounded queue; a failing call warns.

    Args:
        name: What the calls do, for warnings.
        size: Calls that may wait; further ones are dropped.
    """

    def __init__(self, name: str, size: int):
        self.name = name
        self.calls: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=size)
        self.thread = threading.Thread(target=self._run, name=f"vae3d-{name}", daemon=True)
        self.thread.start()

    def put(self, call: Callable[[], object]) -> bool:
        """Run `call` when its turn comes, unless too many wait."""
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            warnings.warn(f"{self.name}: too slow, some calls were dropped; the run goes on")
            return False
        return True

    def end(self, deadline: float, last: Callable[[], object] | None = None) -> None:
        """Let the thread end after what waits and `last`; waits for room until `deadline`."""
        with suppress(queue.Full):
            for call in ([last] if last else []) + [None]:
                self.calls.put(call, timeout=max(0.0, deadline - time.monotonic()))

    def wait(self, deadline: float) -> bool:
        """Wait for the end until `deadline` [monotonic s]; has it come?"""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        return not self.thread.is_alive()

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as error:  # a dashboard must never stop a run
                warnings.warn(f"{self.name}: {reason(error)}; the run goes on")


class Host:
    """Calls one guest from a thread of its own, until it fails too often.

    Args:
        guest: Who is called.
        config: Gives the run's options, for `Guest.start`; called on the guest's thread.
    """

    def __init__(self, guest: Guest, config: Callable[[], Config]):
        self.guest, self.config = guest, config
        self.there, self.finished, self.failures = False, False, 0
        self.worker = Worker(guest.name, size=4096)
        self.worker.put(self._start)

    def put(self, call: Callable[[Guest], None]) -> None:
        """Let the guest be called when its turn comes."""
        self.worker.put(lambda: self._call(call))

    def end(self, deadline: float) -> None:
        """Let the guest finish when all that waits is done."""
        self.worker.end(deadline, self._finish)

    def wait(self, deadline: float) -> None:
        """Wait for that until `deadline` [monotonic s], and say what was left undone."""
        self.worker.wait(deadline)
        if said := self.guest.leave(self.finished):
            warnings.warn(said)

    def _start(self) -> None:
        self.guest.start(self.config())
        self.there = True

    def _call(self, call: Callable[[Guest], None]) -> None:
        if not self.there:
            return
        try:
            call(self.guest)
            self.failures = 0
        except Exception:
            self.failures += 1
            self.there = self.failures < MAX_FAILURES
            raise

    def _finish(self) -> None:
        if self.there:
            self.guest.finish()
            self.finished = True


def reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
