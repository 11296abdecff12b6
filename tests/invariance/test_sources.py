"""Where the reference's log-probabilities come from changes nothing: live, cache and adapters off, at any ZeRO stage
and world size, with a policy that differs from the reference."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_dist.cli.exporting import run_export
from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, compare_trajectory, lines_of, load_case, load_rows
from tests.invariance.sources import (
    ADAPTED,
    ADAPTER_STEPS,
    ADAPTERS,
    GOLDEN,
    OWN_CACHES,
    STAGES,
    WHOLE,
    WORLD_SIZES,
    adapted_name,
    configs,
    is_by_hand,
    whole_name,
)
from tests.launching import succeeded

# Tied embeddings that are both trained whole: PEFT warns of what is done here on purpose.
pytestmark = [pytest.mark.timeout(0), pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")]
Finished = Callable[[int, str], Path]
TYPES = {"live": "LiveReference", "cache": "CachedReference", "adapter_off": "AdapterOffReference"}
ALL_ADAPTERS = (*ADAPTERS, "continued")


def _point(kind: str, source: str, stage: int, adapter: str | None = None, has_source: bool = True) -> Any:
    """Arguments of a test about one run; what is run by hand is marked so."""
    values = [*([adapter] if adapter else []), *([source] if has_source else []), stage]
    return pytest.param(*values, marks=[pytest.mark.slow] if is_by_hand(kind, source, stage) else [])


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`finished(world_size, name)`: the folder of a run; the first call launches all runs of that world size."""

    own = [item for item in request.session.items if item.path == request.path]
    everything = any(item.get_closest_marker("slow") for item in own)

    @cache
    def launched(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"sources{world_size}")
        arguments = [str(folder), *(["everything"] if everything else [])]
        timeout = 300 + 20 * len(configs(folder, everything))
        succeeded(fork_ranks(world_size, "tests.invariance.sources_worker", *arguments, cwd=folder, timeout=timeout))
        return folder

    def folder_of(world_size: int, name: str) -> Path:
        folder = launched(world_size)
        for rank in range(world_size):
            seen = _seen(folder / name, rank)
            assert "error" not in seen, f"{name}, rank {rank}: {seen['error']}"
        return folder / name

    return folder_of


def _seen(run: Path, rank: int = 0) -> dict:
    return json.loads((run.parent / f"{run.name}.rank{rank}.json").read_text())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("name", "stage"), [_point("whole", name, stage) for name in WHOLE for stage in STAGES])
def test_all_weights_equal_the_recorded_run(finished: Finished, name: str, stage: int, world_size: int) -> None:
    run = finished(world_size, whole_name(name, stage))
    assert compare_trajectory(lines_of(run), load_case(GOLDEN).logs) == []
    seen = _seen(run)
    assert seen["reference"] == TYPES[name.split("-")[0]]
    assert seen["asked_without_gradient"] == 0  # the policy's engine is never run for the reference's sake


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("adapter", "source", "stage"),
    [_point(adapter, source, stage, adapter) for adapter in ALL_ADAPTERS for source in ADAPTED for stage in STAGES],
)
def test_an_adapter_learns_the_same(finished: Finished, adapter: str, source: str, stage: int, world_size: int) -> None:
    first = lines_of(finished(1, adapted_name(adapter, "live", 0)))
    run = finished(world_size, adapted_name(adapter, source, stage))
    lines = lines_of(run)
    assert compare_trajectory(lines, first) == []
    assert _seen(run)["reference"] == TYPES[source]
    # The policy has left the reference: equal runs are not equal because nothing happens.
    assert len(lines) == ADAPTER_STEPS
    assert abs(lines[-1]["rewards/chosen"]) + abs(lines[-1]["rewards/rejected"]) > 0.05


@pytest.mark.parametrize(
    ("adapter", "stage"), [_point(name, "live", 0, name, has_source=False) for name in ALL_ADAPTERS]
)
def test_an_adapter_starts_at_its_reference(finished: Finished, adapter: str, stage: int) -> None:
    first = lines_of(finished(1, adapted_name(adapter, "live", stage)))[0]
    starts_equal = math.isclose(first["loss"], math.log(2), abs_tol=1e-6)
    assert starts_equal is (adapter != "prompt")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_first_rank_decides_for_nodes_with_caches_of_their_own(finished: Finished, world_size: int) -> None:
    run = finished(world_size, OWN_CACHES)
    assert [_seen(run, rank)["reference"] for rank in range(world_size)] == ["CachedReference"] * world_size
    assert compare_trajectory(lines_of(run), load_case(GOLDEN).logs) == []


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_without_a_reference_rewards_are_the_policys_own(finished: Finished, world_size: int) -> None:
    run = finished(world_size, "none")
    assert _seen(run)["reference"] == "NoReference"
    for line in lines_of(run):
        for kind in ("chosen", "rejected"):
            assert line[f"rewards/{kind}"] == pytest.approx(0.1 * line[f"logps/{kind}"], rel=1e-5)


# ---- what a run with an adapter leaves behind


@pytest.mark.parametrize(("adapter", "stage", "world_size"), [("lora", 0, 1), ("lora", 3, 2), ("whole-modules", 3, 2)])
def test_checkpoint_gives_the_adapter_and_the_merged_model(
    finished: Finished, tmp_path: Path, adapter: str, stage: int, world_size: int
) -> None:
    run = finished(world_size, adapted_name(adapter, "adapter_off", stage))
    checkpoint = run / "checkpoints" / f"step-{ADAPTER_STEPS:06d}"
    alone = run_export(checkpoint, tmp_path / "alone", False, False, None, tmp_path)
    tensors, written = (load_file(folder / "adapter_model.safetensors") for folder in (alone, run / "model"))
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) and tensor.numel() for name, tensor in tensors.items())

    merged = run_export(checkpoint, tmp_path / "merged", False, True, None, tmp_path)
    weights, base = (load_file(folder / "model.safetensors") for folder in (merged, FOLDER / "tiny_policy"))
    assert weights.keys() == base.keys()
    assert all(weights[name].shape == tensor.shape for name, tensor in base.items())
    assert any(not torch.equal(weights[name], tensor) for name, tensor in base.items())
    ids = torch.tensor([load_rows()[0].prompt_ids + load_rows()[0].chosen_ids])
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / "tiny_policy", dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, str(run / "model"))(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
