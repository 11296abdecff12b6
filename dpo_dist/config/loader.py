"""File + overrides -> RunConfig, or all errors at once; and back.

A relative path of something that is read (data, local models, a DeepSpeed file, a checkpoint) is looked up in the
current folder, then in the folder of the configuration file; the resolved configuration holds it absolutely. What is in
neither place may be a hub id, and stays as it is. `train.output_dir` is relative to the current folder.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_dist import __version__
from dpo_dist.config.data import DataSource
from dpo_dist.config.deepspeed import deepspeed_remarks, dtype_problems, load_deepspeed
from dpo_dist.config.draft import Draft, read_draft
from dpo_dist.config.files import find_input, names, package_file
from dpo_dist.config.guesses import guess
from dpo_dist.config.messages import SECTIONS, KeyPath, describe, dotted, key_path, meant_keys, shown
from dpo_dist.config.models import RunConfig
from dpo_dist.config.rules import broken_rules, is_set, keys_without_effect, value_at
from dpo_dist.config.yaml_lines import dump
from dpo_dist.errors import ConfigError

# What stands in for a required key that is wrong or missing, so that the other keys can still be judged.
_PLACEHOLDERS = {
    ("model", "model_name_or_path"): "?",
    ("data", "train"): [{"path": "?"}],
    ("train", "output_dir"): "?",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply overrides.

    Args:
        path: a YAML file, or the name of a shipped one, e.g. `smollm2_demo`.
        overrides: `section.key=value`, see `draft.py`.
    Raises:
        ConfigError: with one line for each error there is, in the order of the file.
    """
    draft = read_draft(_find_file(path))
    for override in overrides:
        draft.apply_override(override)
    config = _validate(draft)
    folder = draft.file.absolute().parent
    config = _with_found_paths(config, folder)
    for key, causes, text in broken_rules(config):
        if not any(draft.touches_problem(involved) for involved in (key, *causes)):
            draft.blame(key, f"{shown(key, _plain(value_at(config, key)))} {text}")
    lines = draft.lines()
    if not draft.touches_problem(("parallel", "deepspeed")):
        lines += _deepspeed_problems(config)
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def config_remarks(config: RunConfig) -> list[str]:
    """Keys of a loaded configuration that are set without effect and without harm, a sentence each."""
    return [
        f"{shown(path, value_at(config, path))} {unread.text}"
        for path, unread in keys_without_effect(config).items()
        if unread.same_result and is_set(config, path)
    ] + [
        f"parallel.deepspeed={config.parallel.deepspeed}: {text}"
        for text in deepspeed_remarks(config.parallel.deepspeed)
    ]


