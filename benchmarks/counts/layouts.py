"""What each system computes in one step: which tokens, in how many micro-batches.

A function for every assumption about another system; its docstring says where it is from. All systems get the same
examples in a step and the same token budget for a micro-batch. Where sources leave a choice, it is the one that favours
the other system.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo_dist.data import Pair
from dpo_dist.packing import ExampleSize, Packer

Batch = Sequence[ExampleSize]  # a micro-batch of pairs


@dataclass(frozen=True)
class Setting:
    """What all systems have in common.

    Args:
        ranks: that work side by side.
        max_tokens: of a micro-batch.
        reference_max_tokens: of a bin of our reference.
        batch: pairs in a micro-batch of TRL.
        share_prompts: whether ours computes a prompt once.
    """

    ranks: int
    max_tokens: int
    reference_max_tokens: int
    batch: int
    share_prompts: bool = True


@dataclass(frozen=True)
class Layout:
    """What all ranks compute in the policy's forward of one step, and in how many micro-batches.

    Args:
        rows: their `input_tokens` go through the body's matrices.
        attended: attention is computed over their `visible_keys`.
        scored: the head is applied to their `scored_tokens`.
        slots: micro-batches of a rank; the same on all ranks, as gathers are collective.
        reference_slots: forward passes of the reference in a step.
        share_prompts: of rows and attended.
        keeps_logits: logits are kept for backward, and not computed again.
    """

    rows: Batch
    attended: Batch
    scored: Batch
    slots: int
    reference_slots: int
    share_prompts: bool = False
    keeps_logits: bool = False


# ---- pairs, and how they come to ranks and micro-batches


def single_pairs(sizes: Sequence[ExampleSize]) -> list[ExampleSize]:
    """Every pair as an example of its own, with a prompt of its own.

    TRL 1.16 (trl/trainer/dpo_trainer.py, the collator), open-instruct (open_instruct/padding_free_collator.py),
    OpenRLHF (openrlhf/trainer/dpo_trainer.py) and ms-swift (swift/rlhf_trainers/dpo_trainer.py) know rows of one chosen
    and one rejected completion only. A ranked example of K completions is K (K - 1) / 2 rows.
    """
    ends = (Pair(0, 1),)
    return [
        ExampleSize(size.prompt, (size.completions[pair.chosen], size.completions[pair.rejected]), ends)
        for size in sizes
        for pair in size.pairs
    ]


def dealt(pairs: Batch, ranks: int) -> list[Batch]:
    """To ranks in turn, in the sampler's order: torch's DistributedSampler, which all others follow."""
    return [pairs[rank::ranks] for rank in range(ranks)]


def cut(pairs: Batch, batch: int) -> list[Batch]:
    """Micro-batches of a fixed number of pairs: `per_device_train_batch_size`."""
    return [pairs[start : start + batch] for start in range(0, len(pairs), batch)]


def largest_batch(sizes: Sequence[ExampleSize], max_tokens: int) -> int:
    """The most pairs of a micro-batch of TRL that never has more than `max_tokens`, whichever pairs meet; at least one.

    TRL takes a fixed number of pairs, not a token budget, so the longest row of the data set decides.
    """
    return max(1, max_tokens // (2 * max(_longest(pair) for pair in single_pairs(sizes))))


def filled(pairs: Batch, max_tokens: int) -> list[Batch]:
    """Micro-batches filled in order with both rows of each pair, up to a number of tokens in all; at least one pair.

    OpenRLHF takes a fixed number of pairs (`micro_train_batch_size`), and ms-swift packs the whole data set, so that a
    step has no fixed number of pairs. Filling up to a budget favours the one, and keeps the other's steps comparable.
    """
    return _filled(pairs, lambda batch: sum(map(_both_rows, batch)) <= max_tokens)


def filled_by_branch(pairs: Batch, max_tokens: int) -> list[Batch]:
    """Micro-batches filled in order until chosen or rejected rows would exceed half of `max_tokens`; at least one pair.

    open-instruct (open_instruct/padding_free_collator.py, count_features_within_token_budget): each branch has a row of
    `max_seq_length`, and both are concatenated. The padding of each row up to that length is not counted.
    """

    def fits(batch: Batch) -> bool:
        branches = [sum(size.prompt + size.completions[end] for size in batch) for end in (0, 1)]
        return 2 * max(branches) <= max_tokens

    return _filled(pairs, fits)


# ---- what goes through the body and the head


def padded(batch: Batch) -> list[ExampleSize]:
    """Two rows for every pair, as long as the longest row of the micro-batch.

    TRL 1.16 (trl/trainer/dpo_trainer.py, DataCollatorForPreference): chosen and rejected rows in one tensor, each with
    the prompt, padded to the longest; `padding_free` is ignored.
    """
    longest = max(map(_longest, batch))
    return [_rows(longest, longest) for _ in batch]


def whole_rows(pair: ExampleSize) -> ExampleSize:
    """Two rows of P + C and P + R tokens. Others put a row's last token through the model too; ours does not."""
    return _rows(*(pair.prompt + length for length in pair.completions))


