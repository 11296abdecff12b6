"""Many runs in one process group, through the function the command line calls: `-m tests.invariance.worker FOLDER`.

Reads `FOLDER/request.json`, writes `FOLDER/<name>.rank<k>.json` for every run. pytest judges; here nothing is asserted
about a run, and a run that fails does not keep the next ones from running.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from jaxtyping import TypeCheckError, install_import_hook

from tests.launching import end_rank


def main(folder: Path) -> None:
    """Run everything that is asked for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Before the package is imported: every annotated call of these ranks is checked.
    install_import_hook("dpo_dist", "beartype.beartype")
    from dpo_dist.cli.logs import set_up_logging
    from dpo_dist.distributed import process_group

    _require_checked_calls()
    set_up_logging()
    request: dict[str, dict[str, Any]] = json.loads((folder / "request.json").read_text())
    with process_group() as ranks:
        for name, config in request.items():
            result = _observed_run(folder, name, config, is_first=ranks.is_first)
            (folder / f"{name}.rank{ranks.rank}.json").write_text(json.dumps(result))


def _require_checked_calls() -> None:
    import torch

    from dpo_dist.losses.formulas import hinge

    try:
        hinge(torch.zeros(3), torch.zeros(4), beta=0.1)
    except TypeCheckError:
        return
    raise RuntimeError("the package was imported before its calls were to be checked")


def _observed_run(folder: Path, name: str, config: dict[str, Any], *, is_first: bool) -> dict[str, Any]:
    from dpo_dist import evaluation
    from dpo_dist.cli import training
    from dpo_dist.config import load_config
    from dpo_dist.distributed import barrier
    from tests.invariance.observing import conclude, observe

    path = folder / f"{name}.yaml"
    if is_first:
        path.write_text(yaml.safe_dump(config))
    barrier()
    observations: list[dict[str, Any]] = []
    train = training.train

    def observed_train(run: Any, progress: Any) -> None:
        run, seen = observe(run)
        train(run, progress)
        conclude(run, progress, seen)
        observations.append(seen.to_json())

    # Three rows at once, so that a held-out set of seven takes three plans.
    with mock.patch.object(training, "train", observed_train), mock.patch.object(evaluation, "CHUNK_EXAMPLES", 3):
        try:
            training.run_training(load_config(path), folder / "cache")
        except Exception:
            return {"error": traceback.format_exc()}
    return observations[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank()
