"""YAML and JSON from outside, read within bounds: a file cannot cost more than its size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]  # plain data, as in JSON

MAX_CHARACTERS = 1_000_000  # of one YAML text
MAX_BYTES = 2**28  # of any other text: some million volumes
MAX_VALUES = 100_000  # after all aliases are replaced by what they stand for; PyYAML takes seconds
MAX_DEPTH = 100
MAX_NUMBER = 100  # characters; Python takes quadratic time over what is longer


def load_yaml(text: str) -> Any:
    """Return what a YAML text says, as plain data.

    Beyond plain YAML: `1e-3` is a number; `off`, `yes` and dates are words; a key given twice is
    an error; merge keys (`<<: *base`) are known.

    Raises:
        yaml.YAMLError: Not YAML, too large, or nested too deeply.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS} characters of YAML")
    try:
        return yaml.load(text, _Strict)
    except (ValueError, LookupError, AttributeError) as error:  # a tag on what it does not fit
        raise yaml.YAMLError(f"a value that does not fit its type ({error})") from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says, as plain data.

    Raises:
        ValueError: Not YAML, too large, or nested too deeply.
    """
    try:
        return load_yaml(read_text(path, 4 * MAX_CHARACTERS))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file that can be read ({error})") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        ValueError: Not JSON, or nested too deeply.
    """
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON that can be read ({error})") from error
    return load_json(text, str(path))


def load_json(text: str, where: str) -> object:
    """Return what a JSON text says.

    Args:
        text: The text.
        where: Where it stands, for the message.

    Raises:
        ValueError: Not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON that can be read ({error})") from error


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Return a UTF-8 text, unless its file is larger than any such text is.

    Raises:
        ValueError: Too large; UnicodeDecodeError, which is one, where it is no text.
    """
    return read_bytes(path, most).decode("utf-8")


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file that is no larger than `most`.

    Raises:
        ValueError: Too large, or a pipe or device, which may have no end.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: larger than {most} bytes, which no such file is")
    return data


def misfit(value: object, shape: object, where: str = "") -> str | None:
    """Where plain data from outside is not of the shape that it has to be; None where it is.

    Args:
        value: What a file held.
        shape: A type; a tuple of shapes, one of which it has to be, None for null; `[shape]` for a
            list; `{"key": shape}` for a mapping that has these keys, `{str: shape}` for any keys.
        where: Name of the value.

    Example:
        >>> misfit({"step": "x"}, {"step": int, "best": (float, None)})
        'step'
    """
    here = where or "all of it"
    if isinstance(shape, tuple):
        return None if any(misfit(value, one) is None for one in shape) else here
    if isinstance(shape, list) and isinstance(value, (list, tuple)):
        parts = [(str(number), one, shape[0]) for number, one in enumerate(value)]
    elif isinstance(shape, dict) and isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return here
        keys = value if str in shape else shape
        if lacking := [key for key in keys if key not in value]:
            return f"{where}.{lacking[0]}".strip(".")
        parts = [(key, value[key], shape.get(str, shape.get(key))) for key in keys]
    else:
        return None if is_of(value, shape) else here
    found = (misfit(part, of, f"{where}.{key}".strip(".")) for key, part, of in parts)
    return next(filter(None, found), None)


def is_of(value: object, kind: object) -> bool:
    """Whether a value is of a type, None for null; true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(kind, type):
        return kind is bool or value is kind
    if isinstance(value, int) and abs(value) >= 2**63:  # NumPy has no such number
        return False
    if kind is float and isinstance(value, int):
        return abs(value) < 2**1000  # Python's integers have no end
    return isinstance(value, kind)


class _Strict(yaml.SafeLoader):
    """Safe YAML without its surprises: lost duplicates, `1e-3` as text, dates, alias bombs."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own protocol
        first: [
            (tag, regexp)
            for tag, regexp in pairs
            if not tag.endswith((":timestamp", ":float", ":bool"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.count = self.depth = 0
        self.extent: dict[yaml.Node, tuple[int, int]] = {}  # values in a node, levels below it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Measure each node before anything is made of it; PyYAML recurses into the nodes."""
        anchor = self.peek_event().anchor if self.check_event(yaml.AliasEvent) else None
        self.depth += 1
        self.count += 1
        check_extent(self.count, self.depth)
        node = super().compose_node(parent, index)
        assert node is not None
        self.depth -= 1
        if anchor is None:
            self.extent[node] = self.measure(node)
        elif node not in self.extent:
            raise yaml.YAMLError(f"the alias *{anchor} stands for something that holds it")
        size, levels = self.extent[node]
        check_extent(size, self.depth + 1 + levels)
        return node

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Values in a node, aliases counted in full, and the levels that it has."""
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        extents = [self.extent[part] for part in parts]
        size = 1 + sum(size for size, _ in extents)
        return size, max((1 + levels for _, levels in extents), default=0)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Refuse a number that is too long to be one."""
        node = super().compose_scalar_node(anchor)
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is written twice; one that comes in by `<<` is no second time."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"key {key.value!r} is given twice, line {line}")
            seen.add((key.tag, key.value))
        return node


def check_extent(size: int, depth: int) -> None:
    """Raise YAMLError for more values, or more levels of them, than a file may hold."""
    if size > MAX_VALUES:
        raise yaml.YAMLError(f"more than {MAX_VALUES} values, with its aliases written out")
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")


# YAML 1.1 asks a float for a dot; people and NumPy write 1e-3.
_Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
# `amp: off` is a word, not False.
_Strict.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
