"""Ranks with a policy and a live reference: `torchrun -m tests.processes.live_worker FOLDER KIND`.

KIND is a function of this file. `FOLDER/models` holds the two models. What was seen is written to FOLDER by the first
rank (`<kind>.json`: a list of what each rank saw) for pytest to judge; nothing is asserted about it here.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.loading.worker import own_bytes
from dpo_dist.attention.interface import register
from dpo_dist.batch import RankWork
from dpo_dist.config import TrainConfig
from dpo_dist.distributed import Ranks, all_gather_json, process_group
from dpo_dist.engine import InferenceEngine, TrainingEngine, adopt_process_group, release_process_group
from dpo_dist.model import ScoringModel, sharded_loading
from dpo_dist.packing import ExampleSize, Packer
from dpo_dist.reference import LiveReference, ReferenceSync, load_reference, save_reference
from tests.launching import end_rank
from tests.parity.oracle import random_example
from tests.processes.live_engines import Sent, Setting, batch_of, live_bytes, plain_model, train_step, whole

BIG = 1_000_000
SYNC = {
    "stage0": Setting(0),
    "stage2": Setting(2),
    "stage3": Setting(3, zero={"stage3_param_persistence_threshold": 0}),
    "persistent": Setting(3, zero={"stage3_param_persistence_threshold": BIG}),
    "some_persistent": Setting(3, zero={"stage3_param_persistence_threshold": 40}),
    "kept_live": Setting(3, zero={"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": BIG}),
    "bfloat16": Setting(3, "bfloat16", zero={"stage3_param_persistence_threshold": 40}),
    "to_bfloat16": Setting(3, "float32", "bfloat16", zero={"stage3_param_persistence_threshold": 40}),
    "to_float32": Setting(2, "bfloat16", "float32"),
    "offload": Setting(3, offload_param=True, zero={"stage3_param_persistence_threshold": 40}),
}
SYNC_ON_NODES = {
    "hpz": Setting(3, hpz=2, zero={"stage3_param_persistence_threshold": 0}),
    "hpz_persistent": Setting(3, hpz=2, zero={"stage3_param_persistence_threshold": 40}),
}
ALPHA = 0.3
FORWARDS = 4  # DeepSpeed follows its trace from the third on


def sync(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Synchronise at every stage; the first rank also keeps all weights, and what the reference says afterwards."""
    return {name: _synchronised(setting, name, folder, ranks) for name, setting in SYNC.items()}


