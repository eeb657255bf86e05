"""The page of an evaluation: headline metrics, every volume, and what it looks like, worst first.

write_report("out")        # reads metrics.csv, summary.json and media/, writes report.html
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from loaders.texts import read_json
from loaders.whole import write_text
from vae3d.reports import page
from vae3d.reports.viewer import NOTE, viewers, with_pictures
from vae3d.tracking.media import case_stem
from vae3d.tracking.voxels import SUFFIX, voxels_file

HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim", "dice", "ncc")
LOWER_IS_BETTER = ("mae", "mse", "rmse", "lpips", "hfen")
GRID_SHOWS = 1.15  # lattice_score
MOST_CLIPPED = 0.005  # of the foreground
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
        page.section("Look at first", page.findings(find(rows, metrics, leading))),
        page.section("Spread over the volumes", _spread(rows, metrics, case_column)),
        page.section(
            "Views",
            *_views(out_dir / "media", _worst_first(rows, leading), case_column),
            note=f"Worst {leading} first. Columns are input, recon and error = recon - input; the "
            "scale under the error is the same for every picture." + looking,
        ),
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


def find(rows: Sequence[dict], metrics: Sequence[str], leading: str | None) -> list:
    """What to look at first: values that are not finite, volumes far from the others."""
    case = next(iter(rows[0]))
    found = []
    for metric in metrics:  # pca_equivalent is infinite where no number of components would do
        bad = [r[case] for r in rows if not _finite(r[metric]) and r[metric] != math.inf]
        if bad:
            named = ", ".join(map(page.escape, bad[:5]))
            found.append(("bad", f"<b>{page.escape(metric)}</b> is not finite for {named}."))
    if "mask_fraction" in metrics:
        share = 100 * sum(r["mask_fraction"] for r in rows) / len(rows)
        found.append(
            ("good", f"Figures are of the voxels that the <b>masks</b> count, {share:.0f} % of a "
             "volume; pictures show all of the reconstruction.")
        )  # fmt: skip
    found += _against_linear_codes(rows, metrics)
    for metric in metrics:
        found += _lost_to_the_clip(rows, metric) if metric.startswith("foreground_clipped") else []
    if leading:
        values = sorted(r[leading] for r in rows if _finite(r[leading]))
        if len(values) >= 5:
            found += _outliers(rows, leading, values, case)
        if values:
            worst = _worst_first(rows, leading)[0]
            found.append(
                ("good", f"The worst {leading} is {page.number(worst[leading])}, of "
                 f"<b>{page.escape(worst[case])}</b>, shown first below.")
            )  # fmt: skip
    return found


def _against_linear_codes(rows: Sequence[dict], metrics: Sequence[str]) -> list:
    """Whether the model is worth its training: above pooling, above block PCA, without a grid."""
    means = {
        m: sum(r[m] for r in rows) / len(rows)
        for m in ("psnr", "pooled_psnr", "pca_psnr", "lattice_score")
        if m in metrics and all(_finite(r[m]) for r in rows)
    }
    psnr = means.get("psnr", math.inf)
    remedy = "begin at the best linear code (<code>--model.linear_code true</code>), train longer"
    found = []
    if psnr < means.get("pooled_psnr", -math.inf):
        found.append(
            ("bad", f"The model has {psnr:.1f} dB, <b>average pooling</b> with fewer numbers "
             f"{means['pooled_psnr']:.1f} dB: {remedy}, lower <code>--lr</code>, and look whether "
             "<code>data.preprocess</code> leaves the volumes as you meant them.")
        )  # fmt: skip
    elif psnr < means.get("pca_psnr", -math.inf):
        found.append(
            ("warn", f"The model has {psnr:.1f} dB, a <b>linear code</b> of the same size (block "
             f"PCA) {means['pca_psnr']:.1f} dB: {remedy}, or give it more channels.")
        )  # fmt: skip
    if means.get("lattice_score", 1.0) > GRID_SHOWS:
        found.append(
            ("warn", f"The <b>grid of latent cells</b> shows in the reconstructions (lattice_score "
             f"{means['lattice_score']:.2f}, 1 is none): train longer, or shrink less.")
        )  # fmt: skip
    return found


def _lost_to_the_clip(rows: Sequence[dict], metric: str) -> list:
    """The volume of whose foreground most was clipped before the model saw it, if it is much."""
    worst = max(rows, key=lambda r: r[metric] if _finite(r[metric]) else 0.0)
    if not (_finite(worst[metric]) and worst[metric] > MOST_CLIPPED):
        return []
    case, channel = next(iter(worst.values())), metric.removeprefix("foreground_clipped")
    return [
        ("warn", f"{100 * worst[metric]:.3g} % of the foreground of <b>{page.escape(case)}</b> is "
         f"clipped (foreground_clipped{page.escape(channel)}), which other metrics do not see: "
         f"<b>mae_source{page.escape(channel)}</b> is against the file.")
    ]  # fmt: skip


def _outliers(rows: Sequence[dict], metric: str, values: list[float], case: str) -> list:
    """Volumes beyond the quartiles by more than 1.5 of their distance, on the bad side."""
    low, high = values[len(values) // 4], values[-1 - len(values) // 4]
    reach = 1.5 * (high - low)
    if metric in LOWER_IS_BETTER:
        far = [r for r in rows if _finite(r[metric]) and r[metric] > high + reach]
    else:
        far = [r for r in rows if _finite(r[metric]) and r[metric] < low - reach]
    if not far:
        return []
    names = ", ".join(f"<b>{page.escape(r[case])}</b> ({page.number(r[metric])})" for r in far[:5])
    plural = "volumes are" if len(far) > 1 else "volume is"
    return [("warn", f"{len(far)} {plural} far from the others in {metric}: {names}.")]


def _headline(rows: Sequence[dict], metrics: Sequence[str]) -> list[tuple[str, str, str]]:
    facts = [("volumes", str(len(rows)), "")]
    for metric in metrics[:6]:
        values = [r[metric] for r in rows if _finite(r[metric])]
        if values:
            mean = sum(values) / len(values)
            sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
            facts.append((metric, page.number(mean), f"sd {page.number(sd)}"))
    return facts


def _spread(rows: Sequence[dict], metrics: Sequence[str], case: str) -> str:
    charts = (
        page.dots(m, {r[case]: r[m] for r in rows if _finite(r[m])}, _better(m)) for m in metrics
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def _better(metric: str) -> str:
    """Which way a metric is better, also that of a channel (psnr_ct) or in other units."""
    for way, names in (("higher", HIGHER_IS_BETTER), ("lower", LOWER_IS_BETTER)):
        if any(metric == name or metric.startswith(f"{name}_") for name in names):
            return way
    return ""


def _worst_first(rows: Sequence[dict], metric: str | None) -> list[dict]:
    if metric is None:
        return list(rows)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return sorted(rows, key=lambda r: sign * r[metric] if _finite(r[metric]) else -math.inf)


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
        if parts or links:
            measured = ((k, v) for k, v in row.items() if isinstance(v, float))
            numbers = "  ".join(f"{k} {page.number(v)}" for k, v in measured)
            linked = " ".join(
                f'<a href="media/{page.escape(p.name.replace("%", "%25"))}">{p.suffix[1:]}</a>'
                for p in links
            )
            pictures = f'<div class="pair">{"".join(parts)}</div>'
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


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and math.isfinite(value)
