"""A signature is a configuration: parsing, saving, and one clear line for each mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import yaml

from vae3d import config


class Paint:
    """Base of the socket."""


class Oil(Paint):
    def __init__(self, pots: int, thickness: float = 0.5):
        """Oil paint.

        Args:
            pots: How many.
            thickness: In mm.
        """
        self.pots, self.thickness = pots, thickness


class Chalk(Paint):
    def __init__(self, pots: int, colors: tuple[str, ...] = ("white",)):
        """Chalk.

        Args:
            pots: How many.
            colors: Their colors.
        """
        self.pots, self.colors = pots, colors


@dataclass
class Canvas:
    """The canvas.

    Args:
        root: Where it hangs.
        size_mm: Its two sides.
    """

    root: str
    size_mm: tuple[float, float] | None = None


@dataclass
class Studio:
    """The studio.

    Args:
        canvas: What hangs there.
        tool: What lies there.
    """

    canvas: Canvas = field(default_factory=lambda: Canvas("wall"))
    tool: Callable[[int], Paint] = Oil


def work(studio: Studio):
    """Work in a studio.

    Args:
        studio: Where.
    """


def shelve(
    shelf: str, /, tools: tuple[Literal["oil", "chalk"], ...] = (), tags: tuple[str, ...] = ()
):
    """Shelve tools.

    Args:
        shelf: Where.
        tools: Which.
        tags: Words on them.
    """


@pytest.mark.parametrize(
    ("argv", "tools", "tags"),
    [
        (["up", "--tools", "oil", "chalk", "--tags", "a b", "12"], ("oil", "chalk"), ("a b", "12")),
        (["up", "--tags=a,b", "--tools", "chalk"], ("chalk",), ("a,b",)),
        (["--tools", "[oil]", "up", "--tags", "['a b',c]"], ("oil",), ("a b", "c")),
        (["up", "--tools", "[]"], (), ()),
    ],
)
def test_an_option_of_several_words_takes_them_one_after_the_other_or_as_a_list(argv, tools, tags):
    found = config.parse(shelve, argv)
    assert (found["shelf"], found["tools"], found["tags"]) == ("up", tools, tags)


@pytest.mark.parametrize("argv", [["up", "--tools"], ["up", "--tools", "oil", "brush"]])
def test_a_word_too_few_or_a_wrong_one_names_the_option(argv):
    with pytest.raises(ValueError, match="tools"):
        config.parse(shelve, argv)


def test_sockets_inside_dataclasses_arrive_as_plain_partials(tmp_path):
    kwargs = config.parse(work, ["--studio.tool", "Chalk", "--studio.canvas.root", "easel"])
    assert kwargs["studio"].tool.func is Chalk and kwargs["studio"].canvas.root == "easel"
    config.save_config(tmp_path / "config.yaml", work, kwargs)
    again = config.parse(work, ["--config", str(tmp_path / "config.yaml")])
    assert again["studio"].tool.func is Chalk


def paint(canvas: Canvas, tool: Callable[[int], Paint] = Oil, lr: float = 1e-3, note: str = ""):
    """Paint a picture.

    Args:
        canvas: What to paint on.
        tool: What to paint with.
        lr: Speed of the hand.
        note: Anything.
    """


def mistake(fn=paint, argv=()) -> str:
    with pytest.raises(ValueError) as caught:
        config.parse(fn, list(argv))
    return str(caught.value)


def test_sockets_arrive_as_plain_partials():
    kwargs = config.parse(
        paint, ["--canvas.root", "wall", "--tool", "Chalk", "--tool.colors", '["red","blue"]']
    )
    assert kwargs["canvas"] == Canvas("wall")
    assert type(kwargs["tool"]) is partial and kwargs["tool"].func is Chalk
    assert kwargs["tool"](3).colors == ("red", "blue")


def test_a_default_of_one_class_does_not_leak_into_another():
    kwargs = config.parse(paint, ["--canvas.root", "wall", "--tool", "Chalk"])
    assert set(kwargs["tool"].keywords) == {"colors"}


def test_later_yaml_and_options_override_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("canvas: {root: wall}\nlr: 1e-4\nnote: first\n")
    (tmp_path / "b.yaml").write_text("note: second\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert config.parse(paint, files)["note"] == "second"
    assert config.parse(paint, [*files, "--lr", "1e-2"])["lr"] == 0.01
    assert config.parse(paint, files)["lr"] == 1e-4


def test_off_and_no_are_words(tmp_path):
    (tmp_path / "a.yaml").write_text("canvas: {root: wall}\nnote: off\n")
    assert config.parse(paint, ["--config", str(tmp_path / "a.yaml")])["note"] == "off"
    (tmp_path / "b.yaml").write_text("soap: true\n")
    assert config.parse(clean, ["--config", str(tmp_path / "b.yaml")])["soap"] is True


def test_a_socket_may_be_given_as_a_file(tmp_path):
    (tmp_path / "tool.yaml").write_text("class_path: Oil\ninit_args: {thickness: 2}\n")
    argv = ["--canvas.root", "wall", "--tool", str(tmp_path / "tool.yaml")]
    assert config.parse(paint, argv)["tool"](1).thickness == 2


@pytest.mark.parametrize(
    "tool", [Oil, Chalk, partial(Oil, thickness=2.0), partial(Chalk, colors=("red",))]
)
def test_a_saved_config_is_complete_and_reloads_equal(tmp_path, tool):
    path = tmp_path / "run" / "config.yaml"
    kwargs = {"canvas": Canvas("wall", (1.0, 2.0)), "tool": tool}
    config.save_config(path, paint, kwargs)
    saved = yaml.safe_load(path.read_text())
    assert saved["lr"] == 1e-3 and saved["tool"]["init_args"], "defaults are written out"
    again = config.parse(paint, ["--config", str(path)])
    assert again["canvas"] == Canvas("wall", (1.0, 2.0))
    assert config.config_dict(paint, again) == saved
    assert vars(again["tool"](1)) == vars(tool(1))
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_an_unknown_key_is_named():
    assert "lrr" in mistake(argv=["--canvas.root", "wall", "--lrr", "1"])


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("canvas: {root: wall, roof: 1}\n")
    assert "roof" in mistake(argv=["--config", str(tmp_path / "a.yaml")])


def test_a_missing_key_and_a_wrong_type_are_named():
    assert "canvas.root" in mistake()
    assert "lr" in mistake(argv=["--canvas.root", "wall", "--lr", "fast"])


def test_a_missing_config_file_is_named(tmp_path):
    assert "nowhere.yaml" in mistake(argv=["--config", str(tmp_path / "nowhere.yaml")])


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("canvas: {root: wall}\nlr: 1\nlr: 2\n")
    assert "twice" in mistake(argv=["--config", str(tmp_path / "a.yaml")])


def test_an_alias_bomb_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    assert "aliases" in mistake(argv=["--config", str(tmp_path / "a.yaml")])


def test_yaml_never_builds_python_objects(tmp_path):
    (tmp_path / "a.yaml").write_text("note: !!python/object/apply:os.getcwd []\n")
    assert "python" in mistake(argv=["--config", str(tmp_path / "a.yaml")])


def hang(pictures: list[str], /, wall: str = "north", nails: int = 1):
    """Hang pictures.

    Args:
        pictures: Which ones.
        wall: Where.
        nails: How many each.
    """
    assert (pictures, wall, nails) == (["a", "b"], "south", 2)


def test_parameters_before_the_slash_are_positional(capsys):
    with pytest.raises(SystemExit) as stop:
        config.main(hang, ["a", "b", "--wall", "south", "--nails", "2"])
    assert not stop.value.code
    with pytest.raises(SystemExit):
        config.main(hang, ["--help"])
    assert "Which ones." in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        config.main(hang, ["--wall", "south"])
    assert stop.value.code == 2 and "pictures" in capsys.readouterr().err


def clean(brushes: int = 1, soap: bool = False):
    """Clean up.

    Args:
        brushes: How many.
        soap: With soap.
    """


@pytest.mark.parametrize(
    ("argv", "soap"),
    [([], False), (["--soap"], True), (["--soap", "--brushes", "2"], True)]
    + [(["--soap", "false"], False), (["--soap", "true"], True)],
)
def test_a_flag_needs_no_value(argv, soap):
    assert config.parse(clean, argv)["soap"] is soap


def raises(error):
    def fn():
        """Raise.""" ""
        raise error

    return fn


def test_main_turns_the_users_mistake_into_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("VAE3D_DEBUG", raising=False)
    for argv, words in ((["--tool", "Nothing"], "Nothing"), (["--bogus", "1"], "bogus")):
        with pytest.raises(SystemExit) as stop:
            config.main(paint, ["--canvas.root", "wall", *argv])
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    with pytest.raises(SystemExit) as stop:
        config.main(raises(FileNotFoundError(2, "No such file or directory", "scan.nii")), [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: scan.nii: No such file or directory\n"


def test_an_error_from_inside_a_library_keeps_its_traceback():
    def fn():
        """Fail inside a library."""
        yaml.safe_load(Path("no"), 1)

    with pytest.raises(TypeError):
        config.main(fn, [])
    with pytest.raises(ValueError):  # raised by this test file, which is not ours to explain
        config.main(raises(ValueError("defect")), [])


RANK = """
import atexit
from vae3d.config import main

class Late:
    def __del__(self):
        print("the interpreter's own end", flush=True)

late = Late()

def fn(how: str):
    '''End in one of several ways.

    Args:
        how: Which.
    '''
    atexit.register(print, "last words")
    print("done", end=" ")  # without a newline it stays in the buffer
    if how == "defect":
        raise TypeError("defect")
    return {"well": 0, "signal": 143}[how]

main(fn)
"""


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("signal", 143), ("defect", 1)])
def test_one_of_several_ranks_leaves_with_its_code_before_the_interpreter_ends(how, code):
    command = [sys.executable, "-c", RANK, "--how", how]
    done = {
        size: subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": size}
        )
        for size in ("1", "2")
    }
    assert [d.returncode for d in done.values()] == [code, code]
    assert "last words" in done["2"].stdout and "done" in done["2"].stdout
    assert "own end" in done["1"].stdout and "own end" not in done["2"].stdout
    assert ("TypeError: defect" in done["2"].stderr) == (how == "defect")
