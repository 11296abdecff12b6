"""Log-probabilities and training by plain transformers and torch: one unpadded sequence at a time. The oracle."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.golden.trajectories import FOLDER, Case, Row, load_rows


@torch.no_grad()
def completion_logp(model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
    """log pi(completion | prompt), nats, summed over the completion's tokens; log-softmax in float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].to(torch.float64)
    targets = ids[0, len(prompt_ids) :]
    return float(torch.log_softmax(logits_TV, dim=-1).gather(-1, targets[:, None]).sum())


@dataclass(frozen=True)
class Step:
    """Of chosen and of rejected completions, (2, B) each."""

    ratios: Tensor
    logps: Tensor
    lengths: Tensor


def train(
    case: Case, loss: Callable[[Step], Tensor], dtype: torch.dtype, all_rows: Sequence[Row] | None = None
) -> Iterator[dict[str, float]]:
    """Lines of a run with the settings of a case, and any loss of a step; of the recorded pairs, or of other rows."""
    all_rows = load_rows() if all_rows is None else all_rows
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=dtype) for name in ("tiny_policy", "tiny_reference")
    )
    optimizer = torch.optim.AdamW(policy.parameters(), case.learning_rate, (0.9, 0.999), eps=1e-8, weight_decay=0)
    for step in range(case.steps):
        rows = all_rows[step * case.examples_per_step :][: case.examples_per_step]
        logps = torch.stack([_pair(policy, row) for row in rows], 1)
        with torch.no_grad():
            reference_logps = torch.stack([_pair(reference, row) for row in rows], 1)
        ratios = logps - reference_logps
        lengths = torch.tensor([(len(row.chosen_ids), len(row.rejected_ids)) for row in rows]).t()
        value = loss(Step(ratios, logps, lengths))
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        chosen, rejected = (case.loss["beta"] * ratios.detach()).unbind()
        values = {
            "loss": value,
            "grad_norm": norm,
            "logps/chosen": logps[0].mean(),
            "logps/rejected": logps[1].mean(),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
        }
        yield {"step": step + 1, **{key: float(number.detach()) for key, number in values.items()}}


def _pair(model: PreTrainedModel, row: Row) -> Tensor:
    """log pi of the chosen and of the rejected completion, (2,)."""
    values = []
    for completion_ids in (row.chosen_ids, row.rejected_ids):
        ids = torch.tensor([[*row.prompt_ids, *completion_ids]])
        logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        targets = ids[0, len(row.prompt_ids) :]
        values.append(torch.log_softmax(logits_TV, dim=-1).gather(-1, targets[:, None]).sum())
    return torch.stack(values)
