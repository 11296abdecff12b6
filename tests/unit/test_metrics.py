"""Sums of a step against naive loops, the file of numbers, and where else they go."""

import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dpo_dist.batch import build_micro_batch
from dpo_dist.data import Pair
from dpo_dist.logprobs import TokenScores
from dpo_dist.metrics import (
    COUNTS,
    HEALTH,
    LOGGED_STATISTICS,
    PER_PAIR,
    SUMS,
    TRACKER_PACKAGES,
    TRACKERS,
    MetricsFile,
    Window,
    loss_of,
    not_finite,
    padded_tokens,
    step_sums,
    sum_names,
)
from dpo_dist.tokenization import TokenizedExample

EXAMPLES = [
    TokenizedExample((1, 2, 3), ((10, 11), (20, 21, 22)), (Pair(0, 1, 2.0),), "a:1"),
    TokenizedExample((5,), ((30,), (40, 41), (50,)), (Pair(1, 0), Pair(2, 1, 0.5)), "a:2"),
]
LOGPS = [-3.0, -4.0, -1.0, -2.5, -2.0]
LOGRATIOS = [0.5, -0.25, 1.0, 1.0, -1.0]  # the second pair (3 over 2) is a tie
PAIRS = [(0, 1, 2.0), (3, 2, 1.0), (4, 3, 0.5)]
LOSSES = [0.25, 0.5, 4.0]
TOKEN_LOSS, LIST_LOSS, RATED_LOSS = 1.5, 0.75, 1.25  # sums, as that of pairs
TOKEN_WEIGHT = 2 * 2.0 + 2 * 1.0 + 0.5  # tokens of each pair's chosen completion, times its weight
BETA = 0.2


def sums_of(examples: list[TokenizedExample], logps: list[float], logratios: list[float], losses: list[float]):
    batch = build_micro_batch(examples, list(range(0, 2 * len(examples), 2)), share_prompts=True)
    given = (torch.tensor(values, dtype=torch.float32) for values in (logps, logratios))
    weighted = sum(loss * pair[2] for loss, pair in zip(losses, PAIRS, strict=False))
    others = [one * bool(examples) for one in (TOKEN_LOSS, LIST_LOSS, RATED_LOSS)]
    losses_U = torch.tensor([weighted, *others], dtype=torch.float64)
    return dict(zip(SUMS, step_sums(batch, *given, losses_U, BETA).tolist(), strict=True))


def test_sums_of_a_micro_batch() -> None:
    sums = sums_of(EXAMPLES, LOGPS, LOGRATIOS, LOSSES)
    rewards = [(BETA * LOGRATIOS[c], BETA * LOGRATIOS[r]) for c, r, _ in PAIRS]
    expected = {
        "loss": sum(loss * weight for loss, (_, _, weight) in zip(LOSSES, PAIRS, strict=True)),
        "pair_weight": 3.5,
        "num_pairs": 3,
        "rewards/chosen": sum(chosen for chosen, _ in rewards),
        "rewards/rejected": sum(rejected for _, rejected in rewards),
        "rewards/margins": sum(chosen - rejected for chosen, rejected in rewards),
        "rewards/accuracies": 1,  # the first pair; a tie counts as wrong
        "logps/chosen": sum(LOGPS[c] for c, _, _ in PAIRS),
        "logps/rejected": sum(LOGPS[r] for _, r, _ in PAIRS),
        "tokens_processed": 8,
        "tokens_unshared": 11 + 5 + 5,
        "token_loss": TOKEN_LOSS,
        "token_weight": TOKEN_WEIGHT,
        **dict.fromkeys(SUMS[13:20], 0.0),  # nobody asked for statistics
        "example_loss": LIST_LOSS,
        "example_weight": 2.0,
        "num_compared": 2 + 3 + 1 + 2 + 1,
        "kl": -sum(LOGRATIOS),
        "displacement": 1,  # the chosen completion of the third pair
        "length_drift": 1,  # the third pair is turned round, and its chosen completion is the shorter one
        "rated_loss": RATED_LOSS,
        **dict.fromkeys(SUMS[-8:], 0.0),  # nothing is rated
    }
    assert list(sums) == list(expected)
    assert sums == pytest.approx(expected, rel=1e-12)


