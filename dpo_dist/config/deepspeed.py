"""The DeepSpeed file: only what DeepSpeed alone needs.

DeepSpeed ignores some keys silently (`"zero_optimization.stage": 3` as one dotted key, a misspelt top-level key), and a
second learning rate or batch size in its file would contradict the run's own. Both are errors here.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.config.deepspeed_keys import DTYPES, FILE, ZERO, Allowed
from dpo_dist.config.files import names, package_file
from dpo_dist.config.guesses import guess
from dpo_dist.errors import ConfigError


def load_deepspeed(name_or_path: str) -> dict[str, Any]:
    """Read and check a DeepSpeed file.

    Args:
        name_or_path: name of a file in `deepspeed_configs/` without .json, or the path of a .json file.
    Returns:
        The file's content, without keys that its ZeRO stage does not read. Optimizer, batch, clipping and dtype are
        added by the engine.
    Raises:
        ConfigError: with one line for each error there is.
    """
    path = _find(name_or_path)
    content = _read(path)
    for keys, _ in _unread_keys(content):
        section: dict[str, Any] = content
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
    problems = list(_problems(content))
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return content


def deepspeed_remarks(name_or_path: str) -> list[str]:
    """Keys of a sound file that only another ZeRO stage reads, and that change neither numbers nor memory."""
    return [text for _, text in _unread_keys(_read(_find(name_or_path)))]


def dtype_problems(content: dict[str, Any], dtype: str) -> Iterator[str]:
    """Sections of a checked file that have no effect with the run's `model.dtype`, which the file does not know."""
    for section, its_dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if content.get(section) and dtype != its_dtype:
            yield f"{section} has no effect with model.dtype={dtype}; leave it out, or set model.dtype={its_dtype}"


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(".json"):
        return Path(os.path.expanduser(name_or_path))
    shipped = names("deepspeed_configs")
    if name_or_path in shipped:
        return package_file("deepspeed_configs", f"{name_or_path}.json")
    meant = guess(name_or_path, shipped)
    hint = f"did you mean {meant}?" if meant else f"write one of {', '.join(shipped)}, or the path of a .json file"
    raise ConfigError(f"parallel.deepspeed={name_or_path} is not a shipped file; {hint}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise ConfigError(f"parallel.deepspeed={path} cannot be read ({error.strerror}); give a JSON file") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); correct it") from error
    except ValueError as error:
        raise ConfigError(f"parallel.deepspeed={path} is not usable JSON ({error}); correct it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"parallel.deepspeed={path} holds no JSON object; write {{...}} with zero_optimization in it")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} stands twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _problems(content: dict[str, Any]) -> Iterator[str]:
    """Every error of a file's content, `<dotted.path>=<value> <what>; <what would be right>`."""
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage is None and (zero is None or isinstance(zero, dict)):
        yield "zero_optimization.stage is missing; set it to 0, 1, 2 or 3"
    elif isinstance(zero, dict) and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        yield f"zero_optimization.stage={_text(stage)} is not a stage; set it to 0, 1, 2 or 3"
        stage = None
    yield from _section_problems((), content, FILE, stage)
    if stage == 0 and isinstance(content.get("data_types"), dict) and "grad_accum_dtype" in content["data_types"]:
        yield "data_types.grad_accum_dtype is refused by DeepSpeed at ZeRO stage 0; leave it out, or use stage 1"
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(section, dict):
            yield from _offload_problems(f"zero_optimization.{name}", section)


def _unread_keys(content: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """The path of each key that tunes another ZeRO stage, and a sentence on it."""
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict):
        return []
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        return []
    found: list[tuple[tuple[str, ...], str]] = []
    for path, section, known in (((), content, FILE), (("zero_optimization",), zero, ZERO)):
        for key, value in section.items():
            rule = known.get(key)
            if isinstance(rule, Allowed) and stage not in rule.stages and not rule.is_promise:
                found.append(((*path, key), _without_effect(_shown((*path, key), value), rule, stage)))
    return found


def _shown(path: tuple[str, ...], value: Any) -> str:
    name = ".".join(path)
    return name if isinstance(value, dict | list) else f"{name}={_text(value)}"


def _without_effect(shown: str, rule: Allowed, stage: int) -> str:
    stages = " or ".join(str(s) for s in sorted(rule.stages))
    return f"{shown} has no effect at ZeRO stage {stage}; it needs stage {stages}, or leave it out"


def _section_problems(
    path: tuple[str, ...], section: dict[str, Any], known: dict[str, Allowed | str], stage: int | None
) -> Iterator[str]:
    for key, value in section.items():
        name, rule, shown = ".".join((*path, key)), known.get(key), _shown((*path, key), value)
        if rule is None:
            yield f"{shown} {_unknown(path, key, known)}"
        elif isinstance(rule, str):
            yield f"{shown} is not set in a DeepSpeed file; {rule}"
        elif stage is not None and stage not in rule.stages:
            yield _without_effect(shown, rule, stage)
        elif rule.below is not None and isinstance(value, dict):
            yield from _section_problems((*path, key), value, rule.below, stage)
        elif name != "zero_optimization.stage" and (wrong := _wrong_value(rule, value)):
            yield f"{shown} {wrong}"


def _unknown(path: tuple[str, ...], key: str, known: dict[str, Allowed | str]) -> str:
    if key.split(".")[0] in known and "." in key:
        return f'is one dotted key, which DeepSpeed ignores; write it nested: {{"{key.split(".")[0]}": {{...}}}}'
    usable = [name for name, rule in known.items() if isinstance(rule, Allowed)]
    meant = guess(key, usable) or next((name for name in usable if name == f"stage3_{key}"), None)
    where = f"in {'.'.join(path)}" if path else "of DeepSpeed 0.19.8"
    hint = f"did you mean {'.'.join((*path, meant))}?" if meant else f"there are {', '.join(usable)}"
    return f"is not a key {where}; {hint}"


def _wrong_value(rule: Allowed, value: Any) -> str | None:
    """What is wrong with the kind of a value, or None."""
    if value == "auto":
        return "is only filled in by other programs; write a value, or leave it out"
    if rule.below is not None:
        return "is not an object; write {...}"
    if rule.kind == "flag" and not isinstance(value, bool):
        return "is neither true nor false; write one of them"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if rule.kind == "count" and not (is_number and value >= 0 and value == int(value)):
        return "is not a whole number from 0; write one"
    if rule.kind == "dtype" and value not in DTYPES:
        return f"is not a number format; write one of {', '.join(DTYPES)}"
    if rule.kind == "device" and value not in ("cpu", "nvme"):
        return "offloads nothing; write cpu or nvme, or leave the section out"
    if rule.kind == "text" and not (isinstance(value, str) and value):
        return "is not text; write text"
    if rule.kind == "list" and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return "is not a list of strings; write [...]"
    return None


def _offload_problems(name: str, section: dict[str, Any]) -> Iterator[str]:
    if "device" not in section:
        yield f"{name}.device is missing; write cpu or nvme, or leave {name} out"
    if (section.get("device") == "nvme") != ("nvme_path" in section):
        yield f"{name}.nvme_path goes with device nvme; set both, or neither"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
