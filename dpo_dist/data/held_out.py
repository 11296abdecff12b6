"""Which prompts are held out of the data that are trained on.

A prompt decides by the hash of its token ids, as the model sees them, so that it is on the same side in every file, for
every seed and number of processes, and whatever rows stand around it; and a larger share only adds some.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

Part = Literal["whole", "trained", "held_out"]


def is_held_out(prompt_ids: Sequence[int], share: float) -> bool:
    """Whether a prompt is among the `share` of all prompts (0 to 1) that is not trained on."""
    digest = hashlib.blake2b(np.asarray(prompt_ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
