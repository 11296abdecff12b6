"""Is every attention kernel right at the heads that models have, and how fast is it? The part `kernels`.

`golden` trains models with heads of 8; kernels have other code for other heads.
"""

import json
from itertools import accumulate
from typing import Any

from benchmarks.gpu_kit.ceilings import share_of_products
from benchmarks.gpu_kit.kit import Failed, Kit
from benchmarks.gpu_kit.throughput import random_rows

LAUNCH_SECONDS = 90.0
MOST_EXAMPLES = 64


def kernels(kit: Kit) -> dict[str, Any]:
    """Distances from float64, the bits of a second run, speed; in a process of its own, on one device."""
    sizes = kit.sizes
    rows = [[len(ids) for ids in row.values()] for row in random_rows(sizes, MOST_EXAMPLES)]
    settings = {"heads": sizes.kernel_heads, "window": sizes.window, "timed": fitting(rows, sizes.max_tokens)}
    path, out = kit.work / "kernels-settings.json", kit.work / "kernels.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    kit.run(1, "kernels", "benchmarks.gpu_kit.kernels_run", str(path), str(out), limit=LAUNCH_SECONDS)
    runs = json.loads(out.read_text(encoding="utf-8"))
    for run in runs:
        if "tflops" in run:
            run["share_of_ceiling"] = share_of_products(kit, run["tflops"], num_ranks=1)
    values = {"dtype": "bfloat16", "runs": runs}
    wrong = [
        f"{run['kernel']} with heads of {run['head_dim']}{' and a window' if run['window'] else ''}: {run['reason']}"
        for run in runs
        if run["status"] == "failed"
    ]
    if wrong:
        raise Failed("; ".join(wrong), values)
    return values


def fitting(rows: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The first examples that fit into a micro-batch, by the tokens of their parts."""
    totals = accumulate(map(sum, rows))
    return [row for row, total in zip(rows, totals, strict=True) if total <= max_tokens]
