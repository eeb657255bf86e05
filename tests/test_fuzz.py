"""Whatever is typed: each command ends with 0 or 2 and at most one line, and leaves nothing half.

The options are those of the parsers, down to the arguments of the classes in sockets, so a new one
is tried because it exists. By VAE3D_FUZZ_TIMES=10 there are ten times as many values.
"""

import contextlib
import inspect
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vae3d.models.presets  # noqa: F401 - whose classes are options from the first test on
from loaders import DataConfig
from vae3d import cli, config
from vae3d.commands.convert import convert
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.commands.prepare import prepare
from vae3d.commands.train import train_3d
from vae3d.commands.train_ldm import UNet, train_ldm
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.tracking.guests import Guest

ROOT = Path(__file__).resolve().parents[1]
TIMES = int(os.environ.get("VAE3D_FUZZ_TIMES", 1))
NUM_LINES = 250
DEPTH = 3  # of sockets in sockets whose arguments are options, `--loss.kl.weight` is at 2
CPU_S, WALL_S, MEMORY = 8, 120, 3 * 2**30  # of one example; Ctrl-C comes after that
QUIET = {"wandb": "disabled", "device": "cpu"}
RECIPE = """
model:
  class_path: CustomVAE
  init_args:
    channels: [4, 8]
    num_res_blocks: 1
    mid_attention: null
    norm: {class_path: GroupNorm, init_args: {num_groups: 4}}
patch_size: [8, 8, 8]
patches_per_volume: 1
batch_size: 1
max_steps: 1
val_every: 0
media_every: 0
threads: 0
wandb: disabled
device: cpu
amp: off
"""


# A small world in which each command has a sound line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Volumes, a recipe, a run, its latents, evaluation and ldm, in `world`; `again` has copies."""
    home = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE3D_CACHE", str(home / "cache"))
        for name in ("WandbRun", "TensorBoard", "MLflowRun"):
            patch.setattr(f"vae3d.tracking.tracker.{name}", NoTracker)
        patch.setattr("vae3d.inference.export.export_programs", exported)
        # For some seconds, a minute on a busy machine; trainings compile in tests/test_train_3d.py.
        patch.setattr("vae3d.models.custom_vae.Chain.compile", lambda *_, **__: None)
        make_world(home / "world")
        # Half of the time of an example; real processes below make theirs.
        patch.setattr(config, "_parser", lru_cache(config._parser))
        # What it writes has been put together and checked before, at the same cost.
        patch.setattr("vae3d.training.run.save_config", lambda *_: None)
        # After Ctrl-C a command that hangs ends its process, which is that of the tests here.
        patch.setattr("vae3d.stop.GRACE_S", WALL_S)
        (home / "scratch").mkdir()
        patch.chdir(home / "scratch")
        shutil.copytree(home / "world", home / "again")
        yield home


def make_world(home: Path) -> None:
    torch.set_num_threads(1)
    (home / "volumes").mkdir(parents=True)
    rows = ["path,split,sex"]
    for n, part in enumerate(("train", "train", "val", "test")):
        volume = np.random.default_rng(n).random((8, 10, 9), np.float32)
        np.save(home / "volumes" / f"v{n}.npy", volume)
        rows.append(f"v{n}.npy,{part},{'FM'[n % 2]}")
    manifest = home / "volumes" / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    (home / "recipe.yaml").write_text(RECIPE)
    norm = partial(GroupNorm, num_groups=4)
    vae = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, mid_attention=None)
    tiny = dict(max_steps=1, val_every=0, media_every=0, threads=0, amp="off", **QUIET)
    validated = tiny | {"val_every": 1}
    train_3d(str(manifest), str(home / "run"), vae, patch_size=(8, 8, 8), batch_size=1, **validated)
    encode(str(home / "run"), str(home / "latents"), VolumeSource(str(manifest)), device="cpu")
    unet = UNet((4, 8), 1, (False, True), (0, 4), 4)
    train_ldm(str(home / "latents"), str(home / "ldm"), unet, batch_size=1, **tiny)
    options = dict(media=False, save_recon=False, patch_gap=False, **QUIET)
    evaluate(str(home / "run"), EvaluationData(str(manifest)), str(home / "evaluation"), **options)
    convert(str(home / "run"), home / "hub")
    prepare(DataConfig(str(home / "volumes"), cache_dir=str(home / "prepared")))
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    (home / "volumes" / "manifest.json").write_text(json.dumps(table))
    for name, content in {
        "empty": b"",
        "text.txt": b"a text",
        "bytes.bin": bytes(range(256)),
    }.items():
        (home / name).write_bytes(content)


