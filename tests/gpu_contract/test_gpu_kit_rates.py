"""The kit's ceilings and variants: arithmetic, that every rate has its share, and reasons of what is left out."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_kit import ceilings, throughput, variants
from benchmarks.gpu_kit.__main__ import PARTS, WITH_RATES, chosen_parts, section
from benchmarks.gpu_kit.against_trl import SAME, _settings, their_speed
from benchmarks.gpu_kit.kit import LARGE, LIMIT_SECONDS, TINY, Failed, Kit, Skipped, sizes_for
from benchmarks.gpu_kit.page import page
from tests.gpu_contract.rates import rates_alone

RECORDED = Path(__file__).with_name("gpu_report.json")
CPU = torch.device("cpu")
MEASURED = {"product_tflops_of_a_rank": 0.5, "copy_gb_per_second_of_a_rank": 8.0}


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    kit = Kit(tmp_path, 2, TINY, {"gpus": [], "cpu": {"memory_gib": 16.0}}, None, ceilings=dict(MEASURED))
    for folder in (kit.work, kit.log_of("x").parent):
        folder.mkdir()
    return kit


# ---- rates and ceilings


def test_every_rate_has_its_share(report: dict[str, Any]) -> None:
    sections = {name: one["values"] for name, one in report["sections"].items() if name != "ceilings"}
    assert list(rates_alone(sections)) == []
    with_shares = {name for name, values in sections.items() if "share_of_" in json.dumps(values)}
    assert with_shares == WITH_RATES
    sections["variants"]["runs"][1]["share_of_ceiling"] = None
    del sections["kernels"]["runs"][0]["share_of_ceiling"]
    assert list(rates_alone(sections)) == ["/kernels/runs/0", "/variants/runs/1"]


def test_ceilings_are_measured_for_those_who_need_them() -> None:
    assert chosen_parts(None) == set(PARTS)
    assert chosen_parts(["golden", "memory"]) == {"golden", "memory"}
    for name in WITH_RATES:
        assert chosen_parts([name]) == {name, "ceilings"}
        assert list(PARTS).index("ceilings") < list(PARTS).index(name)


def test_ceilings_are_products_and_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Callable[[], Any]] = []

    def two_seconds(call: Callable[[], Any], device: torch.device) -> float:
        call()
        called.append(call)
        return 2.0

    monkeypatch.setattr(ceilings, "seconds_of_ranks", two_seconds)
    found = ceilings.speeds(16, 4096, CPU)
    assert len(called) == 2 and found["dtype"] == "float32"
    assert math.isclose(found["product_tflops_of_a_rank"], ceilings.PRODUCTS * 2 * 16**3 / 2.0 / 1e12)
    assert math.isclose(found["copy_gb_per_second_of_a_rank"], 2 * 4096 / 2.0 / 1e9)


def test_shares(kit: Kit) -> None:
    assert ceilings.share_of_products(kit, 0.25) == 0.25  # of two ranks
    assert ceilings.share_of_products(kit, 0.25, num_ranks=1) == 0.5
    assert ceilings.share_of_copy(kit, 2.0) == 0.25
    kit.ceilings = {}
    assert ceilings.share_of_products(kit, 0.25) is None and ceilings.share_of_copy(kit, 2.0) is None


def test_useful_speed_is_what_the_run_logged(kit: Kit) -> None:
    folder = kit.work / "run"
    folder.mkdir()
    steps = [(0.9, 9.0), (0.9, 9.0), (0.5, 1.0), (0.25, 3.0)]  # the first two warm up
    lines = [{"step": n, "mfu": mfu, "time/step": seconds} for n, (mfu, seconds) in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rank in range(2):
        (folder / f"observed-{rank}.json").write_text(json.dumps({"peak_flops": 1e12}))
    found = throughput.useful_speed(kit, folder)
    assert found == {"useful_tflops": (0.5 * 1 + 0.25 * 3) / 4 * 2, "share_of_ceiling": 0.3125 * 2}
    theirs = their_speed(kit, {**found, "pairs_per_second": 10.0}, 5.0)
    assert theirs == {"useful_tflops": 0.3125, "share_of_ceiling": 0.3125}


def test_the_page_shows_shares(report: dict[str, Any]) -> None:
    text = page(report)
    sections = {name: one["values"] for name, one in report["sections"].items()}
    for run in [*sections["throughput"]["prefix_sharing"].values(), *sections["trl"]["ours"].values()]:
        assert f" {run['useful_tflops']:.3g} | {run['share_of_ceiling']:.1%} |" in text
    for run in sections["variants"]["runs"]:
        assert f"| {run['variant']} | ok | {run['max_tokens']} | {run['num_parameters']:,} |" in text
    ceiling = sections["ceilings"]
    assert f"{ceiling['product_tflops_of_a_rank']:.3g} TFLOP/s |" in text
    assert f"{ceiling['copy_gb_per_second_of_a_rank']:.3g} GB/s |" in text
    exchanged = sections["bandwidth"]["sizes"][0]
    assert f"{exchanged['all_gather_gb_per_second']:.3g} | {exchanged['all_gather_share_of_copy']:.1%} |" in text
    kernel = sections["kernels"]["runs"][0]
    assert f"| 4 on 2 of 64 | none | sdpa | ok | {kernel['distance']['output']:.1e} |" in text
    assert "| 4 on 2 of 128 | 16 | flash_attn | skipped |  |  |" in text
    # Each table's rows have the columns of its head.
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in tables)


def test_without_ceilings_the_page_shows_rates_alone(report: dict[str, Any]) -> None:
    run = report["sections"]["throughput"]["values"]["prefix_sharing"]["on"]
    run["share_of_ceiling"] = None
    assert f" {run['useful_tflops']:.3g} |  | " in page(report)


def test_what_is_said_of_recomputation_is_so(kit: Kit) -> None:
    assert "activations recomputed" in SAME
    assert throughput.config_of(kit, "on")["model"]["gradient_checkpointing"] is True
    assert _settings(kit, 2)["gradient_checkpointing"] is True


# ---- variants


@pytest.fixture
def made(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is trained; what would have been is noted."""
    notes: list[Any] = []

    def write_model(kit: Kit) -> None:
        (kit.work / "model").mkdir(exist_ok=True)
        notes.append(("model", kit.sizes.model["hidden_size"]))

    def trained(kit: Kit, name: str, config: dict[str, Any]) -> dict[str, Any]:
        options = {key: config["model"].get(key) for key in ("torch_compile", "deterministic")}
        set_ = tuple(f"{key}={value}" for key, value in options.items() if value is not None)
        notes.append((name, config["model"]["gradient_checkpointing"], config["packing"]["max_tokens"], *set_))
        assert config["train"] | {"self_check": False, "max_steps": 4} == config["train"]
        return {"pairs_per_second": 1.0}

    monkeypatch.setattr(variants, "write_model", write_model)
    monkeypatch.setattr(variants, "write_pairs", lambda kit: None)
    monkeypatch.setattr(variants, "trained", trained)
    return notes


