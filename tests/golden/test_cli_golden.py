"""The command line trains as TRL does, at every ZeRO stage, with one process and with two."""

from pathlib import Path

import pytest
import yaml

from tests.forking import fork_ranks
from tests.golden.trajectories import CASES, case_config, compare_run, lines_of, load_case
from tests.launching import launch, succeeded

# Each stage and world size once; the cases are spread over them. ga2 and ga4 accumulated 2 and 4 micro-batches in TRL:
# a token budget makes several of ours.
RUNS = [
    (0, 1, "sigmoid_ga4", 130),
    (0, 2, "sigmoid", 4096),
    (1, 1, "sigmoid_beta_0.5", 4096),
    (1, 2, "sigmoid_ga2", 130),
    (2, 1, "sigmoid", 130),
    (2, 2, "sigmoid_ga4", 4096),
    (3, 1, "sigmoid_ga1", 4096),
    (3, 2, "sigmoid_beta_0.5", 130),
]


def test_every_case_stage_and_world_size_occurs() -> None:
    assert {case for _, _, case, _ in RUNS} == set(CASES)
    assert {(stage, ranks) for stage, ranks, _, _ in RUNS} == {(s, r) for s in range(4) for r in (1, 2)}
    assert len(RUNS) == 8


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "num_ranks", "name", "max_tokens"), RUNS)
def test_the_run_equals_the_recorded_one(
    stage: int, num_ranks: int, name: str, max_tokens: int, tmp_path: Path
) -> None:
    case, out = load_case(name), tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(case_config(case, out)))
    overrides = [f"parallel.deepspeed=zero{stage}_cpu", f"packing.max_tokens={max_tokens}"]
    # Every rank count once as a user starts it; the other stages by ranks that need not import anything.
    begin = launch if stage == 3 else fork_ranks
    process = begin(
        num_ranks, "dpo_dist", "train", "run.yaml", *overrides,
        cwd=tmp_path, env={"DPO_DIST_CACHE": str(tmp_path / "cache")}, timeout=540,
    )  # fmt: skip
    printed = succeeded(process).stderr
    processes = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    assert f"{processes} on cpu, ZeRO stage {stage}," in printed
    assert compare_run(out, case) == []


def test_each_step_has_the_rate_of_the_schedule(tmp_path: Path) -> None:
    """The recorded runs have a constant rate. Here the first is 0: the same pairs have the same loss once more."""
    config = case_config(load_case("sigmoid"), tmp_path / "run")
    config["train"] |= {"examples_per_step": 24, "max_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    environment = {"DPO_DIST_CACHE": str(tmp_path / "cache")}
    succeeded(fork_ranks(1, "dpo_dist", "train", "run.yaml", cwd=tmp_path, env=environment))
    lines, peak = lines_of(tmp_path / "run"), config["train"]["learning_rate"]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, peak, 2 / 3 * peak, 1 / 3 * peak])
    losses = [line["loss"] for line in lines]
    assert losses[0] == losses[1] > losses[2] > losses[3]
