"""Conversations as text, by a chat template; and whether all that a user wrote reaches the text.

A template is a program by somebody else. What it ignores leaves no trace: a tool call that it has never heard of
becomes an empty turn, and the model learns to say nothing. So every part of a conversation is looked for in what was
rendered (`traces.py`).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dpo_dist.data import Message, PreferenceExample, RowFault
from dpo_dist.data.example import NOT_RENDERED, PROMPT_MOVED, TEMPLATE_ERROR, WRONG_ROLE, common_prefix_length
from dpo_dist.errors import ModelError
from dpo_dist.tokenization.traces import Lost, Shape, find_lost, has_contents, shape_of, short

_ROLES = frozenset({"system", "user", "assistant", "tool"})
# What a caller of a chat template says itself.
_GIVEN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"alpha": "omega"}}}


class Renderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: with a chat template, or without: then messages are refused.
        name: the tokenizer as `key=value` of the configuration, for messages.
        settings: what the template is given besides the conversation, by the names that it reads.
    Raises:
        ModelError: the template reads no such name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, settings: Mapping[str, Any]) -> None:
        self._tokenizer, self._name, self._settings = tokenizer, name, settings
        self._template = str(tokenizer.chat_template or "")
        for setting in settings:
            if setting in _GIVEN:
                raise ModelError(f"data.chat_template_kwargs.{setting} is given to every chat template; leave it out")
            if not re.search(rf"\b{re.escape(setting)}\b", self._template):
                raise ModelError(
                    f"data.chat_template_kwargs.{setting}: the chat template of {name} does not read it; leave it out"
                )
        self._arguments: Literal["given", "objects", "strings"] | None = None
        self._whole_shapes: set[Shape] = set()  # of rows of which nothing was left out

    def texts(self, example: PreferenceExample) -> list[str] | RowFault:
        """The prompt with its generation header, and for each completion the whole conversation.

        Raises:
            ModelError: there is no chat template.
        """
        if not self._template:
            raise ModelError(
                f"{self._name} has no chat template, and {example.source} holds chat messages; "
                "name the tokenizer of an instruct model in model.tokenizer_name_or_path, give a template as "
                "data.chat_template, or give rows of strings"
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
            if moved := self._moved(prompt, example.tools, asked, whole):
                return RowFault(PROMPT_MOVED, example.source, *moved)
            lost = self._lost(example.tools, prompt, asked, conversations, whole)
        # It may raise anything on a conversation that it does not expect.
        except Exception as error:
            what = f"the chat template refuses the conversation ({type(error).__name__}: {error})"
            return RowFault(TEMPLATE_ERROR, example.source, what)
        if lost:
            return RowFault(NOT_RENDERED, example.source, *lost)
        return [asked, *whole]

    def rendered(self, messages: list[Message], tools: Sequence[Any] | None, asks: bool) -> str:
        """A part of a conversation, with the header of an answer or without, in the form that `texts` gave of it."""
        return self._render(self._with_arguments(messages), tools, add_generation_prompt=asks)

    def _lost(
        self,
        tools: Sequence[Any] | None,
        prompt: list[Message],
        asked: str,
        conversations: list[list[Message]],
        whole: list[str],
    ) -> Lost | None:
        """What of the row the template leaves out.

        To find that takes as many renderings again. They are saved where a row of the same shape lost nothing, and the
        text has every content in its place, word by word: then a template that looks at words has not left any out.
        """
        shape = shape_of([prompt, *conversations]) if not tools else None
        texts = zip([prompt, *conversations], [asked, *whole], strict=True)
        if shape in self._whole_shapes and all(has_contents(text, messages) for messages, text in texts):
            return None
        lost = self._lost_tools(prompt, tools, asked)
        lost = lost or find_lost(
            prompt, len(prompt), asked, lambda m: self._render(m, tools, add_generation_prompt=True), True
        )
        for conversation, text in zip(conversations, whole, strict=True):
            render = partial(self._render, tools=tools)
            lost = lost or find_lost(conversation, len(prompt), text, render, is_prompt=False)
        if shape is not None and lost is None:
            self._whole_shapes.add(shape)
        return lost

    def _render(self, messages: list[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._settings,
            )
        )

    def _unknown_role(self, messages: Sequence[Message]) -> str | None:
        """A role that is neither common nor named by the template."""
        for role in dict.fromkeys(str(message["role"]) for message in messages):
            if role not in _ROLES and f"'{role}'" not in self._template and f'"{role}"' not in self._template:
                return role
        return None

    def _lost_tools(self, prompt: list[Message], tools: Sequence[Any] | None, asked: str) -> Lost | None:
        try:
            if not tools or self._render(prompt, None, add_generation_prompt=True) != asked:
                return None
        except Exception:  # without them it is not even a conversation
            return None
        return (
            "the chat template does not show tools to the model",
            "name the tokenizer of a model that was trained with tools, or remove the column tools",
        )

    def _moved(
        self, prompt: list[Message], tools: Sequence[Any] | None, asked: str, whole: Sequence[str]
    ) -> tuple[str, str] | None:
        """What of the prompt stands behind the border, where it is rendered otherwise once an answer follows.

        The header of the answer may well differ. The messages of the prompt may not: what of them comes after the
        border would be learned as part of the answer.
        """
        if all(text.startswith(asked) for text in whole):
            return None
        bare = self._render(prompt, tools)
        border = min(common_prefix_length(bare, text) for text in whole)
        # Some templates end any conversation with EOS.
        if not bare[border:].replace(str(self._tokenizer.eos_token or ""), "").strip():
            return None
        roles = [message["role"] for message in prompt]
        way_out = "name another tokenizer, or leave out what it renders in two ways"
        if roles[-1] == "assistant":
            way_out = "join the prompt's last message and the completion, both the assistant's, into one"
        elif "system" in roles:
            way_out = "write the system message into the first user message, or name another tokenizer"
        return (
            "the chat template renders the prompt in another way once an answer follows, and words of the prompt "
            f"become part of the completion: {short(whole[0][border:])}",
            way_out,
        )

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
        if len(texts) < 2:
            return "given" if not texts else "objects" if "objects" in texts else "strings"
        as_objects = texts["objects"]
        if "'alpha': 'omega'" in as_objects:  # as Python writes it: text is wanted
            return "strings"
        if '"alpha": "omega' in as_objects or '"alpha":"omega' in as_objects:
            return "objects" if '\\"alpha' in texts["strings"] else "given"
        return "objects" if "omega" in as_objects else "given"  # in a form of its own


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