def all_positions(pair: ExampleSize) -> ExampleSize:
    """Logits of every token of both rows.

    open-instruct (open_instruct/padding_free_collator.py, get_batch_logps) and OpenRLHF (openrlhf/trainer/
    dpo_trainer.py, which asks for log-probabilities of whole rows, and masks prompts afterwards).
    """
    return ExampleSize(0, tuple(pair.prompt + length for length in pair.completions), ())


# ---- the systems


def trl(sizes: Sequence[ExampleSize], setting: Setting) -> Layout:
    """TRL 1.16 on CUDA.

    The head is applied to completions only, and its logits are computed again in backward (trl/trainer/utils.py,
    add_fused_lm_head; on a CPU all positions would be). The reference runs once for every micro-batch, on the same
    rows. The head's weights are gathered at once and waited for (maybe_gather_lm_head_ctx), which moves no more.
    Attention is counted over real tokens, as flash-attn has it after transformers has taken the padding out; with
    torch's SDPA it is more.
    """
    ranks = [cut(share, setting.batch) for share in dealt(single_pairs(sizes), setting.ranks)]
    return _padded_layout([batch for batches in ranks for batch in batches], max(map(len, ranks)))


def trl_sorted(sizes: Sequence[ExampleSize], setting: Setting) -> Layout:
    """The same where a step's pairs are sorted by their longer row before they are cut: less padding, the same step.

    TRL does not do so by default.
    """
    batches = cut(sorted(single_pairs(sizes), key=_longest), setting.batch)
    return _padded_layout(batches, -(-len(batches) // setting.ranks))


def packed(sizes: Sequence[ExampleSize], setting: Setting) -> Layout:
    """Packed, prompts not shared, the head on completions only, logits kept: ms-swift.

    swift/rlhf_trainers/dpo_trainer.py with `padding_free` and `packing`, `logits_to_keep` as by default.
    """
    pairs = single_pairs(sizes)
    slots = max(len(filled(share, setting.max_tokens)) for share in dealt(pairs, setting.ranks))
    rows = list(map(whole_rows, pairs))
    return Layout(rows, rows, pairs, slots, slots, keeps_logits=True)


def packed_all_logits(sizes: Sequence[ExampleSize], setting: Setting) -> Layout:
    """Packed, prompts not shared, the head on all positions, logits kept: OpenRLHF with `packing_samples`."""
    found = packed(sizes, setting)
    pairs = list(map(all_positions, single_pairs(sizes)))
    return Layout(found.rows, found.rows, pairs, found.slots, found.slots, keeps_logits=True)


def packed_by_branch(sizes: Sequence[ExampleSize], setting: Setting) -> Layout:
    """The same in a row for each branch: open-instruct with `packing`; its reference is always cached."""
    pairs = single_pairs(sizes)
    slots = max(len(filled_by_branch(share, setting.max_tokens)) for share in dealt(pairs, setting.ranks))
    rows = list(map(whole_rows, pairs))
    return Layout(rows, rows, list(map(all_positions, pairs)), slots, slots, keeps_logits=True)


def ours(sizes: Sequence[ExampleSize], setting: Setting, packer: Packer) -> Layout:
    """This project: the plan that a run would follow."""
    plan = packer.plan(0, range(len(sizes)), sizes)
    slots, reference_slots = len(plan.micro_batches[0]), len(plan.reference_bins[0])
    return Layout(sizes, sizes, sizes, slots, reference_slots, setting.share_prompts)


def _padded_layout(batches: Sequence[Batch], slots: int) -> Layout:
    pairs = [pair for batch in batches for pair in batch]
    rows = [row for batch in batches for row in padded(batch)]
    return Layout(rows, list(map(whole_rows, pairs)), pairs, slots, slots)


def _rows(*tokens: int) -> ExampleSize:
    """Rows whose every token goes through the body; of `ExampleSize.completions` the last one does not."""
    return ExampleSize(0, tuple(length + 1 for length in tokens), ())


def _filled(pairs: Batch, fits: Callable[[Batch], bool]) -> list[Batch]:
    batches: list[list[ExampleSize]] = []
    for pair in pairs:
        if batches and fits([*batches[-1], pair]):
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return list(batches)


def _longest(pair: ExampleSize) -> int:
    """Tokens of a pair's longer row."""
    return pair.prompt + max(pair.completions)


def _both_rows(pair: ExampleSize) -> int:
    return 2 * pair.prompt + sum(pair.completions)
