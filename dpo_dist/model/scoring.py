"""Weights in memory, sharded as they are read, that answer with log-probabilities.

T packed tokens   M scored tokens   D model dimension   K statistics
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dpo_dist.batch import AttentionLayout, MicroBatch
from dpo_dist.errors import ModelError
from dpo_dist.logprobs import LogProbHead
from dpo_dist.model import recomputation
from dpo_dist.model.adapted import Adapter
from dpo_dist.model.compiled import Compilations, compile_layers
from dpo_dist.model.liger import use_liger, without_liger
from dpo_dist.model.own_forward import own_logps
from dpo_dist.model.packed import as_packed
from dpo_dist.model.slices import can_read_slices, node_groups, read_slices
from dpo_dist.peers import raise_if_peer_lost
from dpo_dist.pointwise import AS_WRITTEN
from dpo_dist.pretrained.architecture import logit_transform
from dpo_dist.pretrained.folder import first_line


@contextmanager
def sharded_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Inside, `from_pretrained` partitions every parameter as it is read (ZeRO stage 3); outside, it is plain again.

    transformers keeps the configuration in a process-global weak reference, so it is unset on the way out.
    """
    if not _is_partitioned(deepspeed_config):
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

    def __init__(self, model: PreTrainedModel, compilations: Compilations | None = None) -> None:
        super().__init__()
        self.model = model
        self._is_compiled = compilations is not None
        if compilations is not None:
            compile_layers(model, compilations)
        fused = None if compilations is None else AS_WRITTEN.compiled(compilations.compile)
        head = LogProbHead(_linear_head(model), logit_transform(model.config), fused=fused)
        model.set_output_embeddings(head)
        self.adapter: Adapter | None = None

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Inside, its layers are run as their class has them, and nothing is compiled."""
        with torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext():
            yield

    def adopt(self, adapter: Adapter) -> None:
        """Train what PEFT has put into the model, and nothing else."""
        self.adapter = adapter
        if adapter.is_prompt_learning:
            self.prompt_encoder = adapter.peft.prompt_encoder  # a module of ours, so that DeepSpeed sees its parameters

    def forward(
        self, batch: MicroBatch, statistics: Sequence[str] = (), by_itself: bool = False
    ) -> Float[Tensor, " M"] | tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
        """log pi(token | prefix) of every scored token, nats, float32.

        Args:
            batch: what is scored.
            statistics: names out of `logprobs.STATISTICS`, whose values come too.
            by_itself: by the architecture's own forward (`own_logps`), for a micro-batch of one completion.
        """
        if by_itself:
            with self.as_written():  # what the compiler does wrong for policy and reference alike shows here
                return own_logps(self.model if self.adapter is None else self.adapter.asked(self.model), batch)
        packed = as_packed(batch) if self.adapter is None else self.adapter.pack(batch)
        packed.layout.reached.clear()  # policy and reference may be asked with the same micro-batch
        decoder = self.model.get_decoder()
        hidden_TD = decoder(**packed.inputs, use_cache=False, dpo_layout=packed.layout).last_hidden_state[0]
        _require_reached(packed.layout, self.model.config)
        head: Any = self.model.get_output_embeddings()
        return head(hidden_TD[packed.score_index_M], batch.target_ids_M, statistics)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, an adapted model answers as the reference: without its adapter, or with the frozen copy of it.

        Without an adapter it changes nothing.
        """
        with nullcontext() if self.adapter is None else self.adapter.as_reference():
            yield

    def recompute_first(self, count: int) -> None:
        """Compute activations of the first `count` layers again in backward, and keep those of the others."""
        recomputation.recompute_first(self.model, count)

    @property
    def switchable_layers(self) -> list[Any]:
        """The layers that can be told so each for itself."""
        return recomputation.switchable(self.model)

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
    gradient_checkpointing: recomputation.Recomputation,
    trust_remote_code: bool,
    quantization: BitsAndBytesConfig | None = None,
    use_liger_kernel: bool = False,
    compilations: Compilations | None = None,
) -> ScoringModel:
    """Load weights, partitioned under ZeRO-3, and make the model score micro-batches.

    Args:
        folder: what `resolve_folder` gave.
        config: what `load_config` gave.
        attention: the name `attention.interface.register` gave.
        dtype: of the parameters and the computation.
        deepspeed_config: decides whether parameters are partitioned while they are read.
        gradient_checkpointing: recompute activations in backward; `auto`: in all layers until `recompute_first`.
        trust_remote_code: run code that lies in the folder.
        quantization: what `quantization.four_bits` gave, for weights that stay frozen.
        use_liger_kernel: compute by the kernels that `liger.require_liger` let pass.
        compilations: let the decoder's layers be compiled, and count that here.

    Raises:
        ModelError: weights are missing, damaged, or do not belong to the configuration.
    """
    without_liger()  # what is built before it is patched must be the architecture's own
    by_slices = quantization is None and _is_partitioned(deepspeed_config)
    try:
        with node_groups(deepspeed_config):
            if by_slices and can_read_slices(folder, config, deepspeed_config, trust_remote_code):
                model = read_slices(folder, config, attention, dtype, deepspeed_config, trust_remote_code)
            else:
                options = {"trust_remote_code": trust_remote_code, "quantization_config": quantization}
                model = _by_transformers(folder, config, attention, dtype, deepspeed_config, options)
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a class may refuse in any way, or know no attention but its own
        raise_if_peer_lost(error)
        reason = first_line(error)
        if quantization is not None:
            needed = 2 * dtype.itemsize
            reason += (
                f"; with adapter.load_in_4bit=true the number of weights of every linear layer must be a multiple of "
                f"{needed}, since they are stored as {dtype}"
            )
        raise ModelError(f"model.model_name_or_path={folder} cannot be loaded: {reason}") from error
    _keep_as_stored(model)
    if use_liger_kernel:
        use_liger(model)
    recomputation.enable(model, gradient_checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return ScoringModel(model, compilations)


def _by_transformers(
    folder: Path,
    config: PretrainedConfig,
    attention: str,
    dtype: torch.dtype,
    deepspeed_config: dict[str, Any],
    options: dict[str, Any],
) -> PreTrainedModel:
    with sharded_loading(deepspeed_config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=deepcopy(config),
            attn_implementation=attention,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **{name: value for name, value in options.items() if value is not None},
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ())):
        raise ModelError(
            f"model.model_name_or_path={folder} lacks {len(missing)} weights of its architecture, such as "
            f"{missing[0]}; they would be random numbers. Give a complete model"
        )
    return model


def _keep_as_stored(model: PreTrainedModel) -> None:
    """Keep weights in 4 bits as they are stored.

    On CPUs with AVX512-BF16 bitsandbytes would repack them in place at the first forward without gradient: a layout
    that needs rows in multiples of 32, and that no gather of ZeRO-3 knows.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (an attribute that torch knows nothing of)


def _is_partitioned(deepspeed_config: dict[str, Any]) -> bool:
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0) >= 3


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
