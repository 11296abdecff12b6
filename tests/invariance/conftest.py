"""Launches each world size once, with all runs that the selected tests ask for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.invariance.points import Point
from tests.invariance.stories import story_configs, write_request
from tests.launching import launch, succeeded


@dataclass(frozen=True)
class Outcome:
    """What is left of one run."""

    output_dir: Path
    ranks: tuple[dict[str, Any], ...]  # each rank's observation


@pytest.fixture(scope="session")
def outcome_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`outcome_of(name, world_size)`: a run's folder and observations; the first call launches that world size."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    points: list[Any] = [
        item.callspec.params["point"] for item in items if "point" in getattr(item, "fixturenames", ())
    ]
    wants_stories = any(item.path.name == "test_stories.py" for item in items)

    @cache
    def finished(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        configs = _point_configs(points, world_size, folder) | (story_configs(folder) if wants_stories else {})
        write_request(folder / "request.json", configs)
        # Type-checked ranks, as nowhere else: these runs have the most settings.
        arguments = ("tests.checked", "tests.invariance.worker", str(folder))
        succeeded(launch(world_size, *arguments, cwd=folder, timeout=600 + 20 * len(configs)))
        return folder

    def outcome(name: str, world_size: int) -> Outcome:
        folder = finished(world_size)
        ranks = [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(world_size)]
        for rank, observation in enumerate(ranks):
            assert "error" not in observation, f"rank {rank}: {observation['error']}"
        return Outcome(folder / name, tuple(ranks))

    return outcome


def _point_configs(points: list[Point], world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {point.name: point.config(folder / point.name) for point in points if point.world_size == world_size}
