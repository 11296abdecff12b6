"""Compiled layers say what they said before, and are compiled once for all lengths."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.config import TrainConfig, load_deepspeed
from dpo_dist.engine import InferenceEngine, TrainingEngine, engine_config, inference_config, measure_activations
from dpo_dist.errors import ModelError
from dpo_dist.logprobs import LogProbHead
from dpo_dist.model import Compilations, ScoringModel, compiled_classes, load_model, rewritten_by
from dpo_dist.model.compiled import compile_layers
from dpo_dist.pointwise import AS_WRITTEN, STATISTICS, LogitTransform
from dpo_dist.pretrained import load_config
from dpo_dist.reference import numerics_of
from tests.launching import environment
from tests.parity.adapter_cases import examples_of_step, save_base
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.timeout(600), *(pytest.mark.filterwarnings(rule) for rule in QUIET)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", tied=False)


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    limit = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(limit)  # torch's compiler raises it for the whole process
    torch.compiler.reset()
    register("sdpa")


def settings_of(stage: int) -> dict[str, Any]:
    settings = engine_config(load_deepspeed(f"zero{stage}_cpu"), torch.float32, only_rank().device, 1e9)
    settings["zero_optimization"].pop("leaf_module", None)  # what is compiled needs none of its own
    return settings


def load(base: Path, settings: dict[str, Any], counted: Compilations | None, recompute: bool = False) -> ScoringModel:
    config = load_config(base, trust_remote_code=False)
    name = register("sdpa", compiled=counted is not None)
    return load_model(base, config, name, torch.float32, settings, recompute, False, compilations=counted)


def trained(base: Path, stage: int, counted: Compilations | None, recompute: bool = False) -> TrainingEngine:
    settings = settings_of(stage)
    model = load(base, settings, counted, recompute)
    return TrainingEngine(model, settings, TrainConfig(output_dir="unused", learning_rate=1e-2), only_rank())


def batch_of(step: int) -> MicroBatch:
    examples = examples_of_step(step)[: step + 1]
    offsets = [sum(len(one.completion_ids) for one in examples[:place]) for place in range(len(examples))]
    return build_micro_batch(examples, offsets, share_prompts=True)


def steps(
    engine: TrainingEngine, graphs: list[int], counted: Compilations | None = None
) -> list[tuple[torch.Tensor, float]]:
    """Log-probabilities and the gradient's norm of three updates, of micro-batches of other lengths."""
    found = []
    for step in range(3):
        for batch in engine.accumulate([batch_of(step)]):
            logps = engine.token_logps(batch)
            engine.backward(logps.square().mean())
        found.append((logps.detach(), float(engine.step(1e-2))))
        graphs.append(counted.graphs if counted else 0)
    return found


@pytest.mark.parametrize(("stage", "recompute"), [(0, False), (3, True)])
def test_the_same_training_from_one_compilation(base: Path, stage: int, recompute: bool) -> None:
    counted = Compilations()
    expected = steps(trained(base, stage, None, recompute), [])
    engine = trained(base, stage, counted, recompute)
    graphs = []
    for (logps, norm), (stock, its_norm) in zip(steps(engine, graphs, counted), expected, strict=True):
        torch.testing.assert_close(logps, stock, rtol=0, atol=1e-5)
        assert norm == pytest.approx(its_norm, rel=1e-5)
    assert len({len(batch_of(step).input_ids_T) for step in range(3)}) == 3
    assert graphs[0] == graphs[2] > 0


def test_under_zero_3_a_layer_is_not_cut_into_more_pieces(base: Path) -> None:
    """DeepSpeed's hooks stand before and after a layer, not within it."""
    graphs = {}
    for stage in (0, 3):
        counted = Compilations()
        with torch.no_grad():
            trained(base, stage, counted).token_logps(batch_of(1))
        graphs[stage] = counted.graphs
        torch.compiler.reset()
    assert graphs[0] == graphs[3] > 0


