"""What is cut of a prompt that is too long: its beginning, for the end is what the completions answer."""

from collections.abc import Iterator, Sequence

from dpo_dist.data import Message


def without_oldest_turn(prompt: Sequence[Message]) -> tuple[Message, ...] | None:
    """A conversation without its first question and what followed it; None where no other question is left.

    System messages at its beginning stay; of messages of the user's that follow one another all go, or none.
    """
    begin = next((k for k, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    for k in range(begin + 1, len(prompt)):
        if prompt[k]["role"] == "user" and prompt[k - 1]["role"] != "user":
            return (*prompt[:begin], *prompt[k:])
    return None


def shorter_prompts(prompt: Sequence[Message]) -> Iterator[tuple[Message, ...]]:
    """A conversation without its oldest turn, without its two oldest, and so on; the last one has one question."""
    shorter = without_oldest_turn(prompt)
    while shorter is not None:
        yield shorter
        shorter = without_oldest_turn(shorter)


def last_tokens(prompt_ids: tuple[int, ...], bos: tuple[int, ...], room: int) -> tuple[int, ...] | None:
    """The end of a prompt in `room` tokens, after BOS if it begins with it; None where there is no room for any."""
    kept = bos if prompt_ids[: len(bos)] == bos else ()
    rest = room - len(kept)
    return (*kept, *prompt_ids[-rest:]) if rest > 0 else None
