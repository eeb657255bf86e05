"""The page of an evaluation: headline metrics, every volume, and what it looks like, worst first.

write_report("out")        # reads metrics.csv, summary.json and media/, writes report.html
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from loaders.texts import read_json
from loaders.whole import write_text
from vae3d.reports import page
from vae3d.reports.evaluation_health import find, finite, worst_first
from vae3d.reports.meanings import LATENT_CHANNELS, better, explained, meaning, ordered
from vae3d.reports.viewer import NOTE, viewers, with_pictures
from vae3d.tracking.media import case_stem
from vae3d.tracking.voxels import SUFFIX, voxels_file

ENOUGH = 5  # volumes, for a spread
TOO_MANY = LATENT_CHANNELS  # group of metrics that the table has, and no chart each
BASELINES = {"pooled_psnr": "pooling", "pca_psnr": "block PCA"}
NUMBERS = ("mean", "sd")
TILES = ("psnr", "ssim", "mae_original", "mae", "pca_equivalent", "lattice_score", "seam_score")
MAX_EMBEDDED_BYTES = 60_000_000  # pictures first, then clips, the worst volumes first


def write_report(out_dir: Path | str) -> Path:
    """Write `report.html`, one file that needs no network, for an evaluation folder.

    Args:
        out_dir: Folder with metrics.csv (a row a volume, the first column names it), summary.json
            and media/<case>.png and .mp4.

    Returns:
        Path of the page.
    """
    out_dir = Path(out_dir)
    for name in ("metrics.csv", "summary.json"):
        if not (out_dir / name).is_file():
            raise ValueError(f"{out_dir}: holds no {name}; is it an evaluation folder?")
    summary = read_json(out_dir / "summary.json")
    rows, metrics = read_rows(out_dir / "metrics.csv")
    if not rows:
        raise ValueError(f"{out_dir / 'metrics.csv'}: no volumes")
    case_column = next(iter(rows[0]))
    leading = next((m for m in ("psnr", *metrics) if m in metrics), None)
    looking = f" {NOTE}" if any((out_dir / "media").glob(f"*{SUFFIX}")) else ""
    sections = [
        page.tiles(_headline(rows, metrics)),
        page.section("Look at first", page.findings(find(rows, metrics, leading, summary))),
        page.section(
            "Views",
            *_views(out_dir / "media", worst_first(rows, leading), case_column),
            note=f"Worst {leading} first. Columns are input, recon and error = recon - input; the "
            "scale under the error is the same for every picture." + looking,
        ),
        _explained(rows, metrics),
        page.section("Spread over the volumes", _spread(rows, metrics, case_column)),
        page.section("All volumes", page.table(rows, first=case_column)),
        page.section("How it was measured", f'<div class="card">{page.facts(_how(summary))}</div>'),
    ]
    subtitle = page.escape(
        f"{len(rows)} volumes, mode {summary.get('mode', 'unknown')}, "
        f"checkpoint {summary.get('checkpoint', 'unknown')}"
    )
    return write_text(out_dir / "report.html", page.page("Evaluation", subtitle, sections))


def read_rows(path: Path) -> tuple[list[dict], list[str]]:
    """Rows of a CSV with numbers as numbers, and the names of the columns that hold numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    first = next(iter(table[0])) if table else ""  # a case called 007 is a name, not a number
    rows = [{k: v if k == first else _parsed(v) for k, v in row.items()} for row in table]
    columns = list(rows[0])[1:] if rows else []
    return rows, [c for c in columns if any(isinstance(r[c], float) for r in rows)]


def _headline(rows: Sequence[dict], metrics: Sequence[str]) -> list[tuple[str, str, str]]:
    """How many volumes, and the first numbers with what they are held against."""
    facts = [("volumes", str(len(rows)), "")]
    summary = _summary(rows, metrics)
    for metric in [m for m in TILES if m in summary][:6]:
        of = meaning(metric)
        assert of, f"{metric} is explained"
        beside = [name for name in of.against if name in summary and name in BASELINES]
        small = f"{of.better} is better" if better(metric) else f"ideal {of.better}"
        for name in beside[-1:]:
            small = f"{BASELINES[name]} {page.number(summary[name]['mean'])}"
        small = f"dB, {small}" if of.unit == "dB" else small
        facts.append((metric, page.number(summary[metric]["mean"]), small))
    return facts