def sync_on_nodes(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The same with hpZ."""
    return {name: _synchronised(setting, name, folder, ranks) for name, setting in SYNC_ON_NODES.items()}


def _synchronised(setting: Setting, name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    policy, reference = setting.policy(folder / "models", ranks), setting.reference(folder / "models", ranks)
    batch, seen, kept = batch_of(ranks.rank), dict[str, Any](), dict[str, Any]()
    follow = ReferenceSync(policy, reference, ALPHA, every=2)
    train_step(policy, batch)
    kept["before"] = whole(reference)
    logps = [_forwards(reference, batch)]
    seen["due"] = [follow(1)]
    logps.append(_forwards(reference, batch))
    train_step(policy, batch)
    with Sent() as sent:
        seen["due"].append(follow(2))
    seen["sent"] = sent.calls
    logps.append(_forwards(reference, batch))  # before weights are looked at: that would gather them anew
    kept["policy"], kept["after"] = whole(policy), whole(reference)

    (folder / name).mkdir(exist_ok=True)
    save_reference(reference, folder / name)
    ReferenceSync(policy, reference, 1.0, every=1)(3)
    logps.append(_forwards(reference, batch))
    kept["copied"] = whole(reference)
    again = setting.reference(folder / "models", ranks)
    _forwards(again, batch)
    for engine in (reference, again):  # one that holds other weights, and a new one that has been asked
        load_reference(engine, folder / name)
        logps.append(_forwards(engine, batch))
    kept["resumed"] = whole(again)
    seen["all_alike"] = [bool((four == four[0]).all()) for four in logps]
    if ranks.is_first:
        flat = {f"{when}/{key}": tensor for when, tensors in kept.items() for key, tensor in tensors.items()}
        flat |= {f"logps/{index}": four[0] for index, four in enumerate(logps)}
        save_file({key: tensor.contiguous() for key, tensor in flat.items()}, folder / f"{name}.safetensors")
    return seen


def _forwards(reference: InferenceEngine, batch: Any) -> torch.Tensor:
    return torch.stack([reference.token_logps(batch).clone() for _ in range(FORWARDS)])


def nodes(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A reference that is kept by groups of two, among others that are not."""
    batch, found = batch_of(ranks.rank), dict[str, Any]()
    whole_run = Setting(3).reference(folder / "models", ranks)
    expected = whole_run.token_logps(batch)
    settings = {
        "slices": Setting(3, hpz=2),
        "again": Setting(3, hpz=2),
        "persistent": Setting(3, hpz=2, zero={"stage3_param_persistence_threshold": 40}),
        "transformers": Setting(3, hpz=2, by_transformers=True),
        "offload": Setting(3, hpz=2, offload_param=True),
        "without": Setting(3),
        "whole": Setting(3, sharded=False),
    }
    for name, setting in settings.items():
        reference = setting.reference(folder / "models", ranks)
        gathered, equal = [], []
        for _ in range(FORWARDS):
            with Sent() as sent:
                equal.append(torch.equal(reference.token_logps(batch), expected))
            gathered.append([sent.gathered(ranks.world_size), sent.gathered(2)])
        found[name] = {"gathered": gathered, "equal": equal}
        reference.release()
    converted = Setting(3).policy_config(ranks)
    model = ScoringModel(plain_model({}, torch.float32))  # DeepSpeed partitions it itself, when it makes the engine
    policy = TrainingEngine(model, converted, TrainConfig(output_dir="unused"), ranks)
    train_step(policy, batch)
    with Sent() as sent:
        train_step(policy, batch)
    found["policy"] = {size: sent.gathered(size) for size in (ranks.world_size, 2)}
    found["group_sizes"] = [group.size() for group in torch.distributed.distributed_c10d._world.pg_map]
    found["parameters"] = sum(getattr(p, "ds_numel", 0) for p in policy.model.parameters())
    return found


def memory(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What a reference holds of its own, at the stages at which it is whole or in slices."""
    return {str(stage): _held(stage, folder, ranks) for stage in (0, 3)}


def _held(stage: int, folder: Path, ranks: Ranks) -> dict[str, Any]:
    setting = Setting(stage, zero={"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    work = _work(ranks)
    policy_alone = _one_step(setting.policy(folder / "models", ranks), work)
    _one_answer(setting, folder, work, ranks)  # what is made once in a process is made
    before = live_bytes()
    reference = setting.reference(folder / "models", ranks)
    parameters: list[Any] = list(reference.model.parameters())
    held: dict[str, Any] = {
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "tensors": len(parameters),
        "engine_bytes": live_bytes() - before,
        "asked": [],
    }
    live = LiveReference(reference)
    for _ in range(FORWARDS):
        start = live_bytes()
        answer = live.completion_logps(work)
        held["asked"].append([start, live_bytes(), answer.untyped_storage().nbytes()])
        held["facts"] = _facts(reference, answer)
        del answer
    held["engine_bytes_after_asking"] = live_bytes() - before
    held["with_a_graph"] = _bytes_of_a_graph(work)
    held["released_bytes"], held["given_back"] = -before, live_bytes()
    reference.release()
    held["released_bytes"] += live_bytes()
    held["given_back"] -= live_bytes()
    try:
        live.completion_logps(work)
    except AssertionError as error:
        held["asked_when_released"] = str(error)
    held["policy_alone"], held["policy_after"] = policy_alone, _one_step(setting.policy(folder / "models", ranks), work)
    return held | _resident(setting, ranks)


def _work(ranks: Ranks) -> RankWork:
    examples = [random_example(i, 20, [30, 25]) for i in range(6)]
    sizes = [ExampleSize(len(e.prompt_ids), tuple(map(len, e.completion_ids)), e.pairs) for e in examples]
    plan = Packer(ranks.world_size, 100, 200, True).plan(0, range(len(examples)), sizes)
    return RankWork(plan, ranks.rank, examples, share_prompts=True)


def _one_answer(setting: Setting, folder: Path, work: RankWork, ranks: Ranks) -> None:
    reference = setting.reference(folder / "models", ranks)
    LiveReference(reference).completion_logps(work)
    reference.release()


def _one_step(policy: TrainingEngine, work: RankWork) -> list[float]:
    """Log-probabilities of the first micro-batch before an update and after it."""
    found = []
    for _ in range(2):
        batches = work.micro_batches()
        found += policy.completion_logps(batches[0]).tolist()
        train_step(policy, batches[0])
    return found


def _facts(reference: InferenceEngine, answer: torch.Tensor) -> dict[str, Any]:
    parameters = list(reference.model.parameters())
    optimizer = reference.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "with_grad": sum(p.grad is not None for p in parameters),
        "requires_grad": sum(p.requires_grad for p in parameters),
        "grad_fn": int(answer.requires_grad or answer.grad_fn is not None),
        "optimizer_state": len(getattr(inner, "state", {})),
        "training": any(module.training for module in reference.model.modules()),
    }


def _bytes_of_a_graph(work: RankWork) -> int:
    """What one forward of the plain model keeps for a backward, as far as autograd saves tensors."""
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that is saved as itself would keep itself alive

    model = ScoringModel(plain_model({}, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model(work.reference_bins()[0])
    return sum(saved.values()) if kept.requires_grad else 0


def _resident(setting: Setting, ranks: Ranks) -> dict[str, int]:
    """What the process holds less, by the system's count, when a model of 60 MB is released."""
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    settings = setting.reference_config(ranks)
    torch.manual_seed(0)
    with sharded_loading(settings):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register("sdpa"), dtype=torch.float32)
    reference = InferenceEngine(ScoringModel(model), settings)
    for parameter in model.parameters():
        getattr(parameter, "ds_tensor", parameter.data).fill_(0.5)  # what nobody wrote to takes no memory
    size = sum(4 * share.numel() for _, share in reference.named_shares())
    before = _resident_now()
    reference.release()
    return {"resident_size": size, "resident_given_back": before - _resident_now()}


def _resident_now() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # the C library keeps small pieces that were freed, to hand them out again
    return own_bytes()


def forwards_of_a_run(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A whole run with a live reference: forwards of both models while it trains, without graph and with one."""
    from dpo_dist.cli import training
    from dpo_dist.config import load_config
    from dpo_dist.trainer import Progress, Run

    counts: dict[str, list[int]] = {}
    train = training.train

    def counted(run: Run, progress: Progress) -> None:
        reference: Any = run.reference
        for name, engine in (("policy", run.policy), ("reference", reference.engine)):
            _count(engine, counts.setdefault(name, [0, 0]))
        train(run, progress)

    with mock.patch.object(training, "train", counted):
        training.run_training(load_config(folder / "run.yaml"), folder / "cache")
    return counts


def _count(engine: TrainingEngine | InferenceEngine, counts: list[int]) -> None:
    def note(*_: Any) -> None:
        counts[torch.is_grad_enabled()] += 1

    engine.model.register_forward_pre_hook(note)


def main() -> None:
    """Do one kind."""
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    with process_group(release=release_process_group) as ranks:
        adopt_process_group()
        seen = all_gather_json(globals()[kind](folder, ranks))
        if ranks.is_first:
            (folder / f"{kind}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
    end_rank()
