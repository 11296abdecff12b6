"""The micro-batch grown token by token in Python lists: slow, and read top to bottom.

What `dpo_dist.batch.build_micro_batch` is held against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_dist.batch import MicroBatch, build_layout
from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedExample
from dpo_dist.tokenization.turns import is_learned, number_learned, plain


def grown_micro_batch(
    examples: Sequence[TokenizedExample],
    completion_offsets: Sequence[int],
    share_prompts: bool,
    ld_alpha: float | None = None,
) -> MicroBatch:
    """See `build_micro_batch`."""
    parts = _Parts()
    for example, offset in zip(examples, completion_offsets, strict=True):
        parts.add_preferences(example)
        for k, completion_ids in enumerate(example.completion_ids):
            parts.add_completion(example.prompt_ids, completion_ids, offset + k, share_prompts and k > 0)
        if ld_alpha is not None:
            parts.weigh_tokens(example, ld_alpha)
    if not examples:
        parts.add_filler()
    return parts.finish(is_filler=not examples)


class _Parts:
    """Python lists that grow to a micro-batch."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.q_lengths: list[int] = []
        self.k_lengths: list[int] = []
        self.kv_index: list[int] = []
        self.score_index: list[int] = []
        self.targets: list[int] = []
        self.completion_of: list[int] = []
        self.completion_index: list[int] = []
        self.completion_lengths: list[int] = []
        self.token_weights: list[float] = []
        self.pairs: list[tuple[int, int, Pair]] = []
        self.entries: list[int] = []
        self.chosen_weights: list[float] = []
        self.example_weights: list[float] = []
        self.ratings: list[float] = []
        self.example_weight = 0.0
        self.num_unshared_tokens = 0
        self.prompt_start = 0

    def add_preferences(self, example: TokenizedExample) -> None:
        first, prompt = len(self.completion_index), len(example.prompt_ids)
        lengths = [len(ids) for ids in example.completion_ids]
        self.example_weight += example.weight
        self.example_weights += [example.weight] * len(lengths)
        self.ratings += [1.0 if good else -1.0 for good in example.ratings] or [0.0] * len(lengths)
        if not example.pairs:  # demonstrations, or rated
            self.chosen_weights += [example.weight * good for good in example.ratings or [True] * len(lengths)]
            self.num_unshared_tokens += sum(prompt + length for length in lengths)
            return
        self.entries += [example.entry] * len(example.pairs)
        chosen_weights = [0.0] * len(lengths)
        for pair in example.pairs:
            self.pairs.append((first + pair.chosen, first + pair.rejected, pair))
            chosen_weights[pair.chosen] += pair.weight
            self.num_unshared_tokens += 2 * prompt + lengths[pair.chosen] + lengths[pair.rejected]
        self.chosen_weights += chosen_weights

    def add_completion(
        self, prompt: Sequence[int], completion: Sequence[int], index: int, prompt_is_there: bool
    ) -> None:
        if not prompt_is_there:
            self.prompt_start = len(self.ids)
            self.ids += prompt
            self.positions += range(len(prompt))
        own_start, num_inputs = len(self.ids), len(completion) - 1
        ids = completion if min(completion) >= 0 else plain(completion)
        self.ids += ids[:-1]  # nothing is predicted from the last token
        self.positions += range(len(prompt), len(prompt) + num_inputs)
        q_length = num_inputs + (0 if prompt_is_there else len(prompt))
        if q_length:  # a one-token completion after a shared prompt has nothing of its own to compute
            self.q_lengths.append(q_length)
            self.k_lengths.append(len(prompt) + num_inputs)
            self.kv_index += range(self.prompt_start, self.prompt_start + len(prompt))
            self.kv_index += range(own_start, own_start + num_inputs)
        # The last prompt position predicts the first token of every completion.
        places = [self.prompt_start + len(prompt) - 1, *range(own_start, own_start + num_inputs)]
        if ids is not completion:  # what is given is read, and not scored
            places = [place for place, token in zip(places, completion, strict=True) if is_learned(token)]
            ids = [token for token in completion if is_learned(token)]
        self.score_index += places
        self.targets += ids
        self.completion_of += [len(self.completion_index)] * len(ids)
        self.completion_index.append(index)
        self.completion_lengths.append(len(ids))

    def weigh_tokens(self, example: TokenizedExample, ld_alpha: float) -> None:
        lengths = [number_learned(ids) for ids in example.completion_ids]
        public = min(lengths)
        for length in lengths:
            self.token_weights += [1.0] * public + [ld_alpha] * (length - public)

    def add_filler(self) -> None:
        self.ids, self.positions, self.q_lengths, self.k_lengths, self.kv_index = [0, 0], [0, 1], [2], [2], [0, 1]

    def finish(self, is_filler: bool) -> MicroBatch:
        layout = build_layout(self.q_lengths, self.k_lengths, self.kv_index, len(self.ids))
        return MicroBatch(
            input_ids_T=_indices(self.ids),
            position_ids_T=_indices(self.positions),
            layout=layout,
            score_index_M=_indices(self.score_index),
            target_ids_M=_indices(self.targets),
            completion_of_M=_indices(self.completion_of),
            completion_index_C=_indices(self.completion_index),
            completion_length_C=_indices(self.completion_lengths),
            pair_chosen_B=_indices([pair[0] for pair in self.pairs]),
            pair_rejected_B=_indices([pair[1] for pair in self.pairs]),
            pair_weight_B=_numbers([pair.weight for _, _, pair in self.pairs]),
            pair_margin_B=_numbers([pair.margin for _, _, pair in self.pairs]),
            pair_probability_B=_numbers([pair.probability for _, _, pair in self.pairs]),
            pair_entry_B=_indices(self.entries),
            chosen_weight_C=_numbers(self.chosen_weights),
            example_weight_C=_numbers(self.example_weights),
            rating_C=_numbers(self.ratings),
            example_weight=self.example_weight,
            num_tokens=0 if is_filler else len(self.ids),
            num_unshared_tokens=self.num_unshared_tokens,
            token_weight_M=_numbers(self.token_weights) if self.token_weights else None,
        )


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
