"""Statistics through DeepSpeed's engine on two ranks at every ZeRO stage: right, and without a trace in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.logprobs import STATISTICS
from tests.forking import fork_ranks
from tests.launching import succeeded
from tests.parity.oracle import naive_logits, naive_statistics
from tests.processes.live_engines import EXAMPLES, save_models
from tests.processes.scores_worker import CHUNK_TOKENS, HABITS, SETTINGS

BATCHES = {0: [(1, 2), (), (2, 2)], 1: [(), (0, 2), ()]}  # positions in EXAMPLES of one step's micro-batches, by rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    save_models(folder / "models")
    succeeded(fork_ranks(2, "tests.processes.scores_worker", str(folder), cwd=folder, timeout=400))
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, list[torch.Tensor]]:
    """Statistics before any update, by rank and micro-batch."""
    stock = AutoModelForCausalLM.from_pretrained(folder / "models" / "policy", dtype=torch.float32).eval()

    def of_batch(positions: tuple[int, ...]) -> torch.Tensor:
        pairs = [(EXAMPLES[i].prompt_ids, ids) for i in positions for ids in EXAMPLES[i].completion_ids]
        with torch.no_grad():
            found = [naive_statistics(naive_logits(stock, *pair), torch.tensor(pair[1])) for pair in pairs]
        return torch.cat([torch.zeros(len(STATISTICS), 0), *found], 1)

    return {rank: [of_batch(positions) for positions in batches] for rank, batches in BATCHES.items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_asking_changes_no_bit_of_training(seen: list[dict[str, Any]], setting: str) -> None:
    for rank in range(2):
        never = seen[rank][setting]["never"]
        for habit in HABITS:
            found = seen[rank][setting][habit]
            assert found["norms"] == never["norms"]
            assert all(torch.equal(*both) for both in zip(found["logps"], never["logps"], strict=True))
            assert found["weights"].keys() == never["weights"].keys()
            assert all(torch.equal(tensor, never["weights"][name]) for name, tensor in found["weights"].items())
            assert found["agree"]
    never = seen[0][setting]["never"]
    assert all(norm > 0 for norm in never["norms"]) and len(never["weights"]) > 10
    assert not torch.equal(never["logps"][0], never["logps"][3]), "updates must show"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_of_the_shape_asked_for_comes_with_fillers_too(
    seen: list[dict[str, Any]], setting: str, rank: int
) -> None:
    for habit, asked in HABITS.items():
        found = seen[rank][setting][habit]
        for logps, statistics, names in zip(found["logps"], found["statistics"], asked, strict=True):
            assert statistics.shape == (len(names), len(logps)) and statistics.dtype == torch.float32
            assert not statistics.requires_grad
    lengths = [len(logps) for logps in found["logps"]]
    assert 0 in lengths and max(lengths) > CHUNK_TOKENS


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rank", [0, 1])
def test_statistics_are_those_of_the_stock_model(
    seen: list[dict[str, Any]], expected: dict[int, list[torch.Tensor]], setting: str, rank: int
) -> None:
    found = seen[rank][setting]
    if "bfloat16" not in setting:
        for ours, theirs in zip(found["always"]["statistics"], expected[rank], strict=False):  # of the first step
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for index, names in enumerate(HABITS["in between"]):
        rows = [STATISTICS.index(name) for name in names]
        assert torch.equal(found["in between"]["statistics"][index], found["always"]["statistics"][index][rows])
