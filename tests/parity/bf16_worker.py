"""bfloat16 runs of many DeepSpeed files in one process group: `torchrun -m tests.parity.bf16_worker CONFIG...`."""

import sys
from pathlib import Path

from tests.launching import end_rank

if __name__ == "__main__":
    from dpo_dist.cli.training import run_training
    from dpo_dist.config import load_config
    from dpo_dist.distributed import process_group

    with process_group():
        for path in sys.argv[1:]:
            run_training(load_config(path), Path(path).parent / "cache")
    end_rank()
