"""bfloat16 as it is used on GPUs: bfloat16 compute, float32 masters, and gradients reduced as configured.

Each run is held against a plain-torch oracle of the same arithmetic (`bf16_oracle.py`). It runs the same kernels on the
same micro-batches, so that nothing is left but float32 rounding in a different order (norm, AdamW on flat buffers):
once in a while that turns a weight's rounding to bfloat16 around, by one step of 2**-8. Tolerances are about 5 times
what was seen; oracles with one rounding too many are 10 times outside of them.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_dist.cli.prepare import Prepared, prepare
from dpo_dist.cli.training import run_training
from dpo_dist.config import load_config
from dpo_dist.errors import ConfigError
from tests.forking import fork_ranks
from tests.golden.trajectories import base_config, lines_of
from tests.launching import succeeded
from tests.parity.bf16_oracle import Arithmetic, Oracle, OracleStep, bf16
from tests.tiny_engine import QUIET, only_rank

# Whichever test comes first waits for the launch.
pytestmark = [pytest.mark.timeout(900), *(pytest.mark.filterwarnings(rule) for rule in QUIET)]

STEPS = 8
# An update moves a weight by about this much; half a bfloat16 step of a weight above 0.13 is more.
LEARNING_RATE = 5e-4
STAGES = (0, 1, 2, 3)
KINDS = ("cpu", "bf16")  # gradients reduced and accumulated in bfloat16, or in float32
LOSS, NORM, WEIGHTS = 2e-5, 1e-4, 0.01  # relative, relative, share of weights that are another bfloat16 number


def write_config(folder: Path, stage: int, kind: str, **sections: dict[str, Any]) -> Path:
    """Several micro-batches a step, clipping at work, matrices that decay."""
    config = base_config(folder / f"zero{stage}_{kind}")
    config["model"]["dtype"] = "bfloat16"
    config["train"] |= {
        "examples_per_step": 8,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
    }
    config["packing"]["max_tokens"] = 120
    config["parallel"]["deepspeed"] = f"zero{stage}_{kind}"
    for section, values in sections.items():
        config[section] |= values
    path = folder / f"zero{stage}_{kind}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def prepared_of(config: Path) -> Prepared:
    return prepare(load_config(config), config.parent / "cache")


class Trajectory:
    """Steps and final weights of a run or an oracle."""

    def __init__(self, steps: list[OracleStep], weights: dict[str, torch.Tensor]) -> None:
        self.steps, self.weights = steps, weights

    @classmethod
    def of_run(cls, folder: Path) -> "Trajectory":
        steps = [OracleStep(x["loss"], x["logps/chosen"], x["grad_norm"]) for x in lines_of(folder)]
        return cls(steps, load_file(folder / "model" / "model.safetensors"))

    @classmethod
    def of_oracle(cls, prepared: Prepared, world_size: int, arithmetic: Arithmetic) -> "Trajectory":
        oracle = Oracle(prepared, world_size, arithmetic)
        steps = [oracle.step(number) for number in range(STEPS)]
        weights = {name.removeprefix("model."): p.detach() for name, p in oracle.policy.named_parameters()}
        return cls(steps, weights)

    def distance(self, other: "Trajectory") -> tuple[float, float, float]:
        """Largest relative difference of losses (and logps) and of gradient norms, and share of unequal weights."""
        pairs = list(zip(self.steps, other.steps, strict=True))
        loss = max(max(abs(a.loss / b.loss - 1), abs(a.logps_chosen / b.logps_chosen - 1)) for a, b in pairs)
        norm = max(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs)
        assert all(self.weights[name].dtype == torch.bfloat16 for name in self.weights)
        unequal = sum(int((w != other.weights[name]).sum()) for name, w in self.weights.items())
        return loss, norm, unequal / sum(w.numel() for w in self.weights.values())

    def follows(self, other: "Trajectory") -> bool:
        loss, norm, weights = self.distance(other)
        return loss < LOSS and norm < NORM and weights < WEIGHTS


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as launched ranks have: the order of sums
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Every stage with both kinds of DeepSpeed file, on two ranks in one launch."""
    folder = tmp_path_factory.mktemp("two_ranks")
    configs = [str(write_config(folder, stage, kind)) for stage in STAGES for kind in KINDS]
    succeeded(fork_ranks(2, "tests.parity.bf16_worker", *configs, cwd=folder, timeout=600))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_follow_the_oracle(two_ranks, stage, kind):
    prepared = prepared_of(two_ranks / f"zero{stage}_{kind}.yaml")
    run = Trajectory.of_run(two_ranks / f"zero{stage}_{kind}")
    oracle = Trajectory.of_oracle(prepared, 2, Arithmetic.of(stage, kind == "bf16"))
    assert run.follows(oracle), run.distance(oracle)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_follows_the_oracle(tmp_path, stage, kind):
    only_rank()
    config = write_config(tmp_path, stage, kind)
    run_training(load_config(config), tmp_path / "cache")
    run = Trajectory.of_run(tmp_path / f"zero{stage}_{kind}")
    oracle = Trajectory.of_oracle(prepared_of(config), 1, Arithmetic.of(stage, kind == "bf16"))
    assert run.follows(oracle), run.distance(oracle)


