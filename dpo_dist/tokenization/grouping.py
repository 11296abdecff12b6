"""Rows with the same prompt as one example, whose prompt and common completions are then computed once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from dpo_dist.data import Pair
from dpo_dist.tokenization.encode import Ids, TokenizedExample

# Counted in TokenizedDataset.notes: rows that became part of an earlier one.
MERGED = "merged_by_prompt"


class PromptGroups:
    """Examples of one source, merged where their prompts are the same token ids. Holds all of them in memory.

    An example whose row held a list of completions stays as it is: ranks of two rows cannot be compared.
    """

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()
        self._examples: list[TokenizedExample] = []
        self._place: dict[Ids, int] = {}  # of each prompt

    def add(self, example: TokenizedExample) -> None:
        """Take the next example."""
        if example.is_ranked:
            self._examples.append(example)
            return
        place = self._place.setdefault(example.prompt_ids, len(self._examples))
        if place == len(self._examples):
            self._examples.append(example)
        else:
            self._examples[place] = _merged(self._examples[place], example)
            self.notes[MERGED] += 1

    def examples(self) -> Iterator[TokenizedExample]:
        """Every group at the place of its first row."""
        yield from self._examples


def _merged(first: TokenizedExample, second: TokenizedExample) -> TokenizedExample:
    """Each completion once; preferences that are the same in all but weight add their weights up.

    The example's own weight stays: what belongs to whole examples does not go with merging (`config.loss_rules`).
    """
    completions = tuple(dict.fromkeys((*first.completion_ids, *second.completion_ids)))
    weights: dict[Pair, float] = {}
    for example in (first, second):
        number = [completions.index(ids) for ids in example.completion_ids]
        for pair in example.pairs:
            same = replace(pair, chosen=number[pair.chosen], rejected=number[pair.rejected], weight=1.0)
            weights[same] = weights.get(same, 0.0) + pair.weight
    pairs = tuple(replace(pair, weight=weight) for pair, weight in weights.items())
    return replace(first, completion_ids=completions, pairs=pairs)
