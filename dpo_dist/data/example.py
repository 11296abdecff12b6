"""A preference example as text, and what a row that cannot be one is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from dpo_dist.errors import DataError

Message = dict[str, Any]
Messages = tuple[Message, ...]
Text = str | tuple[Message, ...] | tuple[int, ...]

IDENTICAL_COMPLETIONS = "identical_completions"
EMPTY_COMPLETION = "empty_completion"
EMPTY_PROMPT = "empty_prompt"
PROMPTS_DIFFER = "prompts_differ"
OVER_LONG = "over_long"
CUT_ALIKE = "cut_alike"
MISSING_VALUE = "missing_value"
TEMPLATE_ERROR = "template_error"
NO_PREFERENCE = "no_preference"
TIED = "tied"
UNPAIRED = "unpaired"
NO_ANSWER = "no_answer"
NOT_RENDERED = "not_rendered"
PROMPT_MOVED = "prompt_moved"
TURNS_MOVED = "turns_moved"
BROKEN_JSON = "broken_json"
BROKEN_TEXT = "broken_text"
MISSING_COLUMN = "missing_column"
MIXED_KINDS = "mixed_kinds"
UNREAD_COLUMN = "unread_column"
WRONG_NUMBER = "wrong_number"
WRONG_ROLE = "wrong_role"
WRONG_TYPE = "wrong_type"


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: completion `chosen` is better than completion `rejected` (indices into the completions).

    `weight` is how much it counts, `margin` by how much chosen is better (in the data's own unit), `probability` how
    sure that is.
    """

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt, its completions and the preferences among them; without any, its completion is a demonstration.

    `prompt` and every completion are all strings, all tuples of chat messages, or all tuples of token ids. `tools` are
    the functions that the chat template shows to the model. `source` is `path:line`, counted from 1.
    """

    prompt: Text
    completions: tuple[Text, ...]
    pairs: tuple[Pair, ...]
    tools: tuple[Any, ...] | None = None
    source: str = ""
    weight: float = 1.0
    is_ranked: bool = False  # its row held a list of completions
    rating: bool | None = None  # of its one completion, where the row says only whether it is good


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be used: `data.on_bad_row` decides what happens to it."""

    reason: str
    source: str
    what: str
    way_out: str = "repair the row"


class RowError(DataError):
    """`file:line: what is wrong; what would be right` of one row; whoever reads rows makes a `RowFault` of it."""

    def __init__(self, message: str, reason: str = WRONG_TYPE) -> None:
        super().__init__(message)
        self.reason = reason


def fault_of(error: RowError, source: str) -> RowFault:
    """The same as a value."""
    what, _, way_out = str(error).removeprefix(f"{source}: ").partition("; ")
    return RowFault(error.reason, source, what, way_out or "repair the row")


def is_token_ids(text: Text) -> TypeGuard[tuple[int, ...]]:
    """Whether a prompt or completion is token ids already."""
    return isinstance(text, tuple) and bool(text) and isinstance(text[0], int)


def is_blank(text: Text) -> bool:
    """Whether a prompt or completion says nothing."""
    if isinstance(text, str):
        return not text.strip()
    if is_token_ids(text):
        return False
    # A call of a tool says something without content.
    return not any(message["content"].strip() or message.get("tool_calls") for message in cast(Messages, text))


def blank_fault(prompt: Text, completions: Mapping[str, Text], source: str) -> RowFault | None:
    """What of a row is empty, or no answer, if anything; completions by what to call them."""
    if is_blank(prompt):
        return RowFault(EMPTY_PROMPT, source, "the prompt is empty")
    for name, completion in completions.items():
        if is_blank(completion):
            return RowFault(EMPTY_COMPLETION, source, f"{name} is empty")
        if not isinstance(completion, str) and not is_token_ids(completion):
            role = cast(Messages, completion)[-1]["role"]
            if role != "assistant":
                what = f"{name} ends with a message of role {role!r}: there is no answer to learn from"
                return RowFault(NO_ANSWER, source, what, "let it end with the assistant's message")
    return None


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, messages or token ids two sequences begin with alike."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))
