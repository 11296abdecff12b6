"""What a steady step waits for on the host, in a real run: one copy of ours at its end, and DeepSpeed's own."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.golden.trajectories import base_config
from tests.launching import REPOSITORY, environment

STEPS = 4  # the first one proves the run, the last one saves: the steady ones are between
# DeepSpeed 0.19.8 looks once whether the gradient's norm is a number; the fused AdamW reads nothing.
OF_OTHERS = {"deepspeed/runtime/utils.py:is_invalid_grad_norm _local_scalar_dense": 1}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("syncs")
    for name in ("honest", "faulty"):
        config = base_config(folder / name)
        config["train"] |= {"examples_per_step": 8, "max_steps": STEPS}
        config["packing"]["max_tokens"] = 150  # several micro-batches
        config["log"] = {"report_to": []}
        config["parallel"] = {"deepspeed": "zero3_cpu"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    worker = [sys.executable, "-m", "tests.gpu_contract.syncs_worker", "honest.yaml", "faulty.yaml", "out.json"]
    variables = environment({"PYTHONPATH": str(REPOSITORY)})
    done = subprocess.run(worker, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def _split(step: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    ours = {place: count for place, count in step.items() if place.startswith(("dpo_dist/", "tests/"))}
    return ours, {place: count for place, count in step.items() if place not in ours}


def test_a_steady_step_has_one_copy_to_the_host(seen: dict[str, list[dict[str, int]]]) -> None:
    assert len(seen["honest"]) == STEPS
    for step in seen["honest"][1:-1]:
        ours, of_others = _split(step)
        assert ours == {"dpo_dist/distributed/collectives.py:sum_over_ranks _to_copy": 1}
        assert of_others == OF_OTHERS


@pytest.mark.parametrize("kind", ["_local_scalar_dense", "index", "_to_copy"])
def test_a_value_that_is_read_inside_the_loop_shows(seen: dict[str, list[dict[str, int]]], kind: str) -> None:
    ours, of_others = _split(seen["faulty"][1])
    assert ours.pop("dpo_dist/distributed/collectives.py:sum_over_ranks _to_copy") == 1
    assert ours[f"dpo_dist/trainer.py:train {kind}"] > 1  # once for each micro-batch
    assert of_others == OF_OTHERS
