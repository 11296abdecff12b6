"""What holds of Liger without a GPU: its own kernels for norms, MLPs and rotations, packed, and in whole runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.model.liger import LIGER_CHECKED
from tests.golden.trajectories import base_config, lines_of
from tests.launching import REPOSITORY, environment

pytestmark = pytest.mark.thorough

CLOSE = 2e-5  # nats of a completion; gradients relative to the largest component of each weight
SHOWS = 0.05


def _worker(name: str, *arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", f"tests.gpu_contract.{name}", *arguments]
    variables = environment({"PYTHONPATH": str(REPOSITORY)})
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("liger")
    _worker("liger_worker", "out.json", cwd=folder)
    return json.loads((folder / "out.json").read_text())


def _assert_equal(one: dict[str, Any]) -> None:
    assert one["logps"] < CLOSE
    assert one["gradients"] < CLOSE
    assert one["same_names"]
    assert one["head"], "the output head is ours"
    assert one["whole_forward"], "the forward of the whole model is the architecture's"


# ---- one packed micro-batch

# Where a layer has other than two norms, a rotation and a SwiGLU; GLM 4 rotates neighbours, which Liger leaves alone.
NORMS = {"exaone4": 4, "gemma2": 4, "gemma3_text": 6, "glm4": 4, "qwen3": 4}
ROTATIONS = {"exaone4": 1, "smollm3": 1, "glm4": 0}
MLPS = {"gpt_oss": {}, **{name: {"_geglu_tanh": 2} for name in ("gemma", "gemma2", "gemma3_text")}}


@pytest.mark.parametrize("name", sorted(LIGER_CHECKED))
def test_a_packed_model_equals_the_stock_forward(found: dict[str, Any], name: str) -> None:
    one = found["architectures"][name]
    _assert_equal(one)
    rotations = {"_triton_rope": count} if (count := ROTATIONS.get(name, 2)) else {}
    for part in ("forward", "backward"):
        parts = {"_rms_norm": 2 * NORMS.get(name, 2) + 1, **MLPS.get(name, {"_swiglu": 2})}
        assert one[part] == {f"{kernel}_{part}_kernel": count for kernel, count in parts.items()} | rotations


def test_prompts_that_are_not_shared(found: dict[str, Any]) -> None:
    _assert_equal(found["unshared"])


def test_without_the_option_no_kernel_runs(found: dict[str, Any]) -> None:
    _assert_equal(found["unused"])
    assert found["unused"]["forward"] == found["unused"]["backward"] == {}


def test_a_second_model_of_the_process_keeps_its_biases(found: dict[str, Any]) -> None:
    policy, reference = found["biased"]
    _assert_equal(policy)
    assert reference == policy


@pytest.mark.parametrize(
    "fault",
    [
        *("weights of the norm", "epsilon of the norm", "positions of the neighbour", "positions that go on"),
        "gate and up exchanged",
    ],
)
def test_a_planted_fault_shows(found: dict[str, Any], fault: str) -> None:
    assert found["faults"][fault]["logps"] > SHOWS


@pytest.mark.parametrize("fault", ["gradient of the norm", "rotated forward in backward", "gradient of the MLP"])
def test_a_planted_fault_of_a_gradient_shows(found: dict[str, Any], fault: str) -> None:
    assert found["faults"][fault]["logps"] < CLOSE
    assert found["faults"][fault]["gradients"] > SHOWS


def test_only_the_rotation_is_replaced_for_everybody_and_it_is_given_back(found: dict[str, Any]) -> None:
    assert found["left"] == {
        "replaced": ["apply_rotary_pos_emb"],
        "given_back": [],
        "forward": True,
        "cross_entropy": True,
    }


# ---- whole runs

KINDS = ("whole", "lora")
# Short ones: the interpreter needs some 20 ms for a token.
ROWS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [12, 13], "chosen_ids": [14, 2], "rejected_ids": [15, 16, 17, 2]},
    {"prompt_ids": [18, 19, 20], "chosen_ids": [21, 22, 23, 2], "rejected_ids": [24, 25, 2]},
    {"prompt_ids": [26], "chosen_ids": [27, 28, 2], "rejected_ids": [2]},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    """ZeRO-3 that gathers every norm for itself, activations recomputed, several micro-batches."""
    folder = tmp_path_factory.mktemp("liger_runs")
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    names = []
    for kind in (*KINDS, "faulty"):
        for uses_liger in (False, True):
            names.append(f"{kind}-{'liger' if uses_liger else 'stock'}")
            config = base_config(folder / names[-1])
            del config["model"]["reference_name_or_path"]
            config["data"]["train"] = [{"path": "pairs.jsonl"}]
            config["model"] |= {"gradient_checkpointing": True, "use_liger_kernel": uses_liger}
            config["train"] |= {"examples_per_step": 2, "max_steps": 2, "learning_rate": 1e-3}
            config["packing"]["max_tokens"] = 10
            config["parallel"]["deepspeed"] = "zero3.json"
            if kind == "faulty":
                config["train"]["self_check"] = False
            if kind == "lora":
                config["adapter"] = {"peft_type": "lora"}
            (folder / f"{names[-1]}.yaml").write_text(yaml.safe_dump(config))
    config["train"] |= {"self_check": True, "output_dir": str(folder / "faulty-checked")}
    names.append("faulty-checked")
    (folder / "faulty-checked.yaml").write_text(yaml.safe_dump(config))
    _worker("liger_run_worker", "out.json", *(f"{name}.yaml" for name in names), cwd=folder)
    return folder, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_within_rounding(runs: tuple[Path, dict[str, dict[str, int]]], kind: str) -> None:
    folder, calls = runs
    stock, liger = (lines_of(folder / f"{kind}-{name}") for name in ("stock", "liger"))
    assert len(stock) == len(liger) == 2
    for expected, line in zip(stock, liger, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
        for name in ("rewards/chosen", "rewards/rejected"):
            assert line[name] == pytest.approx(expected[name], abs=5e-6), name
    assert liger[1]["rewards/margins"] != 0.0
    assert calls[f"{kind}-stock"] == {}
    # A layer's two norms, its MLP and its rotation in backward; the last norm is computed once.
    counts = calls[f"{kind}-liger"]
    assert counts["_rms_norm_backward_kernel"] / counts["_swiglu_backward_kernel"] == 5 / 2


def test_a_kernel_that_is_wrong_for_policy_and_reference_alike_stops_the_run(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    said = runs[1]["faulty-checked"]["said"]
    assert "architecture's own forward" in said and "model.use_liger_kernel" in said


@pytest.mark.parametrize("kind", [*KINDS, "faulty"])
def test_policy_and_reference_agree_in_every_bit_at_the_start(
    runs: tuple[Path, dict[str, dict[str, int]]], kind: str
) -> None:
    stock, liger = (lines_of(runs[0] / f"{kind}-{name}")[0] for name in ("stock", "liger"))
    assert liger["rewards/chosen"] == liger["rewards/rejected"] == liger["rewards/margins"] == 0.0
    # In these small models rounding alone may be nothing: a norm that is wrong shows that both models use it.
    assert (abs(liger["entropy"] - stock["entropy"]) > 1e-5) == (kind == "faulty")
