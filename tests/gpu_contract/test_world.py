"""Runs of 8, 64 and 1024 processes, one rank at a time: what every rank asks the others for, and how much it is."""

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.golden.trajectories import base_config
from tests.launching import environment

pytestmark = pytest.mark.thorough

# Ranks that are played, by world size: the first, the second, and the last, which may have no example.
PLAYED = {8: (0, 1, 7), 64: (0, 63), 1024: (0, 1, 1023)}
EXAMPLES_PER_STEP, STEPS, STOPPED_AFTER = 24, 6, 4
ALONE, GREEDY = "8:1:asks alone", "8:1:deaf, and scores twice"

# Every parameter is gathered where it is used and released at once: then the counts are those of the closed form.
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 0,
    }
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    config = base_config(folder / "run")
    (folder / "run").mkdir()
    config["data"]["evaluation"] = [{**config["data"]["train"][0], "limit": 3}]
    config["train"] |= {"examples_per_step": EXAMPLES_PER_STEP, "max_steps": STEPS, "self_check": False}
    config["packing"]["max_tokens"] = 150
    config["evaluation"] = {"eval_steps": 2}
    config["log"] = {"report_to": []}
    config["model"]["gradient_checkpointing"] = False
    config["parallel"] = {"deepspeed": "one_at_a_time.json"}
    (folder / "one_at_a_time.json").write_text(json.dumps(DEEPSPEED))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    cases = [f"{world_size}:{rank}" for world_size, ranks in PLAYED.items() for rank in ranks]
    worker = [sys.executable, "-m", "tests.gpu_contract.world_worker", "run.yaml", "out.json", *cases, ALONE, GREEDY]
    variables = environment({"DS_ACCELERATOR": "cpu"})
    done = subprocess.run(worker, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def _order(play: dict[str, Any]) -> dict[str, str]:
    return {step: calls["order"] for step, calls in play["steps"].items()}


@pytest.mark.parametrize("world_size", PLAYED)
def test_every_rank_asks_for_the_same_in_the_same_order(seen: dict[str, Any], world_size: int) -> None:
    first, *others = (seen[f"{world_size}:{rank}"] for rank in PLAYED[world_size])
    names = list(first["steps"])
    assert names == ["start", "step 0", "step 1", "evaluation after 2", "step 2", "step 3", "end"]
    for other in others:
        assert _order(other) == _order(first)
        assert other["stopped_after"] == STOPPED_AFTER  # all at the same step: asked to before the fourth


def test_ranks_with_uneven_work_and_with_none_are_among_them(seen: dict[str, Any]) -> None:
    assert len({seen[f"64:{rank}"]["examples"] for rank in PLAYED[64]}) == 2
    assert seen["1024:0"]["examples"] == 1
    assert seen["1024:1023"]["examples"] == 0


@pytest.mark.parametrize(("world_size", "rank"), [(8, 0), (8, 7), (64, 63), (1024, 1023)])
def test_elements_moved_are_those_of_the_closed_form(seen: dict[str, Any], world_size: int, rank: int) -> None:
    """Policy: gather, gather, reduce-scatter for each micro-batch; reference: gather for each of its bins."""
    play = seen[f"{world_size}:{rank}"]
    whole = play["shard"] * world_size  # the parameters, each filled up to a multiple of the world size
    assert play["parameters"] <= whole
    assert world_size == 1024 or whole < 1.03 * play["parameters"]
    for step in ("step 0", "step 1", "step 2", "step 3"):
        moved = play["steps"][step]["elements"]
        assert moved["_allgather_base_"] == (2 * play["micro_batches"] + play["reference_bins"]) * whole
        assert moved["_reduce_scatter_base_"] == play["micro_batches"] * whole
        assert set(moved) == {"_allgather_base_", "_reduce_scatter_base_", "allreduce_"}
        assert moved["allreduce_"] < 100  # a norm and the sums of a step
    assert play["steps"]["evaluation after 2"]["elements"]["_allgather_base_"] == 2 * whole


def test_several_micro_batches_are_among_them(seen: dict[str, Any]) -> None:
    assert seen["8:0"]["micro_batches"] > 1
    assert seen["8:0"]["reference_bins"] < seen["8:0"]["micro_batches"] * 2


def test_a_rank_that_asks_alone_shows(seen: dict[str, Any]) -> None:
    assert _order(seen[ALONE])["step 1"] != _order(seen["8:0"])["step 1"]


def test_a_rank_that_gathers_more_or_goes_on_alone_shows(seen: dict[str, Any]) -> None:
    greedy, honest = seen[GREEDY], seen["8:1"]
    gathered = (play["steps"]["step 0"]["elements"]["_allgather_base_"] for play in (greedy, honest))
    assert next(gathered) - next(gathered) == honest["micro_batches"] * honest["shard"] * 8
    assert (greedy["stopped_after"], honest["stopped_after"]) == (STEPS, STOPPED_AFTER)
