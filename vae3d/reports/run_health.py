"""What stands out in a training run, the worst first, and which option to change."""

from collections.abc import Iterator
from statistics import median

from vae3d.reports import page
from vae3d.reports.evaluation_health import code_use, latent_scale_advice
from vae3d.reports.run_data import HIGHER_IS_BETTER, RunData


def find(run: RunData, name: str | None = None) -> list[tuple[str, str]]:
    """What stands out in a run, the worst first, as (level, HTML)."""
    found = [
        *_broken_numbers(run),
        *_validation(run),
        *_latent_health(run),
        *_speed(run),
    ]
    found.sort(key=lambda item: ("bad", "warn", "good").index(item[0]))
    found = found or [("good", "Nothing stands out.")]
    return [
        (level, f"<b>{page.escape(name)}:</b> {text}" if name else text) for level, text in found
    ]


def _broken_numbers(run: RunData) -> Iterator[tuple[str, str]]:
    for key in sorted({k for row in run.rows for k, v in row.items() if v is None}):
        steps, values = run.column(key)
        lost = [s for s, v in zip(steps, values, strict=True) if v is None]
        yield (
            "bad",
            f"<b>{page.escape(key)}</b> was not finite in {len(lost)} of {len(steps)} lines, first "
            f"at step {page.number(lost[0])}: lower <code>--lr</code>, raise "
            "<code>--warmup_steps</code> or use <code>--amp bf16</code>.",
        )
    skipped = run.values("train/skipped_steps")
    if skipped and skipped[-1] > 0:
        yield (
            "warn",
            f"{page.number(skipped[-1])} updates were skipped: their gradient was not finite. A "
            "few are usual with <code>--amp fp16</code>; else lower <code>--lr</code>.",
        )
    norms = run.values("train/norm/generator")
    tail = norms[len(norms) // 2 :]
    if len(tail) >= 10 and max(tail) > 20 * median(tail):
        text = (
            f"The gradient norm jumped to {page.number(max(tail))}, its median is "
            f"{page.number(median(tail))}: look for the step in the curve, and "
            "lower <code>--clip_norm</code> or <code>--lr</code>."
        )
        yield "warn", text


def _validation(run: RunData) -> Iterator[tuple[str, str]]:
    """Over- and underfitting, as far as the curves tell."""
    key = next((k for k in ("val/psnr", "val/mae") if run.values(k)), None)
    if key is None:
        return
    sign = 1 if key.endswith(HIGHER_IS_BETTER) else -1
    column = zip(*run.column(key), strict=True)
    steps, values = zip(*[(s, v) for s, v in column if v is not None], strict=True)
    best = max(range(len(values)), key=lambda i: sign * values[i])
    best_text = f"{key} was best at step {page.number(steps[best])} ({page.number(values[best])})"
    lost = sign * (values[best] - values[-1]) / (abs(values[best]) or 1)
    if len(values) >= 4 and best < 0.7 * (len(values) - 1) and lost > 0.02:
        yield (
            "warn",
            f"{best_text} and is {page.number(values[-1])} now: {_got_worse(run, steps[best])}",
        )
        return
    quarter = values[-max(2, len(values) // 4) :]
    gained = sign * (quarter[-1] - quarter[0])
    whole = sign * (values[-1] - values[0])
    if len(values) >= 4 and whole > 0.01 * abs(values[0]) and gained > 0.05 * whole:
        yield (
            "good",
            f"{best_text} and was still improving at the end (<b>underfitting</b>): raise "
            "<code>--max_steps</code>, or a higher <code>--lr</code> gets there sooner.",
        )
    else:
        yield "good", f"{best_text}."


def _got_worse(run: RunData, since: int) -> str:
    """Whether validation was lost to overfitting or training itself went wrong, and the remedy."""
    kept = "<code>checkpoints/best.pt</code> holds the best weights."
    key = "train/recon" if run.values("train/recon") else "train/loss"
    before = [v for s, v in zip(*run.column(key), strict=True) if v is not None and s <= since]
    after = [v for s, v in zip(*run.column(key), strict=True) if v is not None and s > since]
    if before and after and median(after) < median(before[-len(after) :]):
        return (
            f"<b>overfitting</b>, since {key} went on falling. More volumes help, or "
            f"<code>--augment</code>; <code>--early_stop 3</code> ends in time. {kept}"
        )
    return (
        f"the run got worse, and so did {key}: lower <code>--lr</code>, or raise "
        f"<code>--warmup_steps</code>. {kept}"
    )


def _latent_health(run: RunData) -> Iterator[tuple[str, str]]:
    active = run.values("latent/active_channels")
    dead = run.values("train/kl_dead_channels")
    channels = run.values("latent/channels")
    if active and channels and active[-1] < channels[-1]:
        text = (
            f"{page.number(active[-1])} of {page.number(channels[-1])} latent channels are "
            "active, the others are <b>dead</b>: lower <code>--loss.kl.weight</code>, or save "
            "<code>--model.latent_channels</code>."
        )
        yield "warn", text
    elif dead and dead[-1] > 0 and not active:
        text = (
            f"{page.number(dead[-1])} latent channels are <b>dead</b>: lower "
            "<code>--loss.kl.weight</code>, or save <code>--model.latent_channels</code>."
        )
        yield "warn", text
    perplexity, usage = run.values("train/perplexity"), run.values("train/usage")
    if perplexity and usage:
        yield code_use(perplexity[-1], usage[-1])
    std = run.values("latent/mean_std")
    if std and not 0.5 < std[-1] < 2:
        yield "warn", latent_scale_advice(std[-1])


def _speed(run: RunData) -> Iterator[tuple[str, str]]:
    wait = run.values("perf/data_wait")
    if wait and median(wait) > 0.1:
        text = (
            f"The device waits {median(wait):.0%} of the time for data: raise "
            "<code>--threads</code>, or keep <code>--data.cache_dir</code> on a faster disk."
        )
        yield "warn", text
