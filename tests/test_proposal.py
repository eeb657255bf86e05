"""A recipe for each kind of data, proposed from its files alone; each one trains."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loaders.fingerprint import ChannelFacts, Fingerprint
from loaders.readers import Volume, write_volume
from loaders.texts import load_yaml
from train_3d import train_3d
from vae3d.commands.plan import plan
from vae3d.commands.train import check_sizes
from vae3d.config import parse
from vae3d.proposal import level_factors, patch_sizes, propose, recipe_text
from vae3d.tracking.tracker import read_metrics

SUBJECTS = 4


def facts(lowest=0.0, highest=4000.0, foreground=0.3, whole_numbers=True, hounsfield=False):
    """A channel's facts, of an MR by default."""
    return ChannelFacts(
        lowest, highest, lowest, lowest, highest, foreground, whole_numbers, hounsfield
    )


MR = facts()
CT = facts(-1024, 3071, hounsfield=True)


def fingerprint(shape, spacing_mm, channels=(MR,), **others):
    """Facts of 100 volumes alike."""
    usual = Fingerprint(
        num_volumes=100,
        num_measured=32,
        broken=(),
        num_others=0,
        several_in_a_file=False,
        shape=shape,
        size_mm=tuple(n * edge for n, edge in zip(shape, spacing_mm, strict=True)),
        spacing_mm=spacing_mm,
        spread=(1.0, 1.0, 1.0),
        channels=channels,
        holes=False,
    )
    return replace(usual, **others)


DATA_SETS = {
    "heads": fingerprint((182, 218, 182), (1.0, 1.0, 1.0)),
    "CT of thick slices": fingerprint((512, 512, 20), (0.7, 0.7, 5.0), (CT,)),
    "MR of 4 channels": fingerprint((240, 240, 155), (1.0, 1.0, 1.0), (MR,) * 4),
    "microscopy": fingerprint(
        (1024, 1024, 60), (6.5e-5, 6.5e-5, 2e-4), (facts(90, 65535, foreground=0.01),)
    ),
    "pictures": fingerprint((1024, 1024, 1), (1.0, 1.0, 1.0), (facts(0, 255),)),
    "color pictures": fingerprint(
        (640, 480, 1), (1.0, 1.0, 1.0), (facts(0, 255),) * 3, several_in_a_file=True
    ),
    "cine": fingerprint((256, 200, 10), (1.4, 1.4, 8.0), (MR,) * 30, several_in_a_file=True),
    "unequal CT": fingerprint(
        (512, 512, 300), (0.8, 0.8, 1.0), (CT,), spread=(1.6, 1.6, 5.0), holes=True
    ),
}


def option(recipe, name):
    value, _ = recipe[name]
    return value


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("found", DATA_SETS.values(), ids=DATA_SETS)
def test_each_proposal_is_a_recipe_that_trains_as_it_stands(found, on_gpu, tmp_path):
    recipe = propose(found, "DIR", "runs/a", on_gpu)
    network = option(recipe, "model.init_args.factors")
    factor = [int(np.prod(axis)) for axis in zip(*network, strict=True)]
    shape = [found.shape[axis] for axis in found.kept_axes]
    patch = next(patch_sizes(shape, factor, on_gpu))
    recipe |= {"patch_size": (list(patch), "As large as fits."), "batch_size": (2, "Fits.")}
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(recipe, "One line.\n\nAnother."))
    options = parse(train_3d, ["--config", str(path)])
    vae = options["model"]()
    assert vae.factor == tuple(factor)
    check_sizes(vae, options["patch_size"])
    options["loss"]()
    assert 4 <= np.prod(factor) * vae.in_channels / vae.latent_channels <= 32


@pytest.mark.parametrize("found", DATA_SETS.values(), ids=DATA_SETS)
def test_each_key_has_its_reason_above_it(found):
    lines = recipe_text(propose(found, "DIR", "runs/a", False)).splitlines()
    structure = ("class_path", "init_args")
    for number, line in enumerate(lines):
        assert len(line) <= 100
        key = line.strip().split(":")[0]
        if not line.strip().startswith("#") and key not in structure:
            assert lines[number - 1].strip().startswith("# "), line


