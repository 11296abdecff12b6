"""`dpo-dist inspect`: planted faults are found where they are, and none in clean data."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app, inspecting
from tests.byte_tokenizer import save_tokenizer
from tests.cli.test_mistakes import GOLDEN, config, refuse
from tests.planted import clean_rows, planted_rows, write_rows

__all__ = ["config"]

HELD_OUT = ("data.evaluation=[{path: held_out.jsonl}]", "evaluation.eval_steps=1")


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", "run.yaml", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def found(*arguments: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """(source, other) of each finding, by data set and kind; kinds with none are left out."""
    report = json.loads(inspect("--json", *arguments))
    return {
        name: {
            finding["kind"]: [
                (Path(one["source"]).name, Path(one["other_source"]).name) for one in finding["occurrences"]
            ]
            for finding in values["findings"]
            if finding["count"]
        }
        for name, values in report["datasets"].items()
    }


@pytest.fixture
def planted(config: Path) -> Path:
    write_rows(config / "pairs.jsonl", planted_rows())
    write_rows(config / "held_out.jsonl", clean_rows(20, 2))
    return config


def at(row: int, file: str = "pairs") -> str:
    return f"{file}.jsonl:{row}"


def test_planted_faults_are_found_exactly(planted: Path) -> None:
    assert found(*HELD_OUT) == {
        "data.train": {
            "repeated": [(at(41), at(1)), (at(42), at(2))],
            "contradicting": [(at(3), at(43)), (at(43), at(3))],
            "near_pairs": [(at(44), at(4))],
            "near_prompts": [(at(44), at(4))],
            "near_completions": [(at(44), at(4)), (at(44), at(4))],
        },
        "held_out": {
            "held_out_prompts": [(at(1, "held_out"), at(46))],
            "near_held_out_prompts": [(at(2, "held_out"), at(47))],
        },
    }


def test_nothing_is_found_in_clean_data(config: Path) -> None:
    write_rows(config / "pairs.jsonl", clean_rows(600, 1))
    write_rows(config / "held_out.jsonl", clean_rows(20, 2))
    assert found(*HELD_OUT) == {"data.train": {}, "held_out": {}}
    report = json.loads(inspect("--json"))["datasets"]["data.train"]
    assert report["remarks"] == []
    longer, varied = report["rules"]
    assert (longer["decides"], longer["right"]) == (600, 0.5) and varied["says"] == "the more varied completion"
    assert report["max_length"] == 64  # 24 + 32 tokens
    assert report["histograms"]["prompt"] == {"width": 2, "counts": [0] * 12 + [600], "largest": 24}


def test_the_text_says_it_too(planted: Path) -> None:
    said = inspect(*HELD_OUT)
    for line in (
        "data.train: 46 examples, 46 pairs of 43 different prompts",
        f"{planted}/pairs.jsonl:41 beside {planted}/pairs.jsonl:1,",
        "rows left out: 1 x identical_completions",
        "note: there are fewer than 512 pairs: no share is judged",
        "data.max_length=64 would keep 99 % of the examples",
        "note: a run with data.on_bad_row=error refuses these data:",
    ):
        assert line in said, said


def test_a_lopsided_rule_is_remarked_on_from_512_pairs_on(config: Path) -> None:
    for number, is_said in ((511, False), (512, True)):
        rows = clean_rows(number, 5)
        write_rows(config / "pairs.jsonl", [{**row, "chosen_ids": row["chosen_ids"] + [9] * 4} for row in rows])
        remarks = json.loads(inspect("--json"))["datasets"]["data.train"]["remarks"]
        assert any("the longer completion is chosen so often" in remark for remark in remarks) == is_said
        assert ("there are fewer than 512 pairs: no share is judged" in remarks) != is_said


def test_the_first_of_a_list_is_a_rule(config: Path) -> None:
    rows = [
        {"prompt_ids": row["prompt_ids"], "completions_ids": [row["chosen_ids"], row["rejected_ids"]], "scores": [2, 1]}
        for row in clean_rows(10, 1)
    ]
    rows[0]["scores"] = [1, 2]
    write_rows(config / "pairs.jsonl", rows)
    rules: list[dict[str, Any]] = json.loads(inspect("--json"))["datasets"]["data.train"]["rules"]
    assert [rule["right"] for rule in rules if rule["says"] == "the first in the row's list"] == [0.9]


def test_without_the_package_the_rest_is_said(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "is_available", lambda: False)
    said = inspect()
    assert "near duplicates are not looked for: pip install 'dpo-dist[inspect]'" in said
    assert "pairs said before" in said and "nearly an earlier" not in said


def test_demonstrations(config: Path) -> None:
    write_rows(config / "pairs.jsonl", [{"prompt_ids": [5, 6], "completion_ids": [7, row]} for row in range(8, 11)])
    assert "there are no preferences to judge" in inspect("loss.loss_type=sft")


def test_rows_stay_apart(config: Path) -> None:
    write_rows(config / "pairs.jsonl", planted_rows()[:44])
    assert found("data.group_by_prompt=true")["data.train"]["repeated"] == [(at(41), at(1)), (at(42), at(2))]


@pytest.mark.parametrize(
    ("overrides", "error"),
    [(["loss.bta=1"], "loss.bta"), (["data.train.0.path=none.jsonl"], "none.jsonl does not exist")],
)
def test_mistakes(config: Path, overrides: list[str], error: str) -> None:
    assert error in refuse(config, *overrides, command="inspect")


# ---- --fix


def dropped(path: Path) -> list[tuple[str, str, str | None]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(Path(one["source"]).name, one["reason"], one["other"] and Path(one["other"]).name) for one in lines]


def test_fixed_data_have_no_faults(planted: Path) -> None:
    said = inspect(*HELD_OUT, "--fix", "clean.jsonl")
    assert "39 rows written to clean.jsonl; 8 rows left out, with reasons in clean.dropped.jsonl" in said
    assert dropped(planted / "clean.dropped.jsonl") == [
        (at(3), "contradicting", at(43)),
        (at(41), "repeated", at(1)),
        (at(42), "repeated", at(2)),
        (at(43), "contradicting", at(3)),
        (at(44), "near_pairs", at(4)),
        (at(45), "identical_completions", None),
        (at(46), "held_out_prompt", at(1, "held_out")),
        (at(47), "near_held_out_prompt", at(2, "held_out")),
    ]
    kept = [json.loads(line) for line in (planted / "clean.jsonl").read_text().splitlines()]
    assert kept == [row for number, row in enumerate(planted_rows()[:40], start=1) if number != 3]
    assert found(*HELD_OUT, "data.train.0.path=clean.jsonl") == {"data.train": {}, "held_out": {}}
    assert {path.name for path in planted.iterdir() if path.name.startswith(".")} == set()


def test_rows_are_written_as_they_were_read(config: Path) -> None:
    """Columns by other names, columns that mean nothing, letters of any kind; the same from two files."""
    rows = [
        {
            "a": {"b": row["prompt_ids"]},
            "yes": row["chosen_ids"],
            "rejected_ids": row["rejected_ids"],
            "note": "\u00e4\ud800",
        }
        for row in clean_rows(4, 1)
    ]
    write_rows(config / "pairs.jsonl", rows[:2])
    write_rows(config / "more.jsonl", [rows[1], *rows[2:]])
    columns = "{prompt_ids: a.b, chosen_ids: yes}"
    sources = ", ".join(f"{{path: {name}.jsonl, columns: {columns}}}" for name in ("pairs", "more"))
    inspect(f"data.train=[{sources}]", "--fix", "clean.jsonl")
    assert [json.loads(line) for line in (config / "clean.jsonl").read_bytes().splitlines()] == rows
    assert dropped(config / "clean.dropped.jsonl") == [(at(1, "more"), "repeated", at(2))]


def test_a_row_that_is_too_long_is_told_apart(config: Path) -> None:
    rows = clean_rows(4, 1)
    write_rows(config / "pairs.jsonl", [*rows, {**rows[0], "prompt_ids": [7] * 90}])
    inspect("data.max_length=80", "data.truncation_mode=drop", "--fix", "clean.jsonl")
    assert dropped(config / "clean.dropped.jsonl") == [(at(5), "over_long", None)]


def test_nothing_is_replaced_unasked(config: Path) -> None:
    (config / "there.jsonl").write_text("mine")
    (config / "other.dropped.jsonl").write_text("mine")
    for name in ("there", "other"):
        assert "or --overwrite" in refuse(config, "--fix", f"{name}.jsonl", command="inspect")
    inspect("--fix", "there.jsonl", "--overwrite")
    assert len((config / "there.jsonl").read_text().splitlines()) == 2
    assert "which is read" in refuse(config, "--fix", "pairs.jsonl", "--overwrite", command="inspect")
    assert "no JSON Lines file" in refuse(config, "--fix", "out.csv", command="inspect")
    assert "nothing can be written in" in refuse(config, "--fix", "none/out.jsonl", command="inspect")


def test_sources_of_two_forms_are_not_mixed(config: Path) -> None:
    (config / "text.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    sources = "data.train=[{path: pairs.jsonl}, {path: text.jsonl}]"
    assert "only one holds token ids" in refuse(config, sources, "--fix", "out.jsonl", command="inspect")
    sources = "data.train=[{path: pairs.jsonl}, {path: pairs.jsonl, columns: {prompt_ids: x}}]"
    assert "has other columns than" in refuse(config, sources, "--fix", "out.jsonl", command="inspect")


def test_what_data_holdout_holds_out_is_kept(config: Path) -> None:
    rows = clean_rows(40, 1)
    write_rows(config / "pairs.jsonl", rows)
    holdout = ("data.holdout=0.3", "evaluation.eval_steps=1")
    assert set(found(*holdout)) == {"data.train", "pairs:holdout"}
    inspect(*holdout, "--fix", "clean.jsonl")
    assert [json.loads(line) for line in (config / "clean.jsonl").read_text().splitlines()] == rows


def test_rated_completions_are_inspected_and_not_cleaned(config: Path) -> None:
    rows = clean_rows(4, 1)
    rated = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{kind}_ids"], "label": kind == "chosen"}
        for row in rows
        for kind in ("chosen", "rejected")
    ]
    write_rows(config / "pairs.jsonl", rated)
    assert found() == {"data.train": {}}
    assert "in no pair of its own" in refuse(config, "--fix", "clean.jsonl", command="inspect")
    assert not (config / "clean.jsonl").exists()


# ---- --html


def test_the_page_shows_texts_as_texts(planted: Path) -> None:
    """In a browser nothing of a row is markup, and nothing is fetched."""
    text = {"prompt": "<script>alert(1)</script>?", "chosen": "yes & <b>no</b>", "rejected": '"></pre><img src=x>'}
    write_rows(planted / "pairs.jsonl", [text, dict(text), {**text, "prompt": "</style><script src=//a.b/c>"}])
    save_tokenizer(planted / "model")
    values = json.loads((GOLDEN / "tiny_policy/config.json").read_text())
    (planted / "model/model.safetensors").touch()  # no weights are read
    (planted / "model/config.json").write_text(json.dumps({**values, "vocab_size": 512}))
    said = inspect("model.model_name_or_path=model", "--html", "out.html")
    assert "page written to out.html" in said
    page = (planted / "out.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;?" in page and "yes &amp; &lt;b&gt;no&lt;/b&gt;" in page
    parsed = Elements()
    parsed.feed(page)
    assert parsed.open == [] and {"svg", "table", "pre", "style"} <= parsed.names
    assert not parsed.names & {"script", "img", "link", "iframe"}
    assert not {name for name in parsed.attributes if name.startswith("on") or name in ("src", "href")}
    assert "prefers-color-scheme: dark" in page and "url(" not in page and "@import" not in page


class Elements(HTMLParser):
    """The elements of a page, and those that are never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_every_finding_and_replaces_nothing(planted: Path) -> None:
    inspect(*HELD_OUT, "--html", "out.html", "--json")
    page = (planted / "out.html").read_text(encoding="utf-8")
    for means in (
        "pairs said before: 2",
        "prompts that are trained on too: 1",
        "rows that are nearly an earlier one: 1",
    ):
        assert f"<summary>{means}</summary>" in page
    assert "identical_completions" in page and page.count("<svg") == 8
    assert "or --overwrite" in refuse(planted, "--html", "out.html", command="inspect")
    inspect("--html", "out.html", "--overwrite")
