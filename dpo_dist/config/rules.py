"""Which combinations of options are impossible, and which keys have no effect in a combination.

A key counts as set if it differs from its default. A set key that would be ignored is an error where the run would be
another one than its author believes, as is a combination that cannot do what it says; where the result is the same, it
is remarked on. Nothing is changed or ignored silently.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.config.evaluation_rules import evaluation_keys_without_effect, evaluation_rules
from dpo_dist.config.loss_rules import loss_keys_without_effect, loss_rules
from dpo_dist.config.models import RunConfig
from dpo_dist.config.source_rules import Broken, KeyPath, Unread, source_keys_without_effect, source_rules

__all__ = ["Broken", "KeyPath", "Unread", "broken_rules", "is_set", "keys_without_effect", "value_at"]

COMMIT_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def keys_without_effect(config: RunConfig) -> dict[KeyPath, Unread]:
    """Keys that this combination never reads -> why, and whether that matters."""
    found = {
        **source_keys_without_effect(config),
        **loss_keys_without_effect(config),
        **evaluation_keys_without_effect(config),
    }
    if config.train.max_steps is not None:
        found["train", "num_train_epochs"] = Unread(
            ("train", "max_steps"),
            f"has no effect while train.max_steps={config.train.max_steps} sets the run's length; set one of the two",
        )
    if config.data.max_length is None:
        found["data", "truncation_mode"] = Unread(
            ("data", "max_length"),
            "has no effect without data.max_length; set data.max_length, or leave this out",
        )
    if config.train.lr_scheduler_type == "constant":
        found["train", "warmup_steps"] = Unread(
            ("train", "lr_scheduler_type"),
            "has no effect with train.lr_scheduler_type=constant; use constant_with_warmup, or leave this out",
        )
    if not config.train.shuffle and not config.adapter.is_used:  # an adapter's first values are random
        found["train", "seed"] = Unread(
            ("train", "shuffle"),
            "has no effect with train.shuffle=false: nothing else is random; leave this out, or shuffle",
            same_result=True,
        )
    if config.adapter.peft_type == "adalora":
        why = "has no effect with adapter.peft_type=adalora, whose checkpoints are waited for; leave this out"
        found["checkpoint", "async_save"] = Unread(("adapter", "peft_type"), why, same_result=True)
    name = config.model.model_name_or_path
    if is_local(name):
        what = "names the demo model" if name == "demo" else "is a local folder"
        why = f"has no effect: model.model_name_or_path={name} {what}; only a hub id has revisions; leave this out"
        found["model", "revision"] = Unread(("model", "model_name_or_path"), why)
    if name == "demo" and all(is_local(other) for other in _other_names(config).values()):
        why = "has no effect: the demo model brings no code; leave this out"
        found["model", "trust_remote_code"] = Unread(("model", "model_name_or_path"), why, same_result=True)
    return found


def broken_rules(config: RunConfig) -> Iterator[Broken]:
    """Every rule that a configuration of valid values breaks."""
    for path, unread in keys_without_effect(config).items():
        if not unread.same_result and is_set(config, path):
            yield path, (unread.cause,), unread.text
    yield from _model_rules(config)
    yield from _data_rules(config)
    yield from _run_rules(config)
    yield from source_rules(config)
    yield from loss_rules(config)
    yield from evaluation_rules(config)


def is_set(config: RunConfig, path: KeyPath) -> bool:
    """Whether the key `(section, name)` differs from its default."""
    section = getattr(config, str(path[0]))
    field = type(section).model_fields[str(path[1])]
    return field.is_required() or getattr(section, str(path[1])) != field.get_default(call_default_factory=True)


def is_local(name: str) -> bool:
    """Whether a model's name needs no hub: the demo model, or an existing folder."""
    return name == "demo" or Path(name).exists()


def value_at(value: Any, path: KeyPath) -> Any:
    """The value of a key in a configuration."""
    for part in path:
        value = value[part] if isinstance(part, int) else getattr(value, part)
    return value


