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
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import jsonargparse
import yaml

from loaders.whole import write_text
from vae3d.models.spec import describe

MISTAKE = 2  # exit code when the user's input is at fault
INTERRUPTED = 130  # exit code after Ctrl-C, 128 + SIGINT
MAX_ALIASES = 100  # a hand-written YAML has a few; thousands are an expansion bomb


def main(fn: Callable[..., int | None], argv: list[str] | None = None, prog: str | None = None):
    """Run `fn` from the command line and exit with its code.

    A `ValueError` raised by this project, or an `OSError` that names a file, is the user's
    mistake: one line on stderr, exit code 2. An error from inside a library is ours and keeps its
    traceback, as does every error where `VAE3D_DEBUG` is set.

    Args:
        fn: What to run. Its parameters and their docstring are the options and their help.
        argv: Arguments in place of `sys.argv[1:]`.
        prog: Name of the program in the help.
    """
    several_ranks = os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        code = _run(fn, argv, prog)
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
    except KeyboardInterrupt:  # before training, or outside of it; there it is caught and saved
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


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
        ValueError: An unknown or missing key, or a value of the wrong type.
    """
    parser = _parser(fn, prog)
    try:
        given = parser.parse_args(_flags_as_options(fn, sys.argv[1:] if argv is None else argv))
        kwargs = dict(vars(parser.instantiate_classes(given)))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_one_line(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config: not a text file ({_one_line(error)})") from error
    kwargs.pop("config", None)
    return {name: _plain_sockets(value) for name, value in kwargs.items()}


def check_at_least(low: float, **options: float | None) -> None:
    """Raise ValueError, by the name of the option, for a number below `low`; None passes."""
    for name, value in options.items():
        if value is not None and not value >= low:
            raise ValueError(f"--{name} is {value}; give {low} or more")


def config_dict(fn: Callable, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the complete configuration of a call `fn(**kwargs)` as plain data.

    Defaults are filled in, also those of the classes in sockets, so that the result reads back
    equal even after a default has changed.
    """
    parser = _parser(fn)
    given = {name: _plain(value) for name, value in kwargs.items()}
    try:
        complete = parser.parse_object(given)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_one_line(error)) from error
    config = yaml.safe_load(parser.dump(complete, skip_none=False))
    config.pop("config", None)
    return config


def save_config(path: Path, fn: Callable, kwargs: dict[str, Any]) -> None:
    """Write `config_dict(fn, kwargs)` as YAML; `--config path` then repeats the call."""
    write_text(path, yaml.safe_dump(config_dict(fn, kwargs), sort_keys=False, allow_unicode=True))


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without its surprises: lost duplicates, `1e-3` as text, dates, alias bombs."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own protocol
        first: [
            (tag, regexp)
            for tag, regexp in pairs
            if not tag.endswith((":timestamp", ":float", ":bool"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    num_aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"more than {MAX_ALIASES} aliases in one file")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


# YAML 1.1 asks a float for a dot; people and NumPy write 1e-3.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
# `amp: off` is a word, not False.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
jsonargparse.set_loader(
    "strict_yaml", lambda text: yaml.load(text, _StrictLoader), exceptions=(yaml.YAMLError,)
)


def _parser(fn: Callable, prog: str | None = None) -> jsonargparse.ArgumentParser:
    """Build the parser of `fn`: `--config` files first, then one option per parameter."""
    positional = _positional(fn)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=" ".join(["%(prog)s", *(name.upper() for name in positional), "[options]"]),
        description=inspect.cleandoc(fn.__doc__ or "").split("\n\nArgs:")[0],
        formatter_class=_Help,
        parser_mode="strict_yaml",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    helps = {p.arg_name: p.description for p in docstring_parser.parse(fn.__doc__ or "").params}
    hints = typing.get_type_hints(fn) if positional else {}
    for name in positional:
        many = {"nargs": "+"} if typing.get_origin(hints[name]) is list else {}
        one = typing.get_args(hints[name])[0] if many else hints[name]
        parser.add_argument(name, type=one, help=helps[name], **many)
    parser.add_function_arguments(fn, skip=set(positional), sub_configs=True)
    return parser


def _flags_as_options(fn: Callable, argv: list[str]) -> list[str]:
    """Let `--fresh` stand for `--fresh=true`."""
    hints = typing.get_type_hints(fn)
    flags = {f"--{name}" for name, hint in hints.items() if hint is bool}
    following = [*argv, ""][1:]
    return [
        f"{arg}=true" if arg in flags and after.lower() not in ("true", "false") else arg
        for arg, after in zip(argv, following, strict=True)
    ]


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
    ours = ("vae3d", "loaders", "train_3d.py", "evaluate.py")
    return any(raised_in.is_relative_to(home / name) for name in ours)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