def _summary(rows: Sequence[dict], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each metric over the volumes where it is finite."""
    found = {}
    for metric in metrics:
        values = [r[metric] for r in rows if finite(r[metric])]
        if values:
            mean = sum(values) / len(values)
            sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
            found[metric] = {"mean": mean, "sd": sd}
    return found


def _explained(rows: Sequence[dict], metrics: Sequence[str]) -> str:
    """One table with a heading for each group: numbers, unit, direction, baseline, meaning."""
    body = ""
    for group, lines in explained(_summary(rows, metrics)).items():
        heads = list(lines[0])
        body += f'<tr class="group"><th colspan="{len(heads)}">{page.escape(group)}</th></tr>'
        for line in lines:
            cells = (
                f'<td class="n">{page.number(value)}</td>' if isinstance(value, float)
                else f"<td>{page.escape(value)}</td>"
                for value in list(line.values())[1:]
            )  # fmt: skip
            body += f"<tr><th>{page.escape(line['metric'])}</th>{''.join(cells)}</tr>"
    if not body:
        return ""
    names = "".join(f"<th{' class=n' * (h in NUMBERS)}>{page.escape(h)}</th>" for h in heads)
    table = f'<table class="explained"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'
    return page.section("What the numbers say", f'<div class="scroll">{table}</div>')


def _spread(rows: Sequence[dict], metrics: Sequence[str], case: str) -> str:
    """Small multiples of what differs from volume to volume, where there are enough of them."""
    if len(rows) < ENOUGH:
        return ""
    drawn = [m for m in ordered(metrics) if (of := meaning(m)) is None or of.group != TOO_MANY]
    values = {m: {r[case]: r[m] for r in rows if finite(r[m])} for m in drawn}
    charts = "".join(
        page.dots(m, of, better(m)) for m, of in values.items() if len(set(of.values())) > 1
    )
    return f'<div class="charts">{charts}</div>' if charts else ""


def _views(media: Path, rows: Sequence[dict], case: str) -> list[str]:
    """Picture and clip of each volume; what does not fit the size of a page is linked instead."""
    stems = {row[case]: case_stem(row[case]) for row in rows}
    kinds = (".png", ".seams.png", ".mp4")  # .seams: the error with the patch grid over it
    wanted = [media / f"{stem}{kind}" for kind in kinds for stem in stems.values()]
    room, embedded = MAX_EMBEDDED_BYTES, set[Path]()
    for path in wanted:
        if path.is_file() and path.stat().st_size <= room:
            room -= path.stat().st_size
            embedded.add(path)
    files = {row[case]: voxels_file(media, row[case]) for row in rows}
    looks = viewers(files, media.parent / "report.html")
    cards = []
    for row in rows:
        picture, seams, clip = (media / f"{stems[row[case]]}{kind}" for kind in kinds)
        parts = [page.image(picture, f"planes of {row[case]}")] if picture in embedded else []
        viewer = looks.get(row[case], "")
        if seams in embedded:
            parts.append(page.image(seams, f"error and patches of {row[case]}"))
        parts += [page.video(clip)] if clip in embedded else []
        links = [p for p in (picture, seams, clip) if p.is_file() and p not in embedded]
        if parts or links or viewer:
            measured = ((k, row[k]) for k in (*TILES, *BASELINES) if isinstance(row.get(k), float))
            numbers = "  ".join(f"{k} {page.number(v)}" for k, v in measured)
            linked = " ".join(
                f'<a href="media/{page.escape(p.name.replace("%", "%25"))}">{p.suffix[1:]}</a>'
                for p in links
            )
            pictures = f'<div class="pair">{"".join(parts)}</div>' if parts else ""
            cards.append(
                f'<article class="card"><h3>{page.escape(row[case])} <small class="note">'
                f"{page.escape(numbers)} {linked}</small></h3>{with_pictures(viewer, pictures)}"
                "</article>"
            )
    return cards


def _how(summary: dict) -> dict[str, str]:
    """Settings of the evaluation; the metrics themselves are shown elsewhere."""
    return {
        key: " x ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in summary.items()
        if not isinstance(value, dict) and value is not None
    }


def _parsed(text: str) -> float | str:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
