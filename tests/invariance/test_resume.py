"""A run that was killed or stopped, and started again, writes what it would have written without.

9 steps over 10 examples, 4 a step: an epoch is 4 + 4 + 2 examples. A line every 2 steps, a checkpoint after 5: it lies
inside of an interval of metrics, and the next epoch begins after it.
"""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpo_dist.metrics import WALL_CLOCK
from dpo_dist.sampler import Sampler
from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, base_config
from tests.invariance.resume_worker import Action, Outcome, perform
from tests.launching import succeeded
from tests.tiny_engine import QUIET, only_rank

# Whichever test comes first waits for all launches.
pytestmark = [pytest.mark.timeout(1800), *(pytest.mark.filterwarnings(rule) for rule in QUIET)]

STEPS, SAVED_AT = 9, 5
KILLED = (-9, 1)  # by the shell's own count, or torchrun's report of a dead rank
BFLOAT16 = {"model": {"dtype": "bfloat16"}, "parallel": {"deepspeed": "zero2_bf16"}}


def write_config(folder: Path, output: str, **sections: dict[str, Any]) -> Path:
    """A run that warms up, decays, shuffles, evaluates, and saves out of step with its lines."""
    config = base_config(folder / output)
    config["model"]["gradient_checkpointing"] = True
    config["data"] = {
        "train": [{"path": str(FOLDER / "pairs.jsonl"), "limit": 10}],
        "evaluation": [{"path": str(FOLDER / "pairs.jsonl"), "limit": 3}],
    }
    config["train"] |= {
        "examples_per_step": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "shuffle": True,
    }
    config["packing"]["max_tokens"] = 200
    config["checkpoint"] = {"save_steps": SAVED_AT, "resume": "auto"}
    config["evaluation"] = {"eval_steps": 3, "eval_on_start": True}
    config["log"] = {"logging_steps": 2, "report_to": ["tensorboard"]}
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_actions(folder: Path, num_ranks: int, *actions: Action) -> subprocess.CompletedProcess[str]:
    """One launch."""
    path = folder / "actions.json"
    path.write_text(json.dumps([asdict(action) for action in actions]))
    return fork_ranks(num_ranks, "tests.invariance.resume_worker", str(path), cwd=folder, timeout=600)


def outcomes(folder: Path, name: str, num_ranks: int) -> list[Outcome]:
    """What every rank says of an action."""
    return [Outcome(**json.loads((folder / f"{name}.rank{rank}.json").read_text())) for rank in range(num_ranks)]


def reproducible(metrics: Path) -> list[dict[str, Any]]:
    """Lines without what depends on the clock."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def logged_steps(run: Path) -> list[int]:
    """Steps TensorBoard shows a loss for, as often as it shows one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.step for event in events.Scalars("loss")]


def require_equal_runs(folder: Path, whole: str, interrupted: str) -> None:
    """Lines, weights and TensorBoard of two finished runs."""
    expected = reproducible(folder / whole / "metrics.jsonl")
    assert [(line["step"], line.get("split")) for line in expected] == [
        *[(0, "self_check"), (0, "evaluation"), (2, None), (3, "evaluation"), (4, None), (6, None), (6, "evaluation")],
        *[(8, None), (9, None), (9, "evaluation")],
    ]
    assert reproducible(folder / interrupted / "metrics.jsonl") == expected
    assert weights(folder / interrupted) == weights(folder / whole)
    assert logged_steps(folder / whole) == logged_steps(folder / interrupted) == [2, 4, 6, 8, 9]


def trained_steps(outcome: Outcome) -> list[int]:
    """Numbers of the steps a start trained on; their rows must be the sampler's."""
    sampler = Sampler(10, 4, 42, shuffle=True)
    assert all(tuple(rows) == sampler.examples_of(step) for step, rows in outcome.steps)
    return [step for step, _ in outcome.steps]


# ---- two ranks, ZeRO-3: four launches


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """Runs that end in the first launch, and one that is killed three times before it ends in the fourth."""
    folder = tmp_path_factory.mktemp("two_ranks")
    zero3 = {"deepspeed": "zero3_cpu"}
    whole, stopped, hurried, killed = (
        str(write_config(folder, name, parallel=zero3)) for name in ("whole", "stopped", "hurried", "killed")
    )
    other_data = f"data.train=[{{path: {FOLDER / 'pairs.jsonl'}, limit: 12}}]"
    earlier = f"checkpoint.resume={folder / 'stopped' / 'checkpoints' / 'step-000005'}"
    first = run_actions(
        folder,
        2,
        Action("whole", whole),
        Action("stopped", stopped, stop_at=6, stop_rank=1),
        Action("continued", stopped),
        Action("other_seed", stopped, ("train.seed=43",)),
        Action("other_data", stopped, (other_data,)),
        Action("other_reference", stopped, ("model.reference_name_or_path=null",)),
        Action("earlier", stopped, (earlier,)),
        Action("finished", stopped),
        Action("stopped at an evaluation", hurried, stop_at=5),
        Action("evaluated", hurried),
        Action("killed", killed, kill_at=2),
    )
    again = [
        run_actions(folder, 2, Action("killed after saving", killed, kill_at=5)),
        run_actions(folder, 2, Action("killed after lines", killed, kill_at=8)),
        run_actions(folder, 2, Action("completed", killed)),
    ]
    return folder, [first, *again]


