"""Ranks that train with and without asking for statistics: `torchrun -m tests.processes.scores_worker FOLDER`.

`FOLDER/models` holds the model. Each rank writes what it was told, and the first one the weights after two updates, to
`FOLDER/RANK.pt`: `{"STAGE DTYPE": {HABIT: {"logps", "statistics", "norms", "weights"}}}`.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.distributed import Ranks, process_group
from dpo_dist.engine import TrainingEngine, adopt_process_group, release_process_group
from dpo_dist.logprobs import STATISTICS
from tests.launching import end_rank
from tests.processes.live_engines import LEARNING_RATE, Setting, batch_of, whole

warnings.simplefilter("ignore")

SETTINGS = {
    **{f"{stage} float32": Setting(stage) for stage in range(3)},
    "3 float32": Setting(3, zero={"stage3_param_persistence_threshold": 0}),
    "3 bfloat16": Setting(3, "bfloat16", zero={"stage3_param_persistence_threshold": 40}),
}
NOTHING: tuple[str, ...] = ()
# What is asked for, by micro-batch. DeepSpeed writes its trace of modules in the first ones and follows it later.
HABITS = {
    "never": [NOTHING] * 6,
    "always": [STATISTICS] * 6,
    "in between": [NOTHING, STATISTICS[::2], NOTHING, NOTHING, STATISTICS, STATISTICS[3:]],
}
STEPS, PER_STEP, CHUNK_TOKENS = 2, 3, 4


def batches(rank: int) -> list[MicroBatch]:
    """Of one step; the second rank has only one filled one, and all have more scored tokens than a chunk."""
    filler = build_micro_batch([], [], True)
    return [filler, batch_of(0), filler] if rank else [batch_of(1), filler, batch_of(2)]


def observed(setting: Setting, habit: list[tuple[str, ...]], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Two updates, asking for other statistics in every micro-batch."""
    policy: TrainingEngine = setting.policy(folder / "models", ranks)
    head: Any = policy.model.model.get_output_embeddings()
    head.chunk_tokens = CHUNK_TOKENS
    seen: dict[str, Any] = {"logps": [], "statistics": [], "norms": []}
    asked = iter(habit)
    for _ in range(STEPS):
        for batch in policy.accumulate(batches(ranks.rank)):
            scores = policy.token_scores(batch, next(asked))
            logps_M, statistics_KM = scores.logps_M, scores.statistics_KM
            policy.backward(batch.completion_sums(logps_M).tanh().sum() + logps_M.square().sum() / 100)
            seen["logps"].append(logps_M.detach().clone())
            seen["statistics"].append(statistics_KM)
        seen["norms"].append(float(policy.step(LEARNING_RATE)))
    with torch.no_grad():
        seen["agree"] = torch.equal(policy.token_logps(batch_of()), policy.token_scores(batch_of(), STATISTICS).logps_M)
    seen["weights"] = whole(policy)
    policy.engine.destroy()
    return seen


def main() -> None:
    """Every setting with every habit."""
    folder = Path(sys.argv[1])
    with process_group(release=release_process_group) as ranks:
        adopt_process_group()
        seen = {
            name: {habit: observed(setting, asked, folder, ranks) for habit, asked in HABITS.items()}
            for name, setting in SETTINGS.items()
        }
        torch.save(seen, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main()
    end_rank()
