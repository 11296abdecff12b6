"""Completions that are only called good or bad (KTO rows), paired with those of the same prompt that are the other."""

from collections.abc import Iterator
from dataclasses import replace

from dpo_dist.config import Pairing
from dpo_dist.data import Pair
from dpo_dist.data.ranked import preferences
from dpo_dist.errors import DataError
from dpo_dist.tokenization.encode import Ids, TokenizedExample


class RatedCompletions:
    """The rated completions of a data set, by the token ids of their prompts. Holds all of them in memory."""

    def __init__(self, pairing: Pairing) -> None:
        self.num_unpaired = 0
        """Rows whose prompt has no completion of the other kind, or whose completion is called both."""
        self._pairing: Pairing = pairing
        self._of_prompt: dict[Ids, list[TokenizedExample]] = {}

    def add(self, example: TokenizedExample) -> None:
        """Take the next one; it has a rating.

        Raises:
            DataError: two kinds are no ranking.
        """
        if self._pairing == "list":
            raise DataError(
                f"{example.source}: data.pairing=list asks for rankings, and the row only calls its completion good or "
                "bad; use another pairing, or give scores or ranks"
            )
        self._of_prompt.setdefault(example.prompt_ids, []).append(example)

    def examples(self) -> Iterator[TokenizedExample]:
        """For each prompt with both kinds its completions, once each, and every good one over every bad one.

        Which of these pairs there are is `data.pairing`'s, as of scores 1 and 0.
        """
        for rated in self._of_prompt.values():
            ratings: dict[Ids, set[bool]] = {}
            for example in rated:
                ratings.setdefault(example.completion_ids[0], set()).add(example.rating is True)
            sure = {ids: 1.0 if True in found else 0.0 for ids, found in ratings.items() if len(found) == 1}
            ends = preferences(list(sure.values()), self._pairing)
            used = sorted({end for pair in ends for end in pair})
            ids = [list(sure)[end] for end in used]
            self.num_unpaired += sum(not ends or example.completion_ids[0] not in sure for example in rated)
            if ends:
                pairs = tuple(Pair(used.index(better), used.index(worse)) for better, worse in ends)
                yield replace(rated[0], completion_ids=tuple(ids), pairs=pairs, rating=None)
