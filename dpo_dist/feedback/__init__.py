"""What people said of answers in production, as preference data that the next round trains on.

    events.py   one line of a log       rows, each as `dpo_dist.data` reads it
    store.py    a set of versions       Parquet files, each written once and never changed

A set is a folder of splits as any other: `data.train.0.path` names it.
"""

from dpo_dist.feedback.events import EVENT_COLUMNS, KINDS, Statement, statements_of
from dpo_dist.feedback.store import Added, FeedbackSet, Version

__all__ = ["EVENT_COLUMNS", "KINDS", "Added", "FeedbackSet", "Statement", "Version", "statements_of"]
