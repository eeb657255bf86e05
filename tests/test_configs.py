"""Every recipe in configs/ is one that the command line takes, with a word on each of its keys."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_perceptual import vgg_state

from loaders.readers import Volume, write_volume
from vae3d import config
from vae3d.commands.train import check_sizes, train_3d
from vae3d.losses import features
from vae3d.tracking.tracker import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "train").glob("*.yaml"))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg_state(), path)
    return path


@pytest.fixture(autouse=True)
def random_vgg(vgg_file, monkeypatch):
    """Random weights in place of those in a package that tests do without."""
    monkeypatch.setattr(features, "_in_package", lambda package, inside: vgg_file)


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_a_training_recipe_parses_builds_and_saves_equal(path, tmp_path):
    argv = ["--config", str(path), "--data.root", "DIR", "--out_dir", str(tmp_path)]
    kwargs = config.parse(train_3d, argv)
    vae = kwargs["model"]()
    check_sizes(vae, kwargs["patch_size"])
    kwargs["loss"]()
    config.save_config(tmp_path / "config.yaml", train_3d, kwargs)
    again = config.parse(train_3d, ["--config", str(tmp_path / "config.yaml")])
    assert config.config_dict(train_3d, again) == config.config_dict(train_3d, kwargs)
    assert kwargs["amp"] is None  # the device's matter


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_each_key_of_a_training_recipe_is_explained(path):
    lines = path.read_text().splitlines()
    for key in yaml.safe_load(path.read_text()):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("# "), f"{path.name}: no comment above {key}"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_behind_figures_keep_the_percentiles_that_these_were_measured_with(path):
    kwargs = config.parse(train_3d, ["--config", str(path), "--data.root", "D", "--out_dir", "o"])
    preprocess = kwargs["data"].preprocess
    assert preprocess.window_hu or preprocess.percentiles_of == "all"


def test_a_saved_configuration_of_old_means_the_rules_of_its_time(tmp_path):
    argv = ["--data.root", "DIR", "--out_dir", "out"]
    config.save_config(tmp_path / "config.yaml", train_3d, config.parse(train_3d, argv))
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    kept = saved["data"]["preprocess"]
    assert (kept["percentiles_of"], kept["rules"]) == ("auto", 2)
    for name in ("percentiles_of", "rules", "channels"):
        del kept[name]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(saved))
    old = ["--config", str(tmp_path / "old.yaml")]
    preprocess = config.parse(train_3d, old)["data"].preprocess
    assert (preprocess.percentiles_of, preprocess.rules) == ("all", 1)
    argv = [*old, "--data.preprocess.percentiles_of", "auto", "--data.preprocess.rules", "2"]
    assert config.parse(train_3d, argv)["data"].preprocess.percentiles_of == "auto"
    by_hand = {"data": {"preprocess": {"window_hu": [0, 80]}}}
    (tmp_path / "hand.yaml").write_text(yaml.safe_dump(by_hand))
    argv = ["--config", str(tmp_path / "hand.yaml"), "--data.root", "D", "--out_dir", "o"]
    assert config.parse(train_3d, argv)["data"].preprocess.percentiles_of == "auto"


def test_settings_of_channels_are_given_on_the_command_line_and_in_yaml(tmp_path):
    argv = ["--data.root", "DIR", "--out_dir", "out", "--data.preprocess.channels", "[ct, pet]"]
    argv += ["--data.preprocess.window_hu", "{ct: [-1000, 400], 1: [0, 20]}"]
    argv += ["--data.preprocess.intensity", "{pet: symmetric}"]
    kwargs = config.parse(train_3d, argv)
    preprocess = kwargs["data"].preprocess
    assert preprocess.channel(0).window_hu == (-1000, 400)
    assert preprocess.channel(1).window_hu == (0, 20)
    assert [preprocess.channel(c).intensity for c in (0, 1)] == ["unit", "symmetric"]
    config.save_config(tmp_path / "config.yaml", train_3d, kwargs)
    again = config.parse(train_3d, ["--config", str(tmp_path / "config.yaml")])
    assert again["data"].preprocess == preprocess
    with pytest.raises(ValueError, match="window_hu is set for 'mr'"):
        config.parse(train_3d, [*argv, "--data.preprocess.window_hu", "{mr: [0, 1]}"])


def volume(seed, shape=(20, 18, 16), low=0.0, high=100.0):
    """A smooth volume with a little noise, float32."""
    generator = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(0, 3 + seed, n) for n in shape], indexing="ij")
    wave = sum(map(np.sin, grid)) + 0.1 * generator.standard_normal(shape)
    return (low + (high - low) * (wave - wave.min()) / np.ptp(wave)).astype(np.float32)


def one_channel(folder, name, seed):
    write_volume(folder / f"{name}.nii.gz", Volume(volume(seed)[None]))


def hounsfield(folder, name, seed):
    data = volume(seed, low=-1000, high=800).astype(np.int16)[None]
    write_volume(folder / f"{name}.nii.gz", Volume(data, np.diag([1.0, 1.0, 3.0, 1.0])))


def fluorescence(folder, name, seed):
    import tifffile

    stack = (volume(seed).transpose(2, 1, 0) ** 2).astype(np.uint16)
    sizes = {"PhysicalSizeX": 0.26, "PhysicalSizeY": 0.26, "PhysicalSizeZ": 0.29}
    tifffile.imwrite(folder / f"{name}.ome.tif", stack, metadata={"axes": "ZYX", **sizes})


def picture(folder, name, seed):
    Image.fromarray(volume(seed, (24, 40), high=255).astype(np.uint8)).save(folder / f"{name}.png")


def contrasts(folder, name, seed):
    names = [f"{name}_{contrast}.nii.gz" for contrast in ("t1", "t1c", "t2", "flair")]
    for i, file in enumerate(names):
        write_volume(folder / file, Volume(volume(seed + i, (40, 36, 32))[None]))
    with open(folder / "manifest.csv", "a") as file:
        file.write(("" if seed else "id,path\n") + f"{name},{';'.join(names)}\n")


KINDS = {
    "demo": one_channel, "ixi_t1": one_channel, "ct": hounsfield, "microscopy": fluorescence,
    "pictures": picture, "multimodal": contrasts,
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_recipe_trains_on_volumes_of_its_kind(recipe, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, name in enumerate(("a", "b", "c")):
        KINDS[recipe](data, name, i)
    manifest = data / "manifest.csv"
    patch = [16, 16] if recipe == "pictures" else [16, 16, 8]
    argv = [
        "--config", recipe, "--data.root", str(manifest if manifest.exists() else data),
        "--data.cache_dir", str(tmp_path / "cache"), "--out_dir", str(tmp_path / "run"),
        "--patch_size", str(patch), "--max_steps", "2", "--log_every", "1", "--val_every", "2",
        "--media_every", "0", "--patches_per_volume", "2", "--wandb", "disabled", "--device", "cpu",
    ]  # fmt: skip
    assert not train_3d(**config.parse(train_3d, argv))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert any(math.isfinite(row.get("val/psnr", math.nan)) for row in rows)
