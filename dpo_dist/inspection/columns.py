"""The prompts, completions and pairs of a data set as numbers: equal texts have equal ones.

E examples   P pairs   N completions
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np

from dpo_dist.near import Shingles, common_shingles, shingles, without
from dpo_dist.quality import digests
from dpo_dist.reference.keys import DistinctKeys, dataset_keys
from dpo_dist.tokenization import TokenizedDataset


class PairColumns:
    """A data set as it is looked at; what takes time is computed when it is asked for, once.

    Attributes:
        dataset: that data set.
        example: of each of the P pairs.
        chosen, rejected: of each pair the place of its completion among all N.
        prompts: of all E examples, as keys.
    """

    def __init__(self, dataset: TokenizedDataset) -> None:
        self.dataset = dataset
        self.example, self.chosen, self.rejected = dataset.pair_columns()
        self.prompts = DistinctKeys(
            np.concatenate([digests(columns.prompt_ids, columns.prompt_starts) for columns in dataset.id_columns()])
        )
        self.completions = DistinctKeys(dataset_keys([dataset]))

    @property
    def numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each pair the numbers of its chosen and its rejected completion, each told apart with its prompt."""
        return self.completions.group[self.chosen], self.completions.group[self.rejected]

    @cached_property
    def whole_prompts(self) -> list[Shingles]:
        """The shingles of each different prompt, in the order of `prompts.keys`."""
        every = list(_shingles_of(self.dataset, "prompt"))
        return [every[first] for first in self.prompts.first]

    @cached_property
    def common(self) -> Shingles:
        """Shingles that most prompts have; they tell nothing."""
        return common_shingles(self.whole_prompts)

    @cached_property
    def prompt_shingles(self) -> list[Shingles]:
        """The same without these."""
        return without(self.whole_prompts, self.common)

    @cached_property
    def completion_shingles(self) -> list[Shingles]:
        """Of each of the N completions."""
        return list(_shingles_of(self.dataset, "completion"))

    def source_of(self, example: int) -> str:
        """`path:line` of an example."""
        return self.dataset.source_of(example)


def _shingles_of(dataset: TokenizedDataset, kind: str) -> Iterator[Shingles]:
    for columns in dataset.id_columns():
        if kind == "prompt":
            ids, starts = columns.prompt_ids, columns.prompt_starts
        else:
            ids, starts = columns.completion_ids, columns.completion_starts
        for begin, end in pairwise(starts.tolist()):
            yield shingles(ids[begin:end])
