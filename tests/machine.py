"""A CUDA device that is not there, and flash-attn packages that are not installed, for what is decided on a CPU."""

import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import Tensor

from dpo_dist.attention import packages
from dpo_dist.attention.packages import FlashPackage, find_package


def fake_flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> Tensor:
    """flash-attn 2.8's contract, one query of one head at a time; tensors are (tokens, heads, head dimension)."""
    assert causal and deterministic
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_k[-1] == len(k) == len(v)
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(q_lengths), max(k_lengths))
    rows = []
    for segment, (num_q, num_k) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        first_q, first_k = int(cu_seqlens_q[segment]), int(cu_seqlens_k[segment])
        for i in range(num_q):
            last = i + num_k - num_q  # bottom right: the last query sees the last key
            left = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            seen = slice(first_k + left, first_k + last + 1)
            heads = []
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // k.shape[1])
                scores = k[seen, group] @ q[first_q + i, head] * softmax_scale
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ v[seen, group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


class Machine:
    """A CUDA device that is not there, and the flash-attn packages that are installed beside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.versions: dict[str, str] = {}
        monkeypatch.setattr(packages, "version", self._version)
        self.has("8.0")

    def _version(self, distribution: str) -> str:
        if distribution not in self.versions:
            raise PackageNotFoundError(distribution)
        return self.versions[distribution]

    def has(self, capability: str, *installed: FlashPackage, function: object = fake_flash_attn_varlen_func) -> None:
        """Of a compute capability, with these packages."""
        major, minor = capability.split(".")
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (int(major), int(minor)))
        self.versions = {package.distribution: "1" for package in installed}
        for package in installed:
            module = types.ModuleType(package.module)
            if function is not None:
                module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
            self.monkeypatch.setitem(sys.modules, package.module, module)
        find_package.cache_clear()
