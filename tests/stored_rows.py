"""Data sets of random token ids, and a scorer whose every value is a known function of the ids."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample
from dpo_dist.tokenization.writer import ExampleWriter

Ids = tuple[int, ...]


def examples_of(count: int, seed: int) -> list[TokenizedExample]:
    """Two or three completions each, of unequal lengths; ids below 60."""
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> Ids:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return tuple(torch.randint(0, 60, (length,), generator=generator).tolist())

    return [
        TokenizedExample(
            (row % 60, *ids(6)), tuple((k, *ids(5)) for k in range(2 + row % 2)), (Pair(0, 1),), f"pairs.jsonl:{row}"
        )
        for row in range(count)
    ]


def save_dataset(folder: Path, examples: Iterable[TokenizedExample]) -> TokenizedDataset:
    """The same as `prepare_dataset` writes it."""
    folder.mkdir(parents=True)
    writer = ExampleWriter(folder)
    for example in examples:
        writer.write(example)
    writer.finish({}, {}, [])
    return TokenizedDataset(folder)


def token_value(prefix: Sequence[int], target: int) -> float:
    """What the scorer gives a token after its prefix, nats; a multiple of 1/64, so that sums are exact in any order."""
    mixed = 7
    for token in (*prefix, target):
        mixed = (31 * mixed + token + 1) % 10_007
    return -(mixed % 640 + 1) / 64


def value_of(prompt: Ids, completion: Ids) -> float:
    """Sum over a completion's tokens."""
    return sum(token_value((*prompt, *completion[:k]), token) for k, token in enumerate(completion))


class KnownScorer:
    """Gives every token `token_value`, and notes which completions it was asked for."""

    device = torch.device("cpu")

    def __init__(self, error: float = 0.0) -> None:
        self.seen: list[tuple[Ids, Ids]] = []
        self.error = error  # added to every token

    def token_logps(self, batch: MicroBatch) -> Tensor:
        values = []
        for index in range(len(batch.score_index_M)):
            prefix = self._prefix(batch, index)
            target = int(batch.target_ids_M[index])
            values.append(token_value(prefix, target) + self.error)
            completion = int(batch.completion_of_M[index])
            if index + 1 == len(batch.score_index_M) or int(batch.completion_of_M[index + 1]) != completion:
                own = int((batch.completion_of_M == completion).sum())
                whole = (*prefix, target)
                self.seen.append((whole[:-own], whole[-own:]))
        return torch.tensor(values, dtype=torch.float32)

    @staticmethod
    def _prefix(batch: MicroBatch, index: int) -> Ids:
        """All tokens the position that predicts a token sees: its prompt, and its completion before the token."""
        place, layout = int(batch.score_index_M[index]), batch.layout
        segment = int(torch.searchsorted(layout.cu_q, place, right=True)) - 1
        key_begin = int(layout.cu_k[segment])
        num_seen = place - int(layout.cu_q[segment]) + 1 + layout.k_lengths[segment] - layout.q_lengths[segment]
        keys = range(key_begin, key_begin + num_seen)
        tokens = keys if layout.kv_index_U is None else layout.kv_index_U[list(keys)].tolist()
        return tuple(batch.input_ids_T[list(tokens)].tolist())
