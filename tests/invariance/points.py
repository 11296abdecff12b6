"""Combinations of switches that must not change a trajectory, and a small set of them that covers every pair.

A fault that needs two switches at once (checkpointing under stage 3, say) shows in a set in which every value of a
switch meets every value of each other switch: about 20 points instead of the 640 of the full product.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations, product
from pathlib import Path
from typing import Any

from tests.golden.trajectories import CASES, Case, case_config, load_case, load_rows

LARGE = 4096  # tokens: room for a whole step


@dataclass(frozen=True)
class Point:
    """One run of one recorded case."""

    case: str
    stage: int
    world_size: int
    small_batches: bool  # packing.max_tokens has room for the longest example and no more
    small_reference_bins: bool  # the same of packing.reference_max_tokens
    sharing: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """Test id and folder name."""
        words = [
            self.case,
            f"stage{self.stage}",
            f"ranks{self.world_size}",
            "small" if self.small_batches else "large",
            "smallref" if self.small_reference_bins else "largeref",
            "shared" if self.sharing else "unshared",
            "recompute" if self.checkpointing else "keep",
        ]
        return "-".join(words)

    @property
    def smallest_budget(self) -> int:
        """Tokens of the longest example: no smaller budget is possible."""
        return max(row.input_tokens(self.sharing) for row in load_rows())

    @property
    def max_tokens(self) -> int:
        """Budget of a micro-batch."""
        return self.smallest_budget if self.small_batches else LARGE

    @property
    def reference_max_tokens(self) -> int:
        """Budget of a reference bin."""
        return self.smallest_budget if self.small_reference_bins else LARGE

    @property
    def recorded(self) -> Case:
        """What the run must equal."""
        return load_case(self.case)

    def config(self, output_dir: Path) -> dict[str, Any]:
        """The run's configuration."""
        config = case_config(self.recorded, output_dir)
        config["model"]["prefix_sharing"] = "on" if self.sharing else "off"
        config["model"]["gradient_checkpointing"] = self.checkpointing
        config["packing"] = {"max_tokens": self.max_tokens, "reference_max_tokens": self.reference_max_tokens}
        config["parallel"]["deepspeed"] = f"zero{self.stage}_cpu"
        return config


FACTORS: dict[str, Sequence[Any]] = {
    "case": CASES,
    "stage": (0, 1, 2, 3),
    "world_size": (1, 2),
    "small_batches": (True, False),
    "small_reference_bins": (True, False),
    "sharing": (True, False),
    "checkpointing": (True, False),
}
assert list(FACTORS) == [field.name for field in fields(Point)]

FULL_PRODUCT = tuple(Point(*values) for values in product(*FACTORS.values()))


def pairs_of(point: Point) -> set[tuple[int, Any, int, Any]]:
    """Every two switches of a point with their values."""
    return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(astuple(point)), 2)}


def all_pairs() -> set[tuple[int, Any, int, Any]]:
    """Every two values of two different switches."""
    numbered = enumerate(FACTORS.values())
    return {(i, a, j, b) for (i, first), (j, second) in combinations(numbered, 2) for a, b in product(first, second)}


def covering_set() -> tuple[Point, ...]:
    """Points that together hold every pair of values.

    Greedily the point with most new pairs; among equals the one whose values were used least, then the first.
    """
    candidates = {point: pairs_of(point) for point in FULL_PRODUCT}
    missing, chosen, uses = all_pairs(), [], Counter[tuple[int, Any]]()
    while missing:
        gain = {point: (len(pairs & missing), -_times_used(point, uses)) for point, pairs in candidates.items()}
        best = max(gain, key=lambda point: gain[point])
        missing -= candidates.pop(best)
        uses.update(enumerate(astuple(best)))
        chosen.append(best)
    return tuple(chosen)


def _times_used(point: Point, uses: Counter[tuple[int, Any]]) -> int:
    return sum(uses[item] for item in enumerate(astuple(point)))
