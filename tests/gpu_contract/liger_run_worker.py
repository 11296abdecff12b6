"""Whole runs on Liger's interpreted kernels.

    python -m tests.gpu_contract.liger_run_worker OUT.json RUN.yaml ...

OUT gets for each run how often each kernel ran, and what the self-check said if it failed. That a device is no GPU is
overlooked; all else is checked as ever. In a run whose name begins with "faulty" Liger's norms are wrong by more than
rounding: whoever does not use them shows.
"""

import json
import sys
from pathlib import Path

from tests.gpu_contract.interpreted import activate_liger

activate_liger()

import torch  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402

import dpo_dist.model  # noqa: E402
from dpo_dist.cli.training import run_training  # noqa: E402
from dpo_dist.config import load_config  # noqa: E402
from dpo_dist.errors import NumericsError  # noqa: E402
from dpo_dist.model.liger import require_liger  # noqa: E402
from tests.gpu_contract.liger_worker import counted, planted  # noqa: E402


def overlook_device(device: torch.device, *configs: PretrainedConfig) -> None:
    """Ask for everything but the GPU."""
    assert device.type == "cpu"
    require_liger(torch.device("cuda"), *configs)


def main() -> None:
    """One after another."""
    out, *runs = sys.argv[1:]
    dpo_dist.model.require_liger = overlook_device
    results = {}
    for run in runs:
        fault = "weights of the norm" if Path(run).name.startswith("faulty") else None
        said = ""
        with planted(fault), counted() as calls:
            try:
                run_training(load_config(run), Path(run).parent / "cache")
            except NumericsError as error:
                said = str(error)
        results[Path(run).stem] = {**calls, **({"said": said} if said else {})}
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
