"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def lr_scale(
    step: int, *, schedule: str, warmup_steps: int, max_steps: int, final: float = 0.0
) -> float:
    """Factor on the base learning rate for the update that leads from `step` to `step + 1`.

    Rises linearly over `warmup_steps` (the first update is not zero), then follows `schedule` down
    to `final` at `max_steps`.

    Args:
        step: Number of updates done so far.
        schedule: cosine | linear | constant.
        warmup_steps: Length of the linear rise [steps].
        max_steps: Where the descent ends [steps].
        final: Factor that remains at the end.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - (1.0 - final) * progress
    assert schedule == "cosine", schedule
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def rewarmed(scale: float, step: int, since: int, begin: float, steps: int) -> float:
    """Factor at `step` of a schedule that is risen to anew, linearly, from where another one ended.

    Args:
        scale: Factor of the schedule at this step.
        step: Number of updates done so far, at least `since`.
        since: Where the other schedule ended.
        begin: Its last factor.
        steps: Length of the rise [steps].
    """
    return begin + (scale - begin) * min((step - since + 1) / (steps + 1), 1.0)
