"""What is wrong with a key, and what would be right, in one line."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dpo_dist.config.data import DataSource
from dpo_dist.config.foreign import FOREIGN_ALSO, FOREIGN_KEYS, FOREIGN_SOURCE_KEYS, FOREIGN_VALUES, FOREIGN_WITHIN
from dpo_dist.config.guesses import guess
from dpo_dist.config.models import RunConfig
from dpo_dist.config.section import UNION_TAGS

KeyPath = tuple[str | int, ...]

# `max_token` and `pad_token` are no credentials, though they end like `hub_token`.
_SECRET = re.compile(
    r"(?<!(?:max|min|num|new|pad|eos|bos|unk|sep|cls)_)(?<!mask_)token$|secret|passw|credential|(api|access|private)_?key",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{30}")  # a token of the hub
_HASH = re.compile(r"[0-9a-fA-F]{40}")  # a key of wandb; or a commit
_NAME_HERE = re.compile(r"; (?:write|the name here is|did you mean) ([a-z]+(?:\.[a-z_0-9]+)?)")
_LONGEST_VALUE = 80  # characters of a value that are shown


def _section_fields(section: str) -> Mapping[str, FieldInfo]:
    model = RunConfig.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model.model_fields


SECTIONS = tuple(RunConfig.model_fields)
KEYS = {section: tuple(_section_fields(section)) for section in SECTIONS}
# Of a name that two sections have, the first one is meant.
SECTION_OF = {key: section for section, keys in reversed(KEYS.items()) for key in keys}


def dotted(path: KeyPath) -> str:
    """A key's path as it is written in an override."""
    return ".".join(str(part) for part in path)


def key_path(error: ErrorDetails) -> KeyPath:
    """Where an error is, without what pydantic calls the branches of a union."""
    return tuple(part for part in error["loc"] if part not in UNION_TAGS)


def shown(path: KeyPath, value: Any) -> str:
    """`section.key=value`; long values are cut, and what may be a secret by its key or its value is left out."""
    text = value if isinstance(value, str) and value.isprintable() and value.strip() else json.dumps(value, default=str)
    return f"{dotted(path)}={_without_secret(path, text)}"


def _without_secret(path: KeyPath, text: str) -> str:
    if any(isinstance(part, str) and _SECRET.search(part) for part in path) or _SECRET_VALUE.search(text):
        return "(not shown)"
    if _HASH.fullmatch(text) and "revision" not in str(path[-1]):
        return "(not shown)"
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def field_at(path: KeyPath) -> FieldInfo | None:
    """The declared option at a path; for an element of data.train and data.evaluation, of its DataSource."""
    names = [part for part in path if isinstance(part, str)]
    if not names or names[0] not in KEYS:
        return None
    fields = RunConfig.model_fields if len(names) == 1 else _section_fields(names[0])
    if len(names) == 3 and names[1] in ("train", "evaluation"):
        fields = DataSource.model_fields
    return fields.get(names[-1])


def describe(error: ErrorDetails) -> str:
    """One line for one error of pydantic's."""
    path, kind, value = key_path(error), error["type"], error["input"]
    if kind == "extra_forbidden":
        return unknown_key(path, value)
    if kind == "missing":
        field = field_at(path)
        meaning = " ".join((field.description or "").split()) if field else ""
        return f"{dotted(path)} is missing, and has no default; set it: {meaning}"
    return f"{shown(path, value)} {_wrong_value(error)}"


