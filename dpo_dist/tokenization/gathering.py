"""What becomes of the examples of one source before they are written: nothing, or they wait for others."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from dpo_dist.config import DataConfig, Rated
from dpo_dist.tokenization.encode import TokenizedExample
from dpo_dist.tokenization.grouping import PromptGroups
from dpo_dist.tokenization.ratings import RatedCompletions, as_ratings


class Gathering:
    """Pairs rated completions, and merges prompts where `data.group_by_prompt` says so.

    Args:
        write: takes what is ready.
        data: the settings.
        rated: completions that are called good or bad, of this source and those before it.
        kind: "all" if they wait for nothing, and pairs are taken apart.
        entry: number of the source.
    """

    def __init__(
        self,
        write: Callable[[TokenizedExample], None],
        data: DataConfig,
        rated: RatedCompletions,
        kind: Rated = "paired",
        entry: int = 0,
    ) -> None:
        self._takes_apart, self._entry = kind == "all", entry
        self._write = write
        self._groups = PromptGroups() if data.group_by_prompt else None
        self._take = write if self._groups is None else self._groups.add
        self._rated = rated
        self.num_taken = self.num_rated = 0
        """Examples of this source: those that are used as they are, and those that wait for others of their prompt."""

    def add(self, example: TokenizedExample) -> None:
        """Take the next example."""
        if self._entry:
            example = replace(example, entry=self._entry)
        if self._takes_apart:
            self.num_taken += 1
            self._write(as_ratings(example) if example.pairs else example)
        elif not example.ratings:
            self.num_taken += 1
            self._take(example)
        else:
            self.num_rated += 1
            self._rated.add(example)

    def finish(self, is_last: bool) -> Counter[str]:
        """Write what has waited; rated completions wait for those of further sources.

        Returns:
            Notes.
        """
        for example in self._rated.examples() if is_last else ():
            self._take(example)
        if self._groups is None:
            return Counter()
        for example in self._groups.examples():
            self._write(example)
        return self._groups.notes