class NoTracker(Guest):
    """In the place of trackers, which take seconds to start."""

    name = "none"

    def __init__(self, *_):
        pass

    def start(self, *_):
        pass

    log = log_table = log_media = finish = start


def exported(vae, folder, formats, patch_size):
    """In the place of torch's exporters, which take seconds; as they do, it runs the network."""
    with torch.no_grad():
        vae(torch.zeros(1, vae.in_channels, *patch_size))
    folder.mkdir(parents=True)
    return {}


LINES = {  # the sound line of each command; OUT is where it writes
    "demo-data": "OUT --num_subjects 1 --spacing_mm 16",
    "check-data": "world/volumes",
    "prepare": "--data.root world/volumes --data.cache_dir OUT",
    "patches": "world/volumes --patch_size [8,8,8] --n 2 --out OUT/p.png",
    "plan": "world/recipe.yaml --memory_gb 1",
    "train": "--config world/recipe.yaml --data.root world/volumes --out_dir OUT",
    "evaluate": "--checkpoint world/run --data.root world/volumes --out_dir OUT --device cpu "
    "--media false --patch_gap false",
    "anomaly": "--checkpoint world/run --data.root world/volumes/v3* --data.healthy "
    "world/volumes/v2* --out_dir OUT --device cpu",
    "report": "world/run --out OUT/r.html",
    "convert": "world/run OUT",
    "export": "world/run OUT",
    "encode": "--checkpoint world/run --data.root world/volumes --out_dir OUT --device cpu",
    "decode": "world/latents --checkpoint world/run --out_dir OUT --device cpu",
    "train-ldm": "world/latents --config world/ldm/config.yaml --out_dir OUT",
    "compare": "world/volumes world/volumes --out_dir OUT --device cpu",
    "sample": "--checkpoint world/run --latents world/latents --n 1 --out_dir OUT --media false "
    "--device cpu --prior standard",
}  # fmt: skip
OUTPUTS = ("out_dir", "out", "write", "cache_dir", "target", "folder")  # nothing of the world there


def test_each_command_has_a_sound_line(world):
    assert LINES.keys() == cli.COMMANDS.keys()
    for name in LINES:
        assert attempt(world, [name, *words(world, LINES[name])]) == 0, name


def words(world: Path, line: str) -> list[str]:
    named = line.replace("OUT", str(world / "scratch" / "out"))
    return named.replace("world/", f"{world}/world/").split()


# Options, from the parsers


def function_of(command: str) -> Callable:
    module, name = cli.COMMANDS[command][0].split(".")
    return getattr(import_module(f"vae3d.commands.{module}"), name)


@dataclass(frozen=True)
class Option:
    """An option of a command line.

    Args:
        name: With its dashes, or the name of a positional argument.
        hint: Its type.
        chosen: Options that come before it: the classes that it is an argument of.
    """

    name: str
    hint: object
    chosen: tuple[str, ...] = ()


def options_of(command: str) -> list[Option]:
    """Options of a command; arguments of all classes that sockets take are among them."""
    found: list[Option] = []
    for action in config._parser(function_of(command))._actions:
        if action.dest in ("help", "print_config") or action.dest.endswith(".help"):
            continue
        name = f"--{action.dest}" if action.option_strings else action.dest
        option = Option(name, getattr(action, "_typehint", action.type))
        found += [option, *arguments_of(option, DEPTH)]
    return found


