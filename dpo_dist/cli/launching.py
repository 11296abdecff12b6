"""`launch`: the command that starts all ranks of a run, by torchrun, the deepspeed launcher or Slurm.

What torchrun is given here is what `launch/torchrun.sh` gives it; a test compares the two.
"""

import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_dist.cli.launch_options import PORT, SCRIPT, Launcher, Where
from dpo_dist.config import RunConfig
from dpo_dist.errors import ConfigError

# Ranks of one machine meet in a file that no run has used before: a shell makes up its name, and so does `start`.
NEW_FILE = "$(mktemp -u -t dpo_dist-XXXXXX)"


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and the variables that it gets beside those that are set."""

    variables: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        """One line for a shell, which can be run again and again."""
        words = (f'"{word}"' if word == NEW_FILE else shlex.quote(word) for word in self.words)
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), *words])


def plan_launch(config: RunConfig, path: str, overrides: Sequence[str], where: Where) -> Command:
    """The command that starts the run, on this machine or for Slurm.

    Args:
        config: what `path` and `overrides` say, already checked.
        path: the configuration, as the user named it.
        overrides: `section.key=value`, which the ranks are given as they are.
        where: on what, and by what, it is started.
    Raises:
        ConfigError: where an option is missing, wrong or without effect, or the launcher is not installed.
    """
    _refuse_idle_options(where)
    where = replace(where, nodes=where.nodes or 1)
    variables = _this_environment()
    if where.launcher is Launcher.slurm:
        return _slurm(variables, config, path, overrides, where)
    present = visible_gpus()
    if where.gpus is not None and where.gpus > present > 0:
        raise ConfigError(
            f"--gpus={where.gpus} is more than the {present} GPUs that this machine shows; "
            "one process needs a GPU of its own"
        )
    where = replace(where, gpus=where.gpus or max(present, 1))
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = "1"
    arguments = ["dpo_dist", "train", path, *overrides]
    if where.launcher is Launcher.torchrun:
        return _torchrun(variables, arguments, where)
    if not present and "DS_ACCELERATOR" not in os.environ:
        # Without it the launcher looks for GPUs, and ends where there is none.
        variables["DS_ACCELERATOR"] = "cpu"
    return _deepspeed(variables, arguments, where, _shown_devices(where) if present else None)


def start(command: Command) -> None:
    """Become this program. Does not return."""
    os.environ.update(command.variables)
    file = Path(tempfile.gettempdir()) / f"dpo_dist-{secrets.token_hex(4)}"
    os.execvp(command.words[0], [str(file) if word == NEW_FILE else word for word in command.words])


def visible_gpus() -> int:
    """How many GPUs this machine shows to a process: those of CUDA_VISIBLE_DEVICES if set, else of nvidia-smi."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return 0 if chosen in ("", "-1") else len(chosen.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    # Its complaints stand on standard output, too, and parts of a GPU on lines of their own.
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


# ---- one function for each launcher


def _torchrun(variables: dict[str, str], arguments: list[str], where: Where) -> Command:
    words = [_program("torchrun"), "--nnodes", str(where.nodes), "--nproc-per-node", str(where.gpus)]
    words += ["--max-restarts", "0", "--rdzv-backend", "c10d"]
    if _several(where):
        words += ["--rdzv-endpoint", ":".join(_meeting_place(where)), "--rdzv-id", where.run_id or "dpo_dist"]
    else:
        # They meet in a file: nothing then listens but on the loopback interface.
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **variables}
        words += ["--rdzv-conf", "store_type=file", "--rdzv-endpoint", NEW_FILE]
    # torchrun dies of SIGUSR1 unless it is told to pass it on, and kills its ranks 30 s after a signal.
    words += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    words += ["--shutdown-timeout", str(600 if where.stop_seconds is None else where.stop_seconds)]
    return Command(variables, (*words, "-m", *arguments))


def _deepspeed(variables: dict[str, str], arguments: list[str], where: Where, shown: str | None) -> Command:
    words = [_program("deepspeed")]
    if _several(where):
        hostfile, rank = _hostfile(where), _node_rank(where)
        head, port = _meeting_place(where)
        words += ["--hostfile", hostfile, "--num_nodes", str(where.nodes), "--num_gpus", str(where.gpus)]
        # Every machine starts its own ranks: none needs to reach another one by ssh.
        words += ["--no_ssh", "--node_rank", rank, "--master_addr", head, "--master_port", port]
    else:
        words += ["--num_gpus", str(where.gpus)] if shown is None else ["--include", f"localhost:{shown}"]
        # A port of its own, for the default is that of every other run on this machine.
        words += ["--master_port", str(_free_port())]
    return Command(variables, (*words, "--module", *arguments))


