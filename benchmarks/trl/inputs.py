"""The examples of a comparison: rows of a file as `dpo-dist` tokenises them, or random tokens with random lengths.

All are token ids in the end, so that both sides read the same, whatever their tokenizers would do.
"""

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trl.operations import Lengths
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset

SYNTHETIC = "synthetic:"
# Medians of prompt and completion, tokens; their logarithms are normal with these deviations, roughly as in chat data.
DISTRIBUTIONS = {"chat": (80, 200), "long-prompts": (600, 100), "even": (200, 200)}
PROMPT_SIGMA, COMPLETION_SIGMA, SHORTEST = 0.9, 0.7, 8
FIRST_TOKEN = 100  # ids below it are special ones in most vocabularies


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completions, and which are compared: (chosen, rejected)."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> Lengths:
        """Its tokens."""
        return Lengths(len(self.prompt), tuple(map(len, self.completions)))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longest completion."""
        return len(self.prompt) + max(map(len, self.completions))

    def as_row(self) -> dict[str, Any]:
        """A row for `dpo-dist`; of more than two completions, all pairs."""
        if self.pairs == ((0, 1),) and len(self.completions) == 2:
            return {"prompt_ids": self.prompt, "chosen_ids": self.completions[0], "rejected_ids": self.completions[1]}
        wins = [sum(chosen == index for chosen, _ in self.pairs) for index in range(len(self.completions))]
        return {"prompt_ids": self.prompt, "completions_ids": self.completions, "scores": wins}

    def as_pairs(self) -> list[dict[str, Any]]:
        """Rows for TRL: one for each pair, each with the prompt."""
        return [
            {"prompt_ids": self.prompt, "chosen_ids": self.completions[a], "rejected_ids": self.completions[b]}
            for a, b in self.pairs
        ]


def read_examples(path: str, tokenizer: Path, cache_dir: Path, max_length: int) -> list[Example]:
    """Examples of a file in any form that `dpo-dist` reads; over-long and faulty rows are left out.

    Of ranked rows those are kept that have as many completions as most, no two of them equally good: then every step
    has as many pairs as every other one, and the mean over pairs is the same however they are batched.
    """
    data = DataConfig(train=[DataSource(path=path)], max_length=max_length, truncation_mode="drop", on_bad_row="skip")
    dataset = prepare_dataset(data.train, data, TokenizerSpec(str(tokenizer)), cache_dir / "data")
    found = [
        Example(one.prompt_ids, one.completion_ids, tuple((pair.chosen, pair.rejected) for pair in one.pairs))
        for one in (dataset[row] for row in range(len(dataset)))
    ]
    most = statistics.mode(len(one.completions) for one in found)
    return [one for one in found if len(one.completions) == most and len(one.pairs) == math.comb(most, 2)]


def random_examples(distribution: str, number: int, vocabulary: int, max_length: int) -> list[Example]:
    """Pairs of random tokens, the same every time.

    Args:
        distribution: a name out of `DISTRIBUTIONS`, or the medians of prompt and completion, such as `80,200`.
        number: of pairs.
        vocabulary: token ids are below it.
        max_length: of prompt and completion together, tokens.

    Raises:
        ValueError: there is no such distribution.
    """
    medians = DISTRIBUTIONS.get(distribution) or tuple(int(part) for part in distribution.split(","))
    if len(medians) != 2 or min(medians) < SHORTEST:
        raise ValueError(f"{distribution} is none of {', '.join(DISTRIBUTIONS)}, and not two medians such as 80,200")
    source = random.Random(0)

    def ids(median: int, sigma: float, longest: int) -> tuple[int, ...]:
        length = min(max(round(source.lognormvariate(math.log(median), sigma)), SHORTEST), longest)
        return tuple(source.randrange(FIRST_TOKEN, vocabulary) for _ in range(length))

    def example() -> Example:
        prompt = ids(medians[0], PROMPT_SIGMA, max_length * 3 // 4)
        rest = max_length - len(prompt)
        return Example(prompt, tuple(ids(medians[1], COMPLETION_SIGMA, rest) for _ in range(2)), ((0, 1),))

    return [example() for _ in range(number)]


def sort_by_length(examples: Sequence[Example], warm_up: int) -> list[Example]:
    """The longest first, behind the examples of the warm-up: those that are timed are the same in both orders."""
    return [*examples[:warm_up], *sorted(examples[warm_up:], key=lambda one: -one.longest)]


def write_rows(folder: Path, order: str, examples: Sequence[Example]) -> None:
    """`ours-<order>.jsonl`, a row for each example, and `trl-<order>.jsonl`, one for each pair."""
    ours = [one.as_row() for one in examples]
    theirs = [row for one in examples for row in one.as_pairs()]
    for name, rows in (("ours", ours), ("trl", theirs)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}-{order}.jsonl").write_text(text, encoding="utf-8")


def padding(examples: Sequence[Example], per_step: int) -> float:
    """Tokens that TRL computes, every pair of a step padded to the step's longest, over those to read."""
    steps = [examples[start : start + per_step] for start in range(0, len(examples) - per_step + 1, per_step)]
    padded = sum(2 * sum(len(one.pairs) for one in step) * max(one.longest for one in step) for step in steps)
    return padded / sum(one.lengths.inputs for step in steps for one in step)


def describe(examples: Sequence[Example]) -> dict[str, Any]:
    """What a page says about the examples: numbers of them, and quantiles of lengths in tokens."""
    prompts = sorted(len(one.prompt) for one in examples)
    completions = sorted(len(ids) for one in examples for ids in one.completions)
    return {
        "examples": len(examples),
        "pairs": sum(len(one.pairs) for one in examples),
        "prompt": _quantiles(prompts),
        "completion": _quantiles(completions),
        "tokens": sum(one.lengths.inputs for one in examples),
    }


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    return {"mean": statistics.mean(lengths), "50%": statistics.median(lengths), "longest": lengths[-1]}
