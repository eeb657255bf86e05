"""A function's signature is its configuration: command line, YAML file and saved run in one.

`main(fn)` at the end of a script is all it takes. Options of `fn` become `--options`, dataclass
parameters become groups (`--data.root`), and sockets (`Callable[..., Base]`) take a class by name
with its own arguments:

    model:
      class_path: CustomVAE
      init_args: {channels: [16, 32, 64], latent_channels: 4}

Parameters before a `/` are positional on the command line too: `vae3d convert IN OUT`.
`fn` receives sockets as plain `functools.partial(Class, **init_args)`, the same thing a caller
from Python passes. This is the only module that imports jsonargparse.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import inspect
import json
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import docstring_parser
import jsonargparse
import yaml
from jsonargparse import _actions, _typehints

from loaders.config import as_meant
from loaders.texts import MAX_NUMBER, load_yaml
from loaders.whole import write_text
from vae3d.mistakes import LONG_LINE, classes_under, explained, is_contract
from vae3d.models.classes import buildable, import_class
from vae3d.models.spec import describe
from vae3d.ranges import check_ranges
from vae3d.recipes import find_recipe
from vae3d.stop import Stopped, listening, say

MISTAKE = 2  # exit code when the user's input is at fault

# Options of old, in recipes, command lines and runs that are resumed: what they are called today,
# or in a sentence what became of them.
FORMER = {
    "train_3d": {
        "schedule": "lr_schedule",
        "channels_last": "is gone and does nothing; weights stay contiguous",
    },
    "train_ldm": {"schedule": "noise_schedule"},
}
# The same for options in a group, on command lines alone (YAML: `as_meant`); "" is every command.
MOVED = {
    "": {"--data.backend": "--data.store"},
    "check_data": {f"--{name}": f"--data.{name}" for name in ("nan", "volumes_4d", "threads")},
}
RECIPES = {"train_3d": "train", "train_ldm": "ldm"}  # folder of configs/ that --config looks into


def _load_options(text: str) -> object:
    """Read YAML; what was saved before there was a choice means what was done then."""
    options = load_yaml(text)
    return as_meant(options) if isinstance(options, dict) else options


jsonargparse.set_loader("strict_yaml", _load_options, exceptions=(yaml.YAMLError,))


def main(
    fn: Callable[..., int | None], argv: list[str] | None = None, prog: str | None = None
) -> NoReturn:
    """Run `fn` from the command line and exit with its code.

    A `ValueError` raised by this project, or an `OSError` that names a file, is the user's
    mistake: one line on stderr, exit code 2. An error from inside a library is ours and keeps its
    traceback, as does every error where `VAE3D_DEBUG` is set. Signals that ask to stop end `fn`
    with one line and their code, see `vae3d.stop`.

    Args:
        fn: What to run. Its parameters and their docstring are the options and their help.
        argv: Arguments in place of `sys.argv[1:]`.
        prog: Name of the program in the help.
    """
    several_ranks = os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        with listening():
            code = _run(fn, argv, prog)
    except Stopped as stopped:
        say(f"{stopped}: what was finished is kept")
        code = stopped.code
    except Exception:
        if not several_ranks:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if several_ranks:
        _leave_at_once(code)
    sys.exit(code)


def _run(fn: Callable[..., int | None], argv: list[str] | None, prog: str | None) -> int:
    """Run `fn` from the command line and return its exit code; `MISTAKE` after telling of one."""
    try:
        kwargs = parse(fn, argv, prog)
        args = [kwargs.pop(name) for name in _positional(fn)]
        return fn(*args, **kwargs) or 0
    except (ValueError, OSError) as error:
        if os.environ.get("VAE3D_DEBUG") or not _is_users_mistake(error):
            raise
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {_one_line(error)}", file=sys.stderr)
        return MISTAKE
    except MemoryError as error:
        print(f"error: not enough memory: {_one_line(error)}", file=sys.stderr)
        return MISTAKE


def _leave_at_once(code: int) -> NoReturn:
    """End one of several ranks without the interpreter's own end.

    There gloo's threads now and then abort a process whose work is done (1 of 40, measured), and
    the whole run then counts as failed, or wait for Python's lock for ever.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(fn: Callable, argv: list[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Return the keyword arguments for `fn` from a command line and the YAML files it names.

    Raises:
        ValueError: An unknown or missing key, a value of the wrong type, a number out of range.
    """
    parser = _parser(fn, prog)
    argv = _spelled_out(fn, sys.argv[1:] if argv is None else argv)
    with _parsing(parser):
        kwargs = dict(vars(parser.instantiate_classes(parser.parse_args(argv))))
        if any(kwargs[old] is not None for old in FORMER.get(fn.__name__, {})):
            said = parser.parse_args(argv, defaults=False)
            kwargs = up_to_date(fn, kwargs, [name for name in kwargs if name in said])
    known = inspect.signature(fn).parameters
    options = {name: _plain_sockets(value) for name, value in kwargs.items() if name in known}
    check_ranges(fn.__name__, options)
    return options


def up_to_date(fn: Callable, options: dict[str, Any], said: Container[str] = ()) -> dict[str, Any]:
    """Bring options of old to their names of today, each with a line on what became of it.

    Args:
        fn: The function that the options are for.
        options: Its options by name, old names among them.
        said: Names of today that were given themselves; they win.
    """
    options = dict(options)
    for old, today in FORMER.get(fn.__name__, {}).items():
        value = options.pop(old, None)
        if value is None:
            continue
        renamed = today in inspect.signature(fn).parameters
        if renamed and today not in said:
            options[today] = value
        if os.environ.get("RANK", "0") == "0":
            what = f"is called {today} today" if renamed else today
            print(f"option {old}: {what}", file=sys.stderr)
    return options


def config_dict(fn: Callable, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the complete configuration of a call `fn(**kwargs)` as plain data.

    Defaults are filled in, also those of the classes in sockets, so that the result reads back
    equal even after a default has changed.
    """
    parser = _parser(fn)
    given = {name: _plain(value) for name, value in kwargs.items()}
    with _parsing(parser):
        config = yaml.safe_load(parser.dump(parser.parse_object(given), skip_none=False))
    known = inspect.signature(fn).parameters
    return {name: value for name, value in config.items() if name in known}


