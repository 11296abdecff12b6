"""All that can be known before a process group exists: files, model, data, packing. Shared by `check` and `train`."""

import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from dpo_dist.attention import choose_backend
from dpo_dist.config import DataSource, RunConfig, load_deepspeed
from dpo_dist.demo import demo_model_folder
from dpo_dist.engine import engine_config
from dpo_dist.errors import ConfigError, ModelError
from dpo_dist.metrics import TRACKER_PACKAGES
from dpo_dist.model import DTYPES, attention_needs, decide_sharing, find_fit, identity, load_config, resolve_folder
from dpo_dist.packing import Packer, StepPlan, longest_example, sizes_of
from dpo_dist.sampler import Sampler
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset, repeated_data


@dataclass(frozen=True)
class Prepared:
    """A run whose mistakes have been found, as far as one process can find them."""

    config: RunConfig
    deepspeed: dict[str, Any]  # the policy's complete DeepSpeed configuration
    model_folder: Path
    reference_folder: Path
    model_config: PretrainedConfig
    reference_config: PretrainedConfig
    tokenizer: TokenizerSpec
    dataset: TokenizedDataset
    evaluation_sets: dict[str, TokenizedDataset]
    unused_weights: tuple[str, ...]  # remarks on what the models' files hold besides
    attention: tuple[str, str]  # kernel, why
    sharing: tuple[bool, str]  # prompts computed once, why
    sampler: Sampler

    @property
    def dtype(self) -> torch.dtype:
        """What policy and reference compute in."""
        return DTYPES[self.config.model.dtype]

    @property
    def same_weights(self) -> bool:
        """Whether policy and reference start from the same folder."""
        return self.model_folder == self.reference_folder

    @cached_property
    def reference_identity(self) -> str:
        """Hash of the reference's weights."""
        return identity(self.reference_folder)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.config.train
        return train.max_steps or self.sampler.num_steps(train.num_train_epochs)

    def first_plan(self, world_size: int) -> StepPlan:
        """Who computes what in the first step."""
        rows = self.sampler.examples_of(0)
        return self.packer(world_size).plan(0, rows, sizes_of(self.dataset, rows))

    def packer(self, world_size: int) -> Packer:
        """The packer for a number of ranks."""
        packing = self.config.packing
        reference_max_tokens = packing.reference_max_tokens or 2 * packing.max_tokens
        return Packer(world_size, packing.max_tokens, reference_max_tokens, self.sharing[0])


def prepare(config: RunConfig, cache_dir: Path) -> Prepared:
    """Find every mistake that can be found without starting; tokenise the data if that is still to be done.

    Raises:
        DpoDistError: the first mistake.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[config.model.dtype]
    deepspeed = engine_config(load_deepspeed(config.parallel.deepspeed), dtype, device, config.train.max_grad_norm)
    model, key = config.model, "model.model_name_or_path"
    model_folder = resolve_folder(model.model_name_or_path, key, model.revision, cache_dir)
    reference_folder = model_folder
    if model.reference_name_or_path is not None:
        key = "model.reference_name_or_path"
        reference_folder = resolve_folder(model.reference_name_or_path, key, None, cache_dir)
    model_config = load_config(model_folder, model.trust_remote_code)
    reference_config = load_config(reference_folder, model.trust_remote_code)
    needs = [attention_needs(one) for one in (model_config, reference_config)]
    attention = choose_backend(model.attn_implementation, device, dtype, needs)
    sharing = decide_sharing(model_config, model.prefix_sharing)
    decide_sharing(reference_config, "auto")
    if model_config.vocab_size != reference_config.vocab_size:
        raise ModelError(
            f"model.reference_name_or_path={model.reference_name_or_path} has a vocabulary of "
            f"{reference_config.vocab_size} tokens, the policy one of {model_config.vocab_size}; "
            "both must score the same token ids"
        )
    unused = [_unused_weights(model_folder, model_config, "model.model_name_or_path", model.trust_remote_code)]
    if reference_folder != model_folder:
        unused.append(_unused_weights(reference_folder, reference_config, key, model.trust_remote_code))
    tokenizer = _tokenizer(config, model_folder, cache_dir)
    dataset = _dataset(config, config.data.train, tokenizer, model_config, cache_dir, "data.train", 0)
    names = config.data.evaluation_names
    evaluation_sets = {
        name: _dataset(config, [source], tokenizer, model_config, cache_dir, "data.evaluation", index)
        for index, (name, source) in enumerate(zip(names, config.data.evaluation, strict=True))
    }
    train = config.train
    sampler = Sampler(len(dataset), train.examples_per_step, train.seed, train.shuffle)
    prepared = Prepared(
        config, deepspeed, model_folder, reference_folder, model_config, reference_config, tokenizer, dataset,
        evaluation_sets, tuple(filter(None, unused)), attention, sharing, sampler,
    )  # fmt: skip
    for checked in (dataset, *evaluation_sets.values()):
        row = longest_example(checked, prepared.sharing[0])
        prepared.packer(1).require_fit(sizes_of(checked, [row])[0], checked.source_of(row))
    return prepared


def require_usable_output(config: RunConfig) -> None:
    """A folder that holds something is not written into, unless the run is to be resumed in it.

    Raises:
        ConfigError: naming the folder and the ways out.
    """
    folder = Path(config.train.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output_dir={folder} is a file; give a folder that is new or empty")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _is_virtual(parent):
        raise ConfigError(
            f"train.output_dir={folder} cannot be made: {parent} is no folder that can be written to; choose another"
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"train.output_dir={folder} is not empty; choose another folder, "
            "or continue the run in it with checkpoint.resume=auto"
        )
    if config.checkpoint.resume == "auto" and not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"train.output_dir={folder} is not empty and holds no run (no config.yaml); checkpoint.resume=auto "
            "continues a run in its own folder: choose that one, or a new one"
        )


def require_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: naming the package.
    """
    for name in config.log.report_to:
        if find_spec(TRACKER_PACKAGES[name]) is None:
            package = TRACKER_PACKAGES[name]
            raise ConfigError(
                f"log.report_to={name} needs the package {package}; pip install {package}, or leave it out"
            )


