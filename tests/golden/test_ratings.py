"""Losses of completions that are only called good or bad: as in TRL's `KTOTrainer`, and beside it in plain torch."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.forking import fork_ranks
from tests.golden.ratings import CASES, PER_STEP, RECORDED, STEPS, rated_rows
from tests.golden.trajectories import REWARD_ABSOLUTE, base_config, compare_parameters, lines_of
from tests.invariance.stories import write_request
from tests.launching import succeeded

RELATIVE = 1e-4
CLOSE = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


def rated_config(folder: Path, name: str, stage: int = 0, max_tokens: int = 4096, **loss: Any) -> dict[str, Any]:
    config = base_config(folder / name)
    config["data"]["train"] = [{"path": str(folder / "rows.jsonl")}]
    config["loss"] = loss
    config["train"] |= {"examples_per_step": PER_STEP, "max_steps": STEPS, "learning_rate": 1e-3}
    config["packing"]["max_tokens"] = max_tokens
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    config["log"]["logging_steps"] = 1
    return config


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids="ranks{0[0]}-stage{0[1]}".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, run in one process group; two ranks get several micro-batches each."""
    num_ranks, stage = request.param
    folder = tmp_path_factory.mktemp("ratings")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated_rows()))
    max_tokens = 4096 if num_ranks == 1 else 130
    configs = {name: rated_config(folder, name, stage, max_tokens, **loss) for name, loss in CASES.items()}
    write_request(folder / "request.json", configs)
    succeeded(fork_ranks(num_ranks, "tests.invariance.worker", str(folder), cwd=folder, timeout=240))
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_the_run_equals_trls(finished: Path, name: str) -> None:
    seen = json.loads((finished / f"{name}.rank0.json").read_text())
    assert "error" not in seen, seen["error"]
    recorded = json.loads(RECORDED.read_text())["cases"][name]
    lines, beta = lines_of(finished / name), CASES[name]["beta"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected in zip(lines, recorded["logs"], strict=True):
        for key in CLOSE:
            assert math.isclose(line[key], expected[key], rel_tol=RELATIVE), (line["step"], key)
        for key in REWARDS:
            assert math.isclose(line[key], expected[key], rel_tol=RELATIVE, abs_tol=REWARD_ABSOLUTE), key
        baseline = beta * expected["kl"]
        assert math.isclose(line["rewards/baseline"], baseline, rel_tol=RELATIVE, abs_tol=REWARD_ABSOLUTE)
    assert compare_parameters(finished / name / "model", recorded["final_param_norms"]) == []
