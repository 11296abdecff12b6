"""Load policy and reference; what an architecture supports.

    T packed tokens   M scored tokens   D model dimension

A model is always a folder on disk here: hub ids are downloaded to one first, so that what is checked is what is loaded.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dpo_dist.batch import AttentionLayout, MicroBatch
from dpo_dist.demo import demo_model_folder
from dpo_dist.errors import ConfigError, ModelError
from dpo_dist.logprobs import LogitTransform, LogProbHead

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Softmax attention over all keys, positions only through position_ids: checked one by one against their own stock
# forward in tests/parity/test_architectures.py.
SHARES_PROMPTS = frozenset(
    "apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe "
    "gpt2 gpt_neox gpt_oss granite granitemoe helium llama ministral mistral mixtral nanochat olmo olmo2 olmo3 olmoe "
    "phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2".split()
)
# State that flows along the sequence would carry one packed completion into the next.
STATEFUL_LAYERS = frozenset({"linear_attention", "mamba", "conv", "chunked_attention", "recurrent"})
STATEFUL_MODELS = frozenset(
    "bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 llama4 llama4_text mamba mamba2 nemotron_h "
    "recurrent_gemma rwkv xlstm zamba zamba2".split()
)
# Frequencies of any other rope type depend on the longest position of the batch, hence on the packing.
PACKABLE_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


def resolve_folder(name: str, key: str, revision: str | None, cache_dir: Path) -> Path:
    """The folder of a model: a path, the demo model, or a hub id that is downloaded.

    Args:
        name: what the user wrote.
        key: the dotted path it was written under, for messages.
        revision: commit, tag or branch of a hub id.
        cache_dir: where the converted demo model lives.

    Raises:
        ModelError: there is nothing to load under that name.
    """
    if name == "demo":
        return demo_model_folder(cache_dir)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name, key, revision)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{key}={name} has no config.json; give the folder save_pretrained wrote, or a hub id")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{key}={name} has no weights (*.safetensors); pickled weights (.bin, .pt) are not read, since loading "
            "them can run code: convert them with save_pretrained"
        )
    return folder


def _download(name: str, key: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = _first_line(error)
        raise ModelError(
            f"{key}={name} is neither a folder here nor a model that can be downloaded ({reason}); "
            "check the path or the hub id, and HF_TOKEN and HF_HUB_OFFLINE if it is on the hub"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def identity(folder: Path) -> str:
    """A hash that tells models apart: sizes and 16 evenly spaced blocks of 64 KiB of every weight file."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for block in range(16):
                file.seek(size * block // 16)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:32]


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The architecture's configuration, with every dropout and noise at 0 (`disabled_dropout` keeps what it was).

    Raises:
        ModelError: the folder holds no usable configuration.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error)
        raise ModelError(f"model.model_name_or_path={folder}: its config.json cannot be used: {reason}") from None
    config.disabled_dropout = {
        name: value
        for name, value in vars(config).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    }
    for name in config.disabled_dropout:
        setattr(config, name, 0.0)
    return config


def decide_sharing(config: PretrainedConfig, requested: Literal["auto", "on", "off"]) -> tuple[bool, str]:
    """Whether every prompt is computed once, and why.

    Raises:
        ModelError: the architecture cannot be packed at all.
        ConfigError: sharing was asked for and the architecture is not on the list.
    """
    if obstacle := _cannot_be_packed(config):
        raise ModelError(f"model.model_name_or_path: architecture {config.model_type} cannot be packed: {obstacle}")
    if config.model_type in SHARES_PROMPTS:
        if requested == "off":
            return False, "as configured"
        return True, f"architecture {config.model_type} is on the list of checked ones"
    if requested == "on":
        raise ConfigError(
            f"model.prefix_sharing=on: architecture {config.model_type} is not on the list of checked ones "
            f"({', '.join(sorted(SHARES_PROMPTS))}); use auto or off, which pack without sharing"
        )
    return False, f"architecture {config.model_type} is not on the list of checked ones"


