"""A cache of reference log-probabilities on real ranks, and in processes that are killed while they fill it."""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.reference.keys import dataset_keys
from dpo_dist.reference.store import ReferenceStore
from tests.forking import fork_ranks
from tests.launching import REPOSITORY, environment, succeeded
from tests.processes.cache_children import IDENTITY
from tests.stored_rows import Ids, examples_of, save_dataset, value_of

FIRST, OTHERS = examples_of(14, seed=1), examples_of(6, seed=2)
DATA = {"first": FIRST, "mixed": [FIRST[3], *OTHERS[:3], FIRST[3], FIRST[5], OTHERS[1]], "new": [*OTHERS, FIRST[0]]}


def completions(*names: str) -> set[tuple[Ids, Ids]]:
    """Different completions of some data sets."""
    return {(one.prompt_ids, ids) for name in names for one in DATA[name] for ids in one.completion_ids}


@pytest.fixture(scope="module", params=[1, 2])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    succeeded(fork_ranks(request.param, "tests.processes.cache_worker", str(folder), cwd=folder, timeout=240))
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(request.param)]


def on_all(seen: list[dict[str, Any]], part: str, key: str) -> Any:
    """What all ranks saw, which must be the same."""
    values = [one[part][key] for one in seen]
    assert all(value == values[0] for value in values)
    return values[0]


def rows_of(seen: list[dict[str, Any]], part: str, key: str) -> Counter[tuple[Ids, Ids]]:
    """How often each completion was computed, on all ranks together."""
    return Counter((tuple(prompt), tuple(ids)) for one in seen for prompt, ids in one[part][key])


def check_answers(answers: list[list[list[Any]]], name: str) -> None:
    """Of all ranks together: every completion once, with its value."""
    found = sorted(answer for one in answers for answer in one)
    assert found == [
        [row, k, value_of(example.prompt_ids, ids)]
        for row, example in enumerate(DATA[name])
        for k, ids in enumerate(example.completion_ids)
    ]


def test_every_different_completion_is_computed_once(seen: list[dict[str, Any]]) -> None:
    wanted = completions("first", "mixed")
    assert sum(len(one.completion_ids) for name in ("first", "mixed") for one in DATA[name]) > len(wanted)
    assert on_all(seen, "filling", "empty") == [0, len(wanted)]
    assert on_all(seen, "filling", "full") == [len(wanted), 0]
    assert rows_of(seen, "filling", "computed") == Counter(wanted)
    assert all(one["filling"]["computed"] for one in seen)  # every rank has taken part
    progress = on_all(seen, "filling", "progress")
    assert len(progress) > 1 and progress[-1] == [len(wanted)] * 2 and progress == sorted(progress)


def test_what_is_stored_is_found_by_data_set_and_row(seen: list[dict[str, Any]]) -> None:
    for name in ("first", "mixed"):
        check_answers([one["filling"]["answers"][name] for one in seen], name)
        check_answers([one["filling"]["answers again"][name] for one in seen], name)
    for name in ("first", "new"):
        check_answers([one["filling"]["answers for more"][name] for one in seen], name)
    message = "this data set was not looked up when the cache was opened"
    assert on_all(seen, "filling", "not looked up") == ["RuntimeError", message]
    kind, message = on_all(seen, "filling", "too early")
    assert kind == "RuntimeError" and "are missing; call fill first" in message


def test_nothing_is_computed_again(seen: list[dict[str, Any]]) -> None:
    assert on_all(seen, "filling", "again") == [len(completions("first", "mixed")), 0]
    assert rows_of(seen, "filling", "computed again") == Counter()
    new = completions("new", "first") - completions("first", "mixed")
    assert on_all(seen, "filling", "more") == [len(completions("new", "first")) - len(new), len(new)]
    assert rows_of(seen, "filling", "computed for more") == Counter(new) and new


def test_tokens_that_are_added_leave_the_sums(seen: list[dict[str, Any]]) -> None:
    wanted = completions("first", "new")
    assert on_all(seen, "tokens", "before") == [0, len(wanted)]
    assert rows_of(seen, "tokens", "computed") == Counter(wanted)
    check_answers([one["tokens"]["answers"] for one in seen], "first")
    assert [one["tokens"]["after"][:2] for one in seen] == [[len(wanted), 0]] * len(seen)
    check_answers([one["tokens"]["after"][2:] for one in seen], "first")
    # Of rows that were not there before the sums are what was computed now.
    new = {(row, k): value for one in seen for row, k, value in one["tokens"]["new"]}
    assert sum(abs(value - value_of(DATA["new"][row].prompt_ids, DATA["new"][row].completion_ids[k])) > 5e-4
               for (row, k), value in new.items()) == len(completions("new") - completions("first"))  # fmt: skip
    for row, k, total, tokens in seen[0]["tokens"]["stored"]:
        example = FIRST[row]
        ids = example.completion_ids[k]
        assert total == value_of(example.prompt_ids, ids) and len(tokens) == len(ids)
        for place, value in enumerate(tokens):
            prefix = (*example.prompt_ids, *ids[:place])
            assert abs(value - value_of(prefix, ids[place : place + 1]) - 1e-3) < 1e-5
    assert len(seen[0]["tokens"]["stored"]) == len(completions("first"))


def test_some_stored_rows_are_computed_once_more(seen: list[dict[str, Any]]) -> None:
    assert on_all(seen, "verifying", "honest") == on_all(seen, "verifying", "everything") == []
    asked = rows_of(seen, "verifying", "asked")
    assert asked.total() == 9 and asked.keys() & completions("first") and asked.keys() - completions("first")
    assert on_all(seen, "verifying", "trusted") == on_all(seen, "verifying", "own") == []


