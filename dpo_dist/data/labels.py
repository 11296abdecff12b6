"""The numbers of a row: how much it counts, how sure and how large its preference is, and the order of completions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo_dist.data.columns import MissingValueError, Row
from dpo_dist.data.example import (
    MISSING_COLUMN,
    WRONG_NUMBER,
    PreferenceExample,
    RowError,
)


def weight_of(row: Row, source: str) -> float:
    """The column `weight`: how much the row counts; 1 where there is none."""
    weight = number_of(row.get("weight"), "weight", source, 1.0)
    if weight <= 0:
        raise RowError(f"{source}: weight={weight:g} is not above 0; leave the row out instead", WRONG_NUMBER)
    return weight


def labelled(example: PreferenceExample, row: Row, source: str) -> PreferenceExample:
    """The example with what its row says of its one preference: weight, margin, chosen_probability."""
    probability = number_of(row.get("chosen_probability"), "chosen_probability", source, 1.0)
    if not 0 < probability <= 1:
        raise RowError(
            f"{source}: chosen_probability={probability:g} is not a probability above 0; give one, and where rejected "
            "is surely better, swap the two",
            WRONG_NUMBER,
        )
    weight, margin = weight_of(row, source), number_of(row.get("margin"), "margin", source, 0.0)
    pairs = (replace(pair, weight=weight, margin=margin, probability=probability) for pair in example.pairs)
    return replace(example, pairs=tuple(pairs), weight=weight)


def values_of(row: Row, count: int, source: str) -> list[float]:
    """How good each of `count` completions is, more is better: `scores` as they are, or `ranks` turned round.

    Raises:
        RowError: neither or both, of another length, no numbers, or ranks that are no ranking.
        MissingValueError: one is null.
    """
    given = [column for column in ("scores", "ranks") if row.get(column) is not None]
    if len(given) != 1:
        found = "both scores and ranks" if given else "neither scores nor ranks"
        raise RowError(
            f"{source}: completions come with {found}; give one of them, a number for each completion", MISSING_COLUMN
        )
    (column,) = given
    values = row[column]
    if not isinstance(values, list):
        raise RowError(f"{source}: {column}={values!r} is not a list; give a number for each completion")
    if len(values) != count:
        raise RowError(
            f"{source}: {column} has {len(values)} values for {count} completions; give one for each, in the same "
            "order",
            WRONG_NUMBER,
        )
    if column == "ranks":
        return [-float(rank) for rank in _ranks(values, source)]
    scores = [_present(value, f"scores[{k}]", source) for k, value in enumerate(values)]
    if not math.isfinite(max(scores) - min(scores)):
        raise RowError(
            f"{source}: scores lie too far apart for their difference to be a number; scale them down", WRONG_NUMBER
        )
    return scores


def number_of(value: Any, where: str, source: str, default: float) -> float:
    """A finite number, or the default in place of null."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{source}: {where}={value!r} is not a number; give one, or null", WRONG_NUMBER)
    try:
        number = float(value)
    except OverflowError:  # a whole number may have any number of digits
        number = math.inf if value > 0 else -math.inf
    if not math.isfinite(number):
        raise RowError(
            f"{source}: {where}={number} is not finite; give a finite number, or leave the row out", WRONG_NUMBER
        )
    return number


def _present(value: Any, where: str, source: str) -> float:
    if value is None:
        raise MissingValueError(f"{where} is null")
    return number_of(value, where, source, 0.0)


def _ranks(values: Sequence[Any], source: str) -> Sequence[int]:
    """Ranks with 1 for the best; of equal ones the next is one more, or one more for each of them."""
    for k, value in enumerate(values):
        if value is None:
            raise MissingValueError(f"ranks[{k}] is null")
        if type(value) is not int:
            raise RowError(
                f"{source}: ranks[{k}]={value!r} is not a whole number; give 1 for the best, 2 for the next",
                WRONG_NUMBER,
            )
    is_dense = min(values) == 1 and max(values) == len(set(values))
    is_competition = all(value == 1 + sum(other < value for other in values) for value in values)
    if not is_dense and not is_competition:
        raise RowError(
            f"{source}: ranks={list(values)} is not a ranking; give 1 for the best, 2 for the next, and the same "
            "number where two are equally good",
            WRONG_NUMBER,
        )
    return values
