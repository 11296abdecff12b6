"""Secrets stay out of what is printed, logged, handed to a tracker or left for the launcher.

They come with addresses (`https://user:secret@host`, `?token=...`), as tokens that are known by their beginning, and in
messages of other packages that quote the environment. `config.yaml` of a run and its checkpoints are left as they
are: they reproduce the run.
"""

import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

HIDDEN = "***"
_PATTERNS = (
    (re.compile(r"(?<=://)[^/\s]+(?=@)"), HIDDEN),
    (re.compile(r"(?<=://)([^/\s:@]+):\S+(?=@[\w.-]+)"), HIDDEN),  # a slash in the password
    (
        re.compile(
            r"([?&](?:\w+[-_])*(?:token|key|signature|sig|password|secret|credential)=)[^&\s\"')\]]+", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    # The query of a data file, whatever its keys are called; behind one that is hidden already stands a line.
    (re.compile(r"(://[^\s?]*\.(?:jsonl?|parquet|arrow|csv)(?:\.gz|\.zst)?\?)(?!\*{3})[^\s\"')\]]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(?<![A-Za-z0-9])(hf_|api_org_|gh[pousr]_|github_pat_|glpat-)\w{16,}"), rf"\1{HIDDEN}"),
)
_NAMES = re.compile(r"(?:TOKEN|API_KEY|PASSWORD|PASSWD|PASSPHRASE|SECRET|SECRET_KEY|ACCESS_KEY)$")
_SHORTEST = 8  # characters; a shorter value of the environment may be an ordinary word


def is_secret(name: str) -> bool:
    """Whether an environment variable holds a secret, by its name."""
    return _NAMES.search(name) is not None


def redacted(text: str) -> str:
    """The same text without what looks like a secret, and without the values of this environment's secrets."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret(name):
            text = text.replace(value, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redacted_values(value: Any) -> Any:
    """The same JSON value with every string redacted."""
    if isinstance(value, dict):
        return {key: redacted_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted_values(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


class RedactingFormatter(logging.Formatter):
    """Lines of the log, with tracebacks, redacted."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as it is written."""
        return redacted(super().format(record))


def redact_tracebacks() -> None:
    """An error that nobody expected shows its traceback redacted."""

    def show(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, where))))

    sys.excepthook = show
