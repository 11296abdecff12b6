"""Many completions, weights, margins and soft labels through whole runs, against plain torch in float64.

One sequence at a time, every loss from the rows themselves with formulas written here; no pair, segment or packing.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, RELATIVE, base_config, lines_of
from tests.invariance.stories import write_request
from tests.launching import succeeded

BETA, ALPHA, STEPS, PER_STEP, RATE = 0.4, 0.3, 4, 6, 1e-3
Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A row with what the two models say of its completions."""

    row: Row
    ratios: Sequence[Tensor]  # log pi_policy - log pi_reference of each completion
    logps: Sequence[Tensor]


def ids(draw: random.Random, longest: int) -> list[int]:
    return [draw.randrange(3, 128) for _ in range(draw.randint(1, longest))]


def ranked_rows() -> list[Row]:
    """Two to five completions with scores that may tie, and a weight."""
    draw, rows = random.Random(11), []
    while len(rows) < STEPS * PER_STEP:
        count = draw.randint(2, 5)
        scores = [draw.randint(0, 3) / 2 for _ in range(count)]
        if len(set(scores)) > 1:
            completions = [ids(draw, 12) for _ in range(count)]
            rows.append({"prompt_ids": ids(draw, 20), "completions_ids": completions, "scores": scores})
            rows[-1] |= {"weight": draw.choice([0.5, 1.0, 3.0])}
    return rows


def labelled_rows() -> list[Row]:
    """Pairs that are more or less sure, by a larger or smaller margin."""
    draw = random.Random(12)
    return [
        {
            "prompt_ids": ids(draw, 20),
            "chosen_ids": ids(draw, 12),
            "rejected_ids": ids(draw, 12),
            "weight": draw.choice([0.5, 1.0, 2.0]),
            "margin": draw.choice([-1.0, 0.0, 2.0]),
            "chosen_probability": draw.choice([0.4, 0.8, 1.0]),
        }
        for _ in range(STEPS * PER_STEP)
    ]


def completions_of(row: Row) -> list[list[int]]:
    return row.get("completions_ids") or [row["chosen_ids"], row["rejected_ids"]]


def compared(one: Scored) -> list[tuple[int, int]]:
    scores = one.row["scores"]
    return [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]]


def plackett_luce(step: Sequence[Scored]) -> Tensor:
    """Of each example the completions from the best down, each against itself and all that are worse."""
    total = torch.zeros((), dtype=torch.float64)
    for one in step:
        for i in range(len(one.ratios)):
            worse = [j for j in range(len(one.ratios)) if one.row["scores"][j] < one.row["scores"][i]]
            field = torch.stack([BETA * one.ratios[k] for k in (i, *worse)])
            total = total - one.row["weight"] * (field[0] - field.exp().sum().log())
    return total / sum(one.row["weight"] for one in step)


def all_pairs(step: Sequence[Scored], alpha: float = 0.0) -> Tensor:
    losses, weights = [], []
    for one in step:
        for i, j in compared(one):
            margin = BETA * (one.ratios[i] - one.ratios[j]) - alpha * (one.row["scores"][i] - one.row["scores"][j])
            losses.append(-one.row["weight"] * F.logsigmoid(margin))
            weights.append(one.row["weight"])
    return torch.stack(losses).sum() / sum(weights)


def offset(step: Sequence[Scored]) -> Tensor:
    return all_pairs(step, ALPHA)


def best_and_rest_with_likelihood(step: Sequence[Scored]) -> Tensor:
    """The best against each other one, and the best one's likelihood per token; a completion counts with its pairs."""
    losses, weights, likelihood, tokens = [], 0.0, torch.zeros((), dtype=torch.float64), 0.0
    for one in step:
        best = max(one.row["scores"])
        for i, j in compared(one):
            if one.row["scores"][i] == best:
                weight = one.row["weight"]
                losses.append(-weight * F.logsigmoid(BETA * (one.ratios[i] - one.ratios[j])))
                weights += weight
                likelihood = likelihood - weight * one.logps[i]
                tokens += weight * len(completions_of(one.row)[i])
    return torch.stack(losses).sum() / weights + 0.5 * likelihood / tokens


