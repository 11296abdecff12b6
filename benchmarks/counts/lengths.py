"""Where lengths come from: a run's own data, or random ones around the medians of a data set.

The medians are those of table 1 of Wang and Hegde (arXiv:2410.20305): overall length, and prompt over completion. The
paper does not say how lengths spread, nor whether the overall length holds one completion or two. Here it is read as a
prompt with one completion, and the logarithms of lengths are normal around the medians. Both are assumptions.
"""

import re
from dataclasses import dataclass

import numpy as np

from dpo_dist.cli.prepare import prepare
from dpo_dist.cli.starting import cache_dir
from dpo_dist.config import load_config
from dpo_dist.data import Pair
from dpo_dist.errors import ConfigError
from dpo_dist.packing import ExampleSize, sizes_of

PAPER = {
    "capybara": (1160, 1.59),
    "hh-rlhf": (186, 2.15),
    "metamath": (872, 3.91),
    "tldr": (416, 11.14),
    "helpsteer": (775, 6.34),
    "ultrafeedback": (409, 0.42),
}
MEDIANS = "medians:"
ALIKE = 0.5  # correlation of the logarithms of a pair's two completions


@dataclass(frozen=True)
class Data:
    """Lengths, and the token budgets that they are packed under."""

    name: str
    sizes: list[ExampleSize]
    max_tokens: int  # of a micro-batch
    reference_max_tokens: int  # of a bin of our reference
    seed: int  # of the order of examples


@dataclass(frozen=True)
class Spread:
    """How random lengths are drawn.

    Args:
        sigma: standard deviation of the logarithm of a prompt's and of a completion's length.
        longest: tokens of a prompt with its longer completion; longer examples are left out.
        rows: examples.
        seed: of all draws.
    """

    sigma: float = 0.6
    longest: int = 4096
    rows: int = 4000
    seed: int = 42


def of_run(config_file: str, overrides: list[str]) -> Data:
    """Lengths of a run's training data, tokenised as the run does, and its token budgets."""
    config = load_config(config_file, overrides)
    prepared = prepare(config, cache_dir())
    packing = config.packing
    return Data(
        config_file.rsplit("/", 1)[-1].removesuffix(".yaml"),
        sizes_of(prepared.dataset, range(len(prepared.dataset))),
        packing.max_tokens,
        packing.reference_max_tokens or 2 * packing.max_tokens,
        config.train.seed,
    )


def is_medians(name: str) -> bool:
    """Whether `name` stands for medians, and not for a run's configuration."""
    return name in PAPER or name.startswith(MEDIANS)


def of_medians(name: str, spread: Spread, max_tokens: int) -> Data:
    """Random lengths around the medians of one of the paper's data sets, or of `medians:LENGTH,RATIO`.

    Raises:
        ConfigError: not two positive numbers, or hardly any length would be short enough.
    """
    if name in PAPER:
        overall, ratio = PAPER[name]
    else:
        found = re.fullmatch(r"medians:(\d+\.?\d*),(\d+\.?\d*)", name)
        overall, ratio = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    if not (overall > 0 and ratio > 0):
        raise ConfigError(f"{name} is not medians:LENGTH,RATIO; write two positive numbers, such as medians:409,0.42")
    if spread.sigma < 0 or spread.longest < overall:
        raise ConfigError(f"longest={spread.longest} is below the median {overall:g} of {name}, or sigma is negative")
    return Data(name, drawn(overall, ratio, spread), max_tokens, 2 * max_tokens, spread.seed)


def drawn(overall: float, ratio: float, spread: Spread) -> list[ExampleSize]:
    """Pairs with random lengths.

    Args:
        overall: median tokens of a prompt with one completion.
        ratio: prompt over completion.
        spread: around the medians.
    """
    draw = np.random.default_rng(spread.seed)
    prompt, completion = overall * ratio / (1 + ratio), overall / (1 + ratio)
    sizes: list[ExampleSize] = []
    while len(sizes) < spread.rows:
        own, both, *each = draw.standard_normal(4)
        ends = [ALIKE**0.5 * both + (1 - ALIKE) ** 0.5 * one for one in each]
        length = _tokens(prompt, spread.sigma * own)
        chosen, rejected = (_tokens(completion, spread.sigma * end) for end in ends)
        if length + max(chosen, rejected) <= spread.longest:
            sizes.append(ExampleSize(length, (chosen, rejected), (Pair(0, 1),)))
    return sizes


def _tokens(median: float, deviation: float) -> int:
    return max(1, round(median * float(np.exp(deviation))))
