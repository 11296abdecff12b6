"""Preference losses: pure functions of what completions of a prompt are worth to the policy.

Every tensor is (B,), one value per pair, or (C,), one per completion. A log-ratio is log pi_policy - log pi_reference
of a completion, in nats; a score is the log-ratio, or what another f-divergence puts in its place; lengths are tokens.
Every function gives the loss of each pair, or of each completion (C,) where it says so. It knows nothing of weights,
batches or ranks: whoever calls it multiplies by weights and divides by the weight of the whole step. Names and formulas
are TRL's; sources stand in `table.py`.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Values = Float[Tensor, " B"]
PerCompletion = Float[Tensor, " C"]


def sigmoid(
    chosen_scores: Values,
    rejected_scores: Values,
    chosen_lengths: Values,
    rejected_lengths: Values,
    margins: Values,
    probabilities: Values,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    rdpo_alpha: float = 0.0,
    odpo_alpha: float = 0.0,
) -> Values:
    """-p log s(m) - (1 - p) log s(-m), s the logistic function.

    m = beta (chosen - rejected) + rdpo_alpha (chosen length - rejected length) - odpo_alpha * the data's margin.
    p = (1 - eps) q + eps (1 - q), q the data's probability that chosen is better, eps = label_smoothing.
    log 2 where the policy equals the reference and both alphas are 0. DPO: q = 1, eps = 0.
    """
    logits = beta * (chosen_scores - rejected_scores) + rdpo_alpha * (chosen_lengths - rejected_lengths)
    return _logistic(
        logits - odpo_alpha * margins, label_smoothing + (1.0 - 2.0 * label_smoothing) * (1.0 - probabilities)
    )


def hinge(chosen_scores: Values, rejected_scores: Values, *, beta: float) -> Values:
    """max(0, 1 - beta (chosen - rejected))."""
    return torch.relu(1.0 - beta * (chosen_scores - rejected_scores))


def ipo(
    chosen_scores: Values, rejected_scores: Values, chosen_lengths: Values, rejected_lengths: Values, *, beta: float
) -> Values:
    """(chosen / its length - rejected / its length - 1 / (2 beta))^2: means per token, as in TRL.

    The paper's h is a difference of sums, which would make the target depend on the lengths.
    """
    difference = chosen_scores / chosen_lengths - rejected_scores / rejected_lengths
    return (difference - 1.0 / (2.0 * beta)) ** 2


def exo_pair(chosen_scores: Values, rejected_scores: Values, *, beta: float, label_smoothing: float) -> Values:
    """KL of (s(m), s(-m)) from (1 - eps, eps), m = beta (chosen - rejected), eps = label_smoothing > 0."""
    margins = beta * (chosen_scores - rejected_scores)
    of_chosen = margins.sigmoid() * (F.logsigmoid(margins) - math.log1p(-label_smoothing))
    of_rejected = (-margins).sigmoid() * (F.logsigmoid(-margins) - math.log(label_smoothing))
    return of_chosen + of_rejected


def nca_pair(chosen_logratios: Values, rejected_logratios: Values, *, beta: float) -> Values:
    """-log s(r_c) - (log s(-r_c) + log s(-r_r)) / 2, r = beta log-ratio."""
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(chosen_scores: Values, rejected_scores: Values, *, beta: float, label_smoothing: float) -> Values:
    """(-(1 - eps) log s(m) + eps log s(-m)) / (1 - 2 eps): unbiased where a share eps of labels is flipped."""
    margins = beta * (chosen_scores - rejected_scores)
    kept, flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1.0 - label_smoothing) * kept - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def bco_pair(chosen_logratios: Values, rejected_logratios: Values, *, beta: float) -> Values:
    """-log s(r_c) - log s(-r_r), r = beta log-ratio; the paper's shift delta is 0, as in TRL."""
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-beta * rejected_logratios)


