"""Adapters through the package's engine: `-m tests.parity.adapter_worker FOLDER OUT CASE:STAGE ...`.

FOLDER holds the base models; OUT/CASE-zeroS gets what each case gave. `CASE:STAGE:resume` also saves a
checkpoint on the way, and goes on from it in a new engine.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import install_import_hook
from safetensors.torch import save_file

if __name__ == "__main__":
    install_import_hook("dpo_dist", "beartype.beartype")

from dpo_dist.adapters import attach_adapter, export_adapter, write_adapter_settings
from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.checkpoint import CheckpointStore, load_shards, save_shards, write_assets
from dpo_dist.config import TrainConfig
from dpo_dist.distributed import Ranks, barrier, process_group, sum_over_ranks
from dpo_dist.engine import TrainingEngine, adopt_process_group, engine_config, release_process_group
from dpo_dist.logprobs import STATISTICS
from dpo_dist.losses.formulas import cpo
from dpo_dist.model import four_bits, load_model
from dpo_dist.pretrained import load_config
from tests.launching import end_rank
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
from tests.run_states import run_state

warnings.simplefilter("ignore")


def settings_of(stage: int, ranks: Ranks, max_norm: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    return engine_config({"zero_optimization": zero}, dtype, ranks.device, max_norm)


def build(case: Case, stage: int, folder: Path, ranks: Ranks) -> TrainingEngine:
    """The package's own way from folder to engine."""
    base = folder / case.base
    settings = settings_of(stage, ranks, case.max_norm)
    config = load_config(base, trust_remote_code=False)
    adapter = case.config_in(folder)
    quantised = four_bits(adapter, torch.float32)
    model = load_model(base, config, register("sdpa"), torch.float32, settings, case.checkpoints, False, quantised)
    attach_adapter(model, adapter, str(base), SEED, STEPS, settings)
    train = TrainConfig(
        output_dir="unused",
        max_grad_norm=case.max_norm,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_epsilon=EPSILON,
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
        # Asking for statistics in every second step: it must not matter for what is trained.
        logps_M = engine.token_scores(batch, STATISTICS if step % 2 else ()).logps_M
        ratios = batch.completion_sums(logps_M) - reference
        losses = cpo(ratios[batch.pair_chosen_B], ratios[batch.pair_rejected_B], beta=BETA)  # DPO, of log-ratios
        loss = losses.sum() / pairs_of_step(step)
        engine.backward(loss)
        loss_sum += loss.item()
    norm = engine.step(LEARNING_RATE)
    total = sum_over_ranks(torch.cat([loss_sum, norm]))
    return {"loss": float(total[0]), "grad_norm": float(total[1])}


def probe(engine: TrainingEngine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What reference and policy answer on a step's examples, with statistics; the same micro-batch on every rank."""
    batch = build_micro_batch(examples_of_step(99), [0, 2, 5, 7], True)
    with torch.no_grad():
        reference, policy = engine.reference_token_logps(batch).clone(), engine.token_logps(batch).clone()
        scores = engine.token_scores(batch, STATISTICS)
        again, statistics = scores.logps_M, scores.statistics_KM
    assert torch.equal(policy, again)
    return reference, policy, statistics


def run(case_name: str, stage: int, resumes: bool, folder: Path, results: Path, ranks: Ranks) -> None:
    case = CASES[case_name]
    out = results / f"{case_name}-zero{stage}"
    engine = build(case, stage, folder, ranks)
    flags = {name: (p.requires_grad, p.dtype) for name, p in engine.model.named_parameters()}
    reference, policy, _ = probe(engine)
    history = []
    for step in range(STEPS):
        if resumes and step == STEPS - 2:
            engine = resumed(engine, case, stage, folder, out, ranks)
        history.append(one_step(engine, step))
        if engine.allocation is not None and step == STEPS - 3 and ranks.is_first:
            out.mkdir(parents=True, exist_ok=True)
            save_file(engine.allocation.state()[0], out / "averages.safetensors")
    reference_after, policy_after, statistics = probe(engine)
    if resumes:
        store = CheckpointStore(out / "run", ranks)
        store.save(
            run_state(), lambda folder: save_shards(engine.engine, folder), lambda folder: assets(engine, folder)
        )
    export_adapter(out / "adapter", engine.named_adapter_parameters(), ranks, engine.model.adapter)
    if ranks.is_first:
        result = {
            "steps": history,
            "reference_kept": torch.equal(reference, reference_after),
            "started_equal": float((reference - policy).abs().max()),
            "moved": float((policy_after - policy).abs().max()),
            "trained": sorted(name for name, (trained, _) in flags.items() if trained),
            "dtypes": sorted({str(dtype) for _, dtype in flags.values()}),
            "same_flags": flags == {n: (p.requires_grad, p.dtype) for n, p in engine.model.named_parameters()},
        }
        (out / "result.json").write_text(json.dumps(result))
        answers = {"policy": policy_after, "reference": reference_after, "statistics": statistics}
        save_file(answers, out / "probe.safetensors")
    engine.engine.destroy()


def assets(engine: TrainingEngine, folder: Path) -> None:
    write_assets(folder / "model_assets", engine.model.export_config(), None, None, torch.float32)
    write_adapter_settings(folder / "model_assets", engine.model.adapter)


def resumed(engine: TrainingEngine, case: Case, stage: int, folder: Path, out: Path, ranks: Ranks) -> TrainingEngine:
    """The same state in a new engine, through files."""
    checkpoint = out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_shards(engine.engine, checkpoint)
    barrier()
    allocation = None if engine.allocation is None else engine.allocation.state()
    engine.engine.destroy()
    fresh = build(case, stage, folder, ranks)
    load_shards(fresh.engine, checkpoint)
    if allocation is not None:
        assert fresh.allocation is not None
        tensors, values = allocation
        fresh.allocation.load_state({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(values)))
    return fresh


def main() -> None:
    folder, results = Path(sys.argv[1]), Path(sys.argv[2])
    with process_group(release=release_process_group) as ranks:
        adopt_process_group()
        for argument in sys.argv[3:]:
            name, stage, *more = argument.split(":")
            run(name, int(stage), more == ["resume"], folder, results, ranks)


if __name__ == "__main__":
    main()
    end_rank()
