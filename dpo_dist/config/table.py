"""Every option as a table: the page `docs/configuration.md`, which `dpo-dist schema --table` prints."""

import json
from typing import Any

from dpo_dist.config.loader import json_schema

_HEAD = """# Every option

Written by `dpo-dist schema --table`. In a file an option stands under its section (`train:` and below it `seed: 1`), on
the command line it is `train.seed=1`. Keys without a default are required.
"""
_SOURCE = "data.train.0, data.evaluation.0"
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def options_table() -> str:
    """Markdown: for each section its meaning, and a row for each key with values, default and meaning."""
    schema = json_schema()
    definitions = schema["$defs"]
    parts = [_HEAD]
    for section, reference in schema["properties"].items():
        keys = definitions[reference["$ref"].rsplit("/", 1)[1]]
        parts.append(_section(section, keys))
    parts.append(_section(_SOURCE, definitions["DataSource"]))
    return "\n".join(parts)


def _section(name: str, definition: dict[str, Any]) -> str:
    rows = [
        f"| `{key}` | {_values(option)} | {_default(option)} | {option['description'].replace('|', chr(92) + '|')} |"
        for key, option in definition["properties"].items()
    ]
    head = ["| key | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {name}", "", definition["description"], "", *head, *rows, ""])


def _default(option: dict[str, Any]) -> str:
    return f"`{json.dumps(option['default'])}`" if "default" in option else "-"


def _values(option: dict[str, Any]) -> str:
    """What may be written: the words, or the type with its bounds."""
    if choices := option.get("anyOf") or option.get("oneOf"):
        return " or ".join(_values(choice) for choice in choices)
    if words := option.get("enum") or ([option["const"]] if "const" in option else []):
        return ", ".join(f"`{word}`" for word in words)
    if option.get("type") == "array":
        return f"list of {_values(option['items'])}"
    if "$ref" in option:
        return f"data sets, see {_SOURCE}"
    kinds = {"string": "text", "boolean": "`true`, `false`", "integer": "whole number", "object": "mapping"}
    kind = kinds.get(option["type"], option["type"])
    bounds = ", ".join(f"{sign} {option[bound]}" for bound, sign in _BOUNDS.items() if bound in option)
    return f"{kind} {bounds}".rstrip()
