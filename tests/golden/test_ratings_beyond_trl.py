"""What TRL's `KTOTrainer` does not do: `bco`, pairs as ratings, and ratings beside pairs, through whole runs.

Against plain torch in float64, one sequence at a time, with the formulas of the papers written here.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.forking import fork_ranks
from tests.golden.ratings import PER_STEP, STEPS, rated_rows
from tests.golden.test_ratings import rated_config
from tests.golden.trajectories import FOLDER, REWARD_ABSOLUTE, lines_of
from tests.invariance.stories import write_request
from tests.launching import succeeded

RELATIVE = 1e-4
BETA = 0.4


@dataclass(frozen=True)
class Item:
    """A prompt with completions that are good or bad, or with a pair: the chosen one first."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    good: tuple[bool, ...] = ()  # empty: a pair
    weight: float = 1.0


def log_probability(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None]).sum()


class Plain:
    """A policy and its reference, trained step by step."""

    def __init__(self) -> None:
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float64)
            for name in ("tiny_policy", "tiny_reference")
        )
        self.seen: list[float] = []
        self.longest = 0

    def ratio(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            known = log_probability(self.reference, prompt, completion)
        return log_probability(self.policy, prompt, completion) - known

    @torch.no_grad()
    def strangers(self, items: list[Item]) -> float:
        """KTO's z: every prompt with a completion of the rated one before it, in turns, cut where it is too long."""
        rated = [item for item in items if item.good]
        ratios: list[Tensor] = []
        for k, item in enumerate(rated):
            foreign = rated[k - 1].completions[k % len(rated[k - 1].completions)]
            ratios.append(self.ratio(item.prompt, foreign[: self.longest - len(item.prompt)]))
        return max(0.0, float(torch.stack(ratios).mean()))

    def run(self, items: list[Item], names: list[str]) -> Iterator[dict[str, float]]:
        optimizer = torch.optim.AdamW(self.policy.parameters(), 1e-3, (0.9, 0.999), eps=1e-8, weight_decay=0)
        self.longest = max(len(item.prompt) + len(ids) for item in items for ids in item.completions)
        for step in range(STEPS):
            part = items[step * PER_STEP : (step + 1) * PER_STEP]
            value, baseline = self.loss(part, names)
            optimizer.zero_grad()
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            optimizer.step()
            yield {"loss": float(value.detach()), "grad_norm": float(norm), "rewards/baseline": BETA * baseline}

    def loss(self, items: list[Item], names: list[str]) -> tuple[Tensor, float]:
        ratios = [[self.ratio(item.prompt, ids) for ids in item.completions] for item in items]
        value = torch.zeros((), dtype=torch.float64)
        pairs = [r for item, r in zip(items, ratios, strict=True) if not item.good]
        if pairs:
            assert "sigmoid" in names
            value = value + torch.stack([-F.logsigmoid(BETA * (c - r)) for c, r in pairs]).mean()
        rated = [
            (ratio, 1 if good else -1, item.weight)
            for item, all_ratios in zip(items, ratios, strict=True)
            for ratio, good in zip(all_ratios, item.good, strict=False)
        ]
        if not rated:
            return value, 0.0
        if "bco" in names:
            self.seen += [float(ratio.detach()) for ratio, _, _ in rated]
            baseline = sum(self.seen) / len(self.seen)
            losses = [-w * F.logsigmoid(y * BETA * (ratio - baseline)) for ratio, y, w in rated]
        else:
            baseline = self.strangers(items)
            losses = [w * (1 - torch.sigmoid(y * BETA * (ratio - baseline))) for ratio, y, w in rated]
        return value + torch.stack(losses).sum() / sum(w for _, _, w in rated), baseline


def single(row: dict[str, Any]) -> Item:
    return Item(tuple(row["prompt_ids"]), (tuple(row["completion_ids"]),), (row["label"],))


def pair_rows() -> list[dict[str, Any]]:
    return list(map(json.loads, (FOLDER / "pairs.jsonl").read_text().splitlines()))


def pair(row: dict[str, Any], good: tuple[bool, ...]) -> Item:
    return Item(tuple(row["prompt_ids"]), (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])), good)


