"""One packed forward and what to score in it.

An example is laid out as [prompt | completion 0 | completion 1 | ...] without padding, positions of every completion
restarting after the prompt. Segment s is what attention computes at once: its queries are its own tokens (the first one
of an example also holds the prompt), its keys are the prompt and its own tokens.

    T packed tokens   S segments   U gathered keys   M scored tokens   C completions   B preference pairs

Knows nothing of models, ranks or losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_dist.batch.arrangement import Arrangement
from dpo_dist.batch.layout import AttentionLayout, build_layout
from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedExample


@dataclass(frozen=True)
class MicroBatch:
    """One packed forward pass and what to score in it."""

    input_ids_T: Int[Tensor, " T"]
    position_ids_T: Int[Tensor, " T"]
    layout: AttentionLayout
    score_index_M: Int[Tensor, " M"]  # the position whose hidden state predicts the token
    target_ids_M: Int[Tensor, " M"]
    completion_of_M: Int[Tensor, " M"]
    completion_index_C: Int[Tensor, " C"]  # which of the rank's completions of this step each one is
    completion_length_C: Int[Tensor, " C"]  # tokens that are scored
    pair_chosen_B: Int[Tensor, " B"]  # index into the C completions
    pair_rejected_B: Int[Tensor, " B"]
    pair_weight_B: Float[Tensor, " B"]
    pair_margin_B: Float[Tensor, " B"]  # by how much chosen is better, in the data's own unit
    pair_probability_B: Float[Tensor, " B"]  # that it is better
    pair_entry_B: Int[Tensor, " B"]  # of data.train that it is from
    # Of each completion, the weights of the pairs that it is chosen in; of a demonstration, or one that is called good,
    # its example's weight.
    chosen_weight_C: Float[Tensor, " C"]
    example_weight_C: Float[Tensor, " C"]  # of the example that it belongs to
    rating_C: Float[Tensor, " C"]  # 1 of one that is called good, -1 of a bad one, 0 where the data do not say
    example_weight: float  # sum over examples
    num_tokens: int  # T, or 0 for a filler
    num_unshared_tokens: int  # every pair on its own, nothing shared: sum of 2 P + C + R; P + C of a demonstration
    token_weight_M: Float[Tensor, " M"] | None = None  # of each scored token in its completion's sum; None: 1
    # What each pair is matched with (`matching.py`), nats, made on the device: instead of its own the reference's
    # chosen - rejected, the log-ratio of a rejected, and of a chosen completion.
    partners_3B: Float[Tensor, "3 B"] | None = None
    # What rated completions are held against (`baseline.py`), as log-ratios in nats, made on the device.
    kl_baseline: Float[Tensor, ""] | None = None
    reward_baseline: Float[Tensor, ""] | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device, all of it by one copy."""
        if self.input_ids_T.device == device:
            return self
        return self._with(_move_together(self._tensors(), device))

    def pinned(self) -> "MicroBatch":
        """The same in one piece of pinned memory: `to` has nothing left to do on the host but to ask for the copy."""
        return self._with(_in_one_piece(self._tensors(), pinned=True))

    def untouched(self) -> "MicroBatch":
        """The same as if no model had seen it; it has the memory of its tensors in common with this one."""
        return self._with(self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [*_tensors_of(self).values(), *_tensors_of(self.layout).values()]

    def _with(self, tensors: Sequence[Tensor]) -> "MicroBatch":
        own, of_layout = _tensors_of(self), _tensors_of(self.layout)
        own = dict(zip(own, tensors[: len(own)], strict=True))
        of_layout = dict(zip(of_layout, tensors[len(own) :], strict=True))
        return replace(self, layout=replace(self.layout, masks={}, reached=set(), **of_layout), **own)

    def completion_sums(self, values_M: Float[Tensor, " M"], weighted: bool = True) -> Float[Tensor, " C"]:
        """Add up one value per scored token to one value per completion, in the values' own precision.

        Args:
            values_M: log-probabilities, for instance.
            weighted: by `token_weight_M`.
        """
        if weighted and self.token_weight_M is not None:
            values_M = values_M * self.token_weight_M.to(values_M.dtype)
        return values_M.new_zeros(len(self.completion_index_C)).index_add(0, self.completion_of_M, values_M)


def build_micro_batch(
    examples: Sequence[TokenizedExample],
    completion_offsets: Sequence[int],
    share_prompts: bool,
    ld_alpha: float | None = None,
) -> MicroBatch:
    """Lay out examples as one packed forward.

    Args:
        examples: what to score; nothing gives a filler: two tokens that are run and not scored, so that a rank with
            less work still takes part in ZeRO-3's gathers.
        completion_offsets: for each example, the index of its first completion among all of the rank's step.
        share_prompts: compute each prompt once, or once per completion.
        ld_alpha: weight of the tokens that a completion has beyond the shortest one of its example (LD-DPO). None: 1.
    """
    laid, preferences = Arrangement(examples, share_prompts), _Preferences()
    for example in examples:
        preferences.add(example)
    ids_T, positions_T = (laid.input_ids(), laid.positions()) if examples else (np.zeros_like(_FILLER), _FILLER)
    weights_M = None if ld_alpha is None or not laid.learned_C.any() else laid.token_weights(ld_alpha)
    return MicroBatch(
        input_ids_T=torch.tensor(ids_T),
        position_ids_T=torch.tensor(positions_T),
        layout=laid.layout() if examples else build_layout([2], [2], _FILLER, 2),
        score_index_M=torch.from_numpy(laid.score_index()),
        target_ids_M=torch.from_numpy(laid.targets()),
        completion_of_M=torch.from_numpy(laid.completion_of()),
        completion_index_C=_indices(
            [
                offset + k
                for example, offset in zip(examples, completion_offsets, strict=True)
                for k in range(len(example.completion_ids))
            ]
        ),
        completion_length_C=torch.from_numpy(laid.learned_C),
        num_tokens=laid.num_tokens,
        token_weight_M=None if weights_M is None else torch.from_numpy(weights_M),
        **preferences.fields(),
    )


# The positions of tokens that are run and not scored, where there are no examples. Two: for a single one torch.compile
# would compile everything anew, in the middle of a run.
_FILLER = np.arange(2)


class _Preferences:
    """Lists that grow by the preferences of one example after another."""

    def __init__(self) -> None:
        self._pairs: list[tuple[int, int, Pair]] = []
        self._entries: list[int] = []
        self._chosen_weights: list[float] = []
        self._example_weights: list[float] = []
        self._ratings: list[float] = []
        self._example_weight = 0.0
        self._num_unshared_tokens = 0

    def add(self, example: TokenizedExample) -> None:
        first, prompt = len(self._example_weights), len(example.prompt_ids)
        lengths = [len(ids) for ids in example.completion_ids]
        self._example_weight += example.weight
        self._example_weights += [example.weight] * len(lengths)
        self._ratings += [1.0 if good else -1.0 for good in example.ratings] or [0.0] * len(lengths)
        if not example.pairs:  # demonstrations, or rated
            self._chosen_weights += [example.weight * good for good in example.ratings or [True] * len(lengths)]
            self._num_unshared_tokens += sum(prompt + length for length in lengths)
            return
        self._entries += [example.entry] * len(example.pairs)
        chosen_weights = [0.0] * len(lengths)
        for pair in example.pairs:
            self._pairs.append((first + pair.chosen, first + pair.rejected, pair))
            chosen_weights[pair.chosen] += pair.weight
            self._num_unshared_tokens += 2 * prompt + lengths[pair.chosen] + lengths[pair.rejected]
        self._chosen_weights += chosen_weights

    def fields(self) -> dict[str, Any]:
        """Those of a micro-batch."""
        return {
            "pair_chosen_B": _indices([chosen for chosen, _, _ in self._pairs]),
            "pair_rejected_B": _indices([rejected for _, rejected, _ in self._pairs]),
            "pair_weight_B": _numbers([pair.weight for _, _, pair in self._pairs]),
            "pair_margin_B": _numbers([pair.margin for _, _, pair in self._pairs]),
            "pair_probability_B": _numbers([pair.probability for _, _, pair in self._pairs]),
            "pair_entry_B": _indices(self._entries),
            "chosen_weight_C": _numbers(self._chosen_weights),
            "example_weight_C": _numbers(self._example_weights),
            "rating_C": _numbers(self._ratings),
            "example_weight": self._example_weight,
            "num_unshared_tokens": self._num_unshared_tokens,
        }


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _tensors_of(container: "MicroBatch | AttentionLayout") -> dict[str, Tensor]:
    return {name: value for name, value in vars(container).items() if isinstance(value, Tensor)}


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Small one-dimensional tensors on a device by a single copy: each copy costs a launch, whatever its size."""
    first = tensors[0].untyped_storage().data_ptr()
    if any(tensor.untyped_storage().data_ptr() != first for tensor in tensors):
        tensors = _in_one_piece(tensors, pinned=device.type == "cuda")
    packed = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())
    moved = packed.to(device, non_blocking=True)
    begins = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
    return [
        moved[begin : begin + tensor.nbytes].view(tensor.dtype) for begin, tensor in zip(begins, tensors, strict=True)
    ]


def _in_one_piece(tensors: Sequence[Tensor], pinned: bool) -> list[Tensor]:
    """The same, one after another in one piece of memory."""
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in tensors]  # every part begins where any dtype may begin
    packed = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    parts = [part[: tensor.nbytes] for part, tensor in zip(packed.split(sizes), tensors, strict=True)]
    for part, tensor in zip(parts, tensors, strict=True):
        part.numpy()[:] = tensor.numpy().view(np.uint8)  # torch would start threads for the long ones
    return [part.view(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
