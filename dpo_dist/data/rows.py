"""One row, of any accepted shape, as a preference example."""

from dataclasses import replace
from typing import Any

from dpo_dist.config import Pairing
from dpo_dist.data.columns import (
    REFUSED_COLUMNS,
    TOKEN_COLUMNS,
    MissingValueError,
    Row,
    all_strings,
    answers_of,
    holds_token_ids,
    kind_of,
    messages_of,
    refuse_without_effect,
    required,
    tools_of,
    with_system,
)
from dpo_dist.data.demonstrations import demonstration, rated
from dpo_dist.data.example import (
    IDENTICAL_COMPLETIONS,
    MISSING_VALUE,
    PROMPTS_DIFFER,
    UNREAD_COLUMN,
    Messages,
    Pair,
    PreferenceExample,
    RowError,
    RowFault,
    Text,
    blank_fault,
    common_prefix_length,
)
from dpo_dist.data.labels import labelled, weight_of
from dpo_dist.data.ranked import best_example, ranked_example
from dpo_dist.data.unread import require_no_other_text
from dpo_dist.data.values import token_ids_of

# The turns of a raw HH-RLHF dialogue.
HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"


def parse_row(
    row: Row, source: str, pairing: Pairing = "all", demonstrations: bool = False
) -> PreferenceExample | RowFault:
    """The preference example that a row holds, or why it is of no use.

    Args:
        row: columns by name; columns that mean nothing here are ignored.
        source: `path:line` of the row.
        pairing: which of a row's completions are compared, where it holds more than two.
        demonstrations: read the best completion alone.
    Raises:
        RowError: if a column is missing, of the wrong type, or would not be read.
    """
    for column, reason in REFUSED_COLUMNS.items():
        if row.get(column):
            raise RowError(f"{source}: {column} is set, and {reason}; remove the column or the row", UNREAD_COLUMN)
    try:
        if demonstrations:
            return _demonstrated(row, source)
        if (alone := rated(row, source)) is not None:
            return alone
        if kind_of(row) == "ranking":
            return ranked_example(row, source, pairing)
        example = _parsed(row, source)
        return labelled(example, row, source) if isinstance(example, PreferenceExample) else example
    except MissingValueError as error:
        return RowFault(MISSING_VALUE, source, str(error))


def _demonstrated(row: Row, source: str) -> PreferenceExample | RowFault:
    if kind_of(row) == "ranking":
        return best_example(row, source)
    alone = demonstration(row, source)
    if alone is not None:
        return alone
    compared = _parsed(row, source)  # chosen and rejected as whole dialogues: where they part the prompt ends
    if isinstance(compared, RowFault):
        return compared
    return replace(compared, completions=compared.completions[:1], pairs=(), weight=weight_of(row, source))


# ---- the shapes


def _parsed(row: Row, source: str) -> PreferenceExample | RowFault:
    if holds_token_ids(row):
        return _from_token_ids(row, source)
    if row.get("conversations") is not None:
        return _from_sharegpt(row, source)
    if "prompt" in row:
        return _from_explicit_prompt(row, source)
    return _from_dialogues(row, source)


def _from_token_ids(row: Row, source: str) -> PreferenceExample | RowFault:
    refuse_without_effect(row, source)
    prompt, chosen, rejected = (token_ids_of(required(row, column, source), column, source) for column in TOKEN_COLUMNS)
    return _example(prompt, chosen, rejected, None, source)


def _from_sharegpt(row: Row, source: str) -> PreferenceExample | RowFault:
    prompt = messages_of(row["conversations"], "conversations", source)
    return _from_messages(prompt, "conversations", row, source)


