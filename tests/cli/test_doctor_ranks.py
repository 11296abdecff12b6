"""`dpo-dist doctor --distributed`: what ranks find out together; each rank that differs really does."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.cli.doctor import meeting
from dpo_dist.cli.doctor.agreement import clock_finding, place_finding, variable_finding
from dpo_dist.cli.doctor.findings import Finding, describe_ranks, merged
from dpo_dist.cli.doctor.traffic import SIZES, bandwidths, clock_offset
from dpo_dist.config import load_config
from tests.forking import fork_ranks
from tests.golden.trajectories import base_config
from tests.launching import REPOSITORY, launch

Report = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base_config(tmp_path / "out")))
    return str(tmp_path / "run.yaml")


def report_of(done: subprocess.CompletedProcess[str], exit_code: int = 0) -> Report:
    """Standard output is one JSON object, whatever ranks and packages write besides."""
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    findings: Report = {}
    for finding in report["findings"]:
        findings.setdefault(finding["name"], finding)  # others of that name follow from the first
    return {**report, "findings": findings}


def examine(tmp_path: Path, *ranks: dict[str, Any], exit_code: int = 0, **common: Any) -> Report:
    """The report of ranks that were given something each."""
    variables = {"DPO_DIST_CACHE": str(tmp_path / "cache")}
    given = json.dumps([{**common, **own, "arguments": [*own["arguments"], "--json"]} for own in ranks])
    done = fork_ranks(len(ranks), "tests.doctor_worker", given, cwd=tmp_path, env=variables, timeout=60)
    report = report_of(done, exit_code)
    assert not list(tmp_path.rglob(".doctor-*"))
    return report


def test_two_ranks_of_a_launcher(config: str, tmp_path: Path) -> None:
    report = report_of(launch(2, "dpo_dist", "doctor", config, "--distributed", "--json", cwd=tmp_path))
    assert report["can_start"] and report["num_ranks"] == 2
    found = report["findings"]
    assert found["machines"]["values"]["machines"] == [[0, 1]]
    assert found["packages"]["status"] == found["configuration"]["status"] == "ok"
    assert len(found["shared folder"]["values"]["seconds"]) == len(found["free space"]["values"]["free_bytes"]) == 2
    clocks = found["clocks"]["values"]  # of one machine: the same clock, as far as anyone can tell
    assert abs(clocks["offsets_seconds"][1]) <= clocks["resolutions_seconds"][1] < 0.5
    sweep = [finding["values"] for name, finding in found.items() if name.startswith("all-reduce")]
    assert [values["bytes"] for values in sweep] == list(SIZES["cpu"])
    for values in sweep:
        assert values["algorithm_bytes_per_second"] == pytest.approx(values["bytes"] / values["seconds"])
        assert values["bus_bytes_per_second"] == pytest.approx(values["algorithm_bytes_per_second"])  # 2 (2 - 1) / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_one_rank_is_told_to_use_a_launcher(tmp_path: Path) -> None:
    machines = examine(tmp_path, {"arguments": []})["findings"]["machines"]
    assert machines["status"] == "warning" and "torchrun" in machines["way_out"]


def test_settings_that_differ(config: str, tmp_path: Path) -> None:
    """As a script would have it that takes an override from its environment."""
    report = examine(
        tmp_path,
        {"arguments": [config, "loss.beta=0.1"]},
        {"arguments": [config, "loss.beta=0.3"], "environment": {"NCCL_ALGO": "Tree"}},
        exit_code=2,
    )
    finding = report["findings"]["configuration"]
    assert finding["status"] == "problem" and "loss.beta: 0.1 on rank 0, 0.3 on rank 1" in finding["text"]
    assert finding["values"]["differences"] == {"loss.beta": {"0.1": [0], "0.3": [1]}}
    finding = report["findings"]["variables of NCCL"]
    assert finding["status"] == "warning" and "NCCL_ALGO: nothing on rank 0, Tree on rank 1" in finding["text"]


def test_a_configuration_that_is_wrong_on_one_rank(config: str, tmp_path: Path) -> None:
    report = examine(tmp_path, {"arguments": [config]}, {"arguments": [config, "loss.bta=1"]}, exit_code=2)
    finding = report["findings"]["configuration"]
    assert finding["ranks"] == [1] and "loss.bta=1 is not a key" in finding["text"]


def test_packages_that_differ(config: str, tmp_path: Path) -> None:
    other = tmp_path / "site" / "peft-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
    ranks = {"arguments": [config]}, {"arguments": [config], "packages": str(other.parent)}
    finding = examine(tmp_path, *ranks, exit_code=2)["findings"]["packages"]
    assert finding["status"] == "problem" and "9.9 on rank 1" in finding["text"]
    assert list(finding["values"]["differences"]) == ["peft"]


def test_folders_that_are_not_the_same(config: str, tmp_path: Path) -> None:
    """A path that means another place on the other rank, as on a disk of its own."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    arguments = [config, "train.output_dir=out"]
    ranks = [{"arguments": arguments, "folder": str(tmp_path / name)} for name in ("here", "there")]
    report = examine(tmp_path, *ranks, exit_code=2, longest_wait=0.5)
    assert "the run folder" in report["findings"]["configuration"]["text"]
    assert "are not seen" in report["findings"]["shared folder"]["text"]


