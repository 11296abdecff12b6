"""The same run with its reference live, from a cache, and from the policy without its adapters."""

import functools
from pathlib import Path
from typing import Any

from tests.golden.trajectories import base_config, case_config, load_case

STAGES = (0, 3)
WORLD_SIZES = (1, 2)
GOLDEN = "sigmoid"
# All weights are trained against another model: TRL's recorded run.
WHOLE = {
    "live": {"source": "live"},
    "live-per-microbatch": {"source": "live", "per_microbatch": True},
    "cache": {"source": "cache"},
    "cache-tokens": {"source": "cache", "store_token_logps": True},
}
OWN_CACHES = "own-caches"
ADAPTED = ("live", "cache", "adapter_off")
# Kinds of adapters whose policy moves away from its starting weights; `continued` starts from one that has moved.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "lora", "lora_r": 4, "lora_alpha": 16},
    "whole-modules": {"peft_type": "lora", "lora_r": 4, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "prompt": {"peft_type": "prompt_tuning", "num_virtual_tokens": 16},
}
ADAPTER_STEPS = 4


def whole_config(folder: Path, name: str, stage: int) -> dict[str, Any]:
    """Training of all weights."""
    config = case_config(load_case(GOLDEN), folder / whole_name(name, stage))
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    config["packing"] = {"max_tokens": 150, "reference_max_tokens": 300}
    config["reference"] = dict(WHOLE[name])
    return config


def adapted_config(folder: Path, adapter: str, source: str, stage: int) -> dict[str, Any]:
    """Training of an adapter at a rate at which the policy leaves the reference far behind."""
    config = base_config(folder / adapted_name(adapter, source, stage))
    del config["model"]["reference_name_or_path"]
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    config["adapter"] = dict(ADAPTERS[adapter]) if adapter != "continued" else {}
    config["reference"] = {"source": source}
    config["train"] |= {
        "examples_per_step": 8,
        "max_steps": ADAPTER_STEPS,
        "learning_rate": 0.2 if adapter == "prompt" else 2e-2,
    }
    return config


def continued_config(folder: Path, source: str, stage: int) -> dict[str, Any]:
    """Training on of the adapter that the run `lora` has exported, in the same folder."""
    config = adapted_config(folder, "continued", source, stage)
    config["adapter"] = {"adapter_name_or_path": str(folder / adapted_name("lora", "live", 0) / "model")}
    return config


def whole_name(name: str, stage: int) -> str:
    """Of a run's folder."""
    return f"whole-{name}-stage{stage}"


def adapted_name(adapter: str, source: str, stage: int) -> str:
    """Of a run's folder."""
    return f"{adapter}-{source}-stage{stage}"


def is_by_hand(kind: str, source: str, stage: int) -> bool:
    """Whether a run belongs to the full product, which is not run at every commit."""
    if kind == "whole":
        return stage == 0 and source not in ("live", "cache")
    return kind != "lora" and (source, stage) not in _AT_EVERY_COMMIT[kind]


# `live` at stage 0 is what the others are compared with.
_AT_EVERY_COMMIT = {
    "continued": (("live", 0), ("cache", 3), ("adapter_off", 3)),
    "whole-modules": (("live", 0), ("adapter_off", 3)),
    "prompt": (),
}


def configs(folder: Path, everything: bool) -> dict[str, dict[str, Any]]:
    """Every run, or those of every commit; the order matters to `continued`."""
    runs = {}
    for stage in STAGES:
        for name in WHOLE:
            if everything or not is_by_hand("whole", name, stage):
                runs[whole_name(name, stage)] = whole_config(folder, name, stage)
    for adapter in (*ADAPTERS, "continued"):
        for stage in STAGES:
            for source in ADAPTED:
                if not everything and is_by_hand(adapter, source, stage):
                    continue
                build = (
                    continued_config if adapter == "continued" else functools.partial(adapted_config, adapter=adapter)
                )
                runs[adapted_name(adapter, source, stage)] = build(folder, source=source, stage=stage)
    # After `whole-cache-stage0`, whose values the first rank alone has on its machine.
    runs[OWN_CACHES] = case_config(load_case(GOLDEN), folder / OWN_CACHES)
    runs[OWN_CACHES]["reference"] = {"source": "auto"}
    runs["none"] = base_config(folder / "none")
    del runs["none"]["model"]["reference_name_or_path"]
    runs["none"]["reference"] = {"source": "none"}
    runs["none"]["train"] |= {"examples_per_step": 8, "max_steps": 2, "learning_rate": 1e-3}
    return runs