def test_each_variant_changes_one_thing(kit: Kit, made: list[Any]) -> None:
    found = section("variants", variants.variants, kit)
    runs = found["values"]["runs"]
    assert found["status"] == "ok"
    assert [run.get("reason") for run in runs] == [*[None] * 3, "needs a GPU, and the package liger_kernel", None, None]
    assert made == [
        ("model", 64), ("variant-1", False, 512), ("variant-2", True, 512, "torch_compile=True"),
        ("variant-3", True, 512, "deterministic=False"), ("variant-5", True, 2048), ("model", 96),
        ("variant-6", True, 512),
    ]  # fmt: skip


def test_a_package_that_is_there_is_measured(kit: Kit, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kit.environment, asked = {"gpus": [{"memory_gib": 80.0}]}, []
    monkeypatch.setattr(variants, "find_spec", lambda name: asked.append(name) or object())
    assert section("variants", variants.variants, kit)["values"]["runs"][3]["status"] == "ok"
    assert asked == ["liger_kernel"]


def test_what_time_does_not_allow_says_so(kit: Kit, made: list[Any]) -> None:
    kit.started = time.monotonic() - LIMIT_SECONDS + 20.5  # enough for those whose launches take 15 s
    runs = section("variants", variants.variants, kit)["values"]["runs"]
    assert [run["status"] for run in runs] == ["ok", "skipped", "ok", "skipped", "ok", "skipped"]
    assert [runs[place]["reason"] for place in (1, 5)] == [
        f"no time left: it takes about {seconds} s, and there are 20" for seconds in (75, 25)
    ]
    kit.started -= 30
    found = section("variants", variants.variants, kit)
    assert (
        found["status"] == "skipped"
        and found["reason"].count("no time left: it takes about 15 s, and there are 0") == 3
    )


@pytest.mark.parametrize(
    ("gib", "statuses"),
    [
        (139.7, "ok ok ok"),
        (79.1, "ok ok ok"),
        (44.5, "ok ok skipped"),
        (39.4, "skipped ok skipped"),
        (23.6, "ok ok skipped"),  # has the smaller model
    ],
)
def test_what_memory_does_not_allow_says_so(
    kit: Kit, made: list[Any], monkeypatch: pytest.MonkeyPatch, gib: float, statuses: str
) -> None:
    gpus = [{"memory_gib": gib}]
    kit.environment, kit.num_ranks, kit.sizes = {"gpus": gpus}, 1, sizes_for(gpus)
    monkeypatch.setattr(variants, "trained", lambda kit, name, config: {"pairs_per_second": 1.0})
    found = section("variants", variants.variants, kit)
    runs = found["values"]["runs"]
    kept, compiled, any_order, _liger, long, larger = (run["status"] for run in runs)
    assert found["status"] == compiled == any_order == "ok" and f"{kept} {long} {larger}" == statuses
    wanting = [run["reason"] for run in runs if run["status"] == "skipped" and run["variant"] != "Liger's kernels"]
    assert all(reason.endswith(f" GiB, and has {gib:.0f}") for reason in wanting)


def test_to_run_out_of_memory_is_an_answer_and_another_end_a_failure(
    kit: Kit, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Failed("x ended with exit code 1: error: out of memory; give it less")
    ends = iter([memory, Skipped("late"), Skipped("late"), Skipped("late"), Failed("no")])

    def trained(*arguments: Any) -> dict[str, Any]:
        raise next(ends)

    monkeypatch.setattr(variants, "trained", trained)
    found = section("variants", variants.variants, kit)
    assert [run["status"] for run in found["values"]["runs"]] == [*["skipped"] * 5, "failed"]
    assert (found["status"], found["reason"]) == ("failed", "353,952 parameters: no")


@pytest.mark.parametrize("sizes", [TINY, LARGE], ids=lambda sizes: sizes.name)
def test_the_number_of_parameters_is_the_models(sizes: Any) -> None:
    for model in (sizes.model, sizes.larger_model):
        with torch.device("meta"):
            built = LlamaForCausalLM(LlamaConfig(**model, tie_word_embeddings=True))
        assert variants.num_parameters(model) == sum(p.numel() for p in built.parameters())


def test_what_a_rank_needs(report: dict[str, Any]) -> None:
    kept, *_, long, larger = variants.variants_of(LARGE)
    states = 20 * variants.num_parameters(LARGE.model)
    # 1.2 billion parameters; a layer keeps 2 (10 x 2048 + 4 x 8192) bytes of each token, recomputed 2 x 2048.
    assert variants.needed_bytes(kept, 1) == states + 8192 * 16 * 106496
    assert variants.needed_bytes(long, 1) == states + 32768 * (16 * 4096 + 106496)
    assert variants.needed_bytes(kept, 8) == states / 8 + 8192 * 16 * 106496
    assert 62e9 < variants.needed_bytes(larger, 1) < 70e9
