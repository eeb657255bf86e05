"""The HTML that reports are made of: one file, no network, no library, light and dark.

`page(title, subtitle, sections)` gives the whole document; the other functions give its parts.
Curves and dots are inline SVG; a few lines of script add the readout under the pointer, sortable
tables and the step sliders. Without script everything is still there to read.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

MIME = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4", ".webp": "image/webp"}
COLORS = 6  # --c0 ... --c5 of the style sheet, for runs
WIDTH, HEIGHT = 420, 210  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26

Range = tuple[float, float, float]  # mean, lowest, highest
Thin = list[tuple[float, Range | None]]  # x, range of the finite y there


@dataclass
class Series:
    """One line of a chart.

    Args:
        name: In the legend and under the pointer.
        x: Steps.
        y: Values, None where they are not finite.
        color: Index of the color.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole document; the viewer's style and script are in it where it has viewers.

    Args:
        title: In the header and the window.
        subtitle: One line under it, HTML.
        sections: HTML, in order; see `section`.
    """
    body = "\n".join(sections)
    parts = ("page", "viewer") if 'class="viewer"' in body else ("page",)
    style, script = ("\n".join(map(part, parts)) for part in (_style, _script))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1><p>{subtitle}</p></header>\n{body}"
        f"\n</main><script>{script}</script></body></html>\n"
    )


def _style(name: str) -> str:
    return Path(__file__).with_name(f"{name}.css").read_text("utf-8")


def _script(name: str) -> str:
    return Path(__file__).with_name(f"{name}.js").read_text("utf-8")


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading with its parts; nothing when there is nothing to say."""
    if not any((*parts, note)):
        return ""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{''.join(parts)}</section>"


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers: (label, value, small print)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b>'
            f"<small>{escape(small)}</small></div>"
            for label, value, small in facts
        )
        + "</div>"
    )


def table(rows: Sequence[Mapping], first: str | None = None) -> str:
    """A table that sorts by a click on its heads; numbers align on the right.

    Args:
        rows: Mappings with the same keys.
        first: Key of the column that names the row.
    """
    if not rows:
        return ""
    columns = list(rows[0])

    def numeric(value: object) -> TypeGuard[int | float]:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def head(column: str) -> str:
        side = ' class="n"' if any(numeric(row.get(column)) for row in rows) else ""
        return f"<th{side}>{escape(str(column))}</th>"

    def cell(column: str, value: object) -> str:
        if numeric(value):
            return f'<td class="n" data-v="{value}">{number(value)}</td>'
        tag = "th" if column == first else "td"
        return f"<{tag}>{escape('' if value is None else str(value))}</{tag}>"

    heads = "".join(map(head, columns))
    body = "".join("<tr>" + "".join(cell(c, row.get(c)) for c in columns) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs.items())
    return f"<dl>{items}</dl>"


def findings(items: Sequence[tuple[str, str]]) -> str:
    """What to look at first: (level, text), level bad | warn | good; text is HTML."""
    return (
        '<ul class="findings">'
        + "".join(f'<li class="{level}">{text}</li>' for level, text in items)
        + "</ul>"
    )


def image(path: Path, alt: str) -> str:
    """A picture inside the page."""
    return f'<img alt="{escape(alt)}" src="{data_uri(path)}" loading="lazy">'


def video(path: Path) -> str:
    """A clip inside the page, which plays silently over and over."""
    return f'<video src="{data_uri(path)}" autoplay loop muted playsinline controls></video>'


