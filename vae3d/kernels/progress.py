"""How far long work has come, told from within it in parts of the whole.

    with watched(show):                 # show(0.02) is called whenever two hundredths have passed
        for volume in volumes:
            with part(1 / len(volumes)):
                work(volume)            # calls passed(1 / tiles) after each tile

Whoever works says which part of its own work has passed, and knows nothing of what it is part of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watcher = Callable[[float], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


class _Part:
    """Passes on what is told, as a share of the work around it; never more than all of it."""

    def __init__(self, outer: Watcher, share: float):
        self.outer, self.share, self.left = outer, share, 1.0

    def __call__(self, amount: float) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        self.outer(self.share * amount)


@contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Inside, `watcher` hears of what passes; None for nobody."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def part(share: float) -> Iterator[None]:
    """What passes inside is this share of the work around; at the end all of it has passed."""
    outer = _watcher.get()
    if outer is None:
        yield
        return
    inside = _Part(outer, share)
    with watched(inside):
        yield
    inside(1.0)


def passed(amount: float) -> None:
    """Tell that this much of the work at hand, of 1, has passed."""
    if (watcher := _watcher.get()) is not None:
        watcher(amount)


def is_watched() -> bool:
    """Whether anybody hears of it."""
    return _watcher.get() is not None
