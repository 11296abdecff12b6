"""One row, of any accepted shape, as a preference example."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from dpo_dist.data.example import (
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    IDENTICAL_COMPLETIONS,
    PROMPTS_DIFFER,
    Message,
    Pair,
    PreferenceExample,
    RowFault,
    Text,
    common_prefix_length,
    is_token_ids,
)
from dpo_dist.errors import DataError

Row = dict[str, Any]
_Messages = tuple[Message, ...]

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# These change what the model sees; a run that ignored them would train on something else than the user wrote.
REFUSED_COLUMNS = {
    "images": "images are not supported",
    "image": "images are not supported",
    "chat_template_kwargs": "arguments for the chat template are not supported",
}
COLUMNS = ("prompt", "chosen", "rejected", "conversations", "system", "tools", *TOKEN_COLUMNS, *REFUSED_COLUMNS)
SHAPES = (
    "a row holds prompt, chosen, rejected (all strings or all message lists); chosen, rejected (whole dialogues); "
    "conversations, chosen, rejected; or prompt_ids, chosen_ids, rejected_ids"
)

# The turns of a raw HH-RLHF dialogue.
HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"

# Values of `from` in ShareGPT rows, and the role that a chat template knows them by.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
MAX_TOKEN_ID = 2**31 - 1


def holds_token_ids(row: Row) -> bool:
    """Whether a row is already tokenised, so that it needs no tokenizer."""
    return any(row.get(column) is not None for column in TOKEN_COLUMNS)


def parse_row(row: Row, source: str) -> PreferenceExample | RowFault:
    """The preference example that a row holds, or why it is of no use.

    Args:
        row: columns by name; columns that mean nothing here are ignored.
        source: `path:line` of the row.
    Raises:
        DataError: if a column is missing or of the wrong type: a fault of the file, not of this preference.
    """
    for column, reason in REFUSED_COLUMNS.items():
        if row.get(column):
            raise DataError(f"{source}: {column} is set, and {reason}; remove the column or the row")
    if holds_token_ids(row):
        return _from_token_ids(row, source)
    if row.get("conversations") is not None:
        return _from_sharegpt(row, source)
    if "prompt" in row:
        return _from_explicit_prompt(row, source)
    return _from_dialogues(row, source)


# ---- the shapes


def _from_token_ids(row: Row, source: str) -> PreferenceExample | RowFault:
    prompt, chosen, rejected = (_token_ids(_column(row, column, source), column, source) for column in TOKEN_COLUMNS)
    return _example(prompt, chosen, rejected, None, source)


def _from_sharegpt(row: Row, source: str) -> PreferenceExample | RowFault:
    prompt = _messages(row["conversations"], "conversations", source)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        _wrong_type(source, "system", system, "a string")
    if system:
        prompt = ({"role": "system", "content": system}, *prompt)
    chosen, rejected = (_completion(_column(row, column, source), column, source) for column in ("chosen", "rejected"))
    return _example(prompt, chosen, rejected, _tools(row, source), source)


def _from_explicit_prompt(row: Row, source: str) -> PreferenceExample | RowFault:
    prompt, chosen, rejected = (_column(row, column, source) for column in ("prompt", "chosen", "rejected"))
    if _all_strings(row, ("prompt", "chosen", "rejected"), source):
        return _example(prompt, chosen, rejected, None, source)
    return _example(
        _messages(prompt, "prompt", source),
        _completion(chosen, "chosen", source),
        _completion(rejected, "rejected", source),
        _tools(row, source),
        source,
    )


def _from_dialogues(row: Row, source: str) -> PreferenceExample | RowFault:
    """Rows without a prompt column: chosen and rejected are whole dialogues that begin alike."""
    chosen, rejected = (_column(row, column, source) for column in ("chosen", "rejected"))
    if not _all_strings(row, ("chosen", "rejected"), source):
        chosen, rejected = _messages(chosen, "chosen", source), _messages(rejected, "rejected", source)
        return _split_messages(chosen, rejected, _tools(row, source), source)
    if any(turn in text for turn in (HUMAN_TURN, ASSISTANT_TURN) for text in (chosen, rejected)):
        return _split_hh_dialogues(chosen, rejected, source)
    return _split_strings(chosen, rejected, source)


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


def _split_strings(chosen: str, rejected: str, source: str) -> PreferenceExample | RowFault:
    """TRL's rule: the prompt is what both begin with, and a space before the difference belongs to the completions."""
    if chosen == rejected:
        return RowFault(IDENTICAL_COMPLETIONS, source, "chosen and rejected are identical")
    prompt = chosen[: common_prefix_length(chosen, rejected)].removesuffix(" ")
    return _example(prompt, chosen[len(prompt) :], rejected[len(prompt) :], None, source)


