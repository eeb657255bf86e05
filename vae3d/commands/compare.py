"""`vae3d compare SAMPLES REAL`: drawn volumes judged against real ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loaders import Preprocess
from loaders.whole import write_text
from vae3d.losses.features import DeepBet, FeatureNetwork
from vae3d.models.classes import made
from vae3d.ranges import check_ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    from loaders import VolumeStore
    from vae3d.inference.reconstruct import Coding
    from vae3d.models.custom_vae import CustomVAE

MEANINGFUL = 10  # volumes a side below which a Fréchet distance says nothing
WIDE = 30  # volumes a side below which intervals are wide
SIDE = 64  # voxels of the common grid along an axis, at most
SLICES = 8  # of each plane, that a 2D network sees
PAIRS = 40  # of volumes, for the diversity
SHOWN = 6  # closest pairs
COPIED = 0.01  # p-value
SAYS = {
    "kernel": "MMD with the cubic kernel in features, unbiased; alike where its interval holds 0",
    "frechet": "Frechet distance in features; only against its floor",
    "precision": "part of the samples that lie among real volumes",
    "recall": "part of the real volumes that lie among samples",
    "density": "how crowded the real neighborhoods are that samples lie in",
    "coverage": "part of the real volumes with a sample near by",
    "histogram": "1-Wasserstein distance of intensities, in parts of the range",
    "ms_ssim": "mean likeness of two samples; above its floor they are too alike",
}


@dataclass
class Comparison:
    """What drawn volumes are judged against, see `vae3d compare`.

    Args:
        real: Folder, glob or manifest of the volumes that were trained on, 4 or more.
        heldout: That of real volumes that no model has seen, 5 or more; null for no p-value.
        network: Network whose features are compared, as in `vae3d compare`.
    """

    real: str
    heldout: str | None = None
    network: Callable[[], FeatureNetwork] = DeepBet

    def check(self, count: int) -> None:
        """Refuse what cannot be compared before hours are spent on the samples.

        Args:
            count: How many will be drawn.
        """
        from loaders import find_subjects

        made("--compare.network", self.network)
        if count < 2:
            raise ValueError(f"--compare: {count} sample; draw 2 or more")
        for name, place, least in (("real", self.real, 4), ("heldout", self.heldout, 5)):
            if place is not None and len(found := find_subjects(place)) < least:
                raise ValueError(f"--compare.{name} {place}: {len(found)} volumes of {least}")


@dataclass
class Side:
    """The volumes of one folder, as rows for `vae3d.stage2.judge`.

    Args:
        store: The volumes.
        features: A row of features a volume.
        volumes: Intensities in parts of the range on the common grid, `(N, C, *grid)`.
        latents: A row of a latent on its common grid a volume; None without a VAE.
    """

    store: VolumeStore
    features: np.ndarray
    volumes: np.ndarray
    latents: np.ndarray | None = None

    @property
    def voxels(self) -> np.ndarray:
        """A row of intensities a volume."""
        return self.volumes.reshape(len(self.volumes), -1).astype(float)


def compare(
    samples: str,
    real: str,
    /,
    heldout: str | None = None,
    out_dir: str = "comparison",
    network: Callable[[], FeatureNetwork] = DeepBet,
    checkpoint: str | None = None,
    preprocess: Preprocess | None = None,
    cache_dir: str | None = None,
    grid: tuple[int, ...] | None = None,
    neighbors: int = 5,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    trust: tuple[str, ...] = (),
) -> None:
    """Judge drawn volumes: how near real ones, how varied, and whether they are copies.

        vae3d compare samples/ldm data/train --heldout data/test
        vae3d compare samples/ldm data/train --checkpoint runs/a --network VGG16

    Writes compare.json, closest.png (samples beside the real volumes next to them) and report.html.
    Each number stands beside its floor: the same of two halves of the real volumes. Volumes are
    prepared alike on all sides; those of SAMPLES are best drawn on the grid of REAL, as `vae3d
    sample` does.

    Args:
        samples: Folder, glob or manifest of drawn volumes, 2 or more.
        real: That of the volumes that the models were trained on, 4 or more.
        heldout: That of real volumes that no model has seen, 5 or more, for a p-value of
            memorization.
        out_dir: Where the results go.
        network: Network whose features are compared: DeepBet (3D, T1 heads), VGG16 (slices of the
            three planes), MonaiNetwork, or any file by ScriptedNetwork or LoadedNetwork.
        checkpoint: VAE in whose latent space memorization is looked for too, and by whose
            preprocessing volumes are prepared; null for pixels alone.
        preprocess: How volumes are prepared; null for that of the checkpoint, else the defaults.
        cache_dir: Where prepared volumes are kept; null for ~/.cache/vae3d (or $VAE3D_CACHE).
        grid: Voxels per axis on which intensities are compared; null for those of the first real
            volume, 64 at most.
        neighbors: Neighbors that make a neighborhood, for precision, recall, density and coverage.
        seed: Seed of the draws behind floors and intervals.
        device: auto | cpu | cuda | mps.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
    """
    from loaders import VolumeStore
    from vae3d.inference.reconstruct import Coding, coding_of, of_training
    from vae3d.training.checkpoint import load_checkpoint, vae_of
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import telling_of_device

    check_ranges("compare", {"neighbors": neighbors, "grid": grid, "seed": seed})
    vae, coding = None, Coding("full")
    if checkpoint is not None:
        state = load_checkpoint(checkpoint)
        vae = vae_of(state, checkpoint, trust=trust)
        preprocess = Preprocess.of_checkpoint(state["preprocess"], preprocess)
        coding, _ = coding_of(of_training(state["config"]), "full")
    seen_by = made("--network", network)
    places = {"samples": samples, "real": real} | ({"heldout": heldout} if heldout else {})
    stores = {
        name: VolumeStore.build(
            place,
            cache_dir,
            preprocess,
            in_channels=vae.in_channels if vae else None,
            num_slices=coding.slices_of(vae) if vae else 1,
        )
        for name, place in places.items()
    }
    check_sides(stores, places)
    shape = stores["real"].shape(0)[1:]
    grid = grid or tuple(min(n, SIDE) for n in shape)
    if len(grid) != len(shape):
        raise ValueError(f"--grid {list(grid)}: give {len(shape)} numbers of voxels")
    if any(m > n for m, n in zip(grid, shape, strict=True)):
        raise ValueError(f"--grid {list(grid)} is larger than the first real volume, {list(shape)}")
    with open_world(device) as world, telling_of_device("a smaller --grid", "--device cpu"):
        if not world.is_main:  # minutes of work that need no second process
            return
        seen_by = seen_by.eval().to(world.device)
        if vae is not None:
            vae = vae.eval().to(world.device)
        encode = None if vae is None else partial(encoded, vae, coding, shape)
        sides = {name: side_of(store, seen_by, encode, grid) for name, store in stores.items()}
    found = judged(sides, neighbors, seed)
    found["settings"] = {"network": type(seen_by).__name__, "grid": list(grid), "seed": seed}
    found["settings"] |= {**places, "checkpoint": checkpoint, "neighbors": neighbors}
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.json", json.dumps(found, indent=1) + "\n")
    draw_closest(sides, found["memorization"], out / "closest.png")
    write_page(found, out)
    print("\n".join(lines_of(found)))
    print(f"report: {out / 'report.html'}")


def check_sides(stores: dict[str, VolumeStore], places: dict[str, str]) -> None:
    """Refuse what cannot be compared, before any network runs."""
    for name, least in (("samples", 2), ("real", 4), ("heldout", 5)):
        if name in stores and len(stores[name]) < least:
            raise ValueError(
                f"{places[name]}: {len(stores[name])} volumes; {name} must be {least} or more"
            )
    first = stores["real"].shape(0)
    for name, store in stores.items():
        for index, case in enumerate(store.ids):
            shape = store.shape(index)
            if (shape[0], len(shape)) != (first[0], len(first)):
                raise ValueError(
                    f"{places[name]}: {case} has shape {list(shape)}, the first real volume "
                    f"{list(first)}; channels and axes must agree"
                )
    keys = {stores["real"].meta(i)["key"] for i in range(len(stores["real"]))}
    if (unseen := stores.get("heldout")) is not None:
        for index, case in enumerate(unseen.ids):
            if unseen.meta(index)["key"] in keys:
                raise ValueError(f"{places['heldout']}: {case} is among the real volumes, too")


def side_of(
    store: VolumeStore,
    network: FeatureNetwork,
    encode: Callable[[torch.Tensor, str], np.ndarray] | None,
    grid: Sequence[int],
) -> Side:
    """Rows of every volume of a store.

    Args:
        store: The volumes.
        network: Whose features are compared.
        encode: Makes a row of a latent of a volume and its name; None for no latents.
        grid: Voxels per axis on which intensities are compared.
    """
    import numpy as np
    import torch

    from vae3d.spectrum import resized

    features, volumes, latents = [], [], []
    for index, case in enumerate(store.ids):
        x = torch.from_numpy(store.read(index))
        parts = in_parts(x, store.channel_ranges)
        features.append(features_of(network, parts))
        volumes.append(resized(parts[None], grid)[0].numpy())
        if encode is not None:
            latents.append(encode(x, case))
    rows = np.stack(latents) if latents else None
    return Side(store, np.stack(features), np.stack(volumes), rows)


def encoded(
    vae: CustomVAE, coding: Coding, shape: Sequence[int], x: torch.Tensor, case: str
) -> np.ndarray:
    """The latent of a volume as a row, on the grid of latents of a volume of `shape`."""
    from vae3d.spectrum import resized

    factor = coding.factor(vae, len(shape))
    z, _ = coding.encode(vae, x, case)
    grid = [-(-n // f) for n, f in zip(shape, factor, strict=True)]
    return resized(z[None], grid).flatten().double().numpy()


def in_parts(x: torch.Tensor, ranges: Sequence[tuple[float, float]]) -> torch.Tensor:
    """A volume in parts of each channel's range."""
    import torch

    low, high = torch.tensor(ranges, dtype=x.dtype).T.reshape(2, -1, *[1] * (x.ndim - 1))
    return (x - low) / (high - low)


