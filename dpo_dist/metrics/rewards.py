"""The mean reward of everything that was trained on."""

from dataclasses import dataclass
from typing import Any


@dataclass
class RewardMean:
    """The log-ratios of all rated completions that were trained on, added up, in nats."""

    total: float = 0.0
    count: float = 0.0

    @property
    def value(self) -> float:
        """Their mean; 0 before there is any."""
        return self.total / self.count if self.count else 0.0

    def to_json(self) -> dict[str, float]:
        """What a checkpoint keeps; JSON keeps every bit of a float."""
        return {"total": self.total, "count": self.count}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RewardMean":
        """What `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        if not values:
            return cls()  # an earlier version wrote none
        if values.keys() != {"total", "count"} or not all(type(value) is float for value in values.values()):
            raise ValueError(f"a mean of rewards has total and count, not {values}")
        return cls(**values)
