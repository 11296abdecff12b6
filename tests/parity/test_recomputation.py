"""What backward needs in memory: measured against what is really held, decided by arithmetic, and the same bits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.config import TrainConfig, load_deepspeed
from dpo_dist.engine import ActivationMemory, TrainingEngine, engine_config, measure_activations
from dpo_dist.model import load_model
from dpo_dist.pretrained import load_config
from tests.parity.adapter_cases import examples_of_step, save_base
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.filterwarnings(rule) for rule in QUIET]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", tied=False)


def make(base: Path, stage: int, checkpointing: Any = "auto") -> TrainingEngine:
    config = load_config(base, trust_remote_code=False)
    settings = engine_config(load_deepspeed(f"zero{stage}_cpu"), torch.float32, only_rank().device, 1e9)
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = load_model(base, config, register("sdpa"), torch.float32, settings, checkpointing, False)
    return TrainingEngine(model, settings, TrainConfig(output_dir="unused"), only_rank())


def batch_of(times: int = 1) -> MicroBatch:
    examples = examples_of_step(0) * times
    offsets, count = [], 0
    for example in examples:
        offsets.append(count)
        count += len(example.completion_ids)
    return build_micro_batch(examples, offsets, share_prompts=True)


@contextmanager
def held() -> Iterator[list[int]]:
    """Bytes that torch took inside and has not given back: an account that knows nothing of autograd."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        yield found
    found.append(sum(event.self_cpu_memory_usage for event in taken.key_averages()))


@pytest.mark.parametrize("stage", [0, 3])
def test_measured_is_what_is_held(base: Path, stage: int) -> None:
    engine, batch = make(base, stage), batch_of(6)
    layers = len(engine.model.switchable_layers)
    engine.model.recompute_first(0)
    memory = measure_activations(engine, batch)
    assert memory.num_layers == layers > 1
    for count in range(layers + 1):
        engine.model.recompute_first(count)
        with held() as found:
            logps = engine.token_logps(batch)
        del logps
        # `needed` also has the activations of one layer once more: of the one that is computed again.
        tokens = len(batch.input_ids_T)
        expected = memory.needed(tokens, count) - memory.fixed - tokens * memory.kept
        # Counted as fixed: a chunk of probabilities. Not counted: masks of the kernel for CPUs.
        expected += 4 * len(batch.target_ids_M) * engine.model.model.config.vocab_size
        expected += sum(mask.nbytes for mask in batch.layout.masks.values()) if count == 0 else 0
        assert found[0] == pytest.approx(expected, rel=0.06), count


def test_the_measure_does_not_depend_on_how_much_is_measured(base: Path) -> None:
    engine = make(base, 0)
    engine.model.recompute_first(0)
    small, large = (measure_activations(engine, batch_of(times)) for times in (1, 12))
    assert small.kept == pytest.approx(large.kept, rel=0.05)


@pytest.mark.parametrize("stage", [0, 3])
def test_as_many_layers_recompute_and_the_bits_are_the_same(base: Path, stage: int) -> None:
    batch, seen = batch_of(), {}
    for count in (None, 0, 1, 2, "true", "false"):
        engine = make(base, stage, {"true": True, "false": False}.get(str(count), "auto"))
        if isinstance(count, int):
            engine.model.recompute_first(count)
        calls: list[int] = []
        for layer in engine.model.switchable_layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        (one,) = engine.accumulate([batch])
        logps = engine.token_logps(one)
        engine.backward(-logps.mean())
        norm = float(engine.step(1e-3))
        weights = {name: whole.clone() for name, whole in engine.named_full_parameters() if whole is not None}
        seen[count] = len(calls), (logps.tolist(), norm), weights
    layers = len(engine.model.switchable_layers)
    recomputed = {None: layers, 0: 0, 1: 1, 2: 2, "true": layers, "false": 0}
    assert {count: calls - layers for count, (calls, _, _) in seen.items()} == recomputed
    for _, numbers, weights in seen.values():
        assert numbers == seen[0][1]
        assert all(torch.equal(weights[name], seen[0][2][name]) for name in seen[0][2])


def test_optimizer_and_gradients_are_planned_for(base: Path) -> None:
    """What the first step adds for good is what was counted as yet to come."""
    engine = make(base, 0)
    engine.model.recompute_first(0)
    before = measure_activations(engine, batch_of())
    assert not engine.has_all_states
    with held() as found:
        for one in engine.accumulate([batch_of()]):
            engine.backward(-engine.token_logps(one).mean())
        engine.step(1e-3)
    assert engine.has_all_states
    after = measure_activations(engine, batch_of())
    moments = 8 * engine.num_trained
    assert before.fixed - after.fixed == moments
    assert found[0] == pytest.approx(moments, rel=0.1)


def test_a_class_that_cannot_recompute_has_no_layers_to_switch(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    engine = make(base, 0)
    assert engine.model.switchable_layers == []
    engine.model.recompute_first(2)  # and then trains all the same
    engine.backward(-engine.token_logps(batch_of()).mean())


MEMORY = ActivationMemory(kept=10.0, recomputed=1.0, outside=2.0, num_layers=4, fixed=100.0)


def test_needed() -> None:
    assert MEMORY.needed(7, 0) == 100 + 7 * (2 + 4 * 10 + 10)
    assert MEMORY.needed(7, 4) == 100 + 7 * (2 + 4 * 1 + 10)


@pytest.mark.parametrize("count", range(5))
def test_fewest_is_the_least_that_fits(count: int) -> None:
    tight = math.ceil(MEMORY.needed(7, count) / 0.85)
    assert MEMORY.fewest(7, tight) == count
    assert MEMORY.fewest(7, tight - 2) == (count + 1 if count < 4 else None)
    assert MEMORY.most_tokens(tight, count) == 7
    assert MEMORY.most_tokens(tight - 2, count) == 6
    assert MEMORY.most_tokens(0, count) == 0


def test_the_gradients_of_one_process_are_not_copied_to_be_summed(base: Path) -> None:
    """DeepSpeed would copy all of them into one row and back: as much memory again as they take."""
    found = []
    for copies in (False, True):
        engine, rows = make(base, 0), []
        stock = engine.engine.allreduce_bucket

        def noting(*arguments: Any, stock: Any = stock, rows: list[int] = rows, **settings: Any) -> Any:
            rows.append(sum(gradient.nbytes for gradient in arguments[0]))
            return stock(*arguments, **settings)

        engine.engine.allreduce_bucket = noting
        if copies:
            engine.engine.enable_backward_allreduce = True
        for batch in engine.accumulate([batch_of(), batch_of(2)]):
            engine.backward(engine.completion_logps(batch).sum())
        assert sum(rows) == (sum(parameter.nbytes for parameter in engine.model.parameters()) if copies else 0)
        found.append([parameter.grad.clone() for parameter in engine.model.parameters()])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
