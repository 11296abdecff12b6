"""Some completions of some data sets as examples without pairs, and their log-probabilities from a model.

N completions of all data sets, in the order of their `completion_lengths.flat`
I selected completions, in the same order
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork
from dpo_dist.distributed import join_over_ranks, raising_together
from dpo_dist.packing import ExampleSize, Packer, StepPlan
from dpo_dist.reference.source import score_bins
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample


@runtime_checkable
class Scorer(Protocol):
    """Anything that gives log pi(token | prefix) of a micro-batch's scored tokens; every rank calls it at once."""

    device: torch.device

    def token_logps(self, batch: MicroBatch) -> Tensor:
        """Of every scored token, nats."""
        ...


class Selection:
    """Selected completions, those of one row as one example.

    Args:
        datasets: one after another.
        places: of the selected completions among all N, ascending.
    """

    def __init__(self, datasets: Sequence[TokenizedDataset], places: Int64[np.ndarray, " I"]) -> None:
        self._datasets = datasets
        bases = np.cumsum([0, *(len(dataset.completion_lengths.flat) for dataset in datasets)])
        self._dataset = np.searchsorted(bases, places, side="right") - 1
        self._local = places - bases[self._dataset]
        self._row = np.empty_like(places)
        for number, dataset in enumerate(datasets):
            own = self._dataset == number
            self._row[own] = np.searchsorted(dataset.completion_lengths.starts, self._local[own], side="right") - 1
        is_new = np.ones(len(places), dtype=bool)
        is_new[1:] = (np.diff(self._dataset) != 0) | (np.diff(self._row) != 0)
        self.starts: Int64[np.ndarray, " examples_plus_1"] = np.append(np.flatnonzero(is_new), len(places))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> TokenizedExample:
        """The selected completions of one row, with its prompt."""
        dataset, row, chosen = self._locate(index)
        example = dataset[row]
        return TokenizedExample(
            example.prompt_ids, tuple(example.completion_ids[k] for k in chosen), (), example.source
        )

    def size(self, index: int) -> ExampleSize:
        """The size of one example; no token is read."""
        dataset, row, chosen = self._locate(index)
        lengths = dataset.completion_lengths[row]
        return ExampleSize(int(dataset.prompt_lengths[row]), tuple(lengths[k] for k in chosen), ())

    def source(self, completion: int) -> str:
        """`path:line` of one of the I completions."""
        return self._datasets[int(self._dataset[completion])].source_of(int(self._row[completion]))

    def _locate(self, index: int) -> tuple[TokenizedDataset, int, list[int]]:
        begin, end = self.starts[index], self.starts[index + 1]
        dataset, row = self._datasets[int(self._dataset[begin])], int(self._row[begin])
        return dataset, row, (self._local[begin:end] - dataset.completion_lengths.starts[row]).tolist()


def plans(selection: Selection, packer: Packer) -> Iterator[StepPlan]:
    """The selection in chunks of one bin of the reference per rank, in order; more bins for a single example only."""
    packer = replace(packer, max_tokens=packer.reference_max_tokens)  # nobody computes the policy's micro-batches
    index = 0
    while index < len(selection):
        sizes: list[ExampleSize] = []
        room = packer.world_size * packer.reference_max_tokens
        while index + len(sizes) < len(selection):
            size = selection.size(index + len(sizes))
            room -= size.input_tokens(packer.share_prompts)
            if sizes and room < 0:
                break
            sizes.append(size)
        plan = packer.plan(index, range(index, index + len(sizes)), sizes)
        while len(plan.reference_bins[0]) > 1 and len(sizes) > 1:  # the ranks' shares are not quite equal
            del sizes[-max(1, len(sizes) // 64) :]  # one by one, many ranks would plan hundreds of times
            plan = packer.plan(index, range(index, index + len(sizes)), sizes)
        yield plan
        index += len(sizes)


@dataclass(frozen=True)
class Scores:
    """What a model gives the completions of one chunk."""

    chunk: slice  # of the I completions
    num_tokens: Int64[np.ndarray, " C"]
    logps: Float32[np.ndarray, " C"]  # nats, the same on every rank
    token_logps: Float32[np.ndarray, " M"] | None  # of every token, one completion after another; on the first rank


def score(scorer: Scorer, plan: StepPlan, selection: Selection, packer: Packer, rank: int, with_tokens: bool) -> Scores:
    """Compute one chunk. Collective.

    Raises:
        DpoDistError: on every rank, if any rank fails.
    """
    first = plan.examples[0]
    sizes = [selection.size(index) for index in plan.examples]
    num_tokens = np.array([length for size in sizes for length in size.completions], dtype=np.int64)
    token_starts = np.concatenate([[0], np.cumsum(num_tokens)])
    begin = int(selection.starts[first])
    logps = torch.zeros(len(num_tokens), dtype=torch.float32)
    tokens = torch.zeros(int(token_starts[-1]) if with_tokens else 0, dtype=torch.float32)
    with raising_together():
        work = RankWork(plan, rank, selection, packer.share_prompts)
        own = [k - begin for index in work.rows for k in range(*selection.starts[index : index + 2].tolist())]
        places = torch.tensor(own, dtype=torch.int64)
        bins = work.reference_bins()
        recorder = _Recorder(scorer, with_tokens)
        logps[places] = score_bins(recorder.token_logps, bins, work.num_completions, scorer.device).cpu()
        for batch, values_M in zip(bins, recorder.recorded, strict=False):
            place_M = places[batch.completion_index_C][batch.completion_of_M]
            # Tokens of a completion lie one after another.
            within_M = torch.arange(len(place_M)) - torch.searchsorted(batch.completion_of_M, batch.completion_of_M)
            tokens[torch.from_numpy(token_starts)[place_M] + within_M] = values_M.cpu()
    join_over_ranks(logps)
    if with_tokens:
        join_over_ranks(tokens, first_rank_only=True)
    chunk = slice(begin, begin + len(num_tokens))
    return Scores(chunk, num_tokens, logps.numpy(), tokens.numpy() if with_tokens and rank == 0 else None)


class _Recorder:
    """A scorer whose values are kept, batch after batch."""

    def __init__(self, scorer: Scorer, keep: bool) -> None:
        self._scorer, self._keep = scorer, keep
        self.recorded: list[Tensor] = []

    def token_logps(self, batch: MicroBatch) -> Tensor:
        values = self._scorer.token_logps(batch)
        if self._keep:
            self.recorded.append(values.float())
        return values


def places_of(
    datasets: Sequence[TokenizedDataset], rows: Sequence[Int64[np.ndarray, " R"] | None]
) -> Int64[np.ndarray, " P"]:
    """Where the completions of some examples are among all N, ascending."""
    parts, base = [np.zeros(0, dtype=np.int64)], 0
    for dataset, wanted in zip(datasets, rows, strict=True):
        starts = dataset.completion_lengths.starts
        counts = np.diff(starts)
        is_wanted = np.ones(len(counts), dtype=bool)
        if wanted is not None:
            is_wanted[:] = False
            is_wanted[wanted] = True
        parts.append(base + np.flatnonzero(np.repeat(is_wanted, counts)))
        base += int(starts[-1])
    return np.concatenate(parts)
