"""Three epochs with a live reference, with a cache that is filled on the way, and with a warm one.

python -m benchmarks.reference_cache [--repeats 3] [--ranks 1] [--examples 8] [--out OUT.json]

Trains a random Llama of 17 million parameters on random pairs in the three ways under ZeRO-3, in three launches that
take their steps in turn: a machine that is slower for a minute is slower for all three. Steps have so many tokens that
computing takes the time, as it does on GPUs; micro-batches are small enough that memory is used again, where a virtual
machine charges much for new pages. Compared are the seconds of the training loop without saving, and of the filling
pass without loading the model, which the live reference has to load as well; the spot check of the warm cache is
printed and not counted: its few rows are nothing beside a real data set. Activations are kept, not recomputed: a step
then costs 2 (policy) + 4 (backward) + 2 (reference) FLOPs per parameter and token, so a cache allows 8/6 = 1.33, and
with one filling pass in three epochs 24/20 = 1.2. Ratios are medians of the repeats. Exit code 1: the losses are not
equal, or a ratio is below what is asked for.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reference_cache.worker import ASKS, MAY

WARM_AT_LEAST, COLD_AT_LEAST = 1.25, 1.12
EPOCHS, STEPS_PER_EPOCH = 3, 2


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="more wait for each other, and vary more")
    parser.add_argument("--examples", type=int, default=8, help="pairs, half of them in each step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"live": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        _make_model_and_pairs(Path(folder), options.examples)
        for repeat in range(options.repeats):
            for name, run in _run_in_turn(Path(folder), tuple(runs), repeat, options).items():
                runs[name].append(run)
                print(f"{name} {repeat + 1}: {json.dumps(run['seconds'])}", flush=True)
    report = _judge(runs)
    if options.out:
        options.out.write_text(json.dumps(report | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if report["faults"] else 0)


def _make_model_and_pairs(folder: Path, num_examples: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
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


class Launch:
    """One of the runs, which asks before every step."""

    def __init__(self, folder: Path, name: str, repeat: int, options: argparse.Namespace) -> None:
        self.name, self.out = name, folder / f"{name}-{repeat}"
        for ending in (ASKS, MAY):
            os.mkfifo(f"{self.out}{ending}")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        arguments = [
            f"{self.out}.json",
            str(self.out),
            str(folder / "run.yaml"),
            *self._overrides(folder, repeat, options),
        ]
        worker = ["-m", "benchmarks.reference_cache.worker", *arguments]
        self._stack = ExitStack()
        self._log = self._opened(".log", "w")
        self._process = subprocess.Popen([*launcher, *worker], stdout=self._log, stderr=self._log)
        self._asks, self._may = self._opened(ASKS, "r"), self._opened(MAY, "w")

    def _opened(self, ending: str, mode: str) -> TextIO:
        return self._stack.enter_context(Path(f"{self.out}{ending}").open(mode, encoding="utf-8"))  # pyright: ignore

    def _overrides(self, folder: Path, repeat: int, options: argparse.Namespace) -> list[str]:
        cache = ["reference.source=cache", f"reference.cache_dir={folder / f'cache-{repeat}'}"]
        return [
            f"model.model_name_or_path={folder / 'model'}",
            "model.dtype=float32",
            "model.gradient_checkpointing=false",
            f"data.train=[{{path: {folder / 'pairs.jsonl'}}}]",
            f"train.output_dir={self.out}",
            f"train.examples_per_step={-(-options.examples // STEPS_PER_EPOCH)}",
            f"train.num_train_epochs={EPOCHS}",
            "packing.max_tokens=1024",
            "parallel.deepspeed=zero3_cpu",
            "log.report_to=[]",
            *(["reference.source=live"] if self.name == "live" else cache),
        ]

    def wait(self) -> bool:
        """Whether there is another step; returns once it is asked for."""
        return bool(self._asks.readline())

    def step(self) -> None:
        """Allow a step."""
        print("go", file=self._may, flush=True)

    def result(self) -> dict[str, Any]:
        """Seconds and losses."""
        if self._process.wait():
            sys.exit(f"{self.name} failed:\n{Path(self._log.name).read_text(encoding='utf-8')[-3000:]}")
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [line["loss"] for line in lines if "split" not in line]
        return {"seconds": json.loads(Path(f"{self.out}.json").read_text(encoding="utf-8")), "losses": losses}

    def close(self) -> None:
        """End what still runs, when another run has failed."""
        self._process.kill()
        self._process.wait()
        self._stack.close()


def _run_in_turn(folder: Path, names: tuple[str, ...], repeat: int, options: argparse.Namespace) -> dict[str, Any]:
    launches: list[Launch] = []
    with ExitStack() as stack:
        for name in names:  # one after another up to its first step: `warm` finds what `cold` has just stored
            launches.append(Launch(folder, name, repeat, options))
            stack.callback(launches[-1].close)
            if not launches[-1].wait():
                launches[-1].result()
        going = list(launches)
        while going:
            for one in tuple(going):
                one.step()
                if not one.wait():
                    going.remove(one)
        return {one.name: one.result() for one in launches}


def _judge(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    faults = []
    first = runs["live"][0]["losses"]
    for name, repeats in runs.items():
        for run in repeats:
            furthest = max(abs(mine - other) for mine, other in zip(run["losses"], first, strict=True))
            if furthest > 1e-4:
                faults.append(f"{name}: a loss differs by {furthest:.1e}")
    live = statistics.median(_seconds(runs["live"]))
    warm = _ratio(runs["live"], _seconds(runs["warm"]))
    cold = _ratio(runs["live"], _seconds(runs["cold"], "train", "fill"))
    print(f"{EPOCHS} epochs, {len(first)} steps; live {live:.1f} s")
    for name, ratio, least in (("warm cache", warm, WARM_AT_LEAST), ("with the filling pass", cold, COLD_AT_LEAST)):
        print(f"{name}: {ratio:.3f} times faster (at least {least})")
        if ratio < least:
            faults.append(f"{name}: {ratio:.3f} times faster, at least {least} is asked for")
    for fault in faults:
        print(f"fault: {fault}")
    return {"live_seconds": live, "warm_ratio": warm, "cold_ratio": cold, "faults": faults}


def _seconds(runs: list[dict[str, Any]], *parts: str) -> list[float]:
    return [sum(run["seconds"][part] for part in parts or ("train",)) for run in runs]


def _ratio(live: list[dict[str, Any]], seconds: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(_seconds(live), seconds, strict=True))


if __name__ == "__main__":
    main()