def save_config(path: Path, fn: Callable, kwargs: dict[str, Any]) -> None:
    """Write `config_dict(fn, kwargs)` as YAML; `--config path` then repeats the call."""
    write_text(path, yaml.safe_dump(config_dict(fn, kwargs), sort_keys=False, allow_unicode=True))


class _Parser(jsonargparse.ArgumentParser):
    """Takes note of what may be built, also for the parsers of the classes that sockets take."""

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument; jsonargparse copies this method for its groups."""
        action = super().add_argument(*args, **kwargs)
        _buildable.update(buildable(kwargs.get("type") or getattr(action, "_typehint", None)))
        return action


_buildable: set[type] = set()  # jsonargparse keeps a class's parser, so this outlives a call
_in_a_parser = ContextVar("_in_a_parser", default=False)


def _import_class(path: object, *_: Any, **__: Any) -> type:
    """Import what a recipe names, if a socket takes it; jsonargparse would import anything."""
    if isinstance(path, str) and path.isidentifier():  # jsonargparse knows what is loaded already
        import_module("vae3d.models.presets")
        known = (cls for base in _buildable for cls in classes_under(base))
        found = next((cls for cls in known if cls.__name__ == path), None)
        path = f"{found.__module__}.{path}" if found else path
    cls = import_class(path, tuple(_buildable))
    if is_contract(cls):
        raise ImportError(f"{path} is no class that a socket takes; it is what those derive from")
    return cls


@dataclasses.dataclass
class _Free:
    """Hides plain data from jsonargparse, which takes any `class_path: ...` for a class."""

    data: Any


def _free_value(value: Any, hint: Any, out: bool, handed_over: bool, *_: Any, **__: Any) -> Any:
    """Keep what stands where any value may stand as it is: hidden, and in the end plain again."""
    data = value.data if isinstance(value, _Free) else value
    hide = isinstance(data, (dict, list)) and not out and not handed_over
    return _Free(data) if hide else data


def _number(text: str) -> Any:
    """Read a number, true, false or null out of a text; text in a text is not read as YAML."""
    return _basic_load(text) if len(text) < MAX_NUMBER else text


def _while_parsing(name: str, ours: Callable[..., Any], *modules: ModuleType) -> Any:
    """Put `ours` in the place of a function of jsonargparse, for our parsers only.

    Returns:
        The function of jsonargparse.
    """
    theirs = getattr(modules[0], name)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (ours if _in_a_parser.get() else theirs)(*args, **kwargs)

    for module in modules:
        setattr(module, name, chosen)
    return theirs


# jsonargparse imports whatever a value names, and has no setting against it that knows of sockets.
_while_parsing("import_object", _import_class, _typehints, _actions)
# It builds a class of `class_path: ...` where any value may stand, and reads text in text as YAML.
_while_parsing("adapt_classes_any", _free_value, _typehints)
_while_parsing("is_importable_module_path", lambda path: False, _typehints)
_basic_load = _while_parsing("basic_json_or_yaml_load", _number, _typehints)


@contextmanager
def _parsing(parser: jsonargparse.ArgumentParser) -> Iterator[None]:
    """Put our rules for imports in force, and tell what `parser` cannot read in one line."""
    token = _in_a_parser.set(True)
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"--config: not a text file ({_one_line(error)})") from error
    except (jsonargparse.ArgumentError, ValueError) as error:
        options = [option[2:] for action in parser._actions for option in action.option_strings]
        raise ValueError(explained(" ".join(str(error).split()), options)) from error
    except RecursionError as error:
        raise ValueError("the options are nested too deeply") from error
    finally:
        _in_a_parser.reset(token)


def _parser(fn: Callable, prog: str | None = None) -> jsonargparse.ArgumentParser:
    """Build the parser of `fn`: `--config` files first, then one option per parameter."""
    positional = _positional(fn)
    parser = _Parser(
        prog=prog,
        usage=" ".join(["%(prog)s", *(name.upper() for name in positional), "[options]"]),
        description=inspect.cleandoc(fn.__doc__ or "").split("\n\nArgs:")[0],
        formatter_class=_Help,
        parser_mode="strict_yaml",
        exit_on_error=False,
        allow_abbrev=False,  # a slip must not be taken for another option
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    helps = {p.arg_name: p.description for p in docstring_parser.parse(fn.__doc__ or "").params}
    hints = typing.get_type_hints(fn) if positional else {}
    for name in positional:
        many = {"nargs": "+"} if typing.get_origin(hints[name]) is list else {}
        one = typing.get_args(hints[name])[0] if many else hints[name]
        parser.add_argument(name, type=one, help=helps[name], **many)
    parser.add_function_arguments(fn, skip=set(positional), sub_configs=True)
    for old, today in FORMER.get(fn.__name__, {}).items():
        hint = typing.get_type_hints(fn).get(today, Any)
        parser.add_argument(f"--{old}", type=hint | None, default=None, help=argparse.SUPPRESS)
    return parser


def _spelled_out(fn: Callable, argv: list[str]) -> list[str]:
    """Let `--fresh` be `--fresh=true`, a recipe's name its file, and old names those of today.

    What follows an option that takes several words is one list: `--trackers wandb tensorboard`.
    """
    hints = typing.get_type_hints(fn)
    argv = _listed({f"--{name}" for name, hint in hints.items() if _takes_words(hint)}, argv)
    flags = {f"--{name}" for name, hint in hints.items() if hint is bool}
    moved = MOVED[""] | MOVED.get(fn.__name__, {})
    gone = {f"--{old}" for old, today in FORMER.get(fn.__name__, {}).items() if today not in hints}
    folders = {
        "--config": RECIPES.get(fn.__name__),
        "--model": "model" if "model" in hints else None,
    }
    spelled: list[str] = []
    for before, arg, after in zip(["", *argv], argv, [*argv, ""][1:], strict=False):
        option, equals, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if equals and value == "--":  # argparse would drop it, and leave a list of nothing
            raise ValueError(f"{option}: -- is no value")
        folder = folders.get(option) if equals or not arg.startswith("--") else None
        # A class has capitals or dots, a text of YAML has more than letters.
        if folder and (option == "--config" or re.fullmatch("[a-z][a-z0-9_]*", value)):
            value = find_recipe(folder, value) if value != "null" else value
            arg = f"{option}={value}" if equals else value
        if arg.startswith("--") and option in moved:
            arg = moved[option] + equals + value
        bare = arg in gone and (not after or after.startswith("--"))
        if bare or (arg in flags and after.lower() not in ("true", "false")):
            arg = f"{arg}=true"
        spelled.append(arg)
    return spelled


def _takes_words(hint: object) -> bool:
    """Whether an option takes any number of texts, such as names of trackers."""
    one, *more = typing.get_args(hint) or [None]
    words = one is str or typing.get_origin(one) is typing.Literal
    return typing.get_origin(hint) is tuple and more == [...] and words


def _listed(options: set[str], argv: list[str]) -> list[str]:
    """Make one list of the words that follow each of `options`; one in YAML stays as it is."""
    listed: list[str] = []
    waiting = list(argv)
    while waiting:
        arg = waiting.pop(0)
        option, equals, word = arg.partition("=")
        words = [word] if equals else list(takewhile(lambda w: not w.startswith("--"), waiting))
        if option in options and words and not re.match(r"\[|null$", words[0]):
            arg = f"{option}={json.dumps(words)}"
            waiting = waiting if equals else waiting[len(words) :]
        listed.append(arg)
    return listed


def _positional(fn: Callable) -> list[str]:
    """Names of the parameters before `/`: positional in Python and on the command line."""
    parameters = inspect.signature(fn).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs and examples of a script's docstring as they are written."""


def _plain_sockets(value: Any) -> Any:
    """Unwrap class factories of jsonargparse into `partial(Class, **init_args)`, all levels."""
    if isinstance(value, partial):
        cls = value.func if isinstance(value.func, type) else value.args[-1]
        assert isinstance(cls, type), f"not a factory of a class: {value}"
        return partial(cls, **{k: _plain_sockets(v) for k, v in value.keywords.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        options = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: _plain_sockets(v) for k, v in options.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_sockets(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain_sockets(v) for k, v in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Turn options as a function takes them into plain data: dataclasses, paths, sockets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else describe(value)


def _is_users_mistake(error: Exception) -> bool:
    """Tell an error that our own code raised, or a file it names, from a defect further down."""
    if isinstance(error, OSError):
        return error.filename is not None or error.errno is not None
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    home = Path(__file__).resolve().parents[1]
    ours = ("vae3d", "loaders", "benchmarks", "train_3d.py", "evaluate.py")
    return any(raised_in.is_relative_to(home / name) for name in ours)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return (
        text if len(text) < LONG_LINE else f"{text[: LONG_LINE // 2]} ... {text[-LONG_LINE // 2 :]}"
    )
