"""The page of training runs: curves, pictures, latent health, configuration, what stands out.

write_run_report(["runs/a", "runs/b"], "report.html")
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.parse import unquote

import yaml

from loaders.texts import read_yaml
from loaders.whole import write_text
from vae3d.reports import page
from vae3d.tracking.privacy import redact
from vae3d.tracking.tracker import read_metrics, read_tables

GROUPS = {
    "val": "Validation",
    "train": "Training",
    "latent": "Latent space",
    "perf": "Speed and memory",
}
FIRST = ("val/psnr", "val/mae", "val/ssim", "train/loss", "train/recon", "train/kl")
HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim")
MAX_STEPS_SHOWN = 6
HIDDEN = ("step", "time")


@dataclass
class RunData:
    """What a run folder holds."""

    name: str
    folder: Path
    rows: list[dict]
    tables: dict[str, dict]
    config: dict

    def column(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of the lines that have `key`."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def values(self, key: str) -> list[float]:
        """The finite values of `key`."""
        return [y for y in self.column(key)[1] if y is not None]


def write_run_report(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write one self-contained HTML page on one or several run folders.

    Args:
        run_dirs: Run folders, each with a metrics.jsonl.
        out: Path of the page; default `report.html` in the first run folder.

    Returns:
        Path of the page.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    if not runs:
        raise ValueError("name at least one run folder")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        for run in runs:
            run.name = str(run.folder)
    alone = len(runs) == 1
    sections = [
        page.legend([run.name for run in runs]) if not alone else "",
        *(_overview(run, alone) for run in runs),
        page.section(
            "Look at first",
            page.findings([f for run in runs for f in find(run, None if alone else run.name)]),
        ),
        *_curves(runs),
        *_media(runs),
        *_latents(runs),
        *(_volumes(run, alone) for run in runs),
        _differences(runs) if not alone else "",
        page.section("Configuration", *(_configuration(run) for run in runs)),
    ]
    title = runs[0].name if alone else f"{len(runs)} runs"
    subtitle = page.escape("Training run, " + _progress(runs[0]) if alone else " | ".join(names))
    path = Path(out) if out else runs[0].folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, page.page(title, subtitle, sections))


def read_run(folder: Path) -> RunData:
    """Read a run folder; a run that is still training can be read too."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{folder}: holds no metrics.jsonl; is it a run folder?")
    tables, config = folder / "tables.jsonl", folder / "config.yaml"
    return RunData(
        name=folder.resolve().name,
        folder=folder,
        rows=read_metrics(metrics),
        tables=read_tables(tables) if tables.is_file() else {},
        config=read_yaml(config) if config.is_file() else {},
    )


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
            f"at step {page.number(lost[0])}: lower lr, raise warmup_steps or use --amp bf16.",
        )
    skipped = run.values("train/skipped_steps")
    if skipped and skipped[-1] > 0:
        yield (
            "warn",
            f"{page.number(skipped[-1])} updates were skipped: their gradient was not finite.",
        )
    norms = run.values("train/norm/generator")
    tail = norms[len(norms) // 2 :]
    if len(tail) >= 10 and max(tail) > 20 * median(tail):
        text = (
            f"The gradient norm jumped to {page.number(max(tail))}, its median is "
            f"{page.number(median(tail))}: look for the step in the curve."
        )
        yield "warn", text


def _validation(run: RunData) -> Iterator[tuple[str, str]]:
    key = next((k for k in ("val/psnr", "val/mae") if run.values(k)), None)
    if key is None:
        return
    sign = 1 if key.endswith(HIGHER_IS_BETTER) else -1
    steps, values = zip(
        *[(s, v) for s, v in zip(*run.column(key), strict=True) if v is not None], strict=True
    )
    best = max(range(len(values)), key=lambda i: sign * values[i])
    best_text = f"{key} was best at step {page.number(steps[best])} ({page.number(values[best])})"
    lost = sign * (values[best] - values[-1]) / (abs(values[best]) or 1)
    if len(values) >= 4 and best < 0.7 * (len(values) - 1) and lost > 0.02:
        text = (
            f"{best_text} and is {page.number(values[-1])} now: the run got worse. "
            "<code>checkpoints/best.pt</code> holds the best weights."
        )
        yield "warn", text
        return
    quarter = values[-max(2, len(values) // 4) :]
    gained = sign * (quarter[-1] - quarter[0])
    whole = sign * (values[-1] - values[0])
    if len(values) >= 4 and whole > 0 and gained > 0.05 * whole:
        yield "good", f"{best_text} and was still improving at the end: it may train longer."
    else:
        yield "good", f"{best_text}."


def _latent_health(run: RunData) -> Iterator[tuple[str, str]]:
    active = run.values("latent/active_channels")
    channels = run.values("latent/channels")
    if active and channels and active[-1] < channels[-1]:
        text = (
            f"{page.number(active[-1])} of {page.number(channels[-1])} latent channels are "
            "active: lower the KL weight, or save latent_channels."
        )
        yield "warn", text
    std = run.values("latent/mean_std")
    if std and not 0.5 < std[-1] < 2:
        text = (
            f"The latents have a standard deviation of {page.number(std[-1])}; a second stage "
            "wants about 1: set latent_scale."
        )
        yield "warn", text


def _speed(run: RunData) -> Iterator[tuple[str, str]]:
    wait = run.values("perf/data_wait")
    if wait and median(wait) > 0.1:
        text = (
            f"The device waits {median(wait):.0%} of the time for data: raise --threads, "
            "or keep the cache on a faster disk."
        )
        yield "warn", text


def _progress(run: RunData) -> str:
    step = run.rows[-1]["step"] if run.rows else 0
    wanted = run.config.get("max_steps")
    return f"step {page.number(step)}" + (f" of {page.number(wanted)}" if wanted else "")


def _overview(run: RunData, alone: bool) -> str:
    facts = [("steps", page.number(run.rows[-1]["step"] if run.rows else 0), "")]
    if run.config.get("max_steps"):
        facts[0] = (*facts[0][:2], f"of {page.number(run.config['max_steps'])}")
    for key in ("val/psnr", "val/ssim", "val/mae"):
        steps, values = run.column(key)
        pairs = [(v, s) for s, v in zip(steps, values, strict=True) if v is not None]
        if pairs:
            value, step = (max if key.endswith(HIGHER_IS_BETTER) else min)(pairs)
            facts.append((f"best {key}", page.number(value), f"at step {page.number(step)}"))
    if loss := run.values("train/loss"):
        facts.append(("train/loss", page.number(loss[-1]), f"from {page.number(loss[0])}"))
    if speed := run.values("perf/patches_per_s"):
        facts.append(("patches/s", page.number(median(speed)), "median"))
    for key, label in (("perf/gpu_memory_gb", "GPU memory"), ("perf/cpu_memory_gb", "memory")):
        if used := run.values(key):
            facts.append((label, f"{max(used):.1f} GB", "most"))
            break
    if hours := _training_hours(run):
        facts.append(("time", hours, "training"))
    heading = "" if alone else f'<h3 style="margin:24px 0 -16px">{page.escape(run.name)}</h3>'
    return heading + page.tiles(facts)


def _training_hours(run: RunData) -> str:
    """Time between lines; a pause longer than ten times the usual is a run that was not running."""
    times = [row["time"] for row in run.rows if "time" in row]
    gaps = [b - a for a, b in pairwise(times) if b > a]
    if not gaps:
        return ""
    usual = median(gaps)
    minutes = round(sum(min(g, 10 * usual + 60) for g in gaps) / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _curves(runs: Sequence[RunData]) -> list[str]:
    keys = {k for run in runs for row in run.rows for k in row if k not in HIDDEN}
    keys = {k for k in keys if any(run.values(k) for run in runs)}
    ordered = [k for k in FIRST if k in keys] + sorted(keys - set(FIRST))
    sections = []
    for prefix in [*GROUPS, *sorted({k.split("/")[0] for k in keys} - set(GROUPS))]:
        charts = [
            _chart(runs, key)
            for key in ordered
            if key.split("/")[0] == prefix and not _flat(runs, key)
        ]
        flat = [key for key in ordered if key.split("/")[0] == prefix and _flat(runs, key)]
        note = "Constant: " + ", ".join(
            f"<code>{page.escape(k)}</code> {page.number(runs[0].values(k)[0])}"
            for k in flat if runs[0].values(k)
        ) if flat else ""  # fmt: skip
        body = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
        sections.append(page.section(GROUPS.get(prefix, prefix), body, note=note))
    return sections


def _chart(runs: Sequence[RunData], key: str) -> str:
    with_key = ((i, run) for i, run in enumerate(runs) if run.values(key))
    return page.chart(key, [page.Series(run.name, *run.column(key), i) for i, run in with_key])


def _flat(runs: Sequence[RunData], key: str) -> bool:
    """A constant is a sentence, not a curve."""
    values = [v for run in runs for v in run.values(key)]
    return len(values) > 1 and min(values) == max(values)


def steps_with_media(folder: Path) -> list[Path]:
    """`media/step_*` folders in order, at most a few: the newest and even ones before it."""
    found = sorted(p for p in folder.glob("media/step_*") if re.fullmatch(r"step_\d+", p.name))
    if len(found) > MAX_STEPS_SHOWN:
        last = len(found) - 1
        found = [found[round(i * last / (MAX_STEPS_SHOWN - 1))] for i in range(MAX_STEPS_SHOWN)]
    return found


def _media(runs: Sequence[RunData]) -> list[str]:
    """Per volume: the picture at some steps with a slider, and the newest clip."""
    parts: dict[str, dict[str, str]] = {}
    for run in runs:
        folders = steps_with_media(run.folder)
        for name in sorted({p.name for f in folders for p in f.glob("*.png")}):
            if name.startswith("latent_"):
                continue
            frames = [(f, f / name) for f in folders if (f / name).is_file()]
            clips = [f / name.replace(".png", ".mp4") for f in folders]
            newest = next((page.video(clip) for clip in reversed(clips) if clip.is_file()), "")
            part = f'<div class="pair">{_stepper(frames)}{newest}</div>'
            parts.setdefault(unquote(Path(name).stem), {})[run.name] = part
    if not parts:
        return []
    return [
        page.section(
            "Validation volumes",
            *(_card(title, part, len(runs)) for title, part in parts.items()),
            note="Input, recon and error = recon - input, on a fixed scale; the slider goes back "
            "in training, the clip is the newest.",
        )
    ]


def _card(title: str, parts: dict[str, str], runs: int) -> str:
    """What the runs have to show under one title: of several, side by side."""
    body = "".join(parts.values())
    if runs > 1:
        columns = (f"<div><h4>{page.escape(name)}</h4>{part}</div>" for name, part in parts.items())
        body = f'<div class="views">{"".join(columns)}</div>'
    return f'<article class="card"><h3>{page.escape(title)}</h3>{body}</article>'


def _stepper(frames: list[tuple[Path, Path]]) -> str:
    slider = (
        '<div class="steps"><input type="range" aria-label="step" min="0" '
        f'max="{len(frames) - 1}" value="{len(frames) - 1}"><output></output></div>'
        if len(frames) > 1
        else ""
    )
    pictures = "".join(
        f'<div data-step="{int(folder.name[5:])}">{page.image(path, path.stem)}</div>'
        for folder, path in frames
    )
    return f'<div class="stepper">{slider}{pictures}</div>'


LATENT_PICTURES = {
    "channels": "What each channel holds",
    "slices": "The latents of a volume",
    "noise": "More and more posterior noise",
    "between": "From one volume to another",
    "draws": "Draws decoded",
}


def _latents(runs: Sequence[RunData]) -> list[str]:
    cards = []
    for name, title in LATENT_PICTURES.items():
        parts = {}
        for run in runs:
            frames = [(f, f / f"latent_{name}.png") for f in steps_with_media(run.folder)]
            if frames := [frame for frame in frames if frame[1].is_file()]:
                parts[run.name] = _stepper(frames)
        if parts:
            cards.append(_card(title, parts, len(runs)))
    return [page.section("Latent pictures", *cards)]


def _volumes(run: RunData, alone: bool) -> str:
    table = run.tables.get("val/volumes")
    if not table or not table["rows"]:
        return ""
    title = "Validation, volume by volume" + ("" if alone else f": {run.name}")
    note = f"At step {page.number(table['step'])}. A click on a head sorts."
    return page.section(title, page.table(table["rows"], next(iter(table["rows"][0]))), note=note)


def _differences(runs: Sequence[RunData]) -> str:
    flat = [_flatten(redact(run.config)) for run in runs]
    keys = sorted({k for f in flat for k in f})
    rows = [
        {
            "option": key,
            **{r.name: str(f.get(key, "not set")) for r, f in zip(runs, flat, strict=True)},
        }
        for key in keys
        if len({str(f.get(key, "not set")) for f in flat}) > 1
    ]
    return page.section("What differs between the runs", page.table(rows, "option"))


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        return {
            k: v for n, item in value.items() for k, v in _flatten(item, f"{prefix}{n}.").items()
        }
    return {prefix[:-1]: value}


def _configuration(run: RunData) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(redact(run.config), sort_keys=False, allow_unicode=True)
    summary = f"<summary>{page.escape(run.name)}</summary>"
    return f"<details>{summary}<pre>{page.escape(text)}</pre></details>"
