"""A Llama with random weights: python -m benchmarks.gpu_kit.random_model FOLDER SIZES-AS-JSON

A process of its own, on the first GPU if there is one: a billion normal numbers take a CPU half a minute.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Make it, in bfloat16, and save it."""
    folder, sizes = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
