"""YAML as its 1.2 core schema reads it, with the line of every key; a key that stands twice is an error.

PyYAML follows YAML 1.1, where `on` and `no` are truth values (`prefix_sharing: off` would become False) and `5e-7` is
text.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class YamlError(ValueError):
    """The text is not usable YAML. `line` is 1-based, or None."""

    def __init__(self, line: int | None, text: str) -> None:
        super().__init__(text)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Keys are always text: `1: x` has the key "1", and there are no merge keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read as text."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """PyYAML writes Unicode's own line breaks (U+0085) unescaped, and reads them back as spaces; not so in quotes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {
    first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), ["" if c == "\0" else c for c in _first])


@dataclass(frozen=True)
class Document:
    """A YAML text as Python values, and where each of them stands."""

    value: Any
    lines: dict[KeyPath, int]
    repeated: tuple[tuple[KeyPath, int], ...]


def parse(text: str) -> Document:
    """Read one YAML document.

    Raises:
        YamlError: if it is not YAML, or holds anything but text, numbers, truth values, lists and mappings.
    """
    lines: dict[KeyPath, int] = {}
    repeated: list[tuple[KeyPath, int]] = []
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _walk(node, (), lines, repeated, loader, frozenset())
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else None, error.problem or error.context or "cannot be read") from None
    except yaml.YAMLError as error:
        raise YamlError(None, " ".join(str(error).split())) from None
    except YamlError:
        raise
    except (ValueError, OverflowError) as error:  # e.g. a number with more digits than Python converts
        raise YamlError(None, str(error)) from None
    except RecursionError:
        raise YamlError(None, "it is nested too deeply") from None
    return Document(value, lines, tuple(repeated))


def _walk(
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    repeated: list[tuple[KeyPath, int]],
    loader: yaml.SafeLoader,
    open_nodes: frozenset[int],
) -> None:
    """Note the line of everything below a node, and the keys that stand twice in one mapping."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in open_nodes:
        raise YamlError(node.start_mark.line + 1, "an anchor refers to itself")
    open_nodes |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(key_node.start_mark.line + 1, "a key must be text")
            key = key_node.value
            if key in seen:
                repeated.append(((*path, key), key_node.start_mark.line + 1))
            seen.add(key)
            lines[*path, key] = key_node.start_mark.line + 1
            _walk(value_node, (*path, key), lines, repeated, loader, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines, repeated, loader, open_nodes)


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