def arguments_of(option: Option, depth: int) -> list[Option]:
    """Options below a socket: each argument of the classes that it takes, once."""
    found: dict[str, Option] = {}
    for cls in sorted(classes_of(option.hint), key=str) if depth else ():
        hints = typing.get_type_hints(cls.__init__)
        chosen = (*option.chosen, f"{option.name}={cls.__name__}")
        for argument in inspect.signature(cls).parameters.values():
            name = f"{option.name}.{argument.name}"
            if argument.default is not inspect.Parameter.empty and name not in found:
                one = Option(name, hints.get(argument.name, object), chosen)
                found |= {name: one} | {o.name: o for o in arguments_of(one, depth - 1)}
    return list(found.values())


def classes_of(hint: object) -> set[type]:
    """Classes that a socket takes."""
    if typing.get_origin(hint) is not Callable and "Callable" not in str(typing.get_origin(hint)):
        return {cls for part in typing.get_args(hint) for cls in classes_of(part)}
    base = typing.get_args(hint)[-1]
    if not inspect.isclass(base):
        return set()
    ours = [
        cls for cls in base.__subclasses__() if cls.__module__.startswith(("vae3d.", "loaders."))
    ]
    return {base, *ours}  # other tests have theirs


def test_there_are_two_thousand_examples():
    values = sum(len(options_of(command)) * examples_each(command) for command in LINES)
    assert values + NUM_LINES >= 2000


def test_options_reach_down_to_the_arguments_of_sockets():
    names = {option.name for option in options_of("train")}
    for name in ("--lr", "--data.preprocess.window_hu", "--model.block", "--loss.kl.weight"):
        assert name in names
    assert "--loss.adversarial.discriminator.channels" in names
    assert [option.name for option in options_of("patches")][1] == "root"


# Values


ODD = [
    "null", "nan", "none", "None", "-1", "0", "1", "1.5", "1e999", "-inf", "1e-320", "0x10",
    "1_000", "007", "true", "-", "--", "=", "%", "%s%n", "*", "?", "[", "[!", "(", "'", "[]", "{}",
    "[[[]]]", "[1]", "[0,0,0]", "[-1,8,8]", "[8,8,8]", "[nan,1,1]", "[8,8]", "[1e9,1e9,1e9]",
    "[a,b]", "{0:1}", "{a:1}", "1,2,3", "&a[*a]", "{class_path:os.system}",
    "!!python/name:os.system", "CustomVAE", "GroupNorm", "vae3d.cli", "os.system",
    "../nothing/here", "hf://a/b", "~nobody/x", "ÄÖ体积🧠",
]  # fmt: skip
ODD += ["", " ", "a\nb", "a: b: c", "{class_path: os.system}", "{class_path: CustomVAE, a: b}"]
ODD += ["\x1b[31m", "9" * 30, "9" * 400, "x" * 5000]
NUMBERS = {
    int: ["-1", "0", "1", "2", "3", "5", "7", "8", "64", "1000", "999999999", "1e3", "2.0"],
    float: ["-1", "0", "-0.0", "1e-320", "1e-9", "0.1", "0.5", "1", "1.5", "100", "1e9", "1e300",
            "nan", "inf", "-inf", "1e-3"],
    bool: ["true", "false", "True", "yes", "1"],
}  # fmt: skip
PLACES = [
    "empty", "text.txt", "bytes.bin", "recipe.yaml", "volumes", "volumes/v0.npy",
    "volumes/manifest.csv", "run", "latents", "latents/v0.safetensors", "latents/latents.json",
    "ldm", "hub", "run/checkpoints/last.pt", "run/metrics.jsonl", "run/split.json", "evaluation",
    "nothing", "volumes/*.npy", "text.txt/below",
]  # fmt: skip
PLACES = [f"world/{place}" for place in PLACES]


def suited(hint: object, rng: random.Random) -> str:
    """A value of the right type, often one out of range."""
    inside = typing.get_args(hint)
    if hint in NUMBERS:
        return rng.choice(NUMBERS[hint])
    if typing.get_origin(hint) is typing.Literal:
        return str(rng.choice(inside))
    if typing.get_origin(hint) in (tuple, list):
        parts = [part for part in inside if part is not ...] or [int]
        if ... in inside or len(parts) == 1 or rng.random() < 0.3:
            parts = parts[:1] * rng.randrange(5)
        return f"[{','.join(suited(part, rng) for part in parts)}]"
    if classes := classes_of(hint):
        return rng.choice(sorted(cls.__name__ for cls in classes))
    if inside:
        return suited(rng.choice(inside), rng)
    return rng.choice(PLACES if hint in (str, Path) else ODD)


