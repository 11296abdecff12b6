"""TRL's DPOTrainer on given pairs, on a CPU in float32: -m benchmarks.trl.their_run OUT.json SETTINGS.json

Imports nothing of dpo_dist, since TRL may be installed in an environment of its own.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.trl.memory import peak_bytes
from trl import DPOConfig, DPOTrainer  # pyright: ignore  (without TRL it finds benchmarks/trl)
from trl.trainer import utils


class PreparedTrainer(DPOTrainer):
    """On token ids: what it would make of text is there already."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **settings: Any) -> Any:
        return dataset


@dataclass
class Clock(TrainerCallback):
    """When training began, and when each step ended."""

    ends: list[float] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


class CountingCollator:
    """TRL's own collator; counts the tokens of every batch, padding included."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokens: list[int] = []

    def __call__(self, examples: Any) -> Any:
        """The batch of these examples."""
        batch = self.collate(examples)
        self.tokens.append(batch["input_ids"].numel())
        return batch


def main() -> None:
    """Train, and write what was measured."""
    out, path = sys.argv[1:]
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    if settings["completion_only_head"]:
        # Only where `utils` decides which tokens are scored; what computes them keeps its own name for it.
        utils._use_triton = lambda device: True
    rows = [json.loads(line) for line in Path(settings["pairs"]).read_text(encoding="utf-8").splitlines()]
    clock = Clock()
    trainer = PreparedTrainer(
        model=settings["model"],
        args=DPOConfig(**arguments(settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(AutoConfig.from_pretrained(settings["model"]).vocab_size),
        callbacks=[clock],
    )
    trainer.data_collator = collator = CountingCollator(trainer.data_collator)
    trainer.train()
    found = {
        "version": version("trl"),
        "optimizer": trainer.args.optim.value,
        "ends": clock.ends,
        "tokens": collator.tokens[: settings["steps"]],
        "logs": [line for line in trainer.state.log_history if "loss" in line],
        "peak_bytes": peak_bytes(),
    }
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """TRL asks for one; nothing is tokenised."""
    words = WordLevel({"<pad>": 0} | {str(number): number for number in range(1, vocabulary)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<pad>")


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """TRL's settings; what is not named has TRL's default."""
    return {
        "output_dir": settings["folder"],
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "torch_compile": settings["torch_compile"],
        "per_device_train_batch_size": settings["pairs_per_step"],
        "gradient_accumulation_steps": 1,
        "max_steps": settings["steps"],
        "max_length": None,  # rows are within it already
        "beta": settings["beta"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": settings["max_grad_norm"],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    main()
