"""Large models, by the numbers in their public config.json."""

from dataclasses import dataclass

from transformers import LlamaConfig

from dpo_dist.model import model_cost
from dpo_dist.packing import CostModel


@dataclass(frozen=True)
class Shape:
    """A Llama whose embedding and head are two matrices."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    key_heads: int = 8
    vocabulary: int = 128256

    def cost(self, recomputes: bool) -> CostModel:
        """Operations, by the packer's own closed form; the model is built without memory.

        Args:
            recomputes: gradient checkpointing in every layer.
        """
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            tie_word_embeddings=False,
        )
        return model_cost(config, trust_remote_code=False, recomputes=recomputes)

    @property
    def parameters(self) -> int:
        """N: all weights, embedding, head and norms among them."""
        width = self.hidden // self.heads
        attention = 2 * self.hidden * width * (self.heads + self.key_heads)  # queries and output, keys and values
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


# meta-llama/Llama-3.1-8B and Llama-3.1-70B.
SHAPES = {
    "8B": Shape("8B", hidden=4096, layers=32, heads=32, intermediate=14336),
    "70B": Shape("70B", hidden=8192, layers=80, heads=64, intermediate=28672),
}