def soft(step: Sequence[Scored]) -> Tensor:
    losses = []
    for one in step:
        m = BETA * (one.ratios[0] - one.ratios[1]) - ALPHA * one.row["margin"]
        p = 0.9 * one.row["chosen_probability"] + 0.1 * (1 - one.row["chosen_probability"])
        losses.append(-one.row["weight"] * (p * F.logsigmoid(m) + (1 - p) * F.logsigmoid(-m)))
    return torch.stack(losses).sum() / sum(one.row["weight"] for one in step)


Loss = Callable[[Sequence[Scored]], Tensor]
RANKED, LABELLED = ranked_rows(), labelled_rows()
RUNS: dict[str, tuple[list[Row], dict[str, Any], str, Loss]] = {
    "plackett_luce": (RANKED, {"loss_type": "plackett_luce"}, "list", plackett_luce),
    "all_pairs": (RANKED, {"loss_type": "sigmoid"}, "all", all_pairs),
    "odpo": (RANKED, {"loss_type": "sigmoid", "odpo_alpha": ALPHA}, "all", offset),
    "mpo": (RANKED, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, "best_vs_rest",
            best_and_rest_with_likelihood),
    "soft": (LABELLED, {"label_smoothing": 0.1, "odpo_alpha": ALPHA}, "all", soft),
}  # fmt: skip


def config_of(name: str, folder: Path) -> dict[str, Any]:
    rows, loss, pairing, _ = RUNS[name]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = base_config(folder / name)
    config["data"] = {"train": [{"path": str(path)}], "pairing": pairing}
    config["loss"] = {**loss, "beta": BETA}
    config["train"] |= {"examples_per_step": PER_STEP, "max_steps": STEPS, "learning_rate": RATE}
    return config


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids="ranks{0[0]}-stage{0[1]}".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs in one process group; two ranks get several micro-batches each."""
    num_ranks, stage = request.param
    folder = tmp_path_factory.mktemp("ranked")
    configs = {name: config_of(name, folder) for name in RUNS}
    for config in configs.values():
        config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
        config["packing"]["max_tokens"] = 4096 if num_ranks == 1 else 90
    write_request(folder / "request.json", configs)
    succeeded(fork_ranks(num_ranks, "tests.invariance.worker", str(folder), cwd=folder, timeout=300))
    return folder


def logp(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    tokens = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None]).sum()


def train_plainly(rows: list[Row], loss: Loss) -> Iterator[tuple[float, float, Sequence[Scored]]]:
    """Loss and gradient norm of every step."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float64)
        for name in ("tiny_policy", "tiny_reference")
    )
    optimizer = torch.optim.AdamW(policy.parameters(), RATE, (0.9, 0.999), eps=1e-8, weight_decay=0)
    for step in range(STEPS):
        scored = []
        for row in rows[step * PER_STEP :][:PER_STEP]:
            logps = [logp(policy, row["prompt_ids"], completion) for completion in completions_of(row)]
            with torch.no_grad():
                known = [logp(reference, row["prompt_ids"], completion) for completion in completions_of(row)]
            scored.append(Scored(row, [own - other for own, other in zip(logps, known, strict=True)], logps))
        value = loss(scored)
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        yield float(value.detach()), float(norm), scored


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", RUNS)
def test_the_run_equals_plain_torch(finished: Path, name: str) -> None:
    seen = json.loads((finished / f"{name}.rank0.json").read_text())
    assert "error" not in seen, seen["error"]
    rows, _, _, loss = RUNS[name]
    lines = lines_of(finished / name)
    assert len(lines) == STEPS
    for line, (value, norm, scored) in zip(lines, train_plainly(rows, loss), strict=True):
        assert math.isclose(line["loss"], value, rel_tol=RELATIVE), (line["step"], line["loss"], value)
        assert math.isclose(line["grad_norm"], norm, rel_tol=RELATIVE), (line["step"], line["grad_norm"], norm)
        if name in ("plackett_luce", "all_pairs"):
            _compare_health(line, scored)


