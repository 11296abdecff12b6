"""The kit's comparison of attention kernels: a right one passes, and faults that are planted are found."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_kit import ceilings, kernels, kernels_run
from benchmarks.gpu_kit.__main__ import section
from benchmarks.gpu_kit.kit import LARGE, SMALL, TINY, Kit
from dpo_dist.attention import interface
from dpo_dist.attention.segments import sdpa_segments

RECORDED = Path(__file__).with_name("gpu_report.json")
CPU = torch.device("cpu")


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    kit = Kit(tmp_path, 2, TINY, {"gpus": []}, None, ceilings={"product_tflops_of_a_rank": 0.5})
    for folder in (kit.work, kit.log_of("x").parent):
        folder.mkdir()
    return kit


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Puts a function in the place of sdpa's; afterwards the right one is registered again."""
    yield lambda kernel: monkeypatch.setitem(interface._KERNELS, "sdpa", kernel)
    monkeypatch.undo()
    interface.register("sdpa")


def compared(window: int = 128) -> dict[Any, dict[str, Any]]:
    """Lines of sdpa by window."""
    lines = kernels_run.compare([[4, 2, 64]], window, [[9, 5, 6]], CPU)
    assert [line["kernel"] for line in lines] == 2 * ["sdpa", "torch", "flash_attn"]
    assert all("needs a CUDA device" in line["reason"] for line in lines if line["kernel"] != "sdpa")
    return {line["window"]: line for line in lines if line["kernel"] == "sdpa"}


def test_a_right_kernel_is_right() -> None:
    found = compared()
    for line in found.values():
        assert line["status"] == "ok" and line["same_bits"] and line["tflops"] > 0 and line["tokens"] == 9 + 4 + 5
        assert 1e-4 < line["distance"]["output"] < kernels_run.BOUND / 3, "computed in bfloat16"
        assert max(line["distance"].values()) < kernels_run.BOUND / 2


def test_a_window_that_is_off_by_one_is_found(planted: Callable[[Callable[..., Any]], None]) -> None:
    def wide(q: Any, k: Any, v: Any, layout: Any, scale: float, window: int | None, *others: Any) -> Any:
        return sdpa_segments(q, k, v, layout, scale, window and window + 1, *others)

    planted(wide)
    found = compared()
    assert found[None]["status"] == "ok" and found[128]["status"] == "failed"
    assert "output 4." in found[128]["reason"] and "value gradient 4." in found[128]["reason"]


def test_heads_that_read_the_keys_of_others_are_found(planted: Callable[[Callable[..., Any]], None]) -> None:
    planted(lambda q, k, v, *others: sdpa_segments(q, k.flip(1), v.flip(1), *others))
    assert {line["status"] for line in compared().values()} == {"failed"}


def test_a_nan_and_an_error_are_failures(planted: Callable[[Callable[..., Any]], None]) -> None:
    def breaks_without_window(q: Any, k: Any, v: Any, layout: Any, scale: float, window: int | None, *rest: Any) -> Any:
        if window is None:
            raise RuntimeError("no such kernel")
        return sdpa_segments(q, k, v, layout, scale, window, *rest) * math.nan

    planted(breaks_without_window)
    found = compared()
    assert found[None]["reason"] == "RuntimeError: no such kernel" and found[None]["status"] == "failed"
    assert "output nan" in found[128]["reason"] and found[128]["status"] == "failed"


def test_other_bits_are_a_failure_where_the_same_were_asked_for(
    planted: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = iter([1.0, 1.004] * 100)
    planted(lambda *arguments: sdpa_segments(*arguments) * next(factors))
    assert {(line["status"], line["same_bits"]) for line in compared().values()} == {("ok", False)}
    monkeypatch.setattr(kernels_run, "ASKED_TO_REPEAT", ("sdpa",))
    assert {line["reason"] for line in compared().values()} == {"other bits when it runs again"}


def test_operations_are_those_of_what_is_seen() -> None:
    layout = kernels_run.packed_layout([[2, 1, 3]], CPU)
    # Of each completion the last token is scored and not read.
    assert (layout.q_lengths, layout.k_lengths) == ((2, 2), (2, 4))
    seen, in_window = (1 + 2) + (3 + 4), (1 + 2) + (2 + 2)
    assert kernels_run.operations(layout, (4, 2, 8), None) == 14 * 4 * 8 * seen
    assert kernels_run.operations(layout, (4, 2, 8), 2) == 14 * 4 * 8 * in_window
    assert kernels.fitting([[1, 1, 1], [2, 2, 2], [1, 1, 1]], 9) == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize("sizes", [TINY, SMALL, LARGE], ids=lambda sizes: sizes.name)
def test_heads_are_those_of_models(sizes: Any) -> None:
    assert {dim for _, _, dim in sizes.kernel_heads} == {64, 128}
    assert all(queries % keys == 0 < queries // keys - 1 for queries, keys, _ in sizes.kernel_heads)
    # Some segments have more keys than the window, and some not many.
    spans = [prompt + first for prompt, first, _ in kernels_run.CHECKED]
    assert min(spans) < 3 * sizes.window and max(spans) > 2 * sizes.window


def test_a_wrong_kernel_fails_the_part(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = json.loads(RECORDED.read_text())["sections"]["kernels"]["values"]["runs"]
    lines[3] |= {"status": "failed", "reason": "output 4.1e-02 > 0.01"}

    def run(self: Kit, num_ranks: int, name: str, module: str, settings: str, out: str, limit: float) -> None:
        timed = json.loads(Path(settings).read_text())["timed"]
        assert num_ranks == 1 and TINY.max_tokens / 2 < sum(map(sum, timed)) <= TINY.max_tokens
        Path(out).write_text(json.dumps(lines))

    monkeypatch.setattr(Kit, "run", run)
    found = section("kernels", kernels.kernels, kit)
    assert found["status"] == "failed"
    assert found["reason"] == "sdpa with heads of 64 and a window: output 4.1e-02 > 0.01"
    assert found["values"]["runs"][0]["share_of_ceiling"] == lines[0]["tflops"] / 0.5


@pytest.mark.thorough
def test_both_are_measured_here(kit: Kit) -> None:
    assert section("ceilings", ceilings.ceilings, kit)["status"] == "ok"
    assert kit.ceilings["ranks"] == 2 and kit.ceilings["product_tflops_of_a_rank"] > 0
    found = section("kernels", kernels.kernels, kit)
    runs = [run for run in found["values"]["runs"] if run["status"] == "ok"]
    assert found["status"] == "ok" and [(run["head_dim"], run["window"]) for run in runs] == [
        (64, None), (64, 16), (128, None), (128, 16)
    ]  # fmt: skip
    assert all(run["share_of_ceiling"] > 0 for run in runs)
