"""A preference example as text, and what a row that cannot be one is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Message = dict[str, Any]
Text = str | tuple[Message, ...] | tuple[int, ...]

IDENTICAL_COMPLETIONS = "identical_completions"
EMPTY_COMPLETION = "empty_completion"
EMPTY_PROMPT = "empty_prompt"
PROMPTS_DIFFER = "prompts_differ"
OVER_LONG = "over_long"
MISSING_VALUE = "missing_value"
TEMPLATE_ERROR = "template_error"


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: completion `chosen` is better than completion `rejected` (indices into the completions)."""

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt, its completions and the preferences among them.

    `prompt` and every completion are all strings, all tuples of chat messages, or all tuples of token ids. `tools` are
    the functions that the chat template shows to the model. `source` is `path:line`, counted from 1.
    """

    prompt: Text
    completions: tuple[Text, ...]
    pairs: tuple[Pair, ...]
    tools: tuple[Any, ...] | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class RowFault:
    """A well-formed row that is useless as a preference: `data.on_bad_row` decides what happens to it."""

    reason: str
    source: str
    what: str


def is_token_ids(text: Text) -> TypeGuard[tuple[int, ...]]:
    """Whether a prompt or completion is token ids already."""
    return isinstance(text, tuple) and bool(text) and isinstance(text[0], int)


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, messages or token ids two sequences begin with alike."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))
