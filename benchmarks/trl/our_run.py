"""`dpo-dist train`, observed, with parts of it switched off: -m benchmarks.trl.our_run OUT.json SWITCHES CONFIG

The run is the command's own up to its last step; nothing is saved, for TRL's run saves nothing either. SWITCHES are
names out of `packing` and `head` with a comma between them, or `none`: the two that are no options of `dpo-dist`.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kit.observed import save_nothing
from benchmarks.trl.memory import peak_bytes
from dpo_dist import packing
from dpo_dist.batch import MicroBatch
from dpo_dist.cli import app, training
from dpo_dist.model import ScoringModel
from dpo_dist.trainer import Progress, Run


def pack_nothing() -> None:
    """Let every example be a micro-batch of its own, the largest first as in packed ones."""

    def one_by_one(self: packing.Packer, step: int, examples: Sequence[int], sizes: Sequence[Any]) -> packing.StepPlan:
        plan = stock(self, step, examples, sizes)
        assert len(plan.micro_batches) == 1, "one rank: others would need fillers"
        largest_first = sorted(range(len(sizes)), key=lambda item: -sizes[item].input_tokens(self.share_prompts))
        alone = tuple((item,) for item in largest_first)
        return replace(plan, micro_batches=(alone,), reference_bins=(alone,))

    stock = packing.Packer.plan
    packing.Packer.plan = one_by_one


def score_everything() -> None:
    """Let the head be applied to every token. What is not asked for is dropped behind it, and has no gradient."""
    stock = ScoringModel.forward

    def forward(self: Any, batch: MicroBatch, statistics: Sequence[str] = (), by_itself: bool = False) -> Any:
        if by_itself:
            return stock(self, batch, statistics, by_itself)
        found = stock(self, widened(batch), statistics)
        num_scored = len(batch.target_ids_M)
        if isinstance(found, tuple):
            return tuple(values[..., -num_scored:] for values in found)
        return found[-num_scored:]

    ScoringModel.forward = forward


def widened(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with every token that it does not score in front of those that it scores, as token 0."""
    is_scored_T = torch.zeros(len(batch.input_ids_T), dtype=torch.bool, device=batch.input_ids_T.device)
    is_scored_T[batch.score_index_M] = True
    rest: Tensor = (~is_scored_T).nonzero()[:, 0]
    return replace(
        batch,
        score_index_M=torch.cat([rest, batch.score_index_M]),
        target_ids_M=torch.cat([torch.zeros_like(rest), batch.target_ids_M]),
        completion_of_M=torch.cat([torch.zeros_like(rest), batch.completion_of_M]),  # not read
    )


SWITCHES = {"packing": pack_nothing, "head": score_everything}


def main() -> int:
    """Run the command; its exit code."""
    out, switches, config = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    stock_train = training.train

    def train(run: Run, progress: Progress) -> None:
        stock_train(run, progress)
        Path(out).write_text(json.dumps({"peak_bytes": peak_bytes()}), encoding="utf-8")

    training.train = train
    save_nothing()
    for switch in switches.split(",") if switches != "none" else ():
        SWITCHES[switch]()
    # The command returns its exit code where it is not left to typer to end the process.
    return app(args=["train", config], standalone_mode=False) or 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as dpo-dist's ranks end: DeepSpeed keeps threads alive that abort a process now and then
