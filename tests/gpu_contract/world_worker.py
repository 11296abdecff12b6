"""Ranks of runs of any world size, each alone in one process.

    python -m tests.gpu_contract.world_worker CONFIG OUT.json WORLD_SIZE:RANK[:FAULT] ...

The process group is torch's fake one: collectives return at once, and what they return is not real. What is real is
everything before: configuration, data, sampler, plan, both engines, the training loop, and which collectives a rank
asks for, in which order and of which size. OUT gets these for every rank, by step.
"""

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_dist import evaluation, metrics, trainer
from dpo_dist.ahead import Ahead
from dpo_dist.checkpoint import CheckpointStore
from dpo_dist.cli import training
from dpo_dist.cli.prepare import prepare
from dpo_dist.cli.resuming import Start
from dpo_dist.cli.sources import Choice
from dpo_dist.config import load_config
from dpo_dist.distributed import Ranks, StopRequest, sum_over_ranks
from dpo_dist.engine import adopt_process_group

AT_ONCE = 2  # processes
STOP_BEFORE_STEP = 3  # counted from 0; every rank would learn of it


class Collectives(TorchDispatchMode):
    """Name, largest number of elements and dtype of every collective, by step; step -1 is before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: dict[str, list[tuple[str, int, str]]] = {"start": []}
        self.step = "start"

    def begin(self, step: str) -> None:
        """What follows belongs to this step."""
        self.step = step
        self.by_step.setdefault(step, [])

    def summary(self) -> dict[str, dict[str, Any]]:
        """For every step a hash of what was asked for in which order, and elements by kind."""
        return {
            name: {
                "order": hashlib.sha256(json.dumps(calls).encode()).hexdigest()[:16],
                "calls": len(calls),
                "elements": {kind: sum(n for k, n, _ in calls if k == kind) for kind in sorted({k for k, *_ in calls})},
            }
            for name, calls in self.by_step.items()
        }

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        if operator.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((arguments, settings)) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel, default=torch.zeros(0))
            self.by_step[self.step].append((operator._opname, largest.numel(), str(largest.dtype)))
        return operator(*arguments, **(settings or {}))


def accept_what_rank_0_says() -> None:
    """DeepSpeed compares its order of parameters with rank 0's; the fake group delivers nothing to compare with."""
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.") and hasattr(module, "assert_ints_same_as_other_ranks"):
            module.assert_ints_same_as_other_ranks = lambda ints: None  # type: ignore[attr-defined]


def own_sums(values: torch.Tensor) -> torch.Tensor:
    """This rank's sums in place of all ranks', and nowhere 0 but in the last two: what is asked of all."""
    total = sum_over_ranks(values)
    total[:-2] += 1
    return total


def play(config_file: str, folder: Path, world_size: int, rank: int, fault: str | None) -> dict[str, Any]:
    """Start one rank, let it train, and tell what it asked for."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    adopt_process_group()
    accept_what_rank_0_says()
    config = load_config(config_file)
    prepared = prepare(config, folder / "cache")
    ranks, stop, seen = Ranks(rank, world_size, 0, torch.device("cpu")), StopRequest(), Collectives()

    class Noting(Ahead[Any]):
        def of(self, step: int) -> Any:
            seen.begin(f"step {step}")
            stop.requested = step >= STOP_BEFORE_STEP and fault != "deaf, and scores twice"
            if fault == "asks alone":
                dist.all_reduce(torch.zeros(1))
            return super().of(step)

    stock_evaluate = trainer.evaluate_all

    def evaluate_all(run: Any, progress: Any) -> None:
        seen.begin(f"evaluation after {progress.step}")
        stock_evaluate(run, progress)

    def scoring_twice(batch: Any, *arguments: Any) -> torch.Tensor:
        with torch.no_grad():
            run.policy.token_logps(batch)
        return metrics.step_sums(batch, *arguments)

    if fault == "deaf, and scores twice":
        trainer.step_sums = scoring_twice
    trainer.Ahead = Noting  # type: ignore[misc, assignment]
    trainer.evaluate_all = evaluate_all
    # What is gathered is not real, so neither is a loss; a rank without examples would have nothing to divide by.
    trainer.not_finite = lambda *values: ""
    trainer.sum_over_ranks = evaluation.sum_over_ranks = own_sums
    trainer.save = lambda run, progress: seen.begin("end")  # its shards would need real collectives
    with seen:
        store = CheckpointStore(Path(config.train.output_dir), ranks)
        run = training._build(prepared, ranks, stop, store, Start(None, 0, False, ""), Choice("live", "", None))
        progress = trainer.Progress()
        trainer.train(run, progress)
    return {"stopped_after": progress.step, **_shape_of(run), "steps": seen.summary()}


def _shape_of(run: trainer.Run) -> dict[str, int]:
    plan, rank, parameters = run.plan(0), run.ranks.rank, list(run.policy.model.parameters())
    return {
        "parameters": sum(p.ds_numel for p in parameters),
        "shard": sum(p.ds_tensor.numel() for p in parameters),
        "micro_batches": len(plan.micro_batches[rank]),
        "reference_bins": len(plan.reference_bins[rank]),
        "examples": len(plan.examples_of_rank(rank)),
    }


def play_in_child(config_file: str, folder: Path, case: str) -> int:
    """Fork a process that plays one rank and writes what it asked for; returns its id."""
    world_size, rank, *fault = case.split(":")
    child = os.fork()
    if child:
        return child
    try:
        played = play(config_file, folder, int(world_size), int(rank), fault[0] if fault else None)
        (folder / f"{case}.json").write_text(json.dumps(played))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Play every rank that is named, each in a process that is forked when everything has been imported."""
    config_file, out, *cases = sys.argv[1:]
    folder = Path(out).parent
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29677")  # nothing listens there: a fake group has no peers
    # The first one makes the cache of the data; the others find it, and take turns on the cores.
    first, waiting, running = cases[0], cases[1:], dict[int, str]()
    running[play_in_child(config_file, folder, first)] = first
    while running:
        child, status = os.wait()
        case = running.pop(child)
        if status:
            sys.exit(f"rank {case} failed")
        while waiting and len(running) < AT_ONCE:
            case = waiting.pop(0)
            running[play_in_child(config_file, folder, case)] = case
    results = {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
