"""A reference that follows the policy, on real ranks, against the formula; and its weights in a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.model import ScoringModel
from dpo_dist.pretrained import DTYPES
from dpo_dist.reference import ReferenceSync, load_reference, save_reference
from dpo_dist.reference import sync as sync_module
from tests.forking import fork_ranks
from tests.launching import succeeded
from tests.processes.live_engines import Setting, batch_of, plain_model, save_models, train_step
from tests.processes.live_worker import ALPHA, SYNC, SYNC_ON_NODES
from tests.tiny_engine import QUIET, only_rank, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

CASES = {**SYNC, **SYNC_ON_NODES}
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-7}
AT_START, NOT_DUE, SYNCHRONISED, COPIED, RESUMED, RESUMED_ANEW = range(6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync")
    save_models(folder / "models")
    return folder


@pytest.fixture(scope="module")
def seen(models: Path) -> dict[str, list[dict[str, Any]]]:
    """What every rank saw of every case; two launches."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for num_ranks, kind in ((2, "sync"), (4, "sync_on_nodes")):
        succeeded(fork_ranks(num_ranks, "tests.processes.live_worker", str(models), kind, cwd=models))
        ranks = json.loads((models / f"{kind}.json").read_text())
        by_case |= {case: [rank[case] for rank in ranks] for case in ranks[0]}
    return by_case


def _kept(folder: Path, case: str) -> dict[str, dict[str, Tensor]]:
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / f"{case}.safetensors").items():
        when, name = key.split("/", 1)
        kept.setdefault(when, {})[name] = tensor
    return kept


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_the_mixture(seen: dict[str, Any], models: Path, case: str) -> None:
    kept = _kept(models, case)
    names = {name for name, _ in plain_model({}, torch.float32).named_parameters()}
    assert kept["before"].keys() == kept["policy"].keys() == kept["after"].keys() == names
    for name, before in kept["before"].items():
        policy, after = kept["policy"][name], kept["after"][name]
        exact = ALPHA * policy.double() + (1 - ALPHA) * before.double()
        bound = EPSILON[before.dtype] * (policy.double().abs() + before.double().abs()) + 1e-12
        assert ((after.double() - exact).abs() <= bound).all(), name
        # And to the last bit: in float32, rounded once.
        assert torch.equal(after, (ALPHA * policy.float() + (1 - ALPHA) * before.float()).to(before.dtype)), name
        assert (after - before).abs().max() > 1e-3
    assert {tensor.dtype for tensor in kept["after"].values()} == {_dtype(case)}


def _dtype(case: str) -> torch.dtype:
    return DTYPES[CASES[case].reference_dtype or CASES[case].dtype]


@pytest.mark.parametrize("case", CASES)
def test_only_when_due_and_nothing_is_sent(seen: dict[str, Any], case: str) -> None:
    for rank in seen[case]:
        assert rank["due"] == [False, True]
        assert rank["sent"] == []


@pytest.mark.parametrize("case", CASES)
def test_the_next_forward_uses_the_new_weights(seen: dict[str, Any], models: Path, case: str) -> None:
    """The first one, and those that follow a trace; also where weights are kept whole between forwards."""
    assert all(all(rank["all_alike"]) for rank in seen[case])
    kept = _kept(models, case)
    logps = [kept["logps"][str(index)] for index in range(6)]
    for index, when in ((NOT_DUE, "before"), (SYNCHRONISED, "after"), (COPIED, "copied")):
        model = ScoringModel(plain_model(kept[when], _dtype(case)))
        with torch.no_grad():
            assert torch.equal(model(batch_of(0)), logps[index]), when
    assert torch.equal(logps[AT_START], logps[NOT_DUE])
    assert not torch.allclose(logps[NOT_DUE], logps[SYNCHRONISED], atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_a_share_of_one_copies_the_policy(seen: dict[str, Any], models: Path, case: str) -> None:
    kept = _kept(models, case)
    for name, policy in kept["policy"].items():
        assert torch.equal(kept["copied"][name], policy.to(_dtype(case))), name


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_brings_the_weights_back(seen: dict[str, Any], models: Path, case: str) -> None:
    kept = _kept(models, case)
    for name, after in kept["after"].items():
        assert torch.equal(kept["resumed"][name], after), name
    for index in (RESUMED, RESUMED_ANEW):
        assert torch.equal(kept["logps"][str(index)], kept["logps"][str(SYNCHRONISED)])
    whole = CASES[case].stage < 3
    files = sorted(path.name for path in (models / case).iterdir())
    assert files == [f"reference-rank{rank:05d}.safetensors" for rank in range(1 if whole else len(seen[case]))]
    if not whole:  # a rank writes its slices and no more
        parts = [load_file(models / case / name) for name in files]
        for name, after in kept["after"].items():
            assert torch.equal(torch.cat([part[name] for part in parts]).view(after.shape), after), name


# ---- one process: what is refused


def test_what_is_mixed_at_once_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = torch.randn(11), torch.randn(11).bfloat16()
    expected = 0.25 * other.float() + 0.75 * own
    monkeypatch.setattr(sync_module, "CHUNK", 4)
    sync_module.mix(own, other, 0.25)
    assert torch.equal(own, expected)


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_stay_and_the_schedule_counts_updates(models: Path, stage: int) -> None:
    setting, ranks = Setting(stage), only_rank()
    policy, reference = setting.policy(models / "models", ranks), setting.reference(models / "models", ranks)
    buffers = dict(reference.model.named_buffers())
    for buffer in buffers.values():
        buffer.add_(1)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    follow = ReferenceSync(policy, reference, 0.5, every=3)
    assert [follow(step) for step in range(1, 8)] == [False, False, True, False, False, True, False]
    assert before and all(torch.equal(buffers[name], before[name]) for name in before)


def test_another_architecture_is_refused(models: Path, tmp_path: Path) -> None:
    ranks, setting = only_rank(), Setting(0)
    policy, reference = setting.policy(models / "models", ranks), setting.reference(models / "models", ranks)
    shapes = policy.whole_shapes()
    policy.whole_shapes = lambda: shapes | {"model.norm.weight": (31,)}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"1 differ: model.norm.weight is \(31,\) in the policy and \(30,\)"):
        ReferenceSync(policy, reference, 0.5, 1)


