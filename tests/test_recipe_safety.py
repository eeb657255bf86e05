"""A recipe from anyone: it may choose among the classes of the sockets and runs nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import pytest
import torch

from loaders.preprocess import Augment
from train_3d import train_3d
from vae3d import config
from vae3d.models.blocks import Block
from vae3d.models.classes import buildable, names_class
from vae3d.models.custom_vae import CustomVAE

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["--data.root", "DIR", "--out_dir", "OUT"]

SOURCES = {
    "trap/__init__.py": "open({mark!r}, 'w').close()\nfrom trap.inner import Evil, run\n",
    "trap/inner.py": "class Evil: ...\ndef run(*args, **options): open({mark!r}, 'w').close()\n",
    "own_lab/__init__.py": "from own_lab.blocks import *\nLater = Mine\n",
    "own_lab/blocks.py": "from . import base as b\n\nclass Mine(b.Base):\n    ...\n",
    "own_lab/base.py": f"import {__name__} as bases\nclass Base(bases.Brush): ...\n",
    "own_lab/real.py": "from vae3d.models import blocks\nclass Real(blocks.ResBlock): ...\n",
    "own_lab/deep/deeper/x.py": "import own_lab as lab\nclass Deep(lab.Mine[int]): ...\n",
    "own_lab/round.py": "from own_lab.about import A\nclass B(A): ...\n",
    "own_lab/about.py": "from own_lab.round import B\nclass A(B): ...\n",
    "own_lab/made.py": "from own_lab.base import Base\ndef make(): return Base\nMade = make()\n",
    "own_lab/broken.py": "class Half(\n",
}


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that appears when the module `trap` is imported or its function is called."""
    mark = tmp_path / "mark"
    for name, source in SOURCES.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.replace("{mark!r}", repr(str(mark))))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield mark
    assert not mark.exists(), "the trap has sprung"
    for name in [name for name in sys.modules if name.split(".")[0] in ("trap", "own_lab")]:
        del sys.modules[name]


CALL = {"class_path": "trap.run", "init_args": {"args": ["x"]}}
RUN = {"class_path": "subprocess.run", "init_args": {"args": ["touch", "x"]}}
BUILD = {"class_path": "vae3d.models.blocks.ResBlock", "init_args": {"dropout": 0.5}}
NOISE = {"RandomNoise": {"std": CALL, "mean": [RUN, {"deeper": BUILD}]}}


def written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


