"""Stored values are handed out in the order of the step's examples, which is not that of the data set."""

from pathlib import Path

import pytest
import torch

from dpo_dist.batch import RankWork
from dpo_dist.packing import Packer, sizes_of
from dpo_dist.reference.cached import CachedReference
from tests.stored_rows import examples_of, save_dataset

ROWS = (4, 0, 3, 1)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_completion_gets_its_own_value(tmp_path: Path, num_ranks: int) -> None:
    first, dataset = (save_dataset(tmp_path / str(seed), examples_of(5, seed)) for seed in (0, 1))
    bases = (0, len(first.completion_lengths.flat))
    values = -torch.arange(1.0, 1.0 + bases[1] + len(dataset.completion_lengths.flat))
    reference = CachedReference((first, dataset), bases, values, torch.device("cpu"))
    plan = Packer(num_ranks, 64, 64, True).plan(0, ROWS, sizes_of(dataset, ROWS))
    seen = []
    for rank in range(num_ranks):
        expected = [
            values[bases[1] + place].item()
            for position in plan.examples_of_rank(rank)
            for place in range(*dataset.completion_lengths.starts[ROWS[position] : ROWS[position] + 2].tolist())
        ]
        assert reference.completion_logps(RankWork(plan, rank, dataset, True)).tolist() == expected
        seen += expected
    assert len(seen) == sum(len(dataset[row].completion_ids) for row in ROWS) == len(set(seen))
    assert num_ranks == 2 or seen != sorted(seen, reverse=True)  # else any order would do
