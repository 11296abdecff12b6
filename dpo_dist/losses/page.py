"""Every loss as a table: the page `docs/losses.md`, which `dpo-dist schema --losses` prints."""

from dpo_dist.losses.table import LOSSES

_HEAD = """# Losses

Written by `dpo-dist schema --losses`. One loss: `loss.loss_type=sigmoid`; several that are added up:
`loss.loss_type=[sigmoid, bco_pair] loss.loss_weights=[0.8, 0.2]`. A setting that no chosen loss reads is an error.

A log-ratio is log pi_policy - log pi_reference of a whole completion (a sum over its tokens, nats), s the logistic
function, r_c and r_r = beta * log-ratio of chosen and rejected, m = beta * (score of chosen - score of rejected),
eps = label_smoothing, tau = discopop_tau. The score is the log-ratio, or f'(ratio) of another divergence
(`loss.f_divergence_type`; Wang et al. 2023, arXiv:2309.16240): `forward_kl` 1 - 1/u, `js_divergence` log(2u / (u + 1)),
`alpha_divergence` (u^(a - 1) - 1) / (a - 1) with a = f_alpha_divergence_coef, where log u is the log-ratio. Losses that
are not of a difference of scores take `reverse_kl` only.

The loss of a step is the sum over its pairs of weight * loss, divided by the sum of all pairs' weights in the step.
`rewards/*` are beta * log-ratio with every loss.
"""


def losses_table() -> str:
    """Markdown: a row for each loss."""
    head = [
        "| loss_type | loss of a pair | settings | other divergences | source | when |",
        "|---|---|---|---|---|---|",
    ]
    rows = [
        f"| `{name}` | {spec.formula} | {', '.join(spec.parameters)} | {'yes' if spec.is_of_a_difference else 'no'} "
        f"| {spec.source} | {spec.use} |"
        for name, spec in LOSSES.items()
    ]
    return "\n".join([_HEAD, *head, *rows, ""])