WAYS = {
    "config": lambda p: ["--config", written(p, {"data": {"augment": NOISE}})],
    "group": lambda p: [f"--data={written(p, {'augment': NOISE})}"],
    "text": lambda p: ["--data.augment", json.dumps(NOISE)],
    "key": lambda p: ["--data.augment.RandomNoise", json.dumps(NOISE["RandomNoise"])],
    "twice": lambda p: (
        ["--config", written(p, {"data": {"augment": {"RandomNoise": RUN}}})]
        + ["--data.augment", json.dumps(NOISE)]
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_free_value_is_plain_data_however_it_is_given(way, mark, tmp_path):
    kwargs = config.parse(train_3d, [*way(tmp_path / "r.yaml"), *NEEDED])
    assert kwargs["data"].augment == NOISE
    assert config.config_dict(train_3d, kwargs)["data"]["augment"] == NOISE
    with pytest.raises(ValueError, match=r"data\.augment: RandomNoise"):
        kwargs["data"].loader_options(threads=0)


class Tool:
    """Base of the socket."""


class Marked(TypedDict):
    """A dictionary with one free value."""

    free: Any


@dataclass
class Box:
    """A box.

    Args:
        free: Anything.
        tool: What lies inside.
    """

    free: Any = None
    tool: Callable[[], Tool] = Tool


class Brush(Tool):
    """A brush.

    Args:
        a: Anything.
        b: Anything.
        c: Anything.
        d: Anything.
        e: Anything.
        f: Anything.
        g: Anything.
    """

    def __init__(
        self,
        a: Any = None,
        b: dict[str, Any] | None = None,
        c: list[Any] | int = 0,
        d: tuple[object, ...] = (),
        e: Box | None = None,
        f: Marked | None = None,
        g=None,
    ):
        self.given = (a, b, c, d, e, f, g)


class Kit(Tool):
    """A kit.

    Args:
        boxes: Its boxes.
        module: A module.
        kind: A class.
        made: A tool that is made.
        function: What it does.
    """

    def __init__(
        self,
        boxes: list[Box] | None = None,
        module: ModuleType | None = None,
        kind: type | None = None,
        made: Tool | None = None,
        function: Callable[[int], int] | None = None,
    ):
        self.boxes = boxes


def use(tool: Callable[[], Tool] = Brush, free: Any = None, box: Box | None = None):
    """Use a tool.

    Args:
        tool: Which.
        free: Anything.
        box: Where it comes from.
    """


@pytest.mark.parametrize("value", [CALL, RUN, {"class_path": f"{__name__}.Brush", "init_args": {}}])
def test_free_values_at_any_depth_of_a_signature_are_plain_data(value, mark):
    box = {"free": value}
    args = {"a": value, "b": box, "c": [value], "d": [value], "e": box, "f": box}
    tool = {"class_path": "Brush", "init_args": args | {"g": value}}
    argv = ["--tool", json.dumps(tool), "--free", json.dumps(value), "--box", json.dumps(box)]
    kwargs = config.parse(use, argv)
    a, b, c, d, e, f, g = kwargs["tool"]().given
    assert a == b["free"] == g == f["free"] == kwargs["free"] == kwargs["box"].free == value
    assert c == [value] and list(d) == [value] and e.free == value
    assert config.config_dict(use, {"free": value})["free"] == value


@pytest.mark.parametrize("value", [CALL, RUN, BUILD])
def test_a_dictionary_with_the_keys_of_a_class_builds_nothing(value, mark):
    with pytest.raises(ValueError, match="tool"):
        config.parse(
            use, ["--tool", json.dumps({"class_path": "Brush", "init_args": {"b": value}})]
        )


REFUSED = [
    "os.system",
    "subprocess.run",
    "subprocess.Popen",
    "trap.run",
    "trap.Evil",
    "trap.inner.Evil",
]
REFUSED += [
    "antigravity.Fly",
    "this.s",
    "builtins.eval",
    "vae3d.cli.main",
    "vae3d.config.os.system",
]
REFUSED += [
    "vae3d.tracking.tracker.Tracker",
    "vae3d.load_model",
    "nowhere.Block",
    "own_lab.made.Made",
]
REFUSED += ["own_lab.round.B", "own_lab.broken.Half", "torch.nn.Identity", "..", "trap.inner.run.x"]


def refuse(argv: list[str]) -> None:
    """Parse `argv`, expect one line about it, and that nothing it names is imported."""
    before = set(sys.modules)
    with pytest.raises(ValueError) as caught:
        config.parse(train_3d, [*argv, *NEEDED])
    assert "\n" not in str(caught.value)
    new = {module.split(".")[0] for module in set(sys.modules) - before}
    assert not new & {"trap", "own_lab", "antigravity", "this"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_class_of_a_socket_is_refused_before_it_is_imported(name, mark):
    refuse(["--model.block", json.dumps({"class_path": name, "init_args": {"args": ["x"]}})])


@pytest.mark.parametrize("name", ["trap.run", "trap.Evil", "os.system"])
def test_a_socket_refuses_it_however_it_is_given(name, mark, tmp_path):
    spec = {"class_path": name, "init_args": {"args": ["x"]}}
    block = {"class_path": "CustomVAE", "init_args": {"block": spec}}
    for argv in (
        ["--model", name],
        ["--model.block", name],
        ["--model.block.class_path", name],
        ["--model", json.dumps(block)],
        ["--config", written(tmp_path / "a.yaml", {"model": block})],
        ["--model", written(tmp_path / "b.yaml", spec)],
        ["--model.help", name],
        ["--data.sampler", name],
        ["--loss.extra", json.dumps(["L1", spec])],
        ["--loss.extra+", name],
        ["--config", written(tmp_path / "c.yaml", {"model": spec}), "--model", "CustomVAE"],
    ):
        refuse(argv)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NoSuch", "there are .*MaisiVAE"),
        ("CustomVEA", "did you mean CustomVAE\\?"),
        ("my_lab.Mine", "there is no module my_lab"),
        ("own_lab.made.Made", "give one .*`class`"),
    ],
)
def test_who_refuses_a_class_says_why(name, why, mark):
    with pytest.raises(ValueError, match=f"^--model: no class {name}; {why}"):
        config.parse(train_3d, ["--model", name, *NEEDED])


@pytest.mark.parametrize("option", ["module", "kind", "made", "function"])
@pytest.mark.parametrize("name", ["trap", "trap.Evil", "trap.run"])
def test_no_other_type_of_an_argument_imports_what_a_recipe_names(option, name, mark):
    tool = {"class_path": "Kit", "init_args": {option: name}}
    with pytest.raises(ValueError, match=option):
        config.parse(use, ["--tool", json.dumps(tool)])
    boxes = [{"tool": {"class_path": name}}]
    with pytest.raises(ValueError, match="boxes"):
        config.parse(
            use, ["--tool", json.dumps({"class_path": "Kit", "init_args": {"boxes": boxes}})]
        )


@pytest.mark.parametrize(
    "name", ["blocks.Mine", "Mine", "Later", "deep.deeper.x.Deep", "base.Base"]
)
def test_a_class_of_the_users_own_package_is_found_without_importing_it(name, mark):
    assert names_class(f"own_lab.{name}", (Brush,))
    assert not names_class(f"own_lab.{name}", (Kit, Block))
    assert not any(module.startswith("own_lab") for module in sys.modules)


def test_a_socket_takes_a_class_of_the_users_own_package(mark, tmp_path):
    recipe = {"tool": {"class_path": "own_lab.blocks.Mine", "init_args": {"a": 5}}}
    from_file = ["--config", written(tmp_path / "r.yaml", recipe)]
    for argv in (from_file, ["--tool", "own_lab.blocks.Mine", "--tool.a", "5"]):
        tool = config.parse(use, argv)["tool"]
        assert issubclass(tool.func, Brush) and tool().given[0] == 5
        assert tool.func.__module__ == "own_lab.blocks"


def test_names_that_the_package_itself_gives_out_are_classes_too():
    assert names_class("vae3d.CustomVAE", (CustomVAE,))
    assert not names_class("vae3d.load_model", (object,))
    assert not names_class("vae3d.nothing", (object,))
    assert not names_class(None, (object,)) and not names_class("CustomVAE", (object,))


def test_buildable_are_the_bases_of_sockets_and_dataclasses_alone():
    assert buildable(list[Callable[[int, Callable[[], Tool]], Brush]] | None) == {Brush}
    assert buildable(dict[str, Box] | Callable[[], Tool]) == {Box, Tool}
    for hint in (Any, object, Callable, Callable[[Tool], Any], Callable[[], int], Tool, type[Tool]):
        assert not buildable(hint)


def test_jsonargparse_outside_of_our_parsers_is_as_it_was():
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--kind", type=type)
    assert parser.parse_args(["--kind", "fractions.Fraction"]).kind.__name__ == "Fraction"


@pytest.mark.parametrize("text", ["[" * 5000, "{a: &a [1], b: " + "[*a, " * 200, "9" * 5000])
def test_text_where_a_number_belongs_is_refused_in_one_short_line(text, tmp_path):
    path = written(tmp_path / "a.yaml", {"lr": text})
    for argv in (["--lr", text], ["--config", path]):
        with pytest.raises(ValueError) as caught:
            config.parse(train_3d, [*argv, *NEEDED])
        assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


def test_an_alias_bomb_in_a_text_of_a_text_is_not_expanded(tmp_path):
    lines = ["a0: &a0 [x]"] + [
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)
    ]
    text = "{" + ", ".join(lines) + "}"
    for key in ("lr", "seed", "fresh", "betas", "early_stop"):
        with pytest.raises(ValueError, match=key):
            config.parse(train_3d, ["--config", written(tmp_path / "a.yaml", {key: text}), *NEEDED])


