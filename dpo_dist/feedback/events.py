"""One event of a log as the preferences that it tells.

    thumbs        prompt, completion, label (true or false)              the completion is good, or bad
    edit          prompt, completion, corrected                          corrected over completion
    choice        prompt, completions, choice (from 0; null: none)       the chosen one over each other
    ranking       prompt, completions, scores or ranks                   each better one over each worse one
    regeneration  prompt, completion, regenerated                        the one that was kept over the one before

`messages` may stand for `prompt` and `completion`: the last turn is the completion. Strings are what a user and the
assistant said.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from dpo_dist.data import PreferenceExample, RowFault
from dpo_dist.data.columns import MissingValueError
from dpo_dist.data.example import (
    EMPTY_COMPLETION,
    IDENTICAL_COMPLETIONS,
    MISSING_COLUMN,
    MISSING_VALUE,
    TIED,
    WRONG_NUMBER,
    WRONG_TYPE,
    RowError,
    fault_of,
)
from dpo_dist.data.labels import values_of
from dpo_dist.data.ranked import preferences
from dpo_dist.data.rows import parse_row
from dpo_dist.data.values import check_text

Event = dict[str, Any]
# An event is what the first of these says of which it has a value.
_TELLS = {
    "choice": ("choice",),
    "edit": ("corrected",),
    "regeneration": ("regenerated",),
    "ranking": ("scores", "ranks"),
    "thumbs": ("label",),
}
_OF_MANY = ("choice", "ranking")  # say something of completions only
KINDS = tuple(_TELLS)
_ASSISTANT = ("assistant", "gpt")
_SHAPES = "an event has label (thumbs), corrected (edit), completions with choice, scores or ranks, or regenerated"
# Where and when it was said; kept beside the rows under these names.
PROVENANCE = ("id", "time", "model")
# What else a row may say of its prompt, and how much it counts.
_BESIDE = ("system", "tools", "weight")
EVENT_COLUMNS = frozenset(
    ("prompt", "messages", "completion", "completions", *(name for names in _TELLS.values() for name in names))
) | {*PROVENANCE, *_BESIDE}


@dataclass(frozen=True)
class Statement:
    """One preference that somebody stated."""

    kind: str
    row: Event
    """Its columns, as `parse_row` reads them."""
    key: str
    """Equal for equal statements."""
    opposite: str
    """The key of the statement that contradicts it."""


def statements_of(event: Event, source: str, as_text: bool) -> list[Statement] | RowFault:
    """What an event says, or why it says nothing.

    Args:
        event: columns by name.
        source: `path:line`, for messages.
        as_text: leave strings as they are, and make no messages of them.
    """
    try:
        kind = _kind(event, source)
        for name in PROVENANCE:
            check_text(str(event.get(name, "")), name, source)
        beside = {name: event[name] for name in _BESIDE if event.get(name) is not None}
        rows = _READERS[kind](_with_prompt(event, source), source)
        found = [
            _statement(kind, beside | {name: _said(name, row[name], as_text) for name in row}, source) for row in rows
        ]
    except RowError as error:
        return fault_of(error, source)
    except MissingValueError as error:
        return RowFault(MISSING_VALUE, source, str(error))
    faults = [one for one in found if isinstance(one, RowFault)]
    return faults[0] if faults else [one for one in found if isinstance(one, Statement)]


def _kind(event: Event, source: str) -> str:
    has_many = event.get("completions") is not None
    for kind, columns in _TELLS.items():
        if any(event.get(column) is not None for column in columns) and (has_many or kind not in _OF_MANY):
            return kind
    if has_many and "choice" in event:
        raise RowError(f"{source}: choice is null: none of the completions was chosen", TIED)
    if "label" in event:
        raise RowError(f"{source}: label is null: nobody said whether it is good", TIED)
    there = ", ".join(event) or "nothing"
    raise RowError(f"{source}: nothing tells what was said (the event has {there}); {_SHAPES}", MISSING_COLUMN)


def _with_prompt(event: Event, source: str) -> Event:
    """The event with prompt and completion in columns of their own."""
    messages = event.get("messages")
    if event.get("prompt") is not None or messages is None:
        return event
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{source}: messages is no list of messages; give the conversation up to the answer", WRONG_TYPE)
    answered = isinstance(messages[-1], dict) and messages[-1].get("role", messages[-1].get("from")) in _ASSISTANT
    if event.get("completion") is not None or event.get("completions") is not None:
        return {**event, "prompt": messages[:-1] if answered else messages}
    return {**event, "prompt": messages[:-1], "completion": [messages[-1]]}


def _value(event: Event, column: str, source: str) -> Any:
    if event.get(column) is None:
        raise RowError(f"{source}: {column} is missing or null; {_SHAPES}", MISSING_COLUMN)
    return event[column]


def _thumbs(event: Event, source: str) -> list[Event]:
    return [{name: _value(event, name, source) for name in ("prompt", "completion", "label")}]


def _edit(event: Event, source: str) -> list[Event]:
    return [_pair(event, _value(event, "corrected", source), _value(event, "completion", source), source)]


def _choice(event: Event, source: str) -> list[Event]:
    completions, choice = _many(event, source), event["choice"]
    if type(choice) is not int or not 0 <= choice < len(completions):
        what = f"{source}: choice={choice!r} is no place in completions"
        raise RowError(f"{what}; give one from 0 to {len(completions) - 1}", WRONG_NUMBER)
    chosen = completions[choice]
    others = [other for other in completions if other != chosen]
    if not others:
        raise RowError(f"{source}: all completions are identical", IDENTICAL_COMPLETIONS)
    return [_pair(event, chosen, other, source) for other in others]


def _ranking(event: Event, source: str) -> list[Event]:
    completions = _many(event, source)
    values = values_of(event, len(completions), source)
    first_place = [completions.index(completion) for completion in completions]
    for place, first in enumerate(first_place):
        if values[place] != values[first]:
            what = f"{source}: completion {place} is identical to completion {first}, which is ranked otherwise"
            raise RowError(what, IDENTICAL_COMPLETIONS)
    places = sorted(set(first_place))
    ends = preferences([values[place] for place in places], "all")
    if not ends:
        raise RowError(f"{source}: all completions are ranked alike", TIED)
    return [_pair(event, completions[places[better]], completions[places[worse]], source) for better, worse in ends]


def _many(event: Event, source: str) -> list[Any]:
    completions = event["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise RowError(f"{source}: completions is no list of two or more; give what was to choose from", WRONG_TYPE)
    return completions


def _regeneration(event: Event, source: str) -> list[Event]:
    return [_pair(event, event["regenerated"], _value(event, "completion", source), source)]


_READERS = {
    "choice": _choice,
    "edit": _edit,
    "regeneration": _regeneration,
    "ranking": _ranking,
    "thumbs": _thumbs,
}


def _pair(event: Event, chosen: Any, rejected: Any, source: str) -> Event:
    return {"prompt": _value(event, "prompt", source), "chosen": chosen, "rejected": rejected}


def _said(name: str, value: Any, as_text: bool) -> Any:
    """A string as the message of who said it."""
    if name == "label":
        return bool(value) if value in (True, False) else value
    if not isinstance(value, str) or as_text:
        return value
    return [{"role": "user" if name == "prompt" else "assistant", "content": value}]


def _statement(kind: str, row: Event, source: str) -> Statement | RowFault:
    example = parse_row(row, source)
    if isinstance(example, RowFault):
        known = {IDENTICAL_COMPLETIONS: "nothing was changed", EMPTY_COMPLETION: "there is no answer"}
        return RowFault(example.reason, source, known.get(example.reason, example.what), example.way_out)
    assert isinstance(example, PreferenceExample)
    # The system message is part of the prompt from here on; what tools there are belongs to it as well.
    row = {**{name: value for name, value in row.items() if name != "system"}, "prompt": example.prompt}
    if example.rating is not None:
        good, bad = (_key([example.prompt, example.tools, example.completions[0], say]) for say in (True, False))
        return Statement(kind, row, *((good, bad) if example.rating else (bad, good)))
    first, second = example.completions
    asked = [example.prompt, example.tools]
    return Statement(kind, row, _key([*asked, first, second]), _key([*asked, second, first]))


def _key(said: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