def features_of(network: FeatureNetwork, x: torch.Tensor) -> np.ndarray:
    """Means of a network's feature maps: a row for a volume `(C, *spatial)` in [0, 1].

    A 2D network sees evenly spaced slices of every plane.
    """
    import torch

    home = next((p.device for p in network.parameters()), x.device)
    if x.ndim - 1 == network.spatial_dims:
        batches = [x[:, None]]
    elif network.spatial_dims == 2:
        batches = [
            x.index_select(axis, slices_of(x.shape[axis])).movedim(axis, 1).flatten(0, 1)[:, None]
            for axis in (1, 2, 3)
        ]
    else:
        raise ValueError(
            f"--network {type(network).__name__} is of volumes, these are pictures; take VGG16"
        )
    with torch.no_grad():
        maps = [[f.flatten(2).mean(2) for f in network(batch.to(home))] for batch in batches]
    # Channels of a volume stay apart, its slices do not.
    rows = [[m.float().unflatten(0, (len(x), -1)).mean(1).flatten() for m in of] for of in maps]
    return torch.stack([torch.cat(row) for row in rows]).mean(0).double().cpu().numpy()


def slices_of(n: int) -> torch.Tensor:
    """Indices of evenly spaced slices, none at the ends."""
    import torch

    return ((torch.arange(min(SLICES, n)) + 0.5) * n / min(SLICES, n)).long()