def _compare_health(line: dict[str, Any], scored: Sequence[Scored]) -> None:
    """Distance from the reference: over completions, each once, and over pairs; and the two counts of tokens."""
    used = [(one, k) for one in scored for k in {end for pair in compared(one) for end in pair}]
    tokens = sum(len(completions_of(one.row)[k]) for one, k in used)
    kl = -sum(float(one.ratios[k].detach()) for one, k in used) / tokens
    assert math.isclose(line["kl"], kl, rel_tol=RELATIVE, abs_tol=1e-6)
    pairs = [(one, i, j) for one in scored for i, j in compared(one)]
    below = sum(float(one.ratios[i].detach()) < 0 for one, i, _ in pairs)
    assert line["displacement"] == pytest.approx(below / len(pairs))
    drift = 0
    for one, i, j in pairs:
        longer = len(completions_of(one.row)[i]) - len(completions_of(one.row)[j])
        if float(one.ratios[i].detach()) < float(one.ratios[j].detach()):
            drift += (longer < 0) - (longer > 0)
    assert line["length_drift"] == pytest.approx(drift / len(pairs))
    prompts = {id(one): len(one.row["prompt_ids"]) for one in scored}
    packed = sum(prompts.values()) + sum(len(completions_of(one.row)[k]) - 1 for one, k in used)
    ends = [(one, end) for one, i, j in pairs for end in (i, j)]
    assert line["tokens_processed"] == packed
    assert line["tokens_unshared"] == sum(prompts[id(one)] + len(completions_of(one.row)[end]) for one, end in ends)


# ---- a supervised run


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 0), (2, 3)])
def test_demonstrations_equal_plain_torch(tmp_path: Path, num_ranks: int, stage: int) -> None:
    """Prompts with one completion each and a weight; what is learnt is a mean over weighted tokens."""
    draw = random.Random(13)
    rows = [
        {"prompt_ids": ids(draw, 20), "completion_ids": ids(draw, 12), "weight": draw.choice([0.5, 1.0, 2.0])}
        for _ in range(STEPS * PER_STEP)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = base_config(tmp_path / "run")
    del config["reference"], config["model"]["reference_name_or_path"]
    config["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}]}
    config["data"]["evaluation"] = [{"path": str(tmp_path / "rows.jsonl"), "limit": 7}]
    config["loss"] = {"loss_type": "sft"}
    config["train"] |= {"examples_per_step": PER_STEP, "max_steps": STEPS, "learning_rate": RATE}
    config["packing"]["max_tokens"] = 4096 if num_ranks == 1 else 60
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    config["evaluation"] = {"eval_on_start": True, "metric_for_best_model": "loss", "eval_steps": STEPS}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = succeeded(fork_ranks(num_ranks, "dpo_dist", "train", "run.yaml", cwd=tmp_path, timeout=300))
    assert f"step 1/{STEPS}  loss " in done.stderr and "mean_token_accuracy" in done.stderr
    assert "rewards" not in done.stderr

    def loss(step: Sequence[Scored]) -> Tensor:
        total = -torch.stack([one.row["weight"] * one.logps[0] for one in step]).sum()
        return total / sum(one.row["weight"] * len(one.row["completion_ids"]) for one in step)

    plain = [{**row, "chosen_ids": row["completion_ids"], "rejected_ids": row["completion_ids"]} for row in rows]
    lines = lines_of(tmp_path / "run")
    for line, (value, norm, scored) in zip(lines, train_plainly(plain, loss), strict=True):
        assert math.isclose(line["loss"], value, rel_tol=RELATIVE)
        assert math.isclose(line["grad_norm"], norm, rel_tol=RELATIVE)
        sums = [(len(one.row["prompt_ids"]), len(one.row["completion_ids"])) for one in scored]
        assert line["tokens_processed"] == sum(prompt + completion - 1 for prompt, completion in sums)
        assert line["tokens_unshared"] == sum(prompt + completion for prompt, completion in sums)
        unknown = {"rewards/chosen", "logps/rejected", "logits/rejected", "kl", "tokens_padded", "pairs_per_second"}
        assert not unknown & line.keys()
    start = next(line for line in lines_of(tmp_path / "run", "evaluation") if line["step"] == 0)
    policy = AutoModelForCausalLM.from_pretrained(FOLDER / "tiny_policy", dtype=torch.float64)
    with torch.no_grad():
        first = [Scored(row, [], [logp(policy, row["prompt_ids"], row["completion_ids"])]) for row in rows[:7]]
    assert math.isclose(start["loss"], float(loss(first)), rel_tol=1e-5)
    assert start["num_examples"] == 7 and "num_pairs" not in start
