"""Rules of the sections `adapter` and `reference`, as in `rules.py`."""

from collections.abc import Iterator
from typing import NamedTuple

from dpo_dist.config.adapter import AdapterConfig
from dpo_dist.config.models import RunConfig

KeyPath = tuple[str | int, ...]
Broken = tuple[KeyPath, tuple[KeyPath, ...], str]
"""The offending key, the other keys its verdict depends on, and `what is wrong; what would be right`."""


class Unread(NamedTuple):
    """Why a key has no effect, and whether that matters."""

    cause: KeyPath
    """The key that makes it so."""
    text: str
    """`what is wrong; what would be right`."""
    same_result: bool = False
    """The run does all that the key asks for as it is: worth a remark. Else it is another run than one may believe: an
    error. docs/decisions/0015-strictness.md has every verdict."""


_PROMPT_LEARNING = ("prefix_tuning", "prompt_tuning", "p_tuning")
_LOW_RANK = ("lora", "adalora")
# Keys of `adapter` -> the kinds that read them.
_READ_BY: dict[str, tuple[str, ...]] = {
    "lora_r": ("lora",),
    "lora_alpha": _LOW_RANK,
    "lora_target_modules": _LOW_RANK,
    "lora_modules_to_save": _LOW_RANK,
    "use_rslora": ("lora",),
    "use_dora": ("lora",),
    "load_in_4bit": ("lora",),
    "bnb_4bit_quant_type": ("lora",),
    "use_bnb_nested_quant": ("lora",),
    **dict.fromkeys(("init_r", "target_r", "tinit", "tfinal", "deltaT", "orth_reg_weight", "total_step"), ("adalora",)),
    "num_virtual_tokens": _PROMPT_LEARNING,
    "encoder_hidden_size": ("p_tuning",),
    "prompt_tuning_init_text": ("prompt_tuning",),
}
_QUANTISATION = ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
# Keys of `reference` -> the sources that read them; `auto` may choose any.
_ASKED_BY: dict[str, tuple[str, ...]] = {
    "dtype": ("live", "cache"),
    "per_microbatch": ("live",),
    "sharded": ("live", "cache"),
    "offload_param": ("live", "cache"),
    "zero_hpz_partition_size": ("live", "cache"),
    "cache_dir": ("cache",),
    "verify_rows": ("cache",),
    "store_token_logps": ("cache",),
    "sync_ref_model": ("live",),
}
# Of these, the sources under which all that they ask for is the case anyway.
_GRANTED: dict[str, tuple[str, ...]] = {
    "per_microbatch": ("none",),
    "sharded": ("adapter_off", "none"),
    "offload_param": ("adapter_off", "none"),
    "zero_hpz_partition_size": ("adapter_off", "none"),
    "verify_rows": ("live", "adapter_off", "none"),
}


def source_keys_without_effect(config: RunConfig) -> dict[KeyPath, Unread]:
    """As `rules.keys_without_effect`, of these two sections."""
    return {**_unread_adapter_keys(config.adapter), **_unread_reference_keys(config)}


def _unread_adapter_keys(adapter: AdapterConfig) -> dict[KeyPath, Unread]:
    found: dict[KeyPath, Unread] = {}
    kind, continued = adapter.peft_type, adapter.adapter_name_or_path
    if continued is not None:
        why = f"has no effect: adapter.adapter_name_or_path={continued} brings its own settings; leave this out"
        for key in ("peft_type", *(key for key in _READ_BY if key not in _QUANTISATION)):
            found["adapter", key] = Unread(("adapter", "adapter_name_or_path"), why)
    else:
        for key, kinds in _READ_BY.items():
            if kind not in kinds:
                which = f"with adapter.peft_type={kind}" if kind else "without adapter.peft_type"
                why = f"has no effect {which}; it belongs to {' and '.join(kinds)}: leave this out, or set peft_type"
                found["adapter", key] = Unread(("adapter", "peft_type"), why)
    if not adapter.load_in_4bit:
        for key in _QUANTISATION[1:]:
            why = "has no effect without adapter.load_in_4bit; set it to true, or leave this out"
            found.setdefault(("adapter", key), Unread(("adapter", "load_in_4bit"), why))
    return found


