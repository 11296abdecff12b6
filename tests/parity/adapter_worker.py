"""Adapters through the package's engine: `-m tests.parity.adapter_worker FOLDER CASE:STAGE ...`, one or more ranks.

FOLDER holds the base models; FOLDER/ranksN/CASE-zeroS gets what each case gave.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import install_import_hook

if __name__ == "__main__":
    install_import_hook("dpo_dist", "beartype.beartype")

from dpo_dist.attention import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.config import TrainConfig
from dpo_dist.distributed import Ranks, process_group, sum_over_ranks
from dpo_dist.engine import TrainingEngine, adopt_process_group, engine_config, release_process_group
from dpo_dist.losses import sigmoid
from dpo_dist.model import attach_adapter, load_config, load_model
from tests.parity.adapter_cases import (
    BETA,
    CASES,
    EPSILON,
    LEARNING_RATE,
    SEED,
    STEPS,
    WEIGHT_DECAY,
    Case,
    examples_of_step,
    pairs_of_step,
)

warnings.simplefilter("ignore")


def settings_of(stage: int, ranks: Ranks, max_norm: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    return engine_config({"zero_optimization": zero}, dtype, ranks.device, max_norm)


def build(case: Case, stage: int, base: Path, ranks: Ranks, checkpointing: bool = False) -> TrainingEngine:
    """The package's own way from folder to engine."""
    settings = settings_of(stage, ranks, case.max_norm)
    config = load_config(base, trust_remote_code=False)
    model = load_model(base, config, register("sdpa"), torch.float32, settings, checkpointing, False)
    attach_adapter(model, case.config, str(base), SEED, STEPS, settings)
    train = TrainConfig(
        output_dir="unused", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_epsilon=EPSILON
    )
    return TrainingEngine(model, settings, train, ranks)


def batches(step: int, ranks: Ranks, share: bool) -> list[MicroBatch]:
    """This rank's examples, one or two in a micro-batch; as many micro-batches on every rank."""
    mine = examples_of_step(step)[ranks.rank :: ranks.world_size]
    offsets = [0, *torch.tensor([len(one.completion_ids) for one in mine]).cumsum(0).tolist()]
    parts = [mine[:1], mine[1:]]
    return [
        build_micro_batch(part, offsets[first : first + len(part)], share)
        for part, first in zip(parts, (0, 1), strict=True)
    ]


def one_step(engine: TrainingEngine, step: int, share: bool = True) -> dict[str, float]:
    """Loss and norm of an update."""
    ranks = engine.ranks
    loss_sum = torch.zeros(1, dtype=torch.float64)
    for batch in engine.accumulate(batches(step, ranks, share)):
        reference = batch.completion_sums(engine.reference_token_logps(batch))
        ratios = engine.completion_logps(batch) - reference
        losses = sigmoid(ratios[batch.pair_chosen_B], ratios[batch.pair_rejected_B], beta=BETA, label_smoothing=0.0)
        loss = losses.sum() / pairs_of_step(step)
        engine.backward(loss)
        loss_sum += loss.item()
    norm = engine.step(LEARNING_RATE)
    total = sum_over_ranks(torch.cat([loss_sum, norm]))
    return {"loss": float(total[0]), "grad_norm": float(total[1])}


def probe(engine: TrainingEngine) -> tuple[torch.Tensor, torch.Tensor]:
    """What reference and policy answer on a step's examples; the same micro-batch on every rank."""
    batch = build_micro_batch(examples_of_step(99), [0, 2, 5, 7], True)
    with torch.no_grad():
        return engine.reference_token_logps(batch).clone(), engine.token_logps(batch).clone()


def run(case_name: str, stage: int, folder: Path, ranks: Ranks) -> None:
    case = CASES[case_name]
    engine = build(case, stage, folder / case.base, ranks)
    reference, policy = probe(engine)
    history = [one_step(engine, step) for step in range(STEPS)]
    reference_after, policy_after = probe(engine)
    out = folder / f"ranks{ranks.world_size}" / f"{case_name}-zero{stage}"
    tensors = {name: tensor for name, tensor in engine.named_adapter_parameters()}
    if ranks.is_first:
        out.mkdir(parents=True)
        result = {
            "steps": history,
            "reference_kept": torch.equal(reference, reference_after),
            "started_equal": float((reference - policy).abs().max()),
            "moved": float((policy_after - policy).abs().max()),
        }
        (out / "result.json").write_text(json.dumps(result))
        torch.save(tensors, out / "tensors.pt")
    engine.engine.destroy()


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group(release=release_process_group) as ranks:
        adopt_process_group()
        for argument in sys.argv[2:]:
            name, stage = argument.split(":")
            run(name, int(stage), folder, ranks)


if __name__ == "__main__":
    main()
