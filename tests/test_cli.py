"""The `vae3d` command finds every task and answers quickly."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from vae3d import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_a_function_named_like_its_module(command):
    module = cli.COMMANDS[command][0]
    tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    function = functions[module.rpartition(".")[2]]
    documented = ast.get_docstring(function)
    for argument in function.args.args + function.args.kwonlyargs:
        assert f"{argument.arg}:" in documented, f"{command}: no help for --{argument.arg}"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_an_unknown_command_exits_2_and_names_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "trian" in err and "train" in err and err.count("\n") == 1
