"""Rows as a supervised run reads them: a prompt, and one completion that is to be learnt."""

from dataclasses import replace

from dpo_dist.data.columns import (
    SHAPES_OF_DEMONSTRATIONS,
    Messages,
    Row,
    all_strings,
    answers_of,
    holds_token_ids,
    kind_of,
    messages_of,
    read_columns,
    refuse_without_effect,
    required,
    tools_of,
    with_system,
)
from dpo_dist.data.example import (
    NO_ANSWER,
    NO_PREFERENCE,
    UNREAD_COLUMN,
    WRONG_NUMBER,
    PreferenceExample,
    RowError,
    RowFault,
    Text,
    blank_fault,
)
from dpo_dist.data.labels import weight_of
from dpo_dist.data.values import token_ids_of


def rated(row: Row, source: str) -> PreferenceExample | RowFault | None:
    """The completion of a row that is only called good or bad (KTO); None of any other kind of row.

    Raises:
        RowError: it has no label: a run on preferences reads no demonstrations.
    """
    if kind_of(row) != "demonstration":
        return None
    label = row.get("label")
    if label is None:
        raise RowError(
            f"{source}: the row is a demonstration, with nothing that its completion is better than; a supervised run "
            "reads those (loss.loss_type=sft without a reference), or give chosen and rejected, or a label",
            NO_PREFERENCE,
        )

    if label not in (True, False):
        raise RowError(f"{source}: label={label!r} is neither true nor false; give one of them", WRONG_NUMBER)
    if row.get("weight") is not None:
        what = "belongs to a pair, and the row holds one completion"
        raise RowError(f"{source}: weight {what}; remove the column weight", UNREAD_COLUMN)
    example = _alone(row, source)
    return replace(example, rating=bool(label)) if isinstance(example, PreferenceExample) else example


def demonstration(row: Row, source: str) -> PreferenceExample | RowFault | None:
    """The example of one completion that a row holds; None where only both of its dialogues tell the prompt.

    Raises:
        RowError, MissingValueError: as `parse_row`.
    """
    _refuse_label(row, source)
    return _alone(row, source)


def _alone(row: Row, source: str) -> PreferenceExample | RowFault | None:
    if holds_token_ids(row):
        return _from_token_ids(row, source)
    if (alone := _conversation_column(row)) is not None:
        return _from_conversation(row, alone, source)
    column = _completion_column(row)
    completion = required(row, column, source, SHAPES_OF_DEMONSTRATIONS)
    if row.get("conversations") is None:
        if "prompt" not in row and column == "chosen":
            return None
        prompt = required(row, "prompt", source, SHAPES_OF_DEMONSTRATIONS)
        if isinstance(prompt, str) and isinstance(completion, list) and column == "chosen":
            return None
        if all_strings(row, ("prompt", column), source):
            return _example(str(prompt), str(completion), row, source)
        messages, where = messages_of(prompt, "prompt", source), "prompt"
    else:
        messages, where = messages_of(row["conversations"], "conversations", source), "conversations"
    (answer,) = answers_of({column: completion}, messages, source)
    return _example(with_system(messages, where, row, source), answer, row, source)


def _conversation_column(row: Row) -> str | None:
    """The column of a whole conversation, where nothing else holds the completion."""
    others, columns = ("chosen", "rejected"), ("conversations",)
    if kind_of(row) == "demonstration":
        others, columns = ("completion",), ("messages", "conversations")
    if any(row.get(column) is not None for column in others):
        return None
    return next((column for column in columns if row.get(column) is not None), None)


def _completion_column(row: Row) -> str:
    """The column of the completion; if there is none with a value, the one that an error has to name."""
    if kind_of(row) == "pair" and ("chosen" in row or "rejected" in row):
        return "chosen"
    return next((column for column in ("completion", "messages", "conversations") if column in row), "completion")


def _from_token_ids(row: Row, source: str) -> PreferenceExample | RowFault:
    refuse_without_effect(row, source)
    column = "chosen_ids" if kind_of(row) == "pair" and "chosen_ids" in row else "completion_ids"
    prompt, completion = (
        token_ids_of(required(row, name, source, SHAPES_OF_DEMONSTRATIONS), name, source)
        for name in ("prompt_ids", column)
    )
    return _example(prompt, completion, row, source)


def _from_conversation(row: Row, column: str, source: str) -> PreferenceExample | RowFault:
    """The assistant's last turn of a whole conversation; what stands before it is the prompt."""
    conversation: Messages = messages_of(row[column], column, source)
    border = len(conversation)
    while border and conversation[border - 1]["role"] == "assistant":
        border -= 1
    if border == len(conversation):
        return RowFault(NO_ANSWER, source, f"{column} does not end with an answer of the assistant's")
    return _example(with_system(conversation[:border], column, row, source), conversation[border:], row, source)


def _example(prompt: Text, completion: Text, row: Row, source: str) -> PreferenceExample | RowFault:
    if (fault := blank_fault(prompt, {"the completion": completion}, source)) is not None:
        return fault
    tools = None if isinstance(prompt, str) else tools_of(row, source)
    return PreferenceExample(prompt, (completion,), (), tools, source, weight_of(row, source))


def _refuse_label(row: Row, source: str) -> None:
    if "label" in read_columns(row) and row.get("label") not in (None, True):
        raise RowError(
            f"{source}: label={row['label']!r}: a supervised run learns every completion, and this one is called bad; "
            "give the good ones alone, or train on preferences, which pairs good and bad ones of a prompt",
            NO_PREFERENCE,
        )
