"""The columns of a row: which there are, and each one checked and in one form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dpo_dist.data.example import (
    MISSING_COLUMN,
    UNREAD_COLUMN,
    WRONG_ROLE,
    Message,
    Messages,
    RowError,
)
from dpo_dist.data.values import check_nested, check_text, without_nulls, wrong_type

Row = dict[str, Any]
Kind = Literal["pair", "ranking", "demonstration"]

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_TOKENS = (*TOKEN_COLUMNS, "completion_ids", "completions_ids")
_TEXTS = ("prompt", "chosen", "rejected", "conversations", "completion", "messages", "completions")
_NUMBERS = ("weight", "margin", "chosen_probability", "scores", "ranks", "label")
KEPT_BESIDE = "feedback_"  # how columns begin that say where a row of feedback comes from
# These change what the model sees; a run that ignored them would train on something else than the user wrote.
REFUSED_COLUMNS = {
    "images": "images are not supported",
    "image": "images are not supported",
    "chat_template_kwargs": "arguments for the chat template are not supported",
}
HOLDING_TEXT = frozenset((*_TEXTS, *_TOKENS))
TEXT_COLUMNS = frozenset(("prompt", "chosen", "rejected", "completion", "system"))  # a string is text in them
COLUMNS = (*_TEXTS, *_TOKENS, *_NUMBERS, "system", "tools", *REFUSED_COLUMNS)
SHAPES = (
    "a row holds prompt, chosen, rejected (all strings or all message lists); chosen, rejected (whole dialogues); "
    "conversations, chosen, rejected; prompt, completions and scores or ranks; or prompt_ids, chosen_ids, rejected_ids"
)
SHAPES_OF_DEMONSTRATIONS = (
    "a row of a supervised run holds prompt, completion (both strings or both message lists); messages; or one of the "
    "shapes with preferences, of which it reads the best completion"
)

# A row is what the first of these says of which it has a column.
_KINDS: dict[Kind, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "ranking": ("completions",),
    "demonstration": ("completion", "messages"),
}

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
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # those that no chat template knows as roles


class MissingValueError(Exception):
    """A row leaves a column empty that the other rows of its file may well fill."""


def holds_token_ids(row: Row) -> bool:
    """Whether a row is already tokenised, so that it needs no tokenizer."""
    return any(row.get(column) is not None for column in _TOKENS)


def kind_of(row: Row) -> Kind:
    """What a row is read as: chosen and rejected before a list of completions, that before one completion.

    Values tell, and only where there are none the names of the columns, so that a null is found in the right one.
    """
    suffix = "_ids" if holds_token_ids(row) else ""
    filled = {column for column, value in row.items() if value is not None}
    for there in (filled, row.keys()):
        for kind, columns in _KINDS.items():
            if any(f"{column}{suffix}" in there for column in columns):
                return kind
    # A whole conversation is rated where it has a label; else it is the prompt of a pair.
    return "demonstration" if {"conversations", "label"} <= filled else "pair"


def ignored_columns(row: Row, demonstrations: bool = False) -> set[str]:
    """The columns of a row that mean nothing here, so that the user can be told of them.

    One that means something in other rows is named only where it holds a value: one schema for all rows gives every
    row the columns of every other. What `dpo-dist feedback` keeps beside its rows is no news.
    """
    used = {"weight", "system", "tools", *REFUSED_COLUMNS, *read_columns(row)}
    if not demonstrations and kind_of(row) == "pair":
        used |= {"margin", "chosen_probability"}
    return {
        column
        for column in row
        if column not in used
        and not column.startswith(KEPT_BESIDE)
        and (column not in COLUMNS or row[column] is not None)
    }


def read_columns(row: Row) -> tuple[str, ...]:
    """Where the row's prompt and completions are found, and what orders or judges them."""
    kind, suffix = kind_of(row), "_ids" if holds_token_ids(row) else ""
    if kind == "ranking":
        return (f"prompt{suffix}", f"completions{suffix}", "scores", "ranks")
    if kind == "pair":
        prompt = "prompt" if row.get("conversations") is None or suffix else "conversations"
        return (f"{prompt}{suffix}", f"chosen{suffix}", f"rejected{suffix}")
    if not suffix and row.get("completion") is None:
        for column in ("messages", "conversations"):
            if row.get(column) is not None:
                return (column, "label")
    return (f"prompt{suffix}", f"completion{suffix}", "label")


def required(row: Row, column: str, source: str, shapes: str = SHAPES) -> Any:
    """A column that the row must have, of any type; `shapes` says in an error what rows may hold."""
    if column not in row:
        raise RowError(
            f"{source}: no column {column} (the row has {', '.join(row) or 'none'}); {shapes}",
            MISSING_COLUMN,
        )
    if row[column] is None:
        raise MissingValueError(f"{column} is null")
    return row[column]


