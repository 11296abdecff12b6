"""A question that stands where nobody reads it."""

from typing import Any

from dpo_dist.data.columns import COLUMNS, Row
from dpo_dist.data.example import UNREAD_COLUMN, RowError

# What other data sets call a prompt, or what its name holds.
_PROMPTS = (
    "prompt", "question", "instruct", "input", "query", "problem", "context", "request", "user", "human", "text",
)  # fmt: skip


def require_no_other_text(row: Row, prompt: str, source: str) -> None:
    """Refuse a question that stands in a column which nobody reads, in a row without a prompt.

    The prompt would be what chosen and rejected happen to begin with, and the question would never reach the model. A
    question is a column that is called so, or text of several words that is longer than the prompt would be.

    Args:
        row: its columns.
        prompt: what the prompt would be.
        source: for messages.
    """
    unread = {name: value for name, value in row.items() if name not in COLUMNS and _is_said(value)}
    texts = [
        name
        for name, value in unread.items()
        if name.lower() in _PROMPTS
        or (isinstance(value, str) and len(value.split()) > 1 and (_is_called_so(name) or len(value) > len(prompt)))
    ]
    if texts:
        raise RowError(
            f"{source}: there is no column prompt, and {', '.join(texts)} would not be read: the prompt would be what "
            "chosen and rejected begin with; rename the column of the prompt to prompt, or remove what is no part of "
            "it",
            UNREAD_COLUMN,
        )


def _is_called_so(name: str) -> bool:
    """Whether a name holds a usual one: `user_input`; `user_id` does too, and its value is one word."""
    return any(word in name.lower() for word in _PROMPTS)


def _is_said(value: Any) -> bool:
    """Whether a value may hold somebody's words: text, or messages."""
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and isinstance(value, list | dict)
