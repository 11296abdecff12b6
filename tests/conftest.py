"""What every test gets: random generators that start the same, and a package whose calls are checked."""

import random
import sys

import pytest

SEED = 1234


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(SEED)
    # Only what is imported already: a test of the configuration shall not load torch.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
