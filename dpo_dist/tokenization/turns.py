"""Tokens of a completion that are given to the model and not learned: turns that are not the assistant's.

Such a token is kept as -1 - id, in memory and in files. So no cutting, merging, hashing or comparing of token ids can
lose which ones are learned, or take two completions for the same that differ in it.
"""

from collections.abc import Sequence


def plain(ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids as the model reads them."""
    return tuple(token if token >= 0 else -1 - token for token in ids)


def is_learned(token: int) -> bool:
    """Whether a token of a completion is the model's own to write."""
    return token >= 0


def given(token: int) -> int:
    """A token that is not."""
    return -1 - token


def number_learned(ids: Sequence[int]) -> int:
    """How many tokens of a completion are learned."""
    return sum(map(is_learned, ids))
