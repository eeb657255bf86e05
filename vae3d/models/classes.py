"""Classes by their dotted names: of which base, told before a module is imported. No torch.

Importing a module runs it, so a name from a file is first looked up in the modules that are loaded
already, and else in the source of its module: the bases of the `class` statement and the `import`
statements are followed until they lead to a loaded class. Only what the source does not say (a
class that a function returns) is refused although it might be one.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from typing import Any, TypeVar

Made = TypeVar("Made")


def buildable(hint: Any) -> set[type]:
    """Classes that a type hint lets a recipe build: its dataclasses, and the bases of its sockets.

    Example:
        >>> buildable(Callable[[int], Block] | None)
        {Block}
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return {hint}
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is not collections.abc.Callable:
        return {cls for argument in inside for cls in buildable(argument)}
    base = inside[-1] if inside else Any
    if not isinstance(base, type) or base.__module__ in ("builtins", "typing"):
        return set()
    return {base}


def import_class(path: object, bases: tuple[type, ...]) -> type:
    """Import `module.Class`, one of `bases` or a class under one.

    Raises:
        ImportError: It is none, which is known before anything is imported; or its import fails.
    """
    module, _, name = str(path).rpartition(".")
    found = getattr(import_module(module), name, None) if names_class(path, bases) else None
    if isinstance(found, type) and issubclass(found, bases):
        return found
    why = "give one that is written as a `class` statement under the socket's base class"
    if not module:
        why = "is it mistyped? A class of your own is named with its module"
    elif all(map(str.isidentifier, module.split("."))) and not _find(module):
        why = f"there is no module {module}"
    raise ImportError(f"{path} is no class that a socket takes; {why}")


def made(option: str, factory: Callable[[], Made]) -> Made:
    """Build what an option names.

    Args:
        option: Its name, for the message.
        factory: A class with its arguments.

    Raises:
        ValueError: The arguments do not go together, whoever finds out: the layers of torch and
            other libraries do so in errors of any type.
    """
    try:
        return factory()
    except ValueError:
        raise
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())[:500]
        raise ValueError(f"{option}: cannot be built with these options ({why})") from error


def names_class(path: object, bases: tuple[type, ...]) -> bool:
    """Whether `path` names one of `bases` or a class under one; imports nothing.

    Args:
        path: `module.Class`.
        bases: The classes that are allowed, with all that derive from them.
    """
    return isinstance(path, str) and _leads_to(path, bases, set())


def _leads_to(path: str, bases: tuple[type, ...], seen: set[str]) -> bool:
    module, _, name = path.rpartition(".")
    if not module or path in seen or not path.replace(".", "_").isidentifier():
        return False
    seen.add(path)
    loaded = sys.modules.get(module)
    found = getattr(loaded, "__dict__", {}).get(name)
    if found is None and module.split(".")[0] in ("vae3d", "loaders"):
        found = getattr(loaded, name, None)  # may import, but only what stands in our own tables
    if found is not None:
        return isinstance(found, type) and issubclass(found, bases)
    return any(_leads_to(behind, bases, seen) for behind in _behind(module, name))


def _behind(module: str, name: str) -> list[str]:
    """Dotted names that `name` stands for in the source of `module`: its bases, or its origin."""
    imported: dict[str, str] = {}
    written: list[ast.expr] = []
    stars: list[str] = []
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                stars += [f"{node.module}.{name}"] * (alias.name == "*")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                imported[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ClassDef) and node.name == name:
            written += node.bases
        elif isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            written += [node.value]
    behind = [imported[name]] if name in imported else []
    for expression in written:
        # Of `Block[int]` the class is `Block`; a call or another expression is no dotted name.
        named = expression.value if isinstance(expression, ast.Subscript) else expression
        first, dot, rest = ast.unparse(named).partition(".")
        behind.append(imported.get(first, f"{module}.{first}") + dot + rest)
    return behind or stars


def _statements(module: str) -> Iterator[ast.AST]:
    """Nodes of a module's source, `from` with absolute names; none where there is no source."""
    spec = _find(module)
    try:
        source = spec and spec.loader and spec.loader.get_source(module)  # type: ignore[attr-defined]
        nodes = list(ast.walk(ast.parse(source or "")))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level and spec:
                node.module = resolve_name("." * node.level + (node.module or ""), spec.parent)
    except (AttributeError, ImportError, SyntaxError, ValueError, RecursionError):
        return
    yield from nodes


def _find(module: str) -> ModuleSpec | None:
    """`importlib.util.find_spec` without its import of the packages above."""
    package, _, last = module.rpartition(".")
    folders = None
    if package:
        above = sys.modules.get(package) or _find(package)
        folders = _folders(above)
        if folders is None:
            return None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(module, folders)
        except KeyError:  # a folder without __init__.py asks for the loaded package above it
            spec = ModuleSpec(module, None, is_package=True)
            spec.submodule_search_locations = [f"{folder}/{last}" for folder in folders or ()]
        if spec:
            return spec
    return None


def _folders(package: types.ModuleType | ModuleSpec | None) -> list[str] | None:
    """Where the modules of a package lie; None for what is no package."""
    name = "submodule_search_locations" if isinstance(package, ModuleSpec) else "__path__"
    found = getattr(package, name, None)
    return None if found is None else list(found)
