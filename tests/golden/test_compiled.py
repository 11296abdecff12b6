"""Compiled layers train as TRL does: alone and on two ranks, in micro-batches of many lengths, with adapters."""

from pathlib import Path

import pytest
import yaml

from tests.golden.trajectories import case_config, compare_run, lines_of, load_case
from tests.launching import launch, succeeded

pytestmark = pytest.mark.timeout(300)


def trained(folder: Path, num_ranks: int, *overrides: str) -> str:
    """A recorded case, compiled; what was printed."""
    (folder / "run.yaml").write_text(yaml.safe_dump(case_config(load_case("sigmoid_ga4"), folder / "run")))
    environment = {"DPO_DIST_CACHE": str(folder / "cache")}
    arguments = ["run.yaml", *overrides]
    # Not forked from this process: torch compiles in processes of its own, which a fork of many threads cannot start.
    process = launch(num_ranks, "dpo_dist", "train", *arguments, cwd=folder, env=environment, timeout=280)
    printed = succeeded(process).stderr
    # All of it before the second step, in which lengths are others.
    assert printed.count(" graphs compiled until the end of step 1, in ") == ("torch_compile=true" in str(overrides))
    assert "more graphs were compiled" not in printed
    return printed


@pytest.mark.parametrize(
    ("stage", "num_ranks", "recompute"),
    [(0, 1, "false"), (3, 2, "true"), pytest.param(2, 2, "auto", marks=pytest.mark.thorough)],
)
def test_the_run_equals_the_recorded_one(stage: int, num_ranks: int, recompute: str, tmp_path: Path) -> None:
    trained(
        tmp_path, num_ranks, "model.torch_compile=true", "packing.max_tokens=130",
        f"parallel.deepspeed=zero{stage}_cpu", f"model.gradient_checkpointing={recompute}",
    )  # fmt: skip
    assert compare_run(tmp_path / "run", load_case("sigmoid_ga4")) == []


def test_an_adapter_is_trained_alike(tmp_path: Path) -> None:
    """Its reference is the same layers without it."""
    adapter = ["adapter.peft_type=lora", "reference.source=adapter_off", "model.reference_name_or_path=null"]
    lines = {}
    for compiled in ("false", "true"):
        (tmp_path / compiled).mkdir()
        trained(tmp_path / compiled, 1, f"model.torch_compile={compiled}", "packing.max_tokens=130", *adapter)
        lines[compiled] = lines_of(tmp_path / compiled / "run")
    for stock, found in zip(lines["false"], lines["true"], strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert found[key] == pytest.approx(stock[key], rel=1e-4), key