def draw(option: Option, rng: random.Random) -> str:
    """A value for an option: of its type, an odd one, or a file that is something else."""
    if option.name.rpartition(".")[2].strip("-") in OUTPUTS:
        return rng.choice(ODD)
    kind = rng.randrange(4)
    return suited(option.hint, rng) if kind < 2 else rng.choice(ODD if kind == 2 else PLACES)


# One attempt


def attempt(world: Path, argv: list[str]) -> int:
    """Run a command line in this process, hold it to what is promised, and clean up after it."""
    before = tree(world)
    code, said = outcome(argv)
    after = tree(world)
    line = " ".join(map(repr, argv))
    try:
        assert code in (0, 2, 130), f"exit code {code}: {line}\n{said}"
        assert "Traceback" not in said, f"{line}\n{said}"
        assert not [name for name in after if ".partial." in name], f"{line}\n{said}"
        if code == 2:
            complaints = [text for text in said.splitlines() if "error: " in text]
            new = sorted(set(after.items()) - set(before.items()))
            checks = argv[0] == "check-data"  # whose list of faults is its result
            assert len(complaints) == 1 or checks, f"{len(complaints)} errors: {line}\n{said}"
            full = "allocate memory" in said  # of which `bounded` leaves little: a run had begun
            assert full or not new, f"refused, and wrote {new}: {line}\n{said}"
    finally:
        for path in (world / "scratch").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        part = {name: told for name, told in after.items() if name.startswith("world/")}
        if part != {name: told for name, told in before.items() if name.startswith("world/")}:
            shutil.rmtree(world / "world")
            shutil.copytree(world / "again", world / "world")
    return code


