"""DeepSpeed files hold only what is DeepSpeed's, hold nothing DeepSpeed would ignore, and do what their README says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config import RunConfig, load_deepspeed
from dpo_dist.config.deepspeed import deepspeed_remarks
from dpo_dist.config.deepspeed_keys import BF16, DTYPES, FILE, FP16, ZERO, Allowed
from dpo_dist.config.files import names
from dpo_dist.config.messages import KEYS
from dpo_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "deepspeed_configs").glob("*.json"))
EXPECTED = [f"zero{stage}{kind}" for stage in range(4) for kind in ("", "_bf16", "_cpu")]
EXPECTED += ["zero3_offload", "zero3_offload_bf16"]


def problems_of(tmp_path: Path, content: Any) -> list[str]:
    """The lines of the error for a file, each without the file's name."""
    path = tmp_path / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_deepspeed(str(path))
    lines = str(caught.value).splitlines()
    assert all(str(path) in line for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def with_stage(stage: int = 3, **more: Any) -> dict[str, Any]:
    """A sound file, and what is to be tested."""
    zero = {"stage": stage, **more.pop("zero", {})}
    return {"zero_optimization": zero, **more}


# ---- what is refused


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("optimizer", {"type": "Adam"}, "train.learning_rate"),
        ("scheduler", {"type": "WarmupLR"}, "train.lr_scheduler_type"),
        ("train_batch_size", 8, "train.examples_per_step"),
        ("train_micro_batch_size_per_gpu", 1, "packing.max_tokens"),
        ("gradient_accumulation_steps", 4, "train.examples_per_step"),
        ("gradient_clipping", 1.0, "train.max_grad_norm"),
        ("activation_checkpointing", {}, "model.gradient_checkpointing"),
        ("zero_allow_untested_optimizer", True, "the optimizer is AdamW"),
        ("steps_per_print", 10, "log.logging_steps"),
        ("wandb", {"enabled": True}, "log.report_to"),
        ("torch_autocast", {"enabled": True}, "model.dtype"),
        ("bfloat16", {"enabled": True}, "model.dtype"),
        ("gradient_allreduce_op", "sum", "how gradients are averaged is fixed"),
        ("checkpoint", {}, "checkpoints are saved and loaded by dpo_dist"),
        ("elasticity", {}, "DeepSpeed 0.19.8 has removed it"),
    ],
)
def test_what_is_ours_is_refused_with_its_owner(tmp_path, key, value, owner):
    (line,) = problems_of(tmp_path, with_stage(**{key: value}))
    assert line.startswith(key) and "is not set in a DeepSpeed file; " in line and owner in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "zero_optimization.stage is missing; set it to 0, 1, 2 or 3"),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing"),
        (with_stage(4), "zero_optimization.stage=4 is not a stage"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true is not a stage"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage=auto is not a stage"),
        ({"zero_optimization": True}, "zero_optimization=true is not an object"),
        (
            with_stage(bf16={"enabled": True}),
            "bf16.enabled=true is not set in a DeepSpeed file; the dtype is model.dtype",
        ),
        (with_stage(fp16={"enabled": False}), "fp16.enabled=false is not set in a DeepSpeed file"),
        (with_stage(bf16={"bf16_optimizer_states": True}), "float32 always"),
        (with_stage(bf16=True), "bf16=true is not an object"),
        (with_stage(bf16={"loss_scale": 1}), "bf16.loss_scale=1 is not a key in bf16"),
        (with_stage(comunication_data_type="fp32"), "did you mean communication_data_type?"),
        (with_stage(zzz=1), "zzz=1 is not a key of DeepSpeed 0.19.8; there are zero_optimization, bf16"),
        ({**with_stage(), "zero_optimization.overlap_comm": True}, "is one dotted key, which DeepSpeed ignores"),
        (with_stage(zero={"reduce_buket_size": 5}), "did you mean zero_optimization.reduce_bucket_size?"),
        (with_stage(zero={"prefetch_bucket_size": 5}), "did you mean zero_optimization.stage3_prefetch_bucket_size?"),
        (with_stage(zero={"max_live_parameters": 5}), "did you mean zero_optimization.stage3_max_live_parameters?"),
        (
            with_stage(zero={"reduce_bucket_size": "auto"}),
            "bucket_size=auto is only filled in by other programs",
        ),
        (with_stage(zero={"reduce_bucket_size": -1}), "reduce_bucket_size=-1 is not a whole number from 0"),
        (with_stage(zero={"reduce_bucket_size": 1.5}), "reduce_bucket_size=1.5 is not a whole number from 0"),
        (with_stage(zero={"overlap_comm": 1}), "overlap_comm=1 is neither true nor false; write one of them"),
        (with_stage(zero={"cpu_offload": True}), "the name is zero_optimization.offload_optimizer"),
        (with_stage(zero={"allgather_partitions": True}), "never reads it"),
        (with_stage(zero={"mics_shard_size": 8}), "has removed it"),
        (with_stage(zero={"stage3_gather_16bit_weights_on_model_save": True}), "written to model/ without it"),
        (with_stage(2, zero={"offload_param": {"device": "cpu"}}), "offload_param has no effect at ZeRO stage 2"),
        (
            with_stage(0, zero={"offload_optimizer": {"device": "cpu"}}),
            "offload_optimizer has no effect at ZeRO stage 0",
        ),
        (with_stage(2, zero={"stage3_max_live_parameters": 1}), "has no effect at ZeRO stage 2; it needs stage 3"),
        (with_stage(2, zero={"zero_quantized_gradients": True}), "has no effect at ZeRO stage 2; it needs stage 3"),
        (with_stage(zero={"offload_param": {"device": "none"}}), "offload_param.device=none offloads nothing"),
        (with_stage(zero={"offload_param": {}}), "offload_param.device is missing; write cpu or nvme"),
        (with_stage(zero={"offload_param": {"device": "nvme"}}), "nvme_path goes with device nvme"),
        (with_stage(zero={"offload_param": {"device": "cpu", "nvme_path": "/x"}}), "nvme_path goes with device nvme"),
        (with_stage(zero={"leaf_module": {"classes": "X"}}), "leaf_module.classes=X is not a list of strings"),
        (with_stage(communication_data_type="float32"), "is not a number format; write one of fp32, bf16, fp16"),
        (
            with_stage(0, data_types={"grad_accum_dtype": "fp32"}),
            "grad_accum_dtype is refused by DeepSpeed at ZeRO stage 0",
        ),
        (with_stage(data_types={"param_dtype": "bf16"}), "the dtype is model.dtype"),
        ('{"zero_optimization": {"stage": 3,}}', ":1: not valid JSON"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "stage stands twice"),
        ('{"zero_optimization": {"stage": NaN}}', "NaN is not a JSON number"),
        ('{"zero_optimization": {"stage": 3, "sub_group_size": 1e999}}', "is not a whole number"),
        ("[]", "holds no JSON object"),
        ("", "not valid JSON"),
    ],
)
def test_faulty_files(tmp_path, content, expected):
    (line,) = problems_of(tmp_path, content)
    assert expected in line


