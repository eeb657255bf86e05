"""Anomaly maps: calibrated on healthy volumes, on the grid of the files; they find lesions."""

import csv
import json
from functools import partial

import nibabel
import numpy as np
import pytest
import torch

from loaders import DataConfig, VolumeStore
from train_3d import train_3d
from vae3d.commands.anomaly import AnomalyData, anomaly
from vae3d.inference.evaluation import foreground_of
from vae3d.inference.healthy import PRIOR, Healthy, magnitude
from vae3d.inference.metrics import auroc, average_precision
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm

SHAPE = (20, 14, 12)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])  # left to right
LESION = (slice(8, 12), slice(5, 9), slice(4, 8))
PATTERN = np.indices((4, 4, 4)).sum(0) % 2


def slow_auroc(score, lesion):
    """Over all pairs of a lesion's voxel and another."""
    gaps = score[lesion][:, None] - score[~lesion][None]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def slow_average_precision(score, lesion):
    """By one threshold after the other."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        taken = score >= threshold
        recall, precision = lesion[taken].sum() / lesion.sum(), lesion[taken].mean()
        area, before = area + precision * (recall - before), recall
    return float(area)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_average_precision_are_those_of_their_definitions(ties):
    rng = np.random.default_rng(0)
    lesion = rng.random(400) < 0.2
    score = rng.normal(size=400) + lesion
    score = score.round() if ties else score
    assert auroc(score, lesion) == pytest.approx(slow_auroc(score, lesion), abs=1e-12)
    assert average_precision(score, lesion) == pytest.approx(
        slow_average_precision(score, lesion), abs=1e-12
    )
    metrics = pytest.importorskip("sklearn.metrics")
    assert auroc(score, lesion) == pytest.approx(metrics.roc_auc_score(lesion, score))
    theirs = metrics.average_precision_score(lesion, score)
    assert average_precision(score, lesion) == pytest.approx(theirs)


def test_where_there_is_no_lesion_there_is_no_area():
    score, none = np.arange(4.0), np.zeros(4, bool)
    assert np.isnan(auroc(score, none)) and np.isnan(average_precision(score, none))
    assert np.isnan(auroc(score, ~none)) and average_precision(score, ~none) == 1


def test_a_voxels_mean_and_spread_are_those_of_the_healthy_drawn_to_the_foregrounds():
    errors = torch.randn(12, 1, 6, 5, 4) * torch.linspace(0.5, 2, 6)[:, None, None] + 0.3
    foreground = torch.zeros(6, 5, 4, dtype=torch.bool)
    foreground[1:5] = True
    healthy, pooled = Healthy(1, (6, 5, 4)), Healthy(1)
    for error in errors:
        healthy.add(error, foreground)
        pooled.add(error, foreground)
    new, inside = torch.randn(1, 6, 5, 4), errors[:, :, foreground].double()
    sd = inside.std(correction=0)
    expected = (new - inside.mean()) / sd
    torch.testing.assert_close(pooled.z(new), expected.float(), rtol=1e-4, atol=1e-5)
    variance = (11 * errors.var(0) + PRIOR * sd**2) / (11 + PRIOR) * (1 + 1 / 12)
    expected = (new - errors.mean(0)) / variance.sqrt()
    torch.testing.assert_close(healthy.z(new), expected.float(), rtol=1e-4, atol=1e-5)


def test_z_is_of_healthy_spread_one_and_finite_where_the_healthy_agree():
    torch.manual_seed(0)
    foreground = torch.ones(8, 8, 8, dtype=torch.bool)
    foreground[:2] = False
    spread = torch.linspace(0.5, 2, 8) * (torch.arange(8) >= 2)  # air: no error at all
    healthy = Healthy(1, (8, 8, 8))
    for _ in range(60):
        healthy.add(torch.randn(1, 8, 8, 8) * spread[:, None, None], foreground)
    z = healthy.z(torch.randn(1, 8, 8, 8) * spread[:, None, None])
    assert z.isfinite().all() and not z[0, :2].any()
    assert float(z[0, 2:].std()) == pytest.approx(1, abs=0.15)
    assert float(magnitude(torch.full((4, 2, 2, 2), -3.0)).max()) == pytest.approx(3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network of healthy volumes; controls it has not seen, and patients with a lesion."""
    root = tmp_path_factory.mktemp("anomaly")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 5, n) for n in SHAPE], indexing="ij"))
    for folder, count in (("healthy", 6), ("controls", 3), ("patients", 2)):
        (root / folder).mkdir()
        for i in range(count):
            data = 500 + 300 * np.sin(grid + 0.1 * i).prod(0) + 10 * rng.standard_normal(SHAPE)
            name = root / folder / f"{folder[0]}{i}"
            if folder == "patients":
                data[LESION] += 600 * PATTERN  # no latent of so few numbers keeps it
                lesion = np.zeros(SHAPE, np.uint8)
                lesion[LESION] = 2
                nibabel.save(nibabel.Nifti1Image(lesion, AFFINE), f"{name}_seg.nii.gz")
            image = nibabel.Nifti1Image(data.astype(np.int16), AFFINE)
            nibabel.save(image, f"{name}.nii.gz")
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, latent_channels=2)
    data = DataConfig(str(root / "healthy"), cache_dir=str(root / "cache"))
    train_3d(data, str(root / "run"), model, patch_size=(8, 8, 8), batch_size=1, max_steps=2,
             threads=0, val_every=0, media_every=0, wandb="disabled", device="cpu")  # fmt: skip
    return root