def tree(world: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file that is there; caches and locks are not counted."""
    files = [path for part in ("world", "scratch") for path in (world / part).rglob("*")]
    return {
        str(path.relative_to(world)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.is_file() and path.name not in (".lock", "build.lock")
    }


def outcome(argv: list[str]) -> tuple[int | str | None, str]:
    """Exit code and output of a command; a traceback is told as Python does."""
    said = io.StringIO()
    nobody = mock.patch("sys.stdin", io.StringIO())  # types what `--config -` would read
    with nobody, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), bounded():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cli.main(argv)
        except SystemExit as stop:
            return stop.code or 0, said.getvalue()
        except BaseException as error:
            import traceback

            traceback.print_exception(error, file=said)
            return type(error).__name__, said.getvalue()
    return "no exit", said.getvalue()


@contextlib.contextmanager
def bounded():
    """Bound memory, and press Ctrl-C where a command is still at work after its time."""

    pressed = []

    def press(*_):
        if not pressed:  # both alarms may come during one long call; a second Ctrl-C ends us, too
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    handlers = {signal.SIGPROF: press, signal.SIGALRM: press}
    handlers[signal.SIGINT] = signal.default_int_handler  # it is ignored below a shell's `&`
    kept = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.alarm(WALL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in kept.items():
            signal.signal(number, handler)


# The tests


FEW = dict(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def examples_each(command: str) -> int:
    """Values of each option; a training takes as long as several of the other commands."""
    return TIMES * (1 if command == "train" else 3)


def line_with(world: Path, command: str, option: Option, value: str) -> list[str]:
    """The sound line of a command, but for the value of one option."""
    given = words(world, LINES[command])
    value = value.replace("world/", f"{world}/world/")
    positional = config._positional(function_of(command))
    if option.name in positional:
        given[positional.index(option.name)] = value
    else:
        given += [*option.chosen, f"{option.name}={value}"]
    return [command, *given]


def try_option(world: Path, command: str, option: Option, count: int) -> None:
    """Give an option `count` values on an else sound line."""

    @settings(max_examples=count, **FEW)
    @given(number=st.integers(0, 2**32))
    def run(number: int) -> None:
        rng = random.Random(f"{command} {option.name} {number}")
        attempt(world, line_with(world, command, option, draw(option, rng)))

    run()


PARTS = {"train": 10, "convert": 2}  # tests of a command, so that two workers share them


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, part", [(name, part) for name in LINES for part in range(PARTS.get(name, 1))]
)
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(command, part, world):
    count = examples_each(command)
    for option in options_of(command)[part :: PARTS.get(command, 1)]:
        try_option(world, command, option, count)


# Files from elsewhere, mutated

FILES = {  # a file, and a command that reads it
    "world/recipe.yaml": ("plan", "world/recipe.yaml --memory_gb 1"),
    "world/run/config.yaml": ("report", "world/run --out OUT/r.html"),
    "world/run/metrics.jsonl": ("report", "world/run --out OUT/r.html"),
    "world/run/tables.jsonl": ("report", "world/run --out OUT/r.html"),
    "world/run/split.json": ("report", "world/run --out OUT/r.html"),
    "world/run/checkpoints/last.pt": ("convert", "world/run/checkpoints/last.pt OUT"),
    "world/run/checkpoints/newest.json": ("train", LINES["train"].replace("OUT", "world/run")),
    "world/volumes/manifest.csv": ("check-data", "world/volumes/manifest.csv"),
    "world/volumes/manifest.json": ("check-data", "world/volumes/manifest.json"),
    "world/latents/v0.safetensors": ("decode", LINES["decode"]),
    "world/latents/latents.json": ("sample", LINES["sample"]),
    "world/hub/config.json": ("convert", "world/hub OUT.pt"),
    "world/hub/model.safetensors": ("convert", "world/hub OUT.pt"),
    "world/evaluation/summary.json": ("convert", "world/run OUT --evaluation world/evaluation"),
    "world/prepared/sources.json": (
        "prepare",
        "--data.root world/volumes --data.cache_dir world/prepared",
    ),
}
NODES = [None, [], {}, "", "x", -1, 0, 1, 2**70, 1e308, float("nan"), True, "../../x", [[]], "nan"]
NODES += ["9" * 400, {"class_path": "os.system"}, [None] * 3, ["a", 1], "ä\x00\x1b[0m"]


def with_odd_node(value: object, rng: random.Random) -> object:
    """Plain data with one node, anywhere in it, replaced by an odd one, gone or doubled."""
    inside = value if isinstance(value, (dict, list)) else ()
    if not inside or rng.random() < 0.2:
        return rng.choice(NODES)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = with_odd_node(copy[key], rng)
    return copy


def with_odd_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, flipped, doubled, or have others in between."""
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 4, 100])
    noise = rng.choice(
        [b"", b"\x00", b"\xff\xfe", b"[" * 500, b"9" * 400, b"\n", rng.randbytes(length)]
    )
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + noise + data[at:]
    if kind == 2:
        return data[:at] + noise + data[at + length :]
    return data[:at] + data[max(0, at - length) : at] + data[at:]


def mutate(path: Path, rng: random.Random) -> None:
    """Spoil a file: somewhere in its bytes, or in what it says."""
    data, spoiled = path.read_bytes(), None
    if rng.random() < 0.6:
        if path.suffix == ".pt":
            state = with_odd_node(torch.load(path, weights_only=True), rng)
            path.unlink()  # other names stand for the same file
            torch.save(state, path)
            return
        if path.suffix in (".json", ".yaml"):
            spoiled = json.dumps(with_odd_node(yaml.safe_load(data), rng)).encode()
        elif path.suffix == ".jsonl":
            lines = data.decode().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(with_odd_node(json.loads(lines[at]), rng))
            spoiled = "\n".join(lines).encode()
        elif path.suffix == ".csv":
            rows = with_odd_node([line.split(",") for line in data.decode().splitlines()], rng)
            rows = rows if isinstance(rows, list) else [[rows]]
            lines = [",".join(map(str, r)) if isinstance(r, list) else str(r) for r in rows]
            spoiled = "\n".join(lines).encode()
    path.unlink()
    path.write_bytes(with_odd_bytes(data, rng) if spoiled is None else spoiled)


