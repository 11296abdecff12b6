"""Rows per second and peak memory of data that are tokenised, beside `datasets`.

python -m benchmarks.preparation [--rows 20000] [--tokenizer FOLDER_OR_HUB_ID] [--only NAME ...] [--out OUT.json]

Synthetic conversations of random words, the same at each call. Every case is a fresh process, one after another:

    num_proc=1, num_proc=2  `prepare_dataset`, from the file to a data set that is opened
    datasets                `Dataset.map(batched=True, num_proc=2)`: three times `apply_chat_template` (prompt, chosen
                            and rejected conversation) and the tokenizer, from the same file to a saved data set. It
                            checks nothing, and cuts no completion out of its conversation.

Seconds are those of the wall clock, imports left out, starts of further processes included. Memory is resident, sampled
every 50 ms: the most of the process itself, and of it and its children together (pages that they share count twice).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.demo import demo_model_folder
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset

CASES = ("num_proc=1", "num_proc=2", "datasets")
_WORDS = [f"{first}{second}" for first in ("ba", "co", "den", "ri", "tu") for second in ("la", "mer", "no", "st", "x")]


def write_rows(path: Path, count: int) -> None:
    """Questions of 10 to 60 words, answers of 20 to 120."""
    draw = random.Random(0)

    def message(role: str, fewest: int, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(_WORDS, k=draw.randint(fewest, most)))}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            answers = [[message("assistant", 20, 120)] for _ in range(2)]
            row = {"prompt": [message("user", 10, 60)], "chosen": answers[0], "rejected": answers[1]}
            file.write(json.dumps(row) + "\n")


def prepare(path: Path, tokenizer: str, work: Path, num_proc: int) -> float:
    """Seconds that `prepare_dataset` takes."""
    source = DataSource(path=str(path))
    begin = time.perf_counter()
    prepare_dataset([source], DataConfig(train=[source], num_proc=num_proc), TokenizerSpec(tokenizer), work)
    return time.perf_counter() - begin


def with_datasets(path: Path, tokenizer: str, work: Path) -> float:
    """Seconds that `datasets` takes for the same renderings and tokens."""
    disable_progress_bars()
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)

    def tokens(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts: dict[str, list[Any]] = {"prompt": rows["prompt"]}
        texts |= {
            key: [p + a for p, a in zip(rows["prompt"], rows[key], strict=True)] for key in ("chosen", "rejected")
        }
        found = {}
        for key, conversations in texts.items():
            rendered = loaded.apply_chat_template(conversations, tokenize=False, add_generation_prompt=key == "prompt")
            found[f"{key}_ids"] = loaded(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    begin = time.perf_counter()
    read = Dataset.from_json(str(path), cache_dir=str(work / "cache"))
    assert isinstance(read, Dataset)
    read.map(tokens, batched=True, num_proc=2, remove_columns=read.column_names).save_to_disk(work / "saved")
    return time.perf_counter() - begin


def run_case(name: str, path: Path, tokenizer: str) -> dict[str, Any]:
    """Run one case in this process, and watch its memory."""
    peak, done, me = {"own": 0, "all": 0}, threading.Event(), psutil.Process()

    def resident(process: psutil.Process) -> int:
        try:
            return process.memory_info().rss
        except psutil.Error:
            return 0

    def watch() -> None:
        while not done.wait(0.05):
            own, children = resident(me), sum(resident(child) for child in me.children(recursive=True))
            peak.update(own=max(peak["own"], own), all=max(peak["all"], own + children))

    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if name == "datasets":
            seconds = with_datasets(path, tokenizer, Path(folder))
        else:
            seconds = prepare(path, tokenizer, Path(folder), int(name.removeprefix("num_proc=")))
    done.set()
    return {"seconds": seconds, "own_mib": peak["own"] / 2**20, "all_mib": peak["all"] / 2**20}


def main() -> None:
    """Run all cases, or, as a child, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", help="with a chat template; the demo model's by default")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, path, tokenizer = arguments.child
        print(json.dumps(run_case(name, Path(path), tokenizer)))
        return
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = arguments.tokenizer or str(demo_model_folder(Path(folder)))
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows)
        for name in arguments.only:
            command = [sys.executable, "-m", "benchmarks.preparation", "--child", name, str(path), tokenizer]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            report[name] = {"rows": arguments.rows, "rows_per_second": arguments.rows / found["seconds"], **found}
            print(
                f"{name:<12}{report[name]['rows_per_second']:8,.0f} rows/s  {found['seconds']:7.1f} s   peak memory "
                f"{found['own_mib']:6,.0f} MiB, with children {found['all_mib']:6,.0f} MiB",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
