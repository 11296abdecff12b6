"""Compiled layers train as TRL does: alone and on two ranks, in micro-batches of many lengths, with adapters."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden.trajectories import case_config, compare_run, lines_of, load_case
from tests.launching import launch, succeeded

pytestmark = pytest.mark.timeout(300)


def trained(folder: Path, num_ranks: int, *overrides: str, begun: int = 0, cold: bool = False) -> str:
    """A recorded case, compiled, from after step `begun`; what was printed. Cold: nothing compiled is found."""
    (folder / "run.yaml").write_text(yaml.safe_dump(case_config(load_case("sigmoid_ga4"), folder / "run")))
    environment = {"DPO_DIST_CACHE": str(folder / "cache")}
    if cold:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{begun}")
    arguments = ["run.yaml", *overrides]
    # Not forked from this process: torch compiles in processes of its own, which a fork of many threads cannot start.
    process = launch(num_ranks, "dpo_dist", "train", *arguments, cwd=folder, env=environment, timeout=280)
    printed = succeeded(process).stderr
    # All of it before the second step, in which lengths are others.
    assert printed.count(f" graphs compiled until the end of step {begun + 1}, in ") == (
        "torch_compile=true" in str(overrides)
    )
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


@pytest.mark.thorough
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """To the last bit, also where everything has to be compiled anew."""
    case = ["model.torch_compile=true", "packing.max_tokens=130", "checkpoint.save_steps=2"]
    folders = {name: tmp_path / name for name in ("whole", "resumed")}
    for name, folder in folders.items():
        folder.mkdir()
        trained(folder, 1, *case, *(["train.max_steps=2"] if name == "resumed" else []))
    printed = trained(folders["resumed"], 1, *case, "checkpoint.resume=auto", begun=2, cold=True)
    assert "resuming after step 2" in printed
    lines = [[comparable(line) for line in lines_of(folder / "run")] for folder in folders.values()]
    assert lines[0] == lines[1]
    files = [(folder / "run" / "model" / "model.safetensors").read_bytes() for folder in folders.values()]
    assert files[0] == files[1]


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """A line without times and what depends on them."""
    timed = ("time/", "memory/", "mfu", "pairs_per_second", "tokens_per_second")
    return {key: value for key, value in line.items() if not key.startswith(timed)}
