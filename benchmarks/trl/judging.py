"""What a report makes of its runs: whether they did the same work, and only then how fast each was.

A run is what `launches.py` gave: seconds, tokens and logged values of every step, and its peak of memory.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.trl.variants import Variant, witness_of

Run = dict[str, Any]
Runs = dict[str, list[Run]]  # of each variant, one for each repeat

LOSS_BOUND = 1e-4  # largest difference of a step's loss
# Largest relative distance of what else is logged: a first loss is log 2 whatever the model reads.
RELATIVE_BOUNDS = {"grad_norm": 1e-2, "logps/chosen": 1e-3, "logps/rejected": 1e-3}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ended(runs: list[Run]) -> list[Run]:
    """Those that did not fail."""
    return [run for run in runs if "failed" not in run]


def distances(runs: Runs) -> dict[str, dict[str, float]]:
    """Of each variant the largest distance from its witness, over steps and repeats; absolute for the loss.

    NaN where a run logged other steps.
    """
    found = {}
    for name, repeats in runs.items():
        witness = ended(runs.get(witness_of(Variant.named(name)), []))
        if not ended(repeats) or not witness:
            continue
        if any(len(run["logs"]) != len(witness[0]["logs"]) for run in ended(repeats)):
            found[name] = dict.fromkeys(("loss", *RELATIVE_BOUNDS), float("nan"))
            continue
        steps = [both for run in ended(repeats) for both in zip(witness[0]["logs"], run["logs"], strict=True)]
        found[name] = {"loss": _largest(abs(theirs["loss"] - ours["loss"]) for ours, theirs in steps)} | {
            key: _largest(abs(theirs[key] / ours[key] - 1) for ours, theirs in steps) for key in RELATIVE_BOUNDS
        }
    return found


def faults(runs: Runs) -> list[str]:
    """What is not the same work; with any of it no ratio may be told."""
    bounds = {"loss": LOSS_BOUND, **RELATIVE_BOUNDS}
    # Written so that a NaN is outside.
    wrong = [
        f"{name}: {key} is {distance[key]:.1e} from that of {witness_of(Variant.named(name))}, at most {bound:.0e}"
        for name, distance in distances(runs).items()
        for key, bound in bounds.items()
        if not distance[key] <= bound
    ]
    unseen = [
        f"{name}: {witness} did not end, so its losses are compared with nothing"
        for name, repeats in runs.items()
        if ended(repeats) and not ended(runs.get(witness := witness_of(Variant.named(name)), []))
    ]
    return wrong + unseen


def summary(runs: Runs, warm_up: int, pairs: int, flops: int, peak_gflops: float) -> dict[str, dict[str, Any]]:
    """Of each variant that ended: how fast it was, and what it held.

    Args:
        runs: of one setting of recomputation.
        warm_up: steps that are not timed.
        pairs: in the steps that are timed.
        flops: that those steps ask for (`operations.useful_flops`).
        peak_gflops: 10^9 operations per second of the fastest matrix product.
    """
    found = {}
    for name, repeats in runs.items():
        if not (kept := ended(repeats)):
            continue
        seconds = [sum(run["seconds"][warm_up:]) for run in kept]
        found[name] = {
            "repeats": len(kept),
            "pairs_per_second": spread(pairs / each for each in seconds),
            "tokens": sum(kept[0]["tokens"][warm_up:]),
            "peak_mib": spread(run["peak_bytes"] / 2**20 for run in kept),
            "gflops": spread(flops / each / 1e9 for each in seconds),
            "of_peak": flops / statistics.median(seconds) / 1e9 / peak_gflops,
        }
    return found


def ratios(runs: Runs, warm_up: int) -> dict[str, Any]:
    """Ours over TRL stock, over the fastest of TRL's variants, and over every one: pairs per second, repeat by repeat.

    `memory` is our peak as a share of stock's. What did not end has no ratio. `best` says of how many variants it is
    the fastest, and is left out where stock alone ended: that it is TRL's fastest would be no finding.
    """

    def seconds(run: Run) -> float:
        return sum(run["seconds"][warm_up:])

    over = {}
    for name in runs:
        if name != "ours" and (found := _paired(runs, name, lambda ours, other: seconds(other) / seconds(ours))):
            over[name] = spread(found)
    theirs = [name for name in over if Variant.named(name).side == "trl"]
    others = [name for name in theirs if name != "trl"]
    best = min(theirs, key=lambda name: statistics.median(map(seconds, ended(runs[name])))) if others else None
    memory = _paired(runs, "trl", lambda ours, other: ours["peak_bytes"] / other["peak_bytes"])
    return {
        "over": over,
        "stock": over.get("trl"),
        "best": None if best is None else {"name": best, "of": len(theirs), **over[best]},
        "memory": spread(memory) if memory else None,
    }


def _paired(runs: Runs, name: str, ratio: Callable[[Run, Run], float]) -> list[float]:
    """Of runs of the same repeat, which were next to each other in time."""
    both = zip(runs.get("ours", []), runs.get(name, []), strict=False)
    return [ratio(ours, other) for ours, other in both if "failed" not in ours and "failed" not in other]


def _largest(values: Iterable[float]) -> float:
    """NaN if any is: `max` would depend on the order."""
    values = list(values)
    return max(values) if all(value == value for value in values) else float("nan")