def lopsided_rows() -> list[dict[str, Any]]:
    """Long prompts with short completions beside short ones with long ones: crossed, they fit into no micro-batch."""
    ids = [3 + k * k % 121 for k in range(400)]
    sizes = [(100, 5) if k % 2 else (4, 90) for k in range(STEPS * PER_STEP)]
    return [
        {"prompt_ids": ids[k : k + p], "completion_ids": ids[2 * k + p : 2 * k + p + c], "label": k % 3 == 0}
        for k, (p, c) in enumerate(sizes)
    ]


def stories() -> dict[str, tuple[list[str], list[dict[str, Any]], list[Item]]]:
    """Of each run its losses, its rows, and what they are to become."""
    rated, pairs = rated_rows(), pair_rows()
    weighted = [row | {"weight": 1.0 + k % 3} for k, row in enumerate(pairs)]
    # Pairs come first: what is only rated waits for a completion of the other kind.
    mixed = [*pairs[:12], *rated[12:]]
    as_items = [*(pair(row, ()) for row in pairs[:12]), *(single(row) for row in rated[12:])]
    order = [k for step in range(STEPS) for k in (2 * step, 2 * step + 1, 12 + 2 * step, 13 + 2 * step)]
    split = [pair(row, (True, False)) for row in pairs]
    return {
        "bco": (["bco"], rated, [single(row) for row in rated]),
        "lopsided": (["kto"], lopsided_rows(), [single(row) for row in lopsided_rows()]),
        "weighted": (["kto"], weighted, [replace(item, weight=1.0 + k % 3) for k, item in enumerate(split)]),
        "pairs": (["kto"], pairs, split),
        "pairs_bco": (["bco"], pairs, split),
        "mixed": (["sigmoid", "kto"], mixed, as_items),
        "mixed_steps": (["sigmoid", "bco"], [mixed[k] for k in order], as_items),
    }


def _in_two_parts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same run stopped after half of its steps, and gone on."""
    half = copy.deepcopy(config)
    half["train"] |= {"output_dir": config["train"]["output_dir"] + "-parts", "max_steps": STEPS // 2}
    half["checkpoint"] = {"save_steps": STEPS // 2, "resume": "auto"}
    rest = copy.deepcopy(half)
    rest["train"]["max_steps"] = STEPS
    return {"half": half, "rest": rest}


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids="ranks{0[0]}-stage{0[1]}".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    num_ranks, stage = request.param
    folder = tmp_path_factory.mktemp("beyond")
    configs = {}
    for name, (losses, rows, _) in stories().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loss_type: Any = losses[0] if len(losses) == 1 else losses
        config = rated_config(folder, name, stage, 4096 if num_ranks == 1 else 130, loss_type=loss_type, beta=BETA)
        config["data"]["train"] = [{"path": str(folder / f"{name}.jsonl")}]
        configs[name] = config
    configs |= _in_two_parts(configs["bco"])
    write_request(folder / "request.json", configs)
    succeeded(fork_ranks(num_ranks, "tests.invariance.worker", str(folder), cwd=folder, timeout=300))
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", stories())
def test_the_run_equals_plain_torch(finished: Path, name: str) -> None:
    seen = json.loads((finished / f"{name}.rank0.json").read_text())
    assert "error" not in seen, seen["error"]
    losses, _, items = stories()[name]
    lines = lines_of(finished / name)
    assert len(lines) == STEPS
    for line, expected in zip(lines, Plain().run(items, losses), strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(line[key], expected[key], rel_tol=RELATIVE), (line["step"], key, line[key], expected)
        found = line.get("rewards/baseline", 0.0)
        assert math.isclose(found, expected["rewards/baseline"], rel_tol=RELATIVE, abs_tol=REWARD_ABSOLUTE)


def test_a_run_goes_on_with_the_mean_that_it_had(finished: Path) -> None:
    whole, parts = (
        [{key: line[key] for key in ("step", "loss", "grad_norm", "rewards/baseline")} for line in lines_of(folder)]
        for folder in (finished / "bco", finished / "bco-parts")
    )
    assert whole == parts
    assert whole[-1]["rewards/baseline"] != 0
