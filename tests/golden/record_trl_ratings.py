"""Record what TRL 1.16 makes of rated rows: `python -m tests.golden.record_trl_ratings`, where it is installed.

`trl_ratings.json`: what its `KTOTrainer` does with one completion of each pair of `pairs.jsonl`, four in a step, as in
`trl_trajectories.json`: the tiny models, AdamW, clip 1.0, a constant rate. A batch is a step, so that TRL's batch, in
which completions are exchanged, is a step's as well. `trl_rated_tokens.json`: the ids that it makes of conversations.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.byte_tokenizer import save_tokenizer
from tests.chat_templates import ALL
from tests.golden.ratings import (
    CASES,
    FOLDER,
    PER_STEP,
    RECORDED,
    RECORDED_TOKENS,
    STEPS,
    rated_conversations,
    rated_rows,
)


def word(number: int) -> str:
    """The text of a token."""
    return f"<{number}>" if number in (0, 2) else f"t{number}"


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that reads `t17` as token 17; token 2 ends a text, and no other word begins as it does."""
    tokenizer = Tokenizer(models.WordLevel({word(number): number for number in range(128)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<2>", pad_token="<0>")


def run(name: str, loss: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The lines of one run, and the norms of its parameters at the end."""

    def text(ids: list[int]) -> str:
        return "".join(f" {word(number)}" for number in ids)

    rows = [
        {"prompt": text(row["prompt_ids"]), "completion": text(row["completion_ids"]), "label": row["label"]}
        for row in rated_rows()
    ]
    arguments = trl.KTOConfig(
        output_dir=str(folder / name),
        per_device_train_batch_size=PER_STEP,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        **loss,
    )
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(FOLDER / which, dtype="float32")
        for which in ("tiny_policy", "tiny_reference")
    )
    data = Dataset.from_list(rows)
    trainer = trl.KTOTrainer(policy, reference, arguments, train_dataset=data, processing_class=words())
    ids = [(row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset]
    assert ids == [(row["prompt_ids"], row["completion_ids"]) for row in rated_rows()]
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    norms = {key: float(value.double().norm()) for key, value in trainer.model.state_dict().items()}
    return {"loss": loss, "logs": logs, "final_param_norms": norms}


def tokens(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]] | str:
    """What `KTOTrainer` makes of a rated row of messages: ids by column, or the kind of error."""
    trainer = object.__new__(trl.KTOTrainer)
    trainer._tokenizer, trainer.calculate_KL = tokenizer, False
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, desirable_weight=1.0, undesirable_weight=1.0)
    try:
        (found,) = trainer._prepare_dataset(Dataset.from_list([row]), tokenizer, arguments, "train")
    except Exception as error:
        return type(error).__name__
    return {name: found[name] for name in ("prompt_ids", "completion_ids")}


def all_tokens(folder: Path) -> dict[str, Any]:
    """The rows of `rated_conversations` by each template."""
    found: dict[str, Any] = {"trl": trl.__version__}
    for name, template in ALL.items():
        tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder / name, template).path)
        found[name] = {case: tokens(tokenizer, row) for case, row in rated_conversations().items()}
    return found


def main() -> None:
    """Write the files."""
    datasets.disable_progress_bars()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        RECORDED_TOKENS.write_text(json.dumps(all_tokens(Path(folder))) + "\n", encoding="utf-8")
        cases = {name: run(name, loss, Path(folder)) for name, loss in CASES.items()}
    RECORDED.write_text(json.dumps({"trl": trl.__version__, "cases": cases}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
