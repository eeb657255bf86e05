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