def test_statistics_are_means_over_tokens() -> None:
    """Of both completions, or of those of each pair's chosen or rejected one, whatever the lengths."""
    batch = build_micro_batch(EXAMPLES, [0, 2], share_prompts=True)
    owners = batch.completion_of_M.tolist()
    rows = {name: [(k + 1) * 0.5 + owner for k, owner in enumerate(owners)] for name in LOGGED_STATISTICS}
    rows["is_top1"] = [float(k % 3 == 0) for k in range(len(owners))]
    values = torch.tensor([rows[name] for name in LOGGED_STATISTICS])
    tokens = TokenScores(torch.zeros(len(owners)), values, LOGGED_STATISTICS)
    zeros = torch.zeros(len(LOGPS))
    sums = step_sums(batch, zeros, zeros, torch.zeros(4, dtype=torch.float64), BETA, tokens)
    window = Window()
    window.add({**dict(zip(SUMS, sums.tolist(), strict=True)), "tokens_padded": 0.0})

    def mean(name: str, completions: list[int]) -> float:
        found = [rows[name][m] for c in completions for m in range(len(owners)) if owners[m] == c]
        return sum(found) / len(found)

    means = window.means()
    assert means["entropy"] == pytest.approx(mean("entropy", [0, 1, 2, 3, 4]))
    assert means["mean_token_accuracy"] == pytest.approx(mean("is_top1", [0, 3, 4]))
    assert means["logits/chosen"] == pytest.approx(mean("mean_logit", [0, 3, 4]))
    assert means["logits/rejected"] == pytest.approx(mean("mean_logit", [1, 2, 3]))


RATED = [
    TokenizedExample((1, 2, 3), ((10, 11), (20, 21, 22)), (), "a:1", ratings=(True, False)),
    TokenizedExample((5,), ((30,),), (), "a:2", weight=2.0, ratings=(True,)),
]


@pytest.mark.parametrize("beside_pairs", [False, True])
def test_rated_completions_are_told_by_kind(beside_pairs: bool) -> None:
    examples = [*RATED, EXAMPLES[0]] if beside_pairs else RATED
    batch = build_micro_batch(examples, [0, 2, 3][: len(examples)], share_prompts=True)
    batch = replace(batch, kl_baseline=torch.tensor(0.6, dtype=torch.float64))
    logps, ratios = [-3.0, -4.0, -1.0, -8.0, -9.0], [0.5, -0.25, 1.0, 2.0, 3.0]
    given = (torch.tensor(values[: len(batch.rating_C)]) for values in (logps, ratios))
    losses = torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    sums = dict(zip(SUMS, step_sums(batch, *given, losses, BETA).tolist(), strict=True))
    assert (sums["rated_weight"], loss_of(sums)) == (4.0, 1.0)
    means = Window(sums, 1).means()
    good, bad = BETA * 0.75, BETA * -0.25
    expected = {"rewards": (good, bad), "logps": (-2.0, -4.0)}
    for what, values in expected.items():
        for kind, value in zip(
            ("desirable", "undesirable") if beside_pairs else ("chosen", "rejected"), values, strict=True
        ):
            assert means[f"{what}/{kind}"] == pytest.approx(value, rel=1e-6)
    assert means["rewards/baseline"] == pytest.approx(BETA * 0.6, rel=1e-6)
    assert means["rewards/margins"] == pytest.approx(BETA * -1.0 if beside_pairs else good - bad, rel=1e-6)
    assert ("rewards/accuracies" in means) == beside_pairs


