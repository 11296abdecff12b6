"""README and docs: links resolve, examples load, rows parse, and quoted messages are the program's own.

Conventions of the pages: a YAML block begins with `# name.yaml` (a whole configuration, its name used once) or with
`# added to name.yaml` (laid over that one); a block of rows is marked `jsonl`; a block of messages on the page
docs/troubleshooting.md is marked `text`, a program `python`. Every check is also given a planted fault, which
it must name.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import typer.main
import yaml
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from dpo_dist import metrics
from dpo_dist.cli import app
from dpo_dist.config import RunConfig, load_config
from dpo_dist.data import PreferenceExample, example
from dpo_dist.data.rows import parse_row
from dpo_dist.errors import ConfigError, DataError
from dpo_dist.pretrained import SHARES_PROMPTS, decide_sharing
from dpo_dist.pretrained import load_config as load_model_config
from tests.byte_tokenizer import save_tokenizer
from tests.pages import ROOT, anchors, blocks, command_lines, is_quoted, own_arguments, prose

FOLDERS = (
    ".",
    "docs",
    "docs/decisions",
    "benchmarks",
    "benchmarks/results",
    "docker",
    "deepspeed_configs",
    "tests/golden",
)
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for d in FOLDERS for path in (ROOT / d).glob("*.md")
}
DATA, TROUBLES = PAGES["docs/data.md"], PAGES["docs/troubleshooting.md"]

OWN_PATH = re.compile(r"(?:\./)?(?:tests|dpo_dist|docs|benchmarks|configs|deepspeed_configs|docker|launch)/[\w./-]*")
KEY = re.compile(rf"(?<![\w/.-])({'|'.join(RunConfig.model_fields)})\.(?!py\b)([A-Za-z_]\w*)")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


# ---- links


def _link_problems(page: str, text: str) -> list[str]:
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or not path.resolve().is_relative_to(ROOT):
            problems.append(f"{page}: {target} does not exist")
        elif anchor and anchor not in anchors(path.read_text("utf-8") if file else text):
            problems.append(f"{page}: {target} names no heading")
    return problems


# ---- names of options and files


def _name_problems(page: str, text: str) -> list[str]:
    """Keys and files that inline code names and that do not exist."""
    problems = []
    for code in re.findall(r"`([^`]+)`", prose(text)):
        for section, key in KEY.findall(code):
            if key not in RunConfig.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
                problems.append(f"{page}: {section}.{key} is no option")
        if OWN_PATH.fullmatch(code) and not (ROOT / code).exists():
            problems.append(f"{page}: {code} does not exist")
    return problems


# ---- configurations and commands


def _configurations(pages: dict[str, str]) -> dict[str, str]:
    """Whole configurations by name."""
    heads = [
        (match[1], block.text)
        for text in pages.values()
        for block in blocks(text)
        if block.kind == "yaml" and (match := re.match(r"# (\S+\.yaml)\n", block.text))
    ]
    assert len({name for name, _ in heads}) == len(heads), "two examples have the same name"
    return dict(heads)


def _fragment_problems(page: str, text: str, folder: Path) -> list[str]:
    """YAML blocks that are no whole configuration, laid over the one that they name."""
    problems = []
    for block in blocks(text):
        if block.kind != "yaml" or re.match(r"# \S+\.yaml\n", block.text):
            continue
        head = re.match(r"# added to (\S+\.yaml)\n", block.text)
        if not head:
            problems.append(f"{page}: a YAML block begins neither with `# name.yaml` nor with `# added to name.yaml`")
            continue
        sections = yaml.safe_load(block.text)
        overrides = [f"{s}.{key}={json.dumps(value)}" for s, keys in sections.items() for key, value in keys.items()]
        problems += _load_problems(page, folder / head[1], overrides)
    return problems


def _load_problems(page: str, file: Path | str, overrides: list[str]) -> list[str]:
    try:
        load_config(file, overrides)
    except ConfigError as error:
        return [f"{page}: {error}"]
    return []


def _command_problems(page: str, text: str, folder: Path) -> list[str]:
    """What is wrong with the commands of code blocks: options, overrides, torchrun's options, scripts."""
    problems = []
    torchrun = get_args_parser()._option_string_actions
    for words in command_lines(text):
        problems += [
            f"{page}: {word} does not exist"
            for word in words
            if OWN_PATH.fullmatch(word) and word.endswith((".sh", ".py")) and not (ROOT / word).exists()
        ]
        found = own_arguments(words)
        if found is None:
            continue
        place, arguments = found
        if "torchrun" in words:
            given = [word.split("=")[0] for word in words[words.index("torchrun") + 1 : place] if word[0] == "-"]
            problems += [f"{page}: torchrun has no option {option}" for option in given if option not in torchrun]
        problems += _argument_problems(page, arguments, folder)
    return problems


