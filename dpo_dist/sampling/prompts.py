"""The prompts of rows of any kind, each once, and the settings that decide what is sampled for them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dpo_dist.data import RowFault, Source
from dpo_dist.data.columns import Row, holds_token_ids, kind_of, messages_of, system_of, tools_of, with_system
from dpo_dist.data.example import UNREAD_COLUMN, Messages, RowError, blank_fault, fault_of
from dpo_dist.data.sources import example_of
from dpo_dist.data.values import check_text


@dataclass(frozen=True)
class Settings:
    """What the completions of a prompt depend on. Two runs with equal ones can be one."""

    model: str
    """A hash of the weights, or the name that a server knows the model by."""
    num_completions: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked: a string, or the messages of a conversation; and where its first row stands."""

    text: str | Messages
    source: str

    @property
    def identity(self) -> str:
        """The same for all rows that ask the same."""
        return _json(self.text)

    def key(self, settings: Settings) -> str:
        """A hash of the prompt and of the settings it is sampled with."""
        return hashlib.sha256(_json([asdict(settings), self.text]).encode()).hexdigest()

    def seed(self, settings: Settings, k: int) -> int:
        """That of its k-th completion, below 2**31: no other prompt and no order has a part in it."""
        text = _json([settings.seed, self.text, k])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def read_prompts(source: Source, as_text: bool) -> Iterator[Prompt | RowFault]:
    """The prompt of every row up to the limit, or why it has none that can be sampled.

    Args:
        source: rows of any kind.
        as_text: leave strings as they are; else each is what a user says.
    """
    for where, row in source.rows():
        try:
            found = row if isinstance(row, RowFault) else _prompt_of(row, where, as_text)
            if isinstance(found, RowFault):
                yield found
            else:
                yield blank_fault(found, {}, where) or Prompt(found, where)
        except RowError as error:
            yield fault_of(error, where)


def _prompt_of(row: Row, where: str, as_text: bool) -> str | Messages | RowFault:
    if holds_token_ids(row):
        return RowFault(UNREAD_COLUMN, where, "the row holds token ids", "give prompts as text or messages")
    if tools_of(row, where):
        what = "tools are set, and completions are sampled as text, without calls of tools"
        return RowFault(UNREAD_COLUMN, where, what, "remove the column tools, or the row")
    prompt = _asked(row, where)
    if not isinstance(prompt, str):
        return prompt
    check_text(prompt, "prompt", where)
    if not as_text:
        return with_system(({"role": "user", "content": prompt},), "prompt", row, where)
    if system_of(row, where):
        what = "system is set, and --text has no place for it"
        return RowFault(UNREAD_COLUMN, where, what, "write it into the prompt, or leave out --text")
    return prompt


def _asked(row: Row, where: str) -> str | Messages | RowFault:
    """The prompt as the row has it; what follows it is left out."""
    prompt = row.get("prompt")
    # Beside whole conversations a string only repeats their first question.
    if isinstance(prompt, str) and not isinstance(row.get("chosen"), list):
        return prompt
    if isinstance(prompt, list):
        return with_system(messages_of(prompt, "prompt", where), "prompt", row, where)
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            messages = messages_of(row[column], column, where)
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return with_system(messages, column, row, where)
    example = example_of(row, where, None, "all", demonstrations=kind_of(row) == "demonstration")
    return example if isinstance(example, RowFault) else example.prompt  # pyright: ignore[reportReturnType]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
