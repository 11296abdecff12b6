"""Which prompts are held out of the data that are trained on.

A prompt decides by its own hash, so that it is on the same side in every file, at every share up to its own, for every
seed and number of processes, and whatever rows stand around it.
"""

import hashlib
import json
from typing import Literal

from dpo_dist.data.example import PreferenceExample, RowFault, Text

Part = Literal["whole", "trained", "held_out"]


def is_held_out(prompt: Text, share: float) -> bool:
    """Whether a prompt is among the `share` of all prompts that is not trained on.

    Args:
        prompt: text, messages or token ids.
        share: 0 to 1.
    """
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=True)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def is_in_part(parsed: PreferenceExample | RowFault, part: Part, share: float) -> bool:
    """Whether a row belongs to a part of its source. Faults are told of once, with what is trained on."""
    if part == "whole":
        return True
    held_out = isinstance(parsed, PreferenceExample) and is_held_out(parsed.prompt, share)
    return held_out == (part == "held_out")
