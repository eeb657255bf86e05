import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.linalg import sqrtm
from scipy.stats import mannwhitneyu, wasserstein_distance
from torchmetrics.image.kid import poly_mmd

from loaders import write_volume
from loaders.readers import Volume
from vae3d.cli import main
from vae3d.commands.compare import compare, features_of
from vae3d.losses.features import MONAI_FILES, VGG16, FeatureNetwork, MonaiNetwork
from vae3d.stage2 import judge

SHAPE = (12, 10, 8)


class Coarse(FeatureNetwork):
    """Intensities on a coarse grid: a network that needs no weights."""

    spatial_dims = 3

    def forward(self, x):
        """Return each place of a 4 x 4 x 4 grid as a channel."""
        return [torch.nn.functional.adaptive_avg_pool3d(x, 4).reshape(len(x), -1, 1, 1, 1)]


class Flat(Coarse):
    """A network of slices."""

    spatial_dims = 2

    def forward(self, x):
        """Return each place of a 4 x 4 grid as a channel."""
        return [torch.nn.functional.adaptive_avg_pool2d(x, 4).reshape(len(x), -1, 1, 1)]


def blob(rng, noise=0.02):
    """A ball of random place and width, in [0, 1]."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    center = rng.uniform(-0.5, 0.5, (3, 1, 1, 1))
    x = np.exp(-((grid - center) ** 2).sum(0) / rng.uniform(0.2, 0.6))
    return x + noise * rng.normal(size=SHAPE)


def write(folder, volumes):
    folder.mkdir(parents=True)
    for n, x in enumerate(volumes):
        write_volume(folder / f"v{n:02d}.nii.gz", Volume(x[None].astype(np.float32), np.eye(4)))
    return str(folder)


@pytest.fixture
def sides(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    real = [blob(rng) for _ in range(24)]
    return tmp_path, rng, real, write(tmp_path / "real", real)


def compared(folder, samples, real, network=Coarse, **options):
    compare(samples, real, out_dir=str(folder / "out"), network=network, device="cpu", **options)
    return json.loads((folder / "out" / "compare.json").read_text())


# Numbers against references


def rows(n, d=6, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_kernel_distance_is_that_of_torchmetrics_kid():
    a, b = rows(12, seed=1), rows(9, shift=0.5, seed=2)
    with_same_n = poly_mmd(torch.from_numpy(a[:9]), torch.from_numpy(b)).item()
    assert judge.kernel_distance(a[:9], b) == pytest.approx(with_same_n)
    k = judge.kernel
    by_hand = sum(k(x, x)[~np.eye(len(x), dtype=bool)].mean() for x in (a, b)) - 2 * k(a, b).mean()
    assert judge.kernel_distance(a, b) == pytest.approx(by_hand)


def test_the_interval_of_two_halves_holds_zero_and_that_of_noise_does_not():
    held = 0
    for seed in range(20):
        x = rows(40, seed=seed)
        low, high = judge.kernel_interval(x[:20], x[20:], seed)
        held += low <= 0 <= high
    assert held >= 18
    low, _ = judge.kernel_interval(rows(20), rows(20, shift=2.0, seed=3))
    assert low > 0


def test_frechet_is_the_formula_of_heusel_also_with_fewer_volumes_than_features():
    for n in (30, 5):
        a, b = rows(n, seed=1), rows(n + 2, shift=0.3, seed=2)
        ca, cb = np.cov(a.T), np.cov(b.T)
        root = np.trace(np.real(sqrtm(ca @ cb)))
        gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
        wanted = gap + np.trace(ca) + np.trace(cb) - 2 * root
        assert judge.frechet(a, b) == pytest.approx(wanted, rel=1e-3)


def test_precision_recall_density_and_coverage_equal_their_definitions():
    real, drawn, k = rows(15, seed=1), rows(12, shift=0.4, seed=2), 3
    found = {name: parts.mean() for name, parts in judge.neighborhoods(real, drawn, k).items()}
    assert found == pytest.approx(compute_prdc(real, drawn, k))

    def reach(side, i):
        return sorted(math.dist(side[i], other) for other in side)[k]

    balls = [[math.dist(r, d) < reach(real, i) for d in drawn] for i, r in enumerate(real)]
    of_drawn = [[math.dist(r, d) < reach(drawn, j) for j, d in enumerate(drawn)] for r in real]
    assert found == pytest.approx(
        {
            "precision": np.mean([any(column) for column in zip(*balls, strict=True)]),
            "recall": np.mean([any(row) for row in of_drawn]),
            "density": np.mean([sum(column) for column in zip(*balls, strict=True)]) / k,
            "coverage": np.mean([any(row) for row in balls]),
        }
    )


def test_histogram_distance_is_the_wasserstein_distance_of_scipy():
    a, b = rows(4, 500, seed=1), rows(4, 500, shift=0.7, seed=2)
    wanted = wasserstein_distance(a.ravel(), b.ravel())
    counts, width = judge.histograms(a, b)
    assert judge.histogram_distance(*counts, width) == pytest.approx(wanted, rel=0.01)
    assert judge.histogram_distance(counts[0], counts[0], width) == 0


def test_the_p_value_is_that_of_the_exact_rank_sum_test():
    rng = np.random.default_rng(0)
    for n, m in ((5, 5), (8, 12), (30, 7)):
        a, b = rng.normal(-0.3, 1, n), rng.normal(0, 1, m)
        wanted = mannwhitneyu(a, b, alternative="less", method="exact").pvalue
        assert judge.closer(a, b) == pytest.approx(wanted)
    assert judge.closer(np.ones(4), np.ones(6)) == 1, "ties are no evidence"


def test_the_p_value_of_hundreds_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    for shift in (-0.2, 0.1):
        a, b = rng.normal(shift, 1, 150).round(1), rng.normal(0, 1, 80).round(1)  # with ties
        wanted = mannwhitneyu(a, b, alternative="less", method="asymptotic").pvalue
        assert judge.closer(a, b) == pytest.approx(wanted, rel=1e-6)


def test_the_nearest_is_by_correlation_whatever_the_scale():
    training = rows(5, 50)
    which, apart = judge.nearest(3 * training[[4, 1]] + 7, training)
    assert which.tolist() == [4, 1] and apart == pytest.approx([0, 0], abs=1e-12)


def test_intervals_hold_what_many_more_volumes_give():
    """Of 30 volumes a side, against the number of a thousand; of single numbers, of each volume."""

    def spread(of, other):
        return {"mean": other[:, 0], "gap": float(other[:, 1].mean() - of[:, 1].mean())}

    held = {"mean": 0, "gap": 0}
    for seed in range(40):
        drawn, real = rows(30, shift=0.5, seed=seed), rows(60, seed=seed + 100)
        found = judge.floored(spread, drawn, real, seed, again=True)
        for name in held:
            low, high = found[name]["interval"]
            held[name] += low <= 0.5 <= high
            assert low < found[name]["value"] < high
    assert min(held.values()) >= 34
    once = judge.floored(spread, rows(6), rows(12))
    assert "interval" not in once["gap"] and "interval" in once["mean"]


def test_the_interval_of_pairs_is_the_bootstrap_of_volumes():
    n = 12
    x = np.random.default_rng(0).normal(size=n)
    pairs = np.array([(i, j) for i in range(n) for j in range(i)])
    low, high = judge.pairs_interval(pairs, x[pairs].sum(1))
    width = 2 * 2 * 1.96 * x.std() / math.sqrt(n)  # a sum of two means that are one
    assert low < 2 * x.mean() < high and high - low == pytest.approx(width, rel=0.25)
    assert judge.pairs_interval(np.array([[0, 1]]), np.array([3.0])) == (3.0, 3.0)


# The command


def test_samples_of_one_kind_with_the_real_ones_are_within_the_interval_of_zero(sides, capsys):
    folder, rng, _, real = sides
    found = compared(folder, write(folder / "s", [blob(rng) for _ in range(20)]), real)
    low, high = found["numbers"]["kernel"]["interval"]
    assert low <= 0 <= high
    for name in ("precision", "recall", "density", "coverage", "histogram", "ms_ssim"):
        low, high = found["numbers"][name]["interval"]
        assert low <= found["numbers"][name]["value"] <= high, name
    assert low < high, "ms_ssim of pairs that differ"
    assert "interval" not in found["numbers"]["frechet"]
    frechet = found["numbers"]["frechet"]
    assert frechet["volumes"] == 12 and frechet["low"] < frechet["value"] < 1.5 * frechet["high"]
    printed = capsys.readouterr().out
    assert "give --heldout" in printed and "12 volumes a side: few" in printed
    assert "not meaningful" not in printed
    assert "base64" in (folder / "out" / "report.html").read_text()
    assert (folder / "out" / "closest.png").stat().st_size > 1000


def test_noise_is_far_away_and_a_frechet_distance_of_few_is_not_meaningful(sides, capsys):
    folder, rng, _, real = sides
    noise = [rng.uniform(0, 1, SHAPE) for _ in range(6)]
    found = compared(folder, write(folder / "s", noise), real)
    kernel = found["numbers"]["kernel"]
    assert kernel["interval"][0] > 0 and kernel["value"] > 10 * kernel["high"]
    assert found["numbers"]["precision"]["value"] == found["numbers"]["coverage"]["value"] == 0
    assert found["numbers"]["histogram"]["value"] > 3 * found["numbers"]["histogram"]["floor"]
    assert found["numbers"]["frechet"]["meaningful"] is False
    assert "frechet: not meaningful below 10" in capsys.readouterr().out


def test_copies_of_training_volumes_are_found_and_new_volumes_are_not(sides, capsys):
    folder, rng, training, real = sides
    unseen = write(folder / "unseen", [blob(rng) for _ in range(5)])
    copies = [x + 0.01 * rng.normal(size=SHAPE) for x in training[:6]]
    found = compared(folder, write(folder / "copies", copies), real, heldout=unseen)
    memorized = found["memorization"]["voxels"]
    assert memorized["p"] < 0.01 and memorized["closer_than_any_heldout"] == 6
    assert {(p["sample"], p["real"]) for p in memorized["pairs"]} == {
        (f"v{n:02d}", f"v{n:02d}") for n in range(6)
    }
    assert "any unseen volume: copies" in capsys.readouterr().out
    new = write(folder / "new", [blob(rng) for _ in range(6)])
    assert compared(folder, new, real, heldout=unseen)["memorization"]["voxels"]["p"] > 0.05


def test_a_network_of_slices_sees_all_planes_of_a_volume(sides):
    folder, rng, _, real = sides
    upright = [blob(rng) for _ in range(6)]
    found = compared(folder, write(folder / "s", upright), real, Flat)
    turned = [np.flip(x, 2) * 0.3 for x in upright]
    other = compared(folder, write(folder / "t", turned), real, Flat)
    assert found["settings"]["network"] == "Flat"
    assert other["numbers"]["kernel"]["value"] != found["numbers"]["kernel"]["value"]


def vgg16_file(folder):
    """Random weights of VGG16 in torchvision's layout."""
    state, number, before = {}, 0, 3
    for widths in VGG16.LEVELS:
        for width in widths:
            kernel = torch.randn(width, before, 3, 3) * math.sqrt(2 / (9 * before))
            state |= {f"features.{number}.weight": kernel}
            state |= {f"features.{number}.bias": torch.zeros(width)}
            before, number = width, number + 2
        number += 1
    torch.save(state, folder / "vgg16.pth")
    return str(folder / "vgg16.pth")


