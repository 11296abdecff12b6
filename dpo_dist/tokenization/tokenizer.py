"""Load a tokenizer, and say what it would do to any text."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_dist.errors import ModelError


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer a run uses: a folder or hub id, and the setting that named it."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    key: str = "model.tokenizer_name_or_path"
    chat_template: str | None = None  # a file that takes the place of the tokenizer's own


def load_tokenizer(spec: TokenizerSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        ModelError: if there is none that can be loaded.
    """
    path = Path(os.path.expanduser(spec.path))
    if not path.exists() and (path.is_absolute() or spec.path.startswith((".", "~")) or spec.path.count("/") > 1):
        raise ModelError(
            f"{spec.key}={spec.path} does not exist; give a folder with tokenizer.json or a hub id such as owner/name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.exists() else spec.path,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
        )
    # transformers raises OSError, ValueError, KeyError, ImportError and others, depending on what is missing.
    except Exception as error:
        if not spec.trust_remote_code and "trust_remote_code" in str(error):
            raise ModelError(
                f"{spec.key}={spec.path} needs code of its own, which is not run unasked; "
                "read that code, then set model.trust_remote_code=true, or name another tokenizer"
            ) from error
        detail = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
        raise ModelError(
            f"{spec.key}={spec.path} holds no tokenizer that can be loaded ({type(error).__name__}: {detail}); "
            "give a folder with tokenizer.json and tokenizer_config.json, or the hub id of a model that has them"
        ) from error

    if spec.chat_template is not None:
        tokenizer.chat_template = _read_template(spec.chat_template, tokenizer)
    return tokenizer


def _read_template(file: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of a file, of which it is known that it can be parsed."""
    try:
        text = Path(os.path.expanduser(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"data.chat_template={file} cannot be read ({error}); give a file with a template") from error
    if not text.strip():
        raise ModelError(f"data.chat_template={file} is empty; give a file with a template")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
    except Exception as error:
        # Jinja is transformers' affair. Which conversations a template refuses is found with the rows.
        if type(error).__name__ == "TemplateSyntaxError":
            line = getattr(error, "lineno", 1)
            raise ModelError(f"data.chat_template={file}:{line}: not a Jinja template ({error}); correct it") from error
    return text


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which ids a text or a conversation becomes.

    The versions of the libraries count: they hold part of the rules.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "versions": [transformers.__version__, tokenizers.__version__],
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "rules": backend.to_str() if backend is not None else _slow_rules(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _slow_rules(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """What a tokenizer written in Python has instead of one JSON text: vocabulary, settings, its files."""
    settings = {name: str(value) for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    files = [getattr(tokenizer, f"{name}", None) for name in tokenizer.vocab_files_names]
    contents = [
        hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for file in files
        if isinstance(file, str) and Path(file).is_file()
    ]
    return [sorted(tokenizer.get_vocab().items()), settings, contents]
