"""Which examples form a global step; resumable, independent of world size.

A function of (seed, step) and nothing else: resuming is arithmetic, and no batch is ever skipped to get somewhere. Of a
large data set the order is never written down: where an example stands in it is computed.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LISTED = 2**20  # examples of which the order is drawn as a whole, 8 bytes each
_ROUNDS = 8


@dataclass(frozen=True)
class Sampler:
    """The order of examples over all epochs, cut into global steps.

    An epoch has ceil(num_examples / examples_per_step) steps, the last one shorter; nothing is dropped or repeated.
    """

    num_examples: int
    examples_per_step: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-self.num_examples // self.examples_per_step)

    def examples_of(self, step: int) -> tuple[int, ...]:
        """Rows of the data set that form global step `step`, counted from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.examples_per_step
        places = np.arange(start, min(start + self.examples_per_step, self.num_examples))
        if not self.shuffle:
            return tuple(places.tolist())
        if self.num_examples > LISTED:
            return tuple(shuffled(places, self.num_examples, self.seed, epoch).tolist())
        return tuple(_epoch_order(self.num_examples, self.seed, epoch)[places].tolist())

    def examples_seen(self, step: int) -> int:
        """How many examples the first `step` steps hold."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.num_examples + min(steps * self.examples_per_step, self.num_examples)

    def num_steps(self, num_epochs: float) -> int:
        """Steps in a possibly fractional number of epochs, rounded up as transformers does."""
        # Rounded before it is rounded up: 1.1 * 10 is 11.000000000000002.
        return math.ceil(round(num_epochs * self.steps_per_epoch, 6))


def shuffled(places: np.ndarray, num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Which examples stand at some places of an epoch's order; no other place is looked at.

    A Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions")
    permutes the smallest square of a power of two that holds all places; who leaves the data set is permuted again
    until it is back (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): under four times on average.

    Args:
        places: int64, each at least 0 and below `num_examples`.
        num_examples: of the data set, at most 2^62.
        seed, epoch: another order for each.
    """
    keys = np.random.default_rng([seed, epoch]).integers(2**64, size=_ROUNDS, dtype=np.uint64)
    bits = np.uint64(((num_examples - 1).bit_length() + 1) // 2)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        found[outside] = _permuted(found[outside], bits, keys)
        outside = found >= num_examples
    return found.astype(np.int64)


def _permuted(values: np.ndarray, bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The last steps of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Every epoch has a generator of its own, so that no earlier epoch has to be drawn to reach it.
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
