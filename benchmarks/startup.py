"""Processor seconds that a process needs before it works, beside those of `import torch` alone.

python -m benchmarks.startup [--repeats 5] [--out OUT.json]

Fresh processes with one thread each, taken in turn, so that a machine that is slower for a moment is slower for all.
Seconds are user and system time of the whole process, the interpreter's start included; the medians are compared.

    import torch          nothing else
    data                  what `dpo-dist check` imports until it has found a mistake in the data
    all weights           what a rank imports that trains all weights
    adapter               the same with PEFT

Exit code 1: `all weights` is more than 3.3 times `import torch`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from dpo_dist.demo import demo_model_folder

LIMIT = 3.3
_DATA = """
import dpo_dist.cli as cli
cli.quiet_imports()
with cli.importing():
    from dpo_dist.cli import logs, prepare
from dpo_dist.pretrained import load_config
from dpo_dist.tokenization import TokenizerSpec, load_tokenizer
load_config(FOLDER, False)
load_tokenizer(TokenizerSpec(FOLDER))
"""
_TRAINING = """
with cli.importing():
    from dpo_dist.cli import training
"""
_ADAPTER = """
with cli.importing():
    import dpo_dist.adapters
"""
CASES = {
    "import torch": "import torch",
    "data": _DATA,
    "all weights": _DATA + _TRAINING,
    "adapter": _DATA + _TRAINING + _ADAPTER,
}
_REPORT = "\nimport os, sys\nt = os.times()\nprint(t.user + t.system, file=sys.__stdout__)"


def seconds(code: str, folder: Path) -> float:
    """Processor time of a new process that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("FOLDER", repr(str(folder))) + _REPORT],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/dpo_dist"), help="where the demo model is")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = demo_model_folder(options.cache.expanduser())
    measured: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(options.repeats + 1):  # the first time files are read from disk, and bytecode is written
        for name, code in CASES.items():
            measured[name].append(seconds(code, folder))
    medians = {name: statistics.median(values[1:]) for name, values in measured.items()}
    for name, values in measured.items():
        ratio = medians[name] / medians["import torch"]
        print(f"{name:14s} {medians[name]:6.2f} s  {ratio:5.2f}   {min(values[1:]):.2f} to {max(values[1:]):.2f} s")
    if options.out:
        options.out.write_text(json.dumps({"medians": medians, "all": measured}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if medians["all weights"] > LIMIT * medians["import torch"] else 0)


if __name__ == "__main__":
    main()
