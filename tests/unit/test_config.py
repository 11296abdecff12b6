"""A configuration is read strictly: every mistake is an error, all errors come at once, and nothing is ignored."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import dpo_dist.config as config_package
from dpo_dist.config import (
    LOSS_TYPES,
    DataConfig,
    DataSource,
    LossConfig,
    RunConfig,
    config_remarks,
    dump_resolved,
    json_schema,
    load_config,
    package_file,
)
from dpo_dist.config.foreign import FOREIGN_ALSO, FOREIGN_KEYS, FOREIGN_VALUES, FOREIGN_WITHIN
from dpo_dist.config.messages import KEYS, SECTION_OF
from dpo_dist.config.rules import broken_rules, keys_without_effect
from dpo_dist.config.yaml_lines import YamlError, dump, parse
from dpo_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
MINIMAL = """\
model: {model_name_or_path: demo}
data: {train: [{path: some/data}]}
train: {output_dir: runs/x}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a configuration into an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def writer(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return Path(name)

    return writer


@pytest.fixture
def minimal(write):
    return write(MINIMAL)


def errors_of(path: Path, *overrides: str) -> list[str]:
    """Every line of the error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def only_error(path: Path, *overrides: str) -> str:
    lines = errors_of(path, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


# ---- values


def test_defaults_of_a_minimal_file(minimal):
    config = load_config(minimal)
    assert config == RunConfig.model_validate(
        {
            "model": {"model_name_or_path": "demo"},
            "data": {"train": [{"path": "some/data"}]},
            "train": {"output_dir": "runs/x"},
        }
    )
    assert (config.train.learning_rate, config.loss.beta, config.packing.max_tokens) == (1e-6, 0.1, 8192)
    assert (config.parallel.deepspeed, config.checkpoint.resume, config.log.report_to) == (
        "zero3_bf16",
        "never",
        ["tensorboard"],
    )


def test_configuration_is_frozen(minimal):
    with pytest.raises(ValidationError):
        load_config(minimal).loss.beta = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("written", ["5e-7", "5.0e-7", "'5e-7'", "+5E-7", "0.0000005"])
def test_numbers_in_every_notation(minimal, written):
    assert load_config(minimal, [f"train.learning_rate={written}"]).train.learning_rate == 5e-7


@pytest.mark.parametrize("written", ["1000", "1e3", "1000.0", "'1000'"])
def test_integral_numbers_are_whole(minimal, written):
    assert load_config(minimal, [f"checkpoint.save_steps={written}"]).checkpoint.save_steps == 1000


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_on_and_off_are_words_not_truth_values(minimal, word):
    assert load_config(minimal, [f"model.prefix_sharing={word}"]).model.prefix_sharing == word


@pytest.mark.parametrize(
    ("override", "wrong", "right"),
    [
        ("train.learning_rate=0", "train.learning_rate=0 is out of range", "must be > 0"),
        ("train.learning_rate=.inf", "train.learning_rate=Infinity is not finite", "write a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate=NaN is not finite", "write a finite number"),
        ("train.learning_rate=fast", "train.learning_rate=fast is not a number", "write one"),
        ("train.learning_rate=true", "train.learning_rate=true is true or false, not a number", "write a number"),
        ("train.adam_beta1=1", "train.adam_beta1=1 is out of range", "must be < 1"),
        ("train.adam_beta2=-0.1", "train.adam_beta2=-0.1 is out of range", "must be >= 0"),
        ("train.adam_epsilon=0", "train.adam_epsilon=0 is out of range", "must be > 0"),
        ("train.max_grad_norm=0", "train.max_grad_norm=0 is out of range", "must be > 0"),
        ("train.weight_decay=-1", "train.weight_decay=-1 is out of range", "must be >= 0"),
        ("train.examples_per_step=0", "train.examples_per_step=0 is out of range", "must be >= 1"),
        ("train.examples_per_step=2.5", "train.examples_per_step=2.5 is not a whole number", "write one"),
        (
            "train.examples_per_step=true",
            "train.examples_per_step=true is true or false, not a number",
            "write a number",
        ),
        ("train.max_steps=true", "train.max_steps=true is true or false, not a number", "write a number"),
        ("train.max_steps=0", "train.max_steps=0 is out of range", "must be >= 1"),
        ("train.num_train_epochs=0", "train.num_train_epochs=0 is out of range", "must be > 0"),
        ("train.warmup_steps=-1", "train.warmup_steps=-1 is out of range", "must be >= 0"),
        (
            "train.warmup_steps=1.5",
            "train.warmup_steps=1.5 is neither a number of steps nor a share",
            "between 0 and 1",
        ),
        ("train.seed=-1", "train.seed=-1 is out of range", "must be >= 0"),
        ("train.shuffle=no", "train.shuffle=no is neither true nor false", "write one of them"),
        ("train.shuffle='true'", "train.shuffle=true is neither true nor false", "write one of them"),
        ("train.shuffle=1", "train.shuffle=1 is neither true nor false", "write one of them"),
        ("train.output_dir=' '", 'train.output_dir=" " is empty', "write a name or path"),
        ("train.output_dir=7", "train.output_dir=7 is not text", "in quotes"),
        ("loss.beta=0", "loss.beta=0 is out of range", "must be > 0"),
        ("loss.label_smoothing=0.5", "loss.label_smoothing=0.5 is out of range", "must be < 0.5"),
        ("loss.loss_type=sigmiod", "loss.loss_type=sigmiod is not known", "must be 'sigmoid', 'hinge'"),
        ("loss.loss_type=sigmiod", "loss.loss_type=sigmiod is not known", "a list in brackets (did you mean sigmoid?)"),
        ("loss.loss_type=dpo", "loss.loss_type=dpo is not known", "(did you mean sigmoid?)"),
        ("loss.loss_type=[hing]", "loss.loss_type.0=hing is not known", "(did you mean hinge?)"),
        ("loss.loss_type=[dpo]", "loss.loss_type.0=dpo is not known", "(did you mean sigmoid?)"),
        ("loss.loss_type=[]", "loss.loss_type=[] is empty", "give at least one element"),
        ("loss.loss_type=3", "loss.loss_type=3 is not known", "a list in brackets"),
        ("adapter.lora_target_modules=q_proj", "adapter.lora_target_modules=q_proj is not known", "a list in brackets"),
        ("adapter.lora_target_modules=[3]", "adapter.lora_target_modules.0=3 is not text", "write text"),
        ("loss.discopop_tau=0", "loss.discopop_tau=0 is out of range", "must be > 0"),
        ("model.dtype=int8", "model.dtype=int8 is not known", "'bfloat16', 'float32' or 'float16'"),
        ("model.dtype=torch.half", "model.dtype=torch.half is not known", "(did you mean float16?)"),
        ("model.prefix_sharing=true", "model.prefix_sharing=true is not known", "(did you mean on?)"),
        ("train.lr_scheduler_type=cosin", "cosin is not known", "(did you mean cosine?)"),
        ("train.lr_scheduler_type=constant_warmup", "is not known", "(did you mean constant_with_warmup?)"),
        ("model.attn_implementation=flash_atn", "flash_atn is not known", "(did you mean flash_attn?)"),
        ("packing.max_tokens=0", "packing.max_tokens=0 is out of range", "must be >= 1"),
        ("packing.reference_max_tokens=0", "packing.reference_max_tokens=0 is out of range", "must be >= 1"),
        ("checkpoint.save_steps=-1", "checkpoint.save_steps=-1 is out of range", "must be >= 0"),
        ("checkpoint.save_total_limit=0", "checkpoint.save_total_limit=0 is out of range", "must be >= 1"),
        ("checkpoint.resume=true", "checkpoint.resume=true is not text", "write text"),
        ("log.logging_steps=0", "log.logging_steps=0 is out of range", "must be >= 1"),
        ("log.report_to=wandb", "log.report_to=wandb is not a list", "write it in brackets, [] for none"),
        ("log.report_to=[wanb]", "log.report_to.0=wanb is not known", "(did you mean wandb?)"),
        ("log.report_to=[wandb, wandb]", "names a tracker twice", "name each once"),
        ("data.train=[]", "data.train=[] is empty", "give at least one element"),
        ("data.train=x.jsonl", "data.train=x.jsonl is not a list of data sets", "write [{path: x.jsonl}]"),
        ("data.train='x, y'", "data.train=x, y is not a list of data sets", 'write [{path: "x, y"}]'),
        ("data.evaluation={path: x}", 'data.evaluation={"path": "x"} is not a list of data sets', "write [{path: ..."),
        ("data.train=[x.jsonl]", "data.train.0=x.jsonl is not a mapping", "write {path: x.jsonl}"),
        ("data.train.0.columns=x", "data.train.0.columns=x is not a mapping", "write {prompt: question}: columns as"),
        ("data.train.0.columns=[x]", "is not a mapping", "write {prompt: question}: columns as"),
        ("data.train.0.columns.prompt=[x]", "data.train.0.columns.prompt=", "write text"),
        ("data.train.0.fraction=0", "data.train.0.fraction=0 is out of range", "it must be > 0"),
        ("data.train.0.fraction=2", "data.train.0.fraction=2 is out of range", "it must be <= 1"),
        ("data.train.0.fraction=half", "data.train.0.fraction=half is not a number", "write one"),
        ("data.train=[3]", "data.train.0=3 is not a mapping", "keys path, name, revision, columns, split"),
        ("data.train.0.limit=0", "data.train.0.limit=0 is out of range", "must be >= 1"),
        ("data.max_length=1", "data.max_length=1 is out of range", "must be >= 2"),
        ("loss=3", "loss=3 is not a mapping", "keys loss_type, loss_weights, beta, label_smoothing"),
    ],
)
def test_wrong_values(minimal, override, wrong, right):
    line = only_error(minimal, override)
    assert line.startswith("command line: ")
    assert wrong in line.split("; ")[0]
    assert right in line.split("; ", 1)[1]


# What else has to be set where a word is used.
WORDS_NEED = {
    "adapter_off": ["adapter.peft_type=lora"],
    "constant_with_warmup": ["train.warmup_steps=0.1"],
}


@pytest.mark.parametrize(
    ("option", "word", "meant"),
    [(key, word, meant) for key, words in FOREIGN_VALUES.items() for word, meant in words.items()],
)
def test_words_of_other_systems_are_refused_with_ours(minimal, option, word, meant):
    also = f" with {FOREIGN_ALSO[word]}" if word in FOREIGN_ALSO else ""
    assert f"(did you mean {meant}{also}?)" in only_error(minimal, f"{option}={word}")
    needs = WORDS_NEED.get(meant, ())
    load_config(minimal, [f"{option}={meant}", *needs])


@pytest.mark.parametrize(
    ("key", "value", "is_secret"),
    [
        ("packing.max_token", "512", False),
        ("model.pad_token", "x", False),
        ("model.max_tokens_", "x", False),
        ("model.tokenizer", "x", False),
        ("hf_token", "x", True),
        ("train.auth_token", "x", True),
        ("token", "x", True),
        ("model.HUB_TOKEN", "x", True),
        ("train.wandb_api_key", "x", True),
        ("train.db_password", "x", True),
        ("log.client_secret", "x", True),
        ("log.wandb", "0123456789abcdef0123" * 2, True),
        ("model.model_revision", "0123456789abcdef0123" * 2, False),
        ("log.hub", "hf_" + "aZ09" * 9, True),
        ("log.hub", "hf_short", False),
    ],
)
def test_values_that_may_be_secrets_are_not_shown(minimal, key, value, is_secret):
    line = only_error(minimal, f"{key}={value}")
    assert (f"{key}=(not shown) is" in line) == is_secret
    assert (value in line.split(" is ")[0]) != is_secret


# ---- keys


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("loss.bta=1", "loss.bta=1 is not a key in section loss; did you mean loss.beta?"),
        ("los.beta=1", "command line: los is not a key at top level; did you mean loss?"),
        ("trian.max_steps=3", "command line: trian is not a key at top level; did you mean train?"),
        ("zzz.max_steps=3", "command line: zzz is not a key at top level; there are model,"),
        ("loss.bta.gamma=1", "command line: loss.bta is not a key in section loss; did you mean loss.beta?"),
        ("loss.bta=null", "command line: loss.bta=null is not a key in section loss; did you mean loss.beta?"),
        ("data.evaluation.0.limit=1", "command line: data.evaluation.0.path is missing"),
        ("reference.model=x", "the name here is model.reference_name_or_path"),
        ("data.path=x", "the name here is data.train: a list"),
        ("loss.learning_rate=1", "loss.learning_rate=1 is not a key in section loss; write train.learning_rate"),
        ("beta=1", "beta=1 is not a key at top level; write loss.beta"),
        ("loss.output_dir=x", "loss.output_dir=x is not a key in section loss; write train.output_dir"),
        ("evaluation.train=x", "evaluation.train=x is not a key in section evaluation; write data.train"),
        ("deepspeed=x.json", "deepspeed=x.json is not a key at top level; write parallel.deepspeed"),
        ("log.learnin_rate=1", "did you mean train.learning_rate?"),
        ("loss.zzz=1", "there are loss_type, loss_weights, beta, label_smoothing"),
        ("zzz=1", "there are model, adapter, data, loss,"),
        ("data.train.0.splt=x", "data.train.0.splt=x is not a key of a data set; did you mean split?"),
        ("data.train.0.field=x", "columns are recognised; columns gives other names"),
        ("data.train.0.weight=2", "the name here is fraction"),
        ("data.train.0.zzz=x", "there are path, name, revision, columns, split, limit"),
        ("hub_token=hf_abc", "hub_token=(not shown) is not a key"),
        ("train.wandb_api_key=abc", "train.wandb_api_key=(not shown) is not a key"),
    ],
)
def test_unknown_keys(minimal, override, fragment):
    assert fragment in only_error(minimal, override)


@pytest.mark.parametrize("section", ["", "train.", "model."])
@pytest.mark.parametrize(
    ("key", "name_here"),
    [
        ("per_device_train_batch_size", "train.examples_per_step"),
        ("gradient_accumulation_steps", "packing.max_tokens"),
        ("micro_batch_size", "packing.max_tokens"),
        ("padding_free", "packing.max_tokens"),
        ("max_prompt_length", "data.max_length"),
        ("sequence_len", "data.max_length"),
        ("rpo_alpha", "add the loss `sft`: loss.loss_type=[sigmoid, sft]"),
        ("torch_dtype", "model.dtype"),
        ("bf16", "model.dtype"),
        ("fp16", "model.dtype"),
        ("warmup_ratio", "train.warmup_steps"),
        ("dataset_name", "data.train"),
        ("ref_model", "model.reference_name_or_path"),
        ("reference_model", "model.reference_name_or_path"),
        ("model_path", "model.model_name_or_path"),
        ("tokenizer", "model.tokenizer_name_or_path"),
        ("precompute_ref_log_probs", "reference.source"),
        ("pref_beta", "loss.beta"),
        ("rl_beta", "loss.beta"),
        ("dpo_beta", "loss.beta"),
        ("base_model", "model.model_name_or_path"),
        ("resume_from_checkpoint", "checkpoint.resume"),
        ("eval_strategy", "evaluation.eval_steps"),
        ("load_in_8bit", "adapter.load_in_4bit"),
        ("use_peft", "adapter.peft_type"),
        ("lora_rank", "adapter.lora_r"),
        ("lora_dropout", "dropout is always off"),
        ("ref_adapter_name", "adapter.adapter_name_or_path"),
        ("reference_free", "reference.source"),
    ],
)
def test_names_of_other_systems_are_refused_with_ours(minimal, section, key, name_here):
    line = only_error(minimal, f"{section}{key}=1")
    assert f"{section}{key}=1 is not a key" in line and name_here in line


def test_foreign_names_are_foreign_and_point_at_keys_that_exist():
    assert not FOREIGN_KEYS.keys() & SECTION_OF.keys()
    within = [(key, advice) for keys in FOREIGN_WITHIN.values() for key, advice in keys.items()]
    for key, advice in [*FOREIGN_KEYS.items(), *within]:
        for section, name in re.findall(r"\b(" + "|".join(KEYS) + r")\.([a-z_0-9]+)", advice):
            assert name in KEYS[section], (key, advice)


@pytest.mark.parametrize("key", ["reference", "ref_model", "reference_model", "ref"])
def test_names_one_may_try_for_the_reference(minimal, key):
    assert f"model.{key}=x is not a key in section model; the name here is model.reference_name_or_path" in only_error(
        minimal, f"model.{key}=x"
    )


@pytest.mark.parametrize("key", ["model", "name", "path", "name_or_path", "model_name", "model_path"])
def test_names_one_may_try_for_the_policy(minimal, key):
    assert f"model.{key}=x is not a key in section model; the name here is model.model_name_or_path" in only_error(
        minimal, f"model.{key}=x"
    )


# ---- the file


def test_all_errors_at_once_each_with_its_line_one_for_each_path(write):
    path = write("""\
        model:
          dtype: float31
        data:
          train:
            - path: x
              spilt: test
          max_length: 10
          max_length: 12
        los: {beta: 1}
        loss:
          bta: 0.1
          beta: -1
        train:
          max_steps: 10
          num_train_epochs: 3
        evaluation: {eval_steps: 5}
        """)
    lines = errors_of(path, "train.adam_beta1=2", "nonsense")
    starts = [line.split("=")[0].split(" is ")[0].split(" stands ")[0] for line in lines]
    assert starts == [
        "run.yaml:1: model.model_name_or_path",
        "run.yaml:2: model.dtype",
        "run.yaml:6: data.train.0.spilt",
        "run.yaml:8: data.max_length",
        "run.yaml:9: los",
        "run.yaml:11: loss.bta",
        "run.yaml:12: loss.beta",
        "run.yaml:13: train.output_dir",
        "run.yaml:15: train.num_train_epochs",
        "run.yaml:16: evaluation.eval_steps",
        "command line: nonsense",
        "command line: train.adam_beta1",
    ]


def test_missing_sections_name_every_missing_key(write):
    lines = errors_of(write("loss: {beta: 0.2}"))
    assert [line.split(" is missing")[0] for line in lines] == [
        "run.yaml: model.model_name_or_path",
        "run.yaml: data.train",
        "run.yaml: train.output_dir",
    ]
    assert "The policy: a local folder" in lines[0]


def test_a_file_without_sections_is_told_where_each_key_belongs(write):
    lines = errors_of(
        write("""\
            model_name_or_path: demo
            dataset_name: pairs.jsonl
            learning_rate: 1e-6
            beta: 0.1
            output_dir: runs/x
            """)
    )
    assert lines == [
        "run.yaml:1: model_name_or_path=demo is not a key at top level; write model.model_name_or_path",
        "run.yaml:2: dataset_name=pairs.jsonl is not a key at top level; the name here is data.train: a list of {path, "
        "split, limit}",
        "run.yaml:3: learning_rate=1e-06 is not a key at top level; write train.learning_rate",
        "run.yaml:4: beta=0.1 is not a key at top level; write loss.beta",
        "run.yaml:5: output_dir=runs/x is not a key at top level; write train.output_dir",
    ]


def test_a_key_is_not_missing_as_well_where_it_stands_under_another_name(write):
    text = MINIMAL.replace("model: {model_name", "modle: {model_name").replace("output_dir", "outputdir")
    assert [line.split(" ", 1)[1] for line in errors_of(write(text))] == [
        "modle is not a key at top level; did you mean model?",
        "train.outputdir=runs/x is not a key in section train; did you mean train.output_dir?",
    ]
    # What only mentions a required key does not give it.
    text = MINIMAL.replace("output_dir: runs", "run_name: runs")
    assert "train.output_dir is missing" in errors_of(write(text))[0]


def test_dotted_keys_are_for_the_command_line(write):
    line = only_error(write("train.output_dir: x\n" + MINIMAL.replace("train: {output_dir: runs/x}\n", "")))
    assert line == (
        "run.yaml:1: train.output_dir=x is one dotted key; write train.output_dir nested: `train: {output_dir: ...}`"
    )


def test_a_rule_is_silent_about_a_key_that_is_already_wrong(minimal):
    assert "eval_steps=-1 is out of range" in only_error(minimal, "evaluation.eval_steps=-1")


def test_an_empty_section_has_its_defaults(write):
    assert load_config(write(MINIMAL + "loss:\n")).loss == LossConfig()


def test_keys_are_text(write):
    assert "loss.1=2 is not a key" in only_error(write(MINIMAL + "loss: {1: 2}\n"))
    assert "true is not a key at top level" in only_error(write(MINIMAL + "true: {}\n"))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["run.yaml is empty", "model, adapter, data"]),
        ("# nothing\n", ["run.yaml is empty"]),
        ("- a\n", ["run.yaml holds no mapping"]),
        ("just text\n", ["run.yaml holds no mapping"]),
        ("model: {}\nloss: [1\n", ["run.yaml:3: not valid YAML"]),
        ("model: {}\nloss: !!python/object/apply:os.getcwd []\n", ["run.yaml:2: not valid YAML", "python/object"]),
        ("model: &a [*a]\n", ["run.yaml:1: not valid YAML", "refers to itself"]),
        ("model: *nowhere\n", ["run.yaml:1: not valid YAML", "undefined alias"]),
        ("? [a]\n: 1\n", ["run.yaml:1: not valid YAML", "a key must be text"]),
        ("a: 1\n---\nb: 1\n", ["run.yaml:2: not valid YAML", "another document"]),
        ("a: \x01\n", ["run.yaml: not valid YAML", "special characters"]),
        ("[" * 500, ["run.yaml: not valid YAML", "nested too deeply"]),
        ("a: " + "9" * 5000 + "\n", ["run.yaml: not valid YAML", "digits"]),
    ],
)
def test_files_that_hold_no_configuration(write, text, fragments):
    line = only_error(write(text))
    assert all(fragment in line for fragment in fragments), line


def test_files_that_cannot_be_read(write, tmp_path):
    assert "gone.yaml does not exist; give a YAML file or the name of a shipped" in only_error(Path("gone.yaml"))
    assert "did you mean smollm2_demo?" in only_error(Path("smollm2_dem"))
    (tmp_path / "run").mkdir()
    assert "run is a folder; give a YAML file" in only_error(Path("run"))
    write(MINIMAL, "run/config.yaml")
    assert "run is a folder; did you mean run/config.yaml?" in only_error(Path("run"))
    (tmp_path / "latin.yaml").write_bytes("model: \xe9\n".encode("latin-1"))
    assert "latin.yaml is not UTF-8 text (byte 7)" in only_error(Path("latin.yaml"))


def test_an_unreadable_file(minimal, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read everything, so permissions are no test
    assert "run.yaml cannot be read (Permission denied)" in only_error(minimal)


# ---- overrides


def test_overrides_reach_every_depth(minimal):
    text = (
        "loss.beta=0.2 data.train.0.path=b data.train.1.path=c data.train.1.limit=3 data.evaluation.0.path=d "
        "evaluation.eval_on_start=true log.report_to=[] model.revision=null"
    )
    config = load_config(minimal, text.split())
    assert config.loss.beta == 0.2 and config.log.report_to == []
    assert config.data.train == [DataSource(path="b"), DataSource(path="c", limit=3)]
    assert config.data.evaluation == [DataSource(path="d")]


def test_an_override_replaces_what_the_file_says_wrongly(write):
    path = write(MINIMAL + "loss: {beta: -1}\n")
    assert load_config(path, ["loss.beta=0.2"]).loss.beta == 0.2


def test_null_takes_the_key_out(write):
    path = write(MINIMAL.replace("runs/x", "runs/x, num_train_epochs: 3") + "loss: {beta: 3, bta: 1}\n")
    out = "loss.bta=null"
    assert load_config(path, [out, "loss.beta=null"]).loss.beta == 0.1
    assert load_config(path, [out, "loss.label_smoothing=~"]).loss == LossConfig(beta=3)
    assert load_config(path, ["loss=null"]).loss == LossConfig()
    assert load_config(path, [out, "train.max_steps=null"]).train.max_steps is None
    assert load_config(path, [out, "train.max_steps=5", "train.num_train_epochs=null"]).train.num_train_epochs == 1.0
    assert len(load_config(path, [out, "data.train.1.path=y", "data.train.0=null"]).data.train) == 1
    assert only_error(path, out, "train.output_dir=null").startswith("command line: train.output_dir is missing")


def test_null_in_a_file_is_no_number(write):
    assert "loss.beta=null is not a number; write one" in only_error(write(MINIMAL + "loss: {beta: null}\n"))


@pytest.mark.parametrize("key", ["loss.beta", "model.revision", "train.output_dir", "loss"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_override_is_refused(minimal, key, value):
    line = only_error(minimal, f"{key}={value}")
    assert line == f"command line: {key}= is empty; write a value, or {key}=null to remove the key"


def test_a_quoted_empty_override_is_an_empty_text(minimal):
    assert 'train.output_dir="" is empty; write a name or path' in only_error(minimal, 'train.output_dir=""')


def test_a_key_is_given_once_on_the_command_line(minimal):
    line = only_error(minimal, "loss.beta=0.2", "train.max_steps=3", "loss.beta=0.3")
    assert line == "command line: loss.beta=0.3 is given twice on the command line; leave one out"
    assert load_config(minimal, ["loss.beta=0.2", "train.max_steps=3", "loss.beta=0.2"]).loss.beta == 0.2
    assert load_config(minimal, ["data.train=[{path: y}]", "data.train.0.path=z"]).data.train[0].path == "z"


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("loss.beta", "loss.beta is not an override; write section.key=value"),
        ("=1", "=1 is not an override"),
        ("loss..beta=1", "loss..beta=1 is not an override"),
        ("data.train.x=1", "data.train is a list; name an element by its index, e.g. data.train.0"),
        ("data.train.path=x", "data.train.path=x is not an element of the list; did you mean data.train.0.path=x?"),
        ("data.evaluation.split=x", "did you mean data.evaluation.0.split=x?"),
        ("data.train.1=null", "data.train.1=null removes an element that is not there; leave it out"),
        ("train.output_dir=#1", "train.output_dir has only a comment as its value; put the value in quotes"),
        ("data.train.-1.path=x", "data.train is a list; name an element by its index"),
        ("data.train.2.path=x", "data.train has 1 elements; the next index is 1"),
        ("data.train.0.path.x=1", "data.train.0.path is a single value; it has no keys and no elements"),
        ("loss.beta=[1", "loss.beta is not valid YAML"),
        ("train.output_dir=a: b: c", "train.output_dir is not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied(minimal, override, fragment):
    line = only_error(minimal, override)
    assert line.startswith("command line: ") and fragment in line


# ---- combinations

PINNED_CODE = ["model.model_name_or_path=org/name", "model.trust_remote_code=true", f"model.revision={'a' * 40}"]


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (
            ["train.max_steps=5", "train.num_train_epochs=2"],
            "num_train_epochs=2.0 has no effect while train.max_steps=5",
        ),
        (["data.truncation_mode=drop"], "truncation_mode=drop has no effect without data.max_length"),
        (
            ["train.lr_scheduler_type=constant", "train.warmup_steps=3"],
            "has no effect with train.lr_scheduler_type=constant",
        ),
        (["train.lr_scheduler_type=constant_with_warmup"], "has no warmup without train.warmup_steps"),
        (["train.max_steps=5", "train.warmup_steps=5"], "leaves no step at the full learning rate"),
        (
            ["model.torch_compile=true", "model.use_liger_kernel=true"],
            "makes fused kernels of what model.use_liger_kernel=true computes by Liger's",
        ),
        (["evaluation.eval_steps=5"], "evaluation.eval_steps=5 has no effect without data.evaluation"),
        (["evaluation.eval_on_start=true"], "evaluation.eval_on_start=true has no effect without data.evaluation"),
        (["data.evaluation.0.path=x"], 'data.evaluation=["x"] would never be evaluated; set evaluation.eval_steps'),
        (
            ["data.evaluation=[{path: x}, {path: x, limit: 1}]", "evaluation.eval_steps=1"],
            "data.evaluation.1.path=x is the same set as data.evaluation.0",
        ),
        (["data.max_length=9000"], "data.max_length=9000 admits examples that fit no micro-batch"),
        (["model.dtype=float32", "model.attn_implementation=flash_attn"], "computes in bfloat16 or float16 only"),
        (["model.dtype=float32", "model.attn_implementation=torch"], "computes in bfloat16 or float16 only"),
        (["model.revision=main"], "model.revision=main has no effect: model.model_name_or_path=demo names the demo"),
        (
            ["model.model_name_or_path=org/name", "model.trust_remote_code=true"],
            "trust_remote_code=true runs whatever code the hub repository holds that day; pin it: set model.revision",
        ),
        (
            ["model.model_name_or_path=org/name", "model.trust_remote_code=true", "model.revision=main"],
            "pin it: set model.revision",
        ),
        (
            [*PINNED_CODE, "model.reference_name_or_path=org/name"],
            "model.reference_name_or_path=org/name is a hub repository whose code cannot be pinned",
        ),
        (["checkpoint.resume=Auto"], "checkpoint.resume=Auto does not exist; write auto, never, or the folder"),
        (["parallel.deepspeed=zero33"], "parallel.deepspeed=zero33 is not a shipped file; did you mean zero3?"),
        (["parallel.deepspeed=gone.json"], "parallel.deepspeed=gone.json cannot be read (No such file or directory)"),
    ],
)
def test_impossible_combinations(minimal, overrides, fragment):
    assert fragment in only_error(minimal, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_steps=5", "train.num_train_epochs=1.0"],  # equal to the default: not set
        ["data.truncation_mode=drop", "data.max_length=100"],
        ["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=0.1"],
        ["train.max_steps=5", "train.warmup_steps=4"],
        ["data.evaluation.0.path=x", "evaluation.eval_on_start=true"],
        ["data.evaluation=[{path: x}, {path: x, split: test}]", "evaluation.eval_steps=1"],
        ["model.model_name_or_path=org/name", "model.revision=main"],
        PINNED_CODE,
        ["model.dtype=float16", "model.attn_implementation=flash_attn"],
    ],
)
def test_possible_combinations(minimal, overrides):
    load_config(minimal, overrides)


def test_revision_of_a_local_folder_has_no_effect(minimal, tmp_path):
    (tmp_path / "weights").mkdir()
    line = only_error(minimal, "model.model_name_or_path=weights", "model.revision=main")
    assert f"model.revision=main has no effect: model.model_name_or_path={tmp_path}/weights is a local folder" in line
    assert load_config(minimal, ["model.model_name_or_path=weights", "model.trust_remote_code=true"])


@pytest.mark.parametrize(("section", "dtype"), [("bf16", "float32"), ("fp16", "bfloat16")])
def test_deepspeed_tuning_of_another_dtype_has_no_effect(minimal, tmp_path, section, dtype):
    key = {"bf16": "immediate_grad_update", "fp16": "consecutive_hysteresis"}[section]
    content = {"zero_optimization": {"stage": 1}, section: {key: True}}
    (tmp_path / "ds.json").write_text(json.dumps(content), encoding="utf-8")
    line = only_error(minimal, "parallel.deepspeed=ds.json", f"model.dtype={dtype}")
    assert f"ds.json: {section} has no effect with model.dtype={dtype}" in line
    load_config(
        minimal, ["parallel.deepspeed=ds.json", f"model.dtype={'bfloat16' if section == 'bf16' else 'float16'}"]
    )


def test_errors_of_the_deepspeed_file_come_with_all_others(minimal, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 9}, "optimizer": {}}', encoding="utf-8")
    lines = errors_of(minimal, "parallel.deepspeed=ds.json", "loss.beta=0")
    assert len(lines) == 3
    assert "loss.beta=0" in lines[0] and "stage=9" in lines[1] and "optimizer" in lines[2]


# ---- paths


def test_relative_inputs_are_found_beside_the_file_and_in_the_current_folder_first(write, tmp_path, monkeypatch):
    configs, work = tmp_path / "configs", tmp_path / "work"
    for folder in (configs, configs / "sets", work, work / "sets"):
        folder.mkdir()
    for file in (configs / "sets/a.jsonl", configs / "sets/b.jsonl", work / "sets/b.jsonl", configs / "own.json"):
        file.write_text('{"zero_optimization": {"stage": 0}}', encoding="utf-8")
    text = MINIMAL.replace("[{path: some/data}]", "[{path: sets/a.jsonl}, {path: sets/b.jsonl}, {path: owner/name}]")
    path = (configs / "run.yaml").absolute()
    path.write_text(text + "parallel: {deepspeed: own.json}\n", encoding="utf-8")
    monkeypatch.chdir(work)
    config = load_config(path)
    assert [source.path for source in config.data.train] == [
        str(configs / "sets/a.jsonl"),
        str(work / "sets/b.jsonl"),
        "owner/name",
    ]
    assert config.parallel.deepspeed == str(configs / "own.json")
    assert config.train.output_dir == "runs/x"
    (work / "config.yaml").write_text(dump_resolved(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_config(work / "config.yaml") == config


def test_demo_is_never_a_folder(minimal, tmp_path):
    (tmp_path / "demo").mkdir()
    assert load_config(minimal).model.model_name_or_path == "demo"


def test_home_folder(minimal, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(minimal, ["train.output_dir=~/runs/x"]).train.output_dir == "/home/someone/runs/x"


def test_names_of_evaluation_sets_tell_them_apart():
    def names(*sources: tuple[str, str]) -> tuple[str, ...]:
        evaluation = [DataSource(path=path, split=split) for path, split in sources]
        return DataConfig(train=[DataSource(path="x")], evaluation=evaluation).evaluation_names

    assert names() == ()
    assert names(("/data/helpful.jsonl.gz", "train")) == ("helpful",)
    assert names(("owner/name", "test"), ("owner/name", "train")) == ("name:test", "name")
    assert names(("/a/b/test.jsonl", "train"), ("/a/c/test.jsonl", "train")) == ("b/test", "c/test")
    assert names(("/a/test.jsonl", "train"), ("/a/test.json", "train")) == ("/a/test.jsonl", "/a/test.json")
    queries = (("https://h/d.jsonl?id=1", "train"), ("https://h/d.jsonl?id=2", "train"))
    assert names(*queries) == ("https://h/d.jsonl", "https://h/d.jsonl:1")


# ---- the shipped files, and back to YAML


SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert config == load_config(ROOT / "configs" / f"{name}.yaml")
    (tmp_path / "config.yaml").write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    assert (
        package_file("configs", f"{name}.yaml")
        .read_text(encoding="utf-8")
        .startswith("# yaml-language-server: $schema=")
    )


def test_the_demo_configuration_finds_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_config("smollm2_demo").data
    assert all(
        Path(source.path).is_absolute() and Path(source.path).is_file() for source in data.train + data.evaluation
    )


def test_an_installed_package_brings_its_files(tmp_path):
    """As the wheel packs them: inside the package, with no repository around it."""
    package = tmp_path / "site" / "dpo_dist"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "dpo_dist" / name, package)
    shutil.copytree(ROOT / "dpo_dist" / "config", package / "config")
    for name in ("configs", "deepspeed_configs"):
        shutil.copytree(ROOT / name, package / name)
    code = "from dpo_dist.config import load_config; print(load_config('smollm2_demo').data.train[0].path)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == str(package / "configs" / "demo" / "train.jsonl")


def test_package_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"configs/zzz.yaml is not among the shipped files; there are .*smollm2_demo"):
        package_file("configs", "zzz.yaml")


def test_dump_leaves_out_what_has_no_effect(minimal):
    text = dump_resolved(
        load_config(minimal, ["train.max_steps=3", "train.lr_scheduler_type=constant", "train.shuffle=false"])
    )
    keys = parse(text).lines
    absent = {("train", "num_train_epochs"), ("train", "warmup_steps"), ("train", "seed"), ("data", "truncation_mode")}
    absent |= {("evaluation",), ("evaluation", "eval_steps"), ("model", "revision"), ("model", "trust_remote_code")}
    assert not absent & keys.keys()
    assert {("train", "max_steps"), ("train", "adam_beta1"), ("loss", "beta"), ("model", "dtype")} <= keys.keys()


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())
TRICKY = st.sampled_from(
    [
        "on",
        "no",
        "5e-7",
        "1e5",
        "null",
        "~x",
        "0x1f",
        "a\x85b",
        "a\u2028",
        "1:30",
        "2024-01-01",
        "#a",
        "a: b",
        "'",
        "<<",
        "=",
    ]
)
WORDS = (TEXTS | TRICKY).filter(lambda text: re.search(r"\S", text) and not text.startswith("~") and "\0" not in text)
NUMBERS = st.floats(1e-300, 1e300)
OPTIONAL_COUNT = st.none() | st.integers(2, 10**9)


SOURCES = st.fixed_dictionaries(
    {"path": WORDS.map(lambda word: f"no such/{word}"), "split": WORDS, "limit": OPTIONAL_COUNT}
)
RUNS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "model_name_or_path": st.just("demo") | WORDS.map(lambda word: f"no such/{word}"),
                "tokenizer_name_or_path": st.none() | WORDS.map(lambda word: f"no such/{word}"),
                "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
                "prefix_sharing": st.sampled_from(["on", "off", "auto"]),
                "revision": st.none() | WORDS,
                "gradient_checkpointing": st.booleans() | st.just("auto"),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "train": st.lists(SOURCES, min_size=1, max_size=3),
                "evaluation": st.lists(SOURCES, max_size=2),
                "max_length": OPTIONAL_COUNT,
                "truncation_mode": st.sampled_from(["drop", "keep_start", "keep_end_of_prompt", "error"]),
            }
        ),
        "loss": st.fixed_dictionaries({"beta": NUMBERS, "label_smoothing": st.floats(0, 0.4999)}),
        "train": st.fixed_dictionaries(
            {
                "output_dir": WORDS,
                "max_steps": OPTIONAL_COUNT,
                "num_train_epochs": st.just(1.0) | NUMBERS,
                "learning_rate": NUMBERS,
                "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant", "constant_with_warmup"]),
                "warmup_steps": st.floats(0, 1) | st.integers(0, 1000),
                "seed": st.integers(0, 2**63 - 1),
                "shuffle": st.booleans(),
            }
        ),
        "packing": st.fixed_dictionaries({"max_tokens": st.integers(1, 10**9), "reference_max_tokens": OPTIONAL_COUNT}),
        "parallel": st.fixed_dictionaries(
            {"deepspeed": st.sampled_from(["zero0", "zero3", "zero3_cpu", "zero2_bf16"])}
        ),
        "checkpoint": st.fixed_dictionaries(
            {"save_total_limit": OPTIONAL_COUNT, "resume": st.sampled_from(["auto", "never"])}
        ),
        "evaluation": st.fixed_dictionaries({"eval_steps": st.integers(0, 9), "eval_on_start": st.booleans()}),
        "log": st.fixed_dictionaries(
            {"report_to": st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow"]), unique=True)}
        ),
    }
)


@settings(max_examples=60, deadline=None)
@given(values=RUNS)
def test_loading_what_was_dumped_gives_the_same_run(values, tmp_path_factory):
    first = RunConfig.model_validate(values)
    for path in [*(path for path, _, _ in broken_rules(first)), *keys_without_effect(first)]:
        values.get(path[0], {}).pop(path[1], None)  # its default; repairs almost every rule
    config = RunConfig.model_validate(values)
    assume(not list(broken_rules(config)) and not config_remarks(config))
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(path) == config


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["auto", "demo"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "a"]), inner, max_size=2),
    max_leaves=4,
)
ANY_KEY = st.sampled_from([*SECTION_OF, *KEYS, *FOREIGN_KEYS, "zzz"])
ANY_FILE = st.dictionaries(
    st.sampled_from([*KEYS, "beta", "zzz"]), VALUES | st.dictionaries(ANY_KEY, VALUES, max_size=4)
)


@settings(max_examples=60, deadline=None)
@given(values=ANY_FILE, overridden=st.tuples(st.sampled_from([*KEYS]), ANY_KEY, VALUES))
def test_any_file_loads_or_is_refused_with_what_would_be_right(values, overridden, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "any.yaml"
    path.write_text(dump(values), encoding="utf-8")
    section, key, value = overridden
    try:
        load_config(path, [f"{section}.{key}={json.dumps(value)}"])
    except ConfigError as error:
        assert all("; " in line for line in str(error).splitlines()), error


@given(text=st.text(max_size=60))
def test_any_text_is_read_or_refused_as_yaml(text):
    with contextlib.suppress(YamlError):
        parse(text)


# ---- schema and documentation


def models_below(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= models_below(part)
    return found


def test_every_option_says_what_it_means():
    models = models_below(RunConfig)
    assert len(models) == 14
    for model in models:
        for name, field in model.model_fields.items():
            text = field.description or ""
            assert len(text) > 10 and text.rstrip().endswith("."), f"{model.__name__}.{name}: {text!r}"


def test_committed_schema_is_current():
    committed = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    assert committed == json_schema(), "run: dpo-dist schema > configs/schema.json"
    beta = committed["$defs"]["LossConfig"]["properties"]["beta"]
    assert beta["exclusiveMinimum"] == 0 and beta["default"] == 0.1 and "Inverse temperature" in beta["description"]
    assert "\n" not in json.dumps([part.get("description") for part in committed["$defs"].values()], ensure_ascii=False)


def test_loss_types_are_the_options_of_the_field():
    assert LossConfig.model_json_schema()["properties"]["loss_type"]["oneOf"][0]["enum"] == list(LOSS_TYPES)


def test_public_names():
    assert all(hasattr(config_package, name) for name in config_package.__all__)


def test_importing_and_loading_is_fast_and_light(minimal):
    """A user who misspells a key is told at once, not after torch has been imported."""
    code = f"""
import sys, time
start = time.process_time()  # not the clock: other processes may be busy
from dpo_dist.config import load_config
load_config({str(minimal.absolute())!r})
seconds = time.process_time() - start
heavy = {{"torch", "transformers", "deepspeed", "datasets", "numpy", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
assert seconds < 1.5, seconds
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# ---- adapter and reference


LORA = "adapter.peft_type=lora"
ADALORA = "adapter.peft_type=adalora"


@pytest.mark.parametrize(
    ("overrides", "path", "reason", "way_out"),
    [
        (["adapter.lora_r=8"], "adapter.lora_r=8", "has no effect without adapter.peft_type", "set peft_type"),
        ([ADALORA, "train.max_steps=9", "adapter.lora_r=8"], "adapter.lora_r=8", "belongs to lora", "leave this out"),
        ([LORA, "adapter.init_r=8"], "adapter.init_r=8", "belongs to adalora", "leave this out"),
        ([LORA, "adapter.num_virtual_tokens=8"], "adapter.num_virtual_tokens=8", "prompt_tuning", "leave this out"),
        (
            [LORA, "adapter.bnb_4bit_quant_type=fp4"],
            "adapter.bnb_4bit_quant_type=fp4",
            "load_in_4bit",
            "set it to true",
        ),
        (
            ["adapter.adapter_name_or_path=x", LORA],
            "adapter.peft_type=lora",
            "brings its own settings",
            "leave this out",
        ),
        ([ADALORA], "adapter.peft_type=adalora", "number of updates that must be known", "set train.max_steps"),
        ([ADALORA, "train.max_steps=9", "adapter.tfinal=9"], "adapter.tfinal=9", "take all of 9", "lower them"),
        (
            [ADALORA, "train.max_steps=9", "adapter.target_r=12"],
            "adapter.target_r=12",
            "not below adapter.init_r=12",
            "lora",
        ),
        (
            ["adapter.peft_type=prefix_tuning", "model.gradient_checkpointing=true"],
            "model.gradient_checkpointing=true",
            "prefix_tuning",
            "set it to false",
        ),
        (
            ["reference.source=adapter_off"],
            "reference.source=adapter_off",
            "no adapters to switch off",
            "set adapter.peft",
        ),
        (
            [LORA, "reference.source=adapter_off", "model.reference_name_or_path=x"],
            "model.reference_name_or_path=x",
            "without its adapters is the reference",
            "use live or cache",
        ),
        (
            ["reference.source=none", "model.reference_name_or_path=x"],
            "model.reference_name_or_path=x",
            "there is no reference",
            "use live or cache",
        ),
        ([LORA, "reference.sync_ref_model=true"], "reference.sync_ref_model=true", "only an adapter", "leave one"),
        (
            ["reference.source=cache", "reference.sync_ref_model=true"],
            "reference.sync_ref_model=true",
            "belongs to live",
            "leave this out",
        ),
        (
            ["reference.source=live", "reference.cache_dir=x"],
            "reference.cache_dir=x",
            "belongs to cache",
            "leave this out",
        ),
        (
            ["reference.source=cache", "reference.per_microbatch=true"],
            "reference.per_microbatch=true",
            "to live",
            "leave",
        ),
        (["reference.source=none", "reference.dtype=float32"], "reference.dtype=float32", "live and cache", "leave"),
        (
            ["reference.ref_model_mixup_alpha=0.5"],
            "reference.ref_model_mixup_alpha=0.5",
            "sync_ref_model",
            "set it to true",
        ),
        (["reference.ref_model_mixup_alpha=1.5"], "reference.ref_model_mixup_alpha=1.5", "", ""),
        (
            ["reference.sync_ref_model=true", "reference.dtype=float32"],
            "reference.dtype=float32",
            "differs from model.dtype=bfloat16",
            "leave one out",
        ),
        *(
            (["reference.sharded=false", f"reference.{key}"], f"reference.{key}", "needs a sharded reference", "one")
            for key in ("offload_param=true", "zero_hpz_partition_size=2", "sync_ref_model=true")
        ),
    ],
)
def test_rules_of_adapter_and_reference(minimal, overrides, path, reason, way_out):
    line = only_error(minimal, *overrides)
    assert line.split(": ", 1)[1].startswith(path)
    assert reason in line
    assert way_out in line


@pytest.mark.parametrize(
    "overrides",
    [
        [LORA, "adapter.use_dora=true", "adapter.lora_r=4", "adapter.lora_modules_to_save=[lm_head]"],
        [LORA, "adapter.load_in_4bit=true", "adapter.bnb_4bit_quant_type=fp4", "adapter.use_bnb_nested_quant=true"],
        [ADALORA, "adapter.total_step=20", "adapter.tinit=2", "adapter.tfinal=3"],
        [ADALORA, "train.max_steps=20"],
        ["adapter.peft_type=prefix_tuning", "model.gradient_checkpointing=false"],
        ["adapter.peft_type=prefix_tuning"],
        [LORA, "reference.source=adapter_off"],
        [LORA, "reference.source=live", "reference.dtype=float32", "reference.per_microbatch=true"],
        ["reference.sync_ref_model=true", "reference.ref_model_sync_steps=2", "reference.ref_model_mixup_alpha=1"],
        ["reference.source=cache", "reference.store_token_logps=true", "reference.verify_rows=0"],
        ["reference.source=none"],
    ],
)
def test_combinations_of_adapter_and_reference_that_work(minimal, overrides):
    load_config(minimal, overrides)


def test_names_of_data_that_is_trained_on() -> None:
    def names(*sources: dict[str, Any]) -> tuple[str, ...]:
        return DataConfig.model_validate({"train": list(sources)}).train_names

    assert names({"path": "x/hh.jsonl"}, {"path": "y/uf.parquet", "split": "extra"}) == ("hh", "uf:extra")
    assert names({"path": "x/hh.jsonl"}, {"path": "y/hh.jsonl"}) == ("x/hh", "y/hh")
    assert names({"path": "hh.jsonl"}, {"path": "uf.jsonl"}, {"path": "hh.jsonl", "limit": 5}) == ("hh", "uf", "hh:2")
    of_queries = names({"path": "https://h/d.jsonl?id=1"}, {"path": "https://h/d.jsonl?id=2"})
    assert of_queries == ("https://h/d.jsonl", "https://h/d.jsonl:1")