def dump_resolved(config: RunConfig) -> str:
    """YAML of a whole run, without keys that have no effect in it; reading it gives the same run.

    An equal RunConfig, unless a key is set without effect: that one is not written.
    """
    values = config.model_dump(mode="json")
    for section, key in keys_without_effect(config):
        values[str(section)].pop(str(key), None)
    present = {section: _without_null(keys) for section, keys in values.items()}
    head = f"# The resolved configuration of a run of dpo_dist {__version__}: every option that has an effect.\n"
    return head + dump({section: keys for section, keys in present.items() if keys})


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors and validators."""
    schema = _with_unbroken_descriptions(RunConfig.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _find_file(path: str | Path) -> Path:
    file = Path(os.path.expanduser(path))
    if file.is_file():
        return file
    if file.is_dir():
        inside = file / "config.yaml"
        hint = f"did you mean {inside}?" if inside.is_file() else "give a YAML file"
        raise ConfigError(f"{file} is a folder; {hint}")
    shipped = names("configs")
    if str(path) in shipped:
        return package_file("configs", f"{path}.yaml")
    meant = guess(file.stem, shipped)
    hint = f"did you mean {meant}?" if meant else f"shipped ones are {', '.join(shipped)}"
    raise ConfigError(f"{file} does not exist; give a YAML file or the name of a shipped configuration: {hint}")


def _validate(draft: Draft) -> RunConfig:
    """The draft as a RunConfig. Faulty keys are noted, and get a placeholder so that the rest can be judged."""
    values = copy.deepcopy(draft.values)
    for section in SECTIONS:
        values.setdefault(section, {})
    first_pass = True
    while True:
        try:
            return RunConfig.model_validate(values)
        except ValidationError as error:
            found = error.errors(include_url=False)
            elsewhere = {key for details in found for key in meant_keys(details)}
            for details in found:
                if first_pass and not (details["type"] == "missing" and dotted(details["loc"]) in elsewhere):
                    draft.blame(key_path(details), describe(details))
                _repair(values, details["loc"])
            first_pass = False


def _repair(values: dict[str, Any], path: KeyPath) -> None:
    """Replace the key at fault by a value that is valid; what is inside a list takes the whole list with it."""
    section, key = str(path[0]), str(path[1]) if len(path) > 1 else None
    if section not in SECTIONS:
        del values[section]
    elif key is None:
        values[section] = {}
    else:
        values[section].pop(key, None)
        if (section, key) in _PLACEHOLDERS:
            values[section][key] = copy.deepcopy(_PLACEHOLDERS[section, key])


def _with_found_paths(config: RunConfig, folder: Path) -> RunConfig:
    """The same configuration with absolute paths of what is read."""

    def found(value: str | None, fixed: tuple[str, ...] = ()) -> str | None:
        return value if value is None or value in fixed else find_input(value, folder)

    def sources(given: list[DataSource]) -> list[DataSource]:
        return [source.model_copy(update={"path": found(source.path)}) for source in given]

    model, parallel = config.model, config.parallel
    keys = ("model_name_or_path", "reference_name_or_path", "tokenizer_name_or_path")
    deepspeed = found(parallel.deepspeed) if parallel.deepspeed.endswith(".json") else parallel.deepspeed
    adapter, reference = config.adapter, config.reference
    changed = {
        "adapter": adapter.model_copy(update={"adapter_name_or_path": found(adapter.adapter_name_or_path)}),
        "reference": reference.model_copy(
            update={"cache_dir": reference.cache_dir and os.path.expanduser(reference.cache_dir)}
        ),
        "model": model.model_copy(update={key: found(getattr(model, key), ("demo",)) for key in keys}),
        "data": config.data.model_copy(
            update={
                "train": sources(config.data.train),
                "evaluation": sources(config.data.evaluation),
                "chat_template": found(config.data.chat_template),
            }
        ),
        "train": config.train.model_copy(update={"output_dir": os.path.expanduser(config.train.output_dir)}),
        "parallel": parallel.model_copy(update={"deepspeed": deepspeed}),
        "checkpoint": config.checkpoint.model_copy(
            update={"resume": found(config.checkpoint.resume, ("auto", "never"))}
        ),
    }
    return config.model_copy(update=changed)


def _with_unbroken_descriptions(node: Any) -> Any:
    """Docstrings are wrapped for the source; a description is one line."""
    if isinstance(node, dict):
        return {
            key: " ".join(item.split())
            if key == "description" and isinstance(item, str)
            else _with_unbroken_descriptions(item)
            for key, item in node.items()
        }
    return [_with_unbroken_descriptions(item) for item in node] if isinstance(node, list) else node


def _deepspeed_problems(config: RunConfig) -> list[str]:
    try:
        content = load_deepspeed(config.parallel.deepspeed)
    except ConfigError as error:
        return str(error).splitlines()
    return [
        f"parallel.deepspeed={config.parallel.deepspeed}: {text}"
        for text in dtype_problems(content, config.model.dtype)
    ]


def _plain(value: Any) -> Any:
    return (
        [item.shown if isinstance(item, DataSource) else item for item in value] if isinstance(value, list) else value
    )


def _without_null(value: Any) -> Any:
    """Mappings without keys that are null (every null is a default here), in lists too."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
