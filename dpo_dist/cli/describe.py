"""A prepared run in words for people, and in hashes for the other ranks."""

import json

from dpo_dist.cli.prepare import Prepared
from dpo_dist.config import RunConfig, is_local
from dpo_dist.packing import StepPlan
from dpo_dist.pretrained import adapter_kind


def settings_of(config: RunConfig) -> dict[str, str]:
    """What every rank must have set alike, by key and as JSON: not where a node keeps models and data."""
    values = config.model_dump(mode="json")
    for source in (*values["data"]["train"], *values["data"]["evaluation"]):
        del source["path"]
    del values["model"]["model_name_or_path"], values["model"]["reference_name_or_path"]
    del values["model"]["tokenizer_name_or_path"], values["adapter"]["adapter_name_or_path"]
    del values["data"]["chat_template"]
    del values["reference"]["cache_dir"]  # the first rank's alone is used
    return {
        f"{section}.{key}": json.dumps(value, sort_keys=True)
        for section, keys in values.items()
        for key, value in keys.items()
    }


def facts(prepared: Prepared, plan: StepPlan) -> dict[str, str]:
    """What every rank must have alike. Where a node keeps data and models is its own affair: what they hold counts."""
    held_out = {
        f"the data of data.evaluation.{index}": dataset.fingerprint
        for index, dataset in enumerate(prepared.evaluation_sets.values())
    }
    return {
        **settings_of(prepared.config),
        "the training data": prepared.dataset.fingerprint,
        **held_out,
        "the policy's weights": prepared.weights_of(prepared.model_folder),
        "the reference's weights": prepared.reference_identity,
        # Another version of a package may count otherwise, and a later step's plan differ where the first does not.
        "what an example costs": str(prepared.cost),
        "the first step's plan": plan.fingerprint,
    }


def describe_adapter(prepared: Prepared) -> str:
    """What is trained instead of all weights, for people."""
    adapter, kind = prepared.config.adapter, adapter_kind(prepared.config.adapter)
    if adapter.adapter_name_or_path is not None:
        return f"{kind}, going on from {adapter.adapter_name_or_path}; a frozen copy of it is the reference"
    quantised = f", frozen weights in 4 bits ({adapter.bnb_4bit_quant_type})" if adapter.load_in_4bit else ""
    return f"{kind}{quantised}"


def base_model_name(prepared: Prepared) -> str:
    """How an exported adapter names the model that it belongs to: a hub id, or a folder that is found from anywhere."""
    name = prepared.config.model.model_name_or_path
    return str(prepared.model_folder.resolve()) if is_local(name) else name


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
