"""TRL's recorded trajectories: how to run a case, and whether a run equals it.

Nothing here imports the package: what is compared is what a run has written.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parent
CASES = ("sigmoid", "sigmoid_beta_0.5", "sigmoid_ga1", "sigmoid_ga2", "sigmoid_ga4")
LOSS_CASES = (
    *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
    *("forward_kl", "js_divergence", "alpha_divergence"),
    *("aot", "aot_unpaired", "sft", "mpo", "ld_dpo", "wpo"),
)
_LOSS_SETTINGS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
)
RELATIVE = 1e-4
# Adam divides a component of the first gradient by its own size, and in these two cases the clipped gradient has
# components of the size of Adam's epsilon, 1e-8: TRL's own rounding in float32 decided where they went. Not even exact
# arithmetic is within the tolerance above (test_loss_trajectories.py), to which the first step alone is held.
SLACK = {"sppo_hard": 10.0, "discopop": 30.0}
# A reward is the small difference of two log-probabilities of about -100 nats, times beta.
REWARD_ABSOLUTE = 5e-6
_CLOSE = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True)
class Case:
    """One recorded run."""

    name: str
    examples_per_step: int
    steps: int
    learning_rate: float
    loss: Mapping[str, Any]  # as the section `loss`
    logs: tuple[Mapping[str, float], ...]
    final_param_norms: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One of the recorded pairs, in tokens."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    def input_tokens(self, share_prompt: bool) -> int:
        """Tokens a packed forward runs for this pair: P + C - 1 + R - 1, plus P again if the prompt is not shared."""
        completions = len(self.chosen_ids) + len(self.rejected_ids) - 2
        return completions + len(self.prompt_ids) * (1 if share_prompt else 2)


@cache
def load_case(name: str) -> Case:
    """A recorded run by its name."""
    cases = {case["name"]: case for case in json.loads((FOLDER / "trl_trajectories.json").read_text())["cases"]}
    settings = cases[name]["settings"]
    loss = {key: settings[key] for key in _LOSS_SETTINGS if key in settings}
    if len(loss["loss_type"]) == 1:
        (loss["loss_type"],) = loss["loss_type"]
    return Case(
        name=name,
        examples_per_step=settings["pairs_per_step"],
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        loss=loss,
        logs=tuple(cases[name]["logs"]),
        final_param_norms=cases[name]["final_param_norms"],
    )


@cache
def load_rows() -> tuple[Row, ...]:
    """The recorded pairs, in order."""
    rows = map(json.loads, (FOLDER / "pairs.jsonl").read_text().splitlines())
    return tuple(Row(*(tuple(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))) for row in rows)


def base_config(output_dir: Path) -> dict[str, Any]:
    """What every run on the tiny models has in common; sections are new dicts, to be added to."""
    return {
        "model": {
            "model_name_or_path": str(FOLDER / "tiny_policy"),
            "reference_name_or_path": str(FOLDER / "tiny_reference"),
            "dtype": "float32",
        },
        "data": {"train": [{"path": str(FOLDER / "pairs.jsonl")}]},
        "loss": {},
        "train": {"output_dir": str(output_dir), "lr_scheduler_type": "constant", "shuffle": False},
        "packing": {"max_tokens": 4096},
        "parallel": {"deepspeed": "zero0_cpu"},
        "checkpoint": {"save_steps": 0},
        "reference": {"source": "live"},
        "log": {"report_to": []},
    }


def case_config(case: Case, output_dir: Path) -> dict[str, Any]:
    """The configuration under which a run must equal a case."""
    config = base_config(output_dir)
    config["loss"] = dict(case.loss)
    config["train"] |= {
        "examples_per_step": case.examples_per_step,
        "max_steps": case.steps,
        "learning_rate": case.learning_rate,
    }
    return config


def lines_of(output_dir: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl: the train lines, or those of another split."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("split") == split]


# TRL takes means over batches of what is a mean over tokens: comparable where a step is one batch.
TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
_SEVERAL_BATCHES = ("sigmoid_ga2", "sigmoid_ga4")
TOKEN_ABSOLUTE = 2e-5


def compare_step(line: Mapping[str, float], expected: Mapping[str, float], slack: float = 1.0) -> list[str]:
    """What is not equal in one line; `slack` times the tolerances of this file."""
    pairs = {key: (line[key], expected[key]) for key in (*_CLOSE, *_REWARDS)}
    wrong = [
        f"{key}={got!r}, recorded {want!r}"
        for key, (got, want) in pairs.items()
        if not math.isclose(got, want, rel_tol=slack * RELATIVE, abs_tol=slack * REWARD_ABSOLUTE * (key in _REWARDS))
    ]
    key = "rewards/accuracies"
    if line[key] != expected[key]:
        wrong.append(f"{key}={line[key]!r}, recorded {expected[key]!r}")
    return wrong


def compare_trajectory(
    lines: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], slack: float = 1.0
) -> list[str]:
    """What is not equal in a whole run; empty if the run equals the recorded one. The first step knows no slack."""
    if [line["step"] for line in lines] != list(range(1, len(expected) + 1)):
        return [f"steps {[line['step'] for line in lines]}, recorded 1 to {len(expected)}"]
    return [
        f"step {line['step']}: {difference}"
        for line, recorded in zip(lines, expected, strict=True)
        for difference in compare_step(line, recorded, 1.0 if line["step"] == 1 else slack)
    ]


def compare_tokens(lines: Sequence[Mapping[str, float]], case: Case) -> list[str]:
    """What is not equal in the means over tokens; within the slack of the case after the first step."""
    wrong = []
    for line, recorded in zip(lines, case.logs, strict=True):
        slack = 1.0 if line["step"] == 1 else SLACK.get(case.name, 1.0)
        wrong += [
            f"step {line['step']}: {key}={line[key]!r}, recorded {recorded[key]!r}"
            for key in TOKEN_METRICS
            if not math.isclose(line[key], recorded[key], rel_tol=slack * RELATIVE, abs_tol=slack * TOKEN_ABSOLUTE)
        ]
    return wrong


def compare_parameters(model_folder: Path, expected: Mapping[str, float]) -> list[str]:
    """What is not equal in the norms of an exported model's parameters."""
    norms: dict[str, float] = {}
    for path in sorted(model_folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            norms |= {name: float(file.get_tensor(name).to(torch.float64).norm()) for name in file.keys()}  # noqa: SIM118
    if norms.keys() != expected.keys():
        return [f"parameters {sorted(norms.keys() ^ expected.keys())} are in one of the two models only"]
    return [
        f"norm of {name} is {norms[name]!r}, recorded {expected[name]!r}"
        for name in expected
        if not math.isclose(norms[name], expected[name], rel_tol=RELATIVE)
    ]


def compare_run(output_dir: Path, case: Case) -> list[str]:
    """What is not equal between a finished run and a case: every step, and the exported model."""
    lines = lines_of(output_dir)
    return [
        *compare_trajectory(lines, case.logs, SLACK.get(case.name, 1.0)),
        *(compare_tokens(lines, case) if case.name not in _SEVERAL_BATCHES else ()),
        *compare_parameters(output_dir / "model", case.final_param_norms),
    ]
