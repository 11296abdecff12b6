"""A guess is made where a name is misspelt, and nowhere else."""

from pathlib import Path

import pytest

from dpo_dist.config import load_config, load_deepspeed
from dpo_dist.config.guesses import guess
from dpo_dist.errors import ConfigError

NAMES = ("train", "log", "loss", "output_dir", "learning_rate", "max_tokens", "beta", "zero1", "zero2", "path")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("trian", "train"),  # two letters changed places
        ("los", "loss"),
        ("Loss", "loss"),
        ("bta", "beta"),
        ("pathh", "path"),
        ("outputDir", "output_dir"),
        ("output-dir", "output_dir"),
        ("learnin_rate", "learning_rate"),
        ("leraning_rat", "learning_rate"),  # two mistakes in a long name
        ("max_token", "max_tokens"),
        ("zero_1", "zero1"),
        ("max_tokans", "max_tokens"),
    ],
)
def test_a_misspelt_name(word: str, meant: str) -> None:
    assert guess(word, NAMES) == meant


@pytest.mark.parametrize(
    "word",
    ["do_train", "plot_loss", "eval_loss", "zero4", "lr", "bt", "", "batch", "max_steps", "output", "trnai", "bata"],
)
def test_another_name(word: str) -> None:
    assert guess(word, NAMES) is None


def test_nothing_known() -> None:
    assert guess("train", ()) is None


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A configuration without a mistake."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model_name_or_path: demo}\ndata: {train: [{path: some/data}]}\ntrain: {output_dir: runs/x}\n"
    )
    return path


@pytest.mark.parametrize(
    "override",
    [
        "do_train=true",
        "train.do_train=true",
        "plot_loss=true",
        "train.lr_scheduler_type=cosine_with_min_lr",
        "train.lr_scheduler_type=cosine_with_restarts",
        "train.lr_scheduler_type=polynomial",
        "loss.loss_type=grpo",
        "loss.loss_type=grpo",
        "model.dtype=int8",
        "train.max_epoch_steps=3",
        "log.report_to=[comet]",
        "data.train.0.part=x",
        "parallel.deepspeed=zero4",
    ],
)
def test_no_guess_in_a_message(minimal: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("loss.loss_type=cdpo", "sigmoid with loss.label_smoothing above 0"),
        ("adapter.peft_type=qlora", "lora with adapter.load_in_4bit=true"),
        ("adapter.peft_type=dora", "lora with adapter.use_dora=true"),
        ("adapter.peft_type=rslora", "lora with adapter.use_rslora=true"),
    ],
)
def test_a_foreign_word_that_says_two_things(minimal: Path, word: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [word])
    assert f"(did you mean {meant}?)" in str(caught.value)


def test_betas_of_the_optimizer_are_not_the_loss_parameter(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.beta1=0\.8 .*train\.adam_beta1 and train\.adam_beta2"):
        load_config(minimal, ["train.beta1=0.8"])


def test_a_shipped_file_that_is_none_of_several(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"write one of .*zero1, .*or the path of a \.json file"):
        load_deepspeed("zero4")


@pytest.mark.parametrize("override", ["do_train=true", "train.do_eval=true"])
def test_what_a_command_does_anyway_is_to_be_left_out(minimal: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a key .*; leave it out: "):
        load_config(minimal, [override])
