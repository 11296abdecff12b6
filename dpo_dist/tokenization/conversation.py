"""Conversations as text, by a chat template; and whether all that a user wrote reaches the text.

A template is a program by somebody else. What it ignores leaves no trace: a tool call that it has never heard of
becomes an empty turn, and the model learns to say nothing. So every part of a conversation is looked for in what was
rendered, and where it is not found, the template is asked again without it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dpo_dist.data import Message, PreferenceExample, RowFault
from dpo_dist.data.example import NOT_RENDERED, PROMPT_MOVED, TEMPLATE_ERROR, WRONG_ROLE, common_prefix_length
from dpo_dist.errors import ModelError

_ROLES = frozenset({"system", "user", "assistant", "tool"})
# Parts of a message beside its content. A template may leave out reasoning of earlier turns, and many do.
_PARTS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}


class Renderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: with a chat template, or without: then messages are refused.
        name: the tokenizer as `key=value` of the configuration, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._template = str(tokenizer.chat_template or "")
        self._arguments: Literal["given", "objects", "strings"] | None = None

    def texts(self, example: PreferenceExample) -> list[str] | RowFault:
        """The prompt with its generation header, and for each completion the whole conversation.

        Raises:
            ModelError: there is no chat template.
        """
        if not self._template:
            raise ModelError(
                f"{self._name} has no chat template, and {example.source} holds chat messages; "
                "name the tokenizer of an instruct model in model.tokenizer_name_or_path, or give rows of strings"
            )
        prompt: list[Message] = list(example.prompt)  # pyright: ignore[reportArgumentType, reportAssignmentType]
        answers: list[list[Message]] = [list(one) for one in example.completions]  # pyright: ignore
        if unknown := self._unknown_role([*prompt, *(message for answer in answers for message in answer)]):
            what = f"the chat template knows no role {unknown!r}"
            return RowFault(WRONG_ROLE, example.source, what, "rename it to user, assistant, system or tool")
        try:
            prompt, answers = self._with_arguments(prompt), [self._with_arguments(answer) for answer in answers]
            conversations = [[*prompt, *answer] for answer in answers]
            asked = self._render(prompt, example.tools, add_generation_prompt=True)
            whole = [self._render(conversation, example.tools) for conversation in conversations]
            if moved := _moved_words(example, asked, whole):
                return RowFault(PROMPT_MOVED, example.source, *moved)
            lost = self._lost(prompt, example.tools, asked, len(prompt), add_generation_prompt=True)
            for conversation, text in zip(conversations, whole, strict=True):
                lost = lost or self._lost(conversation, example.tools, text, len(prompt))
        # It may raise anything on a conversation that it does not expect.
        except Exception as error:
            what = f"the chat template refuses the conversation ({type(error).__name__}: {error})"
            return RowFault(TEMPLATE_ERROR, example.source, what)
        if lost:
            return RowFault(NOT_RENDERED, example.source, *lost)
        return [asked, *whole]

    def _render(self, messages: list[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _unknown_role(self, messages: Sequence[Message]) -> str | None:
        """A role that is neither common nor named by the template."""
        roles = dict.fromkeys(str(message["role"]) for message in messages)
        named = (
            role for role in roles if role in _ROLES or f"'{role}'" in self._template or f'"{role}"' in self._template
        )
        return next(iter(roles.keys() - set(named)), None)

    # ---- traces

    def _lost(
        self, messages: list[Message], tools: Sequence[Any] | None, text: str, num_prompt: int, **options: bool
    ) -> tuple[str, str] | None:
        """The first part of a conversation that is not in its text, with a way out; None if all are."""
        if tools and self._is_same(text, lambda: self._render(messages, None, **options)):
            return (
                "the chat template does not show tools to the model",
                "name the tokenizer of a model that was trained with tools, or remove the column tools",
            )
        for index, message in enumerate(messages):
            content = message["content"].strip()
            if content and content not in text:
                other = _replaced(messages, index, {**message, "content": message["content"] + "x"})
                if self._is_same(text, lambda other=other: self._render(other, tools, **options)):
                    return (
                        f"the chat template leaves out message {index + 1} (role {message['role']}): {_short(content)}",
                        "write its text into another message, or name a tokenizer whose template has it",
                    )
            for part in filter(message.get, _PARTS):
                # A template may drop what an earlier turn thought; then it must show it while that turn is the last.
                whole = messages if index >= num_prompt or part == "tool_calls" else messages[: index + 1]
                shown = text if whole is messages else self._render(whole, tools)
                bare = _replaced(whole, index, {key: value for key, value in message.items() if key != part})
                last = options if whole is messages else {}
                if self._is_same(shown, lambda bare=bare, last=last: self._render(bare, tools, **last)):
                    return (
                        f"the chat template does not show {part} of message {index + 1} to the model",
                        f"write it into the content, or name the tokenizer of a model that was trained with {part}",
                    )
        return None

    @staticmethod
    def _is_same(text: str, other: Callable[[], str]) -> bool:
        try:
            return other() == text
        except Exception:
            return False

    # ---- arguments of tool calls

    def _with_arguments(self, messages: list[Message]) -> list[Message]:
        """Arguments as objects or as JSON text, whichever the template writes as JSON, not encoded twice."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        if self._arguments is None:
            self._arguments = self._judge_arguments()
        if self._arguments == "given":
            return messages
        convert = _as_object if self._arguments == "objects" else _as_text
        return [
            {**message, "tool_calls": [_converted(call, convert) for call in message["tool_calls"]]}
            if isinstance(message.get("tool_calls"), list)
            else message
            for message in messages
        ]

    def _judge_arguments(self) -> Literal["given", "objects", "strings"]:
        """OpenAI's arguments are JSON text, and most templates encode what they are given."""
        texts: dict[str, str] = {}
        for form, convert in (("strings", _as_text), ("objects", _as_object)):
            called = {"role": "assistant", "content": "", "tool_calls": [_converted(_CALL, convert)]}
            try:
                texts[form] = self._render([{"role": "user", "content": "u"}, called], None)
            except Exception:
                continue
        plain, encoded_twice = '"a": "b', '\\"a'
        if plain in texts.get("objects", "") and encoded_twice in texts.get("strings", encoded_twice):
            return "objects"
        if plain in texts.get("strings", "") and plain not in texts.get("objects", ""):
            return "strings"
        return "given"


def _moved_words(
    example: PreferenceExample, prompt_text: str, conversation_texts: Sequence[str]
) -> tuple[str, str] | None:
    """Words of the prompt that stand behind the border, where a prompt is rendered otherwise once an answer follows.

    Args:
        example: of messages.
        prompt_text: the prompt with its generation header.
        conversation_texts: prompt and completion, for each completion.
    Returns:
        What is wrong, and a way out; None where the prompt's words all come before the border.
    """
    if all(text.startswith(prompt_text) for text in conversation_texts):
        return None
    border = min(common_prefix_length(prompt_text, text) for text in conversation_texts)
    for text, completion in zip(conversation_texts, example.completions, strict=True):
        answer = next((words for message in completion if (words := message["content"].strip())), "")  # pyright: ignore
        end = text.find(answer, border) if answer else len(text)
        for message in example.prompt:
            words = message["content"].strip()  # pyright: ignore
            place = text.find(words, max(0, border - len(words)), end) if words else -1
            if place + len(words) > border and place >= 0:
                return (
                    "the chat template renders the prompt in another way once an answer follows, and words of the "
                    f"prompt become part of the completion: {_short(text[border:])}",
                    "write the system message into the first user message, or name another tokenizer",
                )
    return None


def _replaced(messages: list[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _converted(call: Any, convert: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _converted(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
