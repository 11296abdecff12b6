"""States of a run and of its random generators, for tests of checkpoints."""

import random
from pathlib import Path

import numpy as np
import torch

from dpo_dist.checkpoint import RunState


def run_state(step: int = 2, world_size: int = 1, **changes) -> RunState:
    """A state with one value of every kind."""
    values = {
        "step": step,
        "examples_seen": 8 * step,
        "seed": 42,
        "num_tokens": 1000 * step,
        "pairs_seen": 9 * step,
        "metrics_window": {"num_steps": 1, "sums": {"loss": 0.1 + 0.2, "num_pairs": 2.0}},
        "health": {"best_step": 0},
        "reference_identity": "reference-1",
        "data_fingerprint": "data-1",
        "world_size": world_size,
        "config": {"train": {"learning_rate": 5e-7, "shuffle": True}, "model": {"revision": None}},
    }
    return RunState(**(values | changes))


def empty_shards(folder: Path) -> None:
    """What a checkpoint of stage 0 holds of a model without parameters."""
    (folder / "shards").mkdir()
    state = {"module": {}, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(state, folder / "shards/mp_rank_00_model_states.pt")


def draw() -> list[float]:
    """One number of every random generator."""

    numpy_numbers = [float(np.random.rand()), float(np.random.randn())]
    return [random.random(), random.gauss(0, 1), *numpy_numbers, torch.rand(1).item()]
