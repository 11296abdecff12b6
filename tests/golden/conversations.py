"""Rows of messages whose token ids TRL has recorded, by chat templates in the manner of well-known models."""

import json
from typing import Any

USER = {"role": "user", "content": "What time is it?"}
ZONE = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "clock", "description": "Tells the time.", "parameters": ZONE}}


def says(content: str, **more: Any) -> dict[str, Any]:
    """A turn of the assistant's."""
    return {"role": "assistant", "content": content, **more}


def calls(arguments: Any) -> dict[str, Any]:
    """A turn that only calls the tool."""
    call = {"id": "call00001", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    return says("", tool_calls=[call])


def row(**more: Any) -> dict[str, Any]:
    """A pair of answers to one question."""
    return {"prompt": [USER], "chosen": [says("Noon.")], "rejected": [says("Late.")], **more}


ANSWERED = {"role": "tool", "name": "clock", "tool_call_id": "call00001", "content": "12:00"}
ROWS: dict[str, dict[str, Any]] = {
    "one turn": row(),
    "system": row(prompt=[{"role": "system", "content": "Be brief."}, USER]),
    "several turns": row(prompt=[USER, says("Noon."), {"role": "user", "content": "Are you sure?"}]),
    "whole dialogues": {"chosen": [USER, says("Noon.")], "rejected": [USER, says("Late.")]},
    "thinking": row(chosen=[says("Noon.", reasoning_content="The sun is high.")]),
    "earlier thinking": row(
        prompt=[USER, says("Noon.", reasoning_content="The sun is high."), {"role": "user", "content": "Sure?"}]
    ),
    "tools": row(tools=[TOOL]),
    "call": row(tools=[TOOL], chosen=[calls({"zone": "UTC"})]),
    "call as text": row(tools=[TOOL], chosen=[calls(json.dumps({"zone": "UTC"}))]),
    "call and answer": row(tools=[TOOL], prompt=[USER, calls({"zone": "UTC"}), ANSWERED]),
    "nulls": row(prompt=[{**USER, "name": None}], chosen=[says("Noon.", tool_calls=None)]),
    "ends with the user": row(chosen=[says("Noon."), USER], rejected=[says("Late."), USER]),
}
