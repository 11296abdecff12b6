"""Sampled and judged completions: each with its own seed, nothing lost by a kill, and what servers do wrong."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.config import DataSource
from dpo_dist.data import PreferenceExample, RowFault, open_source
from dpo_dist.sampling import Completion, LocalSampler, Prompt, Settings, client, prompt_ids
from dpo_dist.sampling.generation import SeededSampling
from dpo_dist.sampling.journal import Verdict
from dpo_dist.sampling.judging import JUDGE_PROMPT, better_of, scores_of
from dpo_dist.tokenization import TokenizerSpec, load_tokenizer
from tests.byte_tokenizer import CHATML, EOS, IM_END, save_tokenizer
from tests.openai_server import Server, longer, serving
from tests.pages import ROOT

QUESTIONS = ["Hi", "What is 2 + 2?", "Name a colour, any colour.", "Why?"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def save_model(folder: Path, template: str | None = CHATML) -> Path:
    """Small, in float32, and so undecided that seeds matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, max_position_embeddings=96, **sizes)).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def sample(tmp_path: Path) -> Any:
    """`dpo-dist sample` of these rows into out.jsonl: exit code and output."""

    def run(rows: list[Any], *options: str, out: str = "out.jsonl") -> tuple[int, str]:
        prompts = write(tmp_path / "prompts.jsonl", rows)
        words = ["sample", str(prompts), "--out", str(tmp_path / out), *options]
        result = CliRunner().invoke(app, words)
        return result.exit_code, result.output

    return run


def counting(path: str, body: dict[str, Any]) -> str:
    """A model whose completions differ in length by their seeds."""
    return "ab" * (1 + body["seed"] % 50) + str(body["seed"])


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(counting) as one:
        yield one


def local(model: Path, *options: str) -> list[str]:
    return ["--model", str(model), "-k", "3", "--max-new-tokens", "12", *options]


def remote(server: Server, *options: str) -> list[str]:
    return ["--model", "m", "--server", server.url, "-k", "3", *options]


def judged(server: Server, judge: Server, *options: str) -> list[str]:
    return [*remote(server), "--judge", judge.url, "--judge-model", "j", *options]


ROWS = [{"prompt": question} for question in QUESTIONS]


# ---- transformers


def test_a_completion_does_not_depend_on_its_batch(sample: Any, model: Path, tmp_path: Path) -> None:
    for size in ("1", "3"):
        assert sample(ROWS, *local(model, "--batch-size", size), out=f"{size}.jsonl")[0] == 0
    assert sample(ROWS[::-1], *local(model), out="reversed.jsonl")[0] == 0
    assert sample(ROWS, *local(model, "--seed", "1"), out="seed.jsonl")[0] == 0
    rows = read(tmp_path / "1.jsonl")
    assert [row["prompt"] for row in rows] == [user(question) for question in QUESTIONS]
    texts = {answer[0]["content"] for row in rows for answer in row["completions"]}
    assert len(texts) == 12  # each of them differs
    assert read(tmp_path / "3.jsonl") == rows and read(tmp_path / "reversed.jsonl") == rows[::-1]
    assert not any(one == other for one, other in zip(read(tmp_path / "seed.jsonl"), rows, strict=True))


KILLED = """
import os, signal, sys
from dpo_dist.sampling import journal
from dpo_dist.cli import app
write, times = journal.Journal._write, []
def dying(self, records):
    times.append(1)
    if len(times) == 3:
        self._file.write(b'{"key": "half of a li'); self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, records)
journal.Journal._write = dying
app(sys.argv[1:])
"""


