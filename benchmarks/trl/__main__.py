"""Ours against TRL's DPOTrainer on a CPU: the same model, the same pairs, the same mathematics.

python -m benchmarks.trl --trl-python ENV/bin/python --data FILE [--repeats 3] [--steps 6] [--out DIR]

Runs every variant in a fresh process, one after another, `--repeats` times: A B C, A B C, ... First the losses of all
steps must be those of ours; only then are speed and memory compared. FILE is in any form that dpo-dist reads; of ranked
rows all pairs are compared, which TRL gets as rows of their own. `synthetic:chat` and others need no file. Writes
DIR/<date>-<name>.md with charts and all numbers as .json. Exit code 1: not the same work, or ours did not end; 2: a
mistake in the call.
"""

import argparse
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.trl import judging
from benchmarks.trl.inputs import (
    DISTRIBUTIONS,
    SYNTHETIC,
    Example,
    describe,
    padding,
    random_examples,
    read_examples,
    sort_by_length,
    write_rows,
)
from benchmarks.trl.launches import ROOT, Launcher
from benchmarks.trl.operations import Shape, useful_flops
from benchmarks.trl.page import charts, headlines, page
from benchmarks.trl.variants import DEFAULT, Task, Variant, with_witnesses
from dpo_dist.cli import cache_dir
from dpo_dist.demo import demo_model_folder

PACKAGES = ("torch", "transformers", "deepspeed")
MODES = {"on": True, "off": False, "default": None}


def parser() -> argparse.ArgumentParser:
    """The options."""
    own = argparse.ArgumentParser("python -m benchmarks.trl", description=__doc__)
    own.formatter_class = argparse.RawDescriptionHelpFormatter
    own.add_argument("--data", required=True, help=f"a file, or {SYNTHETIC} and {', '.join(DISTRIBUTIONS)} or 80,200")
    own.add_argument("--name", help="of the data, on the page; default: the file's")
    own.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    own.add_argument("--variants", nargs="+", default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}")
    own.add_argument("--recomputation", nargs="+", choices=MODES, default=["default"], help="of activations")
    own.add_argument("--repeats", type=int, default=3)
    own.add_argument("--steps", type=int, default=6, help="warm-up included")
    own.add_argument("--seed", type=int, default=0, help="of the draw of examples from the data")
    own.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    own.add_argument("--pairs", type=int, default=8, help="in a step; of ranked rows as many as whole rows give")
    own.add_argument("--max-length", type=int, default=1024, help="longer rows are left out, tokens")
    own.add_argument("--max-tokens", type=int, default=2048, help="ours: in a micro-batch, if the longest example fits")
    own.add_argument("--deepspeed", default="zero0_cpu", help="ours: DeepSpeed's file")
    own.add_argument("--model", help="a folder; default: the demo model, SmolLM2-135M")
    own.add_argument("--threads", type=int, default=2)
    own.add_argument("--limit", type=float, default=1800, help="seconds, for each process")
    own.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return own


def main() -> int:
    """Run, judge, write; the exit code."""
    own = parser()
    options = own.parse_args()
    model = options.model or str(demo_model_folder(cache_dir()))
    try:
        variants = with_witnesses(options.variants)
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        shape = Shape.of(config)
        if not 0 <= options.warm_up < options.steps or options.repeats < 1:
            raise ValueError("of --steps at least one must be left after --warm-up, and --repeats be at least 1")
        examples, per_step, padding_of_all = _examples(options, model, config["vocab_size"])
    except ValueError as error:
        own.error(str(error))
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        task = _task(options, model, Path(folder), examples, per_step, padding_of_all)
        report: dict[str, Any] = {}
        for runs, products in _measured(options, task, variants):
            # After every repeat: an hour's work is not lost where the last one is interrupted.
            report = _report(options, task, shape, examples, runs, products)
            write(report, options.out)
    print(f"written: {options.out / report['name']}.md")
    for one in report["parts"]:
        for line in [f"fault: {fault}" for fault in one["faults"]] or headlines(report, one):
            print(line)
    return status(report)


def status(report: dict[str, Any]) -> int:
    """The exit code: 1 if something was not the same work, or ours did not end."""
    return int(any(one["faults"] or "ours" not in one["summary"] for one in report["parts"]))


def _examples(options: argparse.Namespace, model: str, vocabulary: int) -> tuple[list[Example], int, float]:
    """As many examples as all steps need, drawn at random; how many of them are a step; and `padding` of all data."""
    if options.data.startswith(SYNTHETIC):
        number = options.steps * options.pairs
        found = random_examples(options.data.removeprefix(SYNTHETIC), number, vocabulary, options.max_length)
    else:
        found = read_examples(str(Path(options.data).resolve()), Path(model), cache_dir(), options.max_length)
    per_step = max(1, round(options.pairs / len(found[0].pairs)))
    if len(found) < options.steps * per_step:
        raise ValueError(f"{options.data} has {len(found)} examples, {options.steps * per_step} are needed")
    random.Random(options.seed).shuffle(found)
    return found[: options.steps * per_step], per_step, padding(found, per_step)