@pytest.mark.parametrize(
    ("content", "key", "stages"),
    [
        (
            with_stage(3, zero={"allgather_bucket_size": 1}),
            "zero_optimization.allgather_bucket_size=1",
            "3; it needs stage 1 or 2",
        ),
        (
            with_stage(0, zero={"reduce_bucket_size": 1}),
            "zero_optimization.reduce_bucket_size=1",
            "0; it needs stage 1 or 2 or 3",
        ),
        (
            with_stage(2, zero={"stage3_prefetch_bucket_size": 1}),
            "zero_optimization.stage3_prefetch_bucket_size=1",
            "2; it needs stage 3",
        ),
        (with_stage(2, aio={"queue_depth": 8}), "aio", "2; it needs stage 3"),
    ],
)
def test_what_tunes_another_stage_is_remarked_on_and_left_out(tmp_path, content, key, stages):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert deepspeed_remarks(str(path)) == [f"{key} has no effect at ZeRO stage {stages}, or leave it out"]
    stage = content["zero_optimization"]["stage"]
    assert load_deepspeed(str(path)) == {"zero_optimization": {"stage": stage}}


def test_a_shipped_file_has_nothing_to_remark_on():
    for name in names("deepspeed_configs"):
        assert deepspeed_remarks(name) == []


def test_all_errors_of_a_file_at_once(tmp_path):
    content = with_stage(optimizer={}, zzz=1, zero={"overlap_comm": "auto", "reduce_bucket_size": -1})
    lines = problems_of(tmp_path, content)
    assert [line.split("=")[0].split(" ")[0] for line in lines] == [
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "optimizer",
        "zzz",
    ]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"parallel.deepspeed=zero_3 is not a shipped file; did you mean zero3\?"):
        load_deepspeed("zero_3")
    with pytest.raises(ConfigError, match=r"is not a shipped file; write one of zero0, .*or the path of a .json file"):
        load_deepspeed("qqq")
    with pytest.raises(ConfigError, match=r"gone.json cannot be read \(No such file or directory\); give a JSON file"):
        load_deepspeed(str(tmp_path / "gone.json"))


