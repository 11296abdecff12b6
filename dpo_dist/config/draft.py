"""A configuration while it is read: raw values, where each of them came from, and what is wrong so far.

An override is `section.key=value`; the value is read as YAML. `null` takes the key out, so that its default holds:
`train.num_train_epochs=null`. No value at all is refused: `loss.beta=$UNSET` would otherwise mean the default.
Elements of a list are named by their index, and the index after the last one adds an element:
`data.train.0.path=pairs.jsonl`. A key is given once; only the very same words may be repeated.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.config.data import DataSource
from dpo_dist.config.messages import SECTIONS, KeyPath, dotted, field_at, shown
from dpo_dist.config.yaml_lines import YamlError, parse
from dpo_dist.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass
class Draft:
    """Raw values of a file and its overrides."""

    file: Path
    values: dict[str, Any]
    origins: dict[KeyPath, int | None]
    """Line in the file of every key and element; None: an override."""
    problems: dict[KeyPath, tuple[int | None, str]] = field(default_factory=dict)
    """What is wrong with a key, and the line to name (None: an override, 0: none)."""
    given: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Overrides so far: the parts of the key, and all of the text."""

    def blame(self, path: KeyPath, text: str) -> None:
        """Note what is wrong with a key, where it stands; the first verdict on a key counts."""
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.origins), None)
        self.problems.setdefault(path, (0 if known is None else self.origins[known], text))

    def touches_problem(self, path: KeyPath) -> bool:
        """Whether a key, a part of it, or what it is part of is already known to be wrong."""
        return any(bad[: len(path)] == path[: len(bad)] for bad in self.problems)

    def lines(self) -> list[str]:
        """Every problem after its place: those of the file from top to bottom, then those of the command line."""
        ordered = sorted(self.problems.values(), key=lambda problem: sys.maxsize if problem[0] is None else problem[0])
        places = {None: COMMAND_LINE, 0: f"{self.file}"}
        return [f"{places.get(line, f'{self.file}:{line}')}: {text}" for line, text in ordered]

    def apply_override(self, override: str) -> None:
        """Set or take out one value, or note why that cannot be done."""
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            self.problems.setdefault((override,), (None, f"{override} is not an override; write section.key=value"))
            return
        if self.given.get(tuple(parts)) == override:  # launch scripts hand the arguments they have read on as they are
            return
        try:
            value = self._value_of(parts, text)
            path = _set(self.values, parts, value)
        except _CannotSetError as error:
            self.problems.setdefault(tuple(parts), (None, str(error)))
            return
        self.given[tuple(parts)] = override
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = None
        for end in range(1, len(path)):  # what the override has made around its key; a known section is never at fault
            if path[:end] not in self.origins and (end > 1 or path[0] not in SECTIONS):
                self.origins[path[:end]] = None

    def _value_of(self, parts: list[str], text: str) -> Any:
        """The value an override gives to a key, as far as it may be given."""
        name = ".".join(parts)
        try:
            document = parse(text)
        except YamlError as error:
            raise _CannotSetError(f"{name} is not valid YAML ({error}); put the value in quotes") from None
        if not text.strip():
            raise _CannotSetError(f"{name}= is empty; write a value, or {name}=null to remove the key")
        if not document.lines:
            raise _CannotSetError(f"{name} has only a comment as its value; put the value in quotes")
        what = shown(tuple(parts), document.value)
        if tuple(parts) in self.given:
            raise _CannotSetError(f"{what} is given twice on the command line; leave one out")
        if (
            parts[:2] in (["data", "train"], ["data", "evaluation"])
            and parts[2:3]
            and parts[2] in DataSource.model_fields
        ):
            meant = shown((*parts[:2], 0, *parts[2:]), document.value)
            raise _CannotSetError(f"{what} is not an element of the list; did you mean {meant}?")
        return document.value


def read_draft(file: Path) -> Draft:
    """Read a YAML file without looking at what its keys mean.

    Raises:
        ConfigError: if it cannot be read, is not YAML, or is no mapping.
    """
    try:
        document = parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); give a YAML file") from error
    except YamlError as error:
        where = f"{file}:{error.line}" if error.line else f"{file}"
        raise ConfigError(
            f"{where}: not valid YAML ({error}); check the indentation, and put text with special characters in quotes"
        ) from error
    if document.value is None:
        raise ConfigError(f"{file} is empty; give the sections {', '.join(SECTIONS)}")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{file} holds no mapping; give the sections {', '.join(SECTIONS)}, each with its keys")
    values = {key: {} if value is None and key in SECTIONS else value for key, value in document.value.items()}
    draft = Draft(file, values, dict(document.lines))
    for path, line in document.repeated:
        draft.problems[path] = (line, f"{dotted(path)} stands twice in the file; leave one out")
    return draft


class _CannotSetError(Exception):
    """What is wrong with an override, and what would be right."""


def _set(values: dict[str, Any], parts: list[str], value: Any) -> KeyPath:
    """Set a value deep inside mappings and lists, or take it out if it is None; returns its path."""
    container: Any = values
    path: list[str | int] = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        key: Any = _key_of(container, part, parts, dotted(tuple(path)))
        path.append(key)
        is_new = key == len(container) if isinstance(container, list) else key not in container
        if following is None and value is None:
            if not is_new:
                container.pop(key)
            elif isinstance(container, list):
                raise _CannotSetError(f"{'.'.join(parts)}=null removes an element that is not there; leave it out")
            elif field_at(tuple(path)) is None:
                container[key] = None  # stays, to be refused as unknown
            break
        if is_new and isinstance(container, list):
            container.append(None)
        if following is None:
            container[key] = value
        elif is_new or container[key] is None:
            container[key] = [] if _is_index(following) else {}
        container = container[key]
    return tuple(path)


def _key_of(container: Any, part: str, parts: list[str], name: str) -> str | int:
    """A part of an override's path as the key of the container it is looked up in; `name` is the container's."""
    if isinstance(container, dict):
        return part
    refusal = f"{'.'.join(parts)} cannot be set: {name}"
    if not isinstance(container, list):
        raise _CannotSetError(f"{refusal} is a single value; it has no keys and no elements")
    if not _is_index(part):
        raise _CannotSetError(f"{refusal} is a list; name an element by its index, e.g. {name}.0")
    if int(part) > len(container):
        raise _CannotSetError(f"{refusal} has {len(container)} elements; the next index is {len(container)}")
    return int(part)


def _is_index(part: str) -> bool:
    return part.isdecimal() and part.isascii() and len(part) < 10