def _task(
    options: argparse.Namespace, model: str, folder: Path, examples: list[Example], per_step: int, padding_of_all: float
) -> Task:
    """The files of both orders, and what all variants do alike."""
    write_rows(folder, "file", examples)
    write_rows(folder, "sorted", sort_by_length(examples, options.warm_up * per_step))
    longest = max(one.lengths.inputs for one in examples)
    unshared = max(one.lengths.inputs + len(one.prompt) * (len(one.completions) - 1) for one in examples)
    return Task(
        model=model,
        folder=folder,
        steps=options.steps,
        examples_per_step=per_step,
        pairs_per_step=per_step * len(examples[0].pairs),
        threads=options.threads,
        max_tokens=options.max_tokens,
        longest=(longest, unshared),
        deepspeed=options.deepspeed,
        padding_of_data=padding_of_all,
    )


def _measured(
    options: argparse.Namespace, task: Task, variants: list[Variant]
) -> Iterator[tuple[dict[str, judging.Runs], list[dict[str, float]]]]:
    """All launches in turn; after each repeat all runs so far, and the speed of matrix products between them."""
    launcher = Launcher(task, _interpreter(options.trl_python), options.limit)
    runs: dict[str, judging.Runs] = {mode: {one.name: [] for one in variants} for mode in options.recomputation}
    products = [launcher.peak("peak-0")]
    for repeat in range(options.repeats):
        for mode in options.recomputation:
            for variant in variants:
                run = launcher.measure(variant, MODES[mode], f"{variant.name}-{mode}-{repeat}")
                runs[mode][variant.name].append(run)
                said = run.get("failed") or " ".join(f"{one:.2f}" for one in run["seconds"]) + " s"
                print(f"{repeat + 1}/{options.repeats} recomputation {mode}, {variant.name}: {said}", flush=True)
        products.append(launcher.peak(f"peak-{repeat + 1}"))
        yield runs, products


def part(
    recompute: bool | None, runs: judging.Runs, warm_up: int, pairs: int, flops: int, peak_gflops: float
) -> dict[str, Any]:
    """What the runs of one setting of recomputation come to; arguments as of `judging.summary`."""
    failures = {name: [run["failed"] for run in repeats if "failed" in run] for name, repeats in runs.items()}
    return {
        "recompute": recompute,
        "distances": judging.distances(runs),
        "faults": judging.faults(runs),
        "failed": {name: reasons for name, reasons in failures.items() if reasons},
        "summary": judging.summary(runs, warm_up, pairs, flops, peak_gflops),
        "ratios": judging.ratios(runs, warm_up),
        "runs": runs,
    }


def _report(
    options: argparse.Namespace,
    task: Task,
    shape: Shape,
    examples: list[Example],
    runs: dict[str, judging.Runs],
    products: list[dict[str, float]],
) -> dict[str, Any]:
    timed = examples[options.warm_up * task.examples_per_step :]
    peaks, flops = [max(one.values()) for one in products], useful_flops(shape, [one.lengths for one in timed])
    pairs = sum(len(one.pairs) for one in timed)
    name = options.name or Path(options.data).name.split(".")[0].replace(":", "-").replace(",", "-")
    now = datetime.now(UTC)
    parts = [part(MODES[mode], one, options.warm_up, pairs, flops, max(peaks)) for mode, one in runs.items()]
    return {
        "title": f"Ours and TRL's DPOTrainer on a CPU: {name}",
        "name": f"{now:%Y-%m-%d}-{name}",
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "command": "python -m benchmarks.trl " + shlex.join(sys.argv[1:]),
        "machine": _machine(parts),
        "settings": {
            **{key: getattr(options, key) for key in ("repeats", "steps", "warm_up", "threads", "deepspeed")},
            "max_tokens": task.max_tokens_of(Variant.named("ours")),
            "pairs_per_step": task.pairs_per_step,
            "model": Path(task.model).name,
        },
        "data": {
            "name": name,
            **describe(timed),
            "padding": padding(timed, task.examples_per_step),
            "padding_of_all": task.padding_of_data,
        },
        "flops": flops,
        "peaks": peaks,
        "products": products,
        "parts": parts,
    }


def _interpreter(path: str) -> str:
    """The path as the processes find it, which run elsewhere; links of a virtual environment stay as they are."""
    return str(Path(path).absolute()) if os.sep in path else path


def _machine(parts: list[dict[str, Any]]) -> dict[str, Any]:
    versions = {name: version(name) for name in PACKAGES}
    theirs = [run["version"] for one in parts for all_ in one["runs"].values() for run in all_ if "version" in run]
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {**versions, **({"trl": theirs[0]} if theirs else {})},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "checkout_is_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(report: dict[str, Any], out: Path) -> None:
    """The page, its charts, and all numbers."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{report['name']}.md").write_text(page(report), encoding="utf-8")
    (out / f"{report['name']}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, text in charts(report).items():
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # with the process that runs, and the files
    sys.exit(main())
