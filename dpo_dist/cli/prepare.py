"""All that can be known before a process group exists: files, data, packing, model. Shared by all commands.

The data comes first: a mistake in it is found without importing DeepSpeed or a model class, in half the time.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from dpo_dist.attention import choose_backend
from dpo_dist.cli.architectures import Architecture, require_positions
from dpo_dist.cli.compiling import require_compilable
from dpo_dist.cli.data_rules import require_data_for, require_metric_in
from dpo_dist.cli.reading import datasets_of, tokenizer_of
from dpo_dist.cli.requirements import (
    require_no_gpu_meant,
    require_possible_output,
    require_trackers,
    require_usable_output,
)
from dpo_dist.config import RunConfig, load_deepspeed
from dpo_dist.errors import ModelError
from dpo_dist.packing import TOKENS, CostModel, Packer, StepPlan, longest_example, sizes_of
from dpo_dist.pretrained import (
    DTYPES,
    adapter_identity,
    attention_needs,
    decide_sharing,
    identity,
    is_prompt_learning,
    load_config,
    resolve_folder,
)
from dpo_dist.sampler import Sampler
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec

if TYPE_CHECKING:
    from dpo_dist.model import Compilations


@dataclass(frozen=True)
class Prepared:
    """A run whose mistakes have been found, as far as one process can find them."""

    config: RunConfig
    cache_dir: Path
    model_folder: Path
    reference_folder: Path
    model_config: PretrainedConfig
    reference_config: PretrainedConfig
    tokenizer: TokenizerSpec
    dataset: TokenizedDataset
    evaluation_sets: dict[str, TokenizedDataset]
    attention: tuple[str, str]  # kernel, why
    reference_attention: tuple[str, str]  # the same of a reference in memory
    sharing: tuple[bool, str]  # prompts computed once, why
    sampler: Sampler

    @property
    def dtype(self) -> torch.dtype:
        """What the policy computes in."""
        return DTYPES[self.config.model.dtype]

    @property
    def reference_dtype(self) -> torch.dtype:
        """What a reference in memory computes in."""
        return DTYPES[self.config.reference.dtype or self.config.model.dtype]

    @property
    def same_base(self) -> bool:
        """Whether policy and reference are made of the same weights, adapters apart."""
        return self.model_folder == self.reference_folder

    @property
    def unlike(self) -> str:
        """Why policy and reference are not the same function at the start; "" where they are."""
        if not self.config.has_reference:
            return "there is no reference"
        if not self.same_base:
            return "reference differs"
        if self.reference_dtype != self.dtype:
            return "the reference computes in another dtype"
        if self.config.adapter.peft_type is not None and is_prompt_learning(self.config.adapter):
            return "new virtual tokens change the policy"
        return ""

    @cached_property
    def reference_identity(self) -> str:
        """Hash of the reference's weights, and of what else decides what it computes."""
        if not self.config.has_reference:
            return "none"
        adapter = self.config.adapter
        parts = [self.weights_of(self.reference_folder)]
        if adapter.adapter_name_or_path is not None and self.same_base:
            parts.append(adapter_identity(Path(adapter.adapter_name_or_path), self.cache_dir / "weights"))
        if adapter.load_in_4bit and self.same_base:
            nested = "-nested" if adapter.use_bnb_nested_quant else ""
            parts.append(f"{adapter.bnb_4bit_quant_type}{nested}")
        return "+".join(parts)

    def weights_of(self, folder: Path) -> str:
        """Hash of a model's weights."""
        return identity(folder, self.cache_dir / "weights")

    @cached_property
    def deepspeed(self) -> dict[str, Any]:
        """The policy's complete DeepSpeed configuration."""
        from dpo_dist.engine import engine_config

        file = load_deepspeed(self.config.parallel.deepspeed)
        return engine_config(file, self.dtype, this_device(), self.config.train.max_grad_norm)

    @cached_property
    def compilations(self) -> "Compilations | None":
        """Where it is counted what torch.compile compiles of policy and reference; None where it is not to."""
        from dpo_dist.model import Compilations

        return Compilations() if self.config.model.torch_compile else None

    @cached_property
    def unused_weights(self) -> tuple[str, ...]:
        """Remarks on what the models' files hold besides; files that do not fit their model are refused."""
        from dpo_dist.model import find_fit

        model = self.config.model
        found = []
        for key, folder, its_config in self.models:
            fit = find_fit(folder, its_config, model.trust_remote_code)
            fit.require(key, folder)
            found.append(fit.remark(key, folder))
        return tuple(filter(None, found))

    @property
    def models(self) -> list[tuple[str, Path, PretrainedConfig]]:
        """Policy and, where it is made of other weights, reference: its key, its folder, its configuration."""
        places = [("model.model_name_or_path", self.model_folder, self.model_config)]
        if not self.same_base:
            places.append(("model.reference_name_or_path", self.reference_folder, self.reference_config))
        return places

    @cached_property
    def architectures(self) -> list[Architecture]:
        """What small models of the architectures told; one that cannot be trained is refused."""
        from dpo_dist.model import try_architecture

        trust = self.config.model.trust_remote_code
        return [
            Architecture(key, one, try_architecture(one, key, self.sharing[0], trust)) for key, _, one in self.models
        ]

    @property
    def datasets(self) -> dict[str, TokenizedDataset]:
        """All data sets, by what they are called."""
        return {"data.train": self.dataset, **self.evaluation_sets}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.config.train
        return train.max_steps or self.sampler.num_steps(train.num_train_epochs)

    def first_plan(self, world_size: int) -> StepPlan:
        """Who computes what in the first step."""
        rows = self.sampler.examples_of(0)
        return self.packer(world_size).plan(0, rows, sizes_of(self.dataset, rows))

    @cached_property
    def cost(self) -> CostModel:
        """What an example costs in this run. Memory decides what `auto` recomputes, and must not decide a plan."""
        from dpo_dist.model import model_cost

        model, frozen = self.config.model, self.config.adapter.is_used
        return model_cost(self.model_config, model.trust_remote_code, frozen, model.gradient_checkpointing is True)

    def packer(self, world_size: int, cost: CostModel | None = None) -> Packer:
        """The packer for a number of ranks. The run's own cost imports a model class, so one that is given is taken."""
        packing = self.config.packing
        reference = packing.reference_max_tokens or 2 * packing.max_tokens
        return Packer(world_size, packing.max_tokens, reference, self.sharing[0], cost or self.cost)


