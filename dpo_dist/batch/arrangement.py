"""Where each token of some examples lies in one packed forward: arithmetic on lengths, for all tokens at once.

T packed tokens   U gathered keys   M scored tokens   C completions   E examples   L tokens of all completions
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float32, Int64

from dpo_dist.batch.layout import AttentionLayout, build_layout
from dpo_dist.tokenization import TokenizedExample


class Arrangement:
    """[prompt | completion 0 | completion 1 | ...] of each example, or with a prompt before every completion.

    The last token of a completion is no input, for nothing is predicted from it.

    Args:
        examples: what lies there, one after another.
        share_prompts: lay each prompt once, or once per completion.

    Attributes:
        learned_C: tokens of each completion that are scored.
        num_tokens: T.
    """

    def __init__(self, examples: Sequence[TokenizedExample], share_prompts: bool) -> None:
        self._count_E = _lengths([example.completion_ids for example in examples])
        prompts = [example.prompt_ids for example in examples]
        completions = [ids for example in examples for ids in example.completion_ids]
        self._prompt_C, self._length_C = np.repeat(_lengths(prompts), self._count_E), _lengths(completions)
        self._has_prompt_C = np.ones(len(completions), dtype=bool)
        if share_prompts:
            self._has_prompt_C = _places(np.zeros_like(self._count_E), self._count_E) == 0
        else:
            prompts = [example.prompt_ids for example in examples for _ in example.completion_ids]
        self._prompt_ids, self._ids_L = _flat(prompts), _flat(completions)
        self._num_inputs_C = self._length_C - 1
        self._num_laid_C = np.where(self._has_prompt_C, self._prompt_C, 0)  # of the prompt before it
        self._num_queries_C = self._num_laid_C + self._num_inputs_C
        start_C = np.cumsum(self._num_queries_C) - self._num_queries_C
        self._own_start_C = start_C + self._num_laid_C
        # Of the completion itself, or of the last one before it that has a prompt.
        self._prompt_start_C = start_C[np.maximum.accumulate(np.where(self._has_prompt_C, np.arange(len(start_C)), 0))]
        self._is_learned_L = self._ids_L >= 0
        ends_C = np.cumsum(self._length_C)
        learned = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._is_learned_L)])
        self.learned_C: Int64[np.ndarray, " C"] = learned[ends_C] - learned[ends_C - self._length_C]
        self.num_tokens = int(self._num_queries_C.sum())

    def input_ids(self) -> Int64[np.ndarray, " T"]:
        """What the model reads."""
        is_prompt_T = np.repeat(
            np.tile([True, False], len(self._length_C)), _in_turns(self._num_laid_C, self._num_inputs_C)
        )
        is_input_L = np.ones(len(self._ids_L), dtype=bool)
        is_input_L[np.cumsum(self._length_C) - 1] = False
        ids_T = np.empty(self.num_tokens, dtype=np.int64)
        ids_T[is_prompt_T] = self._prompt_ids
        given = np.invert(self._ids_L)  # -1 - id
        ids_T[~is_prompt_T] = np.maximum(self._ids_L, given)[is_input_L]
        return ids_T

    def positions(self) -> Int64[np.ndarray, " T"]:
        """In the sequence of prompt and completion that a token belongs to."""
        return _places(self._prompt_C - self._num_laid_C, self._num_queries_C)

    def layout(self) -> AttentionLayout:
        """A segment for each completion that has something of its own to compute."""
        has_C = self._num_queries_C > 0  # a one-token completion after a shared prompt has not
        prompt_C, num_inputs_C = self._prompt_C[has_C], self._num_inputs_C[has_C]
        prompt_start_C, own_start_C = self._prompt_start_C[has_C], self._own_start_C[has_C]
        return build_layout(
            self._num_queries_C[has_C].tolist(),
            (prompt_C + num_inputs_C).tolist(),
            _places(_in_turns(prompt_start_C, own_start_C), _in_turns(prompt_C, num_inputs_C)),
            self.num_tokens,
        )

    def score_index(self) -> Int64[np.ndarray, " M"]:
        """The position that predicts each scored token: of a completion's first one the prompt's last."""
        last_C = self._prompt_start_C + self._prompt_C - 1
        starts, lengths = _in_turns(last_C, self._own_start_C), _in_turns(np.ones_like(last_C), self._num_inputs_C)
        return _places(starts, lengths)[self._is_learned_L]

    def targets(self) -> Int64[np.ndarray, " M"]:
        """The scored tokens: what is given is read, and not scored."""
        return self._ids_L[self._is_learned_L]

    def completion_of(self) -> Int64[np.ndarray, " M"]:
        """Which completion each of them belongs to."""
        return np.repeat(np.arange(len(self.learned_C)), self.learned_C)

    def token_weights(self, ld_alpha: float) -> Float32[np.ndarray, " M"]:
        """1 for as many tokens of a completion as the shortest one of its example has, and `ld_alpha` beyond."""
        first_E = np.cumsum(self._count_E) - self._count_E
        shortest_C = np.repeat(np.minimum.reduceat(self.learned_C, first_E), self._count_E)
        is_public_M = _places(np.zeros_like(shortest_C), self.learned_C) < np.repeat(shortest_C, self.learned_C)
        return np.where(is_public_M, 1.0, ld_alpha).astype(np.float32)


def _places(starts: Int64[np.ndarray, " N"], lengths: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " all"]:
    """`range(start, start + length)` of each, one after another."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


def _in_turns(first: Int64[np.ndarray, " N"], second: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " both"]:
    """One of the first, one of the second, and so on."""
    return np.stack([first, second], axis=1).ravel()


def _lengths(lists: Sequence[Sequence[object]]) -> Int64[np.ndarray, " N"]:
    return np.array([len(one) for one in lists], dtype=np.int64)


def _flat(lists: Sequence[Sequence[int]]) -> Int64[np.ndarray, " all"]:
    # A loop in C, 14 ns for each token on an AMD EPYC.
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=sum(map(len, lists)))