def test_policy_and_reference_are_the_same_bits_and_a_filler_is_not_compiled_for(base: Path) -> None:
    counted = Compilations()
    reference = InferenceEngine(load(base, {}, counted), inference_config(settings_of(0)))
    policy = trained(base, 0, counted)
    with torch.no_grad():
        assert torch.equal(policy.token_logps(batch_of(1)), reference.token_logps(batch_of(1)))
        before = counted.graphs
        for engine in (policy, reference):
            engine.token_logps(build_micro_batch([], [], share_prompts=True))
            engine.own_token_logps(alone())
            assert counted.graphs == before


class _Miscompiles(Compilations):
    """A compiler whose results are off by a hundredth."""

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return lambda *given: [value * 1.01 if torch.is_tensor(value) else value for value in graph(*given)]


def test_the_own_forward_is_not_compiled_so_that_a_wrong_compiler_shows(base: Path) -> None:
    """Or policy, reference and their own forward would be wrong alike, and every check at the start would pass."""
    plain, right, wrong = (trained(base, 0, one) for one in (None, Compilations(), _Miscompiles()))
    with torch.no_grad():
        expected = plain.own_token_logps(alone())
        for engine in (right, wrong):
            packed = engine.token_logps(alone())
            assert torch.equal(engine.own_token_logps(alone()), expected)
            assert torch.allclose(packed, expected, rtol=0, atol=1e-5) == (engine is right)
            assert rewritten_by(engine.model.model) == ["model.torch_compile"]
    assert rewritten_by(plain.model.model) == []


def alone() -> MicroBatch:
    """One completion of one example."""
    example = examples_of_step(0)[0]
    return build_micro_batch([replace(example, completion_ids=example.completion_ids[:1], pairs=())], [0], False)


def test_activations_are_measured(base: Path) -> None:
    plain, compiled = (measure_activations(trained(base, 0, one), batch_of(1)) for one in (None, Compilations()))
    assert compiled.num_layers == plain.num_layers
    # As written: what is compiled keeps no more.
    assert (compiled.kept, compiled.outside) == (plain.kept, plain.outside)


def test_layers_that_transformers_does_not_know_are_refused(base: Path) -> None:
    model = load(base, {}, None).model
    model.get_decoder().layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="the layers of architecture llama cannot be compiled one by one"):
        compile_layers(model, Compilations())


def test_names_stay(base: Path) -> None:
    """DeepSpeed finds layers by the names of their classes."""
    plain, compiled = (load(base, {}, counted) for counted in (None, Compilations()))
    kinds = [{type(layer) for layer in model.switchable_layers} for model in (plain, compiled)]
    assert kinds[0] != kinds[1]
    for attribute in ("__name__", "__qualname__", "__module__"):
        assert [getattr(kind, attribute) for kind in kinds[0]] == [getattr(kind, attribute) for kind in kinds[1]]
    assert (compiled_classes(plain), compiled_classes(compiled)) == (set(), kinds[1])


def test_a_cache_of_values_that_were_not_compiled_is_another_one() -> None:
    assert (numerics_of("sdpa", False, True), numerics_of("sdpa")) == ("1-sdpa-compiled", "1-sdpa")


def test_what_is_compiled_later_is_told() -> None:
    counted = Compilations()
    counted.graphs, counted.seconds = 4, 12.4
    assert counted.news(1) == "model.torch_compile: 4 graphs compiled until the end of step 1, in 12 s"
    assert counted.news(2) == ""
    counted.graphs += 3
    assert counted.news(3) == "model.torch_compile: 3 more graphs were compiled in step 3, which was slower for it"


