"""Where torch finds no GPU, a run does not train on the CPU by accident."""

from pathlib import Path

import pytest

from dpo_dist.cli.requirements import require_no_gpu_meant
from dpo_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("variables", "devices", "says"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [], r"CUDA_VISIBLE_DEVICES=0,1 asks for GPUs, and torch 2\+cpu finds none"),
        ({}, ["nvidia0", "nvidia1"], r"this machine has \S+/nvidia0, and torch 2\+cpu finds none: install a build"),
        ({}, [], ""),
        ({}, ["nvidiactl", "nvme0"], ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], ""),
        ({"CUDA_VISIBLE_DEVICES": "0", "LOCAL_SIZE": "2"}, [], ""),  # DeepSpeed's launcher
    ],
)
def test_gpus_that_torch_does_not_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], devices: list[str], says: str
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for device in devices:
        (tmp_path / device).touch()
    if not says:
        require_no_gpu_meant("2+cpu", tmp_path)
        return
    with pytest.raises(ConfigError, match=says):
        require_no_gpu_meant("2+cpu", tmp_path)
