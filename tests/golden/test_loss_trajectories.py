"""Every loss and every f-divergence trains as it does in TRL: each step, and every parameter at the end."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_dist.config import LOSS_TYPES, LossConfig
from dpo_dist.config.loss import OF_RATINGS
from dpo_dist.losses import PairValues, bind
from tests.forking import fork_ranks
from tests.golden import plain
from tests.golden.trajectories import LOSS_CASES, SLACK, case_config, compare_run, compare_trajectory, load_case
from tests.invariance.stories import write_request
from tests.launching import succeeded

# TRL's DPOTrainer has none of these; test_ratings.py has those of its KTOTrainer.
BEYOND_TRL = {"dpop", "simpo", "cpo", "orpo", "plackett_luce", *OF_RATINGS}


def test_every_loss_is_compared() -> None:
    compared = {name for case in LOSS_CASES if isinstance(name := load_case(case).loss["loss_type"], str)}
    assert compared == set(LOSS_TYPES) - BEYOND_TRL


AT_EVERY_COMMIT = [(1, 0), (2, 3)]
BY_HAND = [pytest.param(point, marks=pytest.mark.slow) for point in [(1, 3), (2, 0)]]


@pytest.fixture(scope="module", params=[*AT_EVERY_COMMIT, *BY_HAND], ids="ranks{0[0]}-stage{0[1]}".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases, run in one process group; two ranks get several micro-batches each."""
    num_ranks, stage = request.param
    folder = tmp_path_factory.mktemp("losses")
    configs = {}
    for name in LOSS_CASES:
        config = case_config(load_case(name), folder / name)
        config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
        config["packing"]["max_tokens"] = 130 if num_ranks == 2 else 4096
        configs[name] = config
    write_request(folder / "request.json", configs)
    succeeded(
        fork_ranks(num_ranks, "tests.invariance.worker", str(folder), cwd=folder, timeout=120 + 20 * len(configs))
    )
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LOSS_CASES)
def test_the_run_equals_the_recorded_one(finished: Path, name: str) -> None:
    seen = json.loads((finished / f"{name}.rank0.json").read_text())
    assert "error" not in seen, seen["error"]
    assert compare_run(finished / name, load_case(name)) == []


@pytest.mark.parametrize("name", LOSS_CASES)
def test_no_two_recordings_are_alike(name: str) -> None:
    """So that a run of another loss could not pass for this one."""
    own = [(line["loss"], line["grad_norm"]) for line in load_case(name).logs]
    for other in LOSS_CASES:
        if other != name:
            assert own != [(line["loss"], line["grad_norm"]) for line in load_case(other).logs]


@pytest.mark.parametrize("name", ["bco_pair", *SLACK])
def test_where_there_is_slack_exact_arithmetic_needs_it_too(name: str) -> None:
    case = load_case(name)
    configured = bind(LossConfig.model_validate(dict(case.loss)))

    def loss(step: plain.Step) -> Tensor:
        one, unknown = torch.ones_like(step.ratios), torch.full_like(step.ratios, math.nan)
        return configured.pair_losses(PairValues(*step.ratios, *one, *unknown, 0 * one[0], one[0])).mean()

    lines = list(plain.train(case, loss, torch.float64))  # equal on every machine
    assert (compare_trajectory(lines, case.logs) != []) is (name in SLACK)
    assert compare_trajectory(lines, case.logs, SLACK.get(name, 1.0)) == []
