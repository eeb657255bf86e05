"""What jsonargparse says of a command line or a recipe, in one line that says what to type."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from dis import get_instructions
from types import FunctionType

LONG_LINE = 1500  # characters of a message; jsonargparse repeats the whole value
WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
}
CLASS_PATH = re.compile(r"class_path='([\w.]+)'")
SOCKET = re.compile(r"Type collections\.abc\.Callable\[.*?\], ([\w.]+)\] expects a function")


def explained(said: str, options: Iterable[str]) -> str:
    """Say what jsonargparse means.

    Args:
        said: Its message, on one line.
        options: Names of all options, `data.root`.
    """
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', said)))
    if found := re.search(r"unrecognized arguments: (?:.*? )?--([^\s=]+)", said):
        return no_option(found[1], options)
    if found := re.search(r"(?:Option|Group '([\w.]+)' does not accept option) '([^']+)'", said):
        return unknown_option(key, ".".join(filter(None, found.groups())), said, options)
    if found := re.search(
        r"(\S+) is no class that a socket takes; (.*?)(?:\. Got value| - |$)", said
    ):
        return no_class(key, found[1], found[2], said)
    if key and (found := re.search(r"Unable to load config '(.*?)'", said)):
        return f"--{key} is {found[1]}; give a file, or its options one by one"
    if found := re.search(r"Union subtypes .*?Errors: - (?!Expected|Type )(.*?) - Expected", said):
        return f"--{key}: {found[1]}" if key else found[1]
    wanted = " or ".join(dict.fromkeys(wishes(said)))
    given = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", said)
    if key and wanted and given:
        return f"--{key} is {given[1][:200]}; give {wanted}"
    return said


def unknown_option(key: str, option: str, said: str, options: Iterable[str]) -> str:
    """Say that a command, a group or a class has no such option, and which are near.

    Args:
        key: Where it stands, empty for the command itself.
        option: Its name.
        said: What jsonargparse says; it names the class.
        options: Names of the command's options.
    """
    path = CLASS_PATH.search(said)
    if not (key and path):
        name = ".".join(filter(None, (key, option)))
        return no_option(name, options)
    cls = loaded(path[1])
    known = () if cls is object else inspect.signature(cls).parameters
    return f"--{key}.{option}: {cls.__name__} has no such option{nearest(option, known)}"


def no_class(key: str, given: str, why: str, said: str) -> str:
    """Say that a socket takes no such class, and which are near.

    Args:
        key: The socket.
        given: The name, as far as jsonargparse repeats it.
        why: What `import_class` said of it.
        said: What jsonargparse says; it names the base.
    """
    *_, base = map(loaded, ["", *SOCKET.findall(said)])
    if given.endswith(":"):  # where null is taken too, the name stands behind alone
        given = said.partition("Given value: ")[2].partition(". Got value")[0]
    rest = f"; {why}"
    if "." not in given and base is not object:
        rest = nearest(given, {cls.__name__ for cls in classes_under(base)})
    return f"--{key}: no class {given}{rest}"


def no_option(name: str, options: Iterable[str]) -> str:
    """Say that a command has no such option, and which are near."""
    return f"no option --{name}{nearest(name, options, '--')}"


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """The names that a mistyped one may have meant, as the end of a message."""
    known = sorted(filter(None, known))
    folded = {one.casefold(): one for one in known}
    group, dot, rest = name.casefold().rpartition(".")
    near = [
        folded[one]
        for one in get_close_matches(name.casefold(), folded, 2, 0.7)
        # What a long group has in common is not what is meant.
        if one.rpartition(".")[0] != group or get_close_matches(rest, [one[len(group + dot) :]])
    ]
    if near:
        return f"; did you mean {' or '.join(before + one for one in near)}?"
    return f"; there are {', '.join(known)}" if 0 < len(known) < 15 else "; see --help"


def loaded(path: str) -> type:
    """The class of this name, if its module is loaded; else `object`, of which nothing is known."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, object)


def classes_under(base: type) -> Iterator[type]:
    """The loaded classes that a socket of this base takes."""
    todo = [base]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if not (is_contract(cls) or cls.__name__.startswith("_")):
            yield cls


def is_contract(cls: type) -> bool:
    """Whether a class only says what those under it do: a method of its own does nothing."""
    return any(inspect.isfunction(method) and only_refuses(method) for method in vars(cls).values())


def only_refuses(method: FunctionType) -> bool:
    """Whether a method raises NotImplementedError whatever it is given: it never returns."""
    if "NotImplementedError" not in method.__code__.co_names:
        return False  # of nearly all; to look at the steps of each is half the time of a parser
    steps = {step.opname for step in get_instructions(method)}
    return not steps & {"RETURN_VALUE", "RETURN_CONST"}


def wishes(said: str) -> Iterator[str]:
    """What jsonargparse would have taken, in words."""
    for literal, kind in re.findall(
        r"Expected an? (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>)", said
    ):
        yield " | ".join(re.findall(r"'(.*?)'", literal)) if literal else WORDS.get(kind, kind)
