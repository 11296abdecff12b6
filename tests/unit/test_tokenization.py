"""Token ids of strings, conversations and ready ids; the cache; what a data set tells about itself."""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.data import Pair, PreferenceExample, RowFault
from dpo_dist.data.example import EMPTY_COMPLETION
from dpo_dist.demo import demo_model_folder
from dpo_dist.durable import locked
from dpo_dist.errors import DataError, ModelError
from dpo_dist.tokenization import (
    TokenizedDataset,
    TokenizerSpec,
    load_tokenizer,
    prepare,
    prepare_dataset,
    repeated_data,
    writing,
)
from dpo_dist.tokenization.encode import Encoder
from dpo_dist.tokenization.tokenizer import tokenizer_digest
from tests.byte_tokenizer import BOS, CHATML, EOS, save_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
CACHE = Path(
    os.environ.get("DPO_DIST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_dist"
)
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")

USER = {"role": "user", "content": "Hi"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def run(tmp_path: Path, spec: TokenizerSpec) -> Any:
    """Tokenise rows with the small tokenizer."""

    def tokenized(rows: list[Any], tokenizer: TokenizerSpec = spec, **settings: Any) -> TokenizedDataset:
        source = write(tmp_path / "pairs.jsonl", rows)
        return prepare_dataset([source], DataConfig(train=[source], **settings), tokenizer, tmp_path / "cache")

    return tokenized


def write(path: Path, rows: list[Any]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


def decoded(dataset: TokenizedDataset, spec: TokenizerSpec, index: int = 0) -> tuple[str, ...]:
    sample = dataset.sample(index, load_tokenizer(spec))
    return (sample.prompt, *sample.completions)


def strings(count: int, *, length: int = 3) -> list[dict[str, str]]:
    return [{"prompt": f"p{n}", "chosen": "c" * length, "rejected": "r" * length} for n in range(count)]


def token_ids(count: int) -> list[dict[str, list[int]]]:
    return [{"prompt_ids": [n, 1], "chosen_ids": [2, 3, n], "rejected_ids": [4]} for n in range(count)]


# ---- strings


def test_strings_get_bos_before_the_prompt_and_one_eos_after_completions(run: Any) -> None:
    (example,) = run([{"prompt": "ab", "chosen": "cde</s>", "rejected": " " + "long" * 5}])
    assert example.prompt_ids[0] == BOS and len(example.prompt_ids) == 3
    assert EOS not in example.prompt_ids
    assert [ids.count(EOS) for ids in example.completion_ids] == [1, 1]
    assert [ids[-1] for ids in example.completion_ids] == [EOS, EOS]
    assert [len(ids) for ids in example.completion_ids] == [4, 22]
    assert BOS not in example.completion_ids[0] + example.completion_ids[1]


def test_a_prompt_written_with_its_bos_gets_no_second_one(run: Any) -> None:
    (example,) = run([{"prompt": "<s>ab", "chosen": "c", "rejected": "d"}])
    assert example.prompt_ids.count(BOS) == 1 and len(example.prompt_ids) == 3


def test_a_tokenizer_that_adds_nothing(run: Any, tmp_path: Path, spec: TokenizerSpec) -> None:
    plain = save_tokenizer(tmp_path / "plain", bos=False)
    (example,) = run([{"prompt": "ab", "chosen": "c", "rejected": "d"}], plain)
    assert len(example.prompt_ids) == 2 and BOS not in example.prompt_ids


def test_strings_need_an_eos_token(run: Any, tmp_path: Path) -> None:
    without = save_tokenizer(tmp_path / "no_eos", eos=None)
    with pytest.raises(ModelError, match=r"no_eos has no EOS token, and .*pairs\.jsonl:1 holds strings"):
        run(strings(1), without)


# ---- conversations


def test_a_completion_is_all_that_the_template_renders_after_the_generation_header(
    run: Any, spec: TokenizerSpec
) -> None:
    dataset = run([{"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]}])
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(dataset, spec) == (prompt, "yes<|im_end|>\n", "no<|im_end|>\n")
    example = dataset[0]
    assert BOS not in example.prompt_ids and EOS not in example.completion_ids[0]
    assert dataset.notes == {}


def test_a_completion_of_several_messages(run: Any, spec: TokenizerSpec) -> None:
    chosen = [says("calling"), {"role": "tool", "content": "12:00"}, says("noon")]
    dataset = run([{"prompt": [USER], "chosen": chosen, "rejected": [says("no")]}])
    expected = "calling<|im_end|>\n<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\nnoon<|im_end|>\n"
    assert decoded(dataset, spec)[1] == expected


def test_tools_reach_the_template(run: Any, tmp_path: Path) -> None:
    template = "{% for t in tools %}{{ t['function']['name'] }}{% endfor %}" + CHATML
    spec = save_tokenizer(tmp_path / "tools", template)
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    rows = [{"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")], "tools": json.dumps([tool])}]
    assert decoded(run(rows, spec), spec)[0].startswith("clock<|im_start|>user")


def test_text_that_merges_across_the_border_keeps_the_prompt_the_model_is_asked_with(run: Any, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'][0] + '\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a\n' }}{% endif %}"
    )
    spec = save_tokenizer(tmp_path / "merging", template)
    dataset = run([{"prompt": [USER], "chosen": [says("\nyes")], "rejected": [says("no")]}], spec)
    assert decoded(dataset, spec) == ("u\nHia\n", "\nyes", "no")
    assert dataset.notes == {"boundary_merged": 1}


def test_prompt_rendered_in_another_way_once_an_answer_follows(run: Any, tmp_path: Path) -> None:
    """As templates of reasoning models do. The border moves to where all renderings agree, and no token is lost."""
    template = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    spec = save_tokenizer(tmp_path / "thinking", template)
    dataset = run([{"prompt": [USER], "chosen": [says("<thing")], "rejected": [says("no")]}], spec)
    assert decoded(dataset, spec) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<thing<|im_end|>\n",
        "no<|im_end|>\n",
    )
    assert dataset.notes == {"prompt_not_a_prefix": 1}


def test_messages_without_a_chat_template(run: Any, tmp_path: Path) -> None:
    spec = save_tokenizer(tmp_path / "base", template=None)
    rows = [{"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]}]
    with pytest.raises(ModelError, match=r"base has no chat template, and .*pairs\.jsonl:1 holds chat messages; name"):
        run(rows, spec, on_bad_row="skip")


def test_a_conversation_that_the_template_refuses(run: Any, tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    spec = save_tokenizer(tmp_path / "strict", template)
    row = {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]}
    rows = [row, {**row, "prompt": [{"role": "system", "content": "x"}, USER]}]
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: the chat template refuses .*no system turn"):
        run(rows, spec)
    assert run(rows, spec, on_bad_row="skip").bad_rows == {"template_error": 1}


def test_a_template_that_writes_the_date_is_reported(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = save_tokenizer(tmp_path / "dated", "{{ strftime_now('%Y') }}" + CHATML)
    run([{"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]}], spec)
    assert "writes today's date into prompts" in caplog.text


# ---- ready ids


def test_token_ids_are_used_as_they_are_and_no_tokenizer_is_loaded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "load_tokenizer", lambda _: pytest.fail("loaded a tokenizer"))
    dataset = run(token_ids(3), TokenizerSpec("/nowhere"))
    assert dataset[2].prompt_ids == (2, 1)
    assert dataset[2].completion_ids == ((2, 3, 2), (4,))
    assert dataset[2].pairs == (Pair(0, 1),)
    assert dataset.sample(2).completions == ("2 3 2", "4")


# ---- length


def test_over_long_pairs(run: Any) -> None:
    rows = [{"prompt": "12345", "chosen": "abc", "rejected": "abcdefgh"}, *strings(1)]
    # <s>12345 is 6 tokens, abcdefgh</s> 9.
    assert len(run(rows, max_length=15)) == 2
    message = r"pairs\.jsonl:1: prompt and completion have 15 tokens \(the prompt 6\), data\.max_length=14; raise"
    with pytest.raises(DataError, match=message):
        run(rows, max_length=14)
    for settings in ({"truncation_mode": "drop"}, {"on_bad_row": "skip"}):
        dataset = run(rows, max_length=14, **settings)
        assert (len(dataset), dataset.bad_rows) == (1, {"over_long": 1})


def test_keep_start_cuts_completions_at_the_end_and_adds_no_eos(run: Any) -> None:
    rows = [{"prompt": "12345", "chosen": "abc", "rejected": "XYcdefgh"}]
    dataset = run(rows, max_length=8, truncation_mode="keep_start")
    chosen, rejected = dataset[0].completion_ids
    assert (len(dataset[0].prompt_ids), len(chosen), len(rejected)) == (6, 2, 2)
    assert EOS not in chosen + rejected
    assert dataset.notes == {"truncated": 1}


def test_keep_start_drops_a_prompt_that_fills_the_limit_and_what_became_equal(run: Any) -> None:
    rows = [{"prompt": "12345", "chosen": "abc", "rejected": "abd"}, *strings(1)]
    dataset = run(rows, max_length=6, truncation_mode="keep_start")
    assert (len(dataset), dataset.bad_rows) == (1, {"over_long": 1})
    dataset = run(rows, max_length=8, truncation_mode="keep_start")
    assert (len(dataset), dataset.bad_rows, dataset.notes) == (1, {"cut_alike": 1}, {})
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*identical within data\.max_length=8; raise"):
        run(rows[:1], max_length=8, truncation_mode="keep_start")


# ---- bad rows


def test_bad_rows_are_errors_or_counted(run: Any) -> None:
    rows = [
        *strings(300),
        {"prompt": "p", "chosen": "c", "rejected": ""},
        {"prompt": "p", "chosen": "c", "rejected": "c"},
    ]
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:301: the rejected completion is empty; repair .*on_bad_row=skip"
    ):
        run(rows[:301])
    dataset = run(rows, on_bad_row="skip")
    assert len(dataset) == 300
    assert dataset.bad_rows == {"empty_completion": 1, "identical_completions": 1}


@pytest.mark.parametrize("completions", [((2,), ()), ((), (2,)), ((), ())])
def test_a_completion_without_a_token_is_a_fault_beside_one_that_has_some(completions: Any) -> None:
    """As where a tokenizer drops all of a text."""
    data = DataConfig(train=[DataSource(path="unread")])
    example = PreferenceExample((1,), completions, (Pair(0, 1),), None, "pairs.jsonl:1")
    (fault,) = Encoder(data, None, "").encode([example])
    assert isinstance(fault, RowFault) and fault.reason == EMPTY_COMPLETION


def test_no_usable_row_is_always_an_error(run: Any) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": ""}, *strings(2, length=90)]
    message = (
        r"data\.train\.0: none of the 3 rows of .*pairs\.jsonl can be used \(empty_completion: 1, over_long: 2\); "
    )
    with pytest.raises(DataError, match=message):
        run(rows, on_bad_row="skip", max_length=20)


def test_a_bad_row_behind_good_ones_leaves_nothing_behind(run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:1501: no column chosen"):
        run([*strings(1500), {"prompt": "p"}])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


# ---- the data set


def test_many_batches_and_random_access(run: Any) -> None:
    dataset = run(token_ids(2500))
    assert len(dataset) == 2500 and len(dataset._batches) == 3
    for index in (0, 1023, 1024, 2047, 2048, 2499, -1):
        position = index % 2500
        assert dataset[index].prompt_ids == (position, 1)
        assert dataset.source_of(index).endswith(f"pairs.jsonl:{position + 1}")
    assert [example.prompt_ids[0] for example in dataset[2046:2050]] == [2046, 2047, 2048, 2049]
    with pytest.raises(IndexError):
        dataset[2500]
    assert dataset.prompt_lengths.dtype == np.int64 and dataset.prompt_lengths.tolist() == [2] * 2500
    assert len(dataset.completion_lengths) == 2500 and set(dataset.completion_lengths) == {(3, 1)}
    assert dataset.max_token_id == 2499


def test_stats(run: Any) -> None:
    stats = run(
        [
            {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]},
            {"prompt_ids": [1, 1, 1], "chosen_ids": [2], "rejected_ids": [4, 4, 4, 4]},
        ]
    ).stats()
    # Every percentile is a length that there is, here one of two.
    assert (stats["prompt"]["min"], stats["prompt"]["p50"], stats["prompt"]["max"]) == (1, 3, 3)
    assert [stats["completion"][name] for name in ("p5", "p25", "p50", "p75", "p99")] == [1, 1, 2, 4, 4]
    assert (stats["completion"]["sum"], stats["completion"]["mean"]) == (8, 2)
    assert (stats["sequence"]["min"], stats["sequence"]["max"], stats["sequence"]["sum"]) == (2, 7, 16)
    assert (stats["example"]["min"], stats["example"]["max"]) == (4, 8)


def test_ignored_columns_are_told_again_when_the_data_are_found_in_the_cache(tmp_path: Path, run: Any) -> None:
    rows = [{**row, "source": "web", "score_chosen": 1} for row in strings(3)]
    for _ in range(2):
        assert run(rows).ignored_columns == ("score_chosen", "source")
    assert len(list((tmp_path / "cache").glob("*/summary.json"))) == 1
    assert run(strings(3)).ignored_columns == ()


def test_system_column_reaches_the_template(run: Any, spec: TokenizerSpec) -> None:
    row = {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")], "system": "Be brief."}
    assert decoded(run([row]), spec)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_data_that_are_named_twice_are_found(tmp_path: Path, spec: TokenizerSpec) -> None:
    def found(train: list[DataSource], evaluation: list[DataSource]) -> list[str]:
        data = DataConfig(train=train, evaluation=evaluation)
        sets = [prepare_dataset(part, data, spec, tmp_path / "cache") for part in (train, *([e] for e in evaluation))]
        return repeated_data(data, sets[0], sets[1:])

    first, other = write(tmp_path / "a.jsonl", token_ids(3)), write(tmp_path / "b.jsonl", token_ids(4))
    copy = write(tmp_path / "copy.jsonl", token_ids(3))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    link, part = DataSource(path=str(tmp_path / "link.jsonl")), first.model_copy(update={"limit": 2})
    assert found([first], [other]) == found([first, other], [copy]) == []
    twice = "names the same data as data.train.0: its rows are trained on twice in an epoch"
    assert found([first, other, link], []) == [f"data.train.2.path={link.path} {twice}"]
    measured = "what it measures was trained on"
    assert found([other, first], [part, other]) == [
        f"data.evaluation.0.path={part.path} names the same data as data.train.1: {measured}",
        f"data.evaluation.1.path={other.path} names the same data as data.train.0: {measured}",
    ]
    assert found([first], [other, copy]) == [
        f"data.evaluation.1.path={copy.path} holds the same examples as data.train: {measured}"
    ]


def test_check_vocabulary_names_the_row_and_the_id(run: Any) -> None:
    rows = token_ids(1500)
    rows[1200]["rejected_ids"] = [4, 70_000, 5]
    dataset = run(rows)
    dataset.check_vocabulary(70_001)
    message = r"pairs\.jsonl:1201: token id 70000 of the completion 1 is outside the model's vocabulary \(0 to 69999\)"
    with pytest.raises(DataError, match=message):
        dataset.check_vocabulary(70_000)


def test_fingerprint_is_of_ids_and_pairs_only(tmp_path: Path, spec: TokenizerSpec) -> None:
    def fingerprint(name: str, rows: list[Any], **settings: Any) -> str:
        source = write(tmp_path / f"{name}.jsonl", rows)
        data = DataConfig(train=[source], **settings)
        return prepare_dataset([source], data, spec, tmp_path / f"cache_{name}").fingerprint

    first = fingerprint("a", token_ids(3))
    assert first == "77b81e8649b61bc1959568a5129ef31f0f21cd9face6badf033c029fbad39126"
    assert fingerprint("b", token_ids(3), max_length=100) == first
    assert fingerprint("c", token_ids(3)[::-1]) != first
    # Where one list ends and the next begins counts.
    moved = [{"prompt_ids": [0, 1, 2], "chosen_ids": [3, 0], "rejected_ids": [4]}, *token_ids(3)[1:]]
    assert fingerprint("d", moved) != first


def test_sources_follow_each_other_and_keep_their_limits(tmp_path: Path, spec: TokenizerSpec) -> None:
    sources = [
        write(tmp_path / "a.jsonl", strings(5)).model_copy(update={"limit": 2}),
        write(tmp_path / "b.jsonl", token_ids(3)),
    ]
    dataset = prepare_dataset(sources, DataConfig(train=sources), spec, tmp_path / "cache")
    names = [Path(dataset.source_of(index)).name for index in range(len(dataset))]
    assert names == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]


def test_messages_name_the_entry_of_the_configuration(tmp_path: Path, spec: TokenizerSpec) -> None:
    source = DataSource(path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match=r"^data\.evaluation\.3\.path="):
        prepare_dataset([source], DataConfig(train=[source]), spec, tmp_path, section="data.evaluation", first_index=3)


# ---- the tokenizer


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.tokenizer_name_or_path=.*/none does not exist; give"):
        load_tokenizer(TokenizerSpec(str(tmp_path / "none")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"^model\.model_name_or_path=.* holds no tokenizer that can be loaded \(.*; give"
    ):
        load_tokenizer(TokenizerSpec(str(tmp_path), key="model.model_name_or_path"))


def test_code_of_a_tokenizer_runs_only_if_it_is_trusted(spec: TokenizerSpec) -> None:
    folder = Path(spec.path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    marker = folder / "code_ran"
    (folder / "mine.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(marker)!r}, 'w').close()\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(
        ModelError, match=r"needs code of its own, which is not run unasked; .*model\.trust_remote_code=true"
    ):
        load_tokenizer(spec)
    assert not marker.exists()
    load_tokenizer(TokenizerSpec(spec.path, trust_remote_code=True))
    assert marker.exists()


def test_digest_follows_the_content_of_a_tokenizer(tmp_path: Path, spec: TokenizerSpec) -> None:
    digest = tokenizer_digest(load_tokenizer(spec))
    assert tokenizer_digest(load_tokenizer(save_tokenizer(tmp_path / "same"))) == digest
    assert tokenizer_digest(load_tokenizer(save_tokenizer(tmp_path / "other", CHATML + " "))) != digest
    assert tokenizer_digest(load_tokenizer(save_tokenizer(tmp_path / "bare", bos=False))) != digest


# ---- the cache


def test_found_again_until_something_that_matters_changes(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def tokenised(rows: list[Any], **settings: Any) -> bool:
        caplog.clear()
        run(rows, **settings)
        return "tokenised" in caplog.text

    assert tokenised(strings(3))
    os.utime(tmp_path / "pairs.jsonl", (0, 0))
    assert not tokenised(strings(3))
    assert tokenised(strings(4))
    assert tokenised(strings(3), max_length=50)
    assert tokenised(strings(3), max_length=50, truncation_mode="drop")
    assert tokenised(strings(3), on_bad_row="skip")
    assert tokenised(strings(3), tokenizer=save_tokenizer(tmp_path / "other", CHATML + " "))
    assert not tokenised(strings(3))


def test_a_damaged_cache_is_written_again(run: Any, tmp_path: Path) -> None:
    fingerprint = run(token_ids(50)).fingerprint
    (file,) = (tmp_path / "cache").glob("*/examples.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    assert run(token_ids(50)).fingerprint == fingerprint
    (file.parent / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"not a whole tokenised data set \(.*\); delete the folder"):
        TokenizedDataset(file.parent)
    assert run(token_ids(50)).fingerprint == fingerprint


def test_a_full_disk_is_the_users_to_solve(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.ExampleWriter, "finish", full)
    with pytest.raises(
        DataError, match=r"/cache: tokenised data cannot be written \(No space left on device\); make room"
    ):
        run(token_ids(5))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_progress_is_logged(run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("dpo_dist.tokenization.progress._LOG_EVERY_S", 0.0)
    run(strings(600))
    assert "data.train.0: 512 rows read," in caplog.text


def test_waiting_for_the_lock_is_logged_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("dpo_dist.durable._LOG_EVERY_S", 0.05)
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "x", "tokenises the same data"):
            entered.set()

    waiter = threading.Thread(target=wait)
    with locked(tmp_path / "x", "tokenises the same data"):
        waiter.start()
        assert not entered.wait(0.3)
    waiter.join(timeout=10)
    assert entered.is_set()
    assert "waiting for another process that tokenises the same data" in caplog.text


# ---- golden: the real tokenizer


@pytest.fixture(scope="module")
def demo() -> TokenizerSpec:
    return TokenizerSpec(str(demo_model_folder(CACHE)))


@needs_shared_data
@pytest.mark.parametrize(
    ("file", "case"), [("hh_rlhf_harmless.jsonl.gz", "hh_rlhf_harmless"), ("dpo_en_demo.json.gz", "dpo_en_demo")]
)
def test_token_counts_equal_those_recorded_from_transformers(
    file: str, case: str, demo: TokenizerSpec, tmp_path: Path
) -> None:
    golden = json.loads((REPOSITORY / "tests" / "golden" / "smollm2_logps.json").read_text())[case]
    source = DataSource(path=str(SHARED_DATA / file))
    dataset = prepare_dataset([source], DataConfig(train=[source], on_bad_row="skip"), demo, tmp_path)
    lines = {dataset.source_of(index).rsplit(":", 1)[1]: index for index in range(len(dataset))}
    # HH-RLHF is recorded by line, the JSON array by index.
    rows = [lines[str(row["line"])] if "line" in row else row["index"] for row in golden]
    counts = [(int(dataset.prompt_lengths[row]), *dataset.completion_lengths[row]) for row in rows]
    assert counts == [(row["prompt_tokens"], row["chosen_tokens"], row["rejected_tokens"]) for row in golden]
    assert len(counts) == {"hh_rlhf_harmless": 24, "dpo_en_demo": 16}[case]


def test_the_projects_own_pairs_with_the_demo_tokenizer(demo: TokenizerSpec, tmp_path: Path) -> None:
    """Counts recorded with plain transformers: len(tokenizer(text).input_ids) of the rendered conversation."""
    source = DataSource(path=str(REPOSITORY / "configs" / "demo" / "train.jsonl"))
    dataset = prepare_dataset([source], DataConfig(train=[source]), demo, tmp_path)
    tokenizer = load_tokenizer(demo)
    for index, line in enumerate(Path(source.path).read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        for name, completion in zip(("chosen", "rejected"), dataset[index].completion_ids, strict=True):
            whole: Any = tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False)
            assert dataset[index].prompt_ids + completion == tuple(whole)
    assert (len(dataset), dataset.bad_rows, dataset.notes) == (48, {}, {})


def test_arrow_file_is_mapped_not_read(run: Any, tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    dataset = run(token_ids(5000))
    reopened = TokenizedDataset(next((tmp_path / "cache").glob("*/")))
    assert reopened[4999] == dataset[4999]
    assert pa.total_allocated_bytes() - before < 4096
