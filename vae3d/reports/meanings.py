"""What each metric of an evaluation means: its group, unit, direction, and what to hold it against.

A new metric gets a line in `MEANINGS`; `psnr_ct` and `foreground_psnr` are found by their parts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

INPUT, FILE = "Against what the network was given", "In the intensities of the file"
FOREGROUND, CHANNELS = "In the foreground", "Channel by channel"
LABELS, TASK = "Label by label", "In a task"
LINEAR, PATCHES, LATENT = "Against linear codes", "Patches", "The latent"
STAGE2, LATENT_CHANNELS = "The latent, for a second stage", "The latent, channel by channel"


@dataclass(frozen=True)
class Meaning:
    """What one metric says.

    Args:
        group: Heading that it stands under.
        unit: Of its numbers.
        better: higher | lower | an ideal number as text; empty where neither is.
        says: What it is, and what is good, in one sentence.
        against: Metrics to hold it against.
    """

    group: str
    unit: str
    better: str
    says: str
    against: tuple[str, ...] = ()


MEANINGS = {
    "psnr": Meaning(INPUT, "dB", "higher",
        "Peak signal over mean squared error; 6 dB halve the error.", ("pooled_psnr", "pca_psnr")),
    "ssim": Meaning(INPUT, "", "higher",
        "Likeness of local structure, 1 where equal; strict with noise, which no code keeps."),
    "ms_ssim": Meaning(INPUT, "", "higher", "The same over several scales; forgives fine noise."),
    "mae": Meaning(INPUT, "of the range", "lower", "Mean absolute error."),
    "mse": Meaning(INPUT, "of the range squared", "lower", "Mean squared error, behind PSNR."),
    "perceptual": Meaning(INPUT, "", "lower", "Distance of a network's features; sees blur."),
    "mask_fraction": Meaning(INPUT, "part", "", "Voxels that the masks count."),
    "mae_source": Meaning(FILE, "of the file", "lower",
        "Mean absolute error against the file, with what the window clips.", ("mae_original",)),
    "rmse_source": Meaning(FILE, "of the file", "lower",
        "Root mean squared error against the file.", ("rmse_original",)),
    "mae_original": Meaning(FILE, "of the file", "lower", "Mean absolute error within the window."),
    "rmse_original": Meaning(FILE, "of the file", "lower",
        "Root mean squared error within the window."),
    "clipped": Meaning(FILE, "part", "lower", "Voxels beyond the window: lost before the network."),
    "foreground_clipped": Meaning(FILE, "part", "lower",
        "The same of the foreground; above 0.005 look at the window."),
    "pooled_psnr": Meaning(LINEAR, "dB", "",
        "Average pooling to the latent's grid: a network below it has learned nothing."),
    "pca_psnr": Meaning(LINEAR, "dB", "",
        "The best linear code with as many numbers (block PCA): a network should be above it."),
    "pca_equivalent": Meaning(LINEAR, "", "higher",
        "Numbers that block PCA would need, over the latent's; 1 is a linear code."),
    "lattice_score": Meaning(LINEAR, "", "1",
        "How much the grid of latent cells shows; 1 is not at all, above 1.15 it is seen."),
    "seam_score": Meaning(PATCHES, "", "1",
        "Jump of the error across patch borders over that elsewhere; above 1.2 it is seen."),
    "patch_gap": Meaning(PATCHES, "dB", "higher",
        "PSNR between the patched and the exact result; near psnr, patches cost.", ("psnr",)),
    "kl": Meaning(LATENT, "nats per value", "", "Divergence of the posterior from N(0, 1)."),
    "kl_sum": Meaning(LATENT, "nats", "", "The same of a whole volume."),
    "latent_mean": Meaning(LATENT, "", "0", "Mean of the latent, for a second stage."),
    "latent_std": Meaning(LATENT, "", "1", "Its standard deviation, for a second stage."),
    "posterior_std": Meaning(LATENT, "", "",
        "Noise of the posterior; near 1 it says nothing, near 0 the model is an autoencoder."),
    "active_channels": Meaning(LATENT, "channels", "higher", "Channels that carry information."),
    "code_perplexity": Meaning(LATENT, "codes", "higher",
        "How many codes would be in use if all were used alike: the exponential of their entropy."),
    "code_usage": Meaning(LATENT, "part", "higher", "Part of the codebook that occurs."),
    "bits_per_voxel": Meaning(LATENT, "bit", "lower",
        "Size of the latent over the volume's; a code takes the logarithm of their number."),
    "spectral_gap": Meaning(STAGE2, "nats", "lower",
        "How far the latent's spectrum is from the input's; SpectrumMatching in loss.extra."),
    "high_frequency_share": Meaning(STAGE2, "part", "",
        "Power of the latent beyond half of the highest frequency, which diffusion learns last; "
        "much above the input's, it learns noise: SpectrumMatching or ScaleEquivariance.",
        ("input_high_frequency_share",)),
    "input_high_frequency_share": Meaning(STAGE2, "part", "", "The same of the input, pooled."),
    "scale_psnr": Meaning(STAGE2, "dB", "higher",
        "The latent at half its size, decoded, against the input at half its size; far below psnr "
        "coarse structure sits in fine detail: ScaleEquivariance in loss.extra.", ("psnr",)),
    "noise_share": Meaning(STAGE2, "part", "",
        "Part of the latent's variance that is posterior noise: near 1 diffusion learns noise "
        "(lower loss.kl.weight), near 0 every detail (raise it, or NoiseRobust)."),
    "kurtosis": Meaning(STAGE2, "", "0",
        "Weight of the tails, 0 as of a Gaussian; above 10 a few values are far out, and the scale "
        "suits none: raise loss.kl.weight."),
}  # fmt: skip
GROUPS = (
    *(INPUT, FOREGROUND, CHANNELS, LABELS, TASK, FILE),
    *(LINEAR, PATCHES, LATENT, STAGE2, LATENT_CHANNELS),
)
OF_CHANNELS = {INPUT: CHANNELS, LATENT: LATENT_CHANNELS, STAGE2: LATENT_CHANNELS}


def meaning(metric: str) -> Meaning | None:
    """What a metric means; those of a channel or of the foreground are found by their parts."""
    if metric in MEANINGS:
        return MEANINGS[metric]
    if metric.startswith("foreground_") and (whole := meaning(metric.removeprefix("foreground_"))):
        return replace(whole, group=FOREGROUND, against=())
    if metric.startswith("dice_"):
        says = f"Overlap of what {metric[5:]} finds in the reconstruction and in the input."
        return Meaning(TASK, "", "higher", says)
    metric, _, label = metric.partition("_label_")
    if label and (whole := meaning(metric)) is not None:
        says = f"In label {label}: {whole.says[0].lower()}{whole.says[1:]}"
        return replace(whole, group=LABELS, says=says, against=())
    parts = metric.split("_")
    for end in range(len(parts) - 1, 0, -1):  # mae_source_ct before mae_...
        name, channel = "_".join(parts[:end]), "_".join(parts[end:])
        if (whole := MEANINGS.get(name)) is not None:
            says = f"Of {channel}: {whole.says[0].lower()}{whole.says[1:]}"
            group = OF_CHANNELS.get(whole.group, whole.group)
            against = tuple(f"{other}_{channel}" for other in whole.against)
            return replace(whole, group=group, says=says, against=against)
    return None


def better(metric: str) -> str:
    """Which way a metric is better: higher | lower, or neither."""
    found = meaning(metric)
    return found.better if found and found.better in ("higher", "lower") else ""


def explained(summary: Mapping[str, Mapping[str, float]]) -> dict[str, list[dict]]:
    """Rows of a table for each group: value, unit, direction, baseline, and what it says.

    Args:
        summary: `mean` and `sd` of each metric.
    """
    groups: dict[str, list[dict]] = {group: [] for group in (*GROUPS, "Others")}
    for metric, numbers in summary.items():
        of = meaning(metric) or Meaning("Others", "", "", "")
        against = [f"{other} {summary[other]['mean']:.4g}" for other in of.against
                   if other in summary and math.isfinite(summary[other]["mean"])]  # fmt: skip
        against += [f"ideal {of.better}"] if of.better[:1].isdigit() else []
        row = {"metric": metric, "mean": numbers["mean"], "sd": numbers["sd"], "unit": of.unit}
        way = of.better if of.better in ("higher", "lower") else ""
        row |= {"better": way, "against": ", ".join(against), "what it says": of.says}
        groups[of.group].append(row)
    return {group: rows for group, rows in groups.items() if rows}


def ordered(metrics: Sequence[str]) -> list[str]:
    """Metrics whose groups come first, first."""
    groups = [*GROUPS, "Others"]
    places = {m: groups.index(of.group if (of := meaning(m)) else "Others") for m in metrics}
    return sorted(metrics, key=lambda m: places[m])
