"""TRL's DPOTrainer on the pairs of the part `throughput`: torchrun ... -m benchmarks.gpu_kit.trl_run SETTINGS.json

The first rank writes what TRL logged at each step and when the steps ended; SETTINGS says where.
"""

import json
import os
import socket
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
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils.import_utils import is_flash_attn_2_available
from trl import DPOConfig, DPOTrainer  # pyright: ignore  (without TRL it finds benchmarks/trl)

from dpo_dist.cli.ending import end_rank
from dpo_dist.config import load_deepspeed
from dpo_dist.trainer import peak_memory_gib


class PreparedTrainer(DPOTrainer):
    """TRL's trainer on token ids: what it would make of text is there already."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **settings: Any) -> Any:
        return dataset


@dataclass
class Clock(TrainerCallback):
    """When steps ended. The device is waited for at the two ends of what is measured, and nowhere between."""

    warm_up: int
    steps: int
    ends: list[float] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Note the time."""
        if state.global_step in (self.warm_up, self.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def deepspeed_file(name: str, on_gpu: bool) -> dict[str, Any]:
    """The file that our own run has, and in it what transformers asks to be there."""
    content = load_deepspeed(name) | {
        "bf16": {"enabled": True},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    # Compiling DeepSpeed's CPU Adam takes a minute: our own engine does without it on a CPU as well.
    return content if on_gpu else {**content, "zero_force_ds_cpu_optimizer": False}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """TRL asks for one; nothing is tokenised."""
    words = WordLevel({"<pad>": 0} | {str(number): number for number in range(1, vocabulary)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<pad>")


def config(settings: dict[str, Any], kernel: str, on_gpu: bool) -> DPOConfig:
    """TRL's settings; what is not named has TRL's default."""
    return DPOConfig(
        output_dir=settings["folder"],
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": kernel},
        deepspeed=deepspeed_file(settings["deepspeed"], on_gpu),
        bf16=True,
        use_cpu=not on_gpu,
        gradient_checkpointing=settings["gradient_checkpointing"],
        per_device_train_batch_size=settings["pairs_at_once"],
        gradient_accumulation_steps=settings["micro_batches"],
        max_steps=settings["steps"],
        max_length=None,
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        adam_beta1=settings["adam_beta1"],
        adam_beta2=settings["adam_beta2"],
        adam_epsilon=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _free_port() -> str:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return str(some.getsockname()[1])


def main() -> None:
    """Train; the first rank writes."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "RANK" not in os.environ:
        # DeepSpeed asks the environment who it is; a process started alone has no launcher that says so.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    on_gpu = torch.cuda.is_available()
    kernel = "flash_attention_2" if on_gpu and is_flash_attn_2_available() else "sdpa"
    rows = [json.loads(line) for line in Path(settings["pairs"]).read_text(encoding="utf-8").splitlines()]
    clock = Clock(settings["warm_up"], settings["steps"])
    trainer = PreparedTrainer(
        model=settings["model"],
        args=config(settings, kernel, on_gpu),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(settings["vocabulary"]),
        callbacks=[clock],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        found = {
            "version": version("trl"),
            "kernel": kernel,
            "optimizer": trainer.args.optim.value,
            "ends": clock.ends,
            "logs": [line for line in trainer.state.log_history if "loss" in line],
            "peak_bytes": round(peak_memory_gib(trainer.accelerator.device) * 2**30),
        }
        Path(settings["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
    end_rank(0)
