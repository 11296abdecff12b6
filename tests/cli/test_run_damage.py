"""Every file that a run leaves cut, emptied, and with flipped bits: the same numbers, or a refusal with a way out."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dpo_dist.cli import app
from dpo_dist.cli.logs import set_up_logging
from dpo_dist.metrics import WALL_CLOCK
from tests.cli.test_cache_damage import damages
from tests.golden.trajectories import FOLDER

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900)]

CONFIG = (
    f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
    f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 9}}]}}\n"
    "train: {output_dir: out, examples_per_step: 3, max_steps: 2, learning_rate: 0.001, lr_scheduler_type: constant}\n"
    "checkpoint: {save_steps: 1, resume: auto}\n"
    "parallel: {deepspeed: zero0_cpu}\n"
)
OF_A_CHECKPOINT = (
    "manifest.json",
    "state.json",
    "metrics.crc32",
    "rng-rank00000.json",
    "rng-rank00000.safetensors",
    "shards/mp_rank_00_model_states.pt",
    "model_assets/config.json",
    "model_assets/generation_config.json",
)
OF_A_MODEL = ("config.json", "dpo_dist.json", "generation_config.json", "model.safetensors")
STEPS = ("step-000001", "step-000002")
BESIDE = ("config.yaml", "metrics.jsonl", "tensorboard/events", ".lock", "checkpoints/latest")
FILES = (
    *BESIDE,
    *(f"checkpoints/{step}/{name}" for step in STEPS for name in OF_A_CHECKPOINT),
    *(f"model/{name}" for name in OF_A_MODEL),
)
# Of the older checkpoint the manifest is read, and of the model nothing until the run is over: a few stand for all.
STANDING_FOR_ALL = (
    *BESIDE,
    *(f"checkpoints/step-000001/{name}" for name in ("manifest.json", "state.json")),
    *(f"checkpoints/step-000002/{name}" for name in OF_A_CHECKPOINT),
    "model/model.safetensors",
)
THREE = "train.max_steps=3"


@dataclass
class Runs:
    """A run that stands after step 2, and what it must come to after step 3."""

    sound: Path  # never touched
    out: Path  # a copy, to be damaged
    lines: list[bytes] = field(default_factory=list)
    model: dict[str, bytes] = field(default_factory=dict)
    table: dict[str, Counter[str]] = field(default_factory=dict)

    def renew(self) -> None:
        """Undo every damage."""
        shutil.rmtree(self.out)
        shutil.copytree(self.sound, self.out)

    def path_of(self, name: str) -> Path:
        return next(self.out.glob(f"{name}.*")) if name.startswith("tensorboard") else self.out / name

    def lines_left(self) -> list[bytes]:
        """What the metrics must hold after step 3: every line but those that were damaged."""
        left = (self.out / "metrics.jsonl").read_bytes().split(b"\n")
        was = (self.sound / "metrics.jsonl").read_bytes().splitlines()
        return [line for line, before in zip(self.lines, was, strict=False) if before in left] + self.lines[len(was) :]

    def count(self, name: str, outcome: str) -> None:
        self.table.setdefault(name, Counter())[outcome] += 1

    def has_right_model(self, out: Path | None = None) -> bool:
        return model_in(out or self.out) == self.model

    def damaged(self, *names: str) -> Iterator[str]:
        """Each damage, done to a new copy of the run: to the same file of each name."""
        content = {name: self.path_of(name).read_bytes() for name in names}
        every = zip(*(damages(content[name]) for name in names), strict=True)
        for kinds in list(every):
            self.renew()
            for name, (_, damaged) in zip(names, kinds, strict=True):
                self.path_of(name).write_bytes(damaged)
            yield f"{names}: {kinds[0][0]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("damage")
    (folder / "run.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_DIST_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert command("train", "train.output_dir=undisturbed", THREE).exit_code == 0
        assert command("train").exit_code == 0
        (folder / "out/.lock").write_text("process 1 on a machine that is gone")
        shutil.copytree(folder / "out", folder / "sound")
        undisturbed = folder / "undisturbed"
        found = Runs(folder / "sound", folder / "out", lines_in(undisturbed), model_in(undisturbed))
        yield found
    for name, counts in found.table.items():
        print(f"{name:64} {dict(counts)}")


def command(name: str, *overrides: str) -> Result:
    """A command that may refuse, in one line, and never breaks."""
    result = CliRunner().invoke(app, [name, "run.yaml", *overrides])
    return without_traceback(result)


def without_traceback(result: Result) -> Result:
    ended = result.exception is None or isinstance(result.exception, SystemExit)
    assert ended and "Traceback" not in result.output, f"{result.output}\n{result.exception!r}"
    return result


def lines_in(out: Path) -> list[bytes]:
    """The lines of the steps, without the clock."""
    found = []
    for line in (out / "metrics.jsonl").read_bytes().splitlines():
        values: dict[str, Any] = json.loads(line)
        kept = {key: value for key, value in values.items() if key not in WALL_CLOCK}
        found.append(json.dumps(kept, sort_keys=True).encode())
    return found


def model_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "model").iterdir()}


def files_in(out: Path) -> set[str]:
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return {"tensorboard/events" if name.startswith("tensorboard/") else name for name in names}


def test_every_file_is_looked_at(runs: Runs) -> None:
    runs.renew()
    assert files_in(runs.out) == set(FILES)


@pytest.mark.parametrize("name", STANDING_FOR_ALL)
def test_a_run_goes_on_to_the_same_end(runs: Runs, name: str) -> None:
    runs.renew()
    for damage in runs.damaged(name):
        expected = runs.lines_left()
        assert command("check", THREE).exit_code == 0, damage
        result = command("train", THREE)
        assert result.exit_code == 0, f"{damage}\n{result.output}"
        assert (runs.has_right_model(), lines_in(runs.out)) == (True, expected), damage
        lost = len(runs.lines) - len(expected)
        runs.count(name, f"lines lost: {lost}" if lost else "same numbers")


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_without_a_sound_checkpoint_there_is_advice(runs: Runs, name: str) -> None:
    runs.renew()
    for damage in runs.damaged(*(f"checkpoints/{step}/{name}" for step in STEPS)):
        assert command("check", THREE).exit_code in (0, 3), damage
        result = command("train", THREE)
        runs.count(f"both checkpoints: {name}", f"exit code {result.exit_code}")
        if result.exit_code == 0:  # a manifest whose count of saves has changed
            assert (runs.has_right_model(), lines_in(runs.out)) == (True, runs.lines), damage
            continue
        assert result.exit_code == 3, f"{damage}\n{result.output}"
        assert "restore one from a copy, or choose another train.output_dir" in result.output, damage
    # Both ways out that it names.
    anew = runs.out.with_name("anew")
    assert command("train", THREE, f"train.output_dir={anew}").exit_code == 0
    assert (runs.has_right_model(anew), lines_in(anew)) == (True, runs.lines)
    shutil.rmtree(anew)
    shutil.copytree(runs.sound / "checkpoints/step-000001", runs.out / "checkpoints/step-000001", dirs_exist_ok=True)
    assert command("train", THREE).exit_code == 0
    assert (runs.has_right_model(), lines_in(runs.out)) == (True, runs.lines)


@pytest.mark.parametrize("name", [f"model/{name}" for name in OF_A_MODEL])
def test_a_finished_run_has_the_right_model(runs: Runs, name: str) -> None:
    expected = model_in(runs.sound)
    rest = {key: value for key, value in expected.items() if key != "dpo_dist.json"}
    runs.renew()
    for damage in runs.damaged(name):
        result = command("train")
        assert result.exit_code == 0, f"{damage}\n{result.output}"
        model = model_in(runs.out)
        assert model.keys() == expected.keys(), damage
        record = json.loads(model.pop("dpo_dist.json"))  # cut by its last line end it says the same
        assert (record, model) == (json.loads(expected["dpo_dist.json"]), rest), damage
        done = "nothing is left to do" in result.output
        runs.count(f"finished: {name}", "nothing was left to do" if done else "model written again")


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_damaged_checkpoint_is_not_exported(runs: Runs, name: str, tmp_path: Path) -> None:
    runs.renew()
    checkpoint = runs.out / "checkpoints/step-000002"
    for damage in runs.damaged(f"checkpoints/step-000002/{name}"):
        out = tmp_path / "exported"
        set_up_logging()  # the runner has closed what the last command wrote its log to
        result = without_traceback(CliRunner().invoke(app, ["export", str(checkpoint), str(out)]))
        runs.count(f"exported: {name}", f"exit code {result.exit_code}")
        if result.exit_code == 0:
            assert name == "manifest.json", damage
            expected = {key: value for key, value in model_in(runs.sound).items() if key != "dpo_dist.json"}
            assert {path.name: path.read_bytes() for path in out.iterdir()} == expected, damage
            shutil.rmtree(out)
        else:
            assert result.exit_code == 2 and result.output.count("\n") == 1, f"{damage}\n{result.output}"
        assert list(tmp_path.iterdir()) == [], damage