def test_their_tokens_count_as_chosen_or_rejected() -> None:
    """However they are packed: alone, or in one micro-batch with pairs."""

    def token_sums(examples: list[TokenizedExample]) -> torch.Tensor:
        batch = build_micro_batch(examples, list(range(0, 2 * len(examples), 2)), share_prompts=True)
        values = torch.ones(len(LOGGED_STATISTICS), len(batch.completion_of_M))
        tokens = TokenScores(torch.zeros(len(batch.completion_of_M)), values, LOGGED_STATISTICS)
        zeros = torch.zeros(len(batch.rating_C))
        return step_sums(batch, zeros, zeros, torch.zeros(4, dtype=torch.float64), BETA, tokens)

    together, apart = token_sums([*RATED, EXAMPLES[0]]), token_sums(RATED) + token_sums(EXAMPLES[:1])
    assert torch.equal(together, apart)
    sums = dict(zip(SUMS, together.tolist(), strict=True))
    assert (sums["num_chosen_tokens"], sums["num_rejected_tokens"]) == (2 + 1 + 2, 3 + 3)


def test_each_entry_of_the_data_has_its_own_sums() -> None:
    """However the examples are packed."""
    examples = [replace(EXAMPLES[0], entry=2), EXAMPLES[1], replace(EXAMPLES[1], entry=2)]
    ratios = [0.5, -0.25, 1.0, 1.0, -1.0, 2.0, 1.0, 3.0]

    def sums(examples: list[TokenizedExample], ratios: list[float]) -> torch.Tensor:
        batch = build_micro_batch(examples, [0] * len(examples), share_prompts=True)
        values = torch.tensor(ratios)
        return step_sums(batch, values, values, torch.zeros(4, dtype=torch.float64), BETA, None, 3)

    together = sums(examples, ratios)
    torch.testing.assert_close(together, sums(examples[:2], ratios[:5]) + sums(examples[2:], ratios[5:]))
    names = sum_names(3)
    window = Window(dict(zip(names, together.tolist(), strict=True)), 1)
    found = window.of_entries(["x", "y", "z"])
    assert found == {
        "x/rewards/margins": pytest.approx(BETA * (0.0 - 2.0) / 2),
        "x/rewards/accuracies": 0.0,
        "x/num_pairs": 2,
        "z/rewards/margins": pytest.approx(BETA * (0.75 - 1.0 + 2.0) / 3),
        "z/rewards/accuracies": pytest.approx(2 / 3),
        "z/num_pairs": 3,
    }
    assert Window.from_json(json.loads(json.dumps(window.to_json()))).of_entries("xyz") == found
    assert sum_names(1) == SUMS and Window(sums_of(EXAMPLES, LOGPS, LOGRATIOS, LOSSES), 1).of_entries(["x"]) == {}


def test_a_filler_counts_nothing() -> None:
    assert set(sums_of([], [], [], []).values()) == {0.0}


def test_means_of_an_interval_are_not_means_of_means() -> None:
    """Loss per unit of weight, the rest per pair, over steps of unequal size."""
    steps = [sums_of(EXAMPLES, LOGPS, LOGRATIOS, LOSSES), sums_of(EXAMPLES[:1], [-1.0, -2.0], [3.0, 1.0], [7.0])]
    window = Window()
    for step in steps:
        window.add({**step, "tokens_padded": 20.0})
    means = window.means()
    assert list(means) == ["loss", *PER_PAIR, *HEALTH]
    assert list(window.means(has_reference=False)) == ["loss", *PER_PAIR]
    of_tokens = 2 * TOKEN_LOSS / (TOKEN_WEIGHT + 2 * 2.0)
    of_lists = 2 * LIST_LOSS / 3.0
    assert means["loss"] == pytest.approx((0.25 * 2 + 0.5 + 4 * 0.5 + 7 * 2) / 5.5 + of_tokens + of_lists)
    assert means["rewards/accuracies"] == 2 / 4
    assert means["logps/chosen"] == pytest.approx((-3.0 - 2.5 - 2.0 - 1.0) / 4)
    assert means["rewards/margins"] == pytest.approx(BETA * (0.75 + 0.0 - 2.0 + 2.0) / 4)
    assert window.counts() == {"tokens_processed": 8 + 6, "tokens_unshared": 21 + 11, "tokens_padded": 40}
    assert tuple(window.counts()) == COUNTS
    assert window.num_steps == 2


