"""Rows as they are read, to token ids: what a group of them becomes in any process."""

import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dpo_dist.config import DataConfig, Pairing
from dpo_dist.data import PreferenceExample, RowFault
from dpo_dist.data.columns import Row
from dpo_dist.data.held_out import Part, is_held_out
from dpo_dist.data.sources import example_of
from dpo_dist.errors import DpoDistError
from dpo_dist.tokenization.encode import Encoder, TokenizedExample

RawRow = tuple[str, Row | RowFault]  # and its place, `path:line`


@dataclass(frozen=True)
class EncodedRows:
    """What those of a group of rows became that are in the part, in their order, faults in their places."""

    results: list[TokenizedExample | RowFault]
    notes: Counter[str]
    num_rows: int
    """Of the group, in the part or not."""
    ignored: set[str]
    """Columns that mean nothing here."""


class RowEncoder:
    """Parses and tokenises rows.

    Args:
        tokenizer, tokenizer_name: as for `Encoder`.
        demonstrations: read the best completion of each row alone.
        part: rows of another one are passed over.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        tokenizer_name: str,
        demonstrations: bool,
        part: Part = "whole",
    ) -> None:
        self._encoder = Encoder(data, tokenizer, tokenizer_name)
        self._pairing: Pairing = data.pairing
        self._demonstrations = demonstrations
        self._part: Part = part
        self._held_out_share = data.holdout
        self.chat_template = self._encoder.chat_template

    def encode(self, rows: Sequence[RawRow]) -> EncodedRows:
        """Token ids of every row, or why it is of no use."""
        ignored: set[str] = set()
        parsed = [
            row if isinstance(row, RowFault) else example_of(row, where, ignored, self._pairing, self._demonstrations)
            for where, row in rows
        ]
        examples = self._encoder.encode([item for item in parsed if isinstance(item, PreferenceExample)])
        encoded = zip(examples, self._encoder.notes_of_rows, strict=True)
        results: list[TokenizedExample | RowFault] = []
        notes: Counter[str] = Counter()
        for item in parsed:
            result, own_notes = (item, {}) if isinstance(item, RowFault) else next(encoded)
            if self._is_in_part(result):
                results.append(result)
                notes.update(own_notes)
        return EncodedRows(results, notes, len(rows), ignored)

    def _is_in_part(self, result: TokenizedExample | RowFault) -> bool:
        """Faults are told of once, with what is trained on."""
        if self._part == "whole":
            return True
        held_out = isinstance(result, TokenizedExample) and is_held_out(result.prompt_ids, self._held_out_share)
        return held_out == (self._part == "held_out")

    def outcome(self, rows: Sequence[RawRow]) -> EncodedRows | Exception:
        """The same, or what was raised, for another place to raise it."""
        try:
            return self.encode(rows)
        except DpoDistError as error:
            return error
        except Exception as error:
            error.add_note(traceback.format_exc())
            return error