def try_file(world: Path, name: str, number: int) -> None:
    """Spoil a file in the way of this number, and let a command read it."""
    command, line = FILES[name]
    mutate(world / name, random.Random(f"{name} {number}"))
    try:
        code = attempt(world, [command, *words(world, line)])
    except AssertionError as error:
        raise AssertionError(f"{name}, spoiled in way {number}: {error}") from None
    finally:
        shutil.copy(world / name.replace("world", "again", 1), world / name)
    assert code != 130, f"{name} {number}: still at work after {CPU_S} s"


# Lines as a whole


JUNK = [
    "--", "-", "=", "--=", "--nonsense=1", "-x", "--config", "extra", "--data.", "--data",
    "--model.x.y=1", "--lr", "--print_config", "--help", "--config=world/recipe.yaml",
    "--config=world/text.txt", "--seed", "--device=tpu", "--trust=os", "--model=nothing",
    "--data.preprocess.window_hu.ct=[0,1]", "--model.init_args.norm.class_path=os.system",
    "--spatial_dims",
]  # fmt: skip


def spoiled_line(world: Path, rng: random.Random) -> list[str]:
    """A sound line with words that are lost, doubled, exchanged or new."""
    command = rng.choice(list(LINES))
    line = [command, *words(world, LINES[command])]
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(line)), rng.randrange(len(line))
        kind = rng.randrange(4)
        if kind == 0 and len(line) > 1:
            del line[at]
        elif kind == 1:
            line.insert(other, line[at])
        elif kind == 2:
            line[at], line[other] = line[other], line[at]
        else:
            line.insert(at + 1, rng.choice(JUNK + ODD).replace("world/", f"{world}/world/"))
    return line


@pytest.mark.slow
@settings(max_examples=TIMES * NUM_LINES, **FEW)
@given(number=st.integers(0, 2**32))
def test_any_order_of_words_is_taken_or_refused_in_one_line(world, number):
    attempt(world, spoiled_line(world, random.Random(number)))


NUM_PROCESSES, TESTS = 40, 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(TESTS))
def test_real_processes_keep_to_the_same(part, world):
    """Two at a time; none of this file's stand-ins is in their way."""
    rng = random.Random(0)
    lines = [spoiled_line(world, rng) for _ in range(NUM_PROCESSES - 2 * len(LINES))]
    for command in 2 * list(LINES):
        option = rng.choice(options_of(command))
        lines.append(line_with(world, command, option, draw(option, rng)))
    assert len(lines) == NUM_PROCESSES
    lines = lines[part::TESTS]
    for at in range(0, len(lines), 2):
        pair = lines[at : at + 2]
        for line, process in zip(pair, list(map(start, pair)), strict=True):
            said, code = finish(process)
            assert code in (0, 2, 130) and "Traceback" not in said, f"{code}: {line}\n{said}"
            assert code != 2 or said.count("error: ") == 1 or line[0] == "check-data", said
        assert not list((world / "scratch").rglob("*.partial.*"))
        for path in (world / "scratch").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def start(line: list[str]) -> subprocess.Popen:
    code = "import sys; from vae3d.cli import main; main(sys.argv[1:])"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *line], env=environ, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, int]:
    """Output and exit code; Ctrl-C for who is at work for long."""
    try:
        said = process.communicate(timeout=WALL_S)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=WALL_S)[0]
    return said, process.returncode


# A few of all of these, in the ordinary suite


@pytest.mark.parametrize("command", LINES)
def test_one_odd_value_an_option_of_each_command(command, world):
    option = random.Random(command).choice(options_of(command))
    try_option(world, command, option, 1)


@pytest.mark.parametrize("name", ["world/recipe.yaml", "world/volumes/manifest.csv"])
def test_one_spoiled_file(name, world):
    try_file(world, name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_file_is_read_or_refused_in_one_line(name, world):
    for number in range(10):
        try_file(world, name, number)
