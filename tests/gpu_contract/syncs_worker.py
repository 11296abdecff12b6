"""Which operations of a real run would make a GPU wait.

    python -m tests.gpu_contract.syncs_worker HONEST.yaml FAULTY.yaml OUT.json

Runs on CPU, ZeRO-3, with every operation seen that needs a value on the host (item, nonzero, boolean masks, copies to
the CPU). OUT gets, for each run and step, how often each line caused one; the line is the innermost one outside of
torch. The second run has mistakes in its loop that this must show.
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_dist import metrics, trainer
from dpo_dist.ahead import Ahead
from dpo_dist.cli import training
from dpo_dist.config import load_config
from tests.launching import REPOSITORY

aten = torch.ops.aten
NEEDS_VALUE = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Syncs(TorchDispatchMode):
    """Notes what needs a value on the host, by step and line."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: list[Counter[str]] = []

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        settings = settings or {}
        if self.by_step and _needs_value(operator, arguments, settings):
            self.by_step[-1][f"{_place()} {operator._opname}"] += 1
        return operator(*arguments, **settings)


def _needs_value(operator: Any, arguments: Any, settings: dict[str, Any]) -> bool:
    if operator in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    to_host = operator is aten._to_copy.default and str(settings.get("device")) == "cpu"
    return operator in NEEDS_VALUE or to_host


def _place() -> str:
    """File and function of the innermost frame that is neither torch's nor ours here."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and "gpu_contract" not in frame.filename:
            name = frame.filename.rsplit("site-packages/", 1)[-1].removeprefix(f"{REPOSITORY}/")
            return f"{name}:{frame.name}"
    return "?"


def careless_sums(batch: Any, logps: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What a step adds up, with three mistakes: a value read, a boolean mask, a copy to the host."""
    if logps.sum().item() > 0 or len(logps[logps > 0]) > 0 or logps.to("cpu", torch.float64, copy=True).isnan().any():
        raise AssertionError("log-probabilities are negative numbers")
    return metrics.step_sums(batch, logps, *rest)


def observed(config: str) -> list[Counter[str]]:
    """Train, and tell what was seen in each step."""
    syncs = Syncs()

    class Noting(Ahead[Any]):
        def of(self, step: int) -> Any:
            syncs.by_step.append(Counter())
            return super().of(step)

    def train(*arguments: Any) -> None:
        with syncs:
            trainer.train(*arguments)

    trainer.Ahead = Noting  # type: ignore[misc, assignment]
    training.train = train
    training.run_training(load_config(config), Path(config).parent / "cache")
    return syncs.by_step


def main() -> None:
    """Both runs."""
    honest, faulty, out = sys.argv[1:]
    results = {"honest": observed(honest)}
    trainer.step_sums = careless_sums
    results["faulty"] = observed(faulty)
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
