"""Sums over a logging interval, and the means that are written of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.metrics.sums import COUNTS, HEALTH, OF_ENTRIES, PER_PAIR, PER_TOKEN, SUMS, loss_of

_OF_AN_ENTRY = re.compile(rf"data\.train\.\d+/({'|'.join(OF_ENTRIES)})")


class Window:
    """Sums over the steps since the last written line."""

    def __init__(self, sums: Mapping[str, float] | None = None, num_steps: int = 0, num_skipped: int = 0) -> None:
        self.sums: dict[str, float] = dict(sums or {})
        self.num_steps = num_steps
        self.num_skipped = num_skipped  # steps that were left out

    def add(self, step_values: Mapping[str, float]) -> None:
        """Add the sums of one step."""
        self.num_steps += 1
        for name, value in step_values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of an interval that is not over; JSON keeps every bit of a float."""
        return {"num_steps": self.num_steps, "num_skipped": self.num_skipped, "sums": dict(self.sums)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Window":
        """What `to_json` gave.

        Raises:
            ValueError: it is something else, of another version for instance.
        """
        form = {"num_steps": int, "num_skipped": int, "sums": dict}
        if {name: type(value) for name, value in ({"num_skipped": 0} | dict(values)).items()} != form:
            raise ValueError(f"a logging interval has num_steps and sums, not {', '.join(sorted(values))}")
        for name, value in values["sums"].items():
            if not (name in (*SUMS, *COUNTS) or _OF_AN_ENTRY.fullmatch(name)) or type(value) not in (int, float):
                raise ValueError(f"a logging interval has no sum {name}={value}; another version of dpo-dist wrote it")
        return cls(
            {name: float(value) for name, value in values["sums"].items()},
            values["num_steps"],
            values.get("num_skipped", 0),
        )

    def means(self, has_reference: bool = True) -> dict[str, float]:
        """Loss per unit of weight, everything else per pair, or per token where statistics were asked for.

        What there are no pairs or tokens of is left out, and without a reference the distance from it.
        """
        if not self.sums:
            return {}
        denominators = {**dict.fromkeys(PER_PAIR, "num_pairs"), **PER_TOKEN}
        if has_reference:
            denominators |= HEALTH
        means = {
            name: self.sums[name] / self.sums[count] for name, count in denominators.items() if self.sums.get(count)
        }
        return {"loss": loss_of(self.sums), **means, **self._of_rated()}

    def _of_rated(self) -> dict[str, float]:
        """Of completions that are called good or bad: under TRL's names, or their own beside those of pairs."""
        numbers = {kind: self.sums.get(f"num_{kind}", 0.0) for kind in ("desirable", "undesirable")}
        if not any(numbers.values()):
            return {}
        means = {
            f"{what}/{kind}": self.sums[f"{what}/{kind}"] / number
            for what in ("rewards", "logps")
            for kind, number in numbers.items()
            if number
        }
        baseline = {"rewards/baseline": self.sums["rewards/baseline"] / sum(numbers.values())}
        if self.sums["num_pairs"]:
            return means | baseline
        if all(numbers.values()):
            means["rewards/margins"] = means["rewards/desirable"] - means["rewards/undesirable"]
        return {
            name.replace("/undesirable", "/rejected").replace("/desirable", "/chosen"): value
            for name, value in means.items()
        } | baseline

    def of_entries(self, names: Sequence[str]) -> dict[str, float]:
        """The means of each entry of data.train by its name, and how many pairs they are of; none of a single one.

        Args:
            names: of all entries.
        """
        found: dict[str, float] = {}
        for entry, name in enumerate(names):
            sums = {key: self.sums.get(f"data.train.{entry}/{key}", 0.0) for key in OF_ENTRIES}
            if number := sums.pop("num_pairs"):
                found |= {f"{name}/{key}": value / number for key, value in sums.items()}
                found[f"{name}/num_pairs"] = int(number)
        return found

    def counts(self) -> dict[str, int]:
        """Token counts of the interval, and the steps that were left out, if any."""
        skipped = {"skipped_steps": self.num_skipped} if self.num_skipped else {}
        return {name: int(self.sums[name]) for name in COUNTS if name in self.sums} | skipped
