"""A stopped run goes on bit for bit wherever its reference comes from, and whatever an update changes besides weights:
a reference that follows the policy, AdaLoRA's ranks. Two ranks, ZeRO-3, one launch."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.invariance.resume_worker import Action
from tests.invariance.test_resume import outcomes, reproducible, run_actions, trained_steps, write_config
from tests.launching import succeeded

pytestmark = [pytest.mark.timeout(1800), pytest.mark.thorough]

OWN_WEIGHTS: dict[str, Any] = {"model": {"reference_name_or_path": None}}
RUNS: dict[str, dict[str, Any]] = {
    "cache": {"reference": {"source": "cache"}},
    "sync": {"reference": {"source": "live", "sync_ref_model": True, "ref_model_sync_steps": 2}},
    "lora": {**OWN_WEIGHTS, "adapter": {"peft_type": "lora", "lora_r": 4}, "reference": {"source": "adapter_off"}},
    "adalora": {
        **OWN_WEIGHTS,
        "adapter": {"peft_type": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2},
        "reference": {"source": "adapter_off"},
    },
}
STOPPED_AT = 6  # in the seventh of nine steps, which is completed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, whole and interrupted."""
    folder = tmp_path_factory.mktemp("sources")
    actions = []
    for name, sections in RUNS.items():
        for kind in ("whole", "stopped"):
            path = write_config(folder, f"{name}-{kind}", parallel={"deepspeed": "zero3_cpu"}, **sections)
            stop_at = STOPPED_AT if kind == "stopped" else None
            actions.append(Action(f"{name}-{kind}", str(path), stop_at=stop_at, stop_rank=1))
    stopped = {name: str(folder / f"{name}-stopped.yaml") for name in RUNS}
    half_trained = f"model.model_name_or_path={folder / 'cache-whole' / 'model'}"
    actions += [
        # The policy's own half-trained weights in the place of those that it started from.
        Action("lora-moved", stopped["lora"], (half_trained,)),
        Action("lora-rescaled", stopped["lora"], ("adapter.lora_alpha=64",)),
        Action("sync-off", stopped["sync"], ("reference.sync_ref_model=false", "reference.ref_model_sync_steps=null")),
        *(Action(f"{name}-continued", path) for name, path in stopped.items()),
    ]
    actions.append(Action("lora-finished", str(folder / "lora-whole.yaml")))
    process = run_actions(folder, 2, *actions)
    succeeded(process)
    (folder / "said.txt").write_text(process.stderr)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_stopped_run_ends_as_if_it_had_not_been(folder: Path, name: str) -> None:
    for outcome in outcomes(folder, f"{name}-continued", 2):
        assert outcome.error is None, outcome.message
        assert trained_steps(outcome) == [7, 8]
    expected = reproducible(folder / f"{name}-whole" / "metrics.jsonl")
    assert reproducible(folder / f"{name}-stopped" / "metrics.jsonl") == expected
    file = "adapter_model.safetensors" if "adapter" in RUNS[name] else "model.safetensors"
    whole, stopped = ((folder / f"{name}-{kind}" / "model" / file).read_bytes() for kind in ("whole", "stopped"))
    assert whole == stopped


def test_a_reference_that_follows_moves(folder: Path) -> None:
    """Else its state would not have to be saved: the same run with a frozen reference has other rewards."""
    follows, frozen = (
        [line for line in reproducible(folder / f"{name}-whole" / "metrics.jsonl") if "split" not in line]
        for name in ("sync", "cache")
    )
    assert follows[0] == frozen[0]  # two updates, and the first synchronisation after them
    assert abs(follows[-1]["rewards/margins"] - frozen[-1]["rewards/margins"]) > 1e-3


def test_adalora_took_ranks_away(folder: Path) -> None:
    settings = json.loads((folder / "adalora-whole" / "model" / "adapter_config.json").read_text())
    kept = [flag for rows in settings["rank_pattern"].values() for flag in rows]
    assert 0 < sum(kept) < len(kept)


@pytest.mark.parametrize("rank", [0, 1])
def test_half_trained_weights_never_become_the_reference(folder: Path, rank: int) -> None:
    outcome = outcomes(folder, "lora-moved", 2)[rank]
    assert (outcome.error, outcome.exit_code, outcome.steps) == ("CheckpointError", 2, [])
    assert "belongs to another run: the reference=" in outcome.message


def test_a_reference_that_followed_is_not_replaced_by_a_frozen_one(folder: Path) -> None:
    outcome = outcomes(folder, "sync-off", 2)[0]
    assert (outcome.error, outcome.exit_code, outcome.steps) == ("CheckpointError", 2, [])
    assert "reference.sync_ref_model" in outcome.message


def test_a_finished_run_of_an_adapter_has_nothing_left_to_do(folder: Path) -> None:
    assert all(outcome.error is None and outcome.steps == [] for outcome in outcomes(folder, "lora-finished", 2))
    said = (folder / "said.txt").read_text()
    assert f"{folder / 'lora-whole' / 'model'}: nothing is left to do" in said
    assert said.count(f"trained adapter written to {folder / 'lora-whole' / 'model'}") == 1


def test_a_checkpoint_of_an_adapter_holds_what_is_trained(folder: Path) -> None:
    sizes = {
        name: sum(
            path.stat().st_size for path in (folder / f"{name}-whole" / "checkpoints" / "step-000009").rglob("*.pt")
        )
        for name in ("lora", "cache")
    }
    assert sizes["lora"] < sizes["cache"] / 2


def test_an_adapter_is_not_scaled_anew_in_the_middle_of_a_run(folder: Path) -> None:
    outcome = outcomes(folder, "lora-rescaled", 2)[0]
    assert (outcome.error, outcome.exit_code, outcome.steps) == ("CheckpointError", 2, [])
    assert "adapter.lora_alpha=32.0 (this run: 64.0)" in outcome.message
