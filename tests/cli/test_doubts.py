"""`dpo-dist inspect --model`: a model contradicts the flipped labels; its scores are those of a plain forward."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.cli.inspect import with_model_value
from dpo_dist.inspection.doubts import robust_scores
from tests.byte_tokenizer import save_tokenizer
from tests.cli.test_inspect import Elements
from tests.cli.test_mistakes import refuse
from tests.planted import Row, clean_rows, write_rows

VOCABULARY = 64
FLIPPED = (4, 17, 30, 31, 58)


def save_model(folder: Path, seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    """Small, and sure of what it says next."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": VOCABULARY, "tie_word_embeddings": False, **shape, **sizes})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    model.save_pretrained(folder)
    return model


def likely_rows(model: Any, number: int = 60) -> list[Row]:
    """Chosen is what the model itself would say, rejected random; lengths differ."""
    rows, chance = clean_rows(number, 7), random.Random(7)
    for row in rows:
        length = chance.randrange(6, 20)
        asked = torch.tensor([row["prompt_ids"]])
        said = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=length, min_new_tokens=length,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        row["chosen_ids"] = said[0, asked.shape[1] :].tolist()
        row["rejected_ids"] = row["rejected_ids"][: chance.randrange(4, 24)]
    return rows


def flipped(rows: list[Row], places: tuple[int, ...] = FLIPPED) -> list[Row]:
    return [
        {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} if place in places else row
        for place, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    folder = tmp_path_factory.mktemp("sure") / "model"
    return folder, likely_rows(save_model(folder))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[Path, list[Row]]) -> Path:
    """60 pairs, of which 5 are flipped; the policy is another model than the reference, which said the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made[0], tmp_path / "model")
    save_model(tmp_path / "policy", seed=1)
    write_rows(tmp_path / "pairs.jsonl", flipped(made[1]))
    values = {
        "model": {"model_name_or_path": "./policy", "reference_name_or_path": "./model", "dtype": "float32"},
        "data": {"train": [{"path": "pairs.jsonl"}]},
        "packing": {"max_tokens": 256},
        "train": {"output_dir": "out", "examples_per_step": 2, "max_steps": 2},
        "parallel": {"deepspeed": "zero0_cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", "run.yaml", *arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def doubts(*arguments: str) -> dict[str, Any]:
    return json.loads(inspect(*arguments, "--json"))["datasets"]["data.train"]["doubts"]


def lines_of(found: dict[str, Any]) -> list[int]:
    return [int(one["source"].rpartition(":")[2]) for one in found["ranked"]]


# ---- what is found


def test_flipped_labels_are_all_found_and_nothing_else_is(config: Path) -> None:
    found = doubts("--model")
    assert set(lines_of(found)) == {place + 1 for place in FLIPPED}
    assert (found["count"], found["of"], Path(found["model"])) == (5, 60, config / "model")
    differences = [one["difference"] for one in found["ranked"]]
    assert differences == sorted(differences) and differences[-1] < 0
    assert all(one["robust_z"] < -3 and one["is_strong"] for one in found["ranked"])
    assert found["prefers_chosen"] == pytest.approx(55 / 60)


def test_a_clean_set_has_none(config: Path, made: tuple[Path, list[Row]]) -> None:
    write_rows(config / "pairs.jsonl", made[1])
    found = doubts("--model")
    assert found["ranked"] == [] and found["prefers_chosen"] == 1.0
    assert "labels that ./model strongly contradicts: 0, 0.0%" in inspect("--model", "./model")


@pytest.mark.parametrize("budget", [64, 4096])
def test_scores_are_those_of_a_plain_forward(config: Path, made: tuple[Path, list[Row]], budget: int) -> None:
    """One completion at a time, nothing packed, in float64; whatever a micro-batch holds."""
    model = LlamaForCausalLM.from_pretrained(made[0], dtype=torch.float64).eval()
    rows = flipped(made[1])
    for one in doubts("--model", f"packing.max_tokens={budget}")["ranked"]:
        row = rows[int(one["source"].rpartition(":")[2]) - 1]
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*row["prompt_ids"], *ids]])).logits[0, -len(ids) - 1 : -1]
            logps = torch.log_softmax(logits, -1)[range(len(ids)), ids]
            assert one[f"{side}_logps"] == pytest.approx(float(logps.sum()), abs=1e-3)
            assert one[f"{side}_mean_logps"] == pytest.approx(float(logps.mean()), abs=1e-4)
        assert one["difference"] == pytest.approx(one["chosen_mean_logps"] - one["rejected_mean_logps"])


def test_of_many_completions_the_pair_is_named(config: Path, made: tuple[Path, list[Row]]) -> None:
    rows: list[Row] = []
    for place, row in enumerate(made[1]):
        completions = [row["rejected_ids"], row["chosen_ids"]]
        scores = [1, 0] if place == 9 else [0, 1]
        rows.append({"prompt_ids": row["prompt_ids"], "completions_ids": completions, "scores": scores})
    write_rows(config / "pairs.jsonl", rows)
    (one,) = doubts("--model")["ranked"]
    assert (lines_of({"ranked": [one]}), one["chosen"], one["rejected"]) == ([10], 1, 2)


def test_only_data_train_is_judged_and_no_row_is_dropped(config: Path, made: tuple[Path, list[Row]]) -> None:
    write_rows(config / "held_out.jsonl", clean_rows(30, 2))
    held_out = ("data.evaluation=[{path: held_out.jsonl}]", "evaluation.eval_steps=1")
    report = json.loads(inspect("--model", "--json", "--fix", "clean.jsonl", *held_out))
    assert report["datasets"]["held_out"]["doubts"] is None
    assert [json.loads(line) for line in (config / "clean.jsonl").read_text().splitlines()] == flipped(made[1])


def test_few_pairs_tell_no_outlier(config: Path, made: tuple[Path, list[Row]]) -> None:
    write_rows(config / "pairs.jsonl", flipped(made[1][:19], (3,)))
    found = doubts("--model")
    assert found["count"] == 0 and found["prefers_chosen"] == pytest.approx(18 / 19)
    assert lines_of(found) == [4] and not found["ranked"][0]["is_strong"]
    assert "fewer than 20 pairs: no label is called strongly contradicted" in inspect("--model")


def test_of_a_model_that_tells_nothing_the_first_twenty_are_listed(config: Path) -> None:
    write_rows(config / "pairs.jsonl", clean_rows(200, 3))
    found = doubts("--model")
    differences = [one["difference"] for one in found["ranked"]]
    assert len(differences) == 20 and differences == sorted(differences) and differences[-1] < 0
    assert found["count"] < 5 and 0.3 < found["prefers_chosen"] < 0.7
    said = inspect("--model")
    assert sum(line.startswith("    * ") for line in said.splitlines()) == found["count"]
    assert ("no more often than a coin" in said) == (found["prefers_chosen"] <= 0.5)


def test_without_pairs_no_model_is_asked(config: Path) -> None:
    write_rows(config / "pairs.jsonl", [{"prompt_ids": [5, 6], "completion_ids": [7, row]} for row in range(8, 11)])
    said = inspect("--model", "model.reference_name_or_path=null", "loss.loss_type=sft")
    assert "there are no preferences to judge" in said and "contradicts" not in said
    assert "note: the model was not asked: it judges pairs, and data.train has none" in said


def test_robust_scores() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert robust_scores(values).tolist() == pytest.approx(((values - 3) / 1.482602).tolist(), rel=1e-5)
    # More than half are equal: the mean deviation takes the place of the median one.
    assert robust_scores(np.array([1.0, 1.0, 1.0, 5.0])).tolist() == pytest.approx([0, 0, 0, 4 / 1.253314])
    assert robust_scores(np.ones(4)).tolist() == [0.0] * 4


# ---- how it is told


def test_text_and_page_list_them(config: Path) -> None:
    said = inspect("--model", "./model", "--html", "out.html").splitlines()
    head = next(place for place, line in enumerate(said) if "labels that ./model strongly contradicts" in line)
    assert said[head].endswith(": 5, 8.3%")
    assert "prefers the chosen completion of 92% of the pairs" in said[head + 1]
    assert [int(line.rpartition(":")[2]) for line in said[head + 4 : head + 9]] == lines_of(doubts("--model"))
    page = (config / "out.html").read_text(encoding="utf-8")
    assert "<td>labels that ./model strongly contradicts</td>" in page
    assert "<summary>pairs whose rejected completion ./model prefers most, the first 5</summary>" in page
    assert page.count("log-probability per token") == page.count(": strongly contradicted") == 5
    parsed = Elements()
    parsed.feed(page)
    assert parsed.open == []


# ---- which model


def test_the_model_is_the_reference_the_policy_or_one_that_is_named(config: Path) -> None:
    expected = doubts("--model")
    alone = "model.reference_name_or_path=null"
    assert Path(doubts(alone, "--model")["model"]) == config / "policy"
    assert doubts(alone, "model.model_name_or_path=./model", "--model")["ranked"] == expected["ranked"]
    assert doubts("--model", "./model", alone)["ranked"] == expected["ranked"]
    assert doubts("--model=./model", alone)["ranked"] == expected["ranked"]
    # What looks like a setting is one, and an option is no model.
    assert Path(doubts("--model", "packing.max_tokens=512")["model"]) == config / "model"
    assert with_model_value(["run.yaml", "--model", "a=b"]) == ["run.yaml", "--model", "a=b"]
    assert json.loads(inspect("--json"))["datasets"]["data.train"]["doubts"] is None


def test_an_adapter_that_a_run_goes_on_with_is_part_of_its_reference(config: Path) -> None:
    base: Any = LlamaForCausalLM.from_pretrained(config / "model")
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, settings)
    adapted.save_pretrained(config / "adapter")
    adapted.merge_and_unload().save_pretrained(config / "merged")
    run = ("model.model_name_or_path=./model", "model.reference_name_or_path=null")
    found = doubts(*run, "adapter.adapter_name_or_path=./adapter", "--model")
    merged, without = doubts(*run, "--model", "./merged"), doubts(*run, "--model")
    assert found["median"] == pytest.approx(merged["median"], abs=1e-4)
    assert abs(found["median"] - without["median"]) > 1e-2
    # A model that is named has nothing to do with it.
    named = doubts(*run, "adapter.adapter_name_or_path=./adapter", "--model", "./model")
    assert named["median"] == without["median"]


def test_weights_in_four_bits_are_part_of_its_reference_too(config: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = ("model.model_name_or_path=./model", "model.reference_name_or_path=null")
    found = doubts(*run, "adapter.peft_type=lora", "adapter.load_in_4bit=true", "--model")
    assert 1e-4 < abs(found["median"] - doubts(*run, "--model")["median"]) < 3
    assert found["count"] == len(FLIPPED)


def test_a_model_with_another_vocabulary(config: Path) -> None:
    save_model(config / "small", vocab_size=40)
    said = refuse(config, "--model", "./small", command="inspect")
    assert "--model=./small" in said and "vocabulary of 40 tokens" in said and "64" in said
    assert "model.model_name_or_path=./small" in said  # the way out


def test_a_model_with_another_tokenizer(config: Path, tmp_path: Path) -> None:
    row = {"prompt": "abc", "chosen": "de", "rejected": "fg"}
    write_rows(config / "pairs.jsonl", [{**row, "prompt": f"abc{number}"} for number in range(30)])
    for name in ("text", "other"):
        save_model(config / name, vocab_size=264)
        save_tokenizer(config / name)
    settings = ("model.model_name_or_path=./text", "model.reference_name_or_path=null")
    assert doubts(*settings, "--model", "./other")["of"] == 30
    changed = config / "other" / "tokenizer.json"
    content = json.loads(changed.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    changed.write_text(json.dumps(content), encoding="utf-8")
    said = refuse(config, *settings, "--model", "./other", command="inspect")
    assert "--model=./other has another tokenizer than model.model_name_or_path=" in said
    (config / "other" / "tokenizer.json").unlink()
    assert doubts(*settings, "--model", "./other")["of"] == 30  # nothing to compare but the sizes


@pytest.mark.parametrize(
    ("name", "error"),
    [("./none", "--model=./none does not exist"), ("./empty", "--model=./empty has no config.json")],
)
def test_a_model_that_is_not_there(config: Path, name: str, error: str) -> None:
    (config / "empty").mkdir()
    assert error in refuse(config, "--model", name, command="inspect")


def test_a_model_that_lacks_weights(config: Path) -> None:
    values = json.loads((config / "model/config.json").read_text())
    (config / "model/config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    said = refuse(config, "--model", "./model", command="inspect")
    assert "--model=" in said and "lacks" in said and "random numbers" in said


def test_a_row_that_fits_no_micro_batch(config: Path) -> None:
    said = refuse(config, "--model", "packing.max_tokens=32", command="inspect")
    assert "packing.max_tokens=32 is smaller than an example of" in said