@pytest.mark.parametrize(
    "name",
    ["Path", "torch", "__class__", "__loader__", "transforms.Lambda", "os.system", "Subject", ""],
)
def test_augment_takes_the_transforms_of_torchio_and_nothing_else(name):
    with pytest.raises(ValueError, match="no transform"):
        Augment({name: {}})


@pytest.mark.parametrize("value", [CALL, RUN, "os.system", "trap.run"])
def test_a_transform_gets_plain_data_and_calls_nothing_of_it(value, mark):
    with pytest.raises(ValueError, match=r"data\.augment: RandomNoise"):
        Augment({"RandomNoise": {"std": value}})
    with pytest.raises((ValueError, TypeError)):
        Augment({"Lambda": {"function": value}})(torch.zeros(1, 4, 4, 4), (0,), (1.0, 1.0, 1.0))


def test_a_hostile_recipe_runs_nothing_in_a_real_process(mark, tmp_path):
    touch = {"class_path": "subprocess.run", "init_args": {"args": ["touch", str(mark)]}}
    model = {"class_path": "CustomVAE", "init_args": {"channels": [4], "norm": "RMSNorm"}}
    model["init_args"]["block"] = "own_lab.real.Real"  # in a socket of its base, so it is imported
    free = {"data": {"augment": {"RandomNoise": {"std": touch}}}, "patch_size": [8, 8, 8]}
    free_text = ["--data.augment.RandomNoise.std", json.dumps(touch)]
    recipe = written(tmp_path / "free.yaml", free | {"model": model})
    deep = tmp_path / "deep.yaml"
    deep.write_text("model: " + "[" * 5000)
    train = [
        sys.executable,
        "train_3d.py",
        "--data.root",
        "DIR",
        "--out_dir",
        str(tmp_path / "run"),
    ]
    plan = [sys.executable, "-c", "from vae3d.cli import main; main()", "plan"]
    commands = [[*train, "--config", recipe], [*train, *free_text], [*plan, recipe]]
    commands += [[*train, "--config", str(deep)]]
    outcomes = []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for at in range(0, len(commands), 2):  # two at a time
        pair = [
            subprocess.Popen(c, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
            for c in commands[at : at + 2]
        ]
        outcomes += [(process.communicate()[1], process.returncode) for process in pair]
    for command, (error, code) in zip(commands, outcomes, strict=True):
        if command == [*plan, recipe]:  # it reads no volumes and augments nothing
            assert code == 0, error
            continue
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
