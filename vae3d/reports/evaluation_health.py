"""What stands out in an evaluation, the worst first, and which option to change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

from vae3d.reports import page
from vae3d.reports.meanings import better

GRID_SHOWS = 1.15  # lattice_score
SEAM_SHOWS = 1.2  # seam_score
MOST_CLIPPED = 0.005  # of the foreground
FAR_SPECTRUM = 0.1  # nats, spectral_gap
SCALE_COSTS_DB = 3.0  # scale_psnr below psnr
MOSTLY_NOISE = 0.5  # noise_share
HEAVY_TAILS = 10.0  # kurtosis
# Of a term that is good for a second stage, see docs/two_stages.md.
JUDGE = "mends it; whether samples gain, <code>vae3d compare</code> tells (demo volumes' did not)"
FEW_CODES = 0.1  # code_perplexity over the codebook
CLOSE_DB = 6.0  # patch_gap so near to psnr: the patches make a good part of the error

Found = list[tuple[str, str]]  # level (bad | warn | good) and HTML


def find(
    rows: Sequence[dict],
    metrics: Sequence[str],
    leading: str | None,
    summary: Mapping[str, object] | None = None,
) -> Found:
    """What to look at first.

    Args:
        rows: A volume each.
        metrics: Columns that hold numbers.
        leading: The one that volumes are sorted by.
        summary: Settings of the evaluation.
    """
    case = next(iter(rows[0]))
    found = []
    for metric in metrics:  # pca_equivalent is infinite where no number of components would do
        bad = [r[case] for r in rows if not finite(r[metric]) and r[metric] != math.inf]
        if bad:
            named = ", ".join(map(page.escape, bad[:5]))
            found.append(("bad", f"<b>{page.escape(metric)}</b> is not finite for {named}."))
    if "mask_fraction" in metrics:
        share = 100 * sum(r["mask_fraction"] for r in rows) / len(rows)
        found.append(
            ("good", f"Figures are of the voxels that the <b>masks</b> count, {share:.0f} % of a "
             "volume; pictures show all of the reconstruction.")
        )  # fmt: skip
    means, summary = _means(rows, metrics), summary or {}
    found += [*_against_linear_codes(means, summary), *_seams(means), *_latent(means, summary)]
    for metric in metrics:
        found += _lost_to_the_clip(rows, metric) if metric.startswith("foreground_clipped") else []
    if leading:
        values = sorted(r[leading] for r in rows if finite(r[leading]))
        if len(values) >= 5:
            found += _outliers(rows, leading, values, case)
        if values:
            worst = worst_first(rows, leading)[0]
            found.append(
                ("good", f"The worst {leading} is {page.number(worst[leading])}, of "
                 f"<b>{page.escape(worst[case])}</b>, shown first below.")
            )  # fmt: skip
    return sorted(found, key=lambda item: ("bad", "warn", "good").index(item[0]))


def _means(rows: Sequence[dict], metrics: Sequence[str]) -> dict[str, float]:
    """Means of the metrics that are finite for every volume."""
    whole = [m for m in metrics if all(finite(r[m]) for r in rows)]
    return {m: sum(r[m] for r in rows) / len(rows) for m in whole}


def _against_linear_codes(means: Mapping[str, float], summary: Mapping[str, object]) -> Found:
    """Whether the model is worth its training: above pooling, above block PCA, without a grid."""
    psnr, remedy = means.get("psnr", math.inf), "raise <code>--max_steps</code>"
    codes = summary.get("num_codes")  # no numbers: no linear code is of their size
    if not summary.get("linear_code"):
        remedy = f"begin at the best linear code (<code>--model.linear_code true</code>), {remedy}"
    found = []
    if psnr < means.get("pooled_psnr", -math.inf):
        found.append(
            ("bad", f"The model has {psnr:.1f} dB, <b>average pooling</b> with fewer numbers "
             f"{means['pooled_psnr']:.1f} dB: {remedy}, lower <code>--lr</code>, and look whether "
             "<code>data.preprocess</code> leaves the volumes as you meant them.")
        )  # fmt: skip
    elif psnr < means.get("pca_psnr", -math.inf) and not codes:
        found.append(
            ("warn", f"The model has {psnr:.1f} dB, a <b>linear code</b> of the same size (block "
             f"PCA) {means['pca_psnr']:.1f} dB: {remedy}, or give it more "
             "<code>--model.channels</code>.")
        )  # fmt: skip
    if means.get("lattice_score", 1.0) > GRID_SHOWS:
        found.append(
            ("warn", f"The <b>grid of latent cells</b> shows in the reconstructions (lattice_score "
             f"{means['lattice_score']:.2f}, 1 is none): raise <code>--max_steps</code>, or shrink "
             "less (<code>--model.factors</code>).")
        )  # fmt: skip
    if not found and "pca_psnr" in means and not codes:
        equivalent, pooled = means.get("pca_equivalent"), means.get("pooled_psnr", math.nan)
        worth = f", which would need {equivalent:.2f} times as many numbers" if equivalent else ""
        found.append(
            ("good", f"The model has {psnr:.1f} dB, pooling {pooled:.1f} dB and the "
             f"best linear code of the same size {means['pca_psnr']:.1f} dB{worth}.")
        )  # fmt: skip
    return found


def _seams(means: Mapping[str, float]) -> Found:
    """Whether the borders of patches show, and what patches cost."""
    found, remedy = [], "<code>--mode exact</code> has none, a larger <code>--overlap</code> fewer"
    if means.get("seam_score", 1.0) > SEAM_SHOWS:
        found.append(
            ("warn", f"<b>Seams</b> of patches show (seam_score {means['seam_score']:.2f}, 1 is "
             f"none): {remedy}.")
        )  # fmt: skip
    elif means.get("patch_gap", math.inf) < means.get("psnr", -math.inf) + CLOSE_DB:
        found.append(
            ("warn", f"<b>Patches</b> differ from the exact result by {means['patch_gap']:.1f} dB, "
             f"near the error itself ({means['psnr']:.1f} dB): {remedy}.")
        )  # fmt: skip
    return found


def _latent(means: Mapping[str, float], summary: Mapping[str, object]) -> Found:
    """Dead channels, and a scale that a second stage would have to mend."""
    found, channels = [], summary.get("latent_channels")
    active = means.get("active_channels")
    if isinstance(channels, int) and active is not None and active < channels - 0.5:
        found.append(
            ("warn", f"{page.number(round(channels - active, 1))} of {channels} latent channels "
             "are <b>dead</b>: lower <code>--loss.kl.weight</code>, or save "
             "<code>--model.latent_channels</code>.")
        )  # fmt: skip
    std = means.get("latent_std")
    if std is not None and not 0.5 < std < 2:
        found.append(("warn", latent_scale_advice(std)))
    codes, perplexity = summary.get("num_codes"), means.get("code_perplexity")
    if isinstance(codes, int) and perplexity is not None:
        found.append(code_use(perplexity, means["code_usage"], codes))
    return [*found, *(("warn", f"For a second stage: {text}.") for text in _diffusability(means))]


def _diffusability(means: Mapping[str, float]) -> Iterator[str]:
    """What a diffusion model will find hard in the latents, and which option helps."""
    gap, share = means.get("spectral_gap", 0.0), means.get("high_frequency_share", math.nan)
    if gap > FAR_SPECTRUM:
        yield (
            f"the latent's <b>spectrum</b> is not the input's (spectral_gap {gap:.2f}; "
            f"{100 * share:.0f} % of its power is of high frequency, "
            f"{100 * means.get('input_high_frequency_share', math.nan):.0f} % of the input's), and "
            "diffusion learns high frequencies last: <code>SpectrumMatching</code> in "
            f"<code>loss.extra</code> {JUDGE}"
        )
    psnr, scaled = means.get("psnr", -math.inf), means.get("scale_psnr", math.inf)
    if scaled < psnr - SCALE_COSTS_DB:
        yield (
            f"a latent at <b>half its size</b> decodes at {scaled:.1f} dB, the whole one at "
            f"{psnr:.1f} dB: coarse structure is not coarse in the latent. "
            f"<code>ScaleEquivariance</code> in <code>loss.extra</code> {JUDGE}"
        )
    if (noise := means.get("noise_share", 0.0)) > MOSTLY_NOISE:
        yield (
            f"{100 * noise:.0f} % of the latents' variance is <b>posterior noise</b>: lower "
            "<code>--loss.kl.weight</code>"
        )
    if (tails := means.get("kurtosis", 0.0)) > HEAVY_TAILS:
        yield (
            f"a few latent values are <b>far out</b> (kurtosis {tails:.0f}, 0 as of a Gaussian): "
            "raise <code>--loss.kl.weight</code>"
        )


def code_use(perplexity: float, usage: float, codes: int | None = None) -> tuple[str, str]:
    """What to say of how codes lie over their codebook.

    Args:
        perplexity: How many codes would be in use if all were used alike.
        usage: Part of the codebook that is used.
        codes: Its size; None for what the two tell of it.
    """
    said = f"<b>Codes</b>: {100 * usage:.0f} % are used, as evenly as {perplexity:.0f} would be"
    of = f", of {codes}" if codes else ""
    if usage < FEW_CODES or (codes and perplexity < FEW_CODES * codes):
        return "warn", (
            f"{said}{of}: a smaller codebook would do as well (<code>levels</code> of FSQ, "
            "<code>codebook</code> of VQ), or train longer."
        )
    return "good", f"{said}{of}."


def latent_scale_advice(std: float) -> str:
    """What to do about latents of another size than a second stage wants."""
    scale = f", or set <code>--model.latent_scale {1 / std:.3g}</code>" if std else ""
    return (
        f"The latents have a <b>standard deviation</b> of {page.number(std)}; a second stage wants "
        f"about 1: train with <code>--loss.kl.target_std 1</code>{scale}."
    )


def _lost_to_the_clip(rows: Sequence[dict], metric: str) -> Found:
    """The volume of whose foreground most was clipped before the model saw it, if it is much."""
    worst = max(rows, key=lambda r: r[metric] if finite(r[metric]) else 0.0)
    if not (finite(worst[metric]) and worst[metric] > MOST_CLIPPED):
        return []
    case, channel = next(iter(worst.values())), metric.removeprefix("foreground_clipped")
    return [
        ("warn", f"{100 * worst[metric]:.3g} % of the foreground of <b>{page.escape(case)}</b> is "
         f"clipped (foreground_clipped{page.escape(channel)}), which other metrics do not see: "
         f"<b>mae_source{page.escape(channel)}</b> is against the file. Widen "
         "<code>--data.preprocess.percentiles</code> or <code>--data.preprocess.window_hu</code>.")
    ]  # fmt: skip


def _outliers(rows: Sequence[dict], metric: str, values: list[float], case: str) -> Found:
    """Volumes beyond the quartiles by more than 1.5 of their distance, on the bad side."""
    low, high = values[len(values) // 4], values[-1 - len(values) // 4]
    reach = 1.5 * (high - low)
    if better(metric) == "lower":
        far = [r for r in rows if finite(r[metric]) and r[metric] > high + reach]
    else:
        far = [r for r in rows if finite(r[metric]) and r[metric] < low - reach]
    if not far:
        return []
    names = ", ".join(f"<b>{page.escape(r[case])}</b> ({page.number(r[metric])})" for r in far[:5])
    plural = "volumes are" if len(far) > 1 else "volume is"
    return [("warn", f"{len(far)} {plural} far from the others in {metric}: {names}.")]


def worst_first(rows: Sequence[dict], metric: str | None) -> list[dict]:
    """Rows sorted by a metric, those without a finite value first."""
    if metric is None:
        return list(rows)
    sign = -1 if better(metric) == "lower" else 1
    return sorted(rows, key=lambda r: sign * r[metric] if finite(r[metric]) else -math.inf)


def finite(value: object) -> TypeGuard[float]:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, float) and math.isfinite(value)