def _argument_problems(page: str, arguments: list[str], folder: Path) -> list[str]:
    name = arguments[0]
    if name not in COMMANDS:
        return [f"{page}: dpo-dist has no command {name}"]
    try:
        given = COMMANDS[name].make_context(name, arguments[1:]).params
    except Exception as error:  # typer brings its own click, whose errors have no public name
        return [f"{page}: dpo-dist {' '.join(arguments)}: {error}"]
    if given.get("config") is None:
        return []
    example_file = folder / given["config"]
    return _load_problems(page, example_file if example_file.is_file() else given["config"], given["overrides"] or [])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every example configuration; nothing else is found from it."""
    for name, text in _configurations(PAGES).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- rows


def _row_problems(text: str) -> list[str]:
    """Rows that are no examples; below the heading Demonstrations they are read as by a supervised run."""
    problems = []
    for section in re.split(r"^(?=### )", text, flags=re.MULTILINE):
        rows = [line for block in blocks(section) if block.kind == "jsonl" for line in block.text.splitlines()]
        for row in rows:
            try:
                parsed = parse_row(json.loads(row), "page", demonstrations=section.startswith("### Demonstrations"))
            except (ValueError, DataError) as error:
                problems.append(f"{row}: {error}")
            else:
                problems += [] if isinstance(parsed, PreferenceExample) else [f"{row}: {parsed}"]
    return problems


# ---- messages


def _messages(text: str) -> list[str]:
    return [line for block in blocks(text) if block.kind == "text" for line in block.text.splitlines()]


def _message_problems(text: str) -> list[str]:
    """Messages that the package does not say, with or without the place that a mistake in a configuration has."""
    said = {line: line.removeprefix("error: ") for line in _messages(text)}
    return [line for line, one in said.items() if not is_quoted(one) and not is_quoted(re.sub(r"^\S+:\d+: ", "", one))]


# ---- the tests


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names(page: str) -> None:
    assert not _link_problems(page, PAGES[page]) + _name_problems(page, PAGES[page])


def test_examples_and_commands(folder: Path) -> None:
    whole = _configurations(PAGES)
    assert {"run.yaml", "cpu.yaml", "lora.yaml"} <= whole.keys()
    problems = [problem for name in whole for problem in _load_problems(name, folder / name, [])]
    for page, text in PAGES.items():
        assert {block.kind for block in blocks(text)} <= {"", "bash", "jsonl", "python", "text", "yaml"}, page
        problems += _fragment_problems(page, text, folder) + _command_problems(page, text, folder)
    assert not problems


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one Python program of the pages takes the language model out of Gemma 3; here out of a small one."""
    ((page, program),) = (
        (page, block.text) for page, text in PAGES.items() for block in blocks(text) if block.kind == "python"
    )
    assert page == "docs/models.md"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 300, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    whole.save_pretrained(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    exec(program.replace("google/gemma-3-4b-it", "whole"), {})
    (saved,) = {path.parent for path in tmp_path.glob("*/model.safetensors")} - {tmp_path / "whole"}
    alone = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(alone(ids).logits, whole.eval()(ids).logits)
    assert decide_sharing(load_model_config(saved, False), "auto")[0] and (saved / "tokenizer.json").is_file()


def test_rows() -> None:
    assert sum(block.kind == "jsonl" for block in blocks(DATA)) >= 8
    assert not _row_problems(DATA)


def test_messages() -> None:
    assert len(_messages(TROUBLES)) == 11
    assert not _message_problems(TROUBLES)


def test_lists_are_complete() -> None:
    """Architectures, reasons of bad rows and metrics are those of the code."""
    listed = PAGES["docs/models.md"].split("test_architectures.py`:")[1].split("`dpo-dist check`")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == SHARES_PROMPTS
    constants = {name: value for name, value in vars(example).items() if name.isupper() and isinstance(value, str)}
    assert constants and all(f"`{reason}`" in DATA for reason in constants.values())
    names = {*metrics.PER_PAIR, *metrics.PER_TOKEN, *metrics.HEALTH, *metrics.COUNTS, *metrics.WALL_CLOCK}
    assert all(f"`{name}`" in PAGES["docs/run_folder.md"] for name in names)


def _bash(line: str) -> str:
    return f"```bash\n{line}\n```\n"


def test_planted_faults(folder: Path) -> None:
    """Each check names what is wrong."""
    assert _link_problems("docs/data.md", "[x](none.md) [y](running.md#none) [z](#kinds-of-rows)\n# Kind\n") == [
        "docs/data.md: none.md does not exist",
        "docs/data.md: running.md#none names no heading",
        "docs/data.md: #kinds-of-rows names no heading",
    ]
    assert len(_name_problems("p", "`loss.bta=1` `loss.beta` `tests/none.py` `docs/data.md` `train.learning_rat`")) == 3
    commands = {
        "dpo-dist check run.yaml --rank 8": "--rank",
        "dpo-dist trian run.yaml": "trian",
        "torchrun --nproc_per-node 2 -m dpo_dist train run.yaml": "--nproc_per-node",
        "torchrun --nproc-per-node 2 \\\n -m dpo_dist train run.yaml loss.bta=0.2": "loss.bta",
        "dpo-dist train none.yaml": "none.yaml",
        "./launch/none.sh": "none.sh",
    }
    for line, named in commands.items():
        for text in (_bash(line), "\n    " + line.replace("\n", "\n    ") + "\n"):
            (problem,) = _command_problems("p", text, folder)
            assert named in problem
    assert not _command_problems("p", _bash("dpo-dist check run.yaml --ranks 8 loss.beta=0.2  # it's fine"), folder)
    assert _fragment_problems("p", "```yaml\n# added to run.yaml\nloss:\n  bta: 1\n```\n", folder)
    assert _fragment_problems("p", "```yaml\nloss:\n  beta: 1\n```\n", folder)
    rows = ['{"prompt": "a", "chosen": " b"}', '{"prompt": "a", "chosen": "b", "rejected": "b"}', '{"prompt": ...}']
    assert len(_row_problems("```jsonl\n" + "\n".join(rows) + "\n```\n")) == 3
    for right, wrong in {
        "a key in": "a kay in",
        "accumulation follows": "it follows",
        "identical; re": "alike; re",
    }.items():
        assert len(_message_problems(TROUBLES.replace(right, wrong))) == 1, wrong