def look(place, out, **options):
    controls = options.pop("healthy", str(place / "controls"))
    patients = AnomalyData(str(place / "patients"), controls, str(place / "cache"))
    anomaly(str(place / "run"), patients, str(out), device="cpu", **options)
    with open(out / "anomaly.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_maps_lie_on_the_grid_of_the_files_and_find_the_lesions(place, tmp_path, capsys):
    found = look(place, tmp_path, labels="{name}_seg.nii.gz")
    said = capsys.readouterr().out
    assert "calibrated on 3 healthy volumes: mean and spread of the foreground" in said
    assert "over 2 volumes with lesions AUROC 0.9" in said and "mode full for 5 volumes" in said
    assert [row["case"] for row in found] == ["p0", "p1"]
    for row in found:
        map = nibabel.load(tmp_path / "maps" / f"{row['case']}.nii.gz")
        source = nibabel.load(place / "patients" / f"{row['case']}.nii.gz")
        np.testing.assert_allclose(map.affine, source.affine, atol=1e-5)
        z = map.get_fdata()
        assert z.shape == SHAPE and abs(np.median(z)) < 1
        bright, dark = z[LESION][PATTERN == 1], z[LESION][PATTERN == 0]
        assert bright.mean() > 2 and dark.mean() < -1  # brighter than expected is positive
        store = VolumeStore.build([place / "patients" / f"{row['case']}.nii.gz"], place / "cache")
        counts = foreground_of(store, 0, torch.from_numpy(store.read_unclipped(0))).whole()
        where, truth = counts.numpy()[::-1], np.zeros(SHAPE, bool)  # stored from right to left
        truth[LESION] = True
        where = where | truth
        expected = auroc(np.abs(z)[where].astype(np.float32), truth[where])
        assert float(row["auroc"]) == pytest.approx(expected, abs=1e-6) and expected > 0.9
        assert float(row["lesion_fraction"]) < float(row["average_precision"]) <= 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["mode"], summary["mode_asked"], found[0]["mode"]) == ("full", "auto", "full")
    assert summary["calibrated"] == "pooled" and summary["healthy"] == ["c0", "c1", "c2"]
    assert summary["metrics"]["auroc"]["n"] == 2


def test_the_same_command_again_makes_nothing_anew_and_other_lesions_are_measured_anew(
    place, tmp_path, capsys
):
    first = look(place, tmp_path, labels="{name}_seg.nii.gz")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("maps/*")}
    capsys.readouterr()
    assert look(place, tmp_path, labels="{name}_seg.nii.gz") == first
    assert "mode" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    other = look(place, tmp_path, labels="{name}_seg.nii.gz", lesions=(1,))
    assert not other[0]["auroc"] or other[0]["auroc"] == "nan"


def test_what_is_finished_counts_for_nothing_in_the_progress(place, tmp_path, monkeypatch):
    look(place, tmp_path)
    (tmp_path / "rows" / "p1.json").unlink()
    shares: list[float] = []
    monkeypatch.setattr("vae3d.tracking.console.Gauge.add", lambda self, part: shares.append(part))
    look(place, tmp_path)
    assert sum(shares) == pytest.approx(1)


def test_an_error_map_is_in_the_files_intensities_and_needs_no_healthy_volume(place, tmp_path):
    from loaders import Preprocess
    from vae3d.inference.reconstruct import reconstruct
    from vae3d.training.checkpoint import load_model

    look(place, tmp_path, kind="error", healthy=None, calibrate="auto")
    store = VolumeStore.build(
        [place / "patients" / "p0.nii.gz"], place / "cache", Preprocess(), progress=False
    )
    x = torch.from_numpy(store.read(0))
    recon = reconstruct(load_model(str(place / "run")), x, "full")
    expected = store.undo(0, x).data - store.undo(0, recon).data
    map = nibabel.load(tmp_path / "maps" / "p0.nii.gz").get_fdata()
    np.testing.assert_allclose(map, expected[0], atol=0.05)


def test_each_voxel_is_calibrated_where_asked_and_a_grid_is_shared(place, tmp_path, capsys):
    look(place, tmp_path / "a", calibrate="voxel", limit=1)
    assert "mean and spread of each voxel" in capsys.readouterr().out
    other = tmp_path / "controls"
    other.mkdir()
    for i in range(2):
        data = np.random.default_rng(i).random((16, 12, 12), np.float32)
        nibabel.save(nibabel.Nifti1Image(data, AFFINE), other / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="--calibrate voxel: volumes differ in size or place"):
        look(place, tmp_path / "b", calibrate="voxel", healthy=str(other))
    assert not (tmp_path / "b").exists()


def test_volumes_that_were_trained_on_or_are_looked_at_do_not_calibrate(place, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"data\.healthy .*no healthy volume that the network"):
        look(place, tmp_path, healthy=str(place / "patients"))
    look(place, tmp_path, healthy=str(place / "healthy"))
    assert "healthy volumes are left out: the network was trained" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--labels \{name\}_x\.nii: no volume in"):
        look(place, tmp_path, labels="{name}_x.nii")
