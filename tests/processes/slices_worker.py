"""Ranks that load models slice by slice, one after another: `-m tests.processes.slices_worker FOLDER CASE ...`

A case is MODELS:DTYPE:WORLD_SIZE:RANK; every model below `FOLDER/MODELS` is loaded as that rank. The process group is
torch's fake one: nothing comes from other ranks, and nothing has to, for a rank reads its own slices.
`FOLDER/results.json` gets what differs from a plain `from_pretrained`, by case and model.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from dpo_dist.engine import adopt_process_group
from dpo_dist.model.slices import can_read_slices, read_slices
from dpo_dist.pretrained import load_config

STAGE_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
DTYPES = {"float32": {}, "bfloat16": {"bf16": {"enabled": True}}}


def differences(folder: Path, dtype_name: str, rank: int) -> dict[str, Any]:
    """What is not as in the plain model: parameters' slices, buffers, what is tied, the generation configuration."""
    dtype = getattr(torch, dtype_name)
    config = load_config(folder, trust_remote_code=False)
    settings = STAGE_3 | DTYPES[dtype_name]
    if not can_read_slices(folder, config, settings, trust_remote_code=False):
        return {"sliced": False}
    with CommDebugMode() as sent:
        ours = read_slices(folder, config, "eager", dtype, settings, trust_remote_code=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    parameters = dict(plain.named_parameters())
    found = [name for name, parameter in ours.named_parameters() if _differs(parameter, parameters.pop(name), rank)]
    buffers = dict(ours.named_buffers())
    for name, buffer in plain.named_buffers():
        if buffer.dtype != buffers[name].dtype or not torch.equal(buffer, buffers[name]):
            found.append(name)
    return {
        "sliced": True,
        # The ranks tell each other whether all went well, and send no weights.
        "sent": {str(operator): count for operator, count in sent.get_comm_counts().items()},
        "differing": found + sorted(parameters),
        "generation": ours.generation_config.to_diff_dict() == plain.generation_config.to_diff_dict(),
        "tied": ours.get_output_embeddings().weight is ours.get_input_embeddings().weight,
    }


def _differs(ours: Any, whole: Tensor, rank: int) -> bool:
    own: Tensor = ours.ds_tensor
    begin = rank * own.numel()
    expected = whole.detach().flatten()[begin : begin + own.numel()]
    # What is beyond the last element is never used.
    return own.dtype != whole.dtype or not torch.equal(own[: len(expected)], expected)


def _run(folder: Path, case: str, out: Path) -> None:
    models, dtype_name, world_size, rank = case.split(":")
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK="0")
    dist.init_process_group("fake", rank=int(rank), world_size=int(world_size), store=FakeStore())
    adopt_process_group()
    paths = sorted((folder / models).iterdir())
    found = {path.name: differences(path, dtype_name, int(rank)) for path in paths}
    out.write_text(json.dumps(found))


def main() -> None:
    """Every case in a process that is forked when everything has been imported."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29679")  # nothing listens there: a fake group has no peers
    results, part = {}, folder / "part.json"
    for case in cases:
        if not (child := os.fork()):
            try:
                _run(folder, case, part)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{case} failed")
        results[case] = json.loads(part.read_text())
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
