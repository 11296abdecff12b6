"""How long an example takes to compute: floating-point operations in closed form, from its lengths and a model's shape.

An addition and a multiplication are two operations. Matrix products alone are counted: of every token with the body's
weights, of every query with the keys that it sees, of every scored token with the head's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from dpo_dist.packing.sizes import ExampleSize, Lengths

HEAD_RECOMPUTES = 1.0  # logits are computed again in backward; where they are one chunk, this is too much


@dataclass(frozen=True)
class AttentionCost:
    """Some layers' attention, which see equally far."""

    window: int | None  # keys that a query sees at most; None: all before it
    per_key: float  # operations for each key that a query sees, over these layers


@dataclass(frozen=True)
class CostModel:
    """Operations of a forward pass, by what causes them; and how many times as many training takes."""

    per_token: float
    attention: tuple[AttentionCost, ...] = ()
    per_scored_token: float = 0.0
    backward: float = 2.0  # of a forward; 1 where weights are frozen, whose gradients nobody computes
    recomputed: float = 0.0  # share of the body's forward that is computed once more in backward

    def forward(self, sizes: Sequence[ExampleSize], share_prompt: bool) -> Float64[np.ndarray, " E"]:
        """Operations of the log-probabilities of examples' completions.

        Args:
            sizes: of E examples.
            share_prompt: compute every prompt once, or once per completion.
        """
        body, head = self._parts(sizes, share_prompt)
        return body + head

    def training(self, sizes: Sequence[ExampleSize], share_prompt: bool) -> Float64[np.ndarray, " E"]:
        """Operations of forward and backward, as they are executed: what is computed again is counted again.

        Args:
            sizes: of E examples.
            share_prompt: compute every prompt once, or once per completion.
        """
        body, head = self._parts(sizes, share_prompt)
        return (1.0 + self.backward + self.recomputed) * body + (1.0 + self.backward + HEAD_RECOMPUTES) * head

    def useful(self, sizes: Sequence[ExampleSize]) -> float:
        """Operations that the losses of some examples and their gradients ask for, of all together.

        Every prompt counts once, and nothing counts that is computed again: activations, logits, or the forward pass
        that finds out what a loss of whole steps matches (`matching.py`).
        """
        return (1.0 + self.backward) * float(self.forward(sizes, share_prompt=True).sum())

    def _parts(
        self, sizes: Sequence[ExampleSize], share_prompt: bool
    ) -> tuple[Float64[np.ndarray, " E"], Float64[np.ndarray, " E"]]:
        # Lengths are added up as whole numbers, and products are taken one by one: every machine has the same result.
        lengths = Lengths.of(sizes)
        body = self.per_token * lengths.input_tokens(share_prompt)
        for one in self.attention:
            body = body + one.per_key * lengths.visible_keys(share_prompt, one.window)
        return body, self.per_scored_token * lengths.scored_tokens


# Where no model is known: an example costs what it has tokens.
TOKENS = CostModel(per_token=1.0)
