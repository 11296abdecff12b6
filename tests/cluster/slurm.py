"""A real Slurm on two machines. Needs the packages slurm-wlm and munge; starts daemons of its own and ends them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.machines import HEAD, NAMES, Machines, require, until

# Nobody waits two minutes for a requeue: credentials that expire sooner shorten it.
CONFIGURATION = """
ClusterName=ddtest
SlurmctldHost={here}({head})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=1
JobRequeue=1
KillWait=5
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """What a user types."""

    configuration: Path

    def __call__(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """Run a command of Slurm's; what it printed."""
        environment = os.environ | {"SLURM_CONF": str(self.configuration)} | env
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        words = self("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def slurm_on(machines: Machines, folder: Path) -> Iterator[Slurm]:
    """Inside, jobs can be submitted to both machines."""
    configuration = folder / "slurm.conf"
    sizes = "CPUs=2 RealMemory=4000"
    nodes = "\n".join(f"NodeName={name} NodeAddr={machines.address(i)} {sizes}" for i, name in enumerate(NAMES))
    text = CONFIGURATION.format(here=os.uname().nodename, head=HEAD, folder=folder, nodes=nodes)
    configuration.write_text(text)
    for made in ("state", *(f"spool-{name}" for name in NAMES)):
        (folder / made).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    slurm = Slurm(configuration)
    try:
        require("munged", "--force", f"--key-file={key}", *options)
        require("slurmctld", "-f", str(configuration))
        for node, name in enumerate(NAMES):
            require(*machines.on(node, ["slurmd", "-f", str(configuration), "-N", name]))
        until(lambda: slurm("sinfo", "-h", "-o", "%t", "-p", "low") == "idle", 40, "both machines are idle")
        yield slurm
    finally:
        for name in ("slurmctld.pid", *(f"slurmd-{name}.pid" for name in NAMES), "munge.pid"):
            with suppress(OSError, ValueError):
                os.kill(int((folder / name).read_text()), signal.SIGTERM)
