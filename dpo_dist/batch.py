"""One micro-batch as flat tensors: shared prompts, scored positions, pairs.

An example is laid out as [prompt | completion 0 | completion 1 | ...] without padding, positions of every completion
restarting after the prompt. Segment s is what attention computes at once: its queries are its own tokens (the first one
of an example also holds the prompt), its keys are the prompt and its own tokens.

    T packed tokens   S segments   U gathered keys   M scored tokens   C completions   B preference pairs

Knows nothing of models, ranks or losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_dist.packing import StepPlan
from dpo_dist.tokenization import TokenizedExample


@runtime_checkable
class Examples(Protocol):
    """Anything that gives an example by its row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> TokenizedExample: ...


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
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False)  # kept for the layers
    reached: set[int] = field(default_factory=set, repr=False)  # ids of the attention modules that were handed this

    @property
    def max_q(self) -> int:
        """Longest segment, in queries."""
        return max(self.q_lengths)

    @property
    def max_k(self) -> int:
        """Longest segment, in keys."""
        return max(self.k_lengths)


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
    completion_length_C: Int[Tensor, " C"]  # tokens
    pair_chosen_B: Int[Tensor, " B"]  # index into the C completions
    pair_rejected_B: Int[Tensor, " B"]
    pair_weight_B: Float[Tensor, " B"]
    chosen_weight_C: Float[Tensor, " C"]  # of each completion, the weights of the pairs that it is chosen in
    num_tokens: int  # T, or 0 for a filler
    num_unshared_tokens: int  # sum over pairs of 2 P + C + R: every pair on its own, nothing shared
    partners_3B: Float[Tensor, "3 B"] | None = None  # what each pair is matched with (`matching.py`), nats: instead of
    # its own the reference's chosen - rejected, the log-ratio of a rejected, and of a chosen completion

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device, all of it by one copy."""
        if self.input_ids_T.device == device:
            return self
        own, of_layout = _tensors_of(self), _tensors_of(self.layout)
        moved = _move_together([*own.values(), *of_layout.values()], device)
        own = dict(zip(own, moved[: len(own)], strict=True))
        of_layout = dict(zip(of_layout, moved[len(own) :], strict=True))
        return replace(self, layout=replace(self.layout, masks={}, reached=set(), **of_layout), **own)

    def completion_sums(self, values_M: Float[Tensor, " M"]) -> Float[Tensor, " C"]:
        """Add up one value per scored token to one value per completion, in the values' own precision."""
        return values_M.new_zeros(len(self.completion_index_C)).index_add(0, self.completion_of_M, values_M)


def build_micro_batch(
    examples: Sequence[TokenizedExample],
    completion_offsets: Sequence[int],
    share_prompts: bool,
) -> MicroBatch:
    """Lay out examples as one packed forward.

    Args:
        examples: what to score; nothing gives a filler: one token that is run and not scored, so that a rank with less
            work still takes part in ZeRO-3's gathers.
        completion_offsets: for each example, the index of its first completion among all of the rank's step.
        share_prompts: compute each prompt once, or once per completion.
    """
    parts = _Parts()
    for example, offset in zip(examples, completion_offsets, strict=True):
        parts.add_pairs(example)
        for k, completion_ids in enumerate(example.completion_ids):
            parts.add_completion(example.prompt_ids, completion_ids, offset + k, share_prompts and k > 0)
    if not examples:
        parts.add_filler()
    return parts.finish(is_filler=not examples)


