"""The reference holds its parameters and nothing else: no gradient, no optimizer, no graph, no activations."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.forking import fork_ranks
from tests.golden.trajectories import base_config
from tests.launching import succeeded
from tests.processes import live_engines
from tests.processes.live_engines import live_bytes, save_models

STAGES = ("0", "3")
STEPS = 3
CONSTANT = 2048  # bytes: buffers of the model (rotary frequencies), and what DeepSpeed counts in tensors


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("memory")
    save_models(folder / "models")
    succeeded(fork_ranks(2, "tests.processes.live_worker", str(folder), "memory", cwd=folder))
    return json.loads((folder / "memory.json").read_text())


def test_what_another_thread_is_about_to_let_go_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before, kept, counted_once = live_bytes(), torch.zeros(5), threading.Event()
    count = live_engines._live_bytes

    def hold(tensor: torch.Tensor) -> None:
        counted_once.wait()

    def counting() -> int:
        found = count()
        counted_once.set()
        return found

    monkeypatch.setattr(live_engines, "_live_bytes", counting)
    holder = threading.Thread(target=hold, args=(torch.zeros(1000),))
    holder.start()
    assert live_bytes() - before == kept.untyped_storage().nbytes()
    holder.join()


@pytest.mark.parametrize("stage", STAGES)
def test_no_gradient_no_optimizer_no_graph(seen: list[dict[str, Any]], stage: str) -> None:
    for rank in seen:
        facts = rank[stage]["facts"]
        assert facts == {"with_grad": 0, "requires_grad": 0, "grad_fn": 0, "optimizer_state": 0, "training": False}


@pytest.mark.parametrize("stage", STAGES)
def test_between_steps_it_holds_its_share_of_the_parameters(seen: list[dict[str, Any]], stage: str) -> None:
    for rank in seen:
        held = rank[stage]
        # float32; a slice is filled up to equal length on both ranks, by at most one element each.
        share = 4 * held["parameters"] / (2 if stage == "3" else 1)
        assert share <= held["engine_bytes"] <= share + 4 * held["tensors"] + CONSTANT
        assert held["engine_bytes_after_asking"] == held["engine_bytes"]


@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_gone_before_the_policy_runs(seen: list[dict[str, Any]], stage: str) -> None:
    """Right after the reference was asked as the trainer does, its answer is alive and what was alive before."""
    for rank in seen:
        for before, after, answer in rank[stage]["asked"][1:]:  # the first call fills caches
            assert after - before == answer
        # There is something to be freed: with a graph, the same forward keeps many times as much as its answer.
        assert rank[stage]["with_a_graph"] > 50 * answer


@pytest.mark.parametrize("stage", STAGES)
def test_a_released_reference_holds_nothing_and_a_policy_can_follow(seen: list[dict[str, Any]], stage: str) -> None:
    for rank in seen:
        held = rank[stage]
        assert held["released_bytes"] <= 0.01 * held["engine_bytes"]
        assert held["given_back"] >= held["engine_bytes"]
        assert "given back" in held["asked_when_released"]
        assert held["policy_after"] == held["policy_alone"]


def test_released_memory_goes_back_to_the_system(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for stage in STAGES:
            assert rank[stage]["resident_given_back"] > 0.9 * rank[stage]["resident_size"]


@pytest.mark.slow  # tests/invariance/test_sources.py counts the same in its runs
@pytest.mark.parametrize("deepspeed", ["zero0_cpu", "zero3_cpu"])
def test_a_run_never_asks_the_policy_without_a_gradient(tmp_path: Path, deepspeed: str) -> None:
    """Not for the reference's sake, and not for anything else between the first update and the last."""
    config = base_config(tmp_path / "run")
    config["train"] |= {"examples_per_step": 8, "max_steps": STEPS, "learning_rate": 1e-3}
    config["packing"] = {"max_tokens": 150, "reference_max_tokens": 300}
    config["parallel"]["deepspeed"] = deepspeed
    config["checkpoint"]["save_steps"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    succeeded(fork_ranks(2, "tests.processes.live_worker", str(tmp_path), "forwards_of_a_run", cwd=tmp_path))
    for rank in json.loads((tmp_path / "forwards_of_a_run.json").read_text()):
        without, with_graph = rank["policy"]
        assert without == 0 and with_graph >= 2 * STEPS
        without, with_graph = rank["reference"]
        assert without >= STEPS and with_graph == 0