def judged(sides: dict[str, Side], neighbors: int, seed: int) -> dict:
    """All numbers, and what is to be said of them.

    Args:
        sides: samples, real and perhaps heldout.
        neighbors: As in `compare`.
        seed: As in `compare`.
    """
    from vae3d.stage2 import judge

    drawn, real = sides["samples"], sides["real"]

    def of_features(one: np.ndarray, other: np.ndarray) -> judge.Measured:
        k = min(neighbors, len(one) - 1)
        apart = {"kernel": judge.kernel_distance(one, other), "frechet": judge.frechet(one, other)}
        return apart | judge.neighborhoods(one, other, k)

    numbers: dict[str, dict] = judge.floored(of_features, drawn.features, real.features, seed)
    pair = drawn.features, real.features
    low, high = judge.kernel_interval(*pair, seed)
    numbers["kernel"] |= {"value": judge.kernel_distance(*pair), "interval": [low, high]}
    (of_drawn, of_real), width = judge.histograms(drawn.voxels, real.voxels)
    numbers |= judge.floored(
        lambda a, b: {"histogram": judge.histogram_distance(a, b, width)},
        of_drawn,
        of_real,
        seed,
        again=True,
    )
    (pairs, of_pairs), (_, floor) = (likenesses(side, seed) for side in (drawn, real))
    spread = judge.pairs_interval(pairs, of_pairs, seed)
    numbers["ms_ssim"] = {"value": float(of_pairs.mean()), "interval": list(spread)}
    numbers["ms_ssim"]["floor"] = float(floor.mean())
    for name, number in numbers.items():
        number["says"] = SAYS[name]
    if min(len(drawn.features), len(real.features) // 2) < MEANINGFUL:
        numbers["frechet"]["meaningful"] = False
    found = {"volumes": {name: len(side.features) for name, side in sides.items()}}
    return found | {"numbers": numbers, "memorization": memorized(sides)}


def likenesses(side: Side, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs `(P, 2)` of volumes, and the MS-SSIM of each on the common grid."""
    import numpy as np
    import torch

    from vae3d.inference.metrics import ms_ssim

    pairs = np.array(list(itertools.combinations(range(len(side.volumes)), 2)))
    pairs = np.random.default_rng(seed).permutation(pairs)[:PAIRS]
    volumes = torch.from_numpy(side.volumes)
    values = [ms_ssim(volumes[i], volumes[j], 1.0) for i, j in pairs.tolist()]
    return pairs, np.array(values)


def memorized(sides: Mapping[str, Side]) -> dict[str, dict]:
    """By space: each sample's nearest real volume, and whether unseen volumes are as near to some.

    Args:
        sides: samples, real and perhaps heldout.
    """
    from vae3d.stage2 import judge

    found: dict[str, dict] = {}
    drawn, real = sides["samples"], sides["real"]
    for space in ("voxels", "latents"):
        if getattr(real, space) is None:
            continue
        which, apart = judge.nearest(getattr(drawn, space), getattr(real, space))
        pairs = [
            {
                "sample": drawn.store.ids[i],
                "real": real.store.ids[j],
                "correlation": float(1 - apart[i]),
            }
            for i, j in sorted(enumerate(which), key=lambda pair: apart[pair[0]])
        ]
        found[space] = {
            "pairs": pairs,
            "median_correlation": float(1 - sorted(apart)[len(apart) // 2]),
        }
        if (unseen := sides.get("heldout")) is not None:
            _, of_unseen = judge.nearest(getattr(unseen, space), getattr(real, space))
            found[space] |= {
                "heldout_correlation": float(1 - sorted(of_unseen)[len(of_unseen) // 2]),
                "closer_than_any_heldout": int((apart < of_unseen.min()).sum()),
                "p": judge.closer(apart, of_unseen),
            }
    return found


def lines_of(found: dict) -> list[str]:
    """The result as a user reads it: a table, then what it says of copies and of few volumes."""
    counts = found["volumes"]
    lines = [", ".join(f"{n} {name}" for name, n in counts.items())]
    lines.append(
        f"{'':<12}{'samples':>10}   {'95 % interval':<24}{'floor':>10}   floor of 95 % of draws"
    )
    for name, number in found["numbers"].items():
        floors = between(number["low"], number["high"]) if "low" in number else ""
        floors += "   not meaningful" * (number.get("meaningful") is False)
        own = between(*number["interval"]) if "interval" in number else ""
        lines.append(
            f"{name:<12}{number['value']:>10.4g}   {own:<24}{number['floor']:>10.4g}   {floors}"
        )
    return [*lines, *(text for _, text in verdicts(found))]


def between(low: float, high: float) -> str:
    """An interval in words."""
    return f"{low:.4g} to {high:.4g}"


def verdicts(found: dict) -> list[tuple[str, str]]:
    """What is to be said of the numbers: level (bad | warn | good) and text."""
    said = []
    for space, of in found["memorization"].items():
        if "p" not in of:
            continue
        place = {"voxels": "pixels", "latents": "latents"}[space]
        text = (
            f"memorization in {place}: a sample correlates with its nearest training volume by "
            f"{of['median_correlation']:.3f}, an unseen volume by {of['heldout_correlation']:.3f} "
            f"(medians), p {of['p']:.2g}; {of['closer_than_any_heldout']} samples are closer than "
            "any unseen volume"
        )
        copied = of["p"] < COPIED
        said.append(("bad" if copied else "good", text + (": copies" if copied else "")))
    if found["memorization"] and "heldout" not in found["volumes"]:
        said.append(
            ("warn", "no p-value of memorization: give --heldout, 5 unseen volumes or more")
        )
    if found["numbers"]["frechet"].get("meaningful") is False:
        said.append(
            ("warn", f"frechet: not meaningful below {MEANINGFUL} volumes a side (real ones are "
             "halved for the floor)")
        )  # fmt: skip
    least = min(found["volumes"]["samples"], found["volumes"]["real"] // 2)
    if least < WIDE:
        said.append(("warn", f"{least} volumes a side: few, so intervals are wide"))
    return said


def draw_closest(sides: Mapping[str, Side], memorization: Mapping[str, dict], path: Path) -> None:
    """Draw the samples that are closest to a real volume beside it, closest first."""
    import torch

    from vae3d.stage2.sheet import contact_sheet, three_slices
    from vae3d.tracking.media import write_png

    space = "latents" if "latents" in memorization else "voxels"
    rows = {}
    for pair in memorization[space]["pairs"][:SHOWN]:
        pictures = []
        for name, case in (("samples", pair["sample"]), ("real", pair["real"])):
            store = sides[name].store
            index = store.ids.index(case)
            x = in_parts(torch.from_numpy(store.read(index)), store.channel_ranges).numpy()
            spacing, layout = store.spacing_mm(index), store.layout(index)
            pictures.append(three_slices(x, spacing, layout=layout))
        rows[f"{pair['sample']} | {pair['real']}  {pair['correlation']:.3f}"] = pictures
    write_png(path, contact_sheet(rows))


def write_page(found: dict, out: Path) -> None:
    """Write report.html: what to look at first, the table, the closest pairs."""
    from vae3d.reports import page

    rows = [
        {
            "number": name,
            "samples": number["value"],
            "95 % interval": between(*number["interval"]) if "interval" in number else "",
            "floor (real against real)": number["floor"],
            "floor of 95 % of draws": between(number["low"], number["high"])
            if "low" in number else "",
            "what it says": number["says"],
        }
        for name, number in found["numbers"].items()
    ]  # fmt: skip
    note = (
        "Intervals are by bootstrap over volumes; frechet has none, since a side with volumes "
        "drawn twice is narrower. The kernel distance and ms_ssim are of all volumes, the others "
        f"of {found['numbers']['frechet']['volumes']} a side, as their floors."
    )
    findings = [(level, page.escape(text)) for level, text in verdicts(found)]
    sections = [
        page.section("Look at first", page.findings(findings)),
        page.section("Numbers", page.table(rows, first="number"), note=note),
        page.section(
            "Closest pairs",
            page.image(out / "closest.png", "samples beside the real volumes next to them"),
            note="Left a sample, right the real volume that it correlates with most.",
        ),
        page.section(
            "How it was measured", f'<div class="card">{page.facts(found["settings"])}</div>'
        ),
    ]
    counts = ", ".join(f"{n} {name}" for name, n in found["volumes"].items())
    write_text(out / "report.html", page.page("Samples judged", page.escape(counts), sections))
