"""The options of the loop, declared once, and how a command gets them as options of its own."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from vae3d.kernels.precision import Amp
from vae3d.ranges import check_ranges
from vae3d.tracking.options import Tracking

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Loop(Tracking):
    """What every training run can be told, whatever it trains; where it is shown besides.

    Args:
        grad_accum: Micro-batches of one update; update size is batch_size x grad_accum x ranks.
        max_steps: Updates in all [steps].
        lr: Peak learning rate of AdamW.
        warmup_steps: Linear rise of the learning rate [steps].
        rewarm_steps: Linear way from the old learning rate to the new one, where the schedule of a
            resumed run is another than before, as by a larger max_steps [steps].
        lr_schedule: cosine | linear | constant, the way down after the rise.
        weight_decay: Decay of kernels and matrices; norms and biases have none.
        betas: Decay of AdamW's mean gradient and mean squared gradient.
        clip_norm: Longer gradients are shortened to this norm; 0 for never.
        ema_decay: Decay of the averaged weights, which validation and users see; 0 for none.
        amp: off | bf16 | fp16, precision of convolutions and matrix products, in validation too;
            null for bf16 where the device multiplies it natively, else off.
        seed: Seed of weights, order of the data, and noise.
        log_every: Interval of numbers in metrics.jsonl and trackers [steps].
        val_every: Interval of validation [steps]; 0 for none.
        val_volumes: Validate on at most this many volumes (or latents), always the same.
        media_every: Interval of pictures and clips [steps]; 0 for none.
        media_volumes: Validation volumes (or samples) that are pictured.
        radiological: Draw bodies as radiologists read them, their right on the left.
        save_every: Interval of checkpoints [steps].
        keep_checkpoints: Step files that are kept beside best and last, at least 2.
        max_hours: Save and end with exit code 0 after this time [h]; null for no limit.
        early_stop: End after so many validations without a better one; null for never.
        max_bad_steps: End after so many steps in a row that are not finite [steps].
        device: auto | cpu | cuda | mps.
        threads: Threads that read the data ahead on each rank.
        timeout_minutes: How long a rank waits for one that does not answer [min].
        fresh: Remove the checkpoints in out_dir and begin anew.
        force: Continue although options that change the training, or the data, have changed; an
            order of the data that is another begins anew.
    """

    grad_accum: int = 1
    max_steps: int = 10000
    lr: float = 2e-4
    warmup_steps: int = 100
    rewarm_steps: int = 0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    amp: Amp | None = None
    seed: int = 0
    log_every: int = 10
    val_every: int = 500
    val_volumes: int = 8
    media_every: int = 1000
    media_volumes: int = 2
    radiological: bool = False
    save_every: int = 500
    keep_checkpoints: int = 2
    max_hours: float | None = None
    early_stop: int | None = None
    max_bad_steps: int = 10
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 2
    timeout_minutes: float = 30.0
    fresh: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range, before anything is read or written."""
        super().__post_init__()
        check_ranges("Loop", vars(self))


def spread(function: Callable[..., T]) -> Callable[..., T]:
    """Give `function` an option for each field of its last parameter, in its place.

    Signature, annotations and docstring become those of a function that declares them all, so that
    help(), the command line and YAML show them, and a caller writes `max_steps=1000`.

    Args:
        function: Its last parameter is keyword-only, a `Loop` or another `Tracking`.
    """
    hints = typing.get_type_hints(function)
    *own, last = inspect.signature(function).parameters.values()
    group = hints.pop(last.name)
    known = typing.get_type_hints(group)
    names = [field.name for field in fields(group)]

    @functools.wraps(function)
    def flat(*args: Any, **options: Any) -> T:
        chosen = group(**{name: options.pop(name) for name in names if name in options})
        all_of_them = options | {last.name: chosen}
        given = inspect.signature(function).bind(*args, **all_of_them).arguments
        check_ranges(function.__name__, given)
        return function(*args, **all_of_them)

    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    theirs = [
        keyword(field.name, default=field.default, annotation=known[field.name])
        for field in fields(group)
    ]
    signature = inspect.Signature(
        [*(p.replace(annotation=hints[p.name]) for p in own), *theirs],
        return_annotation=hints["return"],
    )
    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__annotations__ = hints | {name: known[name] for name in names}
    documented = [inspect.cleandoc(c.__doc__ or "").split("Args:\n") for c in group.__mro__]
    lines = "\n".join(parts[1] for parts in documented if len(parts) == 2)
    flat.__doc__ = re.sub(rf" *{last.name}: .*", lines, inspect.cleandoc(function.__doc__ or ""))
    del flat.__wrapped__  # what stands behind has other parameters
    return flat


def as_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a function that `spread` has wrapped, as its caller could have given them.

    Args:
        arguments: Its `locals()`, before anything else is in there.
    """
    loop = arguments["loop"]
    own = {name: value for name, value in arguments.items() if name != "loop"}
    return own | {field.name: getattr(loop, field.name) for field in fields(loop)}
