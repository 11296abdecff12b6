"""`dpo-dist <command>`: builds the objects and calls the layer below.

    prepare.py   all that can be known before a process group exists
    data_rules.py  settings and data that do not go together
    remarks.py   what is allowed and seldom meant
    requirements.py  folder and trackers of a run
    sources.py   where its reference log-probabilities come from
    resuming.py  what a run goes on from
    training.py  `train`
    announcing.py what it says before models are loaded
    run_folder.py who trains in a folder, what is written first, whether its model is the finished one
    architectures.py what the models' architectures can do
    describe.py  a run in words
    precomputing.py  `precompute`
    exporting.py `export`
    ending.py    how a rank ends
    checking.py  `check`
    doctoring.py `doctor`; doctor/ has what it looks at
    progress.py  what a user sees while training
    logs.py      what a command writes to standard error
    redaction.py secrets, which it does not write

Imports of torch and transformers stand inside the commands, so that a mistake in a configuration is reported within two
seconds. Together with `distributed/groups.py` the only place that reads environment variables.
"""

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_dist import __version__
from dpo_dist.cli.ending import end_rank, tell_launcher
from dpo_dist.cli.redaction import redact_tracebacks, redacted
from dpo_dist.config import RunConfig, json_schema, load_config, options_table
from dpo_dist.errors import ConfigError, DpoDistError
from dpo_dist.peers import is_peer_lost, peer_lost
from dpo_dist.phases import arm

app = typer.Typer(
    help="Direct Preference Optimization for language models that need more than one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace those of the file.")
]


def main() -> None:
    """Entry point of `dpo-dist`, `python -m dpo_dist`, torchrun and the deepspeed launcher."""
    # The deepspeed launcher hands every process its local rank as an argument; we read it from the environment.
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    redact_tracebacks()
    try:
        app(args=arguments, prog_name="dpo-dist")
    except SystemExit as end:
        exit_code = end.code or 0
        if "RANK" in os.environ and isinstance(exit_code, int):
            end_rank(exit_code)
        raise


def cache_dir() -> Path:
    """Where converted models and tokenised data are kept: $DPO_DIST_CACHE, else the user's cache folder."""
    if own := os.environ.get("DPO_DIST_CACHE"):
        return Path(own).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_dist"
    except RuntimeError:  # as in a container whose user is a number
        raise ConfigError("this user has no home folder; set DPO_DIST_CACHE to a folder for the cache") from None


@contextmanager
def importing() -> Iterator[None]:
    """Inside, packages are imported, in a fifth less time.

    They make very many objects that stay, and the garbage collector looks through them again and again. It is off
    meanwhile, and leaves them alone afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _quiet_imports() -> None:
    """Settle what other packages would otherwise print while they are imported and used."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar in a log is a line for every change
    # It says at its import which kernels it lacks, whether or not anything is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with importing():
        import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def _user_errors() -> Iterator[None]:
    """Show a user's mistake once, without a traceback, and leave with its exit code."""
    try:
        testing = os.environ.get("DPO_DIST_TESTING") == "1"
        arm(os.environ.get("DPO_DIST_FAULT", "") if testing else "", int(os.environ.get("RANK", "0")))
        yield
    except Exception as raised:
        error = peer_lost(raised) if is_peer_lost(raised) else raised
        if not isinstance(error, DpoDistError) and not _is_out_of_memory(error):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # The first rank has most likely met the same mistake and says it; its launcher then ends this process.
            # Only a rank that fails alone lives to speak.
            time.sleep(15)
        said = str(error) if isinstance(error, DpoDistError) else f"out of memory; {_MORE_ROOM} ({_first_line(error)})"
        text = redacted((f"error on rank {rank}: " if rank else "error: ") + said)
        print(text, file=sys.stderr, flush=True)
        tell_launcher(text)
        raise typer.Exit(getattr(error, "exit_code", 1)) from None


