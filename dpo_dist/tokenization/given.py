"""Turns inside a completion that are not the assistant's: which of its tokens they are.

A completion may go on over several turns: a question of the user's, what a tool answered. At inference somebody else
writes these, and the header of the assistant's next turn.
"""

from collections.abc import Callable, Sequence
from typing import cast

from dpo_dist.data import Message, PreferenceExample, RowFault
from dpo_dist.data.example import TEMPLATE_ERROR, TURNS_MOVED, is_token_ids
from dpo_dist.tokenization.conversation import Renderer
from dpo_dist.tokenization.text_ids import TextIds
from dpo_dist.tokenization.turns import given

Spans = list[tuple[int, int]]  # (begin, end) in a text, in characters
_WAY_OUT = "let the completion be the assistant's next turn alone, or learn all turns (data.assistant_only_loss=false)"


class GivenTurns:
    """Marks the tokens of completions that are not the assistant's.

    Args:
        renderer: of conversations.
        text_ids: of texts.
    """

    def __init__(self, renderer: Renderer, text_ids: TextIds) -> None:
        self._renderer, self._text_ids = renderer, text_ids

    def marked(
        self, example: PreferenceExample, texts: Sequence[str], completions: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[int, ...], ...] | RowFault:
        """The completions with what is given in them marked (`turns.py`).

        Args:
            example: as text.
            texts: its prompt, and each whole conversation, rendered.
            completions: the ids of each.
        """
        if isinstance(example.prompt, str) or is_token_ids(example.prompt):
            return completions
        found: list[tuple[int, ...]] = []
        for answer, text, ids in zip(example.completions, texts[1:], completions, strict=True):
            messages = cast(list[Message], list(answer))
            if all(message["role"] == "assistant" for message in messages):
                found.append(ids)
                continue
            spans = self._spans(example, messages, text)
            if isinstance(spans, RowFault):
                return spans
            offsets = self._offsets(text, len(texts[0]), ids)
            if offsets is None:
                what = (
                    "the tokenizer does not tell where its tokens stand in a text, and a completion has several turns"
                )
                return RowFault(TURNS_MOVED, example.source, what, _WAY_OUT)
            found.append(_with_given(ids, offsets, spans))
        return tuple(found)

    def _spans(self, example: PreferenceExample, answer: list[Message], text: str) -> Spans | RowFault:
        prompt = cast(list[Message], list(example.prompt))

        def render(messages: list[Message], asks: bool) -> str:
            return self._renderer.rendered(messages, example.tools, asks)

        try:
            spans = given_spans([*prompt, *answer], len(prompt), text, render)
        except Exception as error:
            what = f"the chat template refuses a part of the conversation ({type(error).__name__}: {error})"
            return RowFault(TEMPLATE_ERROR, example.source, what, _WAY_OUT)
        if spans is None:
            what = (
                "a completion has turns that are not the assistant's, and the chat template renders the turns before "
                "them otherwise once more follows: what is to be learned cannot be told apart"
            )
            return RowFault(TURNS_MOVED, example.source, what, _WAY_OUT)
        return spans

    def _offsets(self, text: str, num_prompt: int, ids: tuple[int, ...]) -> Spans | None:
        """Where each token of a completion stands in its conversation.

        Either it is the end of the whole, or it was tokenised on its own, from the end of the prompt on.
        """
        whole, alone = (self._text_ids.with_offsets(one) for one in (text, text[num_prompt:]))
        if whole is None or alone is None:
            return None
        if tuple(whole[0][-len(ids) :]) == ids:
            return whole[1][-len(ids) :]
        if tuple(alone[0]) == ids:
            return [(num_prompt + first, num_prompt + last) for first, last in alone[1]]
        return None


def given_spans(
    conversation: Sequence[Message], num_prompt: int, text: str, render: Callable[[list[Message], bool], str]
) -> Spans | None:
    """Where in a rendered conversation the turns of its completion stand that are given.

    Each reaches to the end of the header of the assistant's turn behind it.

    Args:
        conversation: prompt and completion.
        num_prompt: messages of the prompt.
        text: all of it, rendered.
        render: messages to text, with or without the header of an answer.
    Returns:
        None if the template renders a beginning of the conversation otherwise once more follows.
    """
    found: Spans = []
    begin: int | None = None
    for place in range(num_prompt, len(conversation)):
        is_given = conversation[place]["role"] != "assistant"
        if is_given == (begin is not None):
            continue
        before = render(list(conversation[:place]), not is_given)
        if not text.startswith(before):
            return None
        if begin is None:
            begin = len(before)
        else:
            found.append((begin, len(before)))
            begin = None
    return found


def _with_given(ids: Sequence[int], offsets: Spans, spans: Spans) -> tuple[int, ...]:
    """The ids, those marked that lie wholly in one of the spans.

    Some tokenizers leave spaces out: a token of spaces alone has no width, and stands where it ends.
    """
    return tuple(
        given(token) if any(begin <= first and begin < last <= end for begin, end in spans) else token
        for token, (first, last) in zip(ids, offsets, strict=True)
    )
