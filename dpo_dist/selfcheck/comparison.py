"""Two evaluations of the same completions (C of them), compared over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import AttentionLayout, MicroBatch
from dpo_dist.distributed import all_gather_json
from dpo_dist.noise import honest
from dpo_dist.tokenization import TokenizedExample


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same completions, on one rank."""

    difference_C: Float[Tensor, " C"]  # nats, float64, on CPU
    honest_C: Float[Tensor, " C"]  # nats: what rounding explains (rms)
    lengths_C: Float[Tensor, " C"]  # tokens

    def excess(self) -> list[float]:
        """Differences of all ranks in units of honest noise. Collective."""
        return gather(self.difference_C / self.honest_C)

    def per_root_token(self) -> list[float]:
        """Differences of all ranks in nats per sqrt(token). Collective."""
        return gather(self.difference_C / self.lengths_C.sqrt())


def compare(
    other: MicroBatch, other_logps_C: Tensor, batch: MicroBatch, logps_C: Float[Tensor, " C"], scale: float
) -> Comparison:
    """Completions of `other` against the same ones of `batch`, as far as they are in both."""
    place = {int(index): i for i, index in enumerate(batch.completion_index_C)}
    here = [(i, place[int(index)]) for i, index in enumerate(other.completion_index_C) if int(index) in place]
    in_other, in_batch = torch.tensor(here, dtype=torch.int64).view(-1, 2).unbind(1)
    expected_C = logps_C.cpu().double()[in_batch]
    lengths_C = torch.bincount(other.completion_of_M.cpu(), minlength=len(other.completion_index_C)).double()[in_other]
    difference_C = other_logps_C.cpu().double()[in_other] - expected_C
    return Comparison(difference_C, honest(lengths_C, expected_C, scale), lengths_C)


def gather(values: Tensor) -> list[float]:
    """Values of all ranks, in rank order. Collective."""
    return [value for share in all_gather_json(values.double().tolist()) for value in share]


def excess_of(comparisons: Sequence[Comparison]) -> list[float]:
    """Excess of several comparisons together. Collective."""
    return [value for one in comparisons for value in one.excess()]


def alone(example: TokenizedExample, k: int, index: int) -> MicroBatch:
    """Completion k of an example as one plain causal sequence.

    Written out here and not by `batch.py`, so that a mistake there cannot stand on both sides of a comparison.

    Args:
        example: any.
        k: which of its completions.
        index: what the micro-batch calls it (`completion_index_C`).
    """
    marked = example.completion_ids[k]
    completion = [token if token >= 0 else -1 - token for token in marked]
    inputs = [*example.prompt_ids, *completion[:-1]]
    first = len(inputs) - len(completion)
    scored = [place for place, token in enumerate(marked) if token >= 0]  # the others are given, and not learned
    ends, no_pairs = torch.tensor([0, len(inputs)], dtype=torch.int32), torch.tensor([], dtype=torch.int64)
    return MicroBatch(
        input_ids_T=torch.tensor(inputs),
        position_ids_T=torch.arange(len(inputs)),
        layout=AttentionLayout(ends, ends, None, (len(inputs),), (len(inputs),)),
        score_index_M=torch.tensor([first + place for place in scored], dtype=torch.int64),
        target_ids_M=torch.tensor([completion[place] for place in scored], dtype=torch.int64),
        completion_of_M=torch.zeros(len(scored), dtype=torch.int64),
        completion_index_C=torch.tensor([index]),
        completion_length_C=torch.tensor([len(scored)]),
        pair_chosen_B=no_pairs,
        pair_rejected_B=no_pairs,
        pair_weight_B=torch.zeros(0),
        pair_margin_B=torch.zeros(0),
        pair_probability_B=torch.zeros(0),
        pair_entry_B=no_pairs,
        chosen_weight_C=torch.zeros(1),
        example_weight_C=torch.zeros(1),
        rating_C=torch.zeros(1),
        example_weight=0.0,
        num_tokens=len(inputs),
        num_unshared_tokens=0,
    )
