"""The self-proof on several ranks: `torchrun -m tests.invariance.selfcheck_worker FOLDER`.

Every rank writes `rank0.json` and so on: what each attempt raised, by name (null: nothing).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import yaml

from dpo_dist import sampler
from dpo_dist.batch import RankWork
from dpo_dist.cli.logs import set_up_logging
from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.training import run_training
from dpo_dist.config import load_config
from dpo_dist.distributed import Ranks, barrier, process_group
from dpo_dist.errors import DpoDistError
from dpo_dist.packing import CostModel
from dpo_dist.reference import LiveReference
from tests.golden.trajectories import FOLDER, base_config
from tests.invariance import selfcheck_case as faults
from tests.invariance.selfcheck_case import EXAMPLES, Case, builds_wrongly, save_model
from tests.launching import end_rank
from tests.parity.oracle import random_example

Raised = dict[str, list[str] | None]


def attempt(raised: Raised, name: str, action: Callable[[], object]) -> None:
    """Note what an action raises."""
    try:
        action()
        raised[name] = None
    except DpoDistError as error:
        raised[name] = [type(error).__name__, str(error)]


def prove_engines(raised: Raised, model: Path, ranks: Ranks) -> None:
    """Honest steps, with an idle rank too, and a fault on the second rank only."""
    for stage in (0, 3):
        for dtype in (torch.float32, torch.bfloat16):
            case, name = Case(model, stage, dtype, ranks), f"{stage} {dtype}"
            attempt(raised, f"honest {name}", case.prove)
            attempt(raised, f"idle rank {name}", lambda case=case: case.prove([random_example(5, 20, (12, 30))]))
            wrong = builds_wrongly(faults.targets_shifted) if ranks.rank == 1 else RankWork
            attempt(raised, f"fault {name}", lambda case=case, wrong=wrong: case.prove(EXAMPLES, work_type=wrong))


def run(folder: Path, name: str, *overrides: str) -> None:
    """A run of the tiny policy against its own weights, on data that lies in the rank's working folder."""
    config = base_config(folder / name)
    config["model"]["reference_name_or_path"] = None
    config["data"]["train"] = [{"path": "pairs.jsonl"}]
    config["train"] |= {"examples_per_step": 6, "max_steps": 1}
    config["parallel"]["deepspeed"] = "zero3_cpu"
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(config))
    run_training(load_config(path, overrides), folder / "cache")


class ShuffledInTheLoop(LiveReference):
    """Right while the run proves itself, and of other completions from then on."""

    calls = 0

    def completion_logps(self, work):
        type(self).calls += 1
        logps_C = super().completion_logps(work)
        return logps_C if self.calls == 1 else logps_C.roll(1)


def main() -> None:
    """Attempt everything."""
    folder, raised = Path(sys.argv[1]), {}
    set_up_logging()
    with process_group() as ranks:
        own = folder / f"files{ranks.rank}"
        own.mkdir()
        os.chdir(own)
        rows = (FOLDER / "pairs.jsonl").read_text()
        Path("pairs.jsonl").write_text(rows)
        if ranks.is_first:  # in a process group transformers writes on the first rank only
            save_model(folder / "model")
        barrier()
        shutil.copytree(folder / "model", own / "model")
        prove_engines(raised, own / "model", ranks)

        attempt(raised, "honest run", lambda: run(folder, "honest"))
        with patch("dpo_dist.cli.sources.LiveReference", ShuffledInTheLoop):
            attempt(raised, "shuffled", lambda: run(folder, "shuffled"))
        attempt(raised, "other configuration", lambda: run(folder, "configuration", f"loss.beta=0.{ranks.rank + 1}"))
        examples_of = sampler.Sampler.examples_of

        def others(own: sampler.Sampler, step: int) -> tuple[int, ...]:
            return tuple((row + ranks.rank) % own.num_examples for row in examples_of(own, step))

        with patch.object(sampler.Sampler, "examples_of", others):
            attempt(raised, "other plan", lambda: run(folder, "plan"))
        with patch.object(Prepared, "cost", CostModel(1.0 + ranks.rank)):  # the first plan is the same
            attempt(raised, "other cost", lambda: run(folder, "cost"))
        if ranks.rank == 1:
            Path("pairs.jsonl").write_text("\n".join(reversed(rows.splitlines())) + "\n")
        attempt(raised, "other data", lambda: run(folder, "data"))
        (folder / f"rank{ranks.rank}.json").write_text(json.dumps(raised))


if __name__ == "__main__":
    main()
    end_rank()
