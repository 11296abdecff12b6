"""Three epochs with a live reference, with a cache that is filled on the way, and with a warm one.

python -m benchmarks.reference_cache [--repeats 3] [--ranks 2] [--examples 24] [--out OUT.json]

Trains the demo model on the shipped pairs in the three ways, one after another and so several times, each in a fresh
launch. Compared are medians of the seconds of the training loop, and of the filling pass without loading the model,
which the live reference has to load as well. Activations are kept, not recomputed: a step then costs 2 (policy) + 4
(backward) + 2 (reference) FLOPs per parameter and token, so a cache allows 8/6 = 1.33, and with one filling pass in
three epochs 24/20 = 1.2. Exit code 1: the losses are not equal, or a ratio is below what is asked for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WARM_AT_LEAST, COLD_AT_LEAST = 1.25, 1.12
EPOCHS = 3


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--examples", type=int, default=24, help="pairs of configs/demo/train.jsonl")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"live": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for name in runs:  # `warm` finds what `cold` has just stored
                runs[name].append(_run(Path(folder), name, repeat, options))
                print(f"{name} {repeat + 1}: {json.dumps(runs[name][-1]['seconds'])}", flush=True)
    report = _judge(runs)
    if options.out:
        options.out.write_text(json.dumps(report | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if report["faults"] else 0)


def _run(folder: Path, name: str, repeat: int, options: argparse.Namespace) -> dict[str, Any]:
    cache, out = folder / f"cache-{repeat}", folder / f"{name}-{repeat}"
    source = ["reference.source=live"] if name == "live" else ["reference.source=cache", f"reference.cache_dir={cache}"]
    overrides = [
        f"train.output_dir={out}",
        f"data.train.0.limit={options.examples}",
        "data.evaluation=[]",
        "evaluation.eval_steps=0",
        "evaluation.eval_on_start=false",
        "train.max_steps=null",
        f"train.num_train_epochs={EPOCHS}",
        "model.gradient_checkpointing=false",
        "log.report_to=[]",
        *source,
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    worker = ["-m", "benchmarks.reference_cache.worker", str(out) + ".json", "smollm2_demo", *overrides]
    done = subprocess.run([*launcher, *worker], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "split" not in line]
    return {"seconds": json.loads(Path(f"{out}.json").read_text(encoding="utf-8")), "losses": losses}


def _judge(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    faults = []
    first = runs["live"][0]["losses"]
    for name, repeats in runs.items():
        for run in repeats:
            furthest = max(abs(mine - other) for mine, other in zip(run["losses"], first, strict=True))
            if furthest > 1e-4:
                faults.append(f"{name}: a loss differs by {furthest:.1e}")
    live = _median(runs["live"], "train")
    warm = live / _median(runs["warm"], "train")
    cold = live / (_median(runs["cold"], "train") + _median(runs["cold"], "fill"))
    print(f"{EPOCHS} epochs, {len(first)} steps; live {live:.1f} s")
    for name, ratio, least in (("warm cache", warm, WARM_AT_LEAST), ("with the filling pass", cold, COLD_AT_LEAST)):
        print(f"{name}: {ratio:.3f} times faster (at least {least})")
        if ratio < least:
            faults.append(f"{name}: {ratio:.3f} times faster, at least {least} is asked for")
    for fault in faults:
        print(f"fault: {fault}")
    return {"live_seconds": live, "warm_ratio": warm, "cold_ratio": cold, "faults": faults}


def _median(runs: list[dict[str, Any]], part: str) -> float:
    return statistics.median(run["seconds"][part] for run in runs)


if __name__ == "__main__":
    main()
