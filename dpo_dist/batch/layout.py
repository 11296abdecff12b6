"""Which queries see which keys in a packed forward.

T packed tokens   S segments   U gathered keys
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class AttentionLayout:
    """Which queries see which keys; travels through the model as one keyword argument.

    Query i of a segment sees key j where j <= i + (its keys - its queries): causal, aligned at the bottom right.
    """

    cu_q: Int[Tensor, " S_plus_1"]  # int32, where each segment's queries begin among the T tokens
    cu_k: Int[Tensor, " S_plus_1"]  # int32, where each segment's keys begin among the U gathered keys
    kv_index_U: Int[Tensor, " U"] | None  # which token each gathered key is; None: every token once, in order
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    # The inverse of kv_index_U: where each token's first copy is, and the second, third, ... copies of those that have
    # one, copy after copy; a token is at most once among the n-th copies.
    first_copy_T: Int[Tensor, " T"] | None = None
    further_token_F: Int[Tensor, " F"] | None = None
    further_place_F: Int[Tensor, " F"] | None = None
    further_lengths: tuple[int, ...] = ()
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)  # kept for the layers
    reached: set[int] = field(default_factory=set, repr=False)  # ids of the attention modules that were handed this

    @property
    def max_q(self) -> int:
        """Longest segment, in queries."""
        return max(self.q_lengths)

    @property
    def max_k(self) -> int:
        """Longest segment, in keys."""
        return max(self.k_lengths)


def build_layout(
    q_lengths: Sequence[int], k_lengths: Sequence[int], kv_index: Sequence[int] | np.ndarray, num_tokens: int
) -> AttentionLayout:
    """The layout of segments that follow one another.

    Args:
        q_lengths, k_lengths: queries and keys of each segment.
        kv_index: which token each key is, segment after segment; every token is at least one key.
        num_tokens: that have keys.
    """
    return AttentionLayout(
        cu_q=_cumulative(q_lengths),
        cu_k=_cumulative(k_lengths),
        q_lengths=tuple(q_lengths),
        k_lengths=tuple(k_lengths),
        **_gathering(kv_index, num_tokens),
    )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def _gathering(kv_index: Sequence[int] | np.ndarray, num_tokens: int) -> dict[str, Any]:
    """The fields of a layout that say which token is read where; none if every token is read once, in order."""
    tokens = np.asarray(kv_index)
    if len(tokens) == num_tokens and (tokens == np.arange(num_tokens)).all():
        return {"kv_index_U": None}
    places = np.argsort(tokens, kind="stable")  # by token, and a token's copies in their order
    counts = np.bincount(tokens, minlength=num_tokens)
    copy = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
    rounds = [places[copy == number] for number in range(counts.max())]
    further = np.concatenate([places[:0], *rounds[1:]])
    return {
        "kv_index_U": torch.from_numpy(tokens),
        "first_copy_T": torch.from_numpy(rounds[0]),
        "further_token_F": torch.from_numpy(tokens[further]),
        "further_place_F": torch.from_numpy(further),
        "further_lengths": tuple(len(one) for one in rounds[1:]),
    }
