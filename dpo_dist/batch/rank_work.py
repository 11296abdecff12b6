"""One rank's share of a planned step."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dpo_dist.batch.micro_batch import MicroBatch, build_micro_batch
from dpo_dist.packing import Bins, StepPlan
from dpo_dist.phases import reach
from dpo_dist.tokenization import TokenizedExample


@runtime_checkable
class Examples(Protocol):
    """Anything that gives an example by its row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> TokenizedExample: ...


class RankWork:
    """One rank's share of a planned step, as micro-batches for the policy and bins for the reference.

    Args:
        plan: the step, the same on every rank.
        rank: whose share.
        dataset: indexed by the rows the plan names.
        share_prompts: compute each prompt once, or once per completion.
        ld_alpha: see `build_micro_batch`.

    Attributes:
        rows: of the data set, of the rank's examples; their completions, one row after another, are in the order of
            `MicroBatch.completion_index_C`.
        num_completions: of all these rows.
    """

    def __init__(
        self, plan: StepPlan, rank: int, dataset: Examples, share_prompts: bool, ld_alpha: float | None = None
    ) -> None:
        self._plan, self._rank, self.share_prompts, self._ld_alpha = plan, rank, share_prompts, ld_alpha
        self.dataset = dataset
        self.rows = tuple(plan.examples[position] for position in plan.examples_of_rank(rank))
        self._made: dict[str, list[MicroBatch]] = {}
        self._examples: dict[int, TokenizedExample] = {}
        self._offsets: dict[int, int] = {}
        self.num_completions = 0
        for position in plan.examples_of_rank(rank):
            example = dataset[plan.examples[position]]
            self._examples[position] = example
            self._offsets[position] = self.num_completions
            self.num_completions += len(example.completion_ids)

    def micro_batches(self) -> list[MicroBatch]:
        """What the policy runs forward and backward on; equally many on every rank, which all ask for them."""
        reach("data")  # or their making would count as the reference's time
        return self._ask("policy", self._plan.micro_batches[self._rank])

    def reference_bins(self) -> list[MicroBatch]:
        """The same examples in the larger bins of a forward without gradient; equally many on every rank."""
        return self._ask("reference", self._plan.reference_bins[self._rank])

    def make(self, reads_bins: bool, pinned: bool) -> None:
        """Build now what `micro_batches` and `reference_bins` will give; no phase is reached.

        Args:
            reads_bins: whether somebody will ask for `reference_bins`.
            pinned: see `MicroBatch.pinned`.
        """
        wanted = {"policy": self._plan.micro_batches[self._rank]}
        if reads_bins:
            wanted["reference"] = self._plan.reference_bins[self._rank]
        for name, bins in wanted.items():
            built = self._built(bins)
            self._made[name] = [batch.pinned() for batch in built] if pinned else built

    def _ask(self, name: str, bins: Bins) -> list[MicroBatch]:
        if name not in self._made:
            return self._built(bins)
        return [batch.untouched() for batch in self._made[name]]  # what layers keep with one goes when it has been run

    def _built(self, bins: Bins) -> list[MicroBatch]:
        return [self.build(positions, self.share_prompts) for positions in bins]

    def example(self, position: int) -> TokenizedExample:
        """One of the rank's examples, by its position in the step."""
        return self._examples[position]

    def build(self, positions: Sequence[int], share_prompts: bool, limit: int | None = None) -> MicroBatch:
        """A micro-batch of some of the rank's examples; none gives a filler.

        Args:
            positions: in the step.
            share_prompts: compute each prompt once, or once per completion.
            limit: take only so many tokens, the first ones, of every prompt and of every completion.
        """
        examples = [self._examples[position].beginning(limit) for position in positions]
        offsets = [self._offsets[position] for position in positions]
        return build_micro_batch(examples, offsets, share_prompts, self._ld_alpha)
