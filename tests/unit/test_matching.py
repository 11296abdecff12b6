"""Pairs of a step matched with each other, against sorting the whole step at once."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from dpo_dist.batch import build_micro_batch
from dpo_dist.config import LossConfig
from dpo_dist.data import Pair
from dpo_dist.losses import bind
from dpo_dist.matching import _partner
from dpo_dist.tokenization import TokenizedExample

BETA, EPS, NUM_PAIRS = 0.3, 0.1, 7


def step() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of policy and reference of chosen and rejected completions, (2, pairs)."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = (10 * torch.randn(2, NUM_PAIRS, dtype=torch.float64, generator=generator) for _ in range(2))
    return policy.requires_grad_(), reference


def naive(name: str, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """As in the paper: both sides sorted, and compared place by place."""
    if name == "aot":
        delta = (policy[0] - policy[1]).sort().values - (reference[0] - reference[1]).sort().values
    else:
        ratios = policy - reference
        delta = ratios[0].sort().values - ratios[1].sort().values
    return (-(1 - EPS) * F.logsigmoid(BETA * delta) - EPS * F.logsigmoid(-BETA * delta)).sum()


def test_micro_batches_add_up_to_the_sorted_step() -> None:
    for name in ("aot", "aot_unpaired"):
        policy, reference = step()
        wanted = naive(name, policy, reference)
        (gradient,) = torch.autograd.grad(wanted, policy)

        ratios = (policy - reference).detach()
        margins, reference_margins = (policy[0] - policy[1]).detach(), reference[0] - reference[1]
        partners = torch.stack(
            [_partner(margins, reference_margins), _partner(ratios[0], ratios[1]), _partner(ratios[1], ratios[0])]
        )
        loss = bind(LossConfig(loss_type=name, beta=BETA, label_smoothing=EPS))
        total = torch.zeros((), dtype=torch.float64)
        for part in ([0, 1, 2, 3], [4], [5, 6]):
            examples = [TokenizedExample((1,), ((2, 3), (4,)), (Pair(0, 1),), "a:1")] * len(part)
            batch = build_micro_batch(examples, range(0, 2 * len(part), 2), share_prompts=True)
            batch = replace(batch, partners_3B=partners[:, part])
            logps, known = (both[:, part].t().reshape(-1) for both in (policy, reference))
            total = total + loss(batch, logps, logps - known)[0]
        torch.testing.assert_close(total, wanted)
        torch.testing.assert_close(torch.autograd.grad(total, policy)[0], gradient)


def test_places_that_nobody_fills_change_nothing() -> None:
    values, others = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 0.7, 0.1])
    nobody = torch.full((2,), torch.inf)
    assert _partner(values, others).tolist() == torch.tensor([0.7, 0.1, 0.5]).tolist()
    with_gaps = _partner(torch.cat([values[:1], nobody, values[1:]]), torch.cat([nobody, others]))
    assert with_gaps[[0, 3, 4]].tolist() == _partner(values, others).tolist()
