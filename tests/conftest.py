"""What every test gets: random generators that start the same, and a package whose calls are checked."""

import os
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests import cores

if TYPE_CHECKING:
    from tests.machine import Machine

SEED = 1234

# How long an example takes depends on what else the machine does; no test is about that.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

# The same kernels on every x86-64 machine: oneDNN's, ATen's and MKL's for AVX2. Where AVX512 or AMX adds up in another
# order, one weight of a run in bfloat16 may be rounded to its other neighbour, and what follows tells only how far such
# a run leaves its oracle. Read once, when torch computes first; launched ranks inherit it.
for _name, _kernels in (("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ATEN_CPU_CAPABILITY", "avx2"), ("MKL_CBWR", "AVX2")):
    os.environ.setdefault(_name, _kernels)


# Files whose tests wait for launches come first, so that no worker is left alone with them at the end.
_LONGEST_FIRST = ("golden", "invariance", "processes", "gpu_contract", "parity", "cli", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers, what takes long begins first."""
    place = {folder: number for number, folder in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.parent.name, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file go to one worker, and so do the files of `invariance` that look at the same launches."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "one launch" if file.endswith(("/test_points.py", "/test_stories.py")) else file

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """A test shares the machine with the other worker's, unless it launches several ranks."""
    with cores.shared():
        return (yield)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(SEED)
    # Only what is imported already: a test of the configuration shall not load torch.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator["Machine"]:
    """A CUDA device of compute capability 8.0 without any flash-attn package; `has` makes it another one."""
    from dpo_dist.attention.packages import find_package
    from tests.machine import Machine

    yield Machine(monkeypatch)
    find_package.cache_clear()
