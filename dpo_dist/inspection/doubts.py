"""Pairs whose label a model contradicts: it finds the rejected completion much likelier than the chosen one.

P pairs   N completions

Compared is the mean log-probability per token: a sum falls with every token, so that it would take the shorter
completion for the better one (Meng et al. 2024, "SimPO", arXiv:2405.14734, section 2.2).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from dpo_dist.inspection.columns import PairColumns

FEWEST = 20  # pairs; the spread of fewer is hardly known
LISTED = 20  # by a terminal and by a page; JSON has all
LIMIT = -3.0  # robust z; of a normal distribution one in 740 is below
# A normal distribution's standard deviation, divided by its median, and by its mean absolute deviation.
_PER_MEDIAN_DEVIATION, _PER_MEAN_DEVIATION = 1.4826022, 1.2533141


@dataclass(frozen=True)
class Doubt:
    """A pair whose rejected completion a model prefers.

    Attributes:
        example: in the data set.
        source: `path:line`.
        chosen, rejected: which of the example's completions they are, from 1.
        chosen_logps, rejected_logps: log-probability of the whole completion, nats.
        chosen_mean_logps, rejected_mean_logps: the same per token.
        difference: of these two, below 0: the model prefers the rejected one.
        robust_z: of the difference among those of all pairs.
        is_strong: it contradicts the label strongly.
    """

    example: int
    source: str
    chosen: int
    rejected: int
    chosen_logps: float
    rejected_logps: float
    chosen_mean_logps: float
    rejected_mean_logps: float
    difference: float
    robust_z: float
    is_strong: bool


@dataclass(frozen=True)
class Doubts:
    """What a model says of the labels of a data set.

    Attributes:
        model: its name.
        of: pairs.
        prefers_chosen: the share of them whose chosen completion the model prefers.
        median: of the differences, nats per token.
        ranked: pairs that it strongly contradicts, and LISTED in all of those whose rejected completion it prefers; the
            strongest first.
    """

    model: str
    of: int
    prefers_chosen: float
    median: float
    ranked: tuple[Doubt, ...]

    @property
    def count(self) -> int:
        """How many labels it strongly contradicts."""
        return sum(one.is_strong for one in self.ranked)

    @property
    def means(self) -> str:
        """What they are, in words."""
        return f"labels that {self.model} strongly contradicts"

    @property
    def remarks(self) -> list[str]:
        """What to make of it, a sentence each."""
        found = []
        if self.of < FEWEST:
            found.append(f"there are fewer than {FEWEST} pairs: no label is called strongly contradicted")
        if self.prefers_chosen <= 0.5:
            found.append(
                f"{self.model} prefers the chosen completion no more often than a coin would: what it contradicts "
                "tells little of the labels"
            )
        return found


def robust_scores(values: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
    """How many deviations each value is from the median; the outliers themselves have no part in the deviation.

    The deviation is the median absolute one, or the mean absolute one where that is 0, each scaled to a normal
    distribution's standard deviation; all values are 0 where both are.

    Source:
        Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers", ASQC Quality Press.
    """
    distances = values - np.median(values)
    absolute = np.abs(distances)
    deviation = _PER_MEDIAN_DEVIATION * np.median(absolute) or _PER_MEAN_DEVIATION * np.mean(absolute)
    return distances / deviation if deviation else np.zeros_like(values)


def find_doubts(columns: PairColumns, model: str, logps: Float[np.ndarray, " N"]) -> Doubts:
    """Pairs whose difference is below 0, ranked; strong are those that are also low outliers of all differences.

    The second alone would name pairs of which a model that agrees with all labels is only less sure; the first alone
    half of all pairs of a model that tells nothing.

    Args:
        columns: of the data set; it has pairs.
        model: its name.
        logps: log-probability that it gives to each completion of a pair, nats.
    """
    lengths, starts = columns.dataset.learned_lengths.flat, columns.dataset.completion_lengths.starts
    means = logps.astype(np.float64) / lengths
    differences = means[columns.chosen] - means[columns.rejected]
    scores = robust_scores(differences)
    is_strong = (differences < 0) & (scores < LIMIT) & (len(differences) >= FEWEST)
    num_listed = max(LISTED, int(is_strong.sum()))
    order = np.argsort(differences, kind="stable")  # and so is that of robust z
    ranked = []
    for pair in order[differences[order] < 0][:num_listed].tolist():
        example, chosen, rejected = (int(one[pair]) for one in (columns.example, columns.chosen, columns.rejected))
        first = int(starts[example])
        ranked.append(
            Doubt(
                example=example,
                source=columns.source_of(example),
                chosen=chosen - first + 1,
                rejected=rejected - first + 1,
                chosen_logps=float(logps[chosen]),
                rejected_logps=float(logps[rejected]),
                chosen_mean_logps=float(means[chosen]),
                rejected_mean_logps=float(means[rejected]),
                difference=float(differences[pair]),
                robust_z=float(scores[pair]),
                is_strong=bool(is_strong[pair]),
            )
        )
    share = float((differences > 0).mean())
    return Doubts(model, len(differences), share, float(np.median(differences)), tuple(ranked))
