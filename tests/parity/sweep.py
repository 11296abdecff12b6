"""Every causal architecture that transformers knows, tried as `dpo-dist check` does; writes docs/architectures.md.

python -m tests.parity.sweep
"""

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_dist.errors import ModelError
from dpo_dist.model import try_architecture
from dpo_dist.pretrained import decide_sharing
from dpo_dist.pretrained.shrunk import shrunk
from tests.parity.oracle import naive_logps, our_logps, random_example, stock_and_ours

KEY = "model.model_name_or_path"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
EXAMPLES = [random_example(1, 7, [5, 1, 9]), random_example(2, 1, [4, 12]), random_example(3, 13, [1, 6])]
ALLOWED = 5e-3  # nats, in float32


@dataclass(frozen=True)
class Verdict:
    """What `check` says of an architecture, and whether that is so."""

    kind: str  # shared, right, refused, untried, wrong, traceback
    reason: str = ""


# Settings for those whose own defaults fit no model.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
}


# What most configurations leave neutral, so that a model which computes it wrongly looks right.
FEATURES: Mapping[str, Any] = {
    "logits_scaling": 0.5,
    "logit_scale": 0.5,
    "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.5,
    "sliding_window": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_bias": True,
    "tie_word_embeddings": True,
}


# Their own configuration class refuses these.
NOT_FEATURED: Mapping[str, Sequence[str]] = {"dbrx": ("tie_word_embeddings",), "internlm3": ("attention_bias",)}


def config_of(model_type: str, featured: bool = False) -> PretrainedConfig:
    """A configuration as it would stand in a model's folder; `featured`: with all `FEATURES` that it has."""
    config = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    if featured:
        values = config.to_dict()
        unwanted = NOT_FEATURED.get(model_type, ())
        values |= {name: value for name, value in FEATURES.items() if name in values and name not in unwanted}
        config = type(config).from_dict(values)
    return config


def judge(model_type: str, featured: bool = False) -> Verdict:
    """As `check` does, and whether what it accepts is right."""
    try:
        config = config_of(model_type, featured)
        shared, _ = decide_sharing(config, "auto")
        tried = try_architecture(config, KEY, shared)
    except ModelError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("traceback", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    if tried.untried:
        return Verdict("untried", tried.untried)
    difference = naive_difference(shrunk(config), shared)
    if not difference <= ALLOWED:
        return Verdict("wrong", f"{difference:.2g} nats")
    return Verdict("shared" if shared else "right", "positions are a table" if tried.has_position_table else "")


def naive_difference(config: PretrainedConfig, shared: bool) -> float:
    """The largest difference of a completion's log-probability to plain transformers, one sequence at a time."""
    stock, ours = stock_and_ours(config, torch.float32)
    with torch.no_grad():
        expected = naive_logps(stock, EXAMPLES)
        return max(float((our_logps(ours, EXAMPLES, share) - expected).abs().max()) for share in {shared, False})


HEAD = """# Architectures

All {count} causal architectures of transformers {version}, as `dpo-dist check` sees them: a small random model of each
is scored packed and by the architecture's own forward pass ([how](decisions/0017-the-architectures-own-forward.md)).
Made by `python -m tests.parity.sweep`, with the default settings of each configuration class; other settings may make a
difference, and `check` tries those of your model.

- **shared**: packed, every prompt is computed once ({shared})
- **right**: packed, every completion with its own copy of the prompt ({right})
- **refused**: by `check`, before any weight is read ({refused})

| architecture | verdict | why |
|---|---|---|
"""


def page(verdicts: Mapping[str, Verdict]) -> str:
    """The table as docs/architectures.md has it; without numbers, which differ from machine to machine."""
    counts = {kind: sum(one.kind == kind for one in verdicts.values()) for kind in ("shared", "right", "refused")}
    rows = []
    for name, one in verdicts.items():
        why = re.sub(r"^model\.model_name_or_path: architecture \S+ cannot be (packed|trained here): ", "", one.reason)
        why = re.sub(r" by [\d.e+-]+ nats of a token", "", why.split("; architectures whose")[0]).replace("|", "/")
        why = re.sub(r"\((\w+): .*\)$", r"(\1)", why)
        rows.append(f"| `{name}` | {one.kind} | {why} |\n")
    return HEAD.format(count=len(verdicts), version=transformers.__version__, **counts) + "".join(rows)


def main() -> None:
    """Write the page, or print a line for each of some architectures."""
    logging.disable()
    warnings.simplefilter("ignore")
    verdicts = {name: judge(name) for name in sys.argv[1:] or TYPES}
    if sys.argv[1:]:
        for name, one in verdicts.items():
            print(f"{name:28} {one.kind:10} {one.reason}")
    else:
        PAGE.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
