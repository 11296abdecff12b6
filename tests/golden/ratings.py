"""Rated completions made of the recorded pairs, and the runs of TRL's `KTOTrainer` on them. Imports no package."""

import json
from pathlib import Path
from typing import Any

from tests.golden.conversations import ROWS

FOLDER = Path(__file__).resolve().parent
RECORDED = FOLDER / "trl_ratings.json"
RECORDED_TOKENS = FOLDER / "trl_rated_tokens.json"
STEPS, PER_STEP = 6, 4
CASES: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto", "beta": 0.1},
    "kto_weights": {"loss_type": "kto", "beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.1},
}
_GOOD = (0, 1, 3)  # of five rows


def rated_conversations() -> dict[str, dict[str, Any]]:
    """The rows of `conversations.py` with a prompt: the chosen answer, called good."""
    found = {}
    for case, row in ROWS.items():
        if "prompt" in row:
            rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
            found[case] = {**rest, "completion": row["chosen"], "label": True}
    return found


def rated_rows() -> list[dict[str, Any]]:
    """A completion of each pair: the chosen one, called good, or the rejected one, called bad."""
    rows = []
    for number, line in enumerate((FOLDER / "pairs.jsonl").read_text().splitlines()):
        row, good = json.loads(line), number % 5 in _GOOD
        completion = row["chosen_ids" if good else "rejected_ids"]
        rows.append({"prompt_ids": row["prompt_ids"], "completion_ids": completion, "label": good})
    return rows
