"""Two machines on one kernel: network namespaces with an address and a name each, on a bridge. Needs root and `ip`.

Nothing of the system's own is changed: the names of the machines are in a file of hosts that only their processes see.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NAMES = ("dda", "ddb")
SUBNET, BRIDGE = "10.91.77", "ddbridge"
HEAD = f"{SUBNET}.1"  # this side of the bridge


@dataclass(frozen=True)
class Machines:
    """Both of them."""

    hosts: Path

    def address(self, node: int) -> str:
        """Of one of them."""
        return f"{SUBNET}.{10 + node}"

    def on(self, node: int, command: Sequence[str]) -> list[str]:
        """A command that runs the given one there."""
        script = f'hostname {NAMES[node]}; mount --bind {self.hosts} /etc/hosts; exec "$@"'
        # Not `ip netns exec`: it mounts a /sys without the cgroups that slurmd looks for.
        inside = ["unshare", "--uts", "--mount", "bash", "-c", script, "_", *command]
        return ["nsenter", f"--net=/run/netns/{NAMES[node]}", *inside]

    def run(self, commands: Sequence[Sequence[str]], env: Mapping[str, str], cwd: Path, timeout: float) -> list[int]:
        """Run one command on each machine at the same time; exit codes. Output goes to NAME.log in `cwd`."""
        processes = []
        for node, command in enumerate(commands):
            with (cwd / f"{NAMES[node]}.log").open("a") as log:
                processes.append(
                    subprocess.Popen(
                        self.on(node, command), env=os.environ | env, cwd=cwd, stdout=log, stderr=log, process_group=0
                    )
                )
        try:
            return [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def require(*command: str) -> str:
    """Run a command that must succeed; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def two_machines(folder: Path) -> Iterator[Machines]:
    """Inside, there are two machines that reach each other and this one."""
    hosts = folder / "hosts"
    lines = [f"{SUBNET}.{10 + node} {name}" for node, name in enumerate(NAMES)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", f"{HEAD} {os.uname().nodename}", *lines]) + "\n")
    _remove()
    try:
        require("ip", "link", "add", BRIDGE, "type", "bridge")
        require("ip", "addr", "add", f"{HEAD}/24", "dev", BRIDGE)
        require("ip", "link", "set", BRIDGE, "up")
        for node, name in enumerate(NAMES):
            require("ip", "netns", "add", name)
            require("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            require("ip", "link", "set", f"v{name}", "master", BRIDGE, "up")
            require("ip", "-n", name, "addr", "add", f"{SUBNET}.{10 + node}/24", "dev", "eth0")
            require("ip", "-n", name, "link", "set", "lo", "up")
            require("ip", "-n", name, "link", "set", "eth0", "up")
        yield Machines(hosts)
    finally:
        _remove()


def _remove() -> None:
    for name in NAMES:
        # What a killed test has left in a namespace would keep it, and the link into it.
        left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        for process in left.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"v{name}"], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def until(condition, seconds: float, what: str) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.5)
