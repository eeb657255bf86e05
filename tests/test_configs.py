"""Every recipe in configs/ is one that the command line takes, with a word on each of its keys."""

from pathlib import Path

import pytest
import yaml

from vae3d import config
from vae3d.commands.train import check_sizes, train_3d

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_a_training_recipe_parses_builds_and_saves_equal(path, tmp_path):
    argv = ["--config", str(path), "--data.root", "DIR", "--out_dir", str(tmp_path)]
    kwargs = config.parse(train_3d, argv)
    vae = kwargs["model"]()
    check_sizes(vae, kwargs["patching"], kwargs["patch_size"])
    kwargs["loss"]()
    config.save_config(tmp_path / "config.yaml", train_3d, kwargs)
    again = config.parse(train_3d, ["--config", str(tmp_path / "config.yaml")])
    assert config.config_dict(train_3d, again) == config.config_dict(train_3d, kwargs)


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_each_key_of_a_training_recipe_is_explained(path):
    lines = path.read_text().splitlines()
    for key in yaml.safe_load(path.read_text()):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("# "), f"{path.name}: no comment above {key}"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_behind_figures_keep_the_percentiles_that_these_were_measured_with(path):
    kwargs = config.parse(train_3d, ["--config", str(path), "--data.root", "D", "--out_dir", "o"])
    assert kwargs["data"].preprocess.percentiles_of == "all"


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
