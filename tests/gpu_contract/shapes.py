"""Sizes of large models, for tests on the meta device."""

from transformers import LlamaConfig

# Llama 3.1 8B, from its config.json.
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
