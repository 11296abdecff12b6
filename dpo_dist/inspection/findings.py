"""What is wrong with the pairs of a data set: which rows, and which others they are held against."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from dpo_dist.inspection.columns import PairColumns
from dpo_dist.near import NearIndex, Shingles, likeness, without
from dpo_dist.quality import find_faults


@dataclass(frozen=True)
class Occurrence:
    """One row with a fault, and the row that it repeats, contradicts or shares its prompt with."""

    example: int
    other: int | None
    source: str
    other_source: str | None


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        kind: its name, such as `repeated`.
        means: the same in words, for a table.
        of: how many there are that could have it.
        occurrences: every one, in order.
    """

    kind: str
    means: str
    of: int
    occurrences: tuple[Occurrence, ...]

    @property
    def count(self) -> int:
        """How many have it."""
        return len(self.occurrences)


def repeated(columns: PairColumns) -> Finding:
    """Pairs that an earlier row says already."""
    chosen, rejected = columns.numbers
    _, first, group = np.unique((chosen << 31) | rejected, return_index=True, return_inverse=True)
    pairs = find_faults(chosen, rejected).repeated
    found = [(int(columns.example[pair]), int(columns.example[first[group[pair]]])) for pair in pairs]
    return _finding("repeated", "pairs said before", len(chosen), columns, found)


def contradicting(columns: PairColumns) -> Finding:
    """Pairs that cannot all be right; each beside one that contradicts it, or the next one round the circle."""
    chosen, rejected = columns.numbers
    pairs = find_faults(chosen, rejected).contradicting.tolist()
    opposite: dict[tuple[int, int], int] = {}
    following: dict[int, int] = {}
    for pair in pairs:
        opposite.setdefault((int(chosen[pair]), int(rejected[pair])), pair)
        following.setdefault(int(chosen[pair]), pair)
    found = []
    for pair in pairs:
        better, worse = int(chosen[pair]), int(rejected[pair])
        other = opposite.get((worse, better), following[worse])
        found.append((int(columns.example[pair]), int(columns.example[other])))
    return _finding("contradicting", "pairs that contradict each other", len(chosen), columns, found)


def alike(columns: PairColumns, threshold: float) -> Finding:
    """Pairs whose two completions are nearly the same."""
    texts = columns.completion_shingles
    found = [
        (int(example), int(example))
        for example, chosen, rejected in zip(columns.example, columns.chosen, columns.rejected, strict=True)
        if likeness(texts[chosen], texts[rejected]) >= threshold
    ]
    return _finding("alike", "pairs whose two completions are nearly the same", len(columns.example), columns, found)


def near_prompts(columns: PairColumns, threshold: float) -> Finding:
    """Different prompts that are nearly an earlier one; each at its first row."""
    order = np.argsort(columns.prompts.first)
    found = _nearly_earlier(
        [(int(columns.prompts.first[one]), columns.prompt_shingles[one]) for one in order], threshold
    )
    return _finding("near_prompts", "prompts that are nearly an earlier one", len(columns.prompts), columns, found)


def near_completions(columns: PairColumns, threshold: float) -> Finding:
    """Different completions of another row that are nearly an earlier one, whatever their prompts are."""
    starts = columns.dataset.completion_lengths.starts
    example_of = np.repeat(np.arange(len(columns.dataset)), np.diff(starts))
    places = np.sort(columns.completions.first)
    texts = [(int(example_of[place]), columns.completion_shingles[place]) for place in places]
    found = _nearly_earlier(texts, threshold)
    return _finding("near_completions", "completions that are nearly an earlier one", len(places), columns, found)


def near_pairs(columns: PairColumns, threshold: float, skipped: Collection[int] = ()) -> Finding:
    """Rows of which a pair is nearly that of an earlier row: prompt, chosen and rejected each are.

    Args:
        columns: of the data set.
        threshold: likeness from which on texts are near.
        skipped: examples that are left out of account.
    """
    index, owner, found = NearIndex(threshold), dict[int, int](), []
    for example, pairs in pairs_by_example(columns):
        if example in skipped:
            continue
        prompt = columns.prompt_shingles[columns.prompts.group[example]]
        texts = columns.completion_shingles
        items = [
            (pair, index.item(prompt, texts[columns.chosen[pair]], texts[columns.rejected[pair]])) for pair in pairs
        ]
        near = next((one for _, item in items if (one := index.find(item)) is not None), None)
        if near is not None:
            found.append((example, owner[near]))
            continue
        # The pairs of one row are not held against each other.
        for pair, item in items:
            index.add(pair, item)
            owner[pair] = example
    num_examples = len(np.unique(columns.example))
    return _finding("near_pairs", "rows that are nearly an earlier one", num_examples, columns, found)


def shared_prompts(columns: PairColumns, training: PairColumns) -> Finding:
    """Held-out examples whose prompt is trained on."""
    places = training.prompts.find(columns.prompts.keys)[columns.prompts.group]
    found = [(example, int(training.prompts.first[place])) for example, place in enumerate(places) if place >= 0]
    return _finding("held_out_prompts", "prompts that are trained on too", len(places), columns, found, training)


def nearly_shared_prompts(columns: PairColumns, training: PairColumns, threshold: float, common: Shingles) -> Finding:
    """Examples whose prompt is nearly one of the other set, and not the same.

    Args:
        columns, training: the two sets.
        threshold: likeness from which on texts are near.
        common: shingles that tell nothing, in either of them.
    """
    index = NearIndex(threshold)
    for text, first in zip(without(training.whole_prompts, common), training.prompts.first, strict=True):
        index.add(int(first), index.item(text))
    texts = without(columns.whole_prompts, common)
    same = training.prompts.find(columns.prompts.keys) >= 0
    near = [None if same[one] else index.find(index.item(text)) for one, text in enumerate(texts)]
    found = [
        (example, place) for example, prompt in enumerate(columns.prompts.group) if (place := near[prompt]) is not None
    ]
    number = len(columns.dataset)
    return _finding("near_held_out_prompts", "prompts nearly trained on", number, columns, found, training)


def pairs_by_example(columns: PairColumns) -> Iterator[tuple[int, list[int]]]:
    """Each example that has pairs, with their places."""
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for pair, example in enumerate(columns.example.tolist()):
        grouped[example].append(pair)
    yield from grouped.items()


def _nearly_earlier(texts: list[tuple[int, Shingles]], threshold: float) -> list[tuple[int, int]]:
    """(example, earlier example) of each text that is nearly one of an earlier example."""
    index, owner, found = NearIndex(threshold), list[int](), []
    for number, (example, text) in enumerate(texts):
        item = index.item(text)
        owner.append(example)
        near = index.find(item)
        if near is None:
            index.add(number, item)
        elif owner[near] != example:
            found.append((example, owner[near]))
    return found


def _finding(
    kind: str,
    means: str,
    of: int,
    columns: PairColumns,
    found: list[tuple[int, int]],
    others: PairColumns | None = None,
) -> Finding:
    beside = others or columns
    occurrences = tuple(
        Occurrence(example, other, columns.source_of(example), beside.source_of(other)) for example, other in found
    )
    return Finding(kind, means, of, occurrences)