def test_killed_in_the_middle_and_begun_again(sample: Any, model: Path, tmp_path: Path) -> None:
    options = local(model, "--batch-size", "2")
    assert sample(ROWS, *options, out="whole.jsonl")[0] == 0
    words = ["sample", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl"), *options]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    partial = tmp_path / "out.jsonl.partial"
    whole, _, half = partial.read_text().rpartition("\n")
    assert len(whole.splitlines()) == 1 + 6 and half and not (tmp_path / "out.jsonl").exists()

    code, output = sample(ROWS, *local(model, "--batch-size", "2", "--temperature", "0.5"))
    assert code == 2 and "was begun with temperature=1.0, and this is temperature=0.5; give the settings" in output
    # Of the second half of a batch nothing is there: it is sampled with the same neighbours, and the first half stays.
    partial.write_text("\n".join(whole.splitlines()[:4]).replace('"text": "', '"text": "kept ') + "\n")
    assert sample(ROWS, *options)[0] == 0
    rows, expected = read(tmp_path / "out.jsonl"), read(tmp_path / "whole.jsonl")
    assert rows[1:] == expected[1:]
    assert all(answer[0]["content"].startswith("kept ") for answer in rows[0]["completions"])
    assert not partial.exists()

    partial.write_text(whole + "\n" + half)
    (tmp_path / "out.jsonl").unlink()
    assert sample(ROWS, *options)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_no_room_in_memory(sample: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(LocalSampler, "sample", full)
    code, output = sample(ROWS, *local(model))
    assert code == 1 and "out of memory; lower --batch-size or --max-new-tokens; with another" in output


def test_no_room_on_the_disk(sample: Any, model: Path, tmp_path: Path) -> None:
    """A file may have 700 bytes, as on a full disk: what does not fit leaves no half line."""
    assert sample(ROWS, *local(model, "--batch-size", "1"), out="whole.jsonl")[0] == 0
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
    program += "import sys; from dpo_dist.cli import app; app(sys.argv[1:])"
    words = ["sample", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    command = [sys.executable, "-c", program, *words, *local(model, "--batch-size", "1")]
    full = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert full.returncode == 2 and "out.jsonl.partial cannot be written (" in full.stderr, full.stderr
    assert (tmp_path / "out.jsonl.partial").read_bytes().endswith(b"}\n")
    assert sample(ROWS, *local(model, "--batch-size", "1"))[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_completion_is_that_of_a_plain_loop(model: Path, tmp_path: Path) -> None:
    """One token after another, without padding, cache and batches; and penalties of the model's folder are not read."""
    settings = Settings("m", 2, 12, 0.8, 0.9, 5)
    prompts = [Prompt(text, "") for text in ("Hi", "A longer prompt")]
    tokenizer = load_tokenizer(TokenizerSpec(str(model)))
    ids = cast("list[tuple[int, ...]]", prompt_ids(prompts, tokenizer, "m", None))
    policy = LlamaForCausalLM.from_pretrained(model).eval()
    folder = shutil.copytree(model, tmp_path / "with_penalties")
    (folder / "generation_config.json").write_text('{"repetition_penalty": 5.0, "do_sample": true, "top_k": 1}')
    sampled = LocalSampler(folder, tokenizer, settings, False).sample(prompts, ids)
    for prompt, start, found in zip(prompts, ids, sampled, strict=True):
        for k in range(2):
            generator = torch.Generator().manual_seed(prompt.seed(settings, k))
            said: list[int] = []
            for uniform in torch.rand(12, generator=generator, dtype=torch.float64):
                with torch.no_grad():
                    logits = policy(torch.tensor([[*start, *said]])).logits[0, -1].double()
                probs = torch.softmax(logits / 0.8, -1)
                kept: set[int] = set()
                for token in probs.argsort(descending=True).tolist():
                    if sum(float(probs[one]) for one in kept) < 0.9:
                        kept.add(token)
                probs = torch.tensor([p if token in kept else 0.0 for token, p in enumerate(probs.tolist())])
                place = float(uniform) * float(probs.sum())
                token = next(one for one in range(264) if float(probs[: one + 1].sum()) > place)
                if token in (EOS, IM_END):  # the template ends an answer with the second
                    break
                said.append(token)
            assert found[k] == Completion(tokenizer.decode(said, skip_special_tokens=True), len(said) == 12)


def test_an_answer_ends_as_the_template_ends_it(model: Path, tmp_path: Path) -> None:
    """A base model that was trained with a template of its own says the template's last word, and then no EOS."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    always = LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes))
    with torch.no_grad():
        always.model.norm.weight.zero_()
    always.lm_head = torch.nn.Linear(32, 264, bias=True)
    with torch.no_grad():
        always.lm_head.bias.zero_()[IM_END] = 50
    sampler = LocalSampler(model, load_tokenizer(TokenizerSpec(str(model))), Settings("m", 2, 9, 1.0, 1.0, 0), False)
    always.generation_config = sampler._model.generation_config
    sampler._model = always.eval()
    assert sampler.sample([Prompt("Hi", "")], [(5, 6)]) == [[Completion("", False)] * 2]


def test_text_goes_on_from_the_prompt(sample: Any, model: Path, tmp_path: Path) -> None:
    code, output = sample(ROWS, *local(model, "--text"))
    assert code == 0 and "4 rows without scores; they need a column scores or ranks before" in output
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == QUESTIONS
    assert all(isinstance(one, str) for row in read(tmp_path / "out.jsonl") for one in row["completions"])
    source = open_source(DataSource(path=str(tmp_path / "out.jsonl")), "data.train.0")
    assert all(isinstance(row, RowFault) and "scores" in row.what for row in source.examples())  # as it was said


def test_a_model_without_a_template_and_prompts_without_room(sample: Any, model: Path, tmp_path: Path) -> None:
    code, output = sample(ROWS, *local(save_model(tmp_path / "base", None)))
    assert code == 2 and "has no chat template, and the prompts are messages; name an instruct model" in output
    long = [*ROWS, {"prompt": "x" * 80}]
    code, output = sample(long, *local(model))
    assert code == 2 and "prompts.jsonl:5: the prompt has 99 tokens, and with --max-new-tokens the model" in output
    code, output = sample(long, *local(model, "--skip-bad"))
    assert code == 0 and "1 row left out (over_long: 1)" in output and len(read(tmp_path / "out.jsonl")) == 4


def test_tokens_are_chosen_by_their_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5)[:, None] / 1000

    def shares(temperature: float, top_p: float) -> list[float]:
        chosen = SeededSampling(uniform, temperature, top_p)(torch.zeros(1000, 1).long(), logits.expand(1000, 4))
        assert bool(((chosen == 0).sum(-1) == 1).all()) and bool((chosen.isneginf().sum(-1) == 3).all())
        return [round(share, 3) for share in torch.bincount(chosen.argmax(-1), minlength=4).div(1000).tolist()]

    assert shares(1.0, 1.0) == [0.5, 0.3, 0.15, 0.05]
    assert shares(0.5, 1.0) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=2e-3)
    assert shares(1.0, 0.8) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert shares(1.0, 0.01) == [1, 0, 0, 0]


# ---- prompts


def test_prompts_of_all_kinds_of_rows_each_once(sample: Any, server: Server, tmp_path: Path) -> None:
    talk = [*user("Hi"), *said("Yo"), *user("Bye")]
    rows = [
        {"prompt": "Hi"},
        {"prompt": user("Hi"), "chosen": said("a"), "rejected": said("b")},
        {"messages": [*user("Hi"), *said("Yo")]},
        {"messages": talk},
        {"conversations": [{"from": "human", "value": "Hey"}], "chosen": said("a")[0], "rejected": said("b")[0]},
        {"prompt": "Q", "system": "Be brief.", "completions": ["a", "b"], "scores": [1, 0]},
        {"chosen": [*user("W"), *said("a")], "rejected": [*user("W"), *said("b")]},
        {"prompt": "P", "chosen": [*user("P"), *said("a")], "rejected": [*user("P"), *said("b")]},
    ]
    code, output = sample(rows, *remote(server))
    assert code == 0 and "2 rows with a prompt that was there before: each prompt is sampled once" in output
    brief = {"role": "system", "content": "Be brief."}
    expected = [user("Hi"), talk, user("Hey"), [brief, *user("Q")], user("W"), user("P")]
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == expected
    assert sample(rows, *remote(server, "--limit", "3"), out="few.jsonl")[0] == 0
    assert len(read(tmp_path / "few.jsonl")) == 1


@pytest.mark.parametrize(
    ("row", "options", "error"),
    [
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, [], "the row holds token ids; give prompts as"),
        ({"prompt": " "}, [], "the prompt is empty"),
        ({"prompt": user("Hi"), "tools": [{"name": "f"}]}, [], "tools are set, and completions are sampled as text"),
        ({"prompt": "Hi", "system": "Be brief."}, ["--text"], "system is set, and --text has no place for it"),
        ({"answer": "Hi"}, [], "no column"),
        ({"prompt": [{"content": "Hi"}]}, [], "prompt[0] has no role"),
    ],
)
def test_rows_without_a_prompt(
    sample: Any, server: Server, row: dict[str, Any], options: list[str], error: str
) -> None:
    code, output = sample([row], *remote(server, *options))
    assert code == 2 and f"prompts.jsonl:1: {error}" in output and "or give --skip-bad" in output
    code, output = sample([row], *remote(server, *options, "--skip-bad"))
    assert code == 2 and "has no prompt that can be used" in output
    assert not server.requests


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--temperature", "0"], "--temperature=0.0 gives one completion only; give a number above 0"),
        (["--top-p", "1.5"], "--top-p=1.5 is no probability"),
        (["--judge", "http://localhost:1"], "--judge and --judge-model belong together"),
        (["--server", "file:///etc"], "--server=file:///etc is no address of a server; give one such as http://"),
        (["-k", "1"], "greater than or equal to 2"),
        (["--out", "a.json"], "--out=a.json is not JSON Lines by its name"),
        (["--out", "none/a.jsonl"], "--out=none/a.jsonl: none is no folder"),
        (["--out", str(ROOT / "pyproject.toml")], "is not JSON Lines by its name"),
        (["--model", "./none"], "--model=./none does not exist"),
    ],
)
def test_mistakes_of_options(sample: Any, options: list[str], error: str) -> None:
    code, output = sample(ROWS, "--model", "demo", *options)
    assert code == 2 and error in output


def test_nothing_is_replaced_and_one_process_writes(sample: Any, server: Server, tmp_path: Path) -> None:
    assert sample(ROWS, *remote(server))[0] == 0
    code, output = sample(ROWS, *remote(server))
    assert code == 2 and "is there already; give another name, or remove it" in output
    with (tmp_path / "b.jsonl.partial").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, output = sample(ROWS, *remote(server), out="b.jsonl")
    assert code == 1 and "b.jsonl.partial: another process writes it" in output
    (tmp_path / "b.jsonl.partial").write_text('{"settings": 5}\nno JSON\n')
    code, output = sample(ROWS, *remote(server), out="b.jsonl")
    assert code == 2 and "b.jsonl.partial is damaged" in output


# ---- a server


def test_what_a_server_is_asked(sample: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    options = ["--temperature", "0.7", "--top-p", "0.9", "--max-new-tokens", "9"]
    code, output = sample(ROWS[:1], *remote(server, *options), "--server", f"{server.url}/v1/")
    assert code == 0 and "sk-secret-of-mine" not in output
    path, body, headers = server.requests[0]
    assert len({asked["seed"] for _, asked, _ in server.requests}) == 3
    body.pop("seed")
    settings = {"model": "m", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9}
    assert (path, body) == ("/v1/chat/completions", {**settings, "messages": user("Hi")})
    assert headers["Authorization"] == "Bearer sk-secret-of-mine"
    assert sample(ROWS[:1], *remote(server, "--text"), out="text.jsonl")[0] == 0
    path, body, _ = server.requests[-1]
    assert (path, body["prompt"]) == ("/v1/completions", "Hi")
    assert all(isinstance(one, str) for one in read(tmp_path / "text.jsonl")[0]["completions"])


def test_completions_that_are_the_same_empty_or_cut(sample: Any, server: Server, tmp_path: Path) -> None:
    texts = iter(["a", "a ", "b...", " ", "c", "c", "d", "e", "f"])
    server.reply = lambda *_: next(texts)
    code, output = sample(ROWS[:3], *remote(server, "--batch-size", "1"))
    assert code == 0
    assert (
        "9 completions of 3 prompts: 2 said the same as another, 1 said nothing, 1 reached --max-new-tokens" in output
    )
    assert "1 prompt left out: fewer than two different completions" in output
    assert [row["completions"] for row in read(tmp_path / "out.jsonl")] == [
        [said("a"), said("b...")], [said("d"), said("e"), said("f")]
    ]  # fmt: skip
    server.reply = lambda *_: "a"
    code, output = sample(ROWS, *remote(server), out="same.jsonl")
    assert code == 2 and "has two different completions that say something; raise --temperature" in output


@pytest.mark.parametrize("status", [500, 429])
def test_a_server_that_fails_twice(sample: Any, server: Server, tmp_path: Path, status: int) -> None:
    failures = iter([status, status])
    server.reply = lambda path, body: next(failures, None) or counting(path, body)
    assert sample(ROWS, *remote(server))[0] == 0
    assert len(server.requests) == 12 + 2 and len(read(tmp_path / "out.jsonl")) == 4


@pytest.mark.parametrize("failure", [None, 503])
def test_a_server_that_answers_no_more(sample: Any, server: Server, tmp_path: Path, failure: int | None) -> None:
    assert sample(ROWS, *remote(server), out="whole.jsonl")[0] == 0
    server.requests.clear()
    server.reply = lambda path, body: counting(path, body) if len(server.requests) <= 5 else failure
    code, output = sample(ROWS, *remote(server, "--batch-size", "1", "--timeout", "0.2"))
    assert code == 2 and "Traceback" not in output
    assert f"--server={server.url} gave no answer to chat/completions in 4 attempts" in output
    assert len(server.requests) == 5 + 4 and not (tmp_path / "out.jsonl").exists()
    server.requests.clear()
    server.reply = counting
    assert sample(ROWS, *remote(server))[0] == 0
    assert len(server.requests) == 12 - 5
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("status", [401, 302])
def test_a_refusal_is_not_repeated_and_shows_no_key(
    sample: Any, server: Server, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "short")  # of no known form
    server.reply = lambda *_: status
    code, output = sample(ROWS, *remote(server, "--batch-size", "1"))
    assert code == 2 and f"refuses chat/completions: {status}" in output and "short" not in output
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"]


# ---- a judge


def test_a_judge_ranks_and_training_reads_it(sample: Any, server: Server, tmp_path: Path) -> None:
    with serving(longer) as judge:
        code, output = sample(ROWS, *judged(server, judge))
    assert code == 0 and f"out.jsonl: 4 rows; train on them with data.train.0.path={tmp_path}" in output
    assert len(judge.requests) == 4 * 3 * 2
    assert {path for path, _, _ in judge.requests} == {"/v1/chat/completions"}
    for row in read(tmp_path / "out.jsonl"):
        lengths = [len(answer[0]["content"]) for answer in row["completions"]]
        assert row["scores"] == [
            sum(1.0 if one > other else 0.5 * (one == other) for other in lengths) - 0.5 for one in lengths
        ]
    examples = list(open_source(DataSource(path=str(tmp_path / "out.jsonl")), "data.train.0").examples())
    assert len(examples) == 4 and all(isinstance(one, PreferenceExample) and one.pairs for one in examples)


@pytest.mark.parametrize(
    ("verdict", "asked", "nonsense"), [("A", 1, 0), ("TIE", 1, 0), ("It depends", 2, 24)], ids=["first", "tie", "none"]
)
def test_judges_that_do_not_judge(
    sample: Any, server: Server, tmp_path: Path, verdict: str, asked: int, nonsense: int
) -> None:
    with serving(lambda *_: verdict) as judge:
        code, output = sample(ROWS, *judged(server, judge))
    assert code == 0 and len(judge.requests) == 24 * asked
    assert all(row["scores"] == [1.0, 1.0, 1.0] for row in read(tmp_path / "out.jsonl"))
    assert "4 prompts with all completions tied: training leaves them out" in output
    assert (f"{nonsense} verdicts of 24 made no sense and count as ties" in output) == bool(nonsense)


def test_nonsense_said_once_is_asked_again(sample: Any, server: Server, tmp_path: Path) -> None:
    nonsense = iter(["Hm"])
    with serving(lambda path, body: next(nonsense, None) or longer(path, body)) as judge:
        code, output = sample(ROWS, *judged(server, judge))
    assert code == 0 and len(judge.requests) == 25 and "made no sense" not in output


def test_a_judge_that_stops_in_the_middle(sample: Any, server: Server, tmp_path: Path) -> None:
    with serving(longer) as judge:
        assert sample(ROWS, *judged(server, judge), out="whole.jsonl")[0] == 0
        server.requests.clear()
        judge.requests.clear()
        judge.reply = lambda path, body: longer(path, body) if len(judge.requests) <= 10 else 500
        code, output = sample(ROWS, *judged(server, judge, "--batch-size", "1"))
        assert code == 2 and f"--judge={judge.url} gave no answer" in output and len(server.requests) == 12
        judge.requests.clear()
        judge.reply = longer
        assert sample(ROWS, *judged(server, judge))[0] == 0
    assert len(judge.requests) == 24 - 10 and len(server.requests) == 12
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_verdicts_of_another_judge_do_not_count(sample: Any, server: Server, tmp_path: Path) -> None:
    with serving(lambda *_: 400) as judge:
        assert sample(ROWS, *judged(server, judge, "--batch-size", "1"))[0] == 2
        seen: list[int] = []
        judge.reply = lambda *_: "A" if seen.append(1) or len(seen) < 9 else 400
        assert sample(ROWS, *judged(server, judge, "--batch-size", "1"))[0] == 2
        judge.reply = longer
        judge.requests.clear()
        assert sample(ROWS, *judged(server, judge, "--judge-model", "other"))[0] == 0
    assert len(judge.requests) == 24 and len(server.requests) == 12


@pytest.mark.parametrize(
    ("answer", "better"),
    [
        ("A", "first"), ("b.", "second"), ("**TIE**", "tie"), ("[[A]]", "first"), ("Hm.\n\nVerdict: B\n", "second"),
        ("", None), ("A or B", None), ("I like A", None), ("AB", None), ("My answer is A", "first"),
    ],
)  # fmt: skip
def test_words_of_judges(answer: str, better: str | None) -> None:
    assert better_of(answer) == better


def test_scores_are_sums_of_wins() -> None:
    first, second, tie = Verdict("first"), Verdict("second"), Verdict("tie")
    orders = {(0, 1): first, (1, 0): second, (0, 2): first, (2, 0): first, (1, 2): tie, (2, 1): first}
    assert scores_of(3, orders) == [1.5, 0.5, 1.0]


def test_the_page_shows_the_judge_prompt() -> None:
    assert JUDGE_PROMPT in (ROOT / "docs" / "feedback.md").read_text("utf-8")
