"""Which examples form a global step; resumable, independent of world size.

A function of (seed, step) and nothing else: resuming is arithmetic, and no batch is ever skipped to get somewhere.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


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
        order = _epoch_order(self.num_examples, self.seed, epoch, self.shuffle)
        return tuple(order[start : start + self.examples_per_step].tolist())

    def examples_seen(self, step: int) -> int:
        """How many examples the first `step` steps hold."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.num_examples + min(steps * self.examples_per_step, self.num_examples)

    def num_steps(self, num_epochs: float) -> int:
        """Steps in a possibly fractional number of epochs, rounded up as transformers does."""
        # Rounded before it is rounded up: 1.1 * 10 is 11.000000000000002.
        return math.ceil(round(num_epochs * self.steps_per_epoch, 6))


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(num_examples)
    # Every epoch has a generator of its own, so that no earlier epoch has to be drawn to reach it.
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