def build_layout(
    q_lengths: Sequence[int], k_lengths: Sequence[int], kv_index: Sequence[int], num_tokens: int
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


class RankWork:
    """One rank's share of a planned step, as micro-batches for the policy and bins for the reference.

    Args:
        plan: the step, the same on every rank.
        rank: whose share.
        dataset: indexed by the rows the plan names.
        share_prompts: compute each prompt once, or once per completion.

    Attributes:
        rows: of the data set, of the rank's examples; their completions, one row after another, are in the order of
            `MicroBatch.completion_index_C`.
        num_completions: of all these rows.
    """

    def __init__(self, plan: StepPlan, rank: int, dataset: Examples, share_prompts: bool) -> None:
        self._plan, self._rank, self.share_prompts = plan, rank, share_prompts
        self.dataset = dataset
        self.rows = tuple(plan.examples[position] for position in plan.examples_of_rank(rank))
        self._examples: dict[int, TokenizedExample] = {}
        self._offsets: dict[int, int] = {}
        self.num_completions = 0
        for position in plan.examples_of_rank(rank):
            example = dataset[plan.examples[position]]
            self._examples[position] = example
            self._offsets[position] = self.num_completions
            self.num_completions += len(example.completion_ids)

    def micro_batches(self) -> list[MicroBatch]:
        """What the policy runs forward and backward on; equally many on every rank."""
        return [self.build(positions, self.share_prompts) for positions in self._plan.micro_batches[self._rank]]

    def reference_bins(self) -> list[MicroBatch]:
        """The same examples in the larger bins of a forward without gradient; equally many on every rank."""
        return [self.build(positions, self.share_prompts) for positions in self._plan.reference_bins[self._rank]]

    def example(self, position: int) -> TokenizedExample:
        """One of the rank's examples, by its position in the step."""
        return self._examples[position]

    def build(self, positions: Sequence[int], share_prompts: bool) -> MicroBatch:
        """A micro-batch of some of the rank's examples; none gives a filler."""
        examples = [self._examples[position] for position in positions]
        return build_micro_batch(examples, [self._offsets[position] for position in positions], share_prompts)


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
        self.pairs: list[tuple[int, int, float]] = []
        self.num_unshared_tokens = 0
        self.prompt_start = 0

    def add_pairs(self, example: TokenizedExample) -> None:
        first = len(self.completion_index)
        lengths = [len(ids) for ids in example.completion_ids]
        for pair in example.pairs:
            self.pairs.append((first + pair.chosen, first + pair.rejected, pair.weight))
            self.num_unshared_tokens += 2 * len(example.prompt_ids) + lengths[pair.chosen] + lengths[pair.rejected]

    def add_completion(
        self, prompt: Sequence[int], completion: Sequence[int], index: int, prompt_is_there: bool
    ) -> None:
        if not prompt_is_there:
            self.prompt_start = len(self.ids)
            self.ids += prompt
            self.positions += range(len(prompt))
        own_start, num_inputs = len(self.ids), len(completion) - 1
        self.ids += completion[:-1]  # nothing is predicted from the last token
        self.positions += range(len(prompt), len(prompt) + num_inputs)
        q_length = num_inputs + (0 if prompt_is_there else len(prompt))
        if q_length:  # a one-token completion after a shared prompt has nothing of its own to compute
            self.q_lengths.append(q_length)
            self.k_lengths.append(len(prompt) + num_inputs)
            self.kv_index += range(self.prompt_start, self.prompt_start + len(prompt))
            self.kv_index += range(own_start, own_start + num_inputs)
        # The last prompt position predicts the first token of every completion.
        self.score_index += [self.prompt_start + len(prompt) - 1, *range(own_start, own_start + num_inputs)]
        self.targets += completion
        self.completion_of += [len(self.completion_index)] * len(completion)
        self.completion_index.append(index)
        self.completion_lengths.append(len(completion))

    def add_filler(self) -> None:
        self.ids, self.positions, self.q_lengths, self.k_lengths, self.kv_index = [0], [0], [1], [1], [0]

    def finish(self, is_filler: bool) -> MicroBatch:
        chosen_weights = [0.0] * len(self.completion_index)
        for chosen, _, weight in self.pairs:
            chosen_weights[chosen] += weight
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
            pair_weight_B=torch.tensor([pair[2] for pair in self.pairs], dtype=torch.float32),
            chosen_weight_C=torch.tensor(chosen_weights, dtype=torch.float32),
            num_tokens=0 if is_filler else len(self.ids),
            num_unshared_tokens=self.num_unshared_tokens,
        )


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _gathering(kv_index: Sequence[int], num_tokens: int) -> dict[str, Any]:
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


def _tensors_of(container: "MicroBatch | AttentionLayout") -> dict[str, Tensor]:
    return {name: value for name, value in vars(container).items() if isinstance(value, Tensor)}


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Small one-dimensional tensors on a device by a single copy: each copy costs a launch, whatever its size."""
    raw = [tensor.view(torch.uint8) for tensor in tensors]
    sizes = [-(-len(one) // 8) * 8 for one in raw]  # every part begins where any dtype may begin
    packed = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, one in zip(packed.split(sizes), raw, strict=True):
        part[: len(one)] = one
    parts = packed.to(device, non_blocking=True).split(sizes)
    return [part[: len(one)].view(tensor.dtype) for part, one, tensor in zip(parts, raw, tensors, strict=True)]
