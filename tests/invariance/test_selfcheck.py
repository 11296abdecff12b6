"""The self-proof passes every honest run and stops on every planted fault, naming the part that has it."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.attention import interface
from dpo_dist.batch import RankWork
from dpo_dist.config import LossConfig
from dpo_dist.errors import NumericsError
from dpo_dist.logprobs import LogitTransform
from dpo_dist.losses import bind, mean_loss
from dpo_dist.model import scoring
from dpo_dist.noise import LARGEST_LIMIT, NOISE_PER_SQRT_TOKEN, honest, is_rounding
from dpo_dist.selfcheck import check_first_loss
from dpo_dist.selfcheck.blame import blame_layout
from tests.forking import fork_ranks
from tests.invariance import selfcheck_case as faults
from tests.invariance.selfcheck_case import Case, builds_wrongly, nudge_one_matrix, save_model
from tests.launching import succeeded
from tests.parity.oracle import random_example
from tests.tiny_engine import QUIET, only_rank

# Whichever test of two ranks comes first waits for the launch.
pytestmark = [pytest.mark.timeout(900), *(pytest.mark.filterwarnings(rule) for rule in QUIET)]

ENGINES = [(stage, dtype) for stage in (0, 3) for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=ENGINES, ids=lambda e: f"ZeRO-{e[0]} {str(e[1])[6:]}")
def case(request, folder):
    stage, dtype = request.param
    return Case(folder, stage, dtype, only_rank())


# ---- honest runs pass


@pytest.mark.parametrize("share", [True, False])
def test_honest_run_passes(case, share):
    proof = case.prove(share=share)
    assert proof.same_weights and 0 <= proof.margin_noise < proof.margin_bound
    assert proof.lines()[0].endswith("agree bitwise")


def test_noise_is_measured_where_there_is_some(case):
    proof = case.prove()
    # Far inside of the limits, and not 0: a comparison of something with itself would be. Products in bfloat16 are
    # summed in one order whatever lies beside them on some processors: then there is none, and the planted faults below
    # are what shows that different things are compared.
    scale = NOISE_PER_SQRT_TOKEN[case.policy.dtype]
    assert proof.layout_noise < 3 * scale
    assert proof.layout_noise > 0 or case.policy.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("examples", "max_tokens"),
    [
        ([random_example(1, 1, (1, 1))], 50),
        ([random_example(2, 20, (7,))], 50),  # no pair at all
        ([random_example(3, 300, (900, 1100))], 2500),  # alone larger than the unshared layout has room for
        ([random_example(i, 5 + i, (30 + i, 3)) for i in range(12)], 60),  # bins unlike the micro-batches
    ],
    ids=["one token", "no pair", "long", "many bins"],
)
def test_unusual_honest_steps_pass(case, examples, max_tokens):
    case.prove(examples, max_tokens=max_tokens)


def test_almost_uniform_model_passes(tmp_path):
    case = Case(save_model(tmp_path, initializer_range=0.002), 0, torch.float32, only_rank())
    case.prove()


def test_reference_of_other_weights_is_no_fault(case, folder, tmp_path):
    other = Case(save_model(tmp_path, initializer_range=0.2), 0, case.policy.dtype, only_rank())
    proof = case.prove(reference=other.reference, same_weights=False)
    assert proof.lines()[0].endswith("skipped: reference differs")


# ---- planted faults are found


def test_active_dropout(case):
    layer = case.policy.model.model.model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1, training=True))
    try:
        with pytest.raises(NumericsError, match=r"self-check failed on rank 0: dropout: .*two different answers"):
            case.prove()
    finally:
        hook.remove()
    case.prove()


def test_reference_in_another_dtype(folder):
    case = Case(folder, 0, torch.float32, only_rank(), reference_dtype=torch.bfloat16)
    with pytest.raises(NumericsError, match=r"dtype: the policy computes in torch.float32, the reference in torch.bfl"):
        case.prove()


@pytest.mark.parametrize(("stage", "dtype"), ENGINES)
def test_reference_with_one_matrix_off_by_one_bfloat16_step(folder, stage, dtype):
    case = Case(folder, stage, dtype, only_rank())
    nudge_one_matrix(case.reference.engine)
    with pytest.raises(
        NumericsError,
        match=r"reference: its weights are not the policy's, first model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        case.prove()


@pytest.mark.parametrize(
    ("fault", "only_shared", "share", "culprit"),
    [
        (faults.rejected_sees_chosen, True, True, "attention"),
        (faults.positions_not_restarted, True, True, "attention"),
        (faults.score_index_shifted, True, True, "attention"),
        (faults.score_index_shifted, False, True, "packing: a completion in a micro-batch"),
        (faults.score_index_shifted, False, False, "packing: a completion in a micro-batch"),
        (faults.targets_shifted, False, True, "packing: a completion in a micro-batch"),
        (faults.sequences_not_separated, False, False, "packing: a completion in a micro-batch"),
    ],
)
def test_fault_of_the_layout(case, fault, only_shared, share, culprit):
    with pytest.raises(NumericsError, match=re.escape(f"self-check failed on rank 0: {culprit}")):
        case.prove(share=share, work_type=builds_wrongly(fault, only_shared))


def test_fault_of_a_later_example_only(case):
    """What is compared alone reaches the end of the micro-batch, where borders have been crossed most often."""

    def last_token_wrong(batch):
        changed = batch.input_ids_T.clone()
        changed[-1] = (changed[-1] + 1) % 60
        return faults.replace(batch, input_ids_T=changed)

    examples = [random_example(i, 10, (20, 20)) for i in range(4)]
    with pytest.raises(NumericsError, match="packing: a completion in a micro-batch"):
        case.prove(examples, share=False, work_type=builds_wrongly(last_token_wrong))


def test_reference_values_of_other_completions(case):
    shuffled = faults.ShuffledReference(case.reference.engine)
    with pytest.raises(NumericsError, match=r"packing: the reference's bins .*wrong completions"):
        case.prove(reference=shuffled)


def test_fault_of_the_reference_bins_only(case):
    class WrongBins(RankWork):
        def reference_bins(self):
            return [faults.score_index_shifted(batch) for batch in super().reference_bins()]

    with pytest.raises(NumericsError, match="packing: the reference's bins"):
        case.prove(work_type=WrongBins)


# ---- against the architecture's own forward: faults that every layout has alike


def _kernel_that(change):
    """The segments' kernel with something else in it, for policy and reference."""
    real = interface._KERNELS["sdpa"]

    def wrong(query, key, value, layout, scale, window, softcap, sinks):
        return change(real, query, key, value, layout, scale, window, softcap, sinks)

    return wrong


