"""What a run measures of itself while it trains, and what it is told where memory runs out."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dpo_dist import phases
from dpo_dist.cli import app
from dpo_dist.cli.ending import out_of_memory
from dpo_dist.cli.recomputing import Recomputation
from dpo_dist.cli.room import _sharding_more, ways_out
from dpo_dist.config import PackingConfig, load_deepspeed
from dpo_dist.engine import ActivationMemory
from dpo_dist.metrics import WALL_CLOCK
from dpo_dist.pace import PART_NAMES
from tests.golden.trajectories import FOLDER
from tests.launching import launch

CONFIG = (
    f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
    f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 9}}]}}\n"
    "train: {output_dir: out, examples_per_step: 3, max_steps: 4, learning_rate: 0.001, self_check: false}\n"
    "reference: {source: live}\n"
    "log: {report_to: []}\n"
    "parallel: {deepspeed: zero0_cpu}\n"
)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_DIST_TESTING", "1")
    yield tmp_path / "out"
    phases.arm("", 0)  # a planted fault must not outlive its test


def train(*overrides: str, code: int = 0, faults: str = "") -> str:
    result = CliRunner(env={"DPO_DIST_FAULT": faults}).invoke(app, ["train", "run.yaml", *overrides])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert not phases._listeners
    return result.output


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "split" not in line]


def verdicts(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("time of a step: ")]


@pytest.mark.parametrize("extra", [(), ("loss.loss_type=aot", "log.logging_steps=2")])
def test_parts_add_up_to_a_step(out: Path, extra: tuple[str, ...]) -> None:
    held_out = f"data.evaluation=[{{path: {FOLDER / 'pairs.jsonl'}, limit: 5}}]"
    said = train(held_out, "evaluation.eval_steps=1", "checkpoint.save_steps=2", "packing.max_tokens=150", *extra)
    lines = lines_of(out)
    assert [line["step"] for line in lines] == ([2, 4] if extra else [1, 2, 3, 4])
    for line in lines:
        assert set(WALL_CLOCK) <= line.keys()
        parts = {part: line[f"time/{part}"] for part in PART_NAMES}
        assert all(seconds > 0 for seconds in parts.values()), parts
        assert sum(parts.values()) <= line["time/step"]
        assert 0 < line["mfu"] < 1.2
    # What is no part: judging numbers, writing lines; a few milliseconds.
    rest = [line["time/step"] - sum(line[f"time/{part}"] for part in PART_NAMES) for line in lines]
    assert min(rest) < 0.1
    (verdict,) = verdicts(said)
    shares = [int(share) for share in re.findall(r"(\d+)%", verdict.partition(";")[0])]
    assert len(shares) == len(PART_NAMES) and 96 <= sum(shares) <= 104 and shares == sorted(shares, reverse=True)


def test_the_reference_of_an_adapter_is_its_own_part(out: Path) -> None:
    train("adapter.peft_type=lora", "reference.source=adapter_off", "train.max_steps=2")
    assert all(line["time/reference"] > 0 for line in lines_of(out))
    train("reference.source=none", "train.max_steps=1", "loss.loss_type=simpo", "train.output_dir=without")
    assert [line["time/reference"] for line in lines_of(out.with_name("without"))] == [0.0]


def test_a_resumed_run_counts_what_it_does_itself(out: Path) -> None:
    """The first line after a resume is of four steps, of which this process makes one."""
    settings = ("log.logging_steps=4", "checkpoint.save_steps=3")
    train(*settings, code=1, faults="error=1@0:4:forward")
    train(*settings, "train.output_dir=whole")
    (whole,) = lines_of(out.with_name("whole"))
    train(*settings, "checkpoint.resume=auto", faults="slow=0.5@0:4:forward")
    (line,) = lines_of(out)
    assert line["tokens_processed"] == whole["tokens_processed"]
    assert line["time/step"] > line["time/forward"] >= 0.5, "of one step, not of four"
    last = line["pairs_per_second"] * line["time/step"]
    assert last == pytest.approx(3), "pairs of one step"


def test_steps_that_are_left_out_took_their_time(out: Path) -> None:
    said = train("health.non_finite=skip", "log.logging_steps=2", faults="nan@0:2:backward,slow=0.2@0:2:forward")
    first, second = lines_of(out)
    assert first["skipped_steps"] == 1 and "skipped_steps" not in second
    assert first["time/forward"] >= 0.1 and first["pairs_per_second"] * first["time/step"] == pytest.approx(3)
    assert len(verdicts(said)) == 1


def test_a_run_that_is_stopped_before_its_first_line_has_a_verdict(out: Path) -> None:
    said = train("log.logging_steps=100", faults="term@0:2:forward")
    assert not (out / "metrics.jsonl").exists() and "stopped after step 2 of 4" in said
    assert len(verdicts(said)) == 1


def test_no_step_no_verdict(out: Path) -> None:
    train()
    assert not verdicts(train("checkpoint.resume=auto"))


def test_traces_of_the_steps_that_were_asked_for(out: Path) -> None:
    said = train("log.profile_steps=[2,4,9]")
    assert "log.profile_steps=9 has no effect: the run ends after 4 steps" in said.replace("\n", " ")
    found = sorted((out / "profile").iterdir())
    assert [path.name for path in found] == ["step-000002.json.gz", "step-000004.json.gz"]
    for path in found:
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert "aten::mm" in names
    assert not (out.with_name("none") / "profile").exists()


def test_a_recorded_step_of_two_ranks_tells_what_they_talk(out: Path) -> None:
    settings = ("parallel.deepspeed=zero3_cpu", "log.profile_steps=[2]", "train.max_steps=2")
    done = launch(2, "dpo_dist", "train", "run.yaml", *settings, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (step, all_of_it, alone) = map(
        float, re.findall(r"of its (\S+) s collectives took (\S+) \(.*, (\S+) of them", done.stdout + done.stderr)[0]
    )
    assert step > all_of_it >= alone > 0  # weights are gathered for the first layer: nothing to compute until then


def test_an_error_in_a_recorded_step(out: Path) -> None:
    said = train("log.profile_steps=[1]", code=1, faults="error=1@0:1:backward")
    assert not verdicts(said) and not (out / "profile").exists()
    assert not torch.autograd._profiler_enabled(), "it would slow whatever follows in this process"
    train("log.profile_steps=[1]", "train.output_dir=next")
    assert (out.with_name("next") / "profile" / "step-000001.json.gz").exists()


# ---- memory that runs out


def test_out_of_memory_names_what_would_have_fitted(out: Path) -> None:
    said = train(code=1, faults="memory@0:1:forward").splitlines()[-1]
    told = re.fullmatch(
        r"error: out of memory; lower packing\.max_tokens to (\d+) or, if it was the reference or an evaluation, "
        r"packing\.reference_max_tokens to (\d+), or set model\.gradient_checkpointing=true, which leaves room for "
        r"packing\.max_tokens=(\d+) \(planted\)",
        said,
    )
    assert told, said
    fewer, of_reference, recomputing_all = map(int, told.groups())
    assert fewer == of_reference < recomputing_all
    shown = train(
        f"packing.max_tokens={fewer}", f"packing.reference_max_tokens={of_reference}", "train.output_dir=fitting"
    )
    assert len(verdicts(shown)) == 1


def test_where_nothing_was_measured_the_advice_is_general(out: Path) -> None:
    said = train("model.gradient_checkpointing=false", code=1, faults="memory@0:1:forward").splitlines()[-1]
    assert said.startswith("error: out of memory; lower packing.max_tokens or packing.reference_max_tokens, set model.")


@pytest.mark.parametrize(
    "settings",
    [
        ("model.gradient_checkpointing=true",),
        ("adapter.peft_type=prefix_tuning", "adapter.num_virtual_tokens=3", "model.gradient_checkpointing=false"),
        ("adapter.peft_type=prefix_tuning", "adapter.num_virtual_tokens=3"),
    ],
)
def test_recomputation_is_not_advised_where_it_is_on_or_impossible(out: Path, settings: tuple[str, ...]) -> None:
    said = train(*settings, code=1, faults="memory@0:1:forward").splitlines()[-1]
    told = "lower packing.max_tokens or packing.reference_max_tokens, or take a DeepSpeed file that shards or offloads "
    assert said.startswith(f"error: out of memory; {told}") and "gradient_checkpointing" not in said


def test_where_the_configuration_is_unknown_the_advice_is_true_of_any() -> None:
    assert ", set model.gradient_checkpointing=true if it is not, or take a" in out_of_memory(MemoryError("planted"))


# A token keeps 10 bytes in each of 4 layers and 1 where a layer recomputes; one layer is whole at a time.
MEMORY = ActivationMemory(kept=10.0, recomputed=1.0, outside=0.0, num_layers=4, fixed=0.0)


@pytest.mark.parametrize(
    ("free", "count", "file", "told"),
    [
        # 50 bytes a token: 2000 tokens would fit 100 000 bytes by what was measured, and did not.
        (200_000, 0, "zero3", ["to 1700 ", "packing.reference_max_tokens to 1700", "max_tokens=6071", "speed=zero3"]),
        (200_000, 4, "zero3_offload", ["lower packing.max_tokens to 1700 ", "parallel.deepspeed=zero3_offload"]),
        (30_000, 0, "", ["lower packing.max_tokens to 510 ", "room for packing.max_tokens=1821"]),
        (
            5_000,
            0,
            "zero3",
            ["set model.", "=303, or set parallel.deepspeed=zero3, or set data.max_length: ", " 85 "],
        ),
        (500, 4, "", ["set data.max_length: the longest example has 120 tokens, and 30 fit"]),
    ],
)
def test_what_fits(free: int, count: int, file: str, told: list[str]) -> None:
    text = ways_out(Recomputation(count, 4, MEMORY, 2000, free), MEMORY, 120, PackingConfig(), file)
    assert all(one in text for one in told), text
    assert ("gradient_checkpointing" in text) == (count < 4)
    assert "deepspeed" in text if file else "deepspeed" not in text


@pytest.mark.parametrize(
    ("packing", "told"),
    [
        (PackingConfig(max_tokens=2000, reference_max_tokens=1000), "packing.reference_max_tokens to 850"),
        (PackingConfig(max_tokens=2000, reference_max_tokens=130), "lower packing.max_tokens to 1700"),
    ],
)
def test_a_reference_with_less_already(packing: PackingConfig, told: str) -> None:
    assert ways_out(Recomputation(4, 4, MEMORY, 2000, 200_000), MEMORY, 120, packing, "").endswith(told)


@pytest.mark.parametrize(
    ("own", "stage", "ranks", "file"),
    [
        ("zero0", 0, 2, "zero3"),
        ("zero1_cpu", 1, 2, "zero3_cpu"),
        ("zero2_bf16", 2, 8, "zero3_bf16"),
        ("zero3", 3, 8, "zero3_offload"),
        ("zero0", 0, 1, "zero3_offload"),
        ("zero3_cpu", 3, 8, ""),
        ("zero3_offload", 3, 8, ""),
        ("zero3_bf16", 3, 8, "zero3_offload_bf16"),
        ("zero0_bf16", 0, 1, "zero3_offload_bf16"),
        ("zero3_offload_bf16", 3, 8, ""),
    ],
)
def test_a_file_that_shards_more(own: str, stage: int, ranks: int, file: str) -> None:
    config = load_deepspeed(own)
    assert config["zero_optimization"]["stage"] == stage
    assert _sharding_more(own, config, ranks) == file
    assert not file or _sums(load_deepspeed(file)) >= _sums(config), "less precise than before"


def _sums(config: dict[str, Any]) -> set[tuple[str, Any]]:
    """How a file adds gradients up, where it says so."""
    return {(key, str(config[key])) for key in ("communication_data_type", "data_types") if key in config}


@pytest.mark.parametrize(
    ("more", "file"),
    [
        ({}, "zero3_offload"),
        ({"communication_data_type": "fp32"}, "zero3_offload_bf16"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "zero3_offload_bf16"),
        ({"communication_data_type": "bf16"}, "zero3_offload"),
    ],
)
def test_a_file_of_ones_own_goes_by_what_it_says(more: dict[str, Any], file: str) -> None:
    offloads_half = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert _sharding_more("mine.json", {"zero_optimization": offloads_half, **more}, 8) == file
    assert _sharding_more("mine.json", {"zero_optimization": {"stage": 1}, **more}, 8) == file.replace("_offload", "")
    offloads_all = offloads_half | {"offload_param": {"device": "nvme"}}
    assert _sharding_more("mine.json", {"zero_optimization": offloads_all, **more}, 8) == ""
