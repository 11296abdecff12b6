"""What ZeRO-3 costs on a CPU: the quickstart's steps at stage 3 and stage 0, in turn: python -m benchmarks.stages

Two processes of one thread each, the model and data of `configs/smollm2_demo.yaml`, without evaluation, on a machine
with nothing else to do. Pairs per second of stage 3 over those of stage 0, of launches one after the other; the median.
Losses must be equal. Exit code 1 below 0.8.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.launching import REPOSITORY, launch

FILES = ("zero3_cpu", "zero0_cpu")
WANTED = 0.8
LOSS_BOUND = 1e-5
WARM_UP = 1  # steps
SETTINGS = (
    "evaluation.eval_steps=0",
    "evaluation.eval_on_start=false",
    "data.evaluation=[]",
    "train.self_check=false",
    "log.report_to=[]",
)


def measure(file: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """The lines of one launch's steps, those of the warm-up included."""
    out = folder / f"{file}-{len(list(folder.iterdir()))}"
    arguments = ["train", "smollm2_demo", f"train.output_dir={out}", f"train.max_steps={steps}", *SETTINGS]
    environment = {"OMP_NUM_THREADS": "1"}
    done = launch(
        2, "dpo_dist", *arguments, f"parallel.deepspeed={file}", cwd=REPOSITORY, env=environment, timeout=1200
    )
    if done.returncode:
        sys.exit(f"{file} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "time/step" in line]


def pace(lines: list[dict[str, Any]]) -> float:
    """Pairs per second after the warm-up."""
    timed = lines[WARM_UP:]
    seconds = [line["time/step"] for line in timed]
    pairs = [line["pairs_per_second"] * line["time/step"] for line in timed]
    return sum(pairs) / sum(seconds)


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="the first one is not timed")
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory(prefix="stages-") as folder:
        for _ in range(options.repeats):
            found = {file: measure(file, options.steps, Path(folder)) for file in FILES}
            apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(*found.values(), strict=True))
            if apart > LOSS_BOUND:
                sys.exit(f"not the same work: losses differ by {apart:.1e}")
            paces = {file: pace(lines) for file, lines in found.items()}
            ratios.append(paces[FILES[0]] / paces[FILES[1]])
            told = ", ".join(f"{file} {one:.3f} pairs/s" for file, one in paces.items())
            print(f"{told}: {ratios[-1]:.3f}; losses within {apart:.0e}", flush=True)
    median = statistics.median(ratios)
    print(f"zero3 over zero0: {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), wanted {WANTED}")
    return int(median < WANTED)


if __name__ == "__main__":
    sys.exit(main())