@pytest.mark.parametrize(
    "shape, spacing_mm, factors",
    [
        ((182, 218, 182), (1.0, 1.0, 1.0), [[2, 2, 2]] * 2),
        ((512, 512, 20), (0.7, 0.7, 5.0), [[2, 2, 1], [2, 2, 1], [2, 2, 2]]),
        ((512, 512, 80), (0.7, 0.7, 1.5), [[2, 2, 1], [2, 2, 2]]),
        ((512, 512, 80), (0.7, 0.7, 1.3), [[2, 2, 2]] * 2),
        ((1024, 1024, 60), (6.5e-5, 6.5e-5, 2e-4), [[2, 2, 1], [2, 2, 2]]),
        ((20, 512, 512), (5.0, 0.7, 0.7), [[1, 2, 2], [1, 2, 2], [2, 2, 2]]),
        ((256, 256, 6), (1.0, 1.0, 1.0), [[2, 2, 1]] * 3),  # three cells along z are too few
        ((1024, 1024), (1.0, 1.0), [[2, 2]] * 3),
    ],
)
def test_axes_of_thick_slices_and_of_few_voxels_shrink_later(shape, spacing_mm, factors):
    assert level_factors(shape, spacing_mm) == factors


def test_volumes_too_small_for_a_cell_are_refused():
    with pytest.raises(ValueError, match="6 x 6 x 6 voxels are too small"):
        level_factors((6, 6, 6), (1.0, 1.0, 1.0))


def test_patches_go_down_in_cells_and_stay_in_the_volume():
    patches = list(patch_sizes((512, 512, 20), (8, 8, 2), on_gpu=False))
    assert patches[0] == (72, 72, 18)
    assert patches[-1] == (8, 8, 2)
    assert all(a > b for a, b in pairwise(patches))
    assert next(patch_sizes((512, 512, 20), (8, 8, 2), on_gpu=True)) == (320, 320, 20)


def test_volumes_of_unequal_spacing_get_the_median_and_others_stay():
    unequal = propose(DATA_SETS["unequal CT"], "DIR", "runs/a", False)
    assert option(unequal, "data.preprocess.spacing_mm") == [0.8, 0.8, 1.0]
    assert "5-fold" in unequal["data.preprocess.spacing_mm"][1]
    equal = propose(DATA_SETS["heads"], "DIR", "runs/a", False)
    assert option(equal, "data.preprocess.spacing_mm") is None


def test_factors_are_those_of_the_grid_that_volumes_are_resampled_to():
    thick = replace(DATA_SETS["unequal CT"], shape=(512, 512, 60), spacing_mm=(0.8, 0.8, 5.0))
    recipe = propose(thick, "DIR", "runs/a", False)
    assert option(recipe, "model.init_args.factors")[0] == [2, 2, 1]


def test_files_of_several_volumes_become_channels_and_long_series_give_their_first():
    colors = propose(fingerprint((64, 64, 64), (1.0,) * 3, (MR,) * 4,
                                 several_in_a_file=True), "DIR", "runs/a", False)  # fmt: skip
    assert option(colors, "data.volumes_4d") == "channels"
    assert option(colors, "model.init_args.in_channels") == 4
    cine = propose(DATA_SETS["cine"], "DIR", "runs/a", False)
    assert option(cine, "data.volumes_4d") == "samples"
    assert option(cine, "model.init_args.in_channels") == 1


def test_what_is_not_finite_is_filled_and_sparse_foreground_sought():
    recipe = propose(DATA_SETS["unequal CT"], "DIR", "runs/a", False)
    assert option(recipe, "data.nan") == "fill"
    assert "data.sampler" not in recipe
    sparse = propose(DATA_SETS["microscopy"], "DIR", "runs/a", False)
    assert option(sparse, "data.sampler") == {"class_path": "ForegroundCorners"}


def test_a_ct_beside_another_modality_gets_no_window_in_hounsfield_units():
    recipe = propose(fingerprint((128, 128, 90), (2.0, 2.0, 3.0), (CT, MR)), "DIR", "runs/a", False)
    assert "data.preprocess.window_hu" not in recipe


