"""The options of `launch`, and what its `--help` says."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

PORT = "29500"
SCRIPT = "launch/slurm.sbatch"


class Launcher(StrEnum):
    """What starts the ranks."""

    torchrun = "torchrun"
    deepspeed = "deepspeed"
    slurm = "slurm"


@dataclass(frozen=True)
class Where:
    """The options of the command; what is None was not given.

    Args:
        nodes: number of machines; 1.
        launcher: what starts the ranks.
        gpus: processes on each machine; its visible GPUs, or 1 without one.
        head: name of the machine where all of them meet, or name:port.
        run_id: a name that only the machines of this run use.
        node_rank: which of the machines this is, from 0.
        hostfile: the machines, a line `name slots=GPUS` for each.
        script: the batch script for Slurm.
        stop_seconds: how long a step and a save may take after a stop request.
    """

    nodes: int | None = None
    launcher: Launcher = Launcher.torchrun
    gpus: int | None = None
    head: str | None = None
    run_id: str | None = None
    node_rank: int | None = None
    hostfile: Path | None = None
    script: Path | None = None
    stop_seconds: int | None = None


EXAMPLES = """Start all ranks of a run. The configuration is checked before anything is started.

One machine:

    dpo-dist launch run.yaml --gpus 8

Several, the same on each of them:

    dpo-dist launch run.yaml --nodes 4 --gpus 8 --head node0

With DeepSpeed's launcher, on each of them with its own --node-rank:

    dpo-dist launch run.yaml --launcher deepspeed --nodes 4 --gpus 8 --hostfile hosts --head node0 --node-rank 0

A Slurm job:

    dpo-dist launch run.yaml --launcher slurm --nodes 4 --gpus 8

What would be run, and nothing else:

    dpo-dist launch run.yaml --gpus 8 --dry-run
"""

Nodes = Annotated[int | None, typer.Option(min=1, help="Number of machines; 1.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="Processes on each machine; its visible GPUs, or 1 without one.")]
By = Annotated[Launcher, typer.Option(help="What starts the ranks.")]
Head = Annotated[
    str | None, typer.Option(metavar="NAME[:PORT]", help=f"Several machines: where they meet; port {PORT}.")
]
RunId = Annotated[
    str | None, typer.Option(help="torchrun, several machines: a name that only those of this run use; dpo_dist.")
]
NodeRank = Annotated[int | None, typer.Option(min=0, help="deepspeed, several machines: which of them this is.")]
Hostfile = Annotated[
    Path | None, typer.Option(help="deepspeed, several machines: a file with a line `name slots=GPUS` for each.")
]
Script = Annotated[Path | None, typer.Option(help=f"slurm: the batch script; {SCRIPT}.")]
StopSeconds = Annotated[
    int | None, typer.Option(min=1, help="torchrun: how long a step and a save may take after a stop request; 600.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command for a shell, and start nothing.")]
