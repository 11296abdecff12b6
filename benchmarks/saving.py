"""What a step loses by a checkpoint: waited for, and written while training goes on (checkpoint.async_save).

python -m benchmarks.saving [--repeats 2] [--steps 6] [--ranks 2] [SECTION.KEY=VALUE ...]

A run of the demo model saves after each second step, in turn in both ways and not at all; what is printed is of the
first rank. `lost` is what passes in the calls that save, for each checkpoint but the last, which both ways wait for.
`train` is the whole loop: what the thread takes from a step's own computation is in there.

The checkpoints of a run are deleted after it. Machines cannot be compared by it: disks differ most.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from dpo_dist import trainer
from dpo_dist.cli import cache_dir, training
from dpo_dist.cli.logs import set_up_logging
from dpo_dist.config import load_config
from dpo_dist.distributed import launched_rank
from tests.launching import launch, succeeded

WAYS = {
    "not at all": "checkpoint.save_steps=0",
    "waited for": "checkpoint.async_save=false",
    "in the background": "checkpoint.async_save=true",
}
CONFIG = """
model: {model_name_or_path: demo, dtype: float32}
data: {train: [{path: PAIRS}]}
train: {output_dir: out, examples_per_step: 4, max_steps: STEPS, self_check: false}
packing: {max_tokens: 1024}
reference: {source: cache}
checkpoint: {save_steps: 2}
log: {report_to: []}
parallel: {deepspeed: zero3_cpu}
"""


def rank(out: Path, config: str, overrides: list[str]) -> None:
    """Train, and write down the seconds of the first rank."""
    saves: list[float] = []
    total: list[float] = []

    def timed(into: list[float], function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                into.append(time.perf_counter() - began)

        return call

    set_up_logging()
    with (
        mock.patch.object(trainer, "save", timed(saves, trainer.save)),
        mock.patch.object(trainer, "complete_save", timed(saves, trainer.complete_save)),
        mock.patch.object(training, "train", timed(total, trainer.train)),
    ):
        training.run_training(load_config(config, overrides), cache_dir())
    if launched_rank() == 0:
        out.write_text(json.dumps({"last": saves.pop(), "saves": sum(saves), "train": sum(total)}), encoding="utf-8")


def measured(root: Path, way: str, ranks: int, overrides: list[str]) -> dict[str, float]:
    """Seconds of one run."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        out = Path(folder) / "seconds.json"
        arguments = [f"train.output_dir={folder}/run", WAYS[way], *overrides]
        succeeded(launch(ranks, "benchmarks.saving", "--rank", str(out), "run.yaml", *arguments, cwd=root))
        return json.loads(out.read_text())


def main() -> None:
    """As the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    pairs = Path(__file__).parents[1] / "configs" / "demo" / "train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "run.yaml").write_text(CONFIG.replace("PAIRS", str(pairs)).replace("STEPS", str(asked.steps)))
        seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        measured(root, "not at all", asked.ranks, asked.overrides)  # computes the reference
        for _ in range(asked.repeats):
            for way in WAYS:
                seconds[way].append(measured(root, way, asked.ranks, asked.overrides))
    counted = (asked.steps - 1) // 2
    print(f"{'':20}{'lost for each':>15}{'the last':>10}{'train':>10}")
    for way, runs in seconds.items():
        saves, last, train = (statistics.median(run[key] for run in runs) for key in ("saves", "last", "train"))
        print(f"{way:20}{saves / counted:15.2f}{last:10.2f}{train:10.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # as dpo-dist's ranks end
    main()