def test_a_sound_file_comes_back_as_it_is(tmp_path):
    content = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "offload_param": {"device": "nvme", "nvme_path": "/local", "pin_memory": True},
            "leaf_module": {"names": ["experts"]},
        },
        "bf16": {"immediate_grad_update": False},
        "aio": {"queue_depth": 16},
        "wall_clock_breakdown": True,
    }
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_deepspeed(str(path)) == content


def test_an_update_that_is_not_finite_cannot_be_asked_for(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"bf16": {"check_grad_overflow": False}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"an update that is not finite is never made \(health.non_finite\)"):
        load_deepspeed(str(path))


def test_owners_named_in_refusals_are_keys_that_exist():
    def refusals(table: dict[str, Allowed | str]) -> list[str]:
        below = [rule.below for rule in table.values() if isinstance(rule, Allowed) and rule.below]
        return [rule for rule in table.values() if isinstance(rule, str)] + [
            text for t in below for text in refusals(t)
        ]

    named = {match for text in refusals(FILE) for match in re.findall(rf"\b({'|'.join(KEYS)})\.(\w+)", text)}
    assert len(named - {("metrics", "jsonl")}) > 8
    for section, key in named:
        assert key in KEYS[section]


# ---- the lists are DeepSpeed's


def fields_of(model: Any) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_lists_name_every_key_of_the_installed_deepspeed():
    from deepspeed.runtime import config as runtime_config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    removed = set(runtime_config._REMOVED_ZERO_CONFIG_KEYS)
    assert ZERO.keys() == fields_of(DeepSpeedZeroConfig) | removed
    assert BF16.keys() == fields_of(DeepSpeedBF16Config)
    assert FP16.keys() == fields_of(DeepSpeedFP16Config)
    for key, model in (
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("leaf_module", DeepSpeedZeroLeafModuleConfig),
    ):
        rule = ZERO[key]
        assert isinstance(rule, Allowed) and rule.below is not None
        assert rule.below.keys() == fields_of(model)
    assert set(runtime_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= FILE.keys()
    for key, rule in FILE.items():
        if isinstance(rule, Allowed):
            constants = {value for value in vars(runtime_config).values() if isinstance(value, str)}
            assert key in constants or key in {"zero_optimization", "bf16", "fp16", "aio", "comms_logger"}, key


def test_kinds_of_values_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = {bool: "flag", int: "count"}
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        rule = ZERO[field.alias or name]
        if isinstance(rule, Allowed) and field.annotation in kinds:
            assert rule.kind == kinds[field.annotation], name


# ---- the shipped files


def test_every_shipped_file_is_known_and_explained():
    assert sorted(EXPECTED) == SHIPPED
    readme = (ROOT / "deepspeed_configs" / "README.md").read_text(encoding="utf-8")
    for name in SHIPPED:
        zero = load_deepspeed(name)["zero_optimization"]
        assert zero["stage"] == int(name[4])
        assert all(f"`{key}`" in readme for key in zero if key not in {"stage", "offload_param", "offload_optimizer"})
    assert RunConfig.model_fields["parallel"].get_default().deepspeed in SHIPPED


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("_bf16")])
def test_a_file_for_bf16_is_the_plain_one_with_sums_in_float32(name):
    plain, added = load_deepspeed(name.removesuffix("_bf16")), load_deepspeed(name)
    sums = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    if name == "zero0_bf16":  # DeepSpeed refuses to accumulate in float32 there
        del sums["data_types"]
    assert added == plain | sums


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_reads_every_value_of_a_shipped_file(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    content = load_deepspeed(name)
    parsed = DeepSpeedConfig({**content, "train_micro_batch_size_per_gpu": 1})
    zero = parsed.zero_config.model_dump(by_alias=True)
    for key, value in content["zero_optimization"].items():
        if isinstance(value, dict):
            assert {inner: zero[key][inner] for inner in value} == value
        else:
            assert zero[key] == value, key
    assert parsed.communication_data_type == (torch.float32 if name.endswith("_bf16") else None)
    assert parsed.grad_accum_dtype == ("fp32" if name.endswith("_bf16") and name != "zero0_bf16" else None)
    assert set(DTYPES) >= {content.get("communication_data_type", "fp32")}
