"""When and in which sizes ZeRO-3 gathers the weights of Llama 3 8B and 70B with the shipped file, on 64 ranks.

Proved: which gathers are asked for in which order, how large each message is (all ranks' shards together), and how much
is computed between the start of a gather and the first use of what it brings. A tiny model asks for the same with real
tensors as with fake ones. Not proved: how long a gather takes, or that it is hidden behind what is computed meanwhile;
that a layer in the middle of 32 or 80 is like one in the middle of 8 or 6 (for 8B it was looked at once, and is).

`pytest -s -m slow tests/gpu_contract/test_gathers.py` prints the table of docs/gpu.md.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.launching import REPOSITORY, environment

SHIPPED = json.loads((REPOSITORY / "deepspeed_configs/zero3_bf16.json").read_text())["zero_optimization"]
LIVE = 1_000_000_000  # DeepSpeed's own stage3_max_live_parameters, elements; the shipped file leaves it alone
SMALL = {
    "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 35_000,
    "stage3_max_live_parameters": 140_000,
    "stage3_max_reuse_distance": 140_000,
}
CASES: dict[str, dict[str, Any]] = {
    "real": {"model": "small", "fake": False, "zero": SMALL},
    "fake": {"model": "small", "fake": True, "zero": SMALL},
    "8B": {"model": "8B", "fake": True, "zero": {}},
    "70B": {"model": "70B", "fake": True, "zero": {}},
    "70B, max_live 2e9": {"model": "70B", "fake": True, "zero": {"stage3_max_live_parameters": 2 * LIVE}},
    "8B, no prefetch": {"model": "8B", "fake": True, "zero": {"stage3_prefetch_bucket_size": 0}},
}
PREFETCHING = [name for name in CASES if name not in ("real", "fake", "8B, no prefetch")]
# Of docs/gpu.md. Ahead is what is computed between the start of a gather and the first use of what it brings: modules
# with weights, their weights in MB, and in layers. A gather is late if that is less than the weights that it brings.
TABLE = """
| shape | gathers while one layer runs | message, MB | ahead in forward | ahead in backward | late |
|---|---|---|---|---|---|
| 8B | 4 and 4 | 117 (34 to 554) | 39, 1963 MB, 4.5 | 80, 3691 MB, 8.5 | 1 |
| 70B | 4 and 4 | 470 (302 to 940) | 10, 1711 MB, 1.0 | 14, 1627 MB, 1.0 | 6 |
| 70B, max_live 2e9 | 4 and 4 | 470 (134 to 940) | 20, 3892 MB, 2.3 | 36, 6292 MB, 3.7 | 1 |
| 8B, no prefetch | 7 and 7 | 34 (8 to 117) | 0, 0 MB, 0.0 | 0, 0 MB, 0.0 | all |
""".strip().splitlines()
MATRICES = 7  # of a layer: q, k, v, o, gate, up, down; each is a module of its own
BYTES = 2  # of an element in bfloat16

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Gather:
    """One gather, and what is computed before it is needed."""

    during: str  # the module that was about to run when it was started
    phase: str
    parameters: tuple[str, ...]
    message: int  # bytes
    ahead_modules: int  # modules with weights that run before the first use; 0: it is waited for at once
    ahead: int  # bytes of their weights

    @property
    def running(self) -> int | None:
        """The layer that was running."""
        return _layer(self.during)


@dataclass(frozen=True)
class Seen:
    """What one case asked for."""

    gathers: tuple[Gather, ...]
    sizes: dict[str, int]
    persistent: tuple[str, ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return 1 + max(layer for layer in map(_layer, self.sizes) if layer is not None)

    def of(self, phase: str) -> list[Gather]:
        """Those started in one phase."""
        return [gather for gather in self.gathers if gather.phase == phase]

    def steady(self, phase: str) -> list[Gather]:
        """Those started while a layer ran that is neither among the first nor among the last of its phase."""
        layer = 1 if phase == "forward" else self.layers - 3
        return [gather for gather in self.of(phase) if gather.running == layer]


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 else None


def _seen(raw: dict[str, Any]) -> Seen:
    uses, sizes, gathers = raw["uses"], raw["bytes"], []
    for gather in raw["gathers"]:
        start = gather["position"]
        brought = set(gather["parameters"])
        needed = next(i for i in range(start, len(uses)) if brought & set(uses[i]["parameters"]))
        before = [module["parameters"] for module in uses[start:needed] if module["parameters"]]
        ahead = sum(sizes[name] for parameters in before for name in parameters)
        gathers.append(
            Gather(uses[start]["module"], gather["phase"], tuple(brought), gather["bytes"], len(before), ahead)
        )
    return Seen(tuple(gathers), sizes, tuple(raw["persistent"]))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gathers") / "out.json"
    cases = [json.dumps({"name": name, **case}) for name, case in CASES.items()]
    worker = [sys.executable, "-m", "tests.gpu_contract.gathers_worker", str(out), *cases]
    variables = environment({"DS_ACCELERATOR": "cpu"})
    done = subprocess.run(worker, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def seen(raw: dict[str, Any]) -> dict[str, Seen]:
    return {name: _seen(case) for name, case in raw.items()}


def _row(name: str, case: Seen) -> str:
    """A line of the table in docs/gpu.md."""
    messages = [
        g.message / 1e6 for g in case.gathers if any(_layer(parameter) is not None for parameter in g.parameters)
    ]
    layer = sum(size for parameter, size in case.sizes.items() if _layer(parameter) == 0)
    cells = [name, " and ".join(str(len(case.steady(phase))) for phase in ("forward", "backward"))]
    cells.append(f"{statistics.median(messages):.0f} ({min(messages):.0f} to {max(messages):.0f})")
    for phase in ("forward", "backward"):
        modules = statistics.median(g.ahead_modules for g in case.steady(phase))
        ahead = statistics.median(g.ahead for g in case.steady(phase))
        cells.append(f"{modules:.0f}, {ahead / 1e6:.0f} MB, {ahead / layer:.1f}")
    late = sum(g.ahead < g.message for g in case.gathers)
    cells.append("all" if late == len(case.gathers) else str(late))
    return f"| {' | '.join(cells)} |"


def test_real_and_fake_tensors_are_gathered_alike(raw: dict[str, Any]) -> None:
    for what in ("uses", "gathers", "bytes", "persistent"):
        assert raw["real"][what] == raw["fake"][what]
    assert len(raw["real"]["gathers"]) > 10


def test_the_table(raw: dict[str, Any], seen: dict[str, Seen]) -> None:
    rows = [_row(name, case) for name, case in seen.items() if name not in ("real", "fake")]
    print("", *TABLE[:2], *rows, sep="\n")
    assert rows == TABLE[2:]
    assert max(case["peak_gib"] for case in raw.values()) < 2  # GiB; fake tensors have none


@pytest.mark.parametrize("name", ["8B", "70B", "8B, no prefetch"])
def test_a_weight_comes_once_for_forward_and_once_for_backward(seen: dict[str, Seen], name: str) -> None:
    """Recomputation and backward share one gather; what forward used last is still there for backward."""
    case = seen[name]
    times = {parameter: sum(parameter in gather.parameters for gather in case.gathers) for parameter in case.sizes}
    assert {times[parameter] for parameter in case.persistent} == {0}
    assert {parameter for parameter in case.sizes if "norm" in parameter} == set(case.persistent)
    assert len(case.persistent) == 2 * case.layers + 1
    matrices = set(case.sizes) - set(case.persistent)
    assert {times[parameter] for parameter in matrices} == {1, 2}
    assert {times[parameter] for parameter in matrices if _layer(parameter) in (0, 1, 2)} == {2}
    assert times["lm_head.weight"] == 1
    assert sum(gather.message for gather in case.gathers) <= 2 * sum(case.sizes.values())


@pytest.mark.parametrize("name", PREFETCHING)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_gather_starts_before_as_much_is_computed_as_it_brings(seen: dict[str, Seen], name: str, phase: str) -> None:
    steady = seen[name].steady(phase)
    assert 0 < len(steady) < MATRICES  # several matrices in a message
    assert all(0 < gather.message <= gather.ahead for gather in steady)


@pytest.mark.parametrize("name", PREFETCHING)
def test_distance_is_what_may_be_live(seen: dict[str, Seen], name: str) -> None:
    """DeepSpeed gathers ahead until as many elements are live as may be, and by less than one matrix more."""
    may_be_live = CASES[name]["zero"].get("stage3_max_live_parameters", LIVE) * BYTES
    case = seen[name]
    largest = max(size for parameter, size in case.sizes.items() if _layer(parameter) is not None)
    assert SHIPPED["stage3_prefetch_bucket_size"] * BYTES > largest
    for gather in case.steady("forward"):
        assert may_be_live <= gather.ahead + gather.message < may_be_live + largest


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_without_prefetch_every_matrix_is_waited_for(seen: dict[str, Seen], phase: str) -> None:
    case = seen["8B, no prefetch"]
    assert {gather.ahead_modules for gather in case.gathers} == {0}
    assert len(case.steady(phase)) == MATRICES