def test_ranks_that_share_a_disk_need_no_shared_file_system(config: str, tmp_path: Path) -> None:
    """As two containers of one machine: what the launcher says of nodes counts less than what was tried."""
    ranks = [{"arguments": [config], "environment": {"LOCAL_WORLD_SIZE": "1"}}] * 2
    found = examine(tmp_path, *ranks)["findings"]
    assert found["file system"]["status"] != "problem" and found["shared folder"]["status"] == "ok"


def test_a_folder_that_one_rank_cannot_write(config: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = {"arguments": [config, f"train.output_dir={tmp_path}/file/out"]}
    found = examine(tmp_path, {"arguments": [config]}, own, exit_code=2, longest_wait=0.5)["findings"]
    assert found["shared folder"]["ranks"] == [1] and "cannot write" in found["shared folder"]["text"]


def test_a_sum_that_is_wrong(tmp_path: Path) -> None:
    found = examine(tmp_path, {"arguments": []}, {"arguments": [], "fault": "sum"}, exit_code=2)["findings"]
    assert "the sum is wrong on rank 1" in found["all-reduce 1.0 MiB"]["text"]


@pytest.mark.parametrize(
    ("fault", "more", "while_"),
    [
        ("late", {}, "finding each other"),
        ("kill", {}, "comparing clocks|timing all-reduces"),
        ("hang", {}, "comparing clocks|timing all-reduces"),
        # The backend says nothing, as NCCL does: the doctor's own clock ends the rank.
        ("hang", {"grace": -1}, "comparing clocks|timing all-reduces"),
    ],
)
def test_a_rank_that_does_not_answer(tmp_path: Path, fault: str, more: dict[str, Any], while_: str) -> None:
    ranks = [{"arguments": ["--timeout", "3"], **more}, {"arguments": ["--timeout", "3"], "fault": fault}]
    given = json.dumps([{**own, "arguments": [*own["arguments"], "--json"]} for own in ranks])
    done = fork_ranks(2, "tests.doctor_worker", given, cwd=tmp_path, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    finding = json.loads(done.stdout.splitlines()[0])["findings"][-1]
    assert finding["name"] == "meeting" and finding["status"] == "problem"
    assert "within 3 seconds (--timeout)" in finding["text"] and "parallel.ddp_timeout" in finding["way_out"]
    assert any(stage in finding["text"] for stage in while_.split("|"))
    # What the backend said stands in brackets.
    assert ("(" in finding["text"].split(" while ")[1]) == ("grace" not in more)


def test_ranks_that_cannot_meet(tmp_path: Path) -> None:
    wrong = {"arguments": [], "environment": {"GLOO_SOCKET_IFNAME": "none0"}}
    found = examine(tmp_path, wrong, wrong, exit_code=2)["findings"]
    assert "GLOO_SOCKET_IFNAME must be right first" in found["meeting"]["text"]


def test_a_timeout_without_ranks() -> None:
    result = CliRunner().invoke(app, ["doctor", "--timeout", "3"])
    assert result.exit_code == 2 and "no effect without --distributed" in result.output


# ---- numbers and words


def test_bandwidth_is_that_of_nccl_tests() -> None:
    assert bandwidths(1000, 0.5, 1) == (2000, 0)
    assert bandwidths(1000, 0.5, 2) == (2000, 2000)
    assert bandwidths(1000, 0.5, 8) == (2000, 3500)


def test_a_clock_that_is_ahead() -> None:
    """Barriers in true time: everybody leaves after the last one came. The other clock is 7 s ahead."""
    generator = torch.Generator().manual_seed(0)
    first, other = [], []
    for start in range(20):
        came = start + 0.01 * torch.rand(2, generator=generator).double()
        left = came.max() + 0.001 * torch.rand(2, generator=generator).double()
        first.append([float(came[0]), float(left[0])])
        other.append([float(came[1]) + 7, float(left[1]) + 7])
    offset, resolution = clock_offset(first, other)
    assert abs(offset - 7) <= resolution < 0.01
    finding = clock_finding([first, other])
    assert finding.status == "warning" and "rank 1 is +6999." in finding.text
    assert clock_finding([first, first]).status == "ok"


def test_machines_and_variables_in_words() -> None:
    ranks = [{"host": f"node{rank // 2}", "machine": str(rank // 2), "variables": {}} for rank in range(4)]
    assert place_finding(ranks).text == "2: ranks 0-1 on node0; ranks 2-3 on node1"
    assert variable_finding(ranks).status == "ok"
    assert describe_ranks([3]) == "rank 3" and describe_ranks([9, 0, 1, 2, 5]) == "ranks 0-2, 5, 9"


def test_what_other_ranks_found_is_told_once() -> None:
    fine, low = Finding("machine", "files", "1"), Finding("machine", "files", "2", "warning", "more")
    assert merged([[fine], [low], [fine], [low]]) == [
        fine,
        Finding("machine", "files", "2", "warning", "more", ranks=(1, 3)),
    ]
    assert merged([[low], [low]]) == [low]


def test_the_page_names_every_finding_of_ranks(config: str, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "doctor.md").read_text(encoding="utf-8")
    report = examine(tmp_path, {"arguments": [config]}, {"arguments": [config]})
    names = {one["name"].split(" ")[0] if one["name"].startswith("all-") else one["name"]
             for one in report["findings"].values() if one["section"] == "ranks"}  # fmt: skip
    assert len(names) >= 8 and not [name for name in names if f"`{name}`" not in page]


def test_files_that_come_late_are_waited_for(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system: at first a name is missing, then what is in the file."""
    run_config = load_config(config)
    with meeting._Probe(run_config, 0, "t") as probe, meeting._Probe(run_config, 1, "t"):
        folder = tmp_path / ".doctor-t"
        late = iter([lambda: (folder / "rank-2").touch(), lambda: (folder / "rank-1").write_text("1")])
        (folder / "rank-1").write_text("")
        monkeypatch.setattr(meeting.time, "sleep", lambda _: next(late)())
        assert probe.look([0, 1, 2])["seen"] == [0, 1, 2]
        assert next(late, None) is None  # it has waited for both
        monkeypatch.undo()
        (folder / "rank-2").unlink()
        monkeypatch.setattr(meeting, "LONGEST_WAIT", 0.1)
        assert probe.look([0, 1, 2])["seen"] == [0, 1]
    assert not folder.exists()