def test_killed_run_ends_as_if_it_had_not_been(two_ranks):
    folder, launches = two_ranks
    assert all(process.returncode in KILLED for process in launches[:3]), launches[0].stderr[-5000:]
    succeeded(launches[3])
    require_equal_runs(folder, "whole", "killed")


def test_start_step_is_logged_and_no_example_is_trained_on_again(two_ranks):
    folder, launches = two_ranks
    resumed = [re.findall(r"resuming after step (\d+) \((\d+) examples\)", p.stderr) for p in launches]
    # 4 + 4 + 2 + 4 + 4 examples. The second start found no checkpoint, the third and fourth the same one.
    assert resumed[1:] == [[], [("5", "18")], [("5", "18")]]
    for outcome in outcomes(folder, "completed", 2):
        assert trained_steps(outcome) == [5, 6, 7, 8]


def test_signal_to_one_rank_stops_all_at_the_same_step(two_ranks):
    folder, _ = two_ranks
    for outcome in outcomes(folder, "stopped", 2):
        assert (outcome.error, outcome.exit_code) == (None, 0)
        assert trained_steps(outcome) == list(range(7))
    lines = reproducible(folder / "stopped.metrics.jsonl")
    assert max(line["step"] for line in lines) == 6  # the interval of step 7 is not over: it goes into the checkpoint
    for outcome in outcomes(folder, "continued", 2):
        assert trained_steps(outcome) == [7, 8]
    expected = reproducible(folder / "whole.metrics.jsonl")
    assert reproducible(folder / "continued.metrics.jsonl") == expected


def test_a_stop_does_not_wait_for_an_evaluation_and_none_is_lost(two_ranks):
    folder, _ = two_ranks
    lines = reproducible(folder / "stopped at an evaluation.metrics.jsonl")
    assert [(line["step"], line.get("split")) for line in lines][-2:] == [(4, None), (6, None)]
    assert trained_steps(outcomes(folder, "evaluated", 2)[0]) == [6, 7, 8]
    require_equal_runs(folder, "whole", "hurried")


def test_resume_from_a_named_earlier_step(two_ranks):
    folder, _ = two_ranks
    assert trained_steps(outcomes(folder, "earlier", 2)[0]) == [5, 6, 7, 8]
    require_equal_runs(folder, "whole", "stopped")


def test_resume_of_a_finished_run_does_nothing(two_ranks):
    folder, _ = two_ranks
    for outcome in outcomes(folder, "finished", 2):
        assert (outcome.error, outcome.steps) == (None, [])
    assert (folder / "finished.metrics.jsonl").read_bytes() == (folder / "earlier.metrics.jsonl").read_bytes()
    assert weights(folder / "stopped") == weights(folder / "whole")


@pytest.mark.parametrize(
    ("name", "field"),
    [("other_seed", "train.seed=42"), ("other_data", "the training data="), ("other_reference", "the reference=")],
)
def test_checkpoint_of_another_run_is_refused_on_every_rank(two_ranks, name, field):
    folder, _ = two_ranks
    for outcome in outcomes(folder, name, 2):
        assert (outcome.error, outcome.exit_code, outcome.steps) == ("CheckpointError", 2, [])
        assert "belongs to another run" in outcome.message and field in outcome.message
    assert (folder / f"{name}.metrics.jsonl").read_bytes() == (folder / "continued.metrics.jsonl").read_bytes()


# ---- one rank: whole replicas, and bfloat16 with float32 master weights


@pytest.mark.parametrize("settings", [{}, BFLOAT16], ids=["float32 ZeRO-0", "bfloat16 ZeRO-2"])
def test_one_rank_killed_after_lines_past_its_checkpoint(tmp_path, settings):
    only_rank()
    for name in ("whole", "killed"):
        write_config(tmp_path, name, **settings)
    process = run_actions(tmp_path, 1, Action("first", str(tmp_path / "killed.yaml"), kill_at=8))
    assert process.returncode == -9, process.stderr[-5000:]
    before = reproducible(tmp_path / "killed" / "metrics.jsonl")
    assert max(line["step"] for line in before) == 8 > SAVED_AT

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launched process had: the order of sums
    try:
        for name in ("whole", "killed"):
            assert perform(Action(name, str(tmp_path / f"{name}.yaml")), tmp_path, 0).error is None
    finally:
        torch.set_num_threads(threads)
    assert trained_steps(outcomes(tmp_path, "killed", 1)[0]) == [5, 6, 7, 8]
    require_equal_runs(tmp_path, "whole", "killed")