def blob(shape, rng):
    """A smooth body of 1 in the middle with structure inside, and 0 outside of it."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    waves = np.sin(grid * rng.uniform(3, 6, (len(shape), *[1] * len(shape)))).mean(0)
    return ((grid**2).sum(0) < 0.6) * (1 + 0.3 * waves)


def write(path, data, spacing_mm):
    write_volume(path, Volume(data[None], np.diag([*spacing_mm, 1.0])))


def heads(folder, rng):
    for number in range(SUBJECTS):
        body = blob((20, 24, 16), rng)
        data = np.clip(400 * body + rng.normal(20, 5, body.shape), 0, None).astype(np.int16)
        write(folder / f"sub-{number}_T1w.nii.gz", data, (1, 1, 1))
    return folder


def thick_ct(folder, rng):
    """As 512 x 512 x 20 of 0.7 x 0.7 x 5 mm, with fewer pixels."""
    for number in range(SUBJECTS):
        body = blob((32, 32, 10), rng)
        hu = np.where(body > 0, 300 * body - 250, -1000) + rng.normal(0, 8, body.shape)
        hu[14:16, 14:16] = 900
        data = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
        write(folder / f"{number}.nii.gz", data, (0.7, 0.7, 5.0))
    return folder


def four_channels(folder, rng):
    lines = ["path"]
    for number in range(SUBJECTS):
        names = [f"{number}_{name}.nii.gz" for name in ("t1", "t1c", "t2", "flair")]
        body = blob((16, 20, 16), rng)
        for gain, name in zip((300, 900, 2000, 50), names, strict=True):
            write(folder / name, (gain * body).astype(np.float32), (1, 1, 1))
        lines.append(";".join(names))
    (folder / "all.csv").write_text("\n".join(lines))
    return folder / "all.csv"


def microscopy(folder, rng):
    """Voxels of 65 x 65 x 200 nm, thin bright fibers in the dark."""
    for number in range(SUBJECTS):
        data = rng.poisson(90, (32, 32, 12)).astype(np.uint16)
        for _ in range(6):
            x, z = rng.integers(2, 30), rng.integers(2, 10)
            data[x : x + 1, :, z : z + 1] += 3000
        write(folder / f"{number}.nii.gz", data, (6.5e-5, 6.5e-5, 2e-4))
    return folder


def pictures(folder, rng):
    from PIL import Image

    for number in range(SUBJECTS):
        data = np.clip(40 + 120 * blob((32, 40), rng), 0, 255).astype(np.uint8)
        Image.fromarray(data).save(folder / f"{number}.png")
    return folder


KINDS = {
    # files: what is proposed for them
    heads: dict(spatial_dims=3, in_channels=1, factors=[[2] * 3] * 2, latent_channels=4),
    thick_ct: dict(
        spatial_dims=3, in_channels=1, factors=[[2, 2, 1]] * 2 + [[2] * 3], latent_channels=8
    ),
    four_channels: dict(spatial_dims=3, in_channels=4, factors=[[2] * 3] * 2, latent_channels=8),
    microscopy: dict(
        spatial_dims=3, in_channels=1, factors=[[2, 2, 1], [2, 2, 2]], latent_channels=4
    ),
    pictures: dict(spatial_dims=2, in_channels=1, factors=[[2, 2]] * 3, latent_channels=4),
}
PREPARED = {
    heads: dict(percentiles=[0.0, 99.5]),
    thick_ct: dict(window_hu=[-1000, 1000]),
    four_channels: dict(percentiles=[0.0, 99.5]),
    microscopy: dict(percentiles=[0.0, 99.99]),
    pictures: dict(percentiles=[0.0, 100.0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_recipe_proposed_for_each_kind_of_data_trains(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    root = kind(tmp_path / "data", np.random.default_rng(0))
    plan(str(root), device="cpu", memory_gb=4.0, write="recipe.yaml")
    assert "python train_3d.py --config recipe.yaml" in capsys.readouterr().out
    recipe = load_yaml(Path("recipe.yaml").read_text())
    network = recipe["model"]["init_args"]
    assert {name: network[name] for name in KINDS[kind]} == KINDS[kind]
    assert network["linear_code"] is True
    common = dict(spacing_mm=None, intensity="unit")
    assert recipe["data"]["preprocess"] == common | PREPARED[kind]
    sparse = {"class_path": "ForegroundCorners"} if kind is microscopy else None
    assert recipe["data"].get("sampler") == sparse

    options = dict(max_steps=20, warmup_steps=5, log_every=1, val_every=0, media_every=0)
    quick = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    argv = ["--config", "recipe.yaml", "--data.cache_dir", "cache", "--wandb", "disabled", *quick]
    assert train_3d(**parse(train_3d, [*argv, "--device", "cpu"])) == 0
    rows = read_metrics("runs/recipe/metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 1.2 * np.mean(losses[:5])
