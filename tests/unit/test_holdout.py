"""A share of the prompts held out of what is trained on: never on both sides, the same in every run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.cli.data_quality import describe_leaks
from dpo_dist.cli.reading import datasets_of
from dpo_dist.config import RunConfig
from dpo_dist.data.held_out import is_held_out
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset
from tests.byte_tokenizer import save_tokenizer

SHARE = 0.25


def row(prompt: str, number: int = 0) -> dict[str, Any]:
    return {"prompt": f"{prompt} ", "chosen": f"yes {number}", "rejected": f"no {number}"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def sides(tmp_path: Path) -> Any:
    """Training data and held-out sets of a run on these files."""
    spec = save_tokenizer(tmp_path / "tokenizer")

    def made(paths: list[Any], **data: Any) -> tuple[TokenizedDataset, dict[str, TokenizedDataset], RunConfig]:
        sources = [path if isinstance(path, dict) else {"path": path} for path in paths]
        config = RunConfig.model_validate(
            {
                "model": {"model_name_or_path": "demo"},
                "data": {"train": sources, **data},
                "train": {"output_dir": "out"},
                "evaluation": {"eval_steps": 1},
            }
        )
        found = datasets_of(config, spec, tmp_path / "cache", 10**6)
        return found.training, found.held_out, config

    return made


def prompts(dataset: TokenizedDataset) -> list[str]:
    places = (dataset.source_of(k).rpartition(":") for k in range(len(dataset)))
    return [json.loads(Path(path).read_text().splitlines()[int(line) - 1])["prompt"] for path, _, line in places]


def test_every_row_is_on_one_side_and_no_prompt_on_both(sides: Any, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [[row(f"question {draw.randrange(150)}", n) for n in range(200)] for _ in range(2)]
    paths = [write(tmp_path / f"{name}.jsonl", one) for name, one in zip("ab", rows, strict=True)]
    training, held_out, _ = sides(paths, holdout=SHARE)
    assert list(held_out) == ["a:holdout", "b:holdout"]
    assert len(training) + sum(map(len, held_out.values())) == 400
    shown = [training, *held_out.values()]
    trained, *out = ({place.rpartition(":")[::2] for place in map(one.source_of, range(len(one)))} for one in shown)
    assert [{path for path, _ in one} for one in out] == [{paths[0]}, {paths[1]}]
    assert trained | out[0] | out[1] == {(path, str(line)) for path in paths for line in range(1, 201)}
    # Across both files: a prompt that a is tested on is not trained on in b.
    assert describe_leaks({"data.train": training, **held_out}) == []
    assert 0.15 < sum(map(len, held_out.values())) / 400 < 0.35


def test_a_prompt_decides_by_itself(sides: Any, tmp_path: Path) -> None:
    rows = [row(f"question {n}") for n in range(100)]
    alone = prompts(sides([write(tmp_path / "a.jsonl", rows)], holdout=SHARE)[1]["a:holdout"])
    random.Random(1).shuffle(rows)
    others = [row(f"other {n}") for n in range(100)]
    mixed = sides([write(tmp_path / "b.jsonl", rows + others)], holdout=SHARE)[1]["b:holdout"]
    assert {one for one in prompts(mixed) if one.startswith("question")} == set(alone)
    wider = sides([str(tmp_path / "a.jsonl")], holdout=0.5)[1]["a:holdout"]
    assert set(alone) < set(prompts(wider))


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_share_is_kept(share: float) -> None:
    assert abs(sum(is_held_out((n, n + 1), share) for n in range(4000)) / 4000 - share) < 0.02
    assert not is_held_out((1, 2), 0.0) and is_held_out((1, 2), 1.0)


def chat(*said: str, **more: Any) -> dict[str, Any]:
    """A row whose prompt is a conversation, the user's turns and the assistant's in turn."""
    roles = ("user", "assistant")
    prompt = [{"role": roles[k % 2], "content": text, **more} for k, text in enumerate(said)]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([[chat(f"q{n}"), chat("older " * 30, "fine", f"q{n}")] for n in range(60)], {"max_length": 90}),
        ([[row(f"{'x' * 9}q{n}"), row(f"{'y' * 9}q{n}")] for n in range(60)], {"max_length": 17}),
        ([[chat(f"q{n}"), chat(f"q{n}", id="m1")] for n in range(60)], {}),
    ],
    ids=["fewer turns", "the same end", "another key"],
)
def test_prompts_that_are_the_same_to_the_model_are_on_one_side(
    sides: Any, tmp_path: Path, rows: list[list[dict[str, Any]]], settings: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.jsonl", [one for both in rows for one in both])
    training, held_out, _ = sides([path], holdout=0.3, truncation_mode="keep_end_of_prompt", **settings)
    assert describe_leaks({"data.train": training, **held_out}) == []
    total = [training, *held_out.values()]
    assert sum(map(len, total)) == 120 and len(held_out["a:holdout"]) > 5
    # What was decided for a row is told where the row is.
    shortened = [dataset.notes.get("prompt_shortened", 0) for dataset in total]
    assert all(0 <= count <= len(dataset) for count, dataset in zip(shortened, total, strict=True))


def test_an_entry_without_a_held_out_prompt_is_passed_over(
    sides: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = [n for n in range(3, 99) if not is_held_out((n,), 0.3)][:2]
    rows = [{"prompt_ids": [n], "chosen_ids": [1], "rejected_ids": [2]} for n in kept]
    paths = [write(tmp_path / "large.jsonl", [row(f"question {n}") for n in range(60)])]
    paths.append(write(tmp_path / "small.jsonl", rows))
    training, held_out, _ = sides(paths, holdout=0.3)
    assert list(held_out) == ["large:holdout"]
    assert "holds out no prompt of data.train.1.path" in caplog.text
    assert len(training) + len(held_out["large:holdout"]) == 62


def test_held_out_ratings_that_nothing_is_paired_with_refuse_no_run(
    sides: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A version of feedback whose held-out thumbs are all up."""
    ids = [n for n in range(3, 99) if is_held_out((n,), 0.3)][:3]
    thumbs = [{"prompt_ids": [n], "completion_ids": [1], "label": True} for n in ids]
    kept = next(n for n in range(3, 99) if not is_held_out((n,), 0.3))
    thumbs += [{"prompt_ids": [kept], "completion_ids": [k], "label": k == 1} for k in (1, 2)]
    paths = [write(tmp_path / "large.jsonl", [row(f"question {n}") for n in range(60)])]
    paths.append(write(tmp_path / "thumbs.jsonl", thumbs))
    _, held_out, _ = sides(paths, holdout=0.3)
    assert list(held_out) == ["large:holdout"]
    assert "none of the 3 rows held out of" in caplog.text and "unpaired: 3" in caplog.text


