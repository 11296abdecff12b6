"""Implicit rewards and other numbers of a step, added up.

Names and meanings are TRL's: `rewards/*` = beta * log-ratio summed over completion tokens, for every loss; a tie
counts as wrong; `logps/*` are sums over a completion. Everything is summed over pairs on the device, added up over
micro-batches and ranks once per step, and divided once when a line is written: never a mean of means.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.logprobs import TokenScores
from dpo_dist.pace import TIMES

# What a step adds up. The first two belong to the loss of pairs, the next seven are per pair, two are counts of tokens,
# two belong to the loss of tokens. The next seven are 0 where nobody asked for statistics of tokens: their sums, and
# the numbers of tokens that they are of. Two belong to the loss of examples; four tell of the distance from the
# reference: a number of tokens and a sum over them, and two sums over pairs. The rest is of rated completions: their
# loss, and of the good and of the bad ones their number and sums; the last one is what they are held against.
SUMS = (
    "loss",
    "pair_weight",
    "num_pairs",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens_processed",
    "tokens_unshared",
    "token_loss",
    "token_weight",
    "num_scored",
    "entropy",
    "num_chosen_tokens",
    "mean_token_accuracy",
    "logits/chosen",
    "num_rejected_tokens",
    "logits/rejected",
    "example_loss",
    "example_weight",
    "num_compared",
    "kl",
    "displacement",
    "length_drift",
    "rated_loss",
    "rated_weight",
    "num_desirable",
    "num_undesirable",
    "rewards/desirable",
    "rewards/undesirable",
    "logps/desirable",
    "logps/undesirable",
    "rewards/baseline",
)
PER_PAIR = SUMS[3:9]
# Means over tokens: of both completions, or of those of a pair's chosen or rejected one.
PER_TOKEN = {
    "entropy": "num_scored",
    "mean_token_accuracy": "num_chosen_tokens",
    "logits/chosen": "num_chosen_tokens",
    "logits/rejected": "num_rejected_tokens",
}
OF_LOSSES = (
    ("loss", "pair_weight"),
    ("token_loss", "token_weight"),
    ("example_loss", "example_weight"),
    ("rated_loss", "rated_weight"),
)
# Distance from the reference: what each sum is divided by.
HEALTH = {"kl": "num_compared", "displacement": "num_pairs", "length_drift": "num_pairs"}
LOGGED_STATISTICS = ("entropy", "mean_logit", "is_top1")
COUNTS = ("tokens_processed", "tokens_unshared", "tokens_padded")

# What is added up of each entry of data.train, where there are several; all but the first are per pair.
OF_ENTRIES = ("num_pairs", "rewards/margins", "rewards/accuracies")

# Keys that depend on the clock or the machine; all other keys are reproducible bit for bit.
WALL_CLOCK = ("pairs_per_second", "tokens_per_second", "time/step", *TIMES, "mfu", "memory/peak_gib")


def sum_names(num_entries: int) -> tuple[str, ...]:
    """Names of what `step_sums` gives for so many entries of data.train."""
    several = num_entries if num_entries > 1 else 0
    return (*SUMS, *(f"data.train.{entry}/{name}" for entry in range(several) for name in OF_ENTRIES))


def step_sums(
    batch: MicroBatch,
    logps_C: Float[Tensor, " C"],
    logratios_C: Float[Tensor, " C"],
    losses_U: Float[Tensor, " U"],
    beta: float,
    tokens: TokenScores | None = None,
    num_entries: int = 1,
) -> Float[Tensor, " K"]:
    """The sums of one micro-batch in the order of `sum_names`, float64, on the batch's device.

    Nothing of it waits for the host.
    """
    with torch.no_grad():
        chosen_B, rejected_B = batch.pair_chosen_B, batch.pair_rejected_B
        rewards_C = beta * logratios_C.double()
        margins_B = rewards_C[chosen_B] - rewards_C[rejected_B]
        per_pair_KB = torch.stack(
            [
                torch.ones_like(margins_B),
                rewards_C[chosen_B],
                rewards_C[rejected_B],
                margins_B,
                (margins_B > 0).double(),
                logps_C.double()[chosen_B],
                logps_C.double()[rejected_B],
            ]
        )
        known = [batch.num_tokens, batch.num_unshared_tokens, batch.example_weight]
        *counts, weight_of_examples = torch.tensor(known, dtype=torch.float64).to(margins_B.device).unbind()
        of_pairs, of_tokens, of_examples, of_rated = losses_U.double().unbind()
        lengths_C = batch.completion_length_C.double()
        weight_of_tokens = (batch.chosen_weight_C.double() * lengths_C).sum()
        return torch.cat(
            [
                torch.stack([of_pairs, batch.pair_weight_B.double().sum()]),
                per_pair_KB.sum(1),
                torch.stack(counts),
                torch.stack([of_tokens, weight_of_tokens]),
                _token_sums(batch, tokens),
                torch.stack([of_examples, weight_of_examples]),
                _health_sums(batch, logratios_C.double(), lengths_C),
                _rated_sums(batch, of_rated, rewards_C, logps_C.double(), beta),
                _entry_sums(batch, per_pair_KB, num_entries),
            ]
        )


def _token_sums(batch: MicroBatch, tokens: TokenScores | None) -> Float[Tensor, " 7"]:
    """The seven of `SUMS` that are statistics of tokens; of demonstrations all completions count as chosen."""
    device = batch.pair_weight_B.device
    if tokens is None or not set(LOGGED_STATISTICS) <= set(tokens.names):
        return torch.zeros(7, dtype=torch.float64, device=device)
    logits_C, correct_C = (
        batch.completion_sums(tokens.of(name).double(), weighted=False) for name in ("mean_logit", "is_top1")
    )
    lengths_C = batch.completion_length_C.double()
    # How often each completion is chosen, and rejected; a bad one, which no pair has, is rejected once.
    is_good_C = torch.relu(batch.rating_C) if len(batch.pair_chosen_B) else (batch.rating_C >= 0).float()
    chosen_C, rejected_C = (
        unpaired_C.double().index_add(0, ends_B, torch.ones_like(ends_B, dtype=torch.float64))
        for unpaired_C, ends_B in (
            (is_good_C, batch.pair_chosen_B),
            (torch.relu(-batch.rating_C), batch.pair_rejected_B),
        )
    )
    return torch.stack(
        [
            lengths_C.sum(),
            tokens.of("entropy").double().sum(),
            (chosen_C * lengths_C).sum(),
            (chosen_C * correct_C).sum(),
            (chosen_C * logits_C).sum(),
            (rejected_C * lengths_C).sum(),
            (rejected_C * logits_C).sum(),
        ]
    )


def _health_sums(batch: MicroBatch, logratios_C: Tensor, lengths_C: Tensor) -> Float[Tensor, " 4"]:
    """The four of `SUMS` that tell of the distance from the reference."""
    chosen_B, rejected_B = batch.pair_chosen_B, batch.pair_rejected_B
    margins_B, longer_B = (values[chosen_B] - values[rejected_B] for values in (logratios_C, lengths_C))
    # 1 where the policy has come to prefer the longer completion though the label does not, -1 the other way round.
    drift_B = torch.where(margins_B < 0, -longer_B.sign(), 0.0)
    return torch.stack([lengths_C.sum(), -logratios_C.sum(), (logratios_C[chosen_B] < 0).double().sum(), drift_B.sum()])


def _rated_sums(
    batch: MicroBatch, loss: Tensor, rewards_C: Tensor, logps_C: Tensor, beta: float
) -> Float[Tensor, " 9"]:
    """The last nine of `SUMS`."""
    good_C, bad_C = (torch.relu(sign * batch.rating_C.double()) for sign in (1, -1))
    rated_C = good_C + bad_C
    held_against = batch.kl_baseline if batch.kl_baseline is not None else batch.reward_baseline
    baseline = torch.zeros_like(loss) if held_against is None else beta * held_against
    return torch.stack(
        [
            loss,
            (rated_C * batch.example_weight_C.double()).sum(),
            *(which.sum() for which in (good_C, bad_C)),
            *((which * values).sum() for values in (rewards_C, logps_C) for which in (good_C, bad_C)),
            baseline * rated_C.sum(),
        ]
    )


def _entry_sums(batch: MicroBatch, per_pair_KB: Tensor, num_entries: int) -> Float[Tensor, " E"]:
    """`OF_ENTRIES` of each entry, one entry after another; nothing of a single one."""
    if num_entries < 2:
        return per_pair_KB.new_zeros(0)
    places = [PER_PAIR.index(name) + 1 if name in PER_PAIR else 0 for name in OF_ENTRIES]
    sums = per_pair_KB.new_zeros(num_entries, len(OF_ENTRIES))
    return sums.index_add(0, batch.pair_entry_B, per_pair_KB[places].t()).flatten()


def loss_of(sums: Mapping[str, float]) -> float:
    """The loss of whatever was added up: of each unit per weight of its kind."""
    # A window that an earlier version saved knows of pairs only.
    return math.fsum(sums[name] / sums[weight] for name, weight in OF_LOSSES if sums.get(weight))


def padded_tokens(pair_lengths: Sequence[int], rows_per_batch: int = 8) -> int:
    """Tokens TRL's layout would run: per 8 consecutive pairs 16 rows, each as long as the longest row among them.

    Args:
        pair_lengths: for every pair, prompt plus its longer completion, in the sampler's order.
        rows_per_batch: pairs in one of TRL's batches (its default per-device batch size).
    """
    batches = [pair_lengths[i : i + rows_per_batch] for i in range(0, len(pair_lengths), rows_per_batch)]
    return sum(2 * len(batch) * max(batch) for batch in batches)


_SHOWN = 3  # examples, in a message


def not_finite(step: int, values: Mapping[str, float], sources: Callable[[], Sequence[str]] = tuple) -> str:
    """What to say of numbers that have become NaN or infinite; nothing if none has.

    Args:
        step: for the message.
        values: by name.
        sources: `file:line` of the examples that they are of; called where there is something to say.
    Returns:
        The step, its examples and the values, or an empty text.
    """
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not broken:
        return ""
    listed = ", ".join(f"{name}={value}" for name, value in broken.items())
    of = sources()
    more = len(of) - _SHOWN
    shown = ", ".join(of[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"step {step}{f' (examples {shown})' if of else ''}: {listed}"
