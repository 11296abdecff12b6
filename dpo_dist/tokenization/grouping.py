"""Rows with the same prompt as one example, whose prompt and common completions are then computed once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dpo_dist.data import Pair
from dpo_dist.tokenization.encode import Ids, TokenizedExample
from dpo_dist.tokenization.notes import MERGED


class PromptGroups:
    """Examples of one source, merged where their prompts are the same token ids. Holds all of them in memory.

    An example whose row held a list of completions stays as it is: ranks of two rows cannot be compared. So does a
    demonstration: it has no preference to share a prompt with.
    """

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()
        self._groups: list[_Group] = []
        self._place: dict[Ids, int] = {}  # of each prompt

    def add(self, example: TokenizedExample) -> None:
        """Take the next example."""
        stays = example.is_ranked or not example.pairs
        place = len(self._groups) if stays else self._place.setdefault(example.prompt_ids, len(self._groups))
        if place == len(self._groups):
            self._groups.append(_Group(example))
        else:
            self._groups[place].add(example)
            self.notes[MERGED] += 1

    def examples(self) -> Iterator[TokenizedExample]:
        """Every group at the place of its first row."""
        for group in self._groups:
            yield group.merged()


@dataclass(slots=True)
class _Group:
    """A first example, and what the further ones of its prompt add; a row costs what it holds, however many there are.

    The example's own weight stays: what belongs to whole examples does not go with merging (`config.loss_rules`).
    """

    first: TokenizedExample
    number: dict[Ids, int] | None = None  # of each completion
    weights: dict[Pair, float] = field(default_factory=dict[Pair, float])  # of each preference, itself with weight 1

    def add(self, example: TokenizedExample) -> None:
        """Unite: each completion once; preferences that are the same in all but weight add their weights up."""
        if self.number is None:
            self.number = {}
            self.add(self.first)
        number = [self.number.setdefault(ids, len(self.number)) for ids in example.completion_ids]
        for pair in example.pairs:
            same = replace(pair, chosen=number[pair.chosen], rejected=number[pair.rejected], weight=1.0)
            self.weights[same] = self.weights.get(same, 0.0) + pair.weight

    def merged(self) -> TokenizedExample:
        """The example of all its rows."""
        if self.number is None:
            return self.first
        pairs = tuple(replace(pair, weight=weight) for pair, weight in self.weights.items())
        return replace(self.first, completion_ids=tuple(self.number), pairs=pairs)
