"""Options of the loop: declared once, flat for every user of them, old spellings told."""

import copy
import inspect
import re
from dataclasses import fields

import docstring_parser
import pytest

from loaders import DataConfig
from vae3d import config, train_3d
from vae3d.commands.prepare import prepare
from vae3d.commands.train_ldm import LatentLoop, train_ldm
from vae3d.config import parse, up_to_date
from vae3d.training.options import Loop
from vae3d.training.run import differences, with_new_options

DATA = ["--data.root", "d", "--out_dir", "o"]


@pytest.mark.parametrize(("command", "loop"), [(train_3d, Loop), (train_ldm, LatentLoop)])
def test_every_option_of_the_loop_is_an_option_of_the_command_with_its_default(command, loop):
    parameters = inspect.signature(command).parameters
    documented = {p.arg_name: p.description for p in docstring_parser.parse(command.__doc__).params}
    for field in fields(loop):
        assert parameters[field.name].default == field.default
        assert documented[field.name]
    assert "loop" not in parameters and "loop" not in documented


def test_an_option_that_is_out_of_range_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--max_steps is 0; give 1 or more"):
        train_3d(str(tmp_path / "data"), str(tmp_path / "run"), max_steps=0)
    with pytest.raises(ValueError, match="--betas"):
        Loop(betas=(0.9, 1.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("lr", "high"), ("betas", 0.5), ("max_steps", 2.5)])
def test_an_option_of_another_type_is_refused_by_its_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        train_3d(str(tmp_path / "data"), str(tmp_path / "run"), **{name: value})


def test_a_name_that_is_no_option_is_refused(tmp_path):
    with pytest.raises(TypeError, match="max_step"):
        train_3d("data", str(tmp_path / "run"), max_step=3)


def test_an_option_of_old_loads_under_its_name_of_today_with_one_line(tmp_path, capsys):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("schedule: constant\nlr: 1e-3\n")
    assert parse(train_3d, ["--config", str(recipe), *DATA])["lr_schedule"] == "constant"
    assert capsys.readouterr().err == "option schedule: is called lr_schedule today\n"
    options = parse(train_3d, [*DATA, "--schedule", "linear"])
    assert options["lr_schedule"] == "linear" and "schedule" not in options
    with pytest.raises(ValueError, match="schedule"):
        parse(train_3d, [*DATA, "--schedule", "steep"])
    options = parse(train_ldm, ["latents", "--out_dir", "o", "--schedule", "cosine"])
    assert options["noise_schedule"] == "cosine" and options["lr_schedule"] == "cosine"


def test_the_name_of_today_wins_over_that_of_old(tmp_path, capsys):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("schedule: constant\n")
    argv = ["--config", str(recipe), *DATA, "--lr_schedule", "cosine"]
    assert parse(train_3d, argv)["lr_schedule"] == "cosine"


def test_an_option_that_is_gone_says_so_and_does_nothing(monkeypatch, capsys):
    monkeypatch.setitem(config.FORMER, "train_3d", {"anneal": "gone, the schedule does it"})
    assert "anneal" not in parse(train_3d, [*DATA, "--anneal", "true"])
    assert capsys.readouterr().err == "option anneal: gone, the schedule does it\n"
    assert "anneal" not in up_to_date(train_3d, {"anneal": True, "lr": 1.0})


def test_channels_last_loads_with_one_line_and_does_nothing(tmp_path, capsys):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("channels_last: true\n")
    flag = "--channels_last"
    for argv in (["--config", str(recipe), *DATA], [flag, *DATA], [*DATA, flag]):
        assert "channels_last" not in parse(train_3d, argv)
        assert re.fullmatch("option channels_last: is gone .*\n", capsys.readouterr().err)
    today = config.config_dict(train_3d, {"data": {"root": "d"}, "out_dir": "o"})
    assert not differences(with_new_options(today | {"channels_last": True}, train_3d), today)


def test_a_run_begun_with_an_option_of_old_goes_on():
    today = config.config_dict(train_3d, {"data": {"root": "d"}, "out_dir": "o"})
    assert "schedule" not in today
    old = dict(today)
    old["schedule"] = old.pop("lr_schedule")
    assert not differences(with_new_options(old, train_3d), today)
    old["schedule"] = "constant"
    changed = differences(with_new_options(old, train_3d), today)
    assert changed == ["lr_schedule: constant -> cosine"]


def test_a_run_begun_before_a_class_had_an_option_goes_on():
    """At the option's default, whether it is of the network or of a class in one of its sockets."""
    today = config.config_dict(train_3d, {"data": {"root": "d"}, "out_dir": "o"})
    old = copy.deepcopy(today)
    del old["lr"], old["data"]["nan"]
    del old["model"]["init_args"]["output"], old["model"]["init_args"]["block"]["init_args"]
    assert with_new_options(old, train_3d) == today
    today["model"]["init_args"]["output"] = "tanh"
    assert differences(with_new_options(old, train_3d), today) == [
        "model.init_args.output: none -> tanh"
    ]


def test_an_option_of_a_class_that_is_gone_is_a_difference():
    today = config.config_dict(train_3d, {"data": {"root": "d"}, "out_dir": "o"})
    old = copy.deepcopy(today)
    old["model"]["init_args"]["gone"] = 3
    changed = differences(with_new_options(old, train_3d), today)
    assert changed == ["model.init_args.gone: 3 -> not set"]


def test_a_run_begun_before_classes_learned_an_option_goes_on():
    today = config.config_dict(train_3d, {"data": DataConfig("d"), "out_dir": "o"})
    old = copy.deepcopy(today)
    del old["model"]["init_args"]["linear_code"]
    del old["model"]["init_args"]["norm"]["init_args"]["eps"]
    del old["data"]["preprocess"]["pad_to_multiple"], old["data"]["nan"]
    assert differences(old, today)
    assert not differences(with_new_options(old, train_3d), today)
    today["model"]["init_args"]["linear_code"] = today["data"]["nan"] = 3
    changed = differences(with_new_options(old, train_3d), today)
    assert changed == ["data.nan: error -> 3", "model.init_args.linear_code: None -> 3"]


def test_recipes_are_found_by_name_from_any_folder_and_a_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = parse(train_3d, ["--config", "demo", "--model", "maisi", *DATA])
    assert by_name["max_steps"] == 240 and by_name["model"].func.__name__ == "MaisiVAE"
    assert parse(train_3d, ["--config=demo", "--model=t1_light", *DATA])["max_steps"] == 240
    (tmp_path / "demo").write_text("max_steps: 7\n")
    assert parse(train_3d, ["--config", "demo", *DATA])["max_steps"] == 7
    assert parse(train_3d, ["--model", "MaisiVAE", *DATA])["model"].func.__name__ == "MaisiVAE"


@pytest.mark.parametrize(
    ("argv", "known"),
    [(["--config", "dmo"], "demo, ixi_t1"), (["--model", "masi"], "maisi, monai")],
)
def test_an_unknown_recipe_lists_the_known_ones(argv, known):
    with pytest.raises(ValueError, match=known):
        parse(train_3d, [*argv, *DATA])


def test_the_cache_is_chosen_by_data_store_which_was_called_backend(tmp_path):
    (tmp_path / "old.yaml").write_text("data: {root: a, backend: blosc2}")
    for line in (["--data.root=a", "--data.backend=blosc2"], [f"--config={tmp_path / 'old.yaml'}"]):
        assert parse(prepare, line)["data"].store == "blosc2"
