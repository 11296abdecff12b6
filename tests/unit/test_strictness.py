"""A key without effect is an error where the run is another one than it says, else a remark (decision 0015)."""

from pathlib import Path

import pytest

from dpo_dist.config import config_remarks, dump_resolved, load_config
from dpo_dist.errors import ConfigError

NO_REFERENCE = "reference.source=none"
ADAPTER_OFF = ["adapter.peft_type=lora", "reference.source=adapter_off"]
# What is set beside the key -> the key.
SAME_RESULT = [
    (["train.shuffle=false"], "train.seed=7"),
    ([], "model.trust_remote_code=true"),
    ([], "loss.loss_weights=[1.0]"),
    (["loss.loss_type=[ipo]"], "loss.loss_weights=[1.0]"),
    ([NO_REFERENCE], "reference.per_microbatch=true"),
    ([NO_REFERENCE], "reference.sharded=false"),
    (ADAPTER_OFF, "reference.sharded=false"),
    ([NO_REFERENCE], "reference.offload_param=true"),
    (ADAPTER_OFF, "reference.offload_param=true"),
    ([NO_REFERENCE], "reference.zero_hpz_partition_size=2"),
    (ADAPTER_OFF, "reference.zero_hpz_partition_size=2"),
    ([NO_REFERENCE], "reference.verify_rows=0"),
    (ADAPTER_OFF, "reference.verify_rows=0"),
    (["reference.source=live"], "reference.verify_rows=0"),
    (["loss.loss_type=simpo"], "health.max_kl=2.0"),
    (["loss.loss_type=simpo"], "health.max_displacement=1.0"),
    (["loss.loss_type=simpo"], "health.max_length_drift=1.0"),
    (["loss.loss_type=simpo"], "health.check_pairs=9"),
    ([], "health.max_accuracy_gap=0.5"),
    (["adapter.peft_type=adalora", "train.max_steps=500"], "checkpoint.async_save=true"),
]
OTHER_RUN = [
    (["train.max_steps=9"], "train.num_train_epochs=3"),
    ([], "data.truncation_mode=drop"),
    (["train.lr_scheduler_type=constant"], "train.warmup_steps=3"),
    ([], "model.revision=main"),
    ([], "loss.loss_weights=[0.5]"),
    ([], "loss.loss_weights=[1.0,1.0]"),
    ([], "loss.simpo_gamma=1"),
    ([], "loss.f_alpha_divergence_coef=0.3"),
    (["loss.loss_type=sft"], "data.pairing=adjacent"),
    (["loss.loss_type=sft"], "data.group_by_prompt=true"),
    ([], "adapter.lora_r=8"),
    (["adapter.adapter_name_or_path=x"], "adapter.peft_type=lora"),
    (["adapter.peft_type=lora"], "adapter.use_bnb_nested_quant=true"),
    ([NO_REFERENCE], "model.reference_name_or_path=x"),
    (ADAPTER_OFF, "model.reference_name_or_path=x"),
    ([NO_REFERENCE], "reference.dtype=float32"),
    (["reference.source=live"], "reference.cache_dir=x"),
    (["reference.source=live"], "reference.store_token_logps=true"),
    (["reference.source=cache"], "reference.per_microbatch=true"),
    (ADAPTER_OFF, "reference.per_microbatch=true"),
    (["reference.source=cache"], "reference.sync_ref_model=true"),
    ([], "reference.ref_model_sync_steps=3"),
    ([], "health.max_skipped_steps=5"),
    ([], "evaluation.eval_steps=5"),
    ([], "evaluation.metric_for_best_model=loss"),
    ([], "evaluation.load_best_model_at_end=true"),
    ([], "evaluation.early_stopping_threshold=0.1"),
    (["loss.loss_type=simpo"], "health.action=stop"),
    (["health.action=stop"], "health.max_accuracy_gap=0.5"),
]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A configuration without a mistake."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model_name_or_path: demo}\ndata: {train: [{path: some/data}]}\ntrain: {output_dir: runs/x}\n"
    )
    return path


@pytest.mark.parametrize(("beside", "key"), SAME_RESULT)
def test_where_the_result_is_the_same(minimal: Path, beside: list[str], key: str) -> None:
    config = load_config(minimal, [*beside, key])
    (remark,) = config_remarks(config)
    assert remark.startswith(f"{key} has no effect")
    assert "; " in remark


@pytest.mark.parametrize(("beside", "key"), SAME_RESULT)
def test_the_resolved_configuration_has_no_such_key(minimal: Path, beside: list[str], key: str) -> None:
    again = minimal.with_name("config.yaml")
    again.write_text(dump_resolved(load_config(minimal, [*beside, key])))
    config = load_config(again)
    assert config == load_config(minimal, beside)
    assert config_remarks(config) == []


@pytest.mark.parametrize(("beside", "key"), OTHER_RUN)
def test_where_the_run_is_another_one(minimal: Path, beside: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [*beside, key])
    name = key.split("=")[0]
    assert any(name in line and "has no effect" in line for line in str(caught.value).splitlines())


def test_the_seed_of_a_new_adapter_has_an_effect(minimal: Path) -> None:
    """Its first values are random, in whatever order the examples come."""
    config = load_config(minimal, ["train.shuffle=false", "train.seed=7", "adapter.peft_type=lora"])
    assert config_remarks(config) == []
    assert "seed: 7" in dump_resolved(config)


def test_what_equals_its_default_is_not_set(minimal: Path) -> None:
    assert config_remarks(load_config(minimal, ["train.shuffle=false", "train.seed=42"])) == []


def test_a_deepspeed_file_that_tunes_another_stage(minimal: Path) -> None:
    file = minimal.with_name("ds.json")
    file.write_text('{"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 5}}')
    assert config_remarks(load_config(minimal, [f"parallel.deepspeed={file}"])) == [
        f"parallel.deepspeed={file}: zero_optimization.stage3_prefetch_bucket_size=5 has no effect at ZeRO stage 2; it "
        "needs stage 3, or leave it out"
    ]


def test_steps_are_not_left_out_where_ranks_are_taken_away(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"health\.non_finite=skip does not go with adapter\.peft_type=adalora"):
        load_config(str(minimal), ["health.non_finite=skip", "adapter.peft_type=adalora", "train.max_steps=500"])
