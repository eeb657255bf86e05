"""Runs with a mask, from files to figures: garbage under it changes nothing at all."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch

import vae3d
from loaders import DataConfig, Preprocess, SliceStore, VolumeStore, find_subjects
from loaders.readers import Reading, Volume, read_volume, write_volume
from train_3d import train_3d
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.inference.baselines import BlockPCA
from vae3d.losses.reconstruction import SSIM, GradientDifference
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.stage2.latents import read_latent
from vae3d.tracking.tracker import read_metrics
from vae3d.training.distributed import World
from vae3d.training.validate import Validation

SHAPE = (14, 16, 12)
QUIET = {"device": "cpu", "wandb": "disabled"}
PATTERN = "{name}_fov.nii.gz"
VAE = partial(
    CustomVAE,
    channels=(4, 8),
    num_res_blocks=1,
    latent_channels=2,
    norm=partial(GroupNorm, num_groups=4),
)


def make_volumes(folder, garbage, count=4):
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    for n in range(count):
        seen = np.square(grid).sum(0) < 0.8 + 0.1 * n
        data = 300 * np.cos(2 * grid + n).prod(0) + 20 * np.random.default_rng(n).random(SHAPE)
        data = np.where(seen, data, garbage + np.random.default_rng(9).normal(size=SHAPE))
        write_volume(folder / f"v{n}.nii.gz", Volume(data[None].astype(np.float32)))
        write_volume(folder / f"v{n}_fov.nii.gz", Volume(seen[None].astype(np.uint8)))


def train(folder, garbage, **options):
    make_volumes(folder / "data", garbage)
    data = DataConfig(
        str(folder / "data"), str(folder / "cache"), (0.5, 0.25, 0.25), mask=PATTERN,
        augment=options.pop("augment", None),
    )  # fmt: skip
    loss = partial(VAELoss, extra=[partial(SSIM, window=5), GradientDifference])
    defaults = dict(patch_size=(8, 8, 8), batch_size=2, grad_accum=2, max_steps=3, threads=0,
                    val_every=3, media_every=0, log_every=1, amp="off")  # fmt: skip
    call = dict(model=VAE, loss=loss) | defaults | options
    assert train_3d(data, str(folder / "run"), **call, **QUIET) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on volumes that differ under their masks alone."""
    root = tmp_path_factory.mktemp("masked")
    return [train(root / str(garbage), garbage) for garbage in (0, 5e4)]


@pytest.mark.slow
def test_garbage_under_a_mask_changes_no_weight_and_no_number_of_a_run(runs):
    clean, dirty = (vae3d.load_model(str(run)).state_dict() for run in runs)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    logs = [read_metrics(run / "metrics.jsonl") for run in runs]
    for name in ("train/loss", "train/ssim", "train/norm/generator", "val/mae", "val/psnr"):
        values = [[row[name] for row in log if name in row] for log in logs]
        assert values[0] == values[1] and len(values[0]) > 0


@pytest.mark.slow
def test_evaluation_measures_inside_the_mask(runs):
    rows = []
    for run in runs:
        data = EvaluationData(str(run.parent / "data"), str(run.parent / "cache"))
        evaluate(str(run), data, str(run.parent / "out"), split="all", media=False, **QUIET)
        text = (run.parent / "out" / "metrics.csv").read_text()
        rows.append(list(csv.DictReader(text.splitlines())))
    assert rows[0] == rows[1] and len(rows[0]) == 4  # masks are no volumes
    summary = json.loads((runs[1].parent / "out" / "summary.json").read_text())
    assert summary["mask"] == PATTERN
    row = rows[1][2]
    folder = runs[1].parent
    seen = read_volume(folder / "data" / f"{row['case']}_fov.nii.gz").data > 0
    pair = [
        read_volume(folder / place / f"{row['case']}.nii.gz").intensities()[seen]
        for place in ("data", "out/recon")
    ]
    low, high = np.percentile(pair[0], (0, 99.5))
    error = np.abs(pair[0].clip(low, high) - pair[1])
    assert float(row["mae_original"]) == pytest.approx(error.mean(), rel=1e-3)
    psnr = 10 * np.log10((high - low) ** 2 / np.square(error).mean())
    assert float(row["psnr"]) == pytest.approx(psnr, rel=1e-3)
    assert float(row["mask_fraction"]) == pytest.approx(seen.mean())
    assert "voxels that the <b>masks</b> count" in (folder / "out" / "report.html").read_text()


@pytest.mark.slow
def test_latents_of_a_run_with_masks_do_not_see_what_lies_under_them(runs, tmp_path):
    for name, run in zip("ab", runs, strict=True):
        encode(str(run), str(tmp_path / name), device="cpu")
    paths = [sorted((tmp_path / name).glob("*.safetensors")) for name in "ab"]
    for a, b in zip(*paths, strict=True):
        assert torch.equal(read_latent(a).mean, read_latent(b).mean)
    source = VolumeSource(str(runs[1].parent / "data"), str(tmp_path / "cache"), mask=None)
    encode(str(runs[1]), str(tmp_path / "all"), source, device="cpu")
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == 8  # all files, all voxels


@pytest.mark.slow
def test_a_two_dimensional_run_with_a_mask_and_augmentation_does_not_see_garbage(tmp_path):
    states = []
    for garbage in (0, 5e4):
        run = train(
            tmp_path / str(garbage),
            garbage,
            model=partial(VAE, spatial_dims=2),
            loss=VAELoss,
            patch_size=(8, 8),
            augment={"RandomFlip": {"axes": [0, 1]}},
            max_steps=2,
            val_every=2,
        )
        states.append(vae3d.load_model(str(run)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_slices_without_a_voxel_that_counts_have_no_score(tmp_path):
    make_volumes(tmp_path / "data", 0, count=1)
    reading = Reading(mask=PATTERN)
    store = VolumeStore.build(
        find_subjects(tmp_path / "data", reading), tmp_path / "c", Preprocess(), reading=reading
    )
    slices = SliceStore(store, 2)
    counting = [i for i in range(len(slices)) if slices.seen(i).any()]
    assert 0 < len(counting) < len(slices)
    validation = Validation(slices, World(), None)
    torch.manual_seed(0)
    numbers = validation(VAE(spatial_dims=2).eval(), 0)
    assert [row["case"] for row in validation.rows] == [slices.ids[i] for i in counting]
    assert np.isfinite(numbers["val/mae"])


def test_equivalent_components_are_counted_over_the_voxels_of_the_mask():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 8)
    pca = BlockPCA.fit([x], (2, 2, 2), 6)
    everywhere = torch.ones(8, 8, 8, dtype=torch.bool)
    recon = pca(x, 3) + 0.01 * torch.randn_like(x)
    assert pca.equivalent(x, recon, everywhere) == pytest.approx(pca.equivalent(x, recon))
    mask = torch.zeros_like(everywhere)
    mask[:4] = True
    spoiled = torch.where(mask, pca(x, 3), 100.0)
    assert pca.equivalent(x, spoiled, mask) == pytest.approx(3)