def test_values_of_another_reference_are_refused(seen: list[dict[str, Any]]) -> None:
    kind, message = on_all(seen, "verifying", "another model")
    assert kind == "ConfigError" and "of 3 rows computed again 3 differ by up to 0.0" in message
    kind, message = on_all(seen, "verifying", "not finite")
    assert kind == "NumericsError" and "weight in its folder is NaN or infinite: copy the model again" in message
    kind, message = on_all(seen, "verifying", "planted")
    num_rows = sum(len(one.completion_ids) for one in FIRST)
    assert kind == "ConfigError"
    assert message.split("/")[-1].startswith(
        f"planted: stored log-probabilities are not those of this reference: of {num_rows} rows computed again 1 "
        "differ by up to 0.75 nats, rounding explains "
    )
    assert message.endswith("the cache is stale or damaged: delete it, or set another reference.cache_dir")


def test_an_error_of_one_rank_ends_all(seen: list[dict[str, Any]]) -> None:
    ends = [one["failing"]["one rank"] for one in seen]
    assert ends[-1] == ["MemoryError", "no room"]
    assert ends[:-1] == [["RuntimeError", "rank 1 failed: MemoryError: no room"]] * (len(seen) - 1)
    kind, message = on_all(seen, "failing", "not finite")
    assert kind == "NumericsError" and message.startswith("pairs.jsonl:0: the reference gives a completion the log-p")
    assert on_all(seen, "failing", "missing") == len(completions("first"))  # nothing of it was stored
    kind, message = on_all(seen, "failing", "other")
    assert kind == "ConfigError" and "weights=weights (this run: other)" in message
    if len(seen) > 1:
        assert on_all(seen, "failing", "data differ")[0] == "RankMismatchError"


# ---- kills


class Children:
    """Processes that fill one cache, and what they have computed."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder = folder
        # More than a fast machine gets through before ten kills.
        self.examples = [examples_of(240, seed=3), [*examples_of(80, seed=4), *examples_of(20, seed=3)]]
        self.datasets = [save_dataset(folder / f"data/{i}", examples) for i, examples in enumerate(self.examples)]
        flat = [(one.prompt_ids, ids) for examples in self.examples for one in examples for ids in one.completion_ids]
        self.row_of = {key.tobytes(): row for key, row in zip(dataset_keys(self.datasets), flat, strict=True)}
        self._process = process

    def run(self, *children: dict[str, Any]) -> list[int]:
        """Exit codes of children that ran at the same time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([str(self.folder), children]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:  # DeepSpeed prints there when it is imported
            if line.startswith("ended "):
                return json.loads(line.removeprefix("ended "))
        raise AssertionError("the process that forks children has ended")

    def log(self) -> list[tuple[Ids, Ids] | None]:
        """Every row that was computed, in order; None where all before were said to be durable."""
        path = self.folder / "computed.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [None if (row := json.loads(line)) is None else (tuple(row[0]), tuple(row[1])) for line in lines]

    def stored(self) -> set[tuple[Ids, Ids]]:
        """All rows that can be read; each has its value."""
        stored = ReferenceStore(self.folder / "cache", IDENTITY).read()
        rows = [self.row_of[key.tobytes()] for key in stored.keys]
        assert len(set(rows)) == len(rows)
        assert [value_of(*row) for row in rows] == stored.logps.tolist()
        return set(rows)


@pytest.fixture(scope="module")
def forking() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.processes.cache_children"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def children(tmp_path: Path, forking: subprocess.Popen[str]) -> Children:
    return Children(tmp_path, forking)


def test_ten_kills_cost_no_finished_row_and_make_no_wrong_one(children: Children) -> None:
    """Five at any moment, five in the middle of a write."""
    chance = random.Random(20)
    log, durable = [], set()
    for kill in range(10):
        child: dict[str, Any] = {"name": f"child{kill}", "pause_s": 0.005}
        if kill % 2:
            child["write"] = [chance.randrange(6), -1 if kill == 5 else chance.randrange(1, 700)]
        else:
            child["kill_s"] = chance.uniform(0.005, 0.06)
        assert children.run(child) == [-9], (children.folder / f"child{kill}.log").read_text()
        computed, log = children.log()[len(log) :], children.log()
        assert not durable & set(computed), "a row that was there was computed again"
        before, durable = durable, children.stored()
        assert before <= durable
        said = {row for row in log[: _last(log, None) + 1] if row is not None}
        assert said <= durable, "a row was said to be durable and is not there"
        assert durable <= set(log) | before
    assert 0 < len(durable) < len(children.row_of)  # the kills came while there was work
    assert children.run({"name": "last"}) == [0]
    assert not durable & set(children.log()[len(log) :])
    assert children.stored() == set(children.row_of.values())
    assert children.run({"name": "idle"}) == [0]
    assert Counter(children.log()[-1:]) == Counter([None])


def _last(items: list[Any], item: Any) -> int:
    return max((place for place, one in enumerate(items) if one == item), default=-1)


def test_of_two_runs_at_once_one_computes(children: Children) -> None:
    # Whichever computes goes on when the other waits, however busy the machine is.
    assert children.run({"name": "a", "behind": "b"}, {"name": "b", "behind": "a"}) == [0, 0]
    computed = [row for row in children.log() if row is not None]
    assert Counter(computed) == Counter(set(children.row_of.values()))  # each once
    assert children.stored() == set(computed)
    logs = [(children.folder / f"{name}.log").read_text() for name in "ab"]
    # "another process", where that has the lock and has not yet told who it is
    assert sum("waiting for " in log and "process" in log and "which computes rows" in log for log in logs) == 1
