"""Losses that TRL's DPOTrainer has not, and a supervised run without a reference, through whole runs.

And `aot`: in TRL's recorded run both of its sides have the same order, so that it equals `sigmoid` in every step.
Against plain torch in float64, one sequence at a time, with formulas written here.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from tests.forking import fork_ranks
from tests.golden import plain
from tests.golden.trajectories import (
    RELATIVE,
    Case,
    Row,
    case_config,
    compare_trajectory,
    lines_of,
    load_case,
    load_rows,
)
from tests.invariance.stories import write_request
from tests.launching import succeeded

BETA = 0.4


def sft(step: plain.Step) -> Tensor:
    return -step.logps[0].sum() / step.lengths[0].sum()


def dpo_with(margins: Tensor) -> Tensor:
    return -F.logsigmoid(margins).mean()


def dpop(step: plain.Step) -> Tensor:
    chosen, rejected = step.ratios
    return dpo_with(BETA * (chosen - rejected - 2.0 * torch.clamp(-chosen, min=0)))


def rdpo(step: plain.Step) -> Tensor:
    chosen, rejected = step.ratios
    return dpo_with(BETA * (chosen - rejected) + 0.03 * (step.lengths[0] - step.lengths[1]))


def simpo(step: plain.Step) -> Tensor:
    chosen, rejected = step.logps / step.lengths
    return dpo_with(BETA * (chosen - rejected) - 0.7)


def cpo(step: plain.Step) -> Tensor:
    return dpo_with(BETA * (step.logps[0] - step.logps[1])) + 0.5 * sft(step)


def orpo(step: plain.Step) -> Tensor:
    means = step.logps / step.lengths
    chosen, rejected = means - (1 - means.exp()).log()
    return BETA * dpo_with(chosen - rejected) + sft(step)


def aot(step: plain.Step) -> Tensor:
    policy = step.logps[0] - step.logps[1]
    reference = policy.detach() - (step.ratios[0] - step.ratios[1]).detach()
    return dpo_with(BETA * (policy.sort().values - reference.sort().values))


def paired(step: plain.Step) -> Tensor:
    return dpo_with(BETA * (step.ratios[0] - step.ratios[1]))


LOSSES: dict[str, tuple[dict[str, Any], Callable[[plain.Step], Tensor]]] = {
    "dpop": ({"loss_type": "dpop", "dpop_lambda": 2.0}, dpop),
    "rdpo": ({"loss_type": "sigmoid", "rdpo_alpha": 0.03}, rdpo),
    "simpo": ({"loss_type": "simpo", "simpo_gamma": 0.7}, simpo),
    "cpo": ({"loss_type": "cpo", "cpo_alpha": 0.5}, cpo),
    "orpo": ({"loss_type": "orpo"}, orpo),
    "aot": ({"loss_type": "aot"}, aot),
}
BASE = load_case("sigmoid")


def case_of(name: str) -> Case:
    """The settings of a recorded run, with a loss of this file."""
    return replace(BASE, loss={**LOSSES[name][0], "beta": BETA})


def rows_of(name: str) -> tuple[Row, ...]:
    """The recorded pairs; for `aot` short ones, whose margins are near each other, so that policy and reference differ
    in their order."""
    if name != "aot":
        return load_rows()
    draw = random.Random(5)
    return tuple(Row(*(tuple(draw.randrange(3, 128) for _ in range(3)) for _ in range(3))) for _ in range(24))


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids="ranks{0[0]}-stage{0[1]}".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    num_ranks, stage = request.param
    folder, configs = tmp_path_factory.mktemp("beyond"), {}
    for name in LOSSES:
        configs[name] = case_config(case_of(name), folder / name)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows_of(name)))
        configs[name]["data"]["train"] = [{"path": str(path)}]
        configs[name]["parallel"]["deepspeed"] = f"zero{stage}_cpu"
        configs[name]["packing"]["max_tokens"] = 4096 if num_ranks == 1 else 12 if name == "aot" else 130
    write_request(folder / "request.json", configs)
    succeeded(fork_ranks(num_ranks, "tests.invariance.worker", str(folder), cwd=folder, timeout=300))
    return folder


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LOSSES)
def test_the_run_equals_plain_torch(finished: Path, name: str) -> None:
    seen = json.loads((finished / f"{name}.rank0.json").read_text())
    assert "error" not in seen, seen["error"]
    wanted = list(plain.train(case_of(name), LOSSES[name][1], torch.float64, rows_of(name)))
    assert compare_trajectory(lines_of(finished / name), wanted) == []


def test_the_two_sides_of_aot_differ_in_order() -> None:
    sorted_apart, as_pairs = (
        next(plain.train(case_of("aot"), loss, torch.float64, rows_of("aot"))) for loss in (aot, paired)
    )
    assert abs(sorted_apart["loss"] - as_pairs["loss"]) > 20 * RELATIVE * as_pairs["loss"]


@pytest.mark.timeout(400)
def test_a_supervised_run_needs_no_reference(tmp_path: Path) -> None:
    """The recorded run's losses and gradients, of chosen completions alone: rejected ones are not computed."""
    case, out = load_case("sft"), tmp_path / "run"
    config = case_config(case, out)
    del config["reference"], config["model"]["reference_name_or_path"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    overrides = ["parallel.deepspeed=zero3_cpu", "packing.max_tokens=130"]
    environment = {"DPO_DIST_CACHE": str(tmp_path / "cache")}
    done = succeeded(fork_ranks(2, "dpo_dist", "train", "run.yaml", *overrides, cwd=tmp_path, env=environment))
    assert "reference: none: no loss reads one" in done.stderr
    assert "first loss: skipped" in done.stderr
    assert not list((tmp_path / "cache").glob("reference*"))
    for line, recorded in zip(lines_of(out), case.logs, strict=True):
        for key in ("loss", "grad_norm", "mean_token_accuracy", "logits/chosen"):
            assert math.isclose(line[key], recorded[key], rel_tol=1e-4), (key, line, recorded)
        assert not {"rewards/chosen", "logps/rejected", "logits/rejected", "kl"} & line.keys()
        rows = load_rows()[(line["step"] - 1) * case.examples_per_step :][: case.examples_per_step]
        assert line["tokens_processed"] == sum(len(row.prompt_ids) + len(row.chosen_ids) - 1 for row in rows)
