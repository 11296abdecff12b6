"""Entries of data.train as one data set: tokenised once, found again by its content.

The folder's name is a hash of all that decides what is in it. It is written under a temporary name and renamed when it
is complete and on the disk, behind a file lock: of any number of processes one tokenises, the others wait and map its
result. A kill at any moment leaves nothing that could be taken for whole, and what the next start goes on from.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from dpo_dist.config import DataConfig, DataSource, Rated
from dpo_dist.data import open_source
from dpo_dist.data.held_out import Part
from dpo_dist.durable import locked
from dpo_dist.errors import DataError
from dpo_dist.tokenization.dataset import TokenizedDataset
from dpo_dist.tokenization.processes import RowProcesses
from dpo_dist.tokenization.row_encoder import RowEncoder
from dpo_dist.tokenization.summary import is_whole
from dpo_dist.tokenization.tokenizer import TokenizerSpec, load_tokenizer, tokenizer_digest
from dpo_dist.tokenization.worker import Work
from dpo_dist.tokenization.writing import write_dataset

# Raise when the same rows would be written as other ids or in another layout.
DATA_FORMAT = 6
_LOGGER = logging.getLogger(__name__)
_DATED = "the chat template writes today's date into prompts: data tokenised on another day will differ"


def prepare_dataset(
    sources: Sequence[DataSource],
    data: DataConfig,
    tokenizer: TokenizerSpec,
    cache_dir: Path,
    *,
    section: str = "data.train",
    first_index: int = 0,
    demonstrations: bool = False,
    part: Part = "whole",
    rated: Rated = "paired",
) -> TokenizedDataset:
    """Tokenise all rows of `sources`, one source after another, or find them in the cache.

    Any number of processes may call it at once. The tokenizer is loaded only if a source holds text.

    Args:
        sources: entries of data.train, or one entry of data.evaluation.
        data: what to do with over-long and bad rows.
        tokenizer: which tokenizer text is given to.
        cache_dir: where tokenised data sets are kept; made if missing.
        section, first_index: where the first of `sources` stands in the configuration, for messages.
        demonstrations: read the best completion of each row alone, for a supervised run.
        part: the prompts that are trained on, or those that data.holdout holds out.
        rated: what becomes of completions that are called good or bad; "all" takes pairs apart into such.
    Raises:
        DataError: at a fault of a file; if there are bad rows, of all of them, unless data.on_bad_row is skip; if a
            source has no usable row.
        ModelError: if text has to be tokenised, and the tokenizer cannot be loaded or lacks what the rows need.
    """
    opened = [
        open_source(source, f"{section}.{first_index + index}", part, data.holdout, cache_dir)
        for index, source in enumerate(sources)
    ]
    needs_tokenizer = not all(source.holds_token_ids() for source in opened)
    loaded = load_tokenizer(tokenizer) if needs_tokenizer else None
    name = f"{tokenizer.key}={tokenizer.path}"
    encoder = RowEncoder(data, loaded, name, demonstrations, part)
    digest = tokenizer_digest(loaded) if loaded is not None else None  # an encoder switches a tokenizer's traps off
    work = Work(data, tokenizer if needs_tokenizer else None, name, demonstrations, part)
    identities = [source.identity() for source in opened]
    folder = cache_dir / _cache_key(identities, data, digest, demonstrations, rated)
    # Looked up without the lock first: a folder under its final name is whole, and most starts find it.
    if not is_whole(folder):
        try:
            # Conversations are their owner's affair.
            cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(folder, "tokenises the same data"):
                if not is_whole(folder):
                    place = section if len(opened) > 1 else opened[0].key
                    if "strftime_now" in encoder.chat_template:
                        _LOGGER.warning(_DATED)
                    with closing(RowProcesses(encoder, work, digest)) as processes:
                        write_dataset(folder, opened, identities, data, processes, place, rated)
        except OSError as error:
            raise DataError(
                f"{cache_dir}: tokenised data cannot be written ({error.strerror or error}); "
                "make room, or choose another folder for the cache"
            ) from error
    return TokenizedDataset(folder)


def repeated_data(data: DataConfig, training: TokenizedDataset, held_out: Sequence[TokenizedDataset]) -> list[str]:
    """What is named twice in data.train, or is both trained on and held out; none of it is an error.

    A name is enough, whatever the limits are: every source is read from its first row on. Equal examples are found
    under other names too.

    Args:
        data: the entries of data.train and data.evaluation.
        training: the data set of all entries of data.train.
        held_out: the data set of each entry of data.evaluation, and parts of data.train that are held out.
    """
    found: list[str] = []
    given = held_out[: len(data.evaluation)]  # no prompt of the others is trained on
    first_key: dict[tuple[str | None, ...], str] = {}
    for index, source in enumerate(data.train):
        key = f"data.train.{index}"
        first = first_key.setdefault(_place(source), key)
        if first != key:
            found.append(
                f"{key}.path={source.shown} names the same data as {first}: its rows are trained on twice in an epoch"
            )
    for index, (source, dataset) in enumerate(zip(data.evaluation, given, strict=True)):
        key = f"data.evaluation.{index}.path={source.shown}"
        if first := first_key.get(_place(source)):
            found.append(f"{key} names the same data as {first}: what it measures was trained on")
        elif dataset.fingerprint == training.fingerprint:
            found.append(f"{key} holds the same examples as data.train: what it measures was trained on")
    return found


def _place(source: DataSource) -> tuple[str | None, ...]:
    path = Path(source.path).expanduser()
    where = str(path.resolve()) if path.exists() else source.path
    return where, source.name, source.revision, source.split


def _cache_key(
    identities: Sequence[list[str]], data: DataConfig, tokenizer: str | None, demonstrations: bool, rated: Rated
) -> str:
    """Name of the folder: equal for equal content, whatever the machine or the time of the files."""
    parts = {
        "format": DATA_FORMAT,
        "sources": identities,
        "max_length": data.max_length,
        "truncation_mode": data.truncation_mode,
        "on_bad_row": data.on_bad_row,
        "pairing": data.pairing,
        "group_by_prompt": data.group_by_prompt,
        "demonstrations": demonstrations,
        "rated": rated,
        "tokenizer": tokenizer,
    }
    if not data.assistant_only_loss and tokenizer is not None:
        parts["assistant_only_loss"] = False
    if data.chat_template_kwargs and tokenizer is not None:
        parts["chat_template_kwargs"] = data.chat_template_kwargs
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
