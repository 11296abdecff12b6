"""Every loss as a table: the page `docs/losses.md`, which `dpo-dist schema --losses` prints."""

from dpo_dist.losses.table import LOSSES, LossSpec

_DATA = {
    "pair": "pairs",
    "token": "chosen completions",
    "example": "pairs or rankings",
    "completion": "rated completions",
}

_HEAD = """# Losses

Written by `dpo-dist schema --losses`. One loss: `loss.loss_type=sigmoid`; several that are added up:
`loss.loss_type=[sigmoid, bco_pair] loss.loss_weights=[0.8, 0.2]`. A setting that no chosen loss reads is an error.

A log-ratio is log pi_policy - log pi_reference of a whole completion (a sum over its tokens, nats), s the logistic
function, r_c and r_r = beta * log-ratio of chosen and rejected, m = beta * (score of chosen - score of rejected),
eps = label_smoothing, tau = discopop_tau; q and margin are the columns `chosen_probability` (else 1) and `margin` of
the data (of completions with scores their difference). The score is the log-ratio, or f'(ratio) of another divergence
(`loss.f_divergence_type`; Wang et al. 2023, arXiv:2309.16240): `forward_kl` 1 - 1/u, `js_divergence` log(2u / (u + 1)),
`alpha_divergence` (u^(a - 1) - 1) / (a - 1) with a = f_alpha_divergence_coef, where log u is the log-ratio. Losses that
are not of a difference of scores take `reverse_kl` only.

A loss of rated completions (`kto`, `bco`, `apo_zero_unpaired`) is of single completions that are called good or bad.
Rows with pairs then say that chosen completions are good and rejected ones bad, as when TRL takes pairs apart. Beside
a loss of pairs, ratings are paired by prompt first, and it is of what stays unpaired.

logp is the policy's own log-probability, likewise. The loss of a step is the sum over its pairs of weight * loss,
divided by the sum of all pairs' weights in the step; of `sft`, and of the likelihood terms of `cpo` and `orpo`, the sum
over tokens of chosen completions, divided by the number of these in the step (each times the weight of its pairs); of
`plackett_luce`, the sum over examples, by the sum of theirs; of rated completions, the sum over them, by the sum of
their weights (desirable_weight and undesirable_weight are factors, and in no denominator). Weights are the column
`weight` of the data, or 1. `rewards/*` are beta * log-ratio with every loss; without a reference, beta * logp.

A run whose losses read no reference has none, unless `reference.source` or another option asks for one, for metrics.

`aot` and `aot_unpaired` sort over the whole global step, so that neither micro-batches nor the number of ranks changes
what is compared (TRL sorts within a batch); z of `kto` and delta of `bco` are of the whole step likewise. For that the
policy runs forward over the step once more, without gradient: a third more of its arithmetic (a quarter if activations
are recomputed), and under ZeRO-3 DeepSpeed does not fetch weights ahead in it and in the next forward. Evaluation sorts
within 1024 examples.

`loss.ld_alpha` (LD-DPO, arXiv:2409.06411) weighs the tokens of a completion beyond the length of the shorter one, for
all losses that read a reference. `loss.use_weighting` (WPO, arXiv:2406.11827, eq. 2) weighs pairs by how likely the
policy is to write them, for all but `aot`, `aot_unpaired`, `plackett_luce` and what has a likelihood term
(`cpo`, `orpo`, `sft`). Weights that come from the policy are in no denominator.
"""


def losses_table() -> str:
    """Markdown: a row for each loss."""
    head = [
        "| loss_type | loss | settings | needs | other divergences | source | when |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [
        f"| `{name}` | {spec.formula} | {', '.join(spec.parameters)} | {', '.join(_needs(spec))} "
        f"| {'yes' if spec.is_of_a_difference else 'no'} | {spec.source} | {spec.use} |"
        for name, spec in LOSSES.items()
    ]
    return "\n".join([_HEAD, *head, *rows, ""])


def _needs(spec: LossSpec) -> list[str]:
    """What a run must have for it."""
    needs = [_DATA[spec.unit], "a reference" if spec.reads_a_reference else "no reference"]
    if any(name.endswith("_lengths") for name in spec.needs):
        needs.append("lengths")
    if spec.needs_matching:
        needs.append("all pairs of a step")
    if spec.needs_baseline:
        needs.append("all rated completions of a step")
    return needs
