"""Completions that are only called good or bad (KTO rows), and pairs that say no more of theirs."""

from collections.abc import Iterator
from dataclasses import replace

from dpo_dist.config import Pairing
from dpo_dist.data import Pair
from dpo_dist.data.ranked import preferences
from dpo_dist.errors import DataError
from dpo_dist.tokenization.encode import Ids, TokenizedExample


class RatedCompletions:
    """Rated completions of a data set, paired by the token ids of their prompts. Holds all of them in memory.

    Args:
        pairing: which of a prompt's good and bad ones are compared.
        keeps_rest: whether those that nothing is compared with are kept as they are.
    """

    def __init__(self, pairing: Pairing, keeps_rest: bool = False) -> None:
        self.num_unpaired = 0
        """Rows that are left out: without a completion of the other kind for their prompt, or called both."""
        self._pairing: Pairing = pairing
        self._keeps_rest = keeps_rest
        self._of_prompt: dict[Ids, list[TokenizedExample]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether none waits."""
        return not self._of_prompt

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

        Which of these pairs there are is `data.pairing`'s, as of scores 1 and 0. Where the rest is kept, it stands in
        the place of its prompt.
        """
        for rated in self._of_prompt.values():
            ratings: dict[Ids, set[bool]] = {}
            for example in rated:
                ratings.setdefault(example.completion_ids[0], set()).add(example.ratings[0])
            sure = {ids: 1.0 if True in found else 0.0 for ids, found in ratings.items() if len(found) == 1}
            ends = preferences(list(sure.values()), self._pairing)
            kept = [example for example in rated if example.completion_ids[0] in sure]
            self.num_unpaired += len(rated) - (len(kept) if ends or self._keeps_rest else 0)
            if ends:
                used = sorted({end for pair in ends for end in pair})
                ids = [list(sure)[end] for end in used]
                pairs = tuple(Pair(used.index(better), used.index(worse)) for better, worse in ends)
                yield replace(rated[0], completion_ids=tuple(ids), pairs=pairs, ratings=())
            elif self._keeps_rest:
                yield from kept


def as_ratings(example: TokenizedExample) -> TokenizedExample:
    """What an example with pairs says of single completions: those never rejected are good, those never chosen bad.

    A completion that is better than one and worse than another is called neither, and left out.

    Raises:
        DataError: a pair says more than which one is better.
    """
    if any(pair.probability != 1 or (pair.margin and not example.is_ranked) for pair in example.pairs):
        raise DataError(
            f"{example.source}: the pair has a margin or a chosen_probability, and losses of single completions do not "
            "read it; remove the column, or use a loss of pairs"
        )
    chosen = {pair.chosen for pair in example.pairs}
    kept = sorted(chosen ^ {pair.rejected for pair in example.pairs})
    completions = tuple(example.completion_ids[number] for number in kept)
    return replace(example, completion_ids=completions, pairs=(), ratings=tuple(number in chosen for number in kept))