def remarks(prepared: Prepared, plan: StepPlan) -> list[str]:
    """What is allowed and seldom meant, a sentence each.

    Args:
        prepared: The run.
        plan: Its first step.
    """
    config = prepared.config
    found = [*prepared.unused_weights]
    found += repeated_data(config.data, prepared.dataset, list(prepared.evaluation_sets.values()))
    wanted, available = config.train.examples_per_step, len(prepared.dataset)
    if wanted > available:
        found.append(f"train.examples_per_step={wanted}: there are {available} examples; every step takes all of them")
    idle = sum(not any(micro_batches) for micro_batches in plan.micro_batches)
    if idle:
        examples = counted(len(plan.examples), "example")
        found.append(f"{idle} of {len(plan.micro_batches)} ranks have nothing to do: a step has {examples}")
    accumulated = prepared.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if prepared.dtype != torch.float32 and accumulated != "fp32":
        name = config.model.dtype
        found.append(
            f"parallel.deepspeed={config.parallel.deepspeed} adds gradients up in {name}, which loses small ones; the "
            "files whose names end with _bf16 add them up in float32"
        )
    return found


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _unused_weights(folder: Path, config: PretrainedConfig, key: str, trust_remote_code: bool) -> str | None:
    fit = find_fit(folder, config, trust_remote_code)
    fit.require(key, folder)
    return fit.remark(key, folder)


def _is_virtual(folder: Path) -> bool:
    # The super-user may write there by the permissions, and yet nothing can be made. By name, not by the size of the
    # file system: network file systems may report none.
    return any(folder.resolve().is_relative_to(root) for root in ("/proc", "/sys"))


def _tokenizer(config: RunConfig, model_folder: Path, cache_dir: Path) -> TokenizerSpec:
    model = config.model
    if model.tokenizer_name_or_path is None:
        return TokenizerSpec(str(model_folder), None, model.trust_remote_code, "model.model_name_or_path")
    is_demo = model.tokenizer_name_or_path == "demo"
    path = str(demo_model_folder(cache_dir)) if is_demo else model.tokenizer_name_or_path
    return TokenizerSpec(path, None, model.trust_remote_code, "model.tokenizer_name_or_path")


def _dataset(
    config: RunConfig,
    sources: list[DataSource],
    tokenizer: TokenizerSpec,
    model_config: PretrainedConfig,
    cache_dir: Path,
    section: str,
    first_index: int,
) -> TokenizedDataset:
    dataset = prepare_dataset(
        sources, config.data, tokenizer, cache_dir / "data", section=section, first_index=first_index
    )
    dataset.check_vocabulary(model_config.vocab_size)
    return dataset
