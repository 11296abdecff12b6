"""Every file of the cache cut, emptied, and with flipped bits: the same numbers as before, or an error in one line."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.metrics import WALL_CLOCK
from tests.golden.trajectories import FOLDER

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900)]

FLIPS = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], tuple[int, list[Any], str]]]:
    """Train anew in a new folder, with the cache of all runs before: exit code, lines, output."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "run.yaml").write_text(
        f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
        f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 6}}]}}\n"
        "reference: {source: cache}\n"
        "train: {examples_per_step: 3, max_steps: 2}\n"
        "log: {report_to: []}\n"
        "parallel: {deepspeed: zero0_cpu}\n"
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("DPO_DIST_CACHE", str(folder / "cache"))
    # Weights that were written long ago: their hash is remembered.
    patch.setattr("dpo_dist.pretrained.digests._SETTLED_NS", -1)
    count = 0

    def run() -> tuple[int, list[Any], str]:
        nonlocal count
        count += 1
        out = folder / f"out{count}"
        result = CliRunner().invoke(app, ["train", str(folder / "run.yaml"), f"train.output_dir={out}"])
        lines = []
        if result.exit_code == 0:
            parsed = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            lines = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in parsed]
        return result.exit_code, lines, result.output

    run.cache = folder / "cache"  # type: ignore[attr-defined]
    yield run
    patch.undo()


def damages(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Every kind of damage."""
    draw = random.Random(len(whole))
    yield "emptied", b""
    yield "cut", whole[: len(whole) // 2]
    yield "one byte short", whole[:-1]
    for _ in range(FLIPS if whole else 0):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        yield f"bit {bit} of byte {place}", whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]


def test_no_damage_gives_another_number(runs: Any) -> None:
    code, expected, output = runs()
    assert code == 0, output
    assert runs()[1] == expected
    sound = {path: path.read_bytes() for path in sorted(runs.cache.rglob("*")) if path.is_file()}
    kinds = {path.name for path in sound if path.suffix != ".lock"}
    assert {"examples.arrow", "summary.json", "reference.json", "rows-000001.arrow"} <= kinds, kinds
    table: dict[str, Counter[str]] = {}
    for path, whole in sound.items():
        if not whole:
            continue
        found = table.setdefault(path.name if "weights" not in str(path.parent) else "weights/*.json", Counter())
        for damage, content in damages(whole):
            path.write_bytes(content)
            code, lines, output = runs()
            assert code in (0, 1, 2) and "Traceback" not in output, f"{path} {damage}: {output}"
            assert code or lines == expected, f"{path} {damage}"
            found["same numbers" if code == 0 else f"refused, exit code {code}"] += 1
            for other, before in sound.items():
                other.parent.mkdir(parents=True, exist_ok=True)
                other.write_bytes(before)
            for extra in set(runs.cache.rglob("*")) - sound.keys():
                if extra.is_file():
                    extra.unlink()
    for name, counts in table.items():
        print(f"{name:24} {dict(counts)}")
    assert not any("exit code 1" in kind for counts in table.values() for kind in counts)