def data_uri(path: Path) -> str:
    """A file as an address that holds it."""
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def legend(names: Sequence[str]) -> str:
    """Which color is which run."""
    marks = (
        f'<span><i style="background:var(--c{i % COLORS})"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(marks)}</p>'


def chart(title: str, series: Sequence[Series], log: bool | None = None, caption: str = "") -> str:
    """A chart of lines over steps.

    Long series are averaged to what the width can show, with the range of the raw values as a
    faint band behind the line.

    Args:
        title: Above it.
        series: One per run.
        log: Logarithmic values; None for values above 0 that span more than a factor 30.
        caption: Small print beside the title.
    """
    points = [y for s in series for y in s.y if y is not None]
    if not points:
        return ""
    if log is None:
        log = min(points) > 0 and max(points) > 30 * min(points)
    log = log and min(points) > 0
    xs = [x for s in series for x in s.x]
    x_axis, y_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _value_axis(points, log)
    parts = [_grid(x_axis, y_axis)]
    data = []
    for s in series:
        thin = _thin(s)
        color = f"var(--c{s.color % COLORS})"
        parts += _lines(thin, x_axis, y_axis, color, banded=len(thin) < len(s.x))
        means = [[x, ys and ys[0]] for x, ys in thin]
        data.append({"name": s.name, "color": color, "points": means})
    note = " ".join(filter(None, ["log" if log else "", caption]))
    about = escape(f"{title}: {_in_words(series)}")
    geometry = json.dumps(
        {"x": [x_axis.low, x_axis.high], "left": LEFT, "right": WIDTH - RIGHT, "series": data},
        separators=(",", ":"),
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<small>{escape(note)}</small>'
        f'<output></output></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{about}">{"".join(parts)}<line class="cursor" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/></svg><script type="application/json">{_in_script(geometry)}'
        "</script></figure>"
    )


def dots(title: str, values: Mapping[str, float], better: str = "") -> str:
    """One dot per volume on a line, the mean marked; the pointer names a dot.

    Args:
        title: The metric.
        values: Value by volume.
        better: `higher` or `lower`, printed beside the title.
    """
    finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    if not finite:
        return ""
    axis = _Axis(min(finite.values()), max(finite.values()), 14, WIDTH - 14, margin=0.06)
    mean = sum(finite.values()) / len(finite)
    y, marks = 44, []
    for at, text in axis.ticks(5):
        marks.append(f'<text x="{at:.1f}" y="84" class="t m">{text}</text>')
        marks.append(f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="16" y2="70"/>')
    for i, (name, value) in enumerate(sorted(finite.items(), key=lambda item: item[1])):
        marks.append(
            f'<circle cx="{axis(value):.1f}" cy="{y + (i % 5 - 2) * 8}" r="4.5">'
            f"<title>{escape(name)}: {number(value)}</title></circle>"
        )
    marks.append(
        f'<line class="mean" x1="{axis(mean):.1f}" x2="{axis(mean):.1f}" y1="12" y2="72"/>'
    )
    note = f"{better} is better" if better else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<small>{note}</small>'
        f'<output>mean {number(mean)}</output></figcaption><svg viewBox="0 0 {WIDTH} 92" '
        f'role="img" aria-label="{escape(title)} per volume, mean {number(mean)}">'
        f"{''.join(marks)}</svg></figure>"
    )


def number(value: float | None) -> str:
    """A number as people write it: four digits, thousands in thin groups."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 10000 else f"{value:.4g}"


def escape(text: str) -> str:
    """Text that is safe between tags and inside quotes."""
    return html.escape(str(text), quote=True)


class _Axis:
    """Maps values to pixels; `ticks` are round values with their texts."""

    def __init__(
        self, low: float, high: float, start: int, end: int, log: bool = False, margin: float = 0.0
    ):
        if low == high:  # a single value still needs a scale
            low, high = low - abs(low) * 0.05 - 1e-12, high + abs(high) * 0.05 + 1e-12
        if margin:
            low, high = low - (high - low) * margin, high + (high - low) * margin
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        if self.log:
            return self._log_ticks(count)
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        values = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(self(v), _short(0.0 if abs(v) < step / 2 else v)) for v in values]

    def _log_ticks(self, count: int) -> list[tuple[float, str]]:
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for multiples in ((1,), (1, 3), (1, 2, 5)):
            values = [m * 10.0**p for p in powers for m in multiples]
            values = [v for v in values if self.low <= math.log10(v) <= self.high]
            if len(values) >= 3:
                break
        values = values[:: max(1, round(len(values) / count))]
        return [(self(v), _short(v)) for v in values]


def _value_axis(points: Sequence[float], log: bool) -> _Axis:
    if log:
        low, high = math.log10(min(points)), math.log10(max(points))
    else:
        low, high = min(points), max(points)
    return _Axis(low, high, HEIGHT - BOTTOM, TOP, log, margin=0.04)


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    for at, text in y_axis.ticks(5):
        parts.append(
            f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="t e" x="{LEFT - 7}" y="{at + 3.5:.1f}">{text}</text>'
        )
    for at, text in x_axis.ticks(5):
        parts.append(f'<text class="t m" x="{at:.1f}" y="{HEIGHT - 8}">{text}</text>')
    return "".join(parts)


def _thin(series: Series, most: int = 180) -> Thin:
    """At most `most` points (x, range of y); None where no value is finite."""
    size = max(1, math.ceil(len(series.x) / most))
    thin: Thin = []
    for start in range(0, len(series.x), size):
        ys = [y for y in series.y[start : start + size] if y is not None]
        x = series.x[min(start + size, len(series.x)) - 1]
        thin.append((x, (sum(ys) / len(ys), min(ys), max(ys)) if ys else None))
    return thin


def _lines(thin: Thin, x_axis: _Axis, y_axis: _Axis, color: str, banded: bool) -> list[str]:
    """The line, cut where values are missing, and the band of the raw values behind it."""
    runs: list[list[tuple[float, Range]]] = [[]]
    for x, ys in thin:
        if ys is not None:
            runs[-1].append((x, ys))
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in filter(None, runs):
        line = " ".join(f"{x_axis(x):.1f},{y_axis(mean):.1f}" for x, (mean, _, _) in run)
        if banded and len(run) > 1:
            above = [f"{x_axis(x):.1f},{y_axis(high):.1f}" for x, (_, _, high) in run]
            below = [f"{x_axis(x):.1f},{y_axis(low):.1f}" for x, (_, low, _) in reversed(run)]
            parts.append(
                f'<polygon points="{" ".join(above + below)}" style="fill:{color}" class="band"/>'
            )
        if len(run) == 1:
            cx, cy = line.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" style="fill:{color}"/>')
        else:
            parts.append(f'<polyline points="{line}" style="stroke:{color}"/>')
    return parts


def _in_words(series: Sequence[Series]) -> str:
    ends = []
    for s in series:
        ys = [y for y in s.y if y is not None]
        if ys:
            ends.append(f"{s.name} from {number(ys[0])} to {number(ys[-1])}")
    return "; ".join(ends)


def _short(value: float) -> str:
    """A tick: 12k, 3e-5, 0.25."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:.6g}"


def _in_script(text: str) -> str:
    """JSON inside a script element must not end the element."""
    return text.replace("<", "\\u003c")
