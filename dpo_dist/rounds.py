"""Rounds of training on feedback: what the next one trains on and from, and whether others may begin with its model.

A round is a run of its own, with a configuration that follows from that of the user, the set of feedback and the rounds
before. What was decided stands in `round-002.json` beside the run's folder, so that a round which was interrupted goes
on with the same data, whatever was added since.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_dist.checkpoint.files import replace_text
from dpo_dist.config import DataSource, RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.feedback import FeedbackSet

# At the beginning of a run that is compared with its own start it is 0: no reward differs from another.
ACCURACY = "rewards/accuracies"


@dataclass(frozen=True)
class Verdict:
    """What a round did to the held-out preferences of one version."""

    dataset: str
    is_old: bool
    """Whether an earlier round was trained on the version."""
    before: float | None
    """Reward accuracy before the first update; None where the round is compared with the model that it begins with: no
    pair is preferred there, and `after` is the share of pairs that are preferred more than before."""
    after: float

    def has_fallen(self, max_drop: float) -> bool:
        """Whether the model does worse than before on what an earlier round has learned, by more than `max_drop`."""
        return self.is_old and (0.5 if self.before is None else self.before) - self.after > max_drop


@dataclass(frozen=True)
class Round:
    """One round, as it is written down."""

    number: int
    versions: list[str]
    """Files of the set, the oldest first."""
    num_old: int
    """How many of them the accepted round before was trained on."""
    model: str
    """What it begins with."""
    reference: str | None
    """What it is compared with; None: the same."""
    accepted: bool | None = None
    """None: it has not ended."""
    verdicts: list[Verdict] = field(default_factory=list[Verdict])

    @property
    def overrides(self) -> list[str]:
        """What the round changes in the user's configuration, but for the folder."""
        found = [f"data.train={json.dumps([{'path': path} for path in self.versions])}"]
        found.append(f"model.model_name_or_path={json.dumps(self.model)}")
        if self.reference is not None:
            found.append(f"model.reference_name_or_path={json.dumps(self.reference)}")
        return found


class Rounds:
    """The rounds in the folder that `train.output_dir` names.

    Args:
        config: of the user; its only data are a set of feedback.
    Raises:
        ConfigError: they are not, or nothing would tell whether a round was good.
    """

    def __init__(self, config: RunConfig) -> None:
        self.folder = Path(config.train.output_dir)
        self._first_model = config.model.model_name_or_path
        self._reference = config.model.reference_name_or_path
        if config.adapter.is_used:
            raise ConfigError(
                f"adapter.peft_type={config.adapter.peft_type}: a round hands a whole model to the next; leave the "
                "adapter out, or run the rounds one by one, each from `dpo-dist export --merged`"
            )
        if len(config.data.train) != 1 or not Path(config.data.train[0].path).is_dir():
            raise ConfigError(
                "data.train does not name one set of feedback; write [{path: FOLDER}] with a folder that "
                "`dpo-dist feedback add` has made"
            )
        self._set = Path(config.data.train[0].path)
        if config.data.train[0] != DataSource(path=config.data.train[0].path):
            raise ConfigError(
                "data.train.0 has more than a path, and a round reads every version whole; leave the rest out"
            )
        if not config.data.holdout:
            raise ConfigError("data.holdout=0 leaves nothing to judge a round by; set it, say to 0.1")
        if not (config.evaluation.eval_on_start and config.evaluation.eval_steps):
            raise ConfigError(
                "a round is judged by the held-out feedback before and after it; set evaluation.eval_on_start=true and "
                "evaluation.eval_steps"
            )

    def run_folder(self, number: int) -> Path:
        """Where a round's run is."""
        return self.folder / f"round-{number:03d}"

    def all(self) -> list[Round]:
        """Every round that was begun, the first one first."""
        found = []
        for path in sorted(self.folder.glob("round-*.json")):
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                values["verdicts"] = [Verdict(**one) for one in values["verdicts"]]
                found.append(Round(**values))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} is not what a round has written ({type(error).__name__}: {error}); restore it, or name "
                    "another train.output_dir to begin anew"
                ) from error
        return found

    def next(self, reference: Literal["last", "first"]) -> tuple[Round, bool]:
        """The round that is to be run, and whether it had been begun before.

        Args:
            reference: what it is compared with: the model that it begins with, or that of the first round.
        Raises:
            ConfigError: no feedback came in since the last round.
        """
        begun = self.all()
        if begun and begun[-1].accepted is None:
            return begun[-1], True
        versions = [str(self._set / f"train-{one.number:04d}.parquet") for one in FeedbackSet(self._set).versions()]
        if not versions:
            raise ConfigError(f"data.train.0.path={self._set} holds no feedback; add some with `dpo-dist feedback add`")
        if begun and versions == begun[-1].versions:
            raise ConfigError(
                f"{self._set}: nothing was added since round {begun[-1].number}; add some with `dpo-dist feedback add`"
            )
        last = next((one for one in reversed(begun) if one.accepted), None)
        model = self._first_model if last is None else str(self.run_folder(last.number) / "model")
        told = self._reference or (self._first_model if reference == "first" and last is not None else None)
        number = begun[-1].number + 1 if begun else 1
        return Round(number, versions, 0 if last is None else len(last.versions), model, told), False

    def write(self, one: Round) -> None:
        """Write a round down, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / f"round-{one.number:03d}.json", json.dumps(asdict(one), indent=2) + "\n")

    def judge(self, one: Round, names: Sequence[str]) -> list[Verdict]:
        """The held-out accuracy of each version before the first update, and of the exported model's.

        A version of which no pair is held out has none: no prompt, or only completions that are called good or bad.

        Args:
            one: a round whose run has ended.
            names: of its held-out sets, in the order of its versions.
        """
        lines = [json.loads(line) for line in (self.run_folder(one.number) / "metrics.jsonl").read_text().splitlines()]
        exported = _exported_step(self.run_folder(one.number))
        return [
            Verdict(
                name,
                place < one.num_old,
                None if one.reference is None else _accuracy(lines, name, 0),
                _accuracy(lines, name, exported),
            )
            for place, name in enumerate(names)
            if any(line.get("dataset") == name and ACCURACY in line for line in lines)
        ]


def _exported_step(folder: Path) -> int:
    return int(json.loads((folder / "model" / "dpo_dist.json").read_text(encoding="utf-8"))["step"])


def _accuracy(lines: list[dict[str, Any]], name: str, step: int) -> float:
    """Of the last evaluation up to a step."""
    found = [line for line in lines if line.get("dataset") == name and ACCURACY in line and line["step"] <= step]
    return float(found[-1][ACCURACY])
