"""The results of an evaluation as a table for a text: Markdown, and LaTeX with booktabs."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from loaders.whole import write_text
from vae3d.reports.meanings import explained, meaning

HEAD = ("metric", "mean", "sd", "n", "unit", "better")
ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
Numbers = Mapping[str, float]


def write_tables(folder: Path, summary: Mapping[str, Numbers], caption: str) -> None:
    """Write results.md and results.tex.

    Args:
        folder: Of the evaluation.
        summary: `mean`, `sd` and `n` of each metric.
        caption: What was measured.
    """
    write_text(folder / "results.md", markdown(summary, caption))
    write_text(folder / "results.tex", latex(summary, caption))


def markdown(summary: Mapping[str, Numbers], caption: str) -> str:
    """A table a group of metrics, as Markdown."""
    text = f"{caption}\n"
    for group, lines in cells(summary):
        rows = [HEAD, ["---", "---:", "---:", "---:", "---", "---"], *lines]
        cut = ("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
        text += f"\n**{group}**\n\n" + "\n".join(cut) + "\n"
    return text


def latex(summary: Mapping[str, Numbers], caption: str) -> str:
    r"""One table with a heading for each group, for `\usepackage{booktabs}`."""
    body = []
    for group, lines in cells(summary):
        body += [r"\midrule", rf"\multicolumn{{6}}{{l}}{{\emph{{{escaped(group)}}}}} \\"]
        body += [" & ".join(map(escaped, line)) + r" \\" for line in lines]
    return "\n".join([
        r"% \usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\caption{{{escaped(caption)}}}", r"\begin{tabular}{lrrrll}", r"\toprule",
        " & ".join(HEAD) + r" \\", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def cells(summary: Mapping[str, Numbers]) -> Iterator[tuple[str, list[list[str]]]]:
    """Each group that has metrics, with its lines as text."""
    for group, lines in explained(summary).items():
        if lines:
            yield group, [line_of(line["metric"], summary[line["metric"]]) for line in lines]


def line_of(metric: str, numbers: Numbers) -> list[str]:
    """The cells of a metric, under `HEAD`; one volume has no spread."""
    of = meaning(metric)
    unit, way = (of.unit, of.better) if of else ("", "")
    way = f"ideal {way}" if way[:1].isdigit() else way
    sd = short(numbers["sd"]) if numbers["n"] > 1 else "-"
    return [metric, short(numbers["mean"]), sd, str(int(numbers["n"])), unit, way]


def short(value: float) -> str:
    """Four digits, without an exponent where a person would write none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def escaped(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(ESCAPES.get(character, character) for character in text)


def sentence(summary: Mapping[str, Numbers], volumes: int, channels: int) -> str:
    """What an evaluation has found, for a person, in one sentence."""
    mean = {name: numbers["mean"] for name, numbers in summary.items()}
    many = f"{volumes} volume{'s' * (volumes != 1)}"
    if "psnr" not in mean:
        return f"{many}: the reconstructions equal their volumes"
    spread = f" (sd {summary['psnr']['sd']:.2f})" if volumes > 1 else ""
    parts = [f"PSNR {mean['psnr']:.2f} dB{spread}"]
    for name, of in (("pca_psnr", "block PCA of the same size"), ("pooled_psnr", "pooling")):
        if name in mean:
            gap = mean["psnr"] - mean[name]
            parts.append(f"{abs(gap):.1f} dB {'above' if gap >= 0 else 'below'} {of}")
    parts += [f"SSIM {mean['ssim']:.3f}"] if "ssim" in mean else []
    if channels == 1 and "mae_original" in mean:
        parts.append(f"{short(mean['mae_original'])} off on average in the file's intensities")
    for name in sorted(mean):
        if name.startswith("dice_") and name.count("_") == 1:
            parts.append(f"Dice of {name.removeprefix('dice_')} {mean[name]:.3f}")
    return f"{many}: {', '.join(parts)}"
