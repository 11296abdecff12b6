"""Rows with any number of completions and an order among them."""

import json
from collections.abc import Sequence
from typing import Any

from dpo_dist.config import Pairing
from dpo_dist.data.columns import (
    Row,
    all_strings,
    answers_of,
    holds_token_ids,
    messages_of,
    refuse_without_effect,
    required,
    tools_of,
    with_system,
)
from dpo_dist.data.example import (
    IDENTICAL_COMPLETIONS,
    TIED,
    UNREAD_COLUMN,
    Pair,
    PreferenceExample,
    RowError,
    RowFault,
    Text,
    blank_fault,
    is_token_ids,
)
from dpo_dist.data.labels import values_of, weight_of
from dpo_dist.data.values import token_ids_of

_ONE_PAIR = ("margin", "chosen_probability")


def ranked_example(row: Row, source: str, pairing: Pairing) -> PreferenceExample | RowFault:
    """The example of such a row: completions that stand in a pair, each once.

    Raises:
        RowError, MissingValueError: as `parse_row`.
    """
    for column in _ONE_PAIR:
        if row.get(column) is not None:
            raise RowError(
                f"{source}: {column} belongs to one pair, and the row holds completions; their scores or ranks say all "
                f"of it: remove the column {column}",
                UNREAD_COLUMN,
            )
    prompt, completions, tools = _texts(row, source)
    values, weight = values_of(row, len(completions), source), weight_of(row, source)
    named = {f"completion {k}": completion for k, completion in enumerate(completions)}
    if (fault := blank_fault(prompt, named, source)) is not None:
        return fault
    first_place: dict[Any, int] = {}
    for k, completion in enumerate(completions):
        first = first_place.setdefault(_key(completion), k)
        if values[first] != values[k]:
            what = f"completion {k} is identical to completion {first}, which is ranked otherwise"
            return RowFault(IDENTICAL_COMPLETIONS, source, what)
    places = list(first_place.values())
    ends = preferences([values[k] for k in places], pairing)
    if not ends:
        return RowFault(TIED, source, "all completions are ranked alike")
    used = sorted({end for pair in ends for end in pair})
    number = {place: new for new, place in enumerate(used)}
    has_scores = row.get("scores") is not None
    pairs = tuple(
        Pair(
            number[better],
            number[worse],
            weight,
            values[places[better]] - values[places[worse]] if has_scores else 0.0,
        )
        for better, worse in ends
    )
    kept = tuple(completions[places[end]] for end in used)
    return PreferenceExample(prompt, kept, pairs, tools, source, weight, is_ranked=True)


def best_example(row: Row, source: str) -> PreferenceExample | RowFault:
    """The best of the completions, the first among equals, as a demonstration."""
    prompt, completions, tools = _texts(row, source)
    values = values_of(row, len(completions), source)
    best = completions[values.index(max(values))]
    if (fault := blank_fault(prompt, {"the best completion": best}, source)) is not None:
        return fault
    return PreferenceExample(prompt, (best,), (), tools, source, weight_of(row, source), is_ranked=True)


def preferences(values: Sequence[float], pairing: Pairing) -> list[tuple[int, int]]:
    """(better, worse) of every pair; what is equally good is in none.

    Args:
        values: more is better.
        pairing: `data.pairing`.
    """
    levels = sorted(set(values), reverse=True)
    if len(levels) < 2:
        return []
    of_level = [[k for k, value in enumerate(values) if value == level] for level in levels]
    if pairing == "best_vs_worst":
        return [(of_level[0][0], of_level[-1][-1])]
    last_better = 1 if pairing == "best_vs_rest" else len(levels)
    found = []
    for place, better in enumerate(of_level[:last_better]):
        worse = of_level[place + 1 : place + 2] if pairing == "adjacent" else of_level[place + 1 :]
        found += [(one, other) for one in better for level in worse for other in level]
    return found


def _texts(row: Row, source: str) -> tuple[Text, tuple[Text, ...], tuple[Any, ...] | None]:
    """Prompt, completions and tools of a row."""
    column = "completions_ids" if holds_token_ids(row) else "completions"
    completions = required(row, column, source)
    if not isinstance(completions, list) or len(completions) < 2:
        what = f"has {len(completions)}" if isinstance(completions, list) else f"is {completions!r}"
        raise RowError(f"{source}: {column} {what}; give a list of two or more completions")
    named = {f"{column}[{k}]": completion for k, completion in enumerate(completions)}
    if holds_token_ids(row):
        refuse_without_effect(row, source)
        prompt = token_ids_of(required(row, "prompt_ids", source), "prompt_ids", source)
        return prompt, tuple(token_ids_of(ids, where, source) for where, ids in named.items()), None
    prompt = required(row, "prompt", source)
    whole = {**row, **named}
    for where in named:
        required(whole, where, source)
    if all_strings(whole, ("prompt", *named), source):
        return prompt, tuple(completions), None
    messages = messages_of(prompt, "prompt", source)
    return with_system(messages, "prompt", row, source), answers_of(named, messages, source), tools_of(row, source)


def _key(completion: Text) -> Any:
    """Equal for equal completions; in messages the order of keys means nothing."""
    if isinstance(completion, str) or is_token_ids(completion):
        return completion
    return json.dumps(completion, sort_keys=True, default=repr)