def _other_names(config: RunConfig) -> dict[str, str]:
    """Names of reference and tokenizer, where they are given; `model.revision` does not hold for them."""
    named = {key: getattr(config.model, key) for key in ("reference_name_or_path", "tokenizer_name_or_path")}
    return {key: name for key, name in named.items() if name is not None}


def _model_rules(config: RunConfig) -> Iterator[Broken]:
    model = config.model
    if model.dtype == "float32" and model.attn_implementation in ("flash_attn", "torch"):
        yield (
            ("model", "attn_implementation"),
            (("model", "dtype"),),
            "computes in bfloat16 or float16 only, and model.dtype=float32; use sdpa or auto, or another dtype",
        )
    if model.torch_compile and model.use_liger_kernel:
        yield (
            ("model", "torch_compile"),
            (("model", "use_liger_kernel"),),
            "makes fused kernels of what model.use_liger_kernel=true computes by Liger's; leave one of them out",
        )
    if not model.trust_remote_code:
        return
    if not is_local(model.model_name_or_path) and not COMMIT_HASH.fullmatch(model.revision or ""):
        yield (
            ("model", "trust_remote_code"),
            (("model", "model_name_or_path"), ("model", "revision")),
            "runs whatever code the hub repository holds that day; pin it: set model.revision to the full hash of a "
            "commit you have read, or use a local folder",
        )
    for key, name in _other_names(config).items():
        if not is_local(name):
            yield (
                ("model", key),
                (("model", "trust_remote_code"),),
                "is a hub repository whose code cannot be pinned with model.trust_remote_code=true; use a local folder",
            )


def _data_rules(config: RunConfig) -> Iterator[Broken]:
    data, budget = config.data, config.packing.max_tokens
    if data.max_length is not None and data.max_length > budget:
        yield (
            ("data", "max_length"),
            (("packing", "max_tokens"),),
            f"admits examples that fit no micro-batch; raise packing.max_tokens={budget}, or lower this",
        )
    first_use: dict[tuple[str | None, ...], int] = {}
    for index, source in enumerate(data.evaluation):
        first = first_use.setdefault((source.path, source.name, source.revision, source.split), index)
        if first != index:
            yield (
                ("data", "evaluation", index, "path"),
                (("data", "evaluation"),),
                f"is the same set as data.evaluation.{first}; its metrics could not be told apart; leave one out",
            )
    if data.has_held_out and not config.evaluation.eval_steps and not config.evaluation.eval_on_start:
        yield (
            ("data", "evaluation" if data.evaluation else "holdout"),
            (("evaluation", "eval_steps"), ("evaluation", "eval_on_start")),
            "would never be evaluated; set evaluation.eval_steps or evaluation.eval_on_start, or leave this out",
        )


def _run_rules(config: RunConfig) -> Iterator[Broken]:
    train, path = config.train, ("train", "warmup_steps")
    if train.lr_scheduler_type == "constant_with_warmup" and train.warmup_steps == 0:
        yield (
            ("train", "lr_scheduler_type"),
            (path,),
            "has no warmup without train.warmup_steps; set it, or use constant",
        )
    ramps = train.lr_scheduler_type != "constant" and train.warmup_steps >= 1
    if train.warmup_steps > 1 and not train.warmup_steps.is_integer():
        yield path, (), "is neither a number of steps nor a share of them; write a whole number, or one between 0 and 1"
    elif ramps and train.max_steps is not None and train.warmup_steps >= train.max_steps:
        yield (
            path,
            (("train", "max_steps"),),
            f"leaves no step at the full learning rate of a run with train.max_steps={train.max_steps}; lower it",
        )
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).exists():
        yield ("checkpoint", "resume"), (), "does not exist; write auto, never, or the folder of a checkpoint"
    if len(set(config.log.report_to)) != len(config.log.report_to):
        yield ("log", "report_to"), (), "names a tracker twice; name each once"
