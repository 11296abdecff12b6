"""A model is a folder on disk: hub ids are downloaded to one first, so that what is checked is what is loaded."""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dpo_dist.demo import demo_model_folder
from dpo_dist.errors import ModelError

ADAPTER_SETTINGS = "adapter_config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve_folder(name: str, key: str, revision: str | None, cache_dir: Path) -> Path:
    """The folder of a model: a path, the demo model, or a hub id that is downloaded.

    Args:
        name: what the user wrote.
        key: the dotted path it was written under, for messages.
        revision: commit, tag or branch of a hub id.
        cache_dir: where the converted demo model lives.

    Raises:
        ModelError: there is nothing to load under that name.
    """
    if name == "demo":
        return demo_model_folder(cache_dir)
    folder = Path(os.path.expanduser(name))
    if folder.is_file():
        raise ModelError(f"{key}={name} is a file; give the folder it is in")
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:  # no hub id: the hub is not asked for it
            raise ModelError(
                f"{key}={name} does not exist; give the folder save_pretrained wrote, or a hub id such as owner/name"
            )
        folder = _download(name, key, revision)
    _refuse_adapter(folder, name, key)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{key}={name} has no config.json; give the folder save_pretrained wrote, or a hub id")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{key}={name} has no weights (*.safetensors); pickled weights (.bin, .pt) are not read, since loading "
            "them can run code: convert them with save_pretrained"
        )
    try:
        missing = [path.name for path in weight_files(folder) if not path.is_file()]
    except ModelError as error:
        raise ModelError(f"{key}={name}: {error}") from None
    if missing:
        raise ModelError(
            f"{key}={name} lacks {len(missing)} of the files that its {_INDEX} names, such as {missing[0]}; copy the "
            "folder again"
        )
    return folder


def _refuse_adapter(folder: Path, name: str, key: str) -> None:
    """An adapter's folder is no model, whatever else lies in it."""
    weights = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model")]
    if not (folder / ADAPTER_SETTINGS).is_file() or (weights and (folder / "config.json").is_file()):
        return
    whole = f"to make a whole model of it, run `dpo-dist export {name} NEW_FOLDER --merged`"
    if key == "model.model_name_or_path":
        base = _base_of(folder) or "the model that it belongs to"
        way_out = f"to go on training it, set adapter.adapter_name_or_path={name} and {key}={base}; {whole}"
    elif key == "model.reference_name_or_path":
        way_out = f"{whole}; a run with adapter.adapter_name_or_path={name} has it as its reference without this key"
    else:
        way_out = "give the model that it belongs to"
    raise ModelError(
        f"{key}={name} is an adapter, not a model (it has {ADAPTER_SETTINGS}, and no model's weights); {way_out}"
    )


def _base_of(folder: Path) -> str | None:
    """The model that an adapter names as its own, if any."""
    try:
        named = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and named else None


def weight_files(folder: Path) -> list[Path]:
    """The files transformers reads the weights from: some folders hold the same weights once more under other names.

    Raises:
        ModelError: nothing says which files these are.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not (folder / _INDEX).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise ModelError(f"it holds {found}, and neither {_WHOLE} nor {_INDEX}; give a whole model")
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"its {_INDEX} is damaged: it has no weight_map of names to files; copy it again") from None


def _download(name: str, key: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        nothing = f"{key}={name} is neither a folder here nor a model that can be downloaded"
        if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            # What the library says is to go online, which such a machine cannot.
            fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
            raise ModelError(
                f"{nothing} (HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} has no copy); check the path or the "
                f"hub id, or run `{fetch}` where there is network and copy that folder (docs/offline.md)"
            ) from None
        raise ModelError(
            f"{nothing} ({first_line(error)}); check the path or the hub id, and HF_TOKEN and HF_HUB_OFFLINE if it is "
            "on the hub"
        ) from None


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and how many bytes that takes."""
    # The format: the header's length in 8 bytes, the header in JSON, and the tensors' bytes after it.
    header_size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    return header, header_size


def num_parameters(folder: Path) -> int:
    """Elements of all tensors in a folder's weight files, from their headers."""
    total = 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            header, _ = read_header(file)
        total += sum(math.prod(entry["shape"]) for entry in header.values())
    return total


def raise_if_own_code(error: Exception, what: str, option: str) -> None:
    """To be called with what transformers raised, before it is taken for anything else.

    Args:
        error: its error.
        what: the model, for the message.
        option: what allows such code.
    Raises:
        ModelError: the model needs code of its own, which may not run.
    """
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{what} needs code of its own, which is not run unasked; read that code, then give {option}"
        ) from None


def first_line(error: Exception) -> str:
    """What other packages say, short enough to stand inside of a message of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
