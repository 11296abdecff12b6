"""A process that tokenises rows for another one. It does nothing else, and ends with it.

Whoever starts it has blocked the signals that ask for an end (`processes.py`): the parent alone decides. Where the
parent is gone, however it ended, its end of the connection is closed, and this process leaves at once.
"""

import gc
import os
import pickle
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

from dpo_dist.config import DataConfig
from dpo_dist.data.held_out import Part
from dpo_dist.tokenization.row_encoder import RawRow, RowEncoder
from dpo_dist.tokenization.tokenizer import TokenizerSpec, load_tokenizer, tokenizer_digest


@dataclass(frozen=True)
class Work:
    """What a worker needs to know once; rows follow."""

    data: DataConfig
    tokenizer: TokenizerSpec | None
    tokenizer_name: str
    demonstrations: bool
    part: Part = "whole"


def serve(connection: Connection) -> None:
    """Take `Work`, answer with the tokenizer's digest; then groups of rows, each answered with its outcome.

    A message of rows, and its answer, is a pair with the group's number. Rows are taken from the connection at all
    times, so that neither side waits for the other to read.
    """
    work: Work = connection.recv()
    groups: SimpleQueue[tuple[int, list[RawRow]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, groups), daemon=True).start()
    try:
        tokenizer = load_tokenizer(work.tokenizer) if work.tokenizer is not None else None
        encoder = RowEncoder(work.data, tokenizer, work.tokenizer_name, work.demonstrations, work.part)
        digest = tokenizer_digest(tokenizer) if tokenizer is not None else None
    except Exception as error:
        _answer(connection, -1, error)
        return
    _answer(connection, -1, digest)
    # Collecting garbage while a group's lists are made takes a fifth of all time, and finds none. Between groups hardly
    # anything lives that is not set aside here.
    gc.freeze()
    gc.disable()
    while True:
        number, rows = groups.get()
        _answer(connection, number, encoder.outcome(rows))
        del rows
        gc.collect()


def _receive(connection: Connection, groups: "SimpleQueue[tuple[int, list[RawRow]]]") -> None:
    try:
        while True:
            groups.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _answer(connection: Connection, number: int, outcome: object) -> None:
    try:
        message = pickle.dumps((number, outcome))
    except Exception:  # an exception may hold anything
        notes = "\n".join(getattr(outcome, "__notes__", []))
        message = pickle.dumps((number, RuntimeError(f"{outcome!r}\n{notes}")))
    try:
        connection.send_bytes(message)
    except OSError:
        os._exit(0)
