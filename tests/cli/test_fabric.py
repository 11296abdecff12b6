"""launch/fabric.sh: each network sets what docs/launching.md says, and nothing that the user has decided.

No such network is here. The page's table is read and compared; what the launchers then see is asked of stand-ins.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cli.test_launch_files import FINISHES, LAUNCH, attempt, machine, run
from tests.launching import REPOSITORY

__all__ = ["machine"]  # a fixture

NAMES = ("infiniband", "efa", "tcpx", "ethernet", "none")
NETWORK = re.compile(r"^(NCCL|FI|GLOO)_\w+=", re.MULTILINE)


def documented() -> dict[str, dict[str, str]]:
    """Variables and values of each network, as the page's table has them."""
    page = (REPOSITORY / "docs" / "launching.md").read_text(encoding="utf-8")
    section = page.split("\n## The network between machines\n")[1].split("\n## ")[0]
    found: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    for name, settings in re.findall(r"^\| `(\w+)` \| (`\w+=.*?) \|", section, re.MULTILINE):
        for setting in re.findall(r"`([^`]+)`", settings):
            variable, _, value = setting.partition("=")
            assert variable not in found[name]
            found[name][variable] = value
    return found


def sourced(**variables: str) -> subprocess.CompletedProcess[str]:
    """The environment after launch/fabric.sh was sourced by a strict shell."""
    kept = {name: value for name, value in os.environ.items() if not NETWORK.match(f"{name}=")}
    command = ["bash", "-euc", f"source {LAUNCH / 'fabric.sh'}; env"]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=False)


def network(**variables: str) -> dict[str, str]:
    result = sourced(**variables)
    assert result.returncode == 0, result.stderr
    lines = (line.partition("=") for line in result.stdout.splitlines() if NETWORK.match(line))
    return {name: value for name, _, value in lines}


def default_route() -> str | None:
    rows = (line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:])
    return next((row[0] for row in rows if row[1] == "00000000"), None)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_sets_what_the_page_says(name: str) -> None:
    table = documented()[name]
    assert bool(table) == (name != "none")
    interface = default_route()
    if interface is None:
        table = {variable: value for variable, value in table.items() if "INTERFACE" not in value}
    assert network(FABRIC=name) == {k: v.replace("INTERFACE", interface or "") for k, v in table.items()}


def test_none_is_the_default_and_changes_nothing() -> None:
    assert network() == network(FABRIC="") == network(FABRIC="none") == {}
    assert network(NCCL_DEBUG="INFO") == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize("name", NAMES[:-1])
def test_the_users_own_values_win(name: str) -> None:
    for variable in documented()[name]:
        own = {variable: "mine"}
        assert network(FABRIC=name, **own) == network(FABRIC=name) | own
        assert network(FABRIC=name, **{variable: ""})[variable] == ""


@pytest.mark.parametrize("name", NAMES[:-1])
def test_the_interface_can_be_named(name: str) -> None:
    named = {"NCCL_SOCKET_IFNAME": "=net7", "GLOO_SOCKET_IFNAME": "net7"}
    assert network(FABRIC=name, FABRIC_INTERFACE="net7") == network(FABRIC=name) | named


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"FABRIC": "roce"}, "FABRIC=roce is not known; one of infiniband, efa, tcpx, ethernet, none"),
        ({"FABRIC_INTERFACE": "net7"}, "FABRIC_INTERFACE=net7 has no effect without FABRIC; set FABRIC too"),
    ],
)
def test_what_is_refused(machine: Path, variables: dict[str, str], problem: str) -> None:
    result = sourced(**variables)
    assert result.returncode == 2 and problem in result.stderr and len(result.stderr.splitlines()) == 1
    for script in ("torchrun.sh", "deepspeed.sh"):
        code, said, calls = run(machine, script, "run.yaml", **variables)
        assert code == 2 and problem in said and not calls
    (machine / "launch").symlink_to(LAUNCH)
    code, said, calls = attempt(machine, FINISHES, **variables)
    assert code == 2 and problem in said and not any(call.startswith(("srun", "scontrol requeue")) for call in calls)


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_launchers_see_it(machine: Path, script: str) -> None:
    launcher = machine / "bin" / script.removesuffix(".sh")
    launcher.write_text('#!/bin/bash\necho "provider ${FI_PROVIDER-unset}"\n')
    assert "provider unset" in run(machine, script, "run.yaml")[1]
    assert "provider efa" in run(machine, script, "run.yaml", FABRIC="efa")[1]
    assert "provider mine" in run(machine, script, "run.yaml", FABRIC="efa", FI_PROVIDER="mine")[1]


