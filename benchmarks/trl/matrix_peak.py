"""The fastest float32 matrix product of this machine: -m benchmarks.trl.matrix_peak MODEL_FOLDER THREADS OUT.json

Square products, and the model's own with a micro-batch of tokens. The largest of all is the peak: the shapes in which a
library is fast differ from machine to machine.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

TOKENS = 2048
SQUARES = (1024, 2048)
SECONDS = 1.0  # for each shape, at least


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """What is multiplied, by name: (m, k) times (k, n)."""
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    own = {"up": (TOKENS, hidden, wide), "down": (TOKENS, wide, hidden), "head": (TOKENS, hidden, vocabulary)}
    return {f"square {size}": (size, size, size) for size in SQUARES} | own


def gflops_of(m: int, k: int, n: int, seconds: float = SECONDS) -> float:
    """10^9 operations per second of the fastest of many products of this shape."""
    a, b, out = torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)
    torch.mm(a, b, out=out)  # the first one maps the pages
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * m * k * n / fastest / 1e9


def main() -> None:
    """Measure and write."""
    folder, threads, out = sys.argv[1:]
    torch.set_num_threads(int(threads))
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    found = {name: gflops_of(*shape) for name, shape in shapes_of(config).items()}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
