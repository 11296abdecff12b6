"""What is allowed and seldom meant."""

import json
from pathlib import Path

import torch

from dpo_dist.cli.architectures import architecture_remarks
from dpo_dist.cli.data_rules import data_remarks
from dpo_dist.cli.describe import base_model_name, counted
from dpo_dist.cli.prepare import Prepared
from dpo_dist.config import config_remarks
from dpo_dist.packing import StepPlan
from dpo_dist.tokenization import MERGED, repeated_data


def remarks(prepared: Prepared, plan: StepPlan) -> list[str]:
    """What is allowed and seldom meant, a sentence each.

    Args:
        prepared: The run.
        plan: Its first step.
    """
    config = prepared.config
    found = [*config_remarks(config), *prepared.unused_weights, *_source_remarks(prepared)]
    found += architecture_remarks(prepared.architectures, prepared.datasets)
    found += data_remarks(config, (prepared.dataset, *prepared.evaluation_sets.values()))
    found += repeated_data(config.data, prepared.dataset, list(prepared.evaluation_sets.values()))
    notes = [dataset.notes for dataset in (prepared.dataset, *prepared.evaluation_sets.values())]
    if config.data.group_by_prompt and not any(MERGED in of_set for of_set in notes):
        found.append("data.group_by_prompt=true: no two rows of a data set have the same prompt; nothing was merged")
    wanted, available = config.train.examples_per_step, len(prepared.dataset)
    if wanted > available:
        found.append(f"train.examples_per_step={wanted}: there are {available} examples; every step takes all of them")
    idle = sum(not any(micro_batches) for micro_batches in plan.micro_batches)
    if idle:
        examples = counted(len(plan.examples), "example")
        found.append(f"{idle} of {len(plan.micro_batches)} ranks have nothing to do: a step has {examples}")
    late = [str(step) for step in config.log.profile_steps if step > prepared.num_steps]
    if late:
        steps = counted(prepared.num_steps, "step")
        found.append(f"log.profile_steps={','.join(late)} has no effect: the run ends after {steps}; leave this out")
    accumulated = prepared.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if prepared.dtype != torch.float32 and accumulated != "fp32":
        name = config.model.dtype
        found.append(
            f"parallel.deepspeed={config.parallel.deepspeed} adds gradients up in {name}, which loses small ones; the "
            "files whose names end with _bf16 add them up in float32"
        )
    return found


def _source_remarks(prepared: Prepared) -> list[str]:
    """The same of reference and adapter."""
    found, reference = [], prepared.config.reference
    if reference.sync_ref_model and reference.ref_model_sync_steps > prepared.num_steps:
        found.append(
            f"reference.ref_model_sync_steps={reference.ref_model_sync_steps}: the run ends after "
            f"{counted(prepared.num_steps, 'step')}, before the reference follows the policy once"
        )
    groups, stage = reference.zero_hpz_partition_size, prepared.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if groups is not None and stage < 3 and reference.source not in ("adapter_off", "none"):
        found.append(
            f"reference.zero_hpz_partition_size={groups} has no effect below ZeRO stage 3, where every process holds "
            "the whole reference; leave it out"
        )
    file, zero = prepared.config.parallel.deepspeed, prepared.deepspeed.get("zero_optimization", {})
    if prepared.config.adapter.is_used and file.endswith(".json") and "leaf_module" in zero:
        found.append(
            f"parallel.deepspeed={file}: zero_optimization.leaf_module has no effect with adapters: DeepSpeed 0.19.8 "
            "would let go of frozen weights before they are used; leave it out"
        )
    adapter = prepared.config.adapter.adapter_name_or_path
    if adapter is not None:
        settings = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        named, own = settings.get("base_model_name_or_path"), base_model_name(prepared)
        if named and named != own:
            found.append(
                f"adapter.adapter_name_or_path={adapter} was trained on {named}, and the model here is {own}: shapes "
                "fit, whether the weights do only you can know"
            )
    return found