def prepare(config: RunConfig, cache_dir: Path) -> Prepared:
    """Find every mistake that can be found without starting; tokenise the data if that is still to be done.

    Raises:
        DpoDistError: the first mistake.
    """
    device = this_device()
    dtype = DTYPES[config.model.dtype]
    load_deepspeed(config.parallel.deepspeed)  # refuses what is not possible
    model, key = config.model, "model.model_name_or_path"
    model_folder = resolve_folder(model.model_name_or_path, key, model.revision, cache_dir)
    reference_folder = model_folder
    if model.reference_name_or_path is not None:
        key = "model.reference_name_or_path"
        reference_folder = resolve_folder(model.reference_name_or_path, key, None, cache_dir)
    model_config = load_config(model_folder, model.trust_remote_code)
    reference_config = load_config(reference_folder, model.trust_remote_code, key)
    reference_dtype = DTYPES[config.reference.dtype or model.dtype]
    kernels = [
        choose_backend(model.attn_implementation, device, its_dtype, [attention_needs(one)], model.deterministic)
        for one, its_dtype in ((model_config, dtype), (reference_config, reference_dtype))
    ]
    if model.use_liger_kernel:
        from dpo_dist.model import require_liger

        require_liger(device, model_config, reference_config)
    sharing = decide_sharing(model_config, model.prefix_sharing)
    decide_sharing(reference_config, "auto")
    if model_config.vocab_size != reference_config.vocab_size:
        raise ModelError(
            f"model.reference_name_or_path={model.reference_name_or_path} has a vocabulary of "
            f"{reference_config.vocab_size} tokens, the policy one of {model_config.vocab_size}; "
            "both must score the same token ids"
        )
    tokenizer = tokenizer_of(config, model_folder, cache_dir)
    found = datasets_of(config, tokenizer, cache_dir / "data", model_config.vocab_size)
    dataset, evaluation_sets = found.training, found.held_out
    require_data_for(config, found.places)
    require_metric_in(config, found.held_out)
    train = config.train
    sampler = Sampler(len(dataset), train.examples_per_step, train.seed, train.shuffle)
    prepared = Prepared(
        config, cache_dir, model_folder, reference_folder, model_config, reference_config, tokenizer,
        dataset, evaluation_sets, kernels[0], kernels[1], sharing, sampler,
    )  # fmt: skip
    for checked in (dataset, *evaluation_sets.values()):
        row = longest_example(checked, prepared.sharing[0])
        prepared.packer(1, TOKENS).require_fit(sizes_of(checked, [row])[0], checked.source_of(row))
    _require_model(prepared)
    return prepared


def prepare_run(config: RunConfig, cache_dir: Path, look_only: bool = False) -> Prepared:
    """The same of a run that writes: its folder and its trackers must be usable too.

    Args:
        config: the run's.
        cache_dir: where dpo-dist keeps what it computes.
        look_only: nothing will be written now, so another run's files may lie in the folder.
    Raises:
        DpoDistError: the first mistake.
    """
    (require_possible_output if look_only else require_usable_output)(config)
    require_trackers(config)
    return prepare(config, cache_dir)


def _require_model(prepared: Prepared) -> None:
    """Find the mistakes that need DeepSpeed, a model class or PEFT to be found."""
    from dpo_dist.model import four_bits

    config = prepared.config
    virtual = is_prompt_learning(config.adapter) if config.adapter.is_used else False
    require_positions(prepared.architectures, prepared.datasets, config.adapter.num_virtual_tokens if virtual else 0)
    _ = prepared.unused_weights
    require_compilable(config, prepared.deepspeed, this_device())
    four_bits(config.adapter, prepared.dtype)
    if config.adapter.is_used:
        from dpo_dist.adapters import require_adapter

        require_adapter(
            config.adapter, prepared.model_config, config.model.gradient_checkpointing,
            config.model.trust_remote_code, config.train.max_steps, prepared.tokenizer.path,
        )  # fmt: skip


def this_device() -> torch.device:
    """Where a run on this machine computes.

    Raises:
        ConfigError: on the CPU, though GPUs are there or were asked for: nobody waits for that by choice.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    require_no_gpu_meant(str(torch.__version__))
    return torch.device("cpu")
