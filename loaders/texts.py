"""YAML and JSON from outside, read within bounds: a file cannot cost more than its size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 1_000_000  # of one YAML text
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
        return load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file that can be read ({error})") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        ValueError: Not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read ({error})") from error


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