def all_strings(row: Row, columns: Sequence[str], source: str) -> bool:
    """True if the columns are all strings, False if all are message lists."""
    strings = [column for column in columns if isinstance(row[column], str)]
    others = [column for column in columns if column not in strings]
    if strings and others:
        raise RowError(
            f"{source}: {' and '.join(strings)} {'is a string' if len(strings) == 1 else 'are strings'}, "
            f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} not; "
            "give all columns of a row as strings, or all as message lists"
        )
    for column in strings:
        check_text(row[column], column, source)
    if strings and tools_of(row, source):
        raise RowError(
            f"{source}: tools are set, and nothing shows them to the model; give the row as message lists",
            UNREAD_COLUMN,
        )
    if strings and system_of(row, source):
        raise RowError(
            f"{source}: system is set, and rows of strings have no place for it; "
            "write it into the prompt and remove the column, or give the row as message lists",
            UNREAD_COLUMN,
        )
    return bool(strings)


def messages_of(value: Any, column: str, source: str) -> Messages:
    """A list of messages, each as {role, content, ...}."""
    if not isinstance(value, list):
        wrong_type(source, column, value, "a list of messages")
    return tuple(_message(message, f"{column}[{index}]", source) for index, message in enumerate(value))


def answers_of(values: Mapping[str, Any], prompt: Messages, source: str) -> tuple[Messages, ...]:
    """What the assistant says in each of some columns: messages or a single one, alone or all after the prompt's.

    Args:
        values: the columns by name.
    """
    answers = [
        messages_of([value] if isinstance(value, dict) else value, column, source) for column, value in values.items()
    ]
    # A prompt that is the assistant's may be answered with the same words: nothing is cut from such completions.
    begins = len(prompt) if prompt and prompt[0]["role"] != "assistant" else 0
    if all(answer[:begins] == prompt for answer in answers):
        answers = [answer[begins:] for answer in answers]
    for column, messages in zip(values, answers, strict=True):
        if messages and messages[0]["role"] != "assistant":
            raise RowError(
                f"{source}: {column} begins with a message of role {messages[0]['role']!r}; where the prompt stands in "
                "a column of its own, a completion begins with the assistant's message (or leave out the column "
                "prompt)",
                WRONG_ROLE,
            )
    return tuple(answers)


def _message(value: Any, where: str, source: str) -> Message:
    """A message as {role, content, ...}; ShareGPT's {from, value} is renamed."""
    if not isinstance(value, dict):
        wrong_type(source, where, value, "a message {role, content}")
    message = {key: item for key, item in value.items() if item is not None}
    check_nested({key: item for key, item in message.items() if key not in ("content", "value")}, where, source)
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise RowError(f"{source}: {where}.from={speaker!r} is unknown; use one of {', '.join(ROLES)}", WRONG_ROLE)
        message["role"] = ROLES[speaker]
        if "value" in message:
            message["content"] = message.pop("value")
    # The same names as roles; `tool` and the like are left to the chat template.
    message["role"] = _SPEAKERS.get(str(message.get("role")), message.get("role"))
    if not isinstance(message["role"], str):
        raise RowError(f"{source}: {where} has no role; a message is {{role, content}} or {{from, value}}", WRONG_ROLE)
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):
        content = _joined_parts(content, f"{where}.content", source)
    if not isinstance(content, str):
        wrong_type(source, f"{where}.content", content, "a string")
    check_text(content, f"{where}.content", source)
    return {**message, "content": content}


def _joined_parts(parts: list[Any], where: str, source: str) -> str:
    """The text of content in parts, as OpenAI's interface has it: `[{type: text, text: ...}]`."""
    texts = []
    for k, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            what = (
                f"{where}[{k}] is a part of type {kind!r}"
                if kind not in (None, "text")
                else f"{where}[{k}]={part!r:.60}"
            )
            raise RowError(f"{source}: {what}, which is no text; give parts {{type: text, text: ...}}", UNREAD_COLUMN)
        texts.append(part["text"])
    return "".join(texts)


def system_of(row: Row, source: str) -> str:
    """The `system` column; empty if there is nothing in it."""
    system = row.get("system")
    if system is None:
        return ""
    if not isinstance(system, str):
        wrong_type(source, "system", system, "a string")
    check_text(system, "system", source)
    return system if system.strip() else ""


def with_system(messages: Messages, column: str, row: Row, source: str) -> Messages:
    """The messages of a column, after the system message that the `system` column holds, if any."""
    system = system_of(row, source)
    if not system:
        return messages
    if not messages or messages[0]["role"] != "system":
        return ({"role": "system", "content": system}, *messages)
    if messages[0]["content"].strip() != system.strip():
        raise RowError(
            f"{source}: system is set, and {column} begins with another system message; keep one of the two",
            WRONG_ROLE,
        )
    return messages


def refuse_without_effect(row: Row, source: str) -> None:
    """Token ids are used as they are: what would change the rendered text comes too late."""
    for column, value in (("system", system_of(row, source)), ("tools", tools_of(row, source))):
        if value:
            raise RowError(
                f"{source}: {column} is set, and the token ids are used as they are; "
                f"remove the column {column} (what it says must be in prompt_ids already)",
                UNREAD_COLUMN,
            )


def tools_of(row: Row, source: str) -> tuple[Any, ...] | None:
    """The `tools` column: a list, or the same as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(
                f"{source}: tools is not JSON ({error}); give a list of tools, or the list as JSON"
            ) from None
        tools = without_nulls(tools)
    if not tools:
        return None
    check_nested(tools, "tools", source)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        wrong_type(source, "tools", tools, "a list of tools (JSON schemas of functions)")
    return tuple(tools)