_MORE_ROOM = (
    "lower packing.max_tokens or packing.reference_max_tokens, set model.gradient_checkpointing=true, or take a "
    "DeepSpeed file that shards or offloads more (zero3, zero3_offload)"
)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a device or of the host; by name, for torch may not have been imported yet."""
    told = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return told or isinstance(error, MemoryError)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _prepare(config: RunConfig, look_only: bool = False) -> Any:
    """Everything that a run is made of, its mistakes found; what it takes to train is not imported before that."""
    with importing():
        from dpo_dist.cli.logs import set_up_logging
        from dpo_dist.cli.prepare import prepare_run

    set_up_logging()
    return prepare_run(config, cache_dir(), look_only)


def _print_version(value: bool) -> bool:
    if value:
        typer.echo(f"dpo-dist {__version__}")
        raise typer.Exit
    return value  # what a callback returns is what the command gets


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the policy. Alone, or once per rank under torchrun or the deepspeed launcher."""
    with _user_errors():
        run_config = load_config(config, overrides or ())
        _quiet_imports()
        prepared = _prepare(run_config)
        with importing():
            from dpo_dist.cli.training import run_prepared

        run_prepared(prepared, cache_dir())


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of processes the run will have.")] = 1,
) -> None:
    """Say all that can be known before training: data, tokens, packing, prefix sharing, what it would resume from.

    Makes no run folder; what it tokenises stays in the cache for the run.
    """
    with _user_errors():
        run_config = load_config(config, overrides or ())
        _quiet_imports()
        prepared = _prepare(run_config, look_only=True)
        with importing():
            from dpo_dist.cli.checking import print_check

        print_check(prepared, cache_dir(), ranks)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A run that is to start here.")] = None,
    overrides: Overrides = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Examine all ranks together.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[int | None, typer.Option(min=1, help="With --distributed: seconds to wait for a rank.")] = None,
) -> None:
    """Say whether training can start here: packages, GPUs, network, limits, disks; with CONFIG also what it needs."""
    with _user_errors():
        from dpo_dist.cli.doctoring import examine

        raise typer.Exit(examine(config, overrides or (), cache_dir(), distributed, as_json, timeout, _quiet_imports))


@app.command()
def precompute(config: ConfigPath, overrides: Overrides = None) -> None:
    """Store the reference's log-probabilities of all data for later runs. Alone, or once per rank, as `train`.

    Runs with reference.source=cache or auto find them, whatever their loss, learning rate, folder and number of ranks.
    """
    with _user_errors():
        run_config = load_config(config, overrides or ())
        _quiet_imports()
        with importing():
            from dpo_dist.cli.logs import set_up_logging
            from dpo_dist.cli.precomputing import run_precompute

        set_up_logging()
        run_precompute(run_config, cache_dir())


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step-000100, or with --merged RUN/model.")],
    out: Annotated[Path, typer.Argument(help="The model folder to make; must not exist, or be empty.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that belongs to the model.")
    ] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Add a trained adapter to its model's weights, and write the whole model.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="With --merged: that model, if it is not where it was; a folder or hub id.")
    ] = None,
) -> None:
    """Turn a checkpoint into a model folder for transformers, or an adapter's into one for PEFT. One process."""
    with _user_errors():
        _quiet_imports()
        from dpo_dist.cli.exporting import run_export

        typer.echo(run_export(checkpoint, out, trust_remote_code, merged, base, cache_dir()))


@app.command()
def schema(
    table: Annotated[bool, typer.Option("--table", help="A Markdown table of all options.")] = False,
    losses: Annotated[bool, typer.Option("--losses", help="A Markdown table of all losses.")] = False,
) -> None:
    """Print the JSON schema of a run's configuration, for editors and checkers; or all options or losses as a table."""
    if table and losses:
        raise typer.BadParameter("--table and --losses print different pages; give one of them")
    if losses:
        from dpo_dist.losses import losses_table

        typer.echo(losses_table().rstrip())
        return
    typer.echo(options_table().rstrip() if table else json.dumps(json_schema(), indent=2))


@app.command(name="demo-model")
def demo_model() -> None:
    """Convert the demo model (SmolLM2-135M-Instruct) if that is still to be done, and print its folder."""
    with _user_errors():
        _quiet_imports()
        from dpo_dist.demo import demo_model_folder

        typer.echo(demo_model_folder(cache_dir()))