def _from_explicit_prompt(row: Row, source: str) -> PreferenceExample | RowFault:
    prompt, chosen, rejected = (required(row, column, source) for column in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and all(isinstance(value, list) for value in (chosen, rejected)):
        return _from_named_question(row, source)
    if all_strings(row, ("prompt", "chosen", "rejected"), source):
        return _example(prompt, chosen, rejected, None, source)
    return _from_messages(messages_of(prompt, "prompt", source), "prompt", row, source)


def _from_messages(prompt: Messages, column: str, row: Row, source: str) -> PreferenceExample | RowFault:
    values = {name: required(row, name, source) for name in ("chosen", "rejected")}
    chosen, rejected = answers_of(values, prompt, source)
    return _example(with_system(prompt, column, row, source), chosen, rejected, tools_of(row, source), source)


def _from_named_question(row: Row, source: str) -> PreferenceExample | RowFault:
    """As in UltraFeedback-binarized: beside two whole conversations, the prompt repeats their first user message."""
    dialogues = [messages_of(row[column], column, source) for column in ("chosen", "rejected")]
    questions = [next((m["content"].strip() for m in dialogue if m["role"] == "user"), None) for dialogue in dialogues]
    if questions == [None, None]:
        all_strings(row, ("prompt", "chosen", "rejected"), source)  # says that the types differ
    # One is enough: whether both were asked the same is a matter of this row, and found below.
    if row["prompt"].strip() not in questions:
        raise RowError(
            f"{source}: prompt is a string, and not the first user message of the conversations chosen and rejected; "
            "leave out the prompt column, or give the prompt as messages and chosen and rejected as answers only",
            PROMPTS_DIFFER,
        )
    return _split_conversations(row, source)


def _from_dialogues(row: Row, source: str) -> PreferenceExample | RowFault:
    """Rows without a prompt column: chosen and rejected are whole dialogues that begin alike."""
    chosen, rejected = (required(row, column, source) for column in ("chosen", "rejected"))
    if not all_strings(row, ("chosen", "rejected"), source):
        return _split_conversations(row, source)
    if any(turn in text for turn in (HUMAN_TURN, ASSISTANT_TURN) for text in (chosen, rejected)):
        return _split_hh_dialogues(chosen, rejected, source)
    return _split_strings(row, chosen, rejected, source)


def _split_hh_dialogues(chosen: str, rejected: str, source: str) -> PreferenceExample | RowFault:
    """The prompt of a raw HH-RLHF dialogue ends with the last assistant turn's name, that name included."""
    ends = [text.rfind(ASSISTANT_TURN) + len(ASSISTANT_TURN) for text in (chosen, rejected)]
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if ASSISTANT_TURN not in text:
            return RowFault(PROMPTS_DIFFER, source, f"{column} is a dialogue without an Assistant turn")
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        return RowFault(PROMPTS_DIFFER, source, "chosen and rejected differ before their last Assistant turn")
    return _example(prompt, chosen[ends[0] :], rejected[ends[1] :], None, source)


def _split_strings(row: Row, chosen: str, rejected: str, source: str) -> PreferenceExample | RowFault:
    """TRL's rule: the prompt is what both begin with, and a space before the difference belongs to the completions."""
    if chosen == rejected:
        return RowFault(IDENTICAL_COMPLETIONS, source, "chosen and rejected are identical")
    prompt = chosen[: common_prefix_length(chosen, rejected)].removesuffix(" ")
    require_no_other_text(row, prompt, source)
    return _example(prompt, chosen[len(prompt) :], rejected[len(prompt) :], None, source)


def _split_conversations(row: Row, source: str) -> PreferenceExample | RowFault:
    """TRL's rule: the prompt is the messages that both begin with."""
    chosen, rejected = (
        with_system(messages_of(row[column], column, source), column, row, source) for column in ("chosen", "rejected")
    )
    if chosen == rejected:
        return RowFault(IDENTICAL_COMPLETIONS, source, "chosen and rejected are identical")
    shared = common_prefix_length(chosen, rejected)
    completions = chosen[shared:], rejected[shared:]
    for column, completion in zip(("chosen", "rejected"), completions, strict=True):
        if completion and completion[0]["role"] != "assistant":
            what = f"message {shared + 1} of {column} is not the assistant's, and not in the other dialogue"
            return RowFault(PROMPTS_DIFFER, source, what)
    if not any(message["role"] == "user" for message in chosen[:shared]):
        require_no_other_text(row, "", source)
    return _example(chosen[:shared], *completions, tools_of(row, source), source)


def _example(
    prompt: Text, chosen: Text, rejected: Text, tools: tuple[Any, ...] | None, source: str
) -> PreferenceExample | RowFault:
    named = {"the chosen completion": chosen, "the rejected completion": rejected}
    if (fault := blank_fault(prompt, named, source)) is not None:
        return fault
    if chosen == rejected:
        return RowFault(IDENTICAL_COMPLETIONS, source, "chosen and rejected are identical")
    return PreferenceExample(prompt, (chosen, rejected), (Pair(chosen=0, rejected=1),), tools, source)
