"""Preference data of random token ids with every fault planted at a known row."""

import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def clean_rows(number: int, seed: int) -> list[Row]:
    """No two alike; chosen is the longer one in every second row."""
    chance = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [chance.randrange(3, 64) for _ in range(length)]

    return [
        {"prompt_ids": ids(24), "chosen_ids": ids(30 + 2 * (row % 2)), "rejected_ids": ids(31)} for row in range(number)
    ]


def nearly(values: list[int]) -> list[int]:
    """The same but for its last token."""
    return [*values[:-1], (values[-1] + 1) % 60 + 3]


def planted_rows() -> list[Row]:
    """40 clean rows; 41 and 42 repeat 1 and 2, 43 contradicts 3, 44 is nearly 4, 45 is bad.

    The prompts of 46 and 47 are those of rows 1 and 2 of `clean_rows(20, 2)`, the latter nearly so.
    """
    rows = clean_rows(40, 1)
    rows += [dict(rows[0]), {**rows[1], "note": "<b>kept</b>"}]
    rows.append({**rows[2], "chosen_ids": rows[2]["rejected_ids"], "rejected_ids": rows[2]["chosen_ids"]})
    rows.append({name: nearly(values) for name, values in rows[3].items()})
    rows.append({**rows[4], "rejected_ids": rows[4]["chosen_ids"]})
    rows.append({**clean_rows(1, 3)[0], "prompt_ids": clean_rows(20, 2)[0]["prompt_ids"]})
    rows.append({**clean_rows(1, 4)[0], "prompt_ids": nearly(clean_rows(20, 2)[1]["prompt_ids"])})
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """As JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
