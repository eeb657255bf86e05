"""Being asked to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, the same for every command.

    with listening() as stop:
        with stop.held():      # a signal waits for the end of this: ask for `stop.code`
            step()
            save()
            with stop.released():
                validate()     # a signal ends this wherever it is, by `Stopped`

Outside of `held` a signal raises `Stopped` in the main thread, as Ctrl-C raises KeyboardInterrupt.
Files are written whole or not at all (`loaders.whole`), so what was finished stays and the rest is
as if never begun. A thread ends the process where the main one hangs in a long call of a library,
and passes what one rank was asked on to the others.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

CODES = {
    int(getattr(signal, name)): 128 + int(getattr(signal, name))
    for name in ("SIGTERM", "SIGINT", "SIGUSR1")
    if hasattr(signal, name)
}
GRACE_S = 8.0  # from a signal, or from the end of what was held, to the end of the process
POLL_S = 0.2  # how often one of several ranks asks whether another was asked to stop
ECHO_S = 2.0  # torchrun, and the other ranks, repeat a signal: that is one request, not two


class Stopped(BaseException):
    """The process was asked to stop. No `Exception`: nobody takes it for an error to go on after.

    Args:
        code: Exit code, 128 + the signal's number.
    """

    def __init__(self, code: int):
        super().__init__(f"stopped by {signal.Signals(code - 128).name}")
        self.code = code


class Ranks(Protocol):
    """How the ranks of a run hear of each other's signals."""

    def tell(self, code: int, /) -> None: ...  # noqa: D102
    def heard(self) -> int: ...  # noqa: D102


class Stop:
    """What is known of a request to stop.

    `code` is 0 until a signal has come, then 143, 130 or 138. A second signal ends the process at
    once. `ranks` are told and asked where there are several.
    """

    def __init__(self) -> None:
        self.code = 0
        self.ranks: Ranks | None = None
        self._held = self._taken = self._over = False
        # The system's own handler writes to it, also while the main thread hangs in a library.
        self._door, self._bell = socket.socketpair()
        self._bell.setblocking(False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the body come to its end, whatever signal comes; it looks at `code` itself."""
        with self._holding(True):
            yield

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within `held`: let a signal end the body; one that has come already ends it now."""
        with self._holding(False):
            if self.code:
                raise Stopped(self.code)
            yield

    @contextmanager
    def _holding(self, held: bool) -> Iterator[None]:
        before, self._held = self._held, held
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def heard_by(self, ranks: Ranks) -> Iterator[None]:
        """Share requests with the other ranks of a run while the body runs."""
        self.ranks = ranks
        self._bell.send(b"\0")  # `_watch` asks them from now on
        try:
            yield
        finally:
            self.ranks = None

    def share(self, code: int) -> None:
        """Take for one's own what another rank was asked, where the ranks have agreed on it."""
        if not self.code:
            self.code = code
            if self.ranks:
                self.ranks.tell(code)

    def listen(self) -> None:
        """Take the signals from now on. Only in the main thread."""
        self._before = {number: signal.signal(number, self._on_signal) for number in CODES}
        self._bell_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="vae3d-stop", daemon=True)
        self._watcher.start()

    def give_back(self) -> None:
        """Leave the signals as they were before `listen`; a forked child does that, too."""
        signal.set_wakeup_fd(self._bell_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def end(self) -> None:
        """Let `_watch` end; a signal that comes meanwhile, or that it passes on, is too late."""
        self._held = self._over = True
        signal.set_wakeup_fd(self._bell_before)
        self._bell.close()
        self._watcher.join(GRACE_S)
        self.give_back()

    def take(self) -> None:
        """Be trusted with a request that has come: the time it takes is no longer watched."""
        self._taken = bool(self.code)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self.code:  # of further ones `_watch` decides
            self.code = CODES[number]
            if not self._held:
                raise Stopped(self.code)

    def _watch(self) -> None:
        """See to it, in a thread, that a signal is followed in time, and by all ranks."""
        code, begun, since = 0, 0.0, 0.0
        while not self._over:
            ranks = self.ranks
            self._door.settimeout(POLL_S if code or ranks else None)
            for number in _signals(self._door):
                if not code:
                    code, begun = CODES[number], time.monotonic()
                    since = begun
                    if ranks:
                        ranks.tell(code)
                elif "RANK" not in os.environ or time.monotonic() - begun > ECHO_S:
                    os._exit(CODES[number])
            now = time.monotonic()
            since = now if self._held or not code else since
            if now - since > GRACE_S and not self._taken:
                say(f"{Stopped(code)}: what was finished is kept")
                os._exit(code)
            if ranks and not (code or self.code or self._held) and (heard := ranks.heard()):
                signal.pthread_kill(threading.main_thread().ident or 0, heard - 128)
        self._door.close()


def _signals(door: socket.socket) -> list[int]:
    """Those of our signals that have come, after the socket's timeout perhaps none."""
    try:
        return [number for number in door.recv(64) if number in CODES]
    except TimeoutError:
        return []


_listening: list[Stop] = []  # at most one


@contextmanager
def listening() -> Iterator[Stop]:
    """Take the signals in the body. Within another `listening` it is that one's `Stop` that counts.

    Outside of the main thread signals stay as they are.
    """
    if _listening or threading.current_thread() is not threading.main_thread():
        stop = _listening[0] if _listening else Stop()
        try:
            yield stop
        finally:
            stop.take()
        return
    stop = Stop()
    stop.listen()
    _listening.append(stop)
    try:
        yield stop
    finally:
        stop.end()
        _listening.clear()


def asked() -> int:
    """The exit code of the signal that has come, 0 for none."""
    return _listening[0].code if _listening else 0


def say(line: str) -> None:
    """Tell the user, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _as_before() -> None:
    for stop in _listening:
        stop.give_back()
    _listening.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_as_before)