def test_weights_on_disk_are_refused(models: Path) -> None:
    ranks, setting = only_rank(), Setting(3)
    policy, reference = setting.policy(models / "models", ranks), setting.reference(models / "models", ranks)
    ReferenceSync(policy, reference, 0.5, 1)
    some: Any = next(policy.model.parameters())
    some.nvme_swapper = object()  # what DeepSpeed puts there; no NVMe is needed to be refused
    with pytest.raises(ConfigError, match="sync_ref_model=true does not work with weights on NVMe"):
        ReferenceSync(policy, reference, 0.5, 1)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("fault", ["missing", "cut", "dtype", "shape", "name", "length", "processes"])
def test_files_that_do_not_fit_are_refused_and_change_nothing(
    models: Path, tmp_path: Path, stage: int, fault: str
) -> None:
    ranks, folder = only_rank(), models / "models"
    reference = Setting(stage).reference(folder, ranks)
    path = tmp_path / "reference-rank00000.safetensors"
    save_reference(reference, tmp_path)
    tensors = load_file(path)
    shapes = {name: list(shape) for name, shape in reference.whole_shapes().items()}
    facts = {"processes": "1", "rank": "0"} if stage == 3 else {"processes": "any", "rank": "any"}
    facts |= {"dtype": "float32", "shapes": json.dumps(shapes, sort_keys=True)}
    name = "model.norm.weight"
    expected = {
        "missing": "is missing: the checkpoint does not hold all weights of a reference",
        "cut": "cannot be read",
        "dtype": "dtype is bfloat16 in it, and float32 here",
        "shape": r"norm.weight has shape \[5, 6\] in it, and \[30\] here",
        "name": r"norm.weight has shape None in it, and \[30\] here",
        "length": r"norm.weight has \[29\] elements, not 30",
        "processes": r"has \[\d+\] elements, not \d+",  # a seventh of them
    }[fault]
    if fault == "dtype":
        facts["dtype"] = "bfloat16"
    elif fault in ("shape", "name"):
        changed = {key: value for key, value in shapes.items() if key != name}
        changed |= {name: [5, 6]} if fault == "shape" else {}
        facts["shapes"] = json.dumps(changed, sort_keys=True)
    elif fault == "length":
        tensors[name] = tensors[name][:29].clone()
    elif fault == "processes":
        facts["processes"] = "7"
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata=facts)
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    before = {key: share.clone() for key, share in reference.named_shares()}
    with pytest.raises(CheckpointError, match=expected):
        load_reference(reference, tmp_path)
    assert all(torch.equal(share, before[key]) for key, share in reference.named_shares())


def test_the_same_facts_are_accepted(models: Path, tmp_path: Path) -> None:
    """The files of the test above, without a fault."""
    reference = Setting(3).reference(models / "models", only_rank())
    save_reference(reference, tmp_path)
    path = tmp_path / "reference-rank00000.safetensors"
    shapes = {name: list(shape) for name, shape in reference.whole_shapes().items()}
    facts = {"processes": "1", "rank": "0", "dtype": "float32", "shapes": json.dumps(shapes, sort_keys=True)}
    tensors = {key: tensor + 1 for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=facts)
    load_reference(reference, tmp_path)
    assert all(torch.equal(share, tensors[key]) for key, share in reference.named_shares())


def test_the_policy_moves_enough_for_these_tests(models: Path) -> None:
    policy = Setting(0).policy(models / "models", only_rank())
    before = {name: share.clone() for name, share in policy.named_shares()}
    train_step(policy, batch_of())
    assert all((share - before[name]).abs().max() > 0.01 for name, share in policy.named_shares())
    assert tiny_config().tie_word_embeddings and not any("lm_head" in name for name in before)