def _unread_reference_keys(config: RunConfig) -> dict[KeyPath, Unread]:
    found: dict[KeyPath, Unread] = {}
    reference, source = config.reference, config.reference.source
    cause = ("reference", "source")
    for key, sources in _ASKED_BY.items():
        if source != "auto" and source not in sources:
            why = f"has no effect with reference.source={source}; it belongs to {' and '.join(sources)}; leave this out"
            found["reference", key] = Unread(cause, why, source in _GRANTED.get(key, ()))
    if not reference.sync_ref_model:
        for key in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            why = "has no effect without reference.sync_ref_model; set it to true, or leave this out"
            found["reference", key] = Unread(("reference", "sync_ref_model"), why)
    if source in ("adapter_off", "none"):
        what = (
            "the policy without its adapters is the reference" if source == "adapter_off" else "there is no reference"
        )
        why = f"has no effect with reference.source={source}: {what}; leave this out, or use live or cache"
        found["model", "reference_name_or_path"] = Unread(cause, why)
    return found


def source_rules(config: RunConfig) -> Iterator[Broken]:
    """Every rule of these two sections that a configuration breaks."""
    yield from _reference_rules(config)
    adapter = config.adapter
    if adapter.peft_type == "adalora" and adapter.adapter_name_or_path is None:
        yield from _adalora_rules(config)
    if adapter.peft_type == "prefix_tuning" and config.model.gradient_checkpointing is True:
        yield (
            ("model", "gradient_checkpointing"),
            (("adapter", "peft_type"),),
            "cannot be combined with adapter.peft_type=prefix_tuning, whose prefix a recomputed layer would not see; "
            "set it to false, or leave it out",
        )


def _reference_rules(config: RunConfig) -> Iterator[Broken]:
    reference, adapter = config.reference, config.adapter
    if reference.source == "adapter_off" and not adapter.is_used:
        yield (
            ("reference", "source"),
            (("adapter", "peft_type"), ("adapter", "adapter_name_or_path")),
            "has no adapters to switch off: all weights are trained; set adapter.peft_type, or use live, cache or auto",
        )
    if reference.sync_ref_model and adapter.is_used:
        yield (
            ("reference", "sync_ref_model"),
            (("adapter", "peft_type"), ("adapter", "adapter_name_or_path")),
            "mixes all weights of policy and reference, and here only an adapter is trained; leave one of the two out",
        )
    if not reference.sharded:
        for key, is_given in (
            ("offload_param", reference.offload_param),
            ("zero_hpz_partition_size", reference.zero_hpz_partition_size is not None),
            ("sync_ref_model", reference.sync_ref_model),
        ):
            if is_given:
                yield (
                    ("reference", key),
                    (("reference", "sharded"),),
                    "needs a sharded reference, and reference.sharded=false keeps it whole; leave one of the two out",
                )
    if reference.sync_ref_model and reference.dtype is not None and reference.dtype != config.model.dtype:
        yield (
            ("reference", "dtype"),
            (("reference", "sync_ref_model"), ("model", "dtype")),
            f"differs from model.dtype={config.model.dtype}, and reference.sync_ref_model mixes the two; leave one out",
        )


def _adalora_rules(config: RunConfig) -> Iterator[Broken]:
    adapter = config.adapter
    total = adapter.total_step or config.train.max_steps
    kind = ("adapter", "peft_type")
    if total is None:
        yield (
            kind,
            (("adapter", "total_step"), ("train", "max_steps")),
            "spreads its ranks over a number of updates that must be known; set train.max_steps, or adapter.total_step",
        )
    elif adapter.tinit + adapter.tfinal >= total:
        key = "tinit" if adapter.tinit else "tfinal"
        yield (
            ("adapter", key),
            (kind, ("adapter", "total_step"), ("train", "max_steps")),
            f"leaves no update to allocate ranks in: adapter.tinit={adapter.tinit} and adapter.tfinal="
            f"{adapter.tfinal} take all of {total}; lower them",
        )
    if adapter.target_r >= adapter.init_r:
        yield (
            ("adapter", "target_r"),
            (kind, ("adapter", "init_r")),
            f"is not below adapter.init_r={adapter.init_r}, so no rank could be taken away; lower it, or use lora",
        )
