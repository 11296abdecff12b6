"""Real rankings, 600 prompts with four completions each: counted by hand, and trained on to the end of an epoch.

With SmolLM2's tokenizer and chat template, on a model of a few thousand weights: what is shown is what is computed, not
what is learnt.
"""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_dist.cli import cache_dir
from dpo_dist.demo import demo_model_folder
from tests.forking import fork_ranks
from tests.golden.trajectories import lines_of
from tests.launching import REPOSITORY, succeeded

RANKED = REPOSITORY.parent / "shared" / "data" / "ranked_completions.jsonl.gz"
PER_STEP = 64

pytestmark = [
    pytest.mark.skipif(not RANKED.is_file(), reason="needs ../shared/data"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """As messages, so that the chat template is put around them."""
    with gzip.open(RANKED, "rt", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    assert len(raw) == 600 and all(len(row["completions"]) == len(row["scores"]) == 4 for row in raw)
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [{"role": "assistant", "content": text} for text in row["completions"]],
            "scores": row["scores"],
        }
        for row in raw
    ]


def closed_forms(rows: list[dict[str, Any]], folder: Path) -> list[tuple[int, int, int]]:
    """(tokens processed, tokens unshared, pairs) of each prompt, from lengths alone: P + sum of (C - 1), and
    2 P + C + R for each two distinct completions of different score."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        prompt = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        whole = [
            len(tokenizer.apply_chat_template([*row["prompt"], completion])["input_ids"])
            for completion in row["completions"]
        ]
        lengths = [length - prompt for length in whole]
        # Where two models answered with the same words, they were given the same score: one completion.
        texts = [completion["content"] for completion in row["completions"]]
        distinct = [k for k in range(4) if texts.index(texts[k]) == k]
        pairs = [(i, j) for i, j in itertools.combinations(distinct, 2) if row["scores"][i] != row["scores"][j]]
        used = {end for pair in pairs for end in pair}
        processed = prompt + sum(lengths[k] - 1 for k in used)
        found.append((processed, sum(2 * prompt + lengths[i] + lengths[j] for i, j in pairs), len(pairs)))
    return found


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model_folder(cache_dir())


@pytest.fixture(scope="module")
def forms(rows: list[dict[str, Any]], folder: Path) -> list[tuple[int, int, int]]:
    return closed_forms(rows, folder)


def test_sharing_saves_more_than_two_thirds(forms: list[tuple[int, int, int]]) -> None:
    processed, unshared, _ = (sum(numbers) for numbers in zip(*forms, strict=True))
    assert unshared / processed >= 3.4


@pytest.mark.thorough
@pytest.mark.parametrize("num_steps", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_an_epoch_of_all_pairs(
    rows: list[dict[str, Any]], forms: list[tuple[int, int, int]], folder: Path, tmp_path: Path, num_steps: int
) -> None:
    """128 prompts, or all of them in ten steps, the last one shorter."""
    rows, forms = rows[: num_steps * PER_STEP], forms[: num_steps * PER_STEP]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, max_position_embeddings=8192, **size)).save_pretrained(model)
    config = {
        "model": {"model_name_or_path": str(model), "tokenizer_name_or_path": str(folder), "dtype": "float32"},
        "data": {"train": [{"path": str(tmp_path / "ranked.jsonl")}], "pairing": "all"},
        "train": {"output_dir": str(tmp_path / "run"), "examples_per_step": PER_STEP, "shuffle": False},
        "reference": {"source": "live"},
        "parallel": {"deepspeed": "zero3_cpu"},
        "packing": {"max_tokens": 8192},
        "checkpoint": {"save_steps": 0},
        "log": {"logging_steps": 2, "report_to": []},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    succeeded(fork_ranks(2, "dpo_dist", "train", "run.yaml", cwd=tmp_path, timeout=800))
    lines = lines_of(tmp_path / "run")
    steps = [forms[start : start + PER_STEP] for start in range(0, len(forms), PER_STEP)]
    assert len(steps) == num_steps
    for line, logged in zip(lines, zip(steps[::2], steps[1::2], strict=True), strict=True):
        counted = [sum(numbers) for numbers in zip(*itertools.chain.from_iterable(logged), strict=True)]
        assert [line["tokens_processed"], line["tokens_unshared"]] == counted[:2]
    processed, unshared, num_pairs = (sum(numbers) for numbers in zip(*forms, strict=True))
    assert sum(line["tokens_processed"] for line in lines) == processed == lines[-1]["num_tokens"]
    assert sum(line["tokens_unshared"] for line in lines) == unshared
    state = json.loads((tmp_path / f"run/checkpoints/step-{num_steps:06d}/state.json").read_text())
    assert state["pairs_seen"] == num_pairs
