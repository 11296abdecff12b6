"""What the options of the live reference make of DeepSpeed's configuration, and that DeepSpeed does as it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.distributed import Ranks
from dpo_dist.engine import inference_config
from dpo_dist.errors import ConfigError
from tests.forking import fork_ranks
from tests.launching import succeeded
from tests.processes.live_engines import Setting, batch_of, save_models
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

CPU, GPU = (Ranks(0, 8, 0, torch.device(name)) for name in ("cpu", "cuda"))


def _zero(**arguments: Any) -> dict[str, Any]:
    config = inference_config(Setting(3, "bfloat16").policy_config(CPU), **arguments)
    return config["zero_optimization"]


def test_without_options_it_is_the_policys_own() -> None:
    policy = Setting(3, "bfloat16").policy_config(CPU)
    assert inference_config(policy) == {k: v for k, v in policy.items() if k not in ("gradient_clipping", "data_types")}
    assert inference_config(Setting(2).policy_config(CPU))["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("dtype", "sections"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"bf16": {"enabled": True}}),
        (torch.float16, {"fp16": {"enabled": True}}),
    ],
)
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_dtype(stage: int, policy: str, dtype: torch.dtype, sections: dict[str, Any]) -> None:
    config = inference_config(Setting(stage, policy).policy_config(CPU), dtype)
    assert {key: config[key] for key in ("bf16", "fp16") if key in config} == sections


def test_offload_param() -> None:
    assert _zero(offload_param=True, ranks=CPU)["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert _zero(offload_param=True, ranks=GPU)["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in _zero(ranks=GPU)
    policy = Setting(3).policy_config(CPU)
    policy["zero_optimization"]["offload_param"] = {"device": "cpu"}  # of the DeepSpeed file
    assert inference_config(policy)["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_hpz() -> None:
    assert _zero(hpz_partition_size=4, ranks=GPU)["zero_hpz_partition_size"] == 4
    assert "zero_hpz_partition_size" not in _zero(ranks=GPU)
    below = inference_config(Setting(2).policy_config(CPU), hpz_partition_size=4, ranks=GPU)
    assert below["zero_optimization"] == {"stage": 0}  # nothing is gathered, between nodes or within


def test_a_reference_that_is_not_sharded() -> None:
    assert _zero(sharded=False, ranks=GPU) == {"stage": 0}
    assert inference_config(Setting(2).policy_config(CPU), sharded=False)["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        (2, {"offload_param": True}, r"reference.offload_param=true has no effect below ZeRO stage 3"),
        (3, {"hpz_partition_size": 3}, r"zero_hpz_partition_size=3 does not divide the 8 processes"),
        (3, {"hpz_partition_size": 16}, r"zero_hpz_partition_size=16 does not divide the 8 processes"),
        (3, {"hpz_partition_size": 8}, r"zero_hpz_partition_size=8 makes all processes of this run one group"),
        (3, {"dtype": torch.float16}, r"reference.dtype=float16 needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused(stage: int, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        inference_config(Setting(stage).policy_config(CPU), ranks=CPU, **options)


# ---- on real engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    save_models(folder / "models")
    return folder


@pytest.mark.parametrize("by_transformers", [False, True])
def test_offloaded_shards_change_no_bit(folder: Path, by_transformers: bool) -> None:
    models, ranks = folder / "models", only_rank()
    plain = Setting(3).reference(models, ranks)
    offloaded = Setting(3, offload_param=True, by_transformers=by_transformers).reference(models, ranks)
    for _ in range(3):
        assert torch.equal(plain.token_logps(batch_of()), offloaded.token_logps(batch_of()))
    # DeepSpeed has taken the option: only the device shows where there is no GPU.
    assert plain.engine.zero_offload_param() is None
    assert plain.engine.optimizer.offload_device is None
    assert offloaded.engine.zero_offload_param().device == "cpu"
    assert offloaded.engine.optimizer.offload_device == "cpu"
    assert all(p.ds_tensor.device.type == "cpu" for p in offloaded.model.parameters())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_computes_in_its_own_dtype(folder: Path, stage: int) -> None:
    models, ranks = folder / "models", only_rank()
    logps = {}
    for policy in ("float32", "bfloat16"):
        for reference in ("float32", "bfloat16"):
            engine = Setting(stage, policy, reference).reference(models, ranks)
            assert str(engine.dtype) == f"torch.{reference}"
            logps[policy, reference] = engine.token_logps(batch_of())
    for reference in ("float32", "bfloat16"):
        assert torch.equal(logps["float32", reference], logps["bfloat16", reference])
    rounding = (logps["float32", "float32"] - logps["float32", "bfloat16"]).abs().max()
    assert 1e-4 < rounding < 1


@pytest.fixture(scope="module")
def nodes(folder: Path) -> list[dict[str, Any]]:
    """What each of four ranks saw."""
    succeeded(fork_ranks(4, "tests.processes.live_worker", str(folder), "nodes", cwd=folder))
    return json.loads((folder / "nodes.json").read_text())


@pytest.mark.parametrize("case", ["slices", "again", "persistent", "transformers", "offload", "without", "whole"])
def test_groups_change_no_bit(nodes: list[dict[str, Any]], case: str) -> None:
    assert all(all(rank[case]["equal"]) for rank in nodes)


def test_after_the_first_forward_nothing_is_gathered_across_groups(nodes: list[dict[str, Any]]) -> None:
    for rank in nodes:
        whole = rank["parameters"]
        for case in ("slices", "again", "persistent", "offload"):
            (first, *_), *later = rank[case]["gathered"]
            assert first >= whole
            assert [across for across, _ in later] == [0, 0, 0]
            # Every weight in every forward, but for those that DeepSpeed keeps whole.
            assert all(0.9 * whole < inside < 1.3 * whole for _, inside in later), rank[case]
        # transformers sets weights one by one, each gathered before: the copies of a group are there from then on.
        assert [across for across, _ in rank["transformers"]["gathered"]] == [0, 0, 0, 0]
        assert all(across >= whole and inside == 0 for across, inside in rank["without"]["gathered"])
        assert rank["whole"]["gathered"] == [[0, 0]] * 4


def test_the_groups_are_the_references_alone_and_made_once(nodes: list[dict[str, Any]]) -> None:
    for rank in nodes:
        assert rank["policy"]["4"] >= rank["parameters"] and rank["policy"]["2"] == 0
        assert sorted(rank["group_sizes"])[0:2] == [2, 4]  # one of two, though there were five such references
