"""Rows that cannot be used: how many there are of each kind, and where the first ones stand."""

from collections import Counter

from dpo_dist.config import DataConfig
from dpo_dist.data import RowFault, Source
from dpo_dist.errors import DataError, NothingHeldOutError

_SHOWN = 3  # rows of each reason


class BadRows:
    """Counts every one; remembers the first few of each reason, for a message."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[RowFault]] = {}

    def add(self, fault: RowFault) -> None:
        """Take the next one."""
        self.counts[fault.reason] += 1
        if self.counts[fault.reason] <= _SHOWN:
            self._first.setdefault(fault.reason, []).append(fault)

    @property
    def total(self) -> int:
        """How many there are."""
        return self.counts.total()

    def refusal(self, place: str, num_read: int) -> str:
        """Why a run that skips none of them cannot begin, and the ways out.

        Args:
            place: where the data are named in the configuration.
            num_read: rows that were read, these among them.
        """
        if self.total == 1:
            ((fault,),) = self._first.values()
            return f"{fault.source}: {fault.what}; {fault.way_out}, or set data.on_bad_row=skip ({fault.reason})"
        return (
            f"{place}: {self.total:,} of {num_read:,} rows cannot be used; repair them, or set data.on_bad_row=skip to "
            f"leave them out\n{self.listing()}"
        )

    def listing(self) -> str:
        """Lines with the count of every reason, the most frequent first, and its first rows below it."""
        lines: list[str] = []
        for reason, count in self.counts.most_common():
            shown = self._first[reason]
            more = f", the first {len(shown)}" if count > len(shown) else ""
            lines.append(f"  {count:,} x {reason}{more}:")
            said = ""
            for fault in shown:
                lines.append(f"    {fault.source}: {fault.what}{'' if fault.way_out == said else f'; {fault.way_out}'}")
                said = fault.way_out
        return "\n".join(lines)


def nothing_left(source: Source, data: DataConfig, num_read: int, reasons: str, left_out: BadRows) -> DataError:
    """What is wrong with a source of which no row is used."""
    if num_read == 0 and source.part == "whole":
        return DataError(f"{source.key}.fraction={source.fraction:g} leaves no row of {source.name}; raise it")
    if num_read == 0:
        side = "all prompts" if source.part == "trained" else "no prompt"
        what = f"data.holdout={data.holdout:g} holds out {side} of {source.key}.path={source.name}"
        return NothingHeldOutError(f"{what}; choose another share, or give held-out data as data.evaluation")
    kind, those = (NothingHeldOutError, "held out of") if source.part == "held_out" else (DataError, "of")
    return kind(
        f"{source.key}: none of the {num_read} rows {those} {source.name} can be used ({reasons}); "
        f"repair the data, or change the setting that leaves the rows out\n{left_out.listing()}"
    )