@pytest.mark.parametrize(
    "name", ["VGG16", "medicalnet_resnet10_23datasets", "radimagenet_resnet50"]
)
def test_the_networks_of_others_judge_too(sides, monkeypatch, name):
    """With random weights in the place of theirs, which say noise from blobs as well."""
    folder, rng, training, _ = sides
    torch.manual_seed(0)
    if name == "VGG16":
        network, features = partial(VGG16, vgg16_file(folder)), 64 + 128 + 256 + 512 + 512
    else:
        dims = 3 if name.startswith("medicalnet") else 2
        trunk = torch.nn.Conv3d(1, 6, 3) if dims == 3 else torch.nn.Conv2d(3, 6, 3)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
        monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: trunk)
        for place in MONAI_FILES[name]:
            path = folder / place.replace("*", "0")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        network, features = partial(MonaiNetwork, name), 6
    x = torch.from_numpy(training[0]).float()[None]
    assert features_of(network(), x).shape == (features,)
    real, noise = write(folder / "few", training[:6]), [rng.uniform(0, 1, SHAPE) for _ in range(3)]
    found = compared(folder, write(folder / "noise", noise), real, network)
    assert found["settings"]["network"] == network.func.__name__
    assert found["numbers"]["kernel"]["interval"][0] > 0


