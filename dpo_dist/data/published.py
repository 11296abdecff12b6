"""Rows in the forms of well-known data sets, as rows of many completions.

    UltraFeedback   instruction, completions: [{response, overall_score}]       scores as they are
    HelpSteer 2     prompt, response_1, response_2, preference_strength         -3 (the first is better) to 3
    HelpSteer 3     context: messages, response1, response2, overall_preference  the same
    Nectar          prompt, answers: [{answer, rank}]                            1 is the best

Dialogues in one text (HelpSteer 2's after the first question, Nectar's) become messages. Nothing is done to a row of
any other form.
"""

import re
from collections.abc import Callable
from typing import Any

from dpo_dist.data.example import WRONG_NUMBER, WRONG_TYPE, RowError

_Row = dict[str, Any]
# Two responses and a signed preference: (first, second, preference, prompt).
_SIGNED = (
    ("response_1", "response_2", "preference_strength", "prompt"),
    ("response1", "response2", "overall_preference", "context"),
)
_TURNS = re.compile(r"\s*(?:<extra_id_1>(User|Assistant)\n|\n\n(Human|Assistant):)")
_ROLES = {"User": "user", "Human": "user", "Assistant": "assistant"}
# Columns that a file of such rows has, and other files do not.
PUBLISHED_COLUMNS = frozenset(("instruction", "answers", *(name for names in _SIGNED for name in names)))
PUBLISHED_VALUES = frozenset(("answers", "context", *(names[2] for names in _SIGNED)))  # those that are no text


def as_ranking(row: _Row, source: str) -> _Row:
    """The row with the columns of a ranking in the place of its own.

    Raises:
        RowError: it has such a form, and a value in it is of another type.
    """
    if "chosen" in row or "rejected" in row:
        return row
    for is_such, converted in _FORMS:
        if is_such(row):
            return converted(row, source)
    for names in _SIGNED:
        if all(name in row for name in names):
            return _signed(row, names, source)
    return row


def _is_ultrafeedback(row: _Row) -> bool:
    return "instruction" in row and "prompt" not in row and _are_objects(row.get("completions"), "response")


def _ultrafeedback(row: _Row, source: str) -> _Row:
    answers = [_field(item, "response", f"completions[{k}]", source) for k, item in enumerate(row["completions"])]
    scores = [item.get("overall_score") for item in row["completions"]]
    rest = _without(row, "instruction", "completions")
    return {"scores": scores, **rest, **_chat(row["instruction"], answers)}  # scores of `columns` come first


def _is_nectar(row: _Row) -> bool:
    return "prompt" in row and "completions" not in row and _are_objects(row.get("answers"), "answer")


def _nectar(row: _Row, source: str) -> _Row:
    answers = [_field(item, "answer", f"answers[{k}]", source) for k, item in enumerate(row["answers"])]
    ranks = [_whole(item.get("rank")) for item in row["answers"]]
    return {**_without(row, "answers"), **_chat(row["prompt"], answers), "ranks": ranks}


_FORMS: tuple[tuple[Callable[[_Row], bool], Callable[[_Row, str], _Row]], ...] = (
    (_is_ultrafeedback, _ultrafeedback),
    (_is_nectar, _nectar),
)


def _signed(row: _Row, names: tuple[str, str, str, str], source: str) -> _Row:
    first, second, preference, prompt = names
    strength = row[preference]
    if strength is not None and (isinstance(strength, bool) or not isinstance(strength, int | float)):
        what = f"{source}: {preference}={strength!r} is not a number"
        raise RowError(f"{what}; give one below 0 where {first} is better, above 0 where {second} is", WRONG_NUMBER)
    scores = [None, None] if strength is None else [max(-strength, 0), max(strength, 0)]
    answers = [_field(row, name, "", source) for name in (first, second)]
    return {**_without(row, *names), **_chat(row[prompt], answers), "scores": scores}


def _chat(prompt: Any, answers: list[str]) -> _Row:
    """A question, or a dialogue that ends with one, and its answers as messages."""
    asked = _messages(prompt) if isinstance(prompt, str) else prompt
    return {"prompt": asked, "completions": [[{"role": "assistant", "content": answer}] for answer in answers]}


def _messages(dialogue: str) -> list[dict[str, str]]:
    """The turns of a dialogue; the first one is the user's, and the name of who is to answer is none."""
    first, *rest = _TURNS.split(dialogue)
    said = [("user", first)] if first.strip() else []
    for place in range(0, len(rest), 3):
        said.append((_ROLES[rest[place] or rest[place + 1]], rest[place + 2]))
    if len(said) > 1 and said[-1][0] == "assistant" and not said[-1][1].strip():
        said.pop()
    is_dialogue = len(rest) > 0
    return [{"role": role, "content": text.strip() if is_dialogue else text} for role, text in said] or [
        {"role": "user", "content": dialogue}
    ]


def _are_objects(value: Any, field: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and field in item for item in value)


def _field(item: _Row, name: str, where: str, source: str) -> Any:
    if not isinstance(item[name], str):
        where = f"{where}.{name}" if where else name
        raise RowError(f"{source}: {where} is of type {type(item[name]).__name__}; give a string", WRONG_TYPE)
    return item[name]


def _whole(rank: Any) -> Any:
    """Ranks are published as 1.0, 2.0, ..."""
    return int(rank) if isinstance(rank, float) and rank.is_integer() else rank


def _without(row: _Row, *names: str) -> _Row:
    return {name: value for name, value in row.items() if name not in names}