def _split_messages(
    chosen: _Messages, rejected: _Messages, tools: tuple[Any, ...] | None, source: str
) -> PreferenceExample | RowFault:
    """TRL's rule: the prompt is the messages that both begin with."""
    if chosen == rejected:
        return RowFault(IDENTICAL_COMPLETIONS, source, "chosen and rejected are identical")
    shared = common_prefix_length(chosen, rejected)
    completions = chosen[shared:], rejected[shared:]
    for column, completion in zip(("chosen", "rejected"), completions, strict=True):
        if completion and completion[0]["role"] != "assistant":
            what = f"message {shared + 1} of {column} is not the assistant's, and not in the other dialogue"
            return RowFault(PROMPTS_DIFFER, source, what)
    return _example(chosen[:shared], *completions, tools, source)


def _example(
    prompt: Text, chosen: Text, rejected: Text, tools: tuple[Any, ...] | None, source: str
) -> PreferenceExample | RowFault:
    if _is_blank(prompt):
        return RowFault(EMPTY_PROMPT, source, "the prompt is empty")
    for column, completion in (("chosen", chosen), ("rejected", rejected)):
        if _is_blank(completion):
            return RowFault(EMPTY_COMPLETION, source, f"the {column} completion is empty")
    if chosen == rejected:
        return RowFault(IDENTICAL_COMPLETIONS, source, "chosen and rejected are identical")
    return PreferenceExample(prompt, (chosen, rejected), (Pair(chosen=0, rejected=1),), tools, source)


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    if is_token_ids(text):
        return False
    # A call of a tool says something without content.
    return not any(message["content"].strip() or message.get("tool_calls") for message in cast(_Messages, text))


# ---- the types of columns


def _column(row: Row, column: str, source: str) -> Any:
    if column not in row:
        raise DataError(f"{source}: no column {column} (the row has {', '.join(row) or 'none'}); {SHAPES}")
    if row[column] is None:
        raise DataError(f"{source}: {column} is null; {SHAPES}")
    return row[column]


def _all_strings(row: Row, columns: Sequence[str], source: str) -> bool:
    """True if the columns are all strings, False if all are message lists."""
    strings = [column for column in columns if isinstance(row[column], str)]
    others = [column for column in columns if column not in strings]
    if strings and others:
        raise DataError(
            f"{source}: {' and '.join(strings)} {'is a string' if len(strings) == 1 else 'are strings'}, "
            f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} not; "
            "give all columns of a row as strings, or all as message lists"
        )
    for column in strings:
        _check_text(row[column], column, source)
    if strings and _tools(row, source):
        raise DataError(f"{source}: tools are set, and nothing shows them to the model; give the row as message lists")
    return bool(strings)


def _messages(value: Any, column: str, source: str) -> _Messages:
    if not isinstance(value, list):
        _wrong_type(source, column, value, "a list of messages")
    return tuple(_message(message, f"{column}[{index}]", source) for index, message in enumerate(value))


def _completion(value: Any, column: str, source: str) -> _Messages:
    """What the assistant says: a list of messages, or a single message."""
    messages = _messages([value] if isinstance(value, dict) else value, column, source)
    if messages and messages[0]["role"] != "assistant":
        raise DataError(
            f"{source}: {column} begins with a message of role {messages[0]['role']!r}; where the prompt stands in a "
            "column of its own, a completion begins with the assistant's message (or leave out the prompt column)"
        )
    return messages


def _message(value: Any, where: str, source: str) -> Message:
    """A message as {role, content, ...}; ShareGPT's {from, value} is renamed."""
    if not isinstance(value, dict):
        _wrong_type(source, where, value, "a message {role, content}")
    message = {key: item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise DataError(f"{source}: {where}.from={speaker!r} is not known; use one of {', '.join(ROLES)}")
        message["role"] = ROLES[speaker]
        if "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise DataError(f"{source}: {where} has no role; a message is {{role, content}} or {{from, value}}")
    content = message.get("content", "" if message.get("tool_calls") else None)
    if not isinstance(content, str):
        _wrong_type(source, f"{where}.content", content, "a string")
    _check_text(content, f"{where}.content", source)
    return {**message, "content": content}


def _tools(row: Row, source: str) -> tuple[Any, ...] | None:
    """The `tools` column: a list, or the same as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(
                f"{source}: tools is not JSON ({error}); give a list of tools, or the list as JSON"
            ) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        _wrong_type(source, "tools", tools, "a list of tools (JSON schemas of functions)")
    return tuple(tools)


def _token_ids(value: Any, column: str, source: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        _wrong_type(source, column, value, "a list of token ids")
    for index, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            _wrong_type(source, f"{column}[{index}]", token, "a token id (an integer >= 0)")
    return tuple(value)


def _check_text(text: str, where: str, source: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: {where} holds half of a surrogate pair at character {error.start}; "
            "write the character as UTF-8 or as a complete \\uXXXX\\uXXXX pair"
        ) from None


def _wrong_type(source: str, where: str, value: Any, wanted: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise DataError(f"{source}: {where}={shown} is of the wrong type ({type(value).__name__}); give {wanted}")
