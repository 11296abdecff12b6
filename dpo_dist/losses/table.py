"""Every loss: its function, what it asks for, which settings it takes, where it comes from, and when to use it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dpo_dist.losses import formulas

UNITS = ("pair", "token", "example", "completion")

_SCORES = ("chosen_scores", "rejected_scores")
_LOGRATIOS = ("chosen_logratios", "rejected_logratios")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_LOGPS = ("chosen_logps", "rejected_logps")  # of the policy alone
_RATED = ("completion_logratios", "ratings")
_KINDS = ("desirable_weight", "undesirable_weight")


@dataclass(frozen=True)
class LossSpec:
    """A loss, and what one value of it belongs to."""

    fn: Callable[..., Tensor]
    unit: Literal["pair", "token", "example", "completion"]  # the step divides by the weight of all of these
    needs: tuple[str, ...]  # what it is called with, in this order
    parameters: tuple[str, ...]  # fields of `loss` in the configuration, bound by name where its function has them
    formula: str  # for people: m = beta (chosen - rejected score), r_c and r_r = beta log-ratio
    source: str
    use: str
    likelihood: str | float = 0.0  # factor of `sft`, which is part of it: a number, or the setting that holds it

    @property
    def reads_a_reference(self) -> bool:
        """Whether it is asked about log-ratios."""
        return bool({*_SCORES, *_LOGRATIOS, "partner_margins", "completion_logratios"} & set(self.needs))

    @property
    def needs_matching(self) -> bool:
        """Whether it compares the pairs of a whole step with each other."""
        return any(name.startswith("partner_") for name in self.needs)

    @property
    def needs_baseline(self) -> bool:
        """Whether it holds a reward against what the whole step says."""
        return any(name.endswith("_baseline") for name in self.needs)

    @property
    def is_of_a_difference(self) -> bool:
        """Whether a score may take the place of the log-ratio (f-divergences)."""
        return set(_SCORES) <= set(self.needs)


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        formulas.sigmoid,
        "pair",
        (*_SCORES, *_LENGTHS, "margins", "probabilities"),
        ("beta", "label_smoothing", "rdpo_alpha", "odpo_alpha"),
        "-p log s(m') - (1 - p) log s(-m'), p = (1 - eps) q + eps (1 - q), m' = m + rdpo_alpha (chosen length - "
        "rejected length) - odpo_alpha margin",
        "DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; eps > 0, conservative DPO: Mitchell 2023, "
        '"A note on DPO with noisy preferences & relationship to IPO", eq. 3; rdpo_alpha > 0, R-DPO: Park et al. 2024, '
        "arXiv:2403.19159; odpo_alpha > 0, ODPO: Amini et al. 2024, arXiv:2402.10571",
        "The default. eps where labels are noisy (TRL's `sigmoid` has none), q (`chosen_probability` of a row) where "
        "it is known how sure each is; rdpo_alpha where answers grow longer; odpo_alpha where it is known by how much "
        "one is better.",
    ),
    "hinge": LossSpec(
        formulas.hinge,
        "pair",
        _SCORES,
        ("beta",),
        "max(0, 1 - m)",
        "SLiC as in RSO: Liu et al. 2023, arXiv:2309.06657",
        "Pairs that are told apart by 1 / beta nats stop pulling.",
    ),
    "ipo": LossSpec(
        formulas.ipo,
        "pair",
        (*_SCORES, *_LENGTHS),
        ("beta",),
        "(chosen / length - rejected / length - 1 / (2 beta))^2",
        "Azar et al. 2023, arXiv:2310.12036, eq. 17, with means per token as in TRL (OpenRLHF takes sums)",
        "Aims at a fixed margin instead of an ever larger one; labels without noise. beta is the paper's tau.",
    ),
    "exo_pair": LossSpec(
        formulas.exo_pair,
        "pair",
        _SCORES,
        ("beta", "label_smoothing"),
        "s(m) (log s(m) - log(1 - eps)) + s(-m) (log s(-m) - log eps)",
        "EXO: Ji et al. 2024, arXiv:2402.00856, eq. 16",
        "Reverse KL to the preference instead of forward KL: seeks a mode. eps about 0.001.",
    ),
    "nca_pair": LossSpec(
        formulas.nca_pair,
        "pair",
        _LOGRATIOS,
        ("beta",),
        "-log s(r_c) - (log s(-r_c) + log s(-r_r)) / 2",
        "NCA for two completions: Chen et al. 2024, arXiv:2402.05369",
        "Holds the chosen completion's own likelihood up, not only its distance from the rejected one's.",
    ),
    "robust": LossSpec(
        formulas.robust,
        "pair",
        _SCORES,
        ("beta", "label_smoothing"),
        "(-(1 - eps) log s(m) + eps log s(-m)) / (1 - 2 eps)",
        "Chowdhury et al. 2024, arXiv:2403.00409",
        "A known share eps of labels is flipped: unbiased, where sigmoid with eps is not. Not bounded below.",
    ),
    "bco_pair": LossSpec(
        formulas.bco_pair,
        "pair",
        _LOGRATIOS,
        ("beta",),
        "-log s(r_c) - log s(-r_r)",
        "BCO: Jung et al. 2024, arXiv:2404.04656, without its shift delta, as in TRL (ms-swift has one)",
        "Absolute judgement of each completion; mixed with others (MPO).",
    ),
    "sppo_hard": LossSpec(
        formulas.sppo_hard,
        "pair",
        _LOGRATIOS,
        ("beta",),
        "(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2",
        "SPPO: Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with probabilities 1 and 0",
        "Rounds of self-play; pushes either completion to a fixed log-ratio.",
    ),
    "apo_zero": LossSpec(
        formulas.apo_zero,
        "pair",
        _LOGRATIOS,
        ("beta",),
        "1 - s(r_c) + s(r_r)",
        "APO: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7",
        "Chosen completions are better than what the model writes.",
    ),
    "apo_down": LossSpec(
        formulas.apo_down,
        "pair",
        _LOGRATIOS,
        ("beta",),
        "s(r_c) + 1 - s(r_c - r_r)",
        "APO: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8",
        "Chosen completions are worse than what the model writes.",
    ),
    "discopop": LossSpec(
        formulas.discopop,
        "pair",
        _SCORES,
        ("beta", "discopop_tau"),
        "-(1 - w) log s(m) + w exp(-m), w = s(m / tau)",
        "DiscoPOP: Lu et al. 2024, arXiv:2406.08414, eq. 5",
        "Found by search; not convex, and its best beta and tau go together.",
    ),
    "sigmoid_norm": LossSpec(
        formulas.sigmoid_norm,
        "pair",
        (*_SCORES, *_LENGTHS),
        ("beta",),
        "-log s(beta (chosen / length - rejected / length))",
        "Length-normalised DPO: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124",
        "Where answers grow longer. beta is per token here, so larger: Tulu 3 takes 5.",
    ),
    "aot": LossSpec(
        formulas.aot,
        "pair",
        (*_LOGPS, "partner_margins"),
        ("beta", "label_smoothing"),
        "as sigmoid; policy's and reference's logp_c - logp_r are sorted over the step, and matched by rank",
        "AOT: Melnyk et al. 2024, arXiv:2406.05882, paired",
        "Margins are to be larger as a distribution. One more forward without gradient in each step.",
    ),
    "aot_unpaired": LossSpec(
        formulas.aot_unpaired,
        "pair",
        (*_LOGRATIOS, "partner_rejected", "partner_chosen"),
        ("beta", "label_smoothing"),
        "as sigmoid; chosen and rejected log-ratios are sorted over the step, and matched by rank",
        "AOT: Melnyk et al. 2024, arXiv:2406.05882, unpaired",
        "Chosen completions better than rejected ones as a distribution, whatever the prompt. One more forward without "
        "gradient in each step.",
    ),
    "dpop": LossSpec(
        formulas.dpop,
        "pair",
        _LOGRATIOS,
        ("beta", "dpop_lambda"),
        "-log s(m - beta dpop_lambda max(0, -chosen))",
        "DPO-positive: Pal et al. 2024 (Smaug), arXiv:2402.13228",
        "Chosen and rejected differ in a few tokens, and the chosen one's likelihood would fall.",
    ),
    "simpo": LossSpec(
        formulas.simpo,
        "pair",
        (*_LOGPS, *_LENGTHS),
        ("beta", "simpo_gamma"),
        "-log s(beta (logp_c / length - logp_r / length) - simpo_gamma)",
        "SimPO: Meng et al. 2024, arXiv:2405.14734, eq. 6",
        "No reference. beta is per token here, so larger than DPO's.",
    ),
    "cpo": LossSpec(
        formulas.cpo,
        "pair",
        _LOGPS,
        ("beta", "cpo_alpha"),
        "-log s(beta (logp_c - logp_r)) + cpo_alpha sft",
        "CPO: Xu et al. 2024, arXiv:2401.08417; its likelihood term is a mean over tokens here, as in TRL",
        "No reference. Translation, and wherever the chosen completion is good in itself.",
        likelihood="cpo_alpha",
    ),
    "orpo": LossSpec(
        formulas.orpo,
        "pair",
        (*_LOGPS, *_LENGTHS),
        ("beta",),
        "sft - beta log s(log(p_c / (1 - p_c)) - log(p_r / (1 - p_r))), p = exp(logp / length)",
        "ORPO: Hong et al. 2024, arXiv:2403.07691, eq. 6; beta is the paper's lambda, and sft is of completions only",
        "No reference, and no supervised stage before it.",
        likelihood=1.0,
    ),
    "plackett_luce": LossSpec(
        formulas.plackett_luce,
        "example",
        (*_LOGRATIOS, "pair_chosen", "completion_logps"),
        ("beta",),
        "sum over the ranking's completions i of log(1 + sum over worse j of exp(r_j - r_i))",
        "DPO under the Plackett-Luce model: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, eq. 20",
        "Rankings of more than two completions, as one statement. Completions of equal rank are not compared.",
    ),
    "sft": LossSpec(
        formulas.sft,
        "token",
        ("completion_logps",),
        (),
        "-logp_c, a mean over all tokens of chosen completions in the step",
        "Maximum likelihood; as a term beside a preference loss: Pang et al. 2024, arXiv:2404.19733 (RPO)",
        "A first stage, or added to another loss to hold the chosen completion's likelihood up. Alone it needs no "
        "reference.",
    ),
    "kto": LossSpec(
        formulas.kto,
        "completion",
        (*_RATED, "kl_baseline"),
        ("beta", *_KINDS),
        "w (1 - s(y (r - beta z))), y = 1 of a good and -1 of a bad completion, w = desirable_weight or "
        "undesirable_weight, z = max(0, mean log-ratio of the step's completions after other prompts)",
        "KTO: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7",
        "Completions that are only called good or bad; many more of one kind are evened out by the weights. One more "
        "forward without gradient of policy and reference in each step.",
    ),
    "bco": LossSpec(
        formulas.bco,
        "completion",
        (*_RATED, "reward_baseline"),
        ("beta", *_KINDS),
        "-w log s(y (r - delta)), delta = mean r of all rated completions so far",
        "BCO: Jung et al. 2024, arXiv:2404.04656, with a running mean as in TRL, and without its weighting of "
        "prompts (UDM)",
        "As kto, where a loss that never saturates is wanted. One more forward without gradient in each step.",
    ),
    "apo_zero_unpaired": LossSpec(
        formulas.apo_zero_unpaired,
        "completion",
        _RATED,
        ("beta", *_KINDS),
        "w (1 - s(y r))",
        "APO: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, of single completions as in TRL",
        "As kto, where good completions are better than what the model writes; nothing more to compute.",
    ),
}
