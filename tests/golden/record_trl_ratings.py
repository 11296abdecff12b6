"""Record trl_ratings.json: `python -m tests.golden.record_trl_ratings`, where TRL 1.16 is installed.

What TRL's `KTOTrainer` does with one completion of each pair of `pairs.jsonl`, four in a step, as in
`trl_trajectories.json`: the tiny models, AdamW, clip 1.0, a constant rate. A batch is a step, so that TRL's batch, in
which completions are exchanged, is a step's as well.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import datasets
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.golden.ratings import CASES, FOLDER, PER_STEP, RECORDED, STEPS, rated_rows


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


def main() -> None:
    """Write the file."""
    datasets.disable_progress_bars()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: run(name, loss, Path(folder)) for name, loss in CASES.items()}
    RECORDED.write_text(json.dumps({"trl": trl.__version__, "cases": cases}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