KERNELS = {
    "scale": lambda real, q, k, v, layout, scale, *rest: real(q, k, v, layout, 0.8 * scale, *rest),
    "softcap": lambda real, q, k, v, layout, scale, window, softcap, sinks: real(
        q, k, v, layout, scale, window, 5.0, sinks
    ),
    "window": lambda real, q, k, v, layout, scale, window, softcap, sinks: real(
        q, k, v, layout, scale, 8, softcap, sinks
    ),
    "heads": lambda real, q, *rest: real(q.roll(1, 1), *rest),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_that_is_wrong_alike_in_every_layout(folder, monkeypatch, kind):
    monkeypatch.setitem(interface._KERNELS, "sdpa", _kernel_that(KERNELS[kind]))
    case = Case(folder, 0, torch.float32, only_rank())
    with pytest.raises(NumericsError, match=r"architecture: the packed forward of the policy does not give"):
        case.prove()


@pytest.mark.parametrize(
    "transform", [LogitTransform(scale=0.9), LogitTransform(softcap=4.0)], ids=["scale", "softcap"]
)
def test_a_head_that_is_wrong_alike_in_every_layout(case, transform):
    heads = [engine.model.model.get_output_embeddings() for engine in (case.policy, case.reference.engine)]
    try:
        for head in heads:
            head.transform = transform
        with pytest.raises(NumericsError, match=r"architecture: the packed forward of the policy does not give"):
            case.prove()
    finally:
        for head in heads:
            head.transform = LogitTransform()


def test_positions_that_are_wrong_alike_in_every_layout(case, monkeypatch):
    real = scoring.as_packed

    def twice_as_far(batch):
        packed = real(batch)
        return faults.replace(packed, inputs={**packed.inputs, "position_ids": 2 * packed.inputs["position_ids"]})

    monkeypatch.setattr(scoring, "as_packed", twice_as_far)
    with pytest.raises(NumericsError, match=r"architecture: the packed forward of the policy does not give"):
        case.prove()


def test_a_reference_of_another_architecture_is_compared_too(case, folder, tmp_path):
    other = Case(save_model(tmp_path, initializer_range=0.2), 0, case.policy.dtype, only_rank())
    other.reference.engine.model.model.get_output_embeddings().transform = LogitTransform(scale=0.9)
    with pytest.raises(NumericsError, match=r"architecture: the packed forward of the reference does not give"):
        case.prove(reference=other.reference, same_weights=False)


def test_the_own_forward_differs_by_rounding_and_by_some(case):
    proof = case.prove()
    assert 0 <= proof.own_noise < 3 * NOISE_PER_SQRT_TOKEN[case.policy.dtype]
    assert proof.own_noise > 0 or case.policy.dtype == torch.bfloat16


# ---- the first loss


def sigmoid_at(margins: list[float], beta: float = 0.1) -> float:
    return float(-F.logsigmoid(beta * torch.tensor(margins, dtype=torch.float64)).mean())


def bound_loss(beta: float):
    return bind(LossConfig(beta=beta))


def test_first_loss(case):
    proof = case.prove()
    honest = [0.9 * proof.margin_bound, -0.9 * proof.margin_bound, 0.5 * proof.margin_bound]
    assert "equals its closed form 0.693147" in check_first_loss(sigmoid_at(honest), bound_loss(0.1), proof)
    with pytest.raises(NumericsError, match="do not belong to these completions"):
        check_first_loss(sigmoid_at([1.5 * proof.margin_bound] * 3), bound_loss(0.1), proof)


def test_first_loss_with_another_reference_is_not_judged(case):
    proof = faults.replace(case.prove(), same_weights=False, skipped="reference differs")
    assert check_first_loss(5.0, bound_loss(0.1), proof).endswith("skipped: reference differs")


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_shuffled_reference_moves_the_first_loss(case, beta):
    """The loop's own indexing is not what the proof ran: the first loss must see a permutation there."""
    proof = case.prove()
    plan = faults.plan_of(faults.EXAMPLES, 1, True, 400)
    work = RankWork(plan, 0, faults.EXAMPLES, True)
    logps_C = case.reference.completion_logps(work).double()
    losses = []
    for batch in work.micro_batches():
        logratios_C = (logps_C - logps_C.roll(1))[batch.completion_index_C]
        losses.append(mean_loss(bound_loss(beta)(batch, logratios_C, logratios_C), plan.weights))
    with pytest.raises(NumericsError, match="first loss is"):
        check_first_loss(float(torch.stack(losses).sum()), bound_loss(beta), proof)


# ---- the statistics


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_honest_noise_is_accepted_and_ten_times_as_much_is_not(count, seed):
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # One value in 400 is beyond three standard deviations, and hypothesis looks for it where there is only one.
    assert is_rounding(noise.clamp(-2.9, 2.9).tolist())
    largest = noise.abs().max()
    assert not is_rounding((8.01 * noise / largest).tolist())
    assert not is_rounding((3.01 * noise / noise.square().mean().sqrt()).tolist())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_values_are_no_rounding(broken):
    for values in ([broken], [0.0, broken], [broken, 0.0]):
        assert not is_rounding(values)


@given(st.integers(1, 20_000), st.floats(0.01, 12.0), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_rounding_of_a_float32_sum_is_explained(num_tokens, nats_per_token, seed):
    """The same values added up in another order: nothing but rounding, at any length."""
    generator = torch.Generator().manual_seed(seed)
    values_M = -nats_per_token * torch.empty(num_tokens).exponential_(generator=generator)
    one, other = (
        torch.zeros(1).index_add(0, torch.zeros(num_tokens, dtype=torch.int64), v) for v in (values_M, values_M.flip(0))
    )
    explained = honest(torch.tensor([float(num_tokens)]), one.double(), scale=0.0)
    assert float((one - other).abs()) <= LARGEST_LIMIT * float(explained) + 1e-30


def test_layout_blame_needs_no_comparison_to_be_present():
    assert blame_layout([], [], [], []) == []
    assert blame_layout([], [100.0], [], [])[0].startswith("packing: a completion")
    assert blame_layout([], [100.0], [0.5], [])[0].startswith("attention: with a shared prompt")
    assert blame_layout([100.0], [], [], [])[0].startswith("attention: with a shared prompt")
    assert blame_layout([100.0], [100.0], [100.0], [100.0])[0].startswith("packing: a completion")
    assert blame_layout([], [], [], [100.0])[0].startswith("packing: the reference's bins")


# ---- two ranks: one launch


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    process = succeeded(fork_ranks(2, "tests.invariance.selfcheck_worker", str(folder), cwd=folder, timeout=600))
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], process.stderr


def test_honest_ranks_pass(two_ranks):
    _, ranks, _ = two_ranks
    for raised in ranks:
        honest = {name: error for name, error in raised.items() if name.startswith(("honest", "idle"))}
        assert len(honest) == 9 and not any(honest.values()), honest


def test_fault_of_one_rank_stops_all(two_ranks):
    _, ranks, _ = two_ranks
    for raised in ranks:
        for stage, dtype in ENGINES:
            kind, message = raised[f"fault {stage} {dtype}"]
            assert kind == "NumericsError" and "packing: a completion in a micro-batch" in message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("other configuration", "loss.beta differs between ranks: rank 0: 0.1, rank 1: 0.2"),
        ("other data", "the training data differs between ranks"),
        ("other cost", "what an example costs differs between ranks"),
        ("other plan", "the first step's plan differs between ranks"),
    ],
)
def test_ranks_that_disagree_stop_before_anything_is_written(two_ranks, name, what):
    folder, ranks, _ = two_ranks
    for raised in ranks:
        kind, message = raised[name]
        assert kind == "RankMismatchError" and what in message and "rank 1: " in message
    assert not (folder / name.removeprefix("other ")).exists()


def test_shuffled_reference_in_the_loop_stops_after_the_first_step(two_ranks):
    folder, ranks, _ = two_ranks
    for raised in ranks:
        kind, message = raised["shuffled"]
        assert kind == "NumericsError" and "first loss is" in message
    assert not (folder / "shuffled" / "model").exists()


def test_run_says_and_logs_what_it_proved(two_ranks):
    folder, _, stderr = two_ranks
    first = json.loads((folder / "honest" / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["split"]) == (0, "self_check")
    assert 0 <= first["numerics/margin_noise"] < 1e-2
    assert stderr.count("self-check: policy and reference on the same micro-batch: agree bitwise") >= 1
    assert stderr.count("equals its closed form 0.693147") == 1
