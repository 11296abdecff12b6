"""Floating-point operations that a step of DPO asks for, in closed form: nothing counted twice, nothing recomputed.

Every prompt is counted once, the last token of a completion is no input, and the head is applied to scored tokens only.
A product of a row with a matrix of n elements takes 2 n operations. Backward takes twice as much as forward. The
reference is a forward pass. Softmax, norms, activations and the optimizer are left out; they are below 2 % here.

The counts follow Kaplan et al. 2020 (arXiv:2001.08361, section 2.1), with the area of causal attention in place of the
square, as the queries of a token need no later keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PASSES = 4  # of the size of a forward pass: policy 1 + 2, reference 1


@dataclass(frozen=True)
class Shape:
    """Of a Llama: elements of the matrices of its layers and of its head, and the width of attention."""

    body: int  # elements of all layers' matrices
    head: int  # elements of the output head, tied to the embedding or not
    attention: int  # layers * heads * head dimension

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """From the model's config.json.

        Raises:
            ValueError: the architecture is not Llama's, whose matrices are the only ones known here.
        """
        if config.get("model_type") != "llama":
            raise ValueError(f"operations are known of Llamas only, not of {config.get('model_type')}")
        hidden, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        width = config.get("head_dim") or hidden // heads
        key_heads = config.get("num_key_value_heads") or heads
        projections = hidden * width * (2 * heads + 2 * key_heads)  # queries and output, keys and values
        return cls(
            body=layers * (projections + 3 * hidden * config["intermediate_size"]),
            head=hidden * config["vocab_size"],
            attention=layers * heads * width,
        )

    def forward(self, tokens: int, area: int, scored: int) -> int:
        """Operations of a forward pass.

        Args:
            tokens: inputs of the body.
            area: pairs of a query and a key that it sees.
            scored: tokens whose log-probability is taken.
        """
        # Attention: 2 for query times key, 2 for weight times value.
        return 2 * self.body * tokens + 4 * self.attention * area + 2 * self.head * scored


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example: its prompt, and each of its completions."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """Tokens that a model has to read: the prompt once, of each completion all but the last."""
        return self.prompt + sum(self.completions) - len(self.completions)

    @property
    def scored(self) -> int:
        """Tokens whose log-probability is asked for."""
        return sum(self.completions)

    @property
    def area(self) -> int:
        """Pairs of a query and a key that it sees: causal, and completions do not see each other."""
        own = self.prompt * (self.prompt + 1) // 2
        for completion in self.completions:
            queries = completion - 1
            own += queries * self.prompt + queries * (queries + 1) // 2
        return own


def useful_flops(shape: Shape, examples: Sequence[Lengths]) -> int:
    """Operations of one update on these examples: the policy forward and backward, and the reference forward."""
    one = sum(shape.forward(each.inputs, each.area, each.scored) for each in examples)
    return PASSES * one