def test_memorization_is_looked_for_in_the_latents_of_a_vae_too(sides):
    from toys import tiny_vae

    from vae3d.commands.convert import write as write_vae

    folder, rng, training, real = sides
    vae = tiny_vae()
    vae.contract = {"preprocess": {}}
    write_vae(vae, folder / "vae.pt", "vae3d")
    copies = write(folder / "copies", training[:5])
    unseen = write(folder / "unseen", [blob(rng) for _ in range(5)])
    options = {"heldout": unseen, "checkpoint": str(folder / "vae.pt")}
    found = compared(folder, copies, real, **options)["memorization"]["latents"]
    assert found["p"] < 0.01 and found["pairs"][0]["correlation"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{few} {real}", "1 volumes; samples must be 2 or more"),
        ("{real} {few}", "1 volumes; real must be 4 or more"),
        ("{real} {real} --heldout {few}", "heldout must be 5 or more"),
        ("{real} {real} --heldout {real}", "v00 is among the real volumes, too"),
        ("{real} {real} --grid [4,4]", "give 3 numbers of voxels"),
        ("{real} {real} --grid [13,4,4]", "is larger than the first real volume, [12, 10, 8]"),
        ("{real} {real} --neighbors 0", "--neighbors is 0"),
        ("{real} {real} --network ScriptedNetwork --network.path no.pt --network.spatial_dims 3",
         "no weights at no.pt"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_and_leaves_no_folder(sides, line, said, capsys):
    folder, rng, _, real = sides
    few = write(folder / "few", [blob(rng)])
    out = folder / "out"
    with pytest.raises(SystemExit) as stop:
        main(["compare", *line.format(few=few, real=real).split(), "--out_dir", str(out)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and not out.exists()
    assert said in printed and printed.strip().count("\n") == 0, printed
