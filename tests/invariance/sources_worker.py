"""Runs of `sources.py` in one process group: `-m tests.invariance.sources_worker FOLDER [everything]`.

Writes `FOLDER/<name>.rank<k>.json` for every run: an error, or what its reference was; pytest judges.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from jaxtyping import install_import_hook

from tests.launching import end_rank


def main(folder: Path, everything: bool) -> None:
    """Run them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    install_import_hook("dpo_dist", "beartype.beartype")
    from dpo_dist.cli.logs import set_up_logging
    from dpo_dist.distributed import process_group
    from tests.invariance.sources import OWN_CACHES, configs

    set_up_logging()
    with process_group() as ranks:
        for name, config in configs(folder, everything).items():
            own = name == OWN_CACHES and not ranks.is_first
            cache = folder / (f"cache-of-rank{ranks.rank}" if own else "cache")
            seen = _run(folder, name, config, cache, is_first=ranks.is_first)
            (folder / f"{name}.rank{ranks.rank}.json").write_text(json.dumps(seen))


def _run(folder: Path, name: str, config: dict[str, Any], cache: Path, *, is_first: bool) -> dict[str, Any]:
    from dpo_dist.cli import training
    from dpo_dist.config import load_config
    from dpo_dist.distributed import barrier

    path = folder / f"{name}.yaml"
    if is_first:
        path.write_text(yaml.safe_dump(config))
    barrier()
    seen: dict[str, Any] = {}
    train = training.train

    def observed_train(run: Any, progress: Any) -> None:
        seen["reference"] = type(run.reference).__name__
        seen["asked_without_gradient"] = _count_forwards_without_gradient(run)
        train(run, progress)
        seen["asked_without_gradient"] = len(seen["asked_without_gradient"])

    with mock.patch.object(training, "train", observed_train):
        try:
            training.run_training(load_config(path), cache)
        except Exception:
            return {"error": traceback.format_exc()}
    return seen


def _count_forwards_without_gradient(run: Any) -> list[int]:
    """Grows by one for every forward of the policy's engine that no backward can follow."""
    import torch

    found: list[int] = []
    run.policy.model.register_forward_pre_hook(lambda *_: None if torch.is_grad_enabled() else found.append(1))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["everything"])
    end_rank()
