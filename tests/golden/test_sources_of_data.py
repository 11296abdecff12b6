"""Runs on several data sets tell how each of them fares, whatever the number of ranks and the packing."""

import json
import math

import pytest

from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, base_config, lines_of
from tests.invariance.stories import write_request
from tests.launching import succeeded

STEPS = 3
SIZES = {"a": 7, "b": 12, "c": 5}
OF_EACH = ("rewards/margins", "rewards/accuracies")


@pytest.fixture(scope="module", params=[(1, 0, 4096), (2, 3, 130)], ids="ranks{0[0]}".format)
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    num_ranks, stage, max_tokens = request.param
    folder = tmp_path_factory.mktemp("sources")
    rows = iter((FOLDER / "pairs.jsonl").read_text().splitlines(keepends=True))
    sources = []
    for name, count in SIZES.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(next(rows) for _ in range(count)))
        sources.append({"path": str(path)})
    config = base_config(folder / "run")
    config["data"]["train"] = sources
    config["train"] |= {"examples_per_step": 8, "max_steps": STEPS, "learning_rate": 1e-3, "shuffle": True}
    config["packing"]["max_tokens"] = max_tokens
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    config["log"]["logging_steps"] = STEPS  # one epoch
    write_request(folder / "request.json", {"run": config})
    succeeded(fork_ranks(num_ranks, "tests.invariance.worker", str(folder), cwd=folder, timeout=240))
    seen = json.loads((folder / "run.rank0.json").read_text())
    assert "error" not in seen, seen["error"]
    return lines_of(folder / "run")


def test_each_is_counted_once_and_all_of_them_are_the_whole(lines: list[dict[str, float]]) -> None:
    (line,) = lines
    assert {name: line[f"{name}/num_pairs"] for name in SIZES} == SIZES
    for key in OF_EACH:
        total = sum(line[f"{name}/{key}"] * count for name, count in SIZES.items()) / sum(SIZES.values())
        assert math.isclose(total, line[key], rel_tol=1e-9)
    assert len({line[f"{name}/rewards/margins"] for name in SIZES}) == 3
