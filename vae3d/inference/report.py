"""Self-contained HTML pages: one for an evaluation folder, one for training runs.

No network, no library: pictures and clips are embedded, curves are inline SVG.
"""

import base64
import csv
import html
import json
import os
from pathlib import Path

from vae3d.tracking.media import case_stem

MIME = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}


def write_report(out_dir: Path | str) -> Path:
    """Write `report.html` for an evaluation folder.

    Args:
        out_dir: Folder with metrics.csv (a row a volume), summary.json, media/<case>.{png,mp4}.

    Returns:
        Path of the page.
    """
    out_dir = Path(out_dir)
    with open(out_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((out_dir / "summary.json").read_text())
    table = _table(rows)
    cases = "".join(_case(out_dir / "media", next(iter(row.values()))) for row in rows)
    body = f"<h1>Evaluation</h1>{_facts(summary)}<h2>Volumes</h2>{table}<h2>Views</h2>{cases}"
    return _write(out_dir / "report.html", _page("Evaluation", body))


def _case(media: Path, case: str) -> str:
    stem = case_stem(case)
    parts = [f"<h3>{html.escape(case)}</h3>"]
    if (media / f"{stem}.png").is_file():
        parts.append(f'<img alt="{html.escape(case)}" src="{_data_uri(media / f"{stem}.png")}">')
    if (media / f"{stem}.mp4").is_file():
        uri = _data_uri(media / f"{stem}.mp4")
        parts.append(f'<video src="{uri}" autoplay loop muted playsinline controls></video>')
    return f"<section>{''.join(parts)}</section>"


def _table(rows: list[dict]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _facts(facts: dict) -> str:
    items = (
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(json.dumps(v))}</dd>"
        for k, v in facts.items()
    )
    return f"<dl>{''.join(items)}</dl>"


def _data_uri(path: Path) -> str:
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>:root{{color-scheme:light dark}}"
        "body{font:16px system-ui;max-width:1100px;margin:auto;padding:2rem}"
        f"img,video{{max-width:100%}}</style><body>{body}</body></html>"
    )


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
