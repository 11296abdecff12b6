"""Machines without network: the commands of docs/offline.md, from `check` to `export`, reach no other machine.

Once in a network namespace of its own, and once with every name that is looked up and every connection noted: a run
that would only wait for an answer, and then go on, is noticed as well.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.byte_tokenizer import save_tokenizer
from tests.cores import alone
from tests.launching import REPOSITORY, environment, succeeded
from tests.pages import blocks

GOLDEN = REPOSITORY / "tests" / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = (REPOSITORY / "docs" / "offline.md").read_text(encoding="utf-8")
# Refuses whatever leaves the machine, in every Python process that finds it on its path.
WATCH = """
import os, socket, sys
NAMES = {"localhost", "127.0.0.1", "::1", "", "0.0.0.0", "::", None, socket.gethostname()}
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        name = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        name = arguments[1][0]
    else:
        return
    name = name.decode() if isinstance(name, bytes) else name
    if name not in NAMES:
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{event} {name}\\n")
        raise OSError(f"{name} is another machine")
sys.addaudithook(watch)
"""
# Ranks meet at the loopback interface, which is down in a new namespace. Flags: up, running.
LOOPBACK_UP = (
    "import fcntl, os, socket, struct, sys\n"
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 0x41))\n"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def commands(heading: str) -> str:
    """The commands below a heading of the page that set the variables of a user and go on."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (found,) = (block.text for block in blocks(section) if block.text.startswith("export HF_HOME="))
    return found


def write_config(folder: Path, model: str) -> None:
    values = {
        "model": {"model_name_or_path": model, "dtype": "float32"},
        "data": {"train": [{"path": "pairs.jsonl", "limit": 4}]},
        "train": {"output_dir": "runs/first", "examples_per_step": 2, "max_steps": 1},
        "parallel": {"deepspeed": "zero3_cpu"},
        "log": {"report_to": []},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def golden_folder(folder: Path) -> str:
    """A model by its path, which has no tokenizer, and rows of token ids."""
    shutil.copytree(GOLDEN / "tiny_policy", folder / "models" / "tiny")
    shutil.copy(GOLDEN / "pairs.jsonl", folder)
    return "models/tiny"


def hub_cache(folder: Path) -> str:
    """A model by its hub id with its tokenizer, in the cache as the hub's library lays it out, and rows of text."""
    made = folder / "made"
    save_tokenizer(made)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300)).save_pretrained(made)
    cached = folder / "pack" / "huggingface" / "hub" / "models--org--tiny"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (cached / name).mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(cached / "blobs" / f"{number:040x}")
        (cached / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number:040x}")
    made.rmdir()
    rows = [{"prompt": f"question {n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "org/tiny"


def variables(folder: Path) -> dict[str, str]:
    """Those of a user: no cache of the tests, and no answer to the question whether there is network."""
    found = environment({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""})
    found["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
    )
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "DPO_DIST_CACHE", "HF_TOKEN"):
        found.pop(name, None)
    # No home either: what is found lies in the folder that was copied.
    return found | {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home")}


def namespace() -> list[str]:
    """What starts a program in a network namespace of its own, as root or as a user who may."""
    for words in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
        ):
            return [*words, sys.executable, "-c", LOOPBACK_UP]
    pytest.skip("needs a network namespace")


def bash(
    folder: Path, script: str, env: dict[str, str], before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    with alone(1):
        return subprocess.run(
            [*before, "bash", "-euc", script],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


@pytest.mark.parametrize(
    ("model", "way"),
    [
        # The first one also compiles DeepSpeed's operator, which takes a minute.
        pytest.param(golden_folder, "namespace", marks=pytest.mark.thorough),
        (hub_cache, "noted"),
        pytest.param(golden_folder, "noted", marks=pytest.mark.thorough),
        pytest.param(hub_cache, "namespace", marks=pytest.mark.thorough),
    ],
)
def test_the_recipe(tmp_path: Path, model: Callable[[Path], str], way: str) -> None:
    online = tmp_path / "online"
    online.mkdir()
    write_config(online, model(online))
    env = variables(tmp_path)
    # The commands of the machine with network fill the cache; there is nothing that they would have to fetch.
    filled = succeeded(bash(online, commands("On a machine with network"), env))
    assert "tokenised 4 examples" in filled.stderr
    # Once to the same path on the other machine, once to another one.
    offline = tmp_path / ("online" if model is golden_folder else "offline")
    shutil.copytree(online, tmp_path / "copied", symlinks=True)
    shutil.rmtree(online)
    (tmp_path / "copied").rename(offline)

    before: list[str] = namespace() if way == "namespace" else []
    asked = tmp_path / "asked"
    if way == "noted":
        (tmp_path / "watch").mkdir()
        (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
        env |= {"PYTHONPATH": f"{tmp_path / 'watch'}:{env['PYTHONPATH']}", "ASKED": str(asked)}
    done = succeeded(bash(offline, commands("On a machine without"), env, before))
    assert not asked.exists(), asked.read_text()
    assert ("tokenised 4 examples" in done.stderr) == (offline != online)
    trained, exported = (load_file(offline / name / "model.safetensors") for name in ("runs/first/model", "exported"))
    assert trained.keys() == exported.keys() and all(torch.equal(trained[key], exported[key]) for key in trained)
    if model is hub_cache:
        assert AutoTokenizer.from_pretrained(offline / "exported").eos_token == "</s>"


def test_the_watch_sees_who_asks(tmp_path: Path) -> None:
    """A planted question to the hub: the check of the recipe can fail."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    env = variables(tmp_path)
    env |= {"PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}", "ASKED": str(tmp_path / "asked")}
    for ask in ("socket.getaddrinfo('huggingface.co', 443)", "socket.create_connection(('192.0.2.1', 443), 1)"):
        (tmp_path / "asked").unlink(missing_ok=True)
        done = bash(tmp_path, f'{sys.executable} -c "import socket; {ask}"', env)
        assert done.returncode == 1 and "is another machine" in done.stderr and (tmp_path / "asked").exists()


@pytest.mark.parametrize("revision", [None, "abc"])
def test_a_model_that_was_not_copied(tmp_path: Path, revision: str | None) -> None:
    golden_folder(tmp_path)
    write_config(tmp_path, "org/none")
    chosen = f" model.revision={revision}" if revision else ""
    env = variables(tmp_path) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = bash(tmp_path, f"dpo-dist check run.yaml{chosen}", env)
    assert done.returncode == 2 and not done.stdout, done.stderr
    (line,) = done.stderr.splitlines()
    fetch = "hf download org/none" + (f" --revision {revision}" if revision else "")
    assert line == (
        "error: model.model_name_or_path=org/none is neither a folder here nor a model that can be downloaded "
        f"(HF_HUB_OFFLINE is set, and {tmp_path}/hub/hub has no copy); check the path or the hub id, or run `{fetch}` "
        "where there is network and copy that folder (docs/offline.md)"
    )
