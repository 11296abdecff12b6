"""Record trl_tokens.json: `python -m tests.golden.record_trl_tokens`, where TRL 1.16 is installed.

What TRL's `DPOTrainer` makes of `conversations.ROWS`: the ids it would train on, each row a data set of its own.
"""

import json
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import trl
from datasets import Dataset
from transformers import AutoTokenizer

from tests.byte_tokenizer import save_tokenizer
from tests.chat_templates import ALL
from tests.golden.conversations import ROWS

RECORDED = Path(__file__).with_name("trl_tokens.json")


def tokens(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]] | str:
    """Ids by column, or the kind of error."""
    trainer = object.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    try:
        (found,) = trainer._prepare_dataset(Dataset.from_list([row]), tokenizer, arguments, "train")
    except Exception as error:
        return type(error).__name__
    return {name: found[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def main() -> None:
    """Write the file."""
    datasets.disable_progress_bars()
    logging.disable()
    recorded: dict[str, Any] = {"trl": trl.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name, template in ALL.items():
            spec = save_tokenizer(Path(folder) / name, template)
            tokenizer = AutoTokenizer.from_pretrained(spec.path)
            recorded[name] = {case: tokens(tokenizer, row) for case, row in ROWS.items()}
    RECORDED.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