def test_the_loss_of_an_interval_that_an_earlier_version_saved() -> None:
    """It knows of pairs only."""
    assert loss_of({"loss": 3.0, "pair_weight": 2.0}) == 1.5


def test_an_interval_survives_a_checkpoint_bit_for_bit() -> None:
    window = Window()
    window.add({"loss": 0.1 + 0.2, "num_pairs": 3.0})
    again = Window.from_json(json.loads(json.dumps(window.to_json())))
    assert (again.sums, again.num_steps) == (window.sums, 1)
    again.add({"loss": 1.0})
    assert window.sums["loss"] == 0.1 + 0.2  # a copy


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], 0),
        ([5], 2 * 5),
        ([3, 9, 4], 2 * 3 * 9),
        ([1] * 8 + [7], 16 * 1 + 2 * 7),
        ([2, *[1] * 7, 5, 6], 16 * 2 + 4 * 6),
    ],
)
def test_padded_tokens(lengths: list[int], expected: int) -> None:
    """Two rows for each pair, padded to the longest row among 8 consecutive pairs."""
    assert padded_tokens(lengths) == expected


def test_numbers_must_be_finite() -> None:
    assert not_finite(3, {"loss": 1.0, "grad_norm": 0.0}, lambda: pytest.fail("nobody asks")) == ""
    broken = {"loss": math.nan, "grad_norm": math.inf, "other": 1.0}
    assert not_finite(4, broken) == "step 4: loss=nan, grad_norm=inf"
    assert not_finite(4, broken, lambda: ["a:1"]) == "step 4 (examples a:1): loss=nan, grad_norm=inf"
    assert "(examples a:1, a:2, a:3 and 2 more)" in not_finite(4, broken, lambda: [f"a:{n}" for n in range(1, 6)])


def test_an_interval_in_which_steps_were_left_out() -> None:
    window = Window()
    window.num_skipped = 2
    assert window.means() == {} and window.counts() == {"skipped_steps": 2}
    again = Window.from_json(json.loads(json.dumps(window.to_json())))
    assert (again.num_skipped, again.num_steps) == (2, 0)
    assert Window.from_json({"sums": {}, "num_steps": 0}).num_skipped == 0, "of an earlier version"


# ---- metrics.jsonl


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.closed = False

    def log(self, values: Any, step: int) -> None:
        self.logged.append((dict(values), step))

    def close(self) -> None:
        self.closed = True


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_is_written_at_once_and_sent_on(tmp_path: Path) -> None:
    path, tracker = tmp_path / "metrics.jsonl", Recorder()
    file = MetricsFile(path)
    file.add_tracker("recorder", tracker)
    file.write({"step": 1, "loss": 0.1 + 0.2, "num_tokens": 7})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 0.1 + 0.2, "num_tokens": 7}  # every bit
    file.write({"step": 1, "split": "evaluation", "dataset": "held", "loss": 0.5})
    assert steps_in(path) == [1, 1]
    assert tracker.logged == [({"loss": 0.1 + 0.2, "num_tokens": 7.0}, 1), ({"eval_held_loss": 0.5}, 1)]
    file.close()
    assert tracker.closed


