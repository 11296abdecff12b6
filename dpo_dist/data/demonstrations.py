"""Rows as a supervised run reads them: a prompt, and one completion that is to be learnt."""

from dpo_dist.data.columns import (
    SHAPES_OF_DEMONSTRATIONS,
    Messages,
    Row,
    all_strings,
    answers_of,
    holds_token_ids,
    messages_of,
    refuse_without_effect,
    required,
    token_ids_of,
    tools_of,
    with_system,
)
from dpo_dist.data.example import (
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    NO_ANSWER,
    PreferenceExample,
    RowFault,
    Text,
    is_blank,
)
from dpo_dist.data.labels import weight_of
from dpo_dist.errors import DataError

# Columns that hold a completion, the first that a row has.
_COMPLETIONS = ("completion", "chosen")
_COMPLETIONS_IDS = ("completion_ids", "chosen_ids")


def is_demonstration(row: Row) -> bool:
    """Whether a row has a completion to learn, and none to compare it with."""
    if any(row.get(column) is not None for column in ("chosen", "chosen_ids", "completions", "completions_ids")):
        return False
    return any(row.get(column) is not None for column in ("completion", "completion_ids", "messages"))


def refuse_demonstration(row: Row, source: str) -> None:
    """A run on preferences reads no demonstrations."""
    if is_demonstration(row):
        _refuse_label(row, source)
        raise DataError(
            f"{source}: the row is a demonstration, with nothing that its completion is better than; a supervised run "
            "reads those (loss.loss_type=sft without a reference), or give chosen and rejected"
        )


def demonstration(row: Row, source: str) -> PreferenceExample | RowFault | None:
    """The example of one completion that a row holds; None where only both of its dialogues tell the prompt.

    Raises:
        DataError, MissingValueError: as `parse_row`.
    """
    _refuse_label(row, source)
    if holds_token_ids(row):
        return _from_token_ids(row, source)
    if row.get("messages") is not None:
        return _from_conversation(row, "messages", source)
    column = _first(_COMPLETIONS, row)
    if row.get("conversations") is not None and row.get(column) is None:
        return _from_conversation(row, "conversations", source)
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


def _first(columns: tuple[str, ...], row: Row) -> str:
    """The first column with a value, else the first there is at all, else the first."""
    filled = [column for column in columns if row.get(column) is not None]
    return (*filled, *(column for column in columns if column in row), *columns)[0]


def _from_token_ids(row: Row, source: str) -> PreferenceExample | RowFault:
    refuse_without_effect(row, source)
    column = _first(_COMPLETIONS_IDS, row)
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
    if is_blank(prompt):
        return RowFault(EMPTY_PROMPT, source, "the prompt is empty")
    if is_blank(completion):
        return RowFault(EMPTY_COMPLETION, source, "the completion is empty")
    tools = None if isinstance(prompt, str) else tools_of(row, source)
    return PreferenceExample(prompt, (completion,), (), tools, source, weight_of(row, source))


def _refuse_label(row: Row, source: str) -> None:
    if row.get("completion") is not None and row.get("label") not in (None, True):
        raise DataError(
            f"{source}: label={row['label']!r}: completions that are only good or bad (KTO) are not supported; give "
            "the good ones alone for a supervised run, or chosen and rejected for the same prompt"
        )