TRANSFORMS = [LogitTransform(), LogitTransform(scale=2.0, softcap=3.0)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_head_equals_single_operations(transform: LogitTransform) -> None:
    """Values, statistics and gradients, in one chunk and in several; the last of 17 rows is a chunk of its own."""
    torch.manual_seed(0)
    counted, linear = Compilations(), torch.nn.Linear(12, 130, bias=False)
    fused = LogProbHead(linear, transform, 8, AS_WRITTEN.compiled(counted.compile))
    stock = LogProbHead(linear, transform, 8)
    for rows in (8, 5, 17, 1, 0):
        found = []
        for head in (stock, fused):
            hidden = torch.randn(rows, 12, generator=torch.manual_seed(rows)).requires_grad_()
            targets, weights = torch.arange(rows) * 7 % 130, torch.linspace(-1, 2, rows)
            logps, statistics = head(hidden, targets, STATISTICS)
            gradients = torch.autograd.grad(logps, (hidden, linear.weight), weights)
            found.append((logps, statistics, *gradients))
            assert torch.equal(head(hidden, targets), logps)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert counted.graphs > 0


def test_a_head_in_bfloat16_is_as_near_to_float64() -> None:
    torch.manual_seed(0)
    counted, linear, hidden = Compilations(), torch.nn.Linear(12, 130, bias=False), torch.randn(40, 12)
    targets, errors = torch.arange(40), {}
    exact = LogProbHead(linear.double(), LogitTransform())
    heads = {"stock": None, "fused": AS_WRITTEN.compiled(counted.compile)}

    def run(head: LogProbHead, dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        logps = head(leaf, targets)
        return [logps, *torch.autograd.grad(logps.sum(), (leaf, head.weight))]

    expected = run(exact, torch.float64)
    low = torch.nn.Linear(12, 130, bias=False, dtype=torch.bfloat16)
    low.weight.data.copy_(linear.weight.data)
    for name, fused in heads.items():
        found = run(LogProbHead(low, LogitTransform(), fused=fused), torch.bfloat16)
        errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert counted.graphs > 0
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(errors["fused"], errors["stock"], strict=True)), errors


HEADS = """
import torch
from dpo_dist.logprobs import LogProbHead
from dpo_dist.model import Compilations
from dpo_dist.pointwise import AS_WRITTEN, STATISTICS, LogitTransform

counted = Compilations()
linear, fused = torch.nn.Linear(12, 130, bias=False), AS_WRITTEN.compiled(counted.compile)
head = LogProbHead(linear, LogitTransform(softcap=3.0), 8, fused)
head.compile_statistics(STATISTICS, torch.float32, torch.device("cpu"))
print(counted.graphs)
for rows in (8, 5, 17, 1, 0, 16):
    hidden = torch.randn(rows, 12, requires_grad=True)
    logps, _ = head(hidden, torch.arange(rows), STATISTICS)
    logps.sum().backward()
print(counted.graphs)
"""


@pytest.mark.thorough
def test_a_head_is_compiled_once_for_all_lengths_and_its_statistics_before_the_first_step(tmp_path: Path) -> None:
    """In a process of its own: the checks of types that tests put around functions would be pieces of their own."""
    variables = environment({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", HEADS], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split()[-2:])
    assert after == before + 1 > 2  # what computes gradients


ON_ANOTHER_WIDTH = """
import torch
from dpo_dist.model import Compilations
from dpo_dist.pointwise import LogitTransform, log_probs

fused, torch_seed = Compilations().compile(log_probs), torch.manual_seed(0)
for rows in (8, 5):
    arguments = torch.randn(rows, 130), torch.arange(rows), LogitTransform()
    for found, expected in zip(fused(*arguments), log_probs(*arguments), strict=True):
        torch.testing.assert_close(found, expected)
"""


@pytest.mark.thorough
def test_what_was_compiled_for_other_vectors_is_not_taken(tmp_path: Path) -> None:
    """The tests compute with AVX2, runs with what the machine has, and both may have torch's cache in one place."""
    for capability in ("avx2", "default", None):
        variables = environment({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
        variables.pop("ATEN_CPU_CAPABILITY", None)
        if capability is not None:
            variables["ATEN_CPU_CAPABILITY"] = capability
        done = subprocess.run(
            [sys.executable, "-c", ON_ANOTHER_WIDTH], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (capability, done.stderr)
