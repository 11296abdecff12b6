"""What ZeRO-3 costs on a CPU: the quickstart's steps at stage 3 and stage 0, in turn: python -m benchmarks.stages

Two processes of one thread each, the model and data of `configs/smollm2_demo.yaml`, without evaluation, on a machine
with nothing else to do. Pairs per second of stage 3 over those of stage 0, of launches one after the other; the median.
The reference, which is asked in every step, is sharded as the policy is, or whole in both processes
(`reference.sharded=false`), as stage 0 has it. Losses must be equal. Exit code 1 if the first is below 0.8.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.launching import REPOSITORY, launch

CASES = {
    "zero3_cpu, whole reference": ("parallel.deepspeed=zero3_cpu", "reference.sharded=false"),
    "zero3_cpu": ("parallel.deepspeed=zero3_cpu",),
    "zero0_cpu": ("parallel.deepspeed=zero0_cpu",),
}
JUDGED, BASE = "zero3_cpu", "zero0_cpu"
WANTED = 0.8
LOSS_BOUND = 1e-5
WARM_UP = 3  # steps: DeepSpeed traces the first, and memory of the first three comes page by page
SETTINGS = (
    "reference.source=live",
    "evaluation.eval_steps=0",
    "evaluation.eval_on_start=false",
    "data.evaluation=[]",
    "train.self_check=false",
    "log.report_to=[]",
)


def measure(case: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """The lines of one launch's steps, those of the warm-up included."""
    out = folder / str(len(list(folder.iterdir())))
    arguments = ["train", "smollm2_demo", f"train.output_dir={out}", f"train.max_steps={steps}", *SETTINGS]
    environment = {"OMP_NUM_THREADS": "1"}
    done = launch(2, "dpo_dist", *arguments, *CASES[case], cwd=REPOSITORY, env=environment, timeout=1200)
    if done.returncode:
        sys.exit(f"{case} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
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
    parser.add_argument("--steps", type=int, default=9, help=f"the first {WARM_UP} are not timed")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {case: [] for case in CASES if case != BASE}
    with tempfile.TemporaryDirectory(prefix="stages-") as folder:
        for _ in range(options.repeats):
            found = {case: measure(case, options.steps, Path(folder)) for case in CASES}
            losses = zip(*([line["loss"] for line in lines] for lines in found.values()), strict=True)
            apart = max(max(step) - min(step) for step in losses)
            if apart > LOSS_BOUND:
                sys.exit(f"not the same work: losses differ by {apart:.1e}")
            paces = {case: pace(lines) for case, lines in found.items()}
            for case, own in ratios.items():
                own.append(paces[case] / paces[BASE])
            told = "; ".join(f"{case} {one:.3f} pairs/s" for case, one in paces.items())
            print(f"{told}; losses within {apart:.0e}", flush=True)
    for case, own in ratios.items():
        print(f"{case} over {BASE}: {statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})")
    print(f"wanted of {JUDGED}: {WANTED}")
    return int(statistics.median(ratios[JUDGED]) < WANTED)


if __name__ == "__main__":
    sys.exit(main())
