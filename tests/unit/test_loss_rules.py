"""Rules of the section `loss`: what has no effect, or does not go together, is refused with a way out."""

from pathlib import Path

import pytest
import yaml

from dpo_dist.config import load_config
from dpo_dist.config.loss import NO_REFERENCE
from dpo_dist.errors import ConfigError

MINIMAL = {
    "model": {"model_name_or_path": "m"},
    "data": {"train": [{"path": "d.jsonl"}]},
    "train": {"output_dir": "out", "examples_per_step": 4},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def with_loss(*settings: str) -> list[str]:
    return [f"loss.{setting}" for setting in settings]


MISTAKES = [
    (
        ["loss_type=hinge", "label_smoothing=0.1"],
        "label_smoothing=0.1",
        "sigmoid, exo_pair, robust, aot and aot_unpaired read it",
    ),
    (["simpo_gamma=1"], "simpo_gamma=1.0", "simpo reads it: leave this out"),
    (["dpop_lambda=1"], "dpop_lambda=1.0", "dpop reads it: leave this out"),
    (["cpo_alpha=0"], "cpo_alpha=0.0", "cpo reads it: leave this out"),
    (["loss_type=hinge", "rdpo_alpha=0.1"], "rdpo_alpha=0.1", "sigmoid reads it: leave this out"),
    (["loss_type=sft", "beta=0.2"], "beta=0.2", "has no effect with loss.loss_type=sft"),
    (["loss_type=[sigmoid, sft]", "ld_alpha=0.5"], "ld_alpha=0.5", "does not go with sft, which asks for whole"),
    (["loss_type=aot", "use_weighting=true"], "use_weighting=true", "does not go with aot: only the loss of a"),
    (["ld_alpha=1.5"], "ld_alpha=1.5", "must be <= 1"),
    (["discopop_tau=0.1"], "discopop_tau=0.1", "with loss.loss_type=sigmoid; discopop reads it: leave this out"),
    (["loss_type=[ipo, hinge]", "label_smoothing=0.1"], "label_smoothing=0.1", "with loss.loss_type=ipo and hinge"),
    (["loss_weights=[2]"], "loss_weights=[2.0]", "has no effect with one loss; leave this out, or let loss.loss_type"),
    (["loss_type=[ipo]", "loss_weights=[2]"], "loss_weights=[2.0]", "has no effect with one loss"),
    (["f_alpha_divergence_coef=0.3"], "f_alpha_divergence_coef=0.3", "alpha_divergence reads it"),
    (
        ["f_divergence_type=forward_kl", "f_alpha_divergence_coef=0.3"],
        "f_alpha_divergence_coef=0.3",
        "no effect with loss.f_divergence_type=forward_kl",
    ),
    (["loss_type=[ipo, ipo]"], "loss_type=", "names a loss twice; name each once, and set loss.loss_weights"),
    (
        ["loss_type=[ipo, hinge]", "loss_weights=[1, 2, 3]"],
        "loss_weights=[1.0,2.0,3.0]",
        "gives 3 weights for 2 losses; give one for each, or leave it out",
    ),
    (["loss_type=[ipo, hinge]", "loss_weights=[1, 0]"], "loss_weights.1=0", "must be > 0"),
    (["loss_type=exo_pair"], "loss_type=exo_pair", "needs loss.label_smoothing above 0 for exo_pair"),
    (["loss_type=exo_pair", "label_smoothing=0"], "loss_type=exo_pair", "set it, say to 0.001"),
    (
        ["loss_type=bco_pair", "f_divergence_type=js_divergence"],
        "f_divergence_type=js_divergence",
        "does not go with bco_pair",
    ),
    (
        ["loss_type=[sigmoid, apo_zero, nca_pair]", "f_divergence_type=forward_kl"],
        "f_divergence_type=forward_kl",
        "does not go with apo_zero and nca_pair",
    ),
    (["loss_type=kto", "label_smoothing=0.1"], "label_smoothing=0.1", "has no effect with loss.loss_type=kto"),
    (["desirable_weight=2"], "desirable_weight=2", "kto, bco and apo_zero_unpaired read it"),
    (["loss_type=kto", "desirable_weight=0"], "desirable_weight=0", "must be > 0"),
    (["loss_type=[sigmoid, bco]", "ld_alpha=0.5"], "ld_alpha=0.5", "does not go with bco"),
    (["loss_type=kto", "use_weighting=true"], "use_weighting=true", "does not go with kto"),
    (["loss_type=kto", "f_divergence_type=forward_kl"], "f_divergence_type=forward_kl", "does not go with kto"),
    (["f_divergence_type=jensen"], "f_divergence_type=jensen", "'reverse_kl', 'forward_kl', 'js_divergence'"),
]


@pytest.mark.parametrize(("settings", "key", "reason"), MISTAKES)
def test_mistakes(path: Path, settings: list[str], key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, with_loss(*settings))
    (line,) = str(caught.value).splitlines()
    assert line.split(": ", 1)[1].replace(", ", ",").startswith(f"loss.{key}")
    assert reason in line


@pytest.mark.parametrize(
    "settings",
    [
        ["loss_type=robust", "label_smoothing=0.1"],
        ["loss_type=[sigmoid, exo_pair]", "label_smoothing=0.1", "loss_weights=[1, 0.2]"],
        ["loss_type=[ipo]"],
        ["loss_type=[discopop, bco_pair]", "discopop_tau=0.1"],
        ["f_divergence_type=alpha_divergence", "f_alpha_divergence_coef=-1.5"],
        ["loss_type=[hinge, sigmoid_norm]", "f_divergence_type=js_divergence"],
        ["loss_type=bco_pair", "f_divergence_type=reverse_kl"],
        ["loss_type=[sigmoid, kto]", "undesirable_weight=2", "loss_weights=[1, 0.5]"],
        ["loss_type=[kto, sft]"],
    ],
)
def test_what_goes_together(path: Path, settings: list[str]) -> None:
    load_config(path, with_loss(*settings))


def test_a_list_and_a_name(path: Path) -> None:
    one, many = (load_config(path, with_loss(text)).loss for text in ("loss_type=ipo", "loss_type=[ipo, hinge]"))
    assert (one.loss_types, one.weights) == (("ipo",), (1.0,))
    assert (many.loss_types, many.weights) == (("ipo", "hinge"), (1.0, 1.0))
    weighted = load_config(path, with_loss("loss_type=[ipo, hinge]", "loss_weights=[0.5, 2]")).loss
    assert weighted.weights == (0.5, 2.0)


@pytest.mark.parametrize("asked", ["source=cache", "cache_dir=somewhere"])
def test_ld_alpha_needs_more_than_a_cache_has(path: Path, asked: str) -> None:
    with pytest.raises(ConfigError, match=r"loss.ld_alpha=0.5 needs the reference's value of every token"):
        load_config(path, ["loss.ld_alpha=0.5", f"reference.{asked}"])


@pytest.mark.parametrize("asked", ["source=cache", "cache_dir=somewhere"])
def test_kto_asks_for_what_no_cache_has(path: Path, asked: str) -> None:
    with pytest.raises(ConfigError, match=r"loss_type=kto needs the reference's values of completions after"):
        load_config(path, ["loss.loss_type=kto", f"reference.{asked}"])
    load_config(path, ["loss.loss_type=bco", f"reference.{asked}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.loss_type=kto", "train.examples_per_step=1"],
            "examples_per_step=1.* is 1, and loss.loss_type=kto",
        ),
        (
            ["loss.loss_type=bco", "data.group_by_prompt=true"],
            "group_by_prompt=.*does not go with a loss of single",
        ),
        (
            [
                "loss.loss_type=kto",
                "data.evaluation=[{path: e.jsonl}]",
                "evaluation.eval_steps=1",
                "evaluation.metric_for_best_model=rewards/accuracies",
            ],
            "rewards/accuracies.* is not known; it must be",
        ),
    ],
)
def test_ratings_and_other_sections(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_what_becomes_of_ratings(path: Path) -> None:
    def kind(losses: str) -> str:
        return load_config(path, [f"loss.loss_type={losses}"]).rated

    assert [kind(losses) for losses in ("sigmoid", "sft", "[sigmoid, sft]")] == ["paired"] * 3
    assert [kind(losses) for losses in ("kto", "bco", "[kto, sft]", "[kto, bco]")] == ["all"] * 4
    assert [kind(losses) for losses in ("[sigmoid, kto]", "[bco, plackett_luce]")] == ["rest"] * 2


def test_a_run_has_a_reference_where_a_loss_or_the_user_asks_for_one(path: Path) -> None:
    def has(*overrides: str) -> bool:
        return load_config(path, list(overrides)).has_reference

    assert has() and has("loss.loss_type=[sigmoid, sft]") and not has("reference.source=none")
    for name in NO_REFERENCE:
        assert not has(f"loss.loss_type={name}")
    assert has("loss.loss_type=sft", "reference.source=live")
    assert has("loss.loss_type=sft", "model.reference_name_or_path=other")
    assert has("loss.loss_type=sft", "reference.cache_dir=there")
