"""`dpo-dist launch`: the commands that it prints, what it refuses, and that it runs what it prints."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from dpo_dist.cli import app, launching
from tests.cli.test_launch_files import machine, run
from tests.launching import REPOSITORY, launch, succeeded

GOLDEN = REPOSITORY / "tests" / "golden"
__all__ = ["machine"]  # a fixture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a configuration; on a machine that shows no GPU."""
    values = {
        "model": {"model_name_or_path": str(GOLDEN / "tiny_policy"), "dtype": "float32"},
        "data": {"train": [{"path": str(GOLDEN / "pairs.jsonl"), "limit": 4}]},
        "train": {"output_dir": "runs/one", "examples_per_step": 2, "max_steps": 1},
        "parallel": {"deepspeed": "zero3_cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "hosts").write_text("# two machines\nn0 slots=8\n\nn1 slots=8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "visible_gpus", lambda: 0)
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def printed(*arguments: str) -> tuple[dict[str, str], list[str]]:
    """Variables and words of the command that a dry run prints."""
    result = CliRunner().invoke(app, ["launch", "run.yaml", *arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return split(line)


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """Variables and words of a line for a shell."""
    words = shlex.split(line)
    start = next(place for place, word in enumerate(words) if not re.match(r"\w+=", word))
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["launch", "run.yaml", *arguments, "--dry-run"])
    assert result.exit_code == 2 and not result.stdout, result.output
    assert result.stderr.count("error:") == 1
    return result.stderr


def options(words: list[str]) -> str:
    """All but the program."""
    return " ".join(words[1:])


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for what is not installed where tests run."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    (folder / "launch").mkdir()
    (folder / "launch" / "slurm.sbatch").write_text("")
    return folder


# ---- torchrun


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({}, []),
        ({"NPROC": "3", "STOP_SECONDS": "77"}, ["--gpus", "3", "--stop-seconds", "77"]),
        ({"NNODES": "2", "NPROC": "4", "HEAD": "n0"}, ["--nodes", "2", "--gpus", "4", "--head", "n0"]),
        (
            {"NNODES": "2", "HEAD": "n0:77", "RUN_ID": "a"},
            ["--nodes", "2", "--head", "n0:77", "--run-id", "a"],
        ),
    ],
)
def test_script_and_command_agree(folder: Path, machine: Path, variables: dict[str, str], arguments: list[str]) -> None:
    """Both give torchrun the same words and the same environment."""
    (machine / "bin" / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$CALLS/words"\nenv > "$CALLS/env"\n')
    assert run(machine, "torchrun.sh", "run.yaml", "loss.beta=0.2", **variables)[0] == 0
    script_words = (machine / "words").read_text().splitlines()
    set_variables, words = printed("loss.beta=0.2", *arguments)
    assert words[0].endswith("/torchrun")
    file = re.compile(r"/\S+/dpo_dist-\w{6}$")
    assert words[1:] == [file.sub(launching.NEW_FILE, word) for word in script_words]
    seen = set((machine / "env").read_text().splitlines())
    assert {f"{name}={value}" for name, value in set_variables.items()} <= seen
    alone = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    assert (alone in seen) == ("NNODES" not in variables) == ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in set_variables)


def test_torchrun_knows_the_options(folder: Path) -> None:
    for arguments in ([], ["--nodes", "2", "--head", "n0"]):
        _, words = printed(*arguments)
        known = get_args_parser()._option_string_actions
        assert {word for word in words[1 : words.index("-m")] if word.startswith("--")} <= known.keys()


def test_threads_are_left_alone_where_they_are_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed()[0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "OMP_NUM_THREADS" not in printed()[0]


def test_the_environment_need_not_be_active(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started finds this environment's programs: ninja, with which operators are compiled, and torchrun."""
    here = str(Path(launching.sys.executable).parent)
    monkeypatch.setenv("PATH", f"/usr/bin:{here}")
    assert "PATH" not in printed()[0]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for launcher in ("torchrun", "deepspeed"):
        variables, words = printed("--launcher", launcher)
        assert variables["PATH"] == f"{here}:/usr/bin:/bin" and words[0] == f"{here}/{launcher}"


def test_processes_are_the_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--nproc-per-node 1 " in options(printed()[1])
    assert "--nproc-per-node 2 " in options(printed("--gpus", "2")[1])  # on the CPU
    monkeypatch.setattr(launching, "visible_gpus", lambda: 4)
    assert "--nproc-per-node 4 " in options(printed()[1])
    assert "--gpus=8 is more than the 4 GPUs that this machine shows" in refused("--gpus", "8")


def test_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of nvidia-smi, fewer where CUDA_VISIBLE_DEVICES hides some; its complaints are no GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for text, count in (("echo GPU 0: x; echo '  MIG y'; echo GPU 1: x", 2), ("echo it has failed; exit 9", 0)):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert launching.visible_gpus() == count
    for text, count in (("0,3,5", 3), ("", 0), ("-1", 0), ("GPU-1a2b", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert launching.visible_gpus() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.unlink()
    assert launching.visible_gpus() == 0


# ---- deepspeed


def test_deepspeed_on_one_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, words = printed("loss.beta=0.2", "--launcher", "deepspeed", "--gpus", "2")
    assert words[0].endswith("/deepspeed") and variables["DS_ACCELERATOR"] == "cpu"
    assert re.fullmatch(
        r"--num_gpus 2 --master_port \d+ --module dpo_dist train run.yaml loss.beta=0.2", options(words)
    )
    monkeypatch.setattr(launching, "visible_gpus", lambda: 2)
    assert "DS_ACCELERATOR" not in printed("--launcher", "deepspeed")[0]


def test_deepspeed_on_several_machines(folder: Path) -> None:
    several = ["--launcher", "deepspeed", "--nodes", "2", "--gpus", "8", "--hostfile", "hosts"]
    _, words = printed(*several, "--head", "n0:77", "--node-rank", "1")
    assert options(words) == (
        "--hostfile hosts --num_nodes 2 --num_gpus 8 --no_ssh --node_rank 1 --master_addr n0 --master_port 77 "
        "--module dpo_dist train run.yaml"
    )
    assert "--master_port 29500" in options(printed(*several, "--head", "n0", "--node-rank", "0")[1])
    assert "--head=null" in refused(*several, "--node-rank", "0")
    assert "--node-rank=null" in refused(*several, "--head", "n0")
    assert "--node-rank=2" in refused(*several, "--head", "n0", "--node-rank", "2")
    without = several[:-2]
    assert "--hostfile=null" in refused(*without, "--head", "n0", "--node-rank", "0")
    assert "--hostfile=none does not exist" in refused(*without, "--head", "n0", "--node-rank", "0", "--hostfile=none")
    (folder / "hosts").write_text("n0 slots=8\n")
    assert "--hostfile=hosts names 1 of 2 machines" in refused(*several, "--head", "n0", "--node-rank", "0")


def test_deepspeed_takes_the_gpus_that_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --num_gpus it would drop CUDA_VISIBLE_DEVICES and take the first ones of the machine."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    by = ["--launcher", "deepspeed"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert "--include localhost:2,3,5 --master_port" in options(printed(*by)[1])
    assert "--include localhost:2,3 --master_port" in options(printed(*by, "--gpus", "2")[1])
    several = [*by, "--nodes", "2", "--head", "n0", "--hostfile", "hosts", "--node-rank", "0"]
    assert "CUDA_VISIBLE_DEVICES=2,3,5 is not read" in refused(*several)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert "--num_gpus 2 " in options(printed(*several, "--gpus", "2")[1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")
    assert "CUDA_VISIBLE_DEVICES=GPU-1a2b is not a list of numbers" in refused(*by)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--num_gpus 2 " in options(printed(*by, "--gpus", "2")[1])  # on the CPU


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({"NPROC": "2"}, ["--gpus", "2"]),
        (
            {"NNODES": "2", "HEAD": "n0", "NODE_RANK": "1", "HOSTFILE": "hosts"},
            ["--nodes", "2", "--head", "n0", "--node-rank", "1", "--hostfile", "hosts"],
        ),
    ],
)
def test_deepspeed_script_and_command_agree(
    folder: Path, machine: Path, variables: dict[str, str], arguments: list[str]
) -> None:
    calls = run(machine, "deepspeed.sh", "run.yaml", "loss.beta=0.2", **variables)[2]
    _, words = printed("loss.beta=0.2", "--launcher", "deepspeed", *arguments)
    one_machine = re.compile(r"(--num_gpus \d+ --master_port) \d+")
    assert one_machine.sub(r"\1", options(words)) == one_machine.sub(r"\1", calls[-1].removeprefix("deepspeed "))


# ---- Slurm


def test_slurm(programs: Path) -> None:
    variables, words = printed("loss.beta=0.2", "--launcher", "slurm", "--nodes", "4", "--gpus", "8")
    out = programs / "runs" / "one"
    assert words[0] == str(programs / "bin" / "sbatch")
    assert options(words) == f"--nodes 4 --gpus-per-node 8 launch/slurm.sbatch run.yaml {out} loss.beta=0.2"
    here = Path(launching.sys.executable).parent
    assert variables == {"LAUNCH_FOLDER": str(programs / "launch"), "PATH": f"{here}:{programs / 'bin'}"}
    # The folder of the run is said once; Slurm alone knows the GPUs of its nodes.
    _, words = printed("--launcher", "slurm", "train.output_dir=x")
    assert options(words) == f"--nodes 1 launch/slurm.sbatch run.yaml {programs / 'x'}"
    (programs / "launch").rename(programs / "elsewhere")
    assert "--script=launch/slurm.sbatch does not exist" in refused("--launcher", "slurm")
    variables, words = printed("--launcher", "slurm", "--script", "elsewhere/slurm.sbatch")
    assert variables["LAUNCH_FOLDER"] == str(programs / "elsewhere") and "elsewhere/slurm.sbatch" in words
    (programs / "bin" / "sbatch").unlink()
    assert "--launcher=slurm needs sbatch" in refused("--launcher", "slurm", "--script", "elsewhere/slurm.sbatch")


def test_a_command_line_for_any_number_of_machines(folder: Path) -> None:
    """With --nodes=1 what several machines need is allowed, and not read."""
    random_name = re.compile(r"--master_port \d+")
    for more, other in (
        (["--run-id", "a"], []),
        (["--hostfile", "hosts", "--node-rank", "0", "--launcher", "deepspeed"], ["--launcher", "deepspeed"]),
    ):
        words = options(printed("--nodes", "1", "--head", "n0", *more)[1])
        assert random_name.sub("X", words) == random_name.sub("X", options(printed(*other)[1]))


# ---- mistakes


def test_a_mistake_in_the_configuration(folder: Path) -> None:
    assert "loss.bta" in refused("loss.bta=1")
    result = CliRunner().invoke(app, ["launch", "none.yaml"])
    assert result.exit_code == 2 and "none.yaml" in result.stderr


def test_where_they_meet(folder: Path) -> None:
    assert "--head=null" in refused("--nodes", "2")
    for head in ("n0:x", "n0:99999", "n0:0", "n 0", "", ":29500"):
        assert f"--head={head} is neither a name nor name:port" in refused("--nodes", "2", "--head", head)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--head", "n0"], "--head=n0"),
        (["--run-id", "a"], "--run-id=a"),
        (["--node-rank", "0"], "--node-rank=0"),
        (["--hostfile", "hosts"], "--hostfile=hosts"),
        (["--script", "launch/slurm.sbatch"], "--script=launch/slurm.sbatch"),
        (["--nodes", "2", "--head", "n0", "--node-rank", "0"], "--node-rank=0"),
        (["--launcher", "deepspeed", "--stop-seconds", "5"], "--stop-seconds=5"),
        (["--launcher", "slurm", "--nodes", "2", "--head", "n0"], "--head=n0"),
    ],
)
def test_what_would_have_no_effect(programs: Path, arguments: list[str], named: str) -> None:
    assert f"{named} has no effect" in refused(*arguments)


def test_a_launcher_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    for name in ("torchrun", "deepspeed"):
        assert f"--launcher={name} needs {name}" in refused("--launcher", name)


def test_it_needs_no_torch(folder: Path) -> None:
    """In a process of its own: what is printed, and what was imported."""
    code = (
        "import sys; from dpo_dist.cli import app; app(['launch', 'run.yaml', '--dry-run'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    (folder / "look.py").write_text(code)
    succeeded(launch(1, "look", cwd=folder))


# ---- running


def test_it_runs_what_it_prints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launching.os, "execvp", lambda program, words: calls.append((program, words)))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    result = CliRunner().invoke(app, ["launch", "run.yaml", "a.b=c d"])
    assert result.exit_code == 2 and not calls
    result = CliRunner().invoke(app, ["launch", "run.yaml", "log.report_to=[ tensorboard ]"])
    assert result.exit_code == 0 and not result.stdout, result.output
    ((program, words),) = calls
    variables, shown = split(result.stderr)
    assert words[0] == program and variables == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert launching.os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    (file,) = (word for word, other in zip(words, shown, strict=True) if word != other)
    assert re.fullmatch(r"/.+/dpo_dist-\w{8}", file) and not Path(file).exists()


def test_what_is_printed_before_a_run_hides_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(launching.os, "execvp", lambda program, words: given.append(words))
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    setting = "train.output_dir=runs/very-secret-value"
    result = CliRunner().invoke(app, ["launch", "run.yaml", setting])
    assert result.exit_code == 0 and "very-secret-value" not in result.stderr and given[0][-1] == setting


def test_a_printed_line_can_be_run_again(folder: Path) -> None:
    """Two runs that met in one file would not both begin: the shell makes up a new name each time."""
    line = CliRunner().invoke(app, ["launch", "run.yaml", "--dry-run"]).stdout
    words = line[line.index("--nnodes") :]
    files = {subprocess.check_output(["bash", "-c", f"echo {words}"]).split()[11] for _ in range(3)}
    assert len(files) == 3 and all(re.fullmatch(rb"/.+/dpo_dist-\w{6}", file) for file in files)


def test_help_has_an_example_for_each_place() -> None:
    said = CliRunner().invoke(app, ["launch", "--help"], env={"COLUMNS": "200"}).stdout
    for example in ("--gpus 8", "--head node0", "--launcher deepspeed", "--launcher slurm", "--dry-run"):
        assert f"dpo-dist launch run.yaml {example}" in said or example in said
    assert said.count("dpo-dist launch run.yaml") >= 4


def test_a_run(folder: Path) -> None:
    """Two ranks, started as a user does."""
    done = succeeded(launch(1, "dpo_dist", "launch", "run.yaml", "--gpus", "2", cwd=folder))
    assert "2 ranks on cpu" in done.stderr and (folder / "runs/one/model/dpo_dist.json").is_file()