def sppo_hard(chosen_logratios: Values, rejected_logratios: Values, *, beta: float) -> Values:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2: the winner wins with probability 1."""
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def apo_zero(chosen_logratios: Values, rejected_logratios: Values, *, beta: float) -> Values:
    """1 - s(r_c) + s(r_r), r = beta log-ratio: chosen up, rejected down."""
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(chosen_logratios: Values, rejected_logratios: Values, *, beta: float) -> Values:
    """s(r_c) + 1 - s(r_c - r_r), r = beta log-ratio: both down, rejected more."""
    return (beta * chosen_logratios).sigmoid() + (beta * (rejected_logratios - chosen_logratios)).sigmoid()


def discopop(chosen_scores: Values, rejected_scores: Values, *, beta: float, discopop_tau: float) -> Values:
    """-(1 - w) log s(m) + w exp(-m), m = beta (chosen - rejected), w = s(m / tau)."""
    margins = beta * (chosen_scores - rejected_scores)
    share = (margins / discopop_tau).sigmoid()
    return -(1.0 - share) * F.logsigmoid(margins) + share * (-margins).exp()


def sigmoid_norm(
    chosen_scores: Values, rejected_scores: Values, chosen_lengths: Values, rejected_lengths: Values, *, beta: float
) -> Values:
    """-log s(beta (chosen / its length - rejected / its length)): DPO of means per token."""
    return _logistic(beta * (chosen_scores / chosen_lengths - rejected_scores / rejected_lengths), 0.0)


def aot(
    chosen_logps: Values,
    rejected_logps: Values,
    partner_margins: Values,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Values:
    """As `sigmoid`, with the policy's chosen - rejected against the reference's of the same rank in the step."""
    return _logistic(beta * (chosen_logps - rejected_logps - partner_margins), label_smoothing)


def aot_unpaired(
    chosen_logratios: Values,
    rejected_logratios: Values,
    partner_rejected: Values,
    partner_chosen: Values,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Values:
    """As `sigmoid`, with every chosen log-ratio against the rejected one of the same rank in the step.

    Each match has two ends, in two pairs: its value counts at the chosen end, its gradient at both.
    """
    of_chosen = _logistic(beta * (chosen_logratios - partner_rejected), label_smoothing)
    of_rejected = _logistic(beta * (partner_chosen - rejected_logratios), label_smoothing)
    return of_chosen + (of_rejected - of_rejected.detach())


def dpop(chosen_logratios: Values, rejected_logratios: Values, *, beta: float, dpop_lambda: float) -> Values:
    """-log s(beta (chosen - rejected - lambda max(0, -chosen))): a chosen completion below the reference costs."""
    below = torch.relu(-chosen_logratios)
    return _logistic(beta * (chosen_logratios - rejected_logratios - dpop_lambda * below), 0.0)


def simpo(
    chosen_logps: Values,
    rejected_logps: Values,
    chosen_lengths: Values,
    rejected_lengths: Values,
    *,
    beta: float,
    simpo_gamma: float,
) -> Values:
    """-log s(beta (chosen / its length - rejected / its length) - gamma), of the policy's own log-probabilities."""
    return _logistic(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - simpo_gamma, 0.0)


def cpo(chosen_logps: Values, rejected_logps: Values, *, beta: float) -> Values:
    """-log s(beta (chosen - rejected)), of the policy's own log-probabilities; its likelihood term stands apart."""
    return _logistic(beta * (chosen_logps - rejected_logps), 0.0)


def orpo(
    chosen_logps: Values, rejected_logps: Values, chosen_lengths: Values, rejected_lengths: Values, *, beta: float
) -> Values:
    """-beta log s(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), p = exp(log-probability / length).

    Its likelihood term stands apart.
    """
    return beta * _logistic(
        _log_odds(chosen_logps / chosen_lengths) - _log_odds(rejected_logps / rejected_lengths), 0.0
    )


def sft(completion_logps: Values) -> Values:
    """-log-probability of each completion; the step divides by tokens."""
    return -completion_logps


def plackett_luce(
    chosen_logratios: Values,
    rejected_logratios: Values,
    pair_chosen: Int[Tensor, " B"],
    completion_logps: Float[Tensor, " C"],
    *,
    beta: float,
) -> Float[Tensor, " C"]:
    """Of each completion i, log(1 + sum over all worse ones j of exp(r_j - r_i)), r = beta log-ratio.

    Which are worse say the pairs (`pair_chosen` is their i). Added up over a ranking of K completions it is
    -log prod_k exp(r_k) / sum_(j >= k) exp(r_j); log K! where the policy equals the reference. 0 for the last.
    """
    gaps_B = beta * (rejected_logratios - chosen_logratios)
    # Logarithms of sums of exponentials, from the largest on; 0 stands for the completion itself.
    zeros_C = torch.zeros_like(completion_logps)
    largest_C = zeros_C.scatter_reduce(0, pair_chosen, gaps_B.detach(), "amax")
    shares_B = (gaps_B - largest_C[pair_chosen]).exp()
    return largest_C + torch.log((-largest_C).exp().index_add(0, pair_chosen, shares_B))


def kto(
    completion_logratios: PerCompletion,
    ratings: PerCompletion,
    kl_baseline: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PerCompletion:
    """w (1 - s(y beta (log-ratio - z))), y = 1 of a good completion and -1 of a bad one, w its kind's weight.

    z, without gradient, is how far the policy has moved where nothing was rated (`baseline.py`). 0 where y is.
    """
    rewards = ratings * beta * (completion_logratios - kl_baseline.to(completion_logratios.dtype))
    return _by_rating(ratings, desirable_weight, undesirable_weight) * (-rewards).sigmoid()


def bco(
    completion_logratios: PerCompletion,
    ratings: PerCompletion,
    reward_baseline: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PerCompletion:
    """-w log s(y beta (log-ratio - delta)), y and w as in `kto`, delta the mean log-ratio of all rated completions."""
    rewards = ratings * beta * (completion_logratios - reward_baseline.to(completion_logratios.dtype))
    return -_by_rating(ratings, desirable_weight, undesirable_weight) * F.logsigmoid(rewards)


def apo_zero_unpaired(
    completion_logratios: PerCompletion,
    ratings: PerCompletion,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PerCompletion:
    """`kto` with z = 0."""
    return kto(
        completion_logratios,
        ratings,
        completion_logratios.new_zeros(()),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def _by_rating(ratings: PerCompletion, of_good: float, of_bad: float) -> PerCompletion:
    return of_good * torch.relu(ratings) + of_bad * torch.relu(-ratings)


def _log_odds(logps: Values) -> Values:
    return logps - torch.log(-torch.expm1(logps))


def _logistic(margins: Values, label_smoothing: float | Values) -> Values:
    return -(1.0 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
