"""The `vae3d` command finds every task and answers quickly."""

import inspect
import subprocess
import sys
from importlib import import_module

import docstring_parser
import pytest

from vae3d import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_is_a_function_with_help_for_every_option(command):
    module, name = cli.COMMANDS[command][0].split(".")
    function = getattr(import_module(f"vae3d.commands.{module}"), name)
    documented = {p.arg_name for p in docstring_parser.parse(function.__doc__).params}
    assert documented == set(inspect.signature(function).parameters)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_the_package_runs_as_a_module_like_the_command():
    asked = [sys.executable, "-m", "vae3d", "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: vae3d COMMAND")


def test_an_unknown_command_exits_2_and_names_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "trian" in err and "train" in err and err.count("\n") == 1
