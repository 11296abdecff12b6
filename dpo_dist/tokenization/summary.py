"""What is known of a tokenised data set without reading its rows, and whether its folder is whole."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from dpo_dist.tokenization.encode import TokenizedExample

EXAMPLES_FILE = "examples.arrow"
SUMMARY_FILE = "summary.json"
BLOCK = 2**20  # bytes that are read at once


@dataclass(frozen=True)
class Summary:
    """What is known of a data set without reading its rows."""

    num_examples: int
    digest: str
    """xxh3_128 of the Arrow file."""
    fingerprint: str
    max_token_id: int
    bad_rows: dict[str, int]
    notes: dict[str, int]
    ignored_columns: list[str]
    preferences: dict[str, int]
    """As `PreferenceCounts`."""


@dataclass
class PreferenceCounts:
    """What kinds of preferences a data set holds."""

    num_pairs: int = 0
    max_completions: int = 0
    """Of one example."""
    num_ranked: int = 0
    """Examples whose rows held a list of completions."""
    num_weighted: int = 0
    """Examples with a pair whose weight is not 1, or that have another weight themselves."""
    num_margins: int = 0
    """Pairs with a margin other than 0."""
    num_given_margins: int = 0
    """Those of them that come from a column `margin`, not from scores."""
    num_soft_labels: int = 0
    """Pairs whose label is not sure."""
    num_rated: int = 0
    """Completions that are called good or bad, in no pair."""
    num_given_tokens: int = 0
    """Tokens of completions that are not learned."""
    num_desirable: int = 0
    """Those of them that are called good."""

    def add(self, example: TokenizedExample) -> None:
        """Count one example."""
        num_margins = sum(pair.margin != 0 for pair in example.pairs)
        self.num_pairs += len(example.pairs)
        self.max_completions = max(self.max_completions, len(example.completion_ids))
        self.num_ranked += example.is_ranked
        self.num_weighted += any(weight != 1 for weight in (example.weight, *(pair.weight for pair in example.pairs)))
        self.num_margins += num_margins
        self.num_given_margins += 0 if example.is_ranked else num_margins
        self.num_rated += len(example.ratings)
        self.num_desirable += sum(example.ratings)
        self.num_soft_labels += sum(pair.probability != 1 for pair in example.pairs)


def write_summary(folder: Path, summary: Summary) -> None:
    """Write it, with a hash of itself."""
    values = asdict(summary)
    text = json.dumps({**values, "sha256": _seal(values)}, indent=2) + "\n"
    (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")


def read_summary(folder: Path) -> Summary:
    """What a folder's summary says.

    Raises:
        ValueError: it is not as it was written.
        OSError: it cannot be read.
    """
    values = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.pop("sha256", None) != _seal(values):
        raise ValueError(f"{SUMMARY_FILE} is damaged")
    return Summary(**values)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a finished data set, every byte as it was written.

    All of it is read: a flipped bit would be trained on, or end the process where a length is wrong.
    """
    try:
        return digest_of(folder / EXAMPLES_FILE) == read_summary(folder).digest
    except (OSError, ValueError, TypeError):
        return False


def digest_of(path: Path, num_bytes: int | None = None) -> str:
    """A hash of a whole file, or of so many bytes of it, at the pace of memory."""
    digest, left = xxhash.xxh3_128(), path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as stream:
        while block := stream.read(min(left, BLOCK)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _seal(values: dict[str, Any]) -> str:
    """A hash of everything else that a summary says."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