def test_a_number_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, "loss": math.nan})


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (0, 1, 2, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 2, "lo')  # killed while writing
    MetricsFile(path).keep_until(2)
    assert path.read_text() == "".join(lines[:4])
    assert list(tmp_path.iterdir()) == [path]
    MetricsFile(path).write({"step": 3})
    assert steps_in(path) == [0, 1, 2, 2, 3]


def test_a_torn_last_line_within_the_kept_steps_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    MetricsFile(path).keep_until(5)
    assert path.read_text() == '{"step": 1}\n'


def test_nothing_to_keep_is_fine(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").keep_until(3)
    assert not list(tmp_path.iterdir())


DAMAGED = [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": "2"}', b"\x00\x00"]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_takes_no_other_with_it(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[1:], b""]))
    MetricsFile(path).keep_until(2)
    assert path.read_bytes() == lines[0] + b"\n" + lines[1] + b"\n"
    assert f"{path}:2: a damaged line is left out" in caplog.text
    path.write_bytes(b"\n".join([lines[0], damage, b'{"step": 1, "split": "evaluation", "dataset": "a", "x": 1}', b""]))
    assert MetricsFile(path).evaluations(1) == {"a": {"x": 1.0}}


def test_a_line_that_still_reads_with_another_number_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    written = MetricsFile(path)
    for step in (1, 2, 3):
        written.write({"step": step, "loss": 0.5})
    written.write_checksums(tmp_path)
    whole = path.read_text()
    path.write_text(whole.replace('"step": 2, "loss": 0.5', '"step": 2, "loss": 0.7'))
    resumed = MetricsFile(path)
    resumed.keep_until(3, tmp_path)
    assert steps_in(path) == [1, 3]
    assert f"{path}:2: a line is not as it was when {tmp_path} was saved" in caplog.text
    resumed.write({"step": 4})
    resumed.write_checksums(tmp_path)
    MetricsFile(path).keep_until(4, tmp_path)
    assert steps_in(path) == [1, 3, 4]
    (tmp_path / "metrics.crc32").unlink()  # a checkpoint of an earlier version
    path.write_text(whole)
    MetricsFile(path).keep_until(2, tmp_path)
    assert steps_in(path) == [1, 2]


def test_an_evaluation_that_was_made_up_for_after_a_checkpoint_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written = MetricsFile(path)
    written.write({"step": 3, "loss": 0.5})
    written.write_checksums(tmp_path)
    written.write({"step": 3, "split": "evaluation", "dataset": "a", "loss": 0.25})
    resumed = MetricsFile(path)
    resumed.keep_until(3, tmp_path, evaluated=False)
    assert resumed.evaluations(3) == {"a": {"loss": 0.25}}
    resumed.keep_until(3, tmp_path)
    assert resumed.evaluations(3) == {}


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_text('{"step": 1}\n')
    other.write_text("precious")
    (tmp_path / "metrics.tmp").symlink_to(other)
    MetricsFile(path).keep_until(1)
    assert other.read_text() == "precious" and path.read_text() == '{"step": 1}\n' and not path.is_symlink()


# ---- trackers


class Failing(Recorder):
    """Loses its server after the first line."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.logged:
            raise ConnectionError("no server")
        super().log(values, step)


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, sound, failing = MetricsFile(tmp_path / "metrics.jsonl"), Recorder(), Failing()
    file.add_tracker("wandb", failing)
    file.add_tracker("tensorboard", sound)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 0.5})
    file.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3] and len(sound.logged) == 3 and sound.closed
    assert caplog.text.count("log.report_to=wandb failed and gets no more lines (ConnectionError('no server'))") == 1


def test_tensorboard_files_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second are read in the order of their numbers, as text: 10 before 9. A later start is another second.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    tracker = TRACKERS["tensorboard"](tmp_path, {}, 0)
    tracker.log({"loss": 0.5, "rewards/chosen": -1.0}, 1)
    tracker.log({"loss": 0.75}, 2)
    tracker.close()
    again = TRACKERS["tensorboard"](tmp_path, {}, 2)  # resumed after step 1
    again.log({"loss": 0.25}, 2)
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("rewards/chosen")] == [(1, -1.0)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**settings: Any) -> Any:
        calls.append(settings)
        name = settings.get("id", f"run-{len(calls)}")
        return types.SimpleNamespace(
            id=name, log=lambda v, step: calls.append((v, step)), finish=lambda: calls.append("finish")
        )

    wandb = types.ModuleType("wandb")
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run7"
    tracker = TRACKERS["wandb"](folder, {"beta": 0.1}, 0)
    tracker.log({"loss": 0.5}, 3)
    tracker.close()
    settings = {"dir": str(folder), "name": "run7", "config": {"beta": 0.1}}
    assert calls == [settings, ({"loss": 0.5}, 3), "finish"]

    TRACKERS["wandb"](folder, {"beta": 0.1}, 4)
    TRACKERS["wandb"](folder, {"beta": 0.1}, 9)
    assert calls[3:] == 2 * [{**settings, "id": "run-1", "resume": "allow"}]
    TRACKERS["wandb"](folder, {"beta": 0.1}, 0)  # from the beginning: another run
    assert calls[5:] == [settings]
    for content in ("", "[]", '{"wandb": 3}'):
        (folder / "trackers.json").write_text(content)
        TRACKERS["wandb"](folder, {"beta": 0.1}, 4)
        assert calls[-1] == settings


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []

    missing = type("MlflowException", (Exception,), {})

    def start_run(**settings: str) -> Any:
        calls.append(settings)
        if settings.get("run_id") == "gone":
            raise missing("no such run")
        name = settings.get("run_id", f"run-{len(calls)}")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

    mlflow = types.ModuleType("mlflow")
    mlflow.MlflowException = missing  # type: ignore[attr-defined]
    mlflow.start_run = start_run  # type: ignore[attr-defined]
    mlflow.log_dict = lambda values, name: calls.append((values, name))  # type: ignore[attr-defined]
    mlflow.log_metrics = lambda values, step: calls.append((values, step))  # type: ignore[attr-defined]
    mlflow.end_run = lambda: calls.append("end")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    folder = tmp_path / "run7"
    tracker = TRACKERS["mlflow"](folder, {"beta": 0.1}, 0)
    tracker.log({"rewards/chosen": 0.5}, 3)
    tracker.close()
    written = ({"beta": 0.1}, "config.json")
    assert calls == [{"run_name": "run7"}, written, ({"rewards.chosen": 0.5}, 3), "end"]

    calls.clear()
    (folder / "trackers.json").write_text('{"wandb": "other", "mlflow": "run-1"}')
    TRACKERS["mlflow"](folder, {"beta": 0.1}, 4)
    assert calls == [{"run_id": "run-1"}, written]
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": "other", "mlflow": "run-1"}

    calls.clear()
    (folder / "trackers.json").write_text('{"mlflow": "gone"}')
    TRACKERS["mlflow"](folder, {"beta": 0.1}, 4)
    assert calls == [{"run_id": "gone"}, {"run_name": "run7"}, written]
    assert "log.report_to=mlflow: run gone cannot go on (no such run); a new one begins" in caplog.text
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": "run-2"}


def test_every_tracker_names_its_package() -> None:
    assert TRACKERS.keys() == TRACKER_PACKAGES.keys()


def test_numbers_of_an_evaluation_are_found_again(tmp_path: Path) -> None:
    """As a resumed run asks: of one step, by set, and nothing but numbers."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.evaluations(2) == {}
    for step, name, loss in ((2, "a", 0.5), (2, "b", 0.25), (4, "a", 0.125)):
        file.write({"step": step, "split": "evaluation", "dataset": name, "loss": loss, "num_pairs": 3})
    file.write({"step": 2, "loss": 9.0})
    assert file.evaluations(2) == {"a": {"loss": 0.5, "num_pairs": 3.0}, "b": {"loss": 0.25, "num_pairs": 3.0}}
    assert file.evaluations(3) == {}
