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
    """The whole document.

    Args:
        title: In the header and the window.
        subtitle: One line under it, HTML.
        sections: HTML, in order; see `section`.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1><p>{subtitle}</p></header>\n"
        + "\n".join(sections)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


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


STYLE = """
:root{--bg:#f7f7f5;--card:#fff;--ink:#16181d;--soft:#667085;--line:#e4e4e0;--grid:#ececea;
--c0:#2563eb;--c1:#e0701b;--c2:#0f9d76;--c3:#b3349f;--c4:#b8860b;--c5:#5b6472;
--bad:#c62828;--warn:#b26a00;--good:#1b7f4d;--shadow:0 1px 2px #0000000d,0 4px 16px #0000000a}
@media (prefers-color-scheme:dark){:root{--bg:#0c0e12;--card:#14171d;--ink:#e9ebef;--soft:#98a1b0;
--line:#252a33;--grid:#20252d;--c0:#6ea8ff;--c1:#ff9d5c;--c2:#4fd1a5;--c3:#e58bd6;--c4:#e6c15c;
--c5:#a7b0bf;--bad:#ff7b72;--warn:#f0b44c;--good:#5fd29a;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1180px;margin:0 auto;padding:48px 24px 96px}
header h1{font-size:32px;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px;font-weight:680}
header p{margin:0;color:var(--soft)}
section{margin-top:44px}
h2{font-size:19px;letter-spacing:-.01em;margin:0 0 14px;font-weight:640}
h3{font-size:15px;margin:0 0 10px;font-weight:600}
h4{font-size:13px;margin:0 0 6px;font-weight:600;color:var(--soft)}
.note{margin:-8px 0 14px;color:var(--soft);max-width:75ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:12px;margin-top:28px}
.tile,.card,.chart,.findings,.scroll,details{background:var(--card);border:1px solid var(--line);
border-radius:12px;box-shadow:var(--shadow)}
.tile{padding:14px 16px;display:flex;flex-direction:column}
.tile span{color:var(--soft);font-size:13px}
.tile b{font-size:23px;line-height:1.3;font-weight:640;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tile small{color:var(--soft)}
.findings{list-style:none;margin:0;padding:6px 18px}
.findings li{padding:9px 0 9px 24px;position:relative;border-top:1px solid var(--line)}
.findings li:first-child{border-top:0}
.findings li:before{content:"";position:absolute;left:2px;top:17px;width:9px;height:9px;
border-radius:50%;background:var(--soft)}
.findings .bad:before{background:var(--bad)}.findings .warn:before{background:var(--warn)}
.findings .good:before{background:var(--good)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px}
.chart{margin:0;padding:12px 12px 6px}
.chart figcaption{display:flex;gap:8px;align-items:baseline;font-weight:600;font-size:14px;
padding:0 4px 2px}
.chart small{color:var(--soft);font-weight:400}
.chart output{margin-left:auto;font-weight:400;font-size:13px;color:var(--soft);
font-variant-numeric:tabular-nums;text-align:right}
.chart svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.band{opacity:.16}.g{stroke:var(--grid)}.cursor{stroke:var(--soft);visibility:hidden}
circle{fill:var(--c0);fill-opacity:.78}.mean{stroke:var(--ink);stroke-width:1.5}
.t{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.m{text-anchor:middle}.e{text-anchor:end}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:14px 0 0;color:var(--ink)}
.legend i{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:8px;
vertical-align:middle}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
thead th{position:sticky;top:0;cursor:pointer;user-select:none;color:var(--soft);font-weight:600;
font-size:13px;background:var(--card)}
th,td{padding:8px 14px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
tbody th{font-weight:600}tbody tr:last-child>*{border-bottom:0}
tbody tr:hover{background:color-mix(in srgb,var(--c0) 7%,transparent)}
th.n,td.n{text-align:right}th[aria-sort]:after{content:" \\2191"}
th[aria-sort=descending]:after{content:" \\2193"}
.card{padding:16px;margin-bottom:14px}
.views{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:14px;
align-items:start}
img,video{display:block;max-width:100%;height:auto;border-radius:8px;background:#0b0c10}
video{width:100%}.pair{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}
.pair>:first-child{flex:3 1 420px;min-width:0;max-width:760px}
.pair>video:not(:first-child){flex:2 1 300px;min-width:0}
.steps{display:flex;gap:12px;align-items:center;margin:0 0 12px;color:var(--soft)}
.steps input{flex:1;max-width:420px;accent-color:var(--c0)}
.steps output{font-variant-numeric:tabular-nums;color:var(--ink)}
details{padding:0 18px}summary{cursor:pointer;padding:12px 0;font-weight:600}
pre{margin:0 0 14px;overflow-x:auto;font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,
monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 22px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
a{color:var(--c0)}
@media print{body{background:#fff}main{padding:0}section,.card,.chart{break-inside:avoid}}
"""

SCRIPT = """
const show=v=>v===null?'not finite':Math.abs(v)>=1e4||Number.isInteger(v)?
  Math.round(v).toLocaleString('en').replaceAll(',','\\u202f'):String(+v.toPrecision(4));
for(const figure of document.querySelectorAll('figure.chart')){
  const source=figure.querySelector('script');if(!source)continue;
  const d=JSON.parse(source.textContent),svg=figure.querySelector('svg');
  const cursor=svg.querySelector('.cursor'),out=figure.querySelector('output');
  svg.addEventListener('pointermove',e=>{
    const box=svg.getBoundingClientRect(),width=svg.viewBox.baseVal.width;
    const px=(e.clientX-box.left)/box.width*width;
    const x=d.x[0]+(px-d.left)/(d.right-d.left)*(d.x[1]-d.x[0]);
    const near=d.series.map(s=>s.points.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a));
    const at=near.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a)[0];
    const cx=d.left+(at-d.x[0])/((d.x[1]-d.x[0])||1)*(d.right-d.left);
    cursor.setAttribute('x1',cx);cursor.setAttribute('x2',cx);cursor.style.visibility='visible';
    out.replaceChildren('step '+show(at),...near.flatMap((p,i)=>{
      const s=document.createElement('b');s.style.color=d.series[i].color;
      s.textContent='\\u2002'+show(p[1]);return[s]}));
  });
  svg.addEventListener('pointerleave',()=>{cursor.style.visibility='hidden';out.replaceChildren()});
}
for(const table of document.querySelectorAll('table.sortable')){
  const body=table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head,i)=>head.addEventListener('click',()=>{
    const down=head.getAttribute('aria-sort')==='ascending';
    for(const h of table.tHead.rows[0].cells)h.removeAttribute('aria-sort');
    head.setAttribute('aria-sort',down?'descending':'ascending');
    const key=row=>{const c=row.cells[i];return c.dataset.v===undefined?c.textContent:+c.dataset.v};
    const rows=[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);
      return typeof x==='number'&&typeof y==='number'?x-y:String(x).localeCompare(String(y))});
    body.append(...(down?rows.reverse():rows));
  }));
}
for(const box of document.querySelectorAll('.stepper')){
  const range=box.querySelector('input');if(!range)continue;
  const out=box.querySelector('.steps output');
  const frames=[...box.querySelectorAll('[data-step]')];
  const steps=[...new Set(frames.map(f=>f.dataset.step))];
  const go=()=>{const step=steps[+range.value];out.textContent='step '+show(+step);
    for(const f of frames)f.hidden=f.dataset.step!==step};
  range.addEventListener('input',go);go();
}
"""
