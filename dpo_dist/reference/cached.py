"""From values that were computed before.

N completions of all data sets, in the order of their `completion_lengths.flat`
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import RankWork
from dpo_dist.tokenization import TokenizedDataset


@dataclass(frozen=True, eq=False)
class CachedReference:
    """Values that were stored, by data set and row."""

    datasets: tuple[TokenizedDataset, ...]
    bases: tuple[int, ...]  # where each data set's completions begin among all N, and N
    values_N: Float[Tensor, " N"]  # nats, float32, on the CPU
    device: torch.device  # where answers are wanted

    def completion_logps(self, work: RankWork) -> Float[Tensor, " C"]:
        """See `Reference`. Not collective: nothing is computed.

        Raises:
            RuntimeError: if the data set is not one of those that were looked up.
        """
        number = next((i for i, dataset in enumerate(self.datasets) if dataset is work.dataset), None)
        if number is None:
            raise RuntimeError("this data set was not looked up when the cache was opened")
        starts, base = self.datasets[number].completion_lengths.starts, self.bases[number]
        places = [base + k for row in work.rows for k in range(starts[row], starts[row + 1])]
        logps = self.values_N[torch.tensor(places, dtype=torch.int64)]
        if logps.isnan().any():
            raise RuntimeError("an example was not looked up when the cache was opened")
        if self.device.type == "cuda":
            logps = logps.pin_memory()  # so that the copy waits for nothing
        return logps.to(self.device, non_blocking=True)
