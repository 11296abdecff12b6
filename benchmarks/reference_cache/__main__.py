"""Three epochs with a live reference, with a cache that is filled on the way, and with a warm one.

python -m benchmarks.reference_cache [--repeats 3] [--ranks 1] [--examples 12] [--out OUT.json]

Trains a random Llama of 12 million parameters on random pairs in the three ways under ZeRO-3, one after another and so
several times, each in a fresh launch: so many tokens to a step that computing takes the time, as it does on GPUs.
Compared are medians of the seconds of the training loop, and of the filling pass without loading the model, which the
live reference has to load as well. Activations are kept, not recomputed: a step then costs 2 (policy) + 4 (backward) +
2 (reference) FLOPs per parameter and token, so a cache allows 8/6 = 1.33, and with one filling pass in three epochs
24/20 = 1.2. Exit code 1: the losses are not equal, or a ratio is below what is asked for.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WARM_AT_LEAST, COLD_AT_LEAST = 1.25, 1.12
EPOCHS = 3


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="more wait for each other, and vary more")
    parser.add_argument("--examples", type=int, default=12, help="pairs, a third of them in each step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"live": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        _make_model_and_pairs(Path(folder), options.examples)
        for repeat in range(options.repeats):
            for name in runs:  # `warm` finds what `cold` has just stored
                runs[name].append(_run(Path(folder), name, repeat, options))
                print(f"{name} {repeat + 1}: {json.dumps(runs[name][-1]['seconds'])}", flush=True)
    report = _judge(runs)
    if options.out:
        options.out.write_text(json.dumps(report | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if report["faults"] else 0)


def _make_model_and_pairs(folder: Path, num_examples: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 2048) for _ in range(draw.randint(least, most))]

    rows = (
        {"prompt_ids": ids(100, 300), "chosen_ids": ids(80, 240), "rejected_ids": ids(80, 240)}
        for _ in range(num_examples)
    )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.yaml").write_text("{}\n", encoding="utf-8")


def _run(folder: Path, name: str, repeat: int, options: argparse.Namespace) -> dict[str, Any]:
    cache, out = folder / f"cache-{repeat}", folder / f"{name}-{repeat}"
    source = ["reference.source=live"] if name == "live" else ["reference.source=cache", f"reference.cache_dir={cache}"]
    overrides = [
        f"model.model_name_or_path={folder / 'model'}",
        "model.dtype=float32",
        "model.gradient_checkpointing=false",
        f"data.train=[{{path: {folder / 'pairs.jsonl'}}}]",
        f"train.output_dir={out}",
        f"train.examples_per_step={-(-options.examples // 3)}",
        f"train.num_train_epochs={EPOCHS}",
        "packing.max_tokens=4096",
        "parallel.deepspeed=zero3_cpu",
        "log.report_to=[]",
        *source,
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    worker = ["-m", "benchmarks.reference_cache.worker", str(out) + ".json", str(folder / "run.yaml"), *overrides]
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