def test_nodes_of_slurm_see_it(machine: Path) -> None:
    """Set on each node, and not by the script of the job, whose interfaces may be others."""
    (machine / "launch").symlink_to(LAUNCH)
    (machine / "bin" / "torchrun").write_text('#!/bin/bash\necho "node ${FI_PROVIDER-unset}"\n')
    runs = FINISHES + 'echo "srun ${FI_PROVIDER-unset}"; shift 5; "$@"'
    code, said, _ = attempt(machine, runs, FABRIC="efa")
    assert code == 0 and "srun unset" in said and "node efa" in said
    assert "node unset" in attempt(machine, runs)[1]


# ---- locked and shared memory

LOCKED = "FABRIC={} needs locked memory, of which ulimit -l allows 64 KiB"
SHARED = "/dev/shm has 64 MiB for the processes of 2 GPUs"


def warnings(machine: Path, gpus: int, locked: str, shared: int, fabric: str) -> list[str]:
    """What launch/torchrun.sh warns of, on a machine with so many GPUs, KiB to lock and KiB in /dev/shm."""
    listed = "".join(f"echo GPU {number}: x\n" for number in range(gpus))
    (machine / "bin" / "nvidia-smi").write_text(f"#!/bin/bash\n{listed}")
    df = f"#!/bin/bash\nprintf 'head\\ntmpfs {shared} 0 {shared} 0%% /dev/shm\\n'\n"
    (machine / "bin" / "df").write_text(df)
    (machine / "bin" / "df").chmod(0o755)
    # A function that is exported takes the place of the shell's own command.
    own = {"BASH_FUNC_ulimit%%": f"() {{ echo {locked}; }}"}
    code, said, _ = run(machine, "torchrun.sh", "run.yaml", FABRIC=fabric, **own)
    assert code == 0, said
    assert all(line.startswith("warning: ") for line in said.splitlines())
    return [line.removeprefix("warning: ") for line in said.splitlines()]


@pytest.mark.parametrize("fabric", ["infiniband", "efa"])
def test_locked_memory(machine: Path, fabric: str) -> None:
    (warning,) = warnings(machine, 1, "64", 2**20, fabric)
    assert warning.startswith(LOCKED.format(fabric))
    assert not warnings(machine, 1, "unlimited", 2**20, fabric)
    assert not warnings(machine, 0, "64", 2**20, fabric)
    assert not warnings(machine, 1, "64", 2**20, "ethernet") and not warnings(machine, 1, "64", 2**20, "none")


def test_shared_memory(machine: Path) -> None:
    (warning,) = warnings(machine, 2, "64", 2**16, "none")
    assert warning.startswith(SHARED)
    assert not warnings(machine, 2, "64", 2**20, "none")
    assert not warnings(machine, 1, "64", 2**16, "none")
    assert len(warnings(machine, 2, "64", 2**20 - 1, "efa")) == 2


def test_warnings_go_to_standard_error(machine: Path) -> None:
    warnings(machine, 2, "64", 2**16, "none")
    env = os.environ | {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}", "CALLS": str(machine)}
    result = subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), "run.yaml"], env=env, capture_output=True, text=True, check=True
    )
    assert SHARED in result.stderr and not result.stdout