def _slurm(variables: dict[str, str], config: RunConfig, path: str, overrides: Sequence[str], where: Where) -> Command:
    script = where.script or Path(SCRIPT)
    if not script.is_file():
        raise ConfigError(f"--script={script} does not exist; give the path of {SCRIPT}, which is in the repository")
    words = [_program("sbatch"), "--nodes", str(where.nodes)]
    if where.gpus is not None:  # the GPUs of this machine say nothing about those of the nodes
        words += ["--gpus-per-node", str(where.gpus)]
    out = Path(config.train.output_dir).absolute()
    others = [override for override in overrides if not override.startswith("train.output_dir=")]
    # Slurm runs a copy of the script, which does not lie beside torchrun.sh.
    folder = {"LAUNCH_FOLDER": str(script.absolute().parent)}
    return Command(folder | variables, (*words, str(script), path, str(out), *others))


# ---- what the options say


def _refuse_idle_options(where: Where) -> None:
    """Refuse an option that the launcher does not read.

    Where a command line says --nodes=1, options for several machines do no harm: it may be one for any number of them.
    Without --nodes they are a mistake: every machine would train alone.
    """
    several = where.nodes is not None
    read = {
        Launcher.torchrun: {"stop_seconds"} | ({"head", "run_id"} if several else set()),
        Launcher.deepspeed: {"head", "node_rank", "hostfile"} if several else set(),
        Launcher.slurm: {"script"},
    }[where.launcher]
    for name in ("head", "run_id", "node_rank", "hostfile", "script", "stop_seconds"):
        value = getattr(where, name)
        if value is not None and name not in read:
            nodes = "without --nodes" if where.nodes is None else f"--nodes={where.nodes}"
            hint = "set STOP_SECONDS" if name == "stop_seconds" and where.launcher is Launcher.slurm else "leave it out"
            raise ConfigError(
                f"{_option(name)}={value} has no effect with --launcher={where.launcher} {nodes}; {hint}"
                + (", or say how many machines there are" if where.nodes is None else "")
            )


def _several(where: Where) -> bool:
    return where.nodes is not None and where.nodes > 1


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _meeting_place(where: Where) -> tuple[str, str]:
    """Name and port of the machine where all of them meet."""
    if where.head is None:
        raise ConfigError(
            f"--head=null with --nodes={where.nodes}; name the machine where all of them meet, as node0 or node0:{PORT}"
        )
    name, colon, port = where.head.rpartition(":")
    if not colon:
        name, port = where.head, PORT
    if not name or name != "".join(name.split()) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--head={where.head} is neither a name nor name:port; right would be node0:{PORT}")
    return name, port


def _node_rank(where: Where) -> str:
    nodes = where.nodes or 1
    if where.node_rank is None or where.node_rank >= nodes:
        shown = "null" if where.node_rank is None else where.node_rank
        raise ConfigError(
            f"--node-rank={shown} with --nodes={nodes}; 0 on the first machine of the hostfile, "
            f"up to {nodes - 1} on the last"
        )
    return str(where.node_rank)


def _hostfile(where: Where) -> str:
    if where.hostfile is None:
        raise ConfigError(
            f"--hostfile=null with --nodes={where.nodes}; give a file with a line `name slots=GPUS` for each machine"
        )
    if not where.hostfile.is_file():
        raise ConfigError(f"--hostfile={where.hostfile} does not exist; a line `name slots=GPUS` for each machine")
    lines = (line.strip() for line in where.hostfile.read_text(encoding="utf-8").splitlines())
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    if count < (where.nodes or 1):
        raise ConfigError(
            f"--hostfile={where.hostfile} names {count} of {where.nodes} machines (--nodes); "
            "add a line `name slots=GPUS` for each"
        )
    return str(where.hostfile)


def _shown_devices(where: Where) -> str | None:
    """The GPUs of CUDA_VISIBLE_DEVICES that are used; None where it is not set.

    By --num_gpus DeepSpeed's launcher takes the first ones of the machine, whatever the variable says.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return None
    devices = chosen.split(",")[: where.gpus]
    if not all(device.isdecimal() for device in devices):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={chosen} is not a list of numbers, which --launcher=deepspeed needs; "
            "use --launcher=torchrun"
        )
    if _several(where) and devices != [str(number) for number in range(len(devices))]:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={chosen} is not read by --launcher=deepspeed on several machines; "
            "unset it, or use --launcher=torchrun"
        )
    return ",".join(devices)


def _this_environment() -> dict[str, str]:
    """PATH with this environment's programs, unless it has them."""
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    return {} if folder in path.split(os.pathsep) else {"PATH": f"{folder}{os.pathsep}{path}"}


def _program(name: str) -> str:
    """Path of a program: of this environment, whether or not it is activated, or else of PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        launcher = Launcher.slurm if name == "sbatch" else Launcher(name)
        others = ", ".join(other for other in Launcher if other is not launcher)
        raise ConfigError(f"--launcher={launcher} needs {name}, which is not installed here; others are {others}")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
