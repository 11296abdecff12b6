"""What a configuration asks for: models, data, a device. Nothing is downloaded or converted."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from dpo_dist.attention import choose_backend
from dpo_dist.cli.compiling import require_compilable
from dpo_dist.cli.doctor.findings import Finding
from dpo_dist.cli.requirements import require_trackers
from dpo_dist.config import DataSource, RunConfig, is_url, load_deepspeed
from dpo_dist.data import open_source
from dpo_dist.errors import ConfigError, DpoDistError
from dpo_dist.pretrained import (
    DTYPES,
    attention_needs,
    load_config,
    num_parameters,
    require_adapter_folder,
    resolve_folder,
)

SECTION = "configuration"


def input_findings(config: RunConfig, environment: Mapping[str, str]) -> tuple[list[Finding], int | None]:
    """Findings, and how many parameters are trained; None where that is not known yet.

    Args:
        config: of the run.
        environment: of this process.
    """
    is_offline = any(environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)
    findings, folders = [], {}
    for key, name, revision in _models(config):
        finding, folders[key] = _model(key, name, revision, is_offline)
        findings.append(finding)
    policy = folders[_POLICY]
    findings += [_data(key, source, is_offline) for key, source in _sources(config)]
    findings += [_device(config, policy), _parts(config)]
    if policy is None or config.adapter.is_used:
        return findings, None
    try:
        return findings, num_parameters(policy)
    except (OSError, ValueError) as error:
        way_out = "copy or download the model again"
        findings.append(Finding(SECTION, _POLICY, f"{policy}: damaged weights ({error})", "problem", way_out))
        return findings, None


_POLICY = "model.model_name_or_path"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _models(config: RunConfig) -> Iterator[tuple[str, str, str | None]]:
    model = config.model
    yield _POLICY, model.model_name_or_path, model.revision
    if model.reference_name_or_path is not None:
        yield "model.reference_name_or_path", model.reference_name_or_path, None


def _model(key: str, name: str, revision: str | None, is_offline: bool) -> tuple[Finding, Path | None]:
    """What can be said of a model, and its folder if it is here."""
    if name == "demo":
        return Finding(SECTION, key, "the demo model; converted at its first use"), None
    try:
        is_path = Path(os.path.expanduser(name)).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
        here = name if is_path else snapshot_download(name, revision=revision, local_files_only=True)
        # Of a folder that is here nothing is downloaded, and the cache is not used.
        folder = resolve_folder(str(here), key, None, Path())
    except DpoDistError as error:
        return Finding(SECTION, key, str(error), "problem", "give the folder of a whole model, or a hub id"), None
    except Exception:  # the hub's library has many errors for what is not in its cache
        return _not_here(key, name, is_offline), None
    return Finding(SECTION, key, f"{folder}: there", values={"folder": str(folder)}), folder


def _not_here(key: str, name: str, is_offline: bool) -> Finding:
    if is_offline:
        way_out = "download it where there is a network (hf download), or give the folder it is in"
        return Finding(SECTION, key, f"{name} is not here, and the hub may not be asked (offline)", "problem", way_out)
    text = f"{name} is not here: a run downloads it when it starts; whether it can was not tried"
    return Finding(SECTION, key, text, "warning", "download it before the job starts (hf download)")


def _sources(config: RunConfig) -> Iterator[tuple[str, DataSource]]:
    for kind, sources in (("train", config.data.train), ("evaluation", config.data.evaluation)):
        for index, source in enumerate(sources):
            yield f"data.{kind}.{index}", source


def _data(key: str, source: DataSource, is_offline: bool) -> Finding:
    if is_url(source.path):
        text = f"{source.shown} is copied into the cache when a run starts; whether it can be read was not tried"
        return Finding(SECTION, key, text, "warning", "run dpo-dist check, which copies it")
    path = Path(source.path).expanduser()
    looks_local = path.exists() or path.suffix or source.path.count("/") > 1 or source.path.startswith((".", "/", "~"))
    if not looks_local:
        return _not_here(key, source.path, is_offline)
    try:
        files = open_source(source, key).files
    except DpoDistError as error:
        return Finding(SECTION, key, str(error), "problem", "correct the path, or copy the data to this machine")
    for file, shown in files:
        if not os.access(file, os.R_OK):
            text = f"{key}.path={source.path}: {shown} cannot be read by this user"
            return Finding(SECTION, key, text, "problem", "change its owner or mode")
    size = sum(file.stat().st_size for file, _ in files)
    values = {"files": len(files), "bytes": size}
    return Finding(SECTION, key, f"{source.path}: there ({len(files)} file(s), {size} bytes)", values=values)


def _where() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(config: RunConfig, policy: Path | None) -> Finding:
    """Whether this machine can compute as the configuration says."""
    device, model = _where(), config.model
    try:
        configs = [load_config(policy, model.trust_remote_code)] if policy is not None else []
        needs = [attention_needs(one) for one in configs]
        kernel, why = choose_backend(model.attn_implementation, device, DTYPES[model.dtype], needs, model.deterministic)
        if model.use_liger_kernel:
            from dpo_dist.model import require_liger

            require_liger(device, *configs)
        if "float16" in (model.dtype, config.reference.dtype) and device.type == "cpu":
            raise ConfigError("float16 needs a GPU, and there is none; use float32 or bfloat16")
    except DpoDistError as error:
        way_out = "start the run where there is such a GPU, or change the setting"
        return Finding(SECTION, "device", str(error), "problem", way_out)
    text = f"{device.type}, {model.dtype}, attention by {kernel}: {why}"
    values = {"device": device.type, "dtype": model.dtype, "kernel": kernel}
    name = config.parallel.deepspeed
    if device.type == "cpu" and not name.removesuffix(".json").endswith("_cpu"):
        way_out = "start the run where there is a GPU, or take one of the files for CPUs (parallel.deepspeed=zero3_cpu)"
        return Finding(SECTION, "device", f"{text}; parallel.deepspeed={name} is for GPUs", "warning", way_out, values)
    return Finding(SECTION, "device", text, values=values)


def _parts(config: RunConfig) -> Finding:
    """What else a run reads, imports or calls: DeepSpeed's file, a compiler, trackers, an adapter."""
    try:
        require_compilable(config, load_deepspeed(config.parallel.deepspeed), _where())
        require_trackers(config)
        if (adapter := config.adapter.adapter_name_or_path) is not None:
            require_adapter_folder(adapter)
    except DpoDistError as error:
        return Finding(SECTION, "settings", str(error), "problem", "correct the setting; dpo-dist check looks further")
    return Finding(SECTION, "settings", "DeepSpeed's file, trackers and adapter are there")
