"""A configuration while it is read: raw values, where each of them came from, and what is wrong so far.

An override is `section.key=value`; the value is read as YAML. An empty one takes the key out, so that its default
holds: `train.num_train_epochs=`. Elements of a list are named by their index, and the index after the last one adds an
element: `data.train.0.path=pairs.jsonl`. The last override of a key counts.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.config.messages import SECTIONS, KeyPath, dotted
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
        try:
            value = parse(text).value
        except YamlError as error:
            self.problems.setdefault(
                tuple(parts), (None, f"{name} is not valid YAML ({error}); put the value in quotes")
            )
            return
        try:
            path = _set(self.values, parts, value, take_out=not text.strip())
        except _CannotSetError as error:
            self.problems.setdefault(tuple(parts), (None, f"{name} cannot be set: {error}"))
            return
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = None


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
        raise ConfigError(f"{where}: not valid YAML ({error}); text with special characters needs quotes") from error
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
    """Why a value cannot be set under a key."""


def _set(values: dict[str, Any], parts: list[str], value: Any, take_out: bool) -> KeyPath:
    """Set a value deep inside mappings and lists, or take it out; returns its path."""
    container: Any = values
    path: list[str | int] = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        key: Any = _key_of(container, part, dotted(tuple(path)))
        path.append(key)
        is_new = key == len(container) if isinstance(container, list) else key not in container
        if following is None and take_out:
            if not is_new:
                container.pop(key)
            break
        if is_new and isinstance(container, list):
            container.append(None)
        if following is None:
            container[key] = value
        elif is_new or container[key] is None:
            container[key] = [] if _is_index(following) else {}
        container = container[key]
    return tuple(path)


def _key_of(container: Any, part: str, name: str) -> str | int:
    """A part of an override's path as the key of the container it is looked up in."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise _CannotSetError(f"{name} is a single value; it has no keys and no elements")
    if not _is_index(part):
        raise _CannotSetError(f"{name} is a list; name an element by its index, e.g. {name}.0")
    if int(part) > len(container):
        raise _CannotSetError(f"{name} has {len(container)} elements; the next index is {len(container)}")
    return int(part)


def _is_index(part: str) -> bool:
    return part.isdecimal() and part.isascii() and len(part) < 10
