"""Whether every part of a conversation left a trace in the text that a chat template made of it.

Marks are put at the end of every content, and into the names and arguments of tool calls; the template renders the
conversation once more, and each mark is looked for. Where one is missing, the part itself is taken out: if the text is
the same without it, the template leaves it out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpo_dist.data import Message

Render = Callable[[list[Message]], str]
Lost = tuple[str, str]  # what is wrong, and a way out
Shape = tuple[tuple[tuple[str, bool], ...], ...]

# Parts of a message beside its content and its tool calls. A template may leave out what an earlier turn thought, and
# many do; then it must show it while that turn is the last one.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_BEGINS, _THOUGHT_ENDS = "<think>", "</think>"
_TRAINED_WITH = "name the tokenizer of a model that was trained with"


def find_lost(messages: list[Message], num_prompt: int, text: str, render: Render, is_prompt: bool) -> Lost | None:
    """The first part of a conversation that is not in its text; None if all are.

    Args:
        messages: the conversation.
        num_prompt: how many of them are the prompt; the others are learned.
        text: what they were rendered to.
        render: the template, with the conversation's tools.
        is_prompt: whether this is the prompt alone, before any answer.
    """
    marked = [_marked(message, index, index >= num_prompt) for index, message in enumerate(messages)]
    shown = _try(render, marked)
    for index, message in enumerate(messages):
        for mark, part, lost in _parts(message, index, index >= num_prompt):
            bare = [*messages[:index], part, *messages[index + 1 :]]
            if (shown is None or mark not in shown) and _try(render, bare) == text:
                return lost
        if not is_prompt and (lost := _lost_thought(messages, index, render)):
            return lost
    return None


def shape_of(conversations: Sequence[Sequence[Message]]) -> Shape | None:
    """Who speaks, and whether they say anything; None where a message holds more than its content."""
    if any(message.keys() - {"role", "content"} for messages in conversations for message in messages):
        return None
    return tuple(tuple((message["role"], bool(message["content"].strip())) for message in one) for one in conversations)


def has_contents(text: str, messages: Sequence[Message]) -> bool:
    """Whether all contents stand in a text, word by word and one behind the other."""
    place = 0
    for message in messages:
        content = message["content"].strip()
        found = text.find(content, place)
        if found < 0:
            return False
        place = found + len(content)
    return True


def _lost_thought(messages: list[Message], index: int, render: Render) -> Lost | None:
    message = messages[index]
    for key in filter(message.get, _REASONING):
        upto = messages[: index + 1]
        bare = {name: value for name, value in message.items() if name != key}
        shown = _try(render, upto)  # None where a conversation may not end here: then this cannot be told
        if shown is not None and _try(render, [*upto[:-1], bare]) == shown:
            return (
                f"the chat template does not show {key} of message {index + 1} to the model",
                f"write it into the content, or {_TRAINED_WITH} {key}",
            )
    return None


def _try(render: Render, messages: list[Message]) -> str | None:
    """The text; None where the template refuses: then what was changed did matter."""
    try:
        return render(messages)
    except Exception:
        return None


def _marked(message: Message, index: int, learned: bool) -> Message:
    """The same message with a mark in every part that has one."""
    found = dict(message)
    if content := message["content"]:
        found["content"] = (_with_thought_mark(content, index) if learned else content) + _mark(index, "end")
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        found["tool_calls"] = [_marked_call(call, index, number) for number, call in enumerate(calls)]
    return found


def _parts(message: Message, index: int, learned: bool) -> Iterator[tuple[str, Message, Lost]]:
    """Of each part: its mark, the message without it, and what to say if that makes no difference."""
    content, where = message["content"], f"message {index + 1}"
    if content.strip():
        yield (
            _mark(index, "end"),
            {**message, "content": content + "x"},
            (
                f"the chat template leaves out {where} (role {message['role']}): {short(content.strip())}",
                "write its text into another message, or name a tokenizer whose template has it",
            ),
        )
    if learned and _THOUGHT_ENDS in content:
        yield (
            _mark(index, "begin"),
            {**message, "content": content.split(_THOUGHT_ENDS)[-1].lstrip("\n")},
            (
                f"the chat template leaves out the beginning of {where}: {short(content.strip())}",
                f"{_TRAINED_WITH} such answers and whose template keeps them",
            ),
        )
    calls: list[Any] = message["tool_calls"] if isinstance(message.get("tool_calls"), list) else []
    for number, call in enumerate(calls):
        said = "a tool call" if len(calls) == 1 else f"tool call {number + 1}"
        lost = (f"the chat template does not show {said} of {where} to the model", f"{_TRAINED_WITH} tool calls")
        others = [*calls[:number], *calls[number + 1 :]]
        yield _mark(index, f"call{number}"), _with_calls(message, others), lost
        bare = [*calls[:number], _changed(call, lambda function: {**function, "arguments": {}}), *calls[number + 1 :]]
        if isinstance(_function(call).get("arguments"), dict) and _function(call)["arguments"]:
            yield _mark(index, f"argument{number}"), _with_calls(message, bare), lost
    if message.get("function_call"):
        yield (
            _mark(index, "none"),
            {name: value for name, value in message.items() if name != "function_call"},
            (f"the chat template does not show function_call of {where} to the model", "write it as tool_calls"),
        )


def _with_calls(message: Message, calls: Sequence[Any]) -> Message:
    return {**message, "tool_calls": calls} if calls else {k: v for k, v in message.items() if k != "tool_calls"}


def _with_thought_mark(content: str, index: int) -> str:
    if _THOUGHT_ENDS not in content:
        return content
    before, tag, after = content.partition(_THOUGHT_BEGINS)
    return f"{before}{tag}{_mark(index, 'begin')}{after}" if tag else _mark(index, "begin") + content


def _marked_call(call: Any, index: int, number: int) -> Any:
    def change(function: Mapping[str, Any]) -> dict[str, Any]:
        found = {**function, "name": str(function.get("name", "")) + _mark(index, f"call{number}")}
        if isinstance(function.get("arguments"), dict):
            found["arguments"] = {**function["arguments"], _mark(index, f"argument{number}"): 1}
        return found

    return _changed(call, change)


def _function(call: Any) -> Mapping[str, Any]:
    """What of a call has name and arguments: OpenAI's inner object, or the call itself."""
    inner = call.get("function", call) if isinstance(call, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _changed(call: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": change(call["function"])}
    return change(call)


def _mark(index: int, part: str) -> str:
    return f"qz{index}{part}zq"


def short(text: str) -> str:
    """Text for a message."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