def _wrong_value(error: ErrorDetails) -> str:
    """`what is wrong; what would be right` for a value of a known key."""
    path, kind, value, context = key_path(error), error["type"], error["input"], error.get("ctx", {})
    bounds = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">=")}
    bounds |= {"less_than": ("lt", "<"), "less_than_equal": ("le", "<=")}
    if kind in bounds:
        name, sign = bounds[kind]
        return f"is out of range; it must be {sign} {context[name]}"
    if kind == "literal_error":
        or_list = ", or a list in brackets" if error["loc"][-1] == "one" else ""
        return f"is not known; it must be {context['expected']}{or_list}{_did_you_mean(value, path)}"
    if kind == "dict_type" and path[-1] == "columns":
        return "is not a mapping; write {prompt: question}: columns as they are read, and what they are called"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = KEYS.get(str(path[-1]), ()) if len(path) == 1 else tuple(DataSource.model_fields)
        example = _as_source(path, value) if len(path) > 1 and isinstance(value, str) else "`key: value`"
        return f"is not a mapping; write {example} with the keys {', '.join(keys)}"
    if kind == "list_type" and path[:1] == ("data",) and isinstance(value, str | dict):
        return f"is not a list of data sets; write [{_as_source(path, value)}]"
    if kind in ("int_parsing", "int_type", "int_from_float", "int_parsing_size"):
        return "is not a whole number; write one, without a unit"
    if kind in ("float_parsing", "float_type"):
        return "is not a number; write one, without a unit"
    texts = {
        "value_error": "is true or false, not a number; write a number",
        "finite_number": "is not finite; write a finite number",
        "bool_type": "is neither true nor false; write one of them",
        "string_type": "is not text; write text, in quotes if it looks like something else",
        "string_pattern_mismatch": "is empty; write a name or path, or leave the key out",
        "list_type": "is not a list; write it in brackets, [] for none",
        "too_short": "is empty; give at least one element",
    }
    return texts.get(kind) or f"is not valid ({error['msg']}); see `dpo-dist schema`"


def _as_source(path: KeyPath, value: Any) -> str:
    """What stands in place of a data set, written as one: `{path: pairs.jsonl}`."""
    if isinstance(value, dict):
        return "{path: ..., split: ...}"
    text = _without_secret(path, value)
    return f"{{path: {text if re.fullmatch(r'[A-Za-z./~][A-Za-z0-9./_-]*', text) else json.dumps(text)}}}"


def _did_you_mean(value: Any, path: KeyPath) -> str:
    """Ending of a sentence that suggests one of the words an option knows."""
    field = field_at(path)
    words = re.findall(r"Literal\[(.*?)\]", str(field.annotation)) if field else []
    choices = re.findall(r"'(.*?)'", words[0]) if words else []
    word = str(value).lower().removeprefix("torch.")
    meant = FOREIGN_VALUES.get(dotted(path[:2]), {}).get(word) or guess(word, choices)
    also = f" with {FOREIGN_ALSO[word]}" if word in FOREIGN_ALSO else ""
    return f" (did you mean {meant}{also}?)" if meant else ""


def unknown_key(path: KeyPath, value: Any) -> str:
    """One line for a key that does not exist here: its right place, its name here, or the nearest name."""
    key, where = str(path[-1]), dotted(path[:-1])
    text = shown(path, value) if not isinstance(value, dict | list) else dotted(path)
    if len(path) > 2:
        return f"{text} is not a key of a data set; {_advice_for_source(key)}"
    at = f"in section {where}" if where else "at top level"
    section, dot, name = key.partition(".")
    if dot and not where and section in SECTIONS:
        return f"{text} is one dotted key; write {key} nested: `{section}: {{{name}: ...}}`"
    if key in FOREIGN_WITHIN.get(where, {}):
        return f"{text} is not a key {at}; {FOREIGN_WITHIN[where][key]}"
    if key in SECTION_OF and SECTION_OF[key] != where:
        return f"{text} is not a key {at}; write {SECTION_OF[key]}.{key}"
    if key in FOREIGN_KEYS:
        return f"{text} is not a key {at}; {FOREIGN_KEYS[key]}"
    if (meant := guess(key, KEYS.get(where, SECTIONS))) is not None:
        return f"{text} is not a key {at}; did you mean {where + '.' if where else ''}{meant}?"
    if (meant := guess(key, SECTION_OF)) is not None:
        return f"{text} is not a key {at}; did you mean {SECTION_OF[meant]}.{meant}?"
    return f"{text} is not a key {at}; there are {', '.join(KEYS.get(where, SECTIONS))}"


def meant_keys(error: ErrorDetails) -> set[str]:
    """The keys that are there under an unknown name or in a wrong place: these are not missing as well."""
    found = _NAME_HERE.search(describe(error)) if error["type"] == "extra_forbidden" else None
    if not found:
        return set()
    name, value = found.group(1), error["input"]
    return {f"{name}.{key}" for key in value} if name in SECTIONS and isinstance(value, dict) else {name}


def _advice_for_source(key: str) -> str:
    if key in FOREIGN_SOURCE_KEYS:
        return FOREIGN_SOURCE_KEYS[key]
    meant = guess(key, DataSource.model_fields)
    return f"did you mean {meant}?" if meant else f"there are {', '.join(DataSource.model_fields)}"
