"""The page of training runs: curves, pictures, latent health, configuration, what stands out.

write_run_report(["runs/a", "runs/b"], "report.html")
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from urllib.parse import unquote

import yaml

from loaders.whole import write_text
from vae3d.reports import page
from vae3d.reports.comparison import compared, differences, training_hours
from vae3d.reports.run_data import RunData, read_run
from vae3d.reports.run_health import find
from vae3d.reports.viewer import NOTE, viewers, with_pictures
from vae3d.tracking.privacy import redact
from vae3d.tracking.voxels import SUFFIX

GROUPS = {
    "val": "Validation",
    "train": "Training",
    "latent": "Latent space",
    "perf": "Speed and memory",
}
FIRST = ("val/psnr", "val/mae", "val/ssim", "train/loss", "train/recon", "train/kl")
MAX_STEPS_SHOWN = 6
HIDDEN = ("step", "time")


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
    path = Path(out) if out else runs[0].folder / "report.html"
    sections = [
        page.legend([run.name for run in runs]) if not alone else "",
        _overview(runs[0]) if alone else compared(runs),
        page.section(
            "Look at first",
            page.findings([f for run in runs for f in find(run, None if alone else run.name)]),
        ),
        differences(runs) if not alone else "",
        *_curves(runs),
        *_media(runs, path),
        *_samples(runs),
        *_latents(runs),
        *(_volumes(run, alone) for run in runs),
        page.section("Configuration", *(_configuration(run) for run in runs)),
    ]
    title = runs[0].name if alone else f"{len(runs)} runs"
    subtitle = page.escape("Training run, " + _progress(runs[0]) if alone else " | ".join(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, page.page(title, subtitle, sections))


def _progress(run: RunData) -> str:
    step = run.rows[-1]["step"] if run.rows else 0
    wanted = run.config.get("max_steps")
    return f"step {page.number(step)}" + (f" of {page.number(wanted)}" if wanted else "")


def _overview(run: RunData) -> str:
    facts = [("steps", page.number(run.rows[-1]["step"] if run.rows else 0), "")]
    if run.config.get("max_steps"):
        facts[0] = (*facts[0][:2], f"of {page.number(run.config['max_steps'])}")
    for key in ("val/psnr", "val/ssim", "val/mae"):
        if found := run.best(key):
            value, step = found
            facts.append((f"best {key}", page.number(value), f"at step {page.number(step)}"))
    if loss := run.values("train/loss"):
        facts.append(("train/loss", page.number(loss[-1]), f"from {page.number(loss[0])}"))
    for unit in ("patches", "latents"):
        if speed := run.values(f"perf/{unit}_per_s"):
            facts.append((f"{unit}/s", page.number(median(speed)), "median"))
    for key, label in (("perf/gpu_memory_gb", "GPU memory"), ("perf/cpu_memory_gb", "memory")):
        if used := run.values(key):
            facts.append((label, f"{max(used):.1f} GB", "most"))
            break
    if hours := training_hours(run):
        facts.append(("time", hours, "training"))
    return page.tiles(facts)


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


def steps_with_media(folder: Path, kind: str = r"step_\d+") -> list[Path]:
    """Of a kind in `media` those of some steps, in order: the newest and even ones before it."""
    found = sorted(p for p in folder.glob("media/*") if re.fullmatch(kind, p.name))
    if len(found) > MAX_STEPS_SHOWN:
        last = len(found) - 1
        found = [found[round(i * last / (MAX_STEPS_SHOWN - 1))] for i in range(MAX_STEPS_SHOWN)]
    return found


def _media(runs: Sequence[RunData], path: Path) -> list[str]:
    """Per volume: the viewer, the picture at some steps with a slider, and the newest clip."""
    parts: dict[str, dict[str, str]] = {}
    looks = {}
    if len(runs) == 1:
        files = sorted((runs[0].folder / "media").glob(f"*{SUFFIX}"))
        looks = viewers({unquote(f.name.removesuffix(SUFFIX)): f for f in files}, path)
    for run in runs:
        folders = steps_with_media(run.folder)
        for name in sorted({p.name for f in folders for p in f.glob("*.png")}):
            if name.startswith("latent_"):
                continue
            frames = [(_step(f), f / name) for f in folders if (f / name).is_file()]
            clips = [f / name.replace(".png", ".mp4") for f in folders]
            newest = next((page.video(clip) for clip in reversed(clips) if clip.is_file()), "")
            case = unquote(Path(name).stem)
            pictures = f'<div class="pair">{_stepper(frames)}{newest}</div>'
            parts.setdefault(case, {})[run.name] = with_pictures(looks.get(case, ""), pictures)
    if not parts:
        return []
    return [
        page.section(
            "Validation volumes",
            *(_card(title, part, len(runs)) for title, part in parts.items()),
            note="Input, recon and error = recon - input, on a fixed scale; the slider goes back "
            f"in training, the clip is the newest. {NOTE if looks else ''}",
        )
    ]


def _card(title: str, parts: dict[str, str], runs: int) -> str:
    """What the runs have to show under one title: of several, side by side."""
    body = "".join(parts.values())
    if runs > 1:
        columns = (f"<div><h4>{page.escape(name)}</h4>{part}</div>" for name, part in parts.items())
        body = f'<div class="views">{"".join(columns)}</div>'
    return f'<article class="card"><h3>{page.escape(title)}</h3>{body}</article>'


def _samples(runs: Sequence[RunData]) -> list[str]:
    """What a diffusion model draws, with a slider over the steps."""
    parts = {}
    for run in runs:
        if found := steps_with_media(run.folder, r"samples_\d+\.png"):
            parts[run.name] = _stepper([(_step(path), path) for path in found])
    card = _card("Drawn and decoded", parts, len(runs)) if parts else ""
    return [page.section("Samples", card)]


def _step(path: Path) -> int:
    """The step in the name of a picture, or of a folder of them."""
    return int(path.stem.rpartition("_")[2])


def _stepper(frames: list[tuple[int, Path]]) -> str:
    slider = (
        '<div class="steps"><input type="range" aria-label="step" min="0" '
        f'max="{len(frames) - 1}" value="{len(frames) - 1}"><output></output></div>'
        if len(frames) > 1
        else ""
    )
    pictures = "".join(
        f'<div data-step="{step}">{page.image(path, path.stem)}</div>' for step, path in frames
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
            frames = [(_step(f), f / f"latent_{name}.png") for f in steps_with_media(run.folder)]
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


def _configuration(run: RunData) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(redact(run.config), sort_keys=False, allow_unicode=True)
    summary = f"<summary>{page.escape(run.name)}</summary>"
    return f"<details>{summary}<pre>{page.escape(text)}</pre></details>"
