"""Random kills of a default run of two ranks under torchrun: it ends as if nobody had killed it.

    python -m tests.soak --kills 20 --seed 1

Who is killed (a rank, both, torchrun, all of them at once) and when (from the first second on) is drawn. After each
kill the same command is given again. A table says what happened; the exit code is 0 if lines and weights equal those of
an undisturbed run, to the last bit, and nothing is left behind.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors.torch import load_file

from dpo_dist.metrics import WALL_CLOCK
from tests.cores import alone
from tests.golden.trajectories import FOLDER
from tests.launching import command, environment, kill_group, launch, succeeded

PAUSE = 0.25  # seconds added to each step, so that kills fall into steps and saves, not only into the start
LATEST = 16.0  # seconds after a start; it takes about six of them until the first step
VICTIMS = ("rank 0", "rank 1", "both ranks", "torchrun", "all")
CONFIG = (
    f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
    f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}}}],\n"
    f"       evaluation: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 5}}]}}\n"
    "train: {examples_per_step: 3, max_steps: 240, learning_rate: 0.001}\n"
    "evaluation: {eval_steps: 5, metric_for_best_model: loss}\n"
    "checkpoint: {save_steps: 2, save_total_limit: 3}\n"
    "parallel: {deepspeed: zero3_cpu}\n"
)


@dataclass(frozen=True)
class Kill:
    """One start that was killed."""

    victim: str
    after: float  # seconds
    steps: int  # that the file of metrics had then


def lines(folder: Path) -> list[dict[str, object]]:
    """What is reproducible of the metrics."""
    path = folder / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines() if line] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in whole]


def strike(root: Path, overrides: list[str], victim: str, after: float) -> Kill | None:
    """Start, and kill; None if the run had ended before."""
    with alone(2), (root / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command(2, "dpo_dist", "train", "run.yaml", *overrides),
            cwd=root,
            env=environment(_slowly()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            process.wait(after)
            return None
        except subprocess.TimeoutExpired:
            pass
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = sorted((child for child in children if "dpo_dist" in child.cmdline()), key=_rank_of)
        for one in _doomed(victim, process.pid, [child.pid for child in ranks]):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        # Whoever is left ends by himself: torchrun after its ranks, ranks after their torchrun.
        psutil.wait_procs([*ranks], timeout=60)
        try:
            process.wait(60)
        finally:
            left = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
            kill_group(process)
        assert not left, f"{victim} killed after {after:.1f} s: {left} did not end"
    out = root / "out" / "metrics.jsonl"
    return Kill(victim, after, out.read_bytes().count(b"learning_rate") if out.exists() else 0)


def _slowly() -> dict[str, str]:
    return {"DPO_DIST_TESTING": "1", "DPO_DIST_FAULT": f"slow={PAUSE}@*:*:step"}


def _rank_of(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.environ().get("RANK", "9"))
    return 9


def _doomed(victim: str, torchrun: int, ranks: list[int]) -> list[int]:
    return {
        "rank 0": ranks[:1],
        "rank 1": ranks[1:2],
        "both ranks": ranks,
        "torchrun": [torchrun],
        "all": [torchrun, *ranks],
    }[victim] or [torchrun]  # no rank has been started yet


def soak(root: Path, num_kills: int, seed: int, overrides: list[str]) -> list[Kill]:
    """Kill a run so many times, let it end, and compare it with one that nobody disturbed."""
    draw = random.Random(seed)
    (root / "run.yaml").write_text(CONFIG)
    env = {"DPO_DIST_CACHE": str(root / "cache")}
    os.environ.update(env)
    succeeded(launch(2, "dpo_dist", "train", "run.yaml", "train.output_dir=whole", cwd=root))
    ours = [*overrides, "train.output_dir=out", "checkpoint.resume=auto"]
    kills: list[Kill] = []
    while len(kills) < num_kills:
        kill = strike(root, ours, draw.choice(VICTIMS), draw.uniform(1.0, LATEST))
        if kill is None:
            break
        kills.append(kill)
        print(f"{len(kills):3}  {kill.victim:10}  after {kill.after:5.1f} s, at step {kill.steps}", flush=True)
    succeeded(launch(2, "dpo_dist", "train", "run.yaml", *ours, cwd=root))
    assert lines(root / "out") == lines(root / "whole"), "the lines differ"
    weights = [load_file(root / name / "model" / "model.safetensors") for name in ("out", "whole")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1]), "the weights differ"
    assert {path.name for path in (root / "out").iterdir()} == {path.name for path in (root / "whole").iterdir()}
    assert not list((root / "out").rglob(".*")), "something is left behind"
    return kills


def main() -> None:
    """As the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="of the run, such as checkpoint.async_save=true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        kills = soak(Path(root), asked.kills, asked.seed, asked.overrides)
    print(f"{len(kills)} kills; lines and weights equal those of an undisturbed run")
    if len(kills) < asked.kills:
        sys.exit("the run ended before: give it more steps")


if __name__ == "__main__":
    main()
