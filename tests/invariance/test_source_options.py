"""Every option of the reference, and 4 bits, reach what they are about, through the function that `train` calls."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml

from dpo_dist.cli import sources, training
from dpo_dist.cli.prepare import prepare
from dpo_dist.config import load_config
from dpo_dist.distributed import Ranks
from dpo_dist.reference import AdapterOffReference, LiveReference, ReferenceCache
from dpo_dist.trainer import Run
from tests.golden.trajectories import base_config
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.timeout(300), *(pytest.mark.filterwarnings(rule) for rule in QUIET)]
Begin = Callable[..., Run]


class BuiltError(Exception):
    """A run has been built."""


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """`begin(section.key=value, ...)`: the run that `train` would start with."""
    only_rank()
    found: list[Run] = []

    def caught(run: Run, progress: Any) -> None:
        found.append(run)
        raise BuiltError

    monkeypatch.setattr(training, "train", caught)

    def start(*overrides: str) -> Run:
        config = base_config(tmp_path / f"run{len(found)}")
        config["train"] |= {"examples_per_step": 8, "max_steps": 3}
        config["packing"] = {"max_tokens": 150, "reference_max_tokens": 2000}
        config["parallel"]["deepspeed"] = "zero3_cpu"
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(BuiltError):
            training.run_training(load_config(path, overrides), tmp_path / "cache")
        return found[-1]

    return start


def test_deterministic(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    stock = training._prove
    monkeypatch.setattr(
        training, "_prove", lambda *args: asked.append(torch.are_deterministic_algorithms_enabled()) or stock(*args)
    )
    for value in ("auto", "false", "true"):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        begin(f"model.deterministic={value}")
    assert (asked, os.environ["CUBLAS_WORKSPACE_CONFIG"]) == ([False, False, True], ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled()


def test_dtype(begin: Begin) -> None:
    for overrides, dtype in (((), torch.float32), (("reference.dtype=bfloat16",), torch.bfloat16)):
        run = begin(*overrides)
        assert isinstance(run.reference, LiveReference)
        assert run.reference.dtype == dtype
        assert run.policy.dtype == torch.float32


def test_per_microbatch(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = {}
    for value in ("false", "true"):
        run = begin(f"reference.per_microbatch={value}", "train.self_check=false")
        assert isinstance(run.reference, LiveReference)
        plan, asked = run.plan(0), []
        stock = run.reference.engine.token_logps
        monkeypatch.setattr(run.reference.engine, "token_logps", lambda b, ask=stock, n=asked: n.append(1) or ask(b))
        run.reference.completion_logps(training.RankWork(plan, 0, run.dataset, run.packer.share_prompts))
        forwards[value] = len(asked)
    assert forwards == {"false": len(plan.reference_bins[0]), "true": len(plan.micro_batches[0])}
    assert forwards["false"] < forwards["true"]


def test_synchronisation(begin: Begin) -> None:
    run = begin(
        "reference.sync_ref_model=true", "reference.ref_model_mixup_alpha=0.25", "reference.ref_model_sync_steps=2"
    )
    after: Any = run.after_update
    assert (after.alpha, after.every) == (0.25, 2)
    assert after.reference is run.weights.reference


def test_cache_folder_and_tokens(begin: Begin, tmp_path: Path) -> None:
    for name, tokens in (("plain", "false"), ("tokens", "true")):
        folder = tmp_path / name
        begin("reference.source=cache", f"reference.cache_dir={folder}", f"reference.store_token_logps={tokens}")
        with pa.memory_map(str(folder / "rows-000001.arrow")) as file:
            column = pa.ipc.open_stream(file).read_next_batch().column("token_logps")
        assert (column.null_count == 0) is (tokens == "true")


def test_verify_rows(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    stock = ReferenceCache.verify

    def watched(self: ReferenceCache, *arguments: Any) -> int:
        verified.append(stock(self, *arguments))
        return verified[-1]

    monkeypatch.setattr(ReferenceCache, "verify", watched)
    begin("reference.source=cache")  # fills it; what it has just computed is not computed again
    for rows in (3, 0):
        begin("reference.source=cache", f"reference.verify_rows={rows}")
    assert verified == [3]


def test_offload_and_groups(begin: Begin, tmp_path: Path) -> None:
    begin()
    options = ("reference.offload_param=true", "reference.zero_hpz_partition_size=2")
    prepared = prepare(load_config(tmp_path / "run.yaml", options), tmp_path / "cache")
    zero = sources.reference_deepspeed(prepared, Ranks(0, 4, 0, torch.device("cpu")))["zero_optimization"]
    assert zero["offload_param"]["device"] == "cpu"
    assert zero["zero_hpz_partition_size"] == 2
    assert not {"offload_param", "zero_hpz_partition_size"} & prepared.deepspeed["zero_optimization"].keys()


def test_four_bits(begin: Begin) -> None:
    run = begin(
        "adapter.peft_type=lora",
        "adapter.load_in_4bit=true",
        "adapter.bnb_4bit_quant_type=fp4",
        "model.reference_name_or_path=null",
        "reference.source=adapter_off",
        "parallel.deepspeed=zero0_cpu",
    )
    assert isinstance(run.reference, AdapterOffReference)
    packed = [p for p in run.policy.model.parameters() if type(p).__name__ == "Params4bit"]
    assert packed and {p.quant_type for p in packed} == {"fp4"}
