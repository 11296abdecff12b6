"""A few of the random kills of `python -m tests.soak`."""

from pathlib import Path

import pytest

from tests.soak import soak

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    assert len(soak(tmp_path, 3, 3, [])) == 3