def test_the_case_has_what_it_is_about(two_ranks):
    config = two_ranks / "zero3_bf16.yaml"
    prepared = prepared_of(config)
    start = load_file(prepared.model_folder / "model.safetensors")
    run = Trajectory.of_run(two_ranks / "zero3_bf16")
    assert all(step.grad_norm > 0.5 for step in run.steps), "clipping must be at work"
    assert any(abs(a.loss - b.loss) > 1e-3 for a, b in pairwise(run.steps)), "the rate must be large enough to matter"
    moved = {name: float((w.float() - start[name]).abs().mean()) for name, w in run.weights.items()}
    assert all(value > 0 for value in moved.values()), "every matrix and vector must move"


# ---- what would be wrong is told apart


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_masters_would_be_seen(two_ranks, stage):
    """An update smaller than half a bfloat16 step of the weight would be lost at every step."""
    prepared = prepared_of(two_ranks / f"zero{stage}_bf16.yaml")
    run = Trajectory.of_run(two_ranks / f"zero{stage}_bf16")
    right = Arithmetic.of(stage, True)
    wrong = Arithmetic(right.reduce_each, right.accumulate, right.reduce, master=bf16)
    loss, norm, weights = run.distance(Trajectory.of_oracle(prepared, 2, wrong))
    assert loss > 10 * LOSS and norm > 10 * NORM and weights > 10 * WEIGHTS


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_reduction_dtype_acts(two_ranks, stage):
    """Each of the two files is outside of the other one's oracle."""
    runs = {kind: Trajectory.of_run(two_ranks / f"zero{stage}_{kind}") for kind in KINDS}
    for kind, run in runs.items():
        prepared = prepared_of(two_ranks / f"zero{stage}_{kind}.yaml")
        assert not run.follows(Trajectory.of_oracle(prepared, 2, Arithmetic.of(stage, kind != "bf16")))
    assert not runs["cpu"].follows(runs["bf16"])


def test_masters_keep_moving_where_bfloat16_weights_stand_still(tmp_path):
    """At a rate of 1e-5 no weight near 1 can move in bfloat16; its master does, and is what a checkpoint holds."""
    only_rank()
    config = write_config(tmp_path, 3, "bf16", train={"learning_rate": 1e-5}, checkpoint={"save_steps": STEPS})
    run_training(load_config(config), tmp_path / "cache")
    run = tmp_path / "zero3_bf16"
    norms = [name for name in Trajectory.of_run(run).weights if name.endswith("norm.weight")]
    start = load_file(prepared_of(config).model_folder / "model.safetensors")
    final = Trajectory.of_run(run).weights
    assert norms and all(torch.equal(final[name], start[name].to(torch.bfloat16)) for name in norms)

    shard = next(run.glob("checkpoints/*/shards/*optim_states.pt"))
    masters = torch.cat(torch.load(shard, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"])
    near_one = masters[(masters - 1).abs() < 1e-2]
    moved = (near_one - near_one.to(torch.bfloat16).float()).abs()
    assert len(near_one) >= len(norms) and float(moved.max()) > 3e-5


# ---- float16


def test_float16_on_a_cpu_is_refused(tmp_path):
    config = load_config(write_config(tmp_path, 2, "cpu", model={"dtype": "float16"}))
    with pytest.raises(ConfigError, match=r"model\.dtype=float16 needs a GPU: DeepSpeed has no float16 loss scaling"):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize("command", ["check", "train"])
def test_float16_on_a_cpu_ends_the_command(tmp_path, command):
    config = write_config(tmp_path, 2, "cpu", model={"dtype": "float16"})
    process = fork_ranks(1, "dpo_dist", command, str(config), cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("model.dtype=float16 needs a GPU") == 1
    assert not (tmp_path / "zero2_cpu").exists()


def test_metrics_are_numbers(two_ranks):
    for stage in STAGES:
        for line in (two_ranks / f"zero{stage}_bf16" / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