def _cannot_be_packed(config: PretrainedConfig) -> str | None:
    stateful = STATEFUL_LAYERS.intersection(getattr(config, "layer_types", None) or ())
    if stateful or config.model_type in STATEFUL_MODELS:
        layers = ", ".join(sorted(stateful)) or "its layers"
        return f"{layers} carry state along the sequence, so packed completions would leak into each other"
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for parameters in nested:
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in PACKABLE_ROPE:
            return (
                f"rope type {rope_type} depends on the longest position in the batch; supported: {_list(PACKABLE_ROPE)}"
            )
    return None


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


@contextmanager
def sharded_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Inside, `from_pretrained` partitions every parameter as it is read (ZeRO stage 3); outside, it is plain again.

    transformers keeps the configuration in a process-global weak reference, so it is unset on the way out.
    """
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) < 3:
        yield
        return
    keep_alive = HfDeepSpeedConfig(deepspeed_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


class ScoringModel(nn.Module):
    """A causal language model that is asked for log-probabilities of a packed micro-batch, never for logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        model.set_output_embeddings(LogProbHead(_linear_head(model), logit_transform(model.config)))

    def forward(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats, float32."""
        batch.layout.reached.clear()  # policy and reference may be asked with the same micro-batch
        hidden_TD = self.model.get_decoder()(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            dpo_layout=batch.layout,
        ).last_hidden_state[0]
        _require_reached(batch.layout, self.model.config)
        head: Any = self.model.get_output_embeddings()
        return head(hidden_TD[batch.score_index_M], batch.target_ids_M)

    def export_config(self) -> PretrainedConfig:
        """The configuration as others should read it: dropout as it was, and nothing of ours in it."""
        config = deepcopy(self.model.config)
        for name, value in config.__dict__.pop("disabled_dropout", {}).items():
            setattr(config, name, value)
        return config


def load_model(
    folder: Path,
    config: PretrainedConfig,
    attention: str,
    dtype: torch.dtype,
    deepspeed_config: dict[str, Any],
    gradient_checkpointing: bool,
    trust_remote_code: bool,
) -> ScoringModel:
    """Load weights, partitioned under ZeRO-3, and make the model score micro-batches.

    Args:
        folder: what `resolve_folder` gave.
        config: what `load_config` gave.
        attention: the name `attention.register` gave.
        dtype: of the parameters and the computation.
        deepspeed_config: decides whether parameters are partitioned while they are read.
        gradient_checkpointing: recompute activations in backward.
        trust_remote_code: run code that lies in the folder.

    Raises:
        ModelError: weights are missing, damaged, or do not belong to the configuration.
    """
    try:
        with sharded_loading(deepspeed_config):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=deepcopy(config),
                attn_implementation=attention,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = _first_line(error)
        raise ModelError(f"model.model_name_or_path={folder} cannot be loaded: {reason}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ())):
        raise ModelError(
            f"model.model_name_or_path={folder} lacks {len(missing)} weights of its architecture, such as "
            f"{missing[0]}; they would be random numbers. Give a complete model"
        )
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return ScoringModel(model)


def _require_reached(layout: AttentionLayout, config: PretrainedConfig) -> None:
    """A layer that never saw the layout mixes packed completions: it dropped the argument, or is no attention layer."""
    num_layers = config.get_text_config().num_hidden_layers
    if len(layout.reached) != num_layers:
        raise ModelError(
            f"model.model_name_or_path: architecture {config.model_type} cannot be packed: {len(layout.reached)} of "
            f"its {num_layers} layers compute attention through transformers' attention interface and pass its "
            "arguments on, so packed completions would leak into each other"
        )


def _linear_head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"model.model_name_or_path: the output head of architecture {model.config.model_type} is a "
            f"{type(head).__name__}, not a linear layer; its log-probabilities cannot be computed chunk by chunk"
        )
    return head


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Logit scale (Cohere multiplies, Granite divides) and final softcap (Gemma) of an architecture."""
    scale = getattr(config, "logit_scale", None) or 1.0
    return LogitTransform(
        scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