def test_names_of_entries_that_look_alike(sides: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(f"question {n}") for n in range(40)])
    other = write(tmp_path / "held.jsonl", [row("elsewhere")])
    paths = [path, {"path": path, "limit": 30}]
    _, held_out, config = sides(paths, holdout=SHARE, evaluation=[{"path": other}])
    assert list(held_out) == ["held", "a:holdout", "a:holdout1"]
    assert config.data.has_held_out


def test_bad_rows_are_told_of_once(sides: Any, tmp_path: Path) -> None:
    rows = [row(f"question {n}") for n in range(40)]
    bad = [{"prompt": "p", "chosen": "a"}, {**row("q"), "rejected": "yes 0"}]
    path = write(tmp_path / "a.jsonl", [*rows, *bad])
    training, held_out, _ = sides([path], holdout=SHARE, on_bad_row="skip")
    assert training.bad_rows == {"missing_column": 1, "identical_completions": 1}
    assert held_out["a:holdout"].bad_rows == {}
    with pytest.raises(DataError, match="2 of 32 rows cannot be used"):
        sides([path], holdout=SHARE)


@pytest.mark.parametrize(("held_out", "share", "side"), [(False, 0.3, "no prompt"), (True, 0.3, "all prompts")])
def test_a_share_that_leaves_a_side_empty(sides: Any, tmp_path: Path, held_out: bool, share: float, side: str) -> None:
    one = next(n for n in range(3, 99) if is_held_out((n,), share) == held_out)
    path = write(tmp_path / "a.jsonl", [{"prompt_ids": [one], "chosen_ids": [1], "rejected_ids": [2]}])
    with pytest.raises(DataError, match=rf"data.holdout={share} holds out {side} of data.train.0.path=.*; choose"):
        sides([path], holdout=share)


def test_a_fraction_that_leaves_nothing(sides: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(f"{n}") for n in range(10)])
    with pytest.raises(DataError, match=r"data.train.0.fraction=0.05 leaves no row of .*a.jsonl; raise it"):
        sides([{"path": path, "fraction": 0.05}], evaluation=[{"path": path}])
