"""Several runs side by side: their best numbers as a table, and what differs in their options."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from vae3d.reports import page
from vae3d.reports.run_data import HIGHER_IS_BETTER, RunData
from vae3d.tracking.privacy import redact

# Where the last value counts, and which way it is better: 1 higher, -1 lower, 0 neither.
LAST = {"train/loss": 0, "latent/active_channels": 1, "latent/mean_std": 0, "latent/kl": 0}


def compared(runs: Sequence[RunData]) -> str:
    """A table with a column for each run; the best of each row is marked."""
    rows = []
    scores = sorted({k for run in runs for row in run.rows for k in row if k.startswith("val/")})
    for key in sorted(scores, key=lambda k: (k != "val/psnr", k != "val/mae", k)):
        found = [run.best(key) for run in runs]
        texts = [f"at {page.number(f[1])}" if f else "" for f in found]
        way = 1 if key.endswith(HIGHER_IS_BETTER) else -1
        rows.append(_row(f"best {key}", [f and f[0] for f in found], way, texts))
    for key, way in LAST.items():
        lasts = [run.values(key)[-1] if run.values(key) else None for run in runs]
        rows.append(_row(f"last {key}", lasts, way))
    for label, way, of in COSTS:
        rows.append(_row(label, [of(run) for run in runs], way))
    heads = "".join(f'<th class="n">{page.escape(run.name)}</th>' for run in runs)
    table = (
        f'<table class="compare"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return page.section(
        "Side by side",
        f'<div class="scroll">{table}</div>',
        note="The best of a row is bold, where one way is better. Validation scores are the best "
        "of a run, with the step it had them at.",
    )


def _row(label: str, values: Sequence[float | None], way: int, texts: Sequence[str] = ()) -> str:
    """One row of numbers; nothing where no run has any."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    best = max(value * way for value in there) if way and len(set(there)) > 1 else None
    cells = []
    for value, text in zip(values, texts or [""] * len(values), strict=True):
        mark = ' class="n best"' if value is not None and value * way == best else ' class="n"'
        shown = "" if value is None else f"{page.number(value)} <small>{page.escape(text)}</small>"
        cells.append(f"<td{mark}>{shown}</td>")
    return f"<tr><th>{page.escape(label)}</th>{''.join(cells)}</tr>"


def _median(key: str) -> Callable[[RunData], float | None]:
    return lambda run: median(values) if (values := run.values(key)) else None


def _most(key: str) -> Callable[[RunData], float | None]:
    return lambda run: max(values) if (values := run.values(key)) else None


def training_seconds(run: RunData) -> float | None:
    """Time between lines; a pause longer than ten times the usual is a run that was not running."""
    times = [row["time"] for row in run.rows if "time" in row]
    gaps = [b - a for a, b in pairwise(times) if b > a]
    return sum(min(g, 10 * median(gaps) + 60) for g in gaps) if gaps else None


def training_hours(run: RunData) -> str:
    """How long a run has trained, in words; empty where it is not known."""
    seconds = training_seconds(run)
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _minutes(run: RunData) -> float | None:
    seconds = training_seconds(run)
    return None if seconds is None else seconds / 60


COSTS = (
    ("steps", 0, lambda run: run.rows[-1]["step"] if run.rows else 0),
    ("patches a second, median", 1, _median("perf/patches_per_s")),
    ("latents a second, median", 1, _median("perf/latents_per_s")),
    ("GPU memory, most [GB]", -1, _most("perf/gpu_memory_gb")),
    ("memory, most [GB]", -1, _most("perf/cpu_memory_gb")),
    ("time [min]", 0, _minutes),
)


def differences(runs: Sequence[RunData]) -> str:
    """A table of the options that are not the same in all runs."""
    flat = [_flatten(redact(run.config)) for run in runs]
    rows = []
    for key in sorted({k for options in flat for k in options}):
        values = [options.get(key, "not set") for options in flat]
        if len(set(values)) > 1:
            names = (run.name for run in runs)
            rows.append({"option": key, **dict(zip(names, values, strict=True))})
    return page.section("What differs between the runs", page.table(rows, "option"))


def _flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Options that are set by their whole names; null is none, as is a key that is not there."""
    if isinstance(value, dict):
        parts = (_flatten(item, f"{prefix}{name}.") for name, item in value.items())
        return {name: text for part in parts for name, text in part.items()}
    return {} if value is None else {prefix[:-1]: str(value)}
