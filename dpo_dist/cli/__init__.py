"""`dpo-dist <command>`: builds the objects and calls the layer below.

    starting.py  imports, the cache folder, and how a mistake is shown
    prepare.py   all that can be known before a process group exists
    data_rules.py  settings and data that do not go together
    reading.py   tokenizer and data sets of a configuration
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
    launching.py `launch` (launch_options.py: what it is told)
    exporting.py `export`
    comparing.py `compare`
    ending.py    how a rank ends
    checking.py  `check`
    feedback.py  `feedback add`, `feedback show`, `round` (feeding.py, round_running.py)
    inspect.py   `inspect` (inspecting.py: the work; doubting.py: with a model)
    sample.py    `sample` (generating.py: the work; ranking.py: scores)
    doctoring.py `doctor`; doctor/ has what it looks at
    recomputing.py which layers recompute activations
    compiling.py what torch.compile needs
    room.py      what to change where memory runs out
    pacing.py    what measures a run, and what is said of it at the end
    trained_model.py what is written of a trained model
    progress.py  what a user sees while training
    logs.py      what a command writes to standard error
    redaction.py secrets, which it does not write

Imports of torch and transformers stand inside the commands, so that a mistake in a configuration is reported within two
seconds. Together with `distributed/groups.py` the only place that reads environment variables.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_dist import __version__
from dpo_dist.cli import feedback, inspect, launch_options, launching, sample
from dpo_dist.cli.ending import end_rank, leaving_when_asked
from dpo_dist.cli.redaction import redact_tracebacks, redacted
from dpo_dist.cli.starting import ConfigPath, Overrides, cache_dir, importing, quiet_imports, user_errors
from dpo_dist.config import RunConfig, json_schema, load_config, options_table

app = typer.Typer(
    help="Direct Preference Optimization for language models that need more than one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(feedback.app, name="feedback")
app.command(name="round")(feedback.round_)
app.command()(sample.sample)
app.command(cls=inspect.Inspect)(inspect.inspect)


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
    with user_errors():
        run_config = load_config(config, overrides or ())
        with leaving_when_asked():
            quiet_imports()
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
    with user_errors():
        run_config = load_config(config, overrides or ())
        quiet_imports()
        prepared = _prepare(run_config, look_only=True)
        with importing():
            from dpo_dist.cli.checking import print_check

        print_check(prepared, cache_dir(), ranks)


@app.command(help=launch_options.EXAMPLES)
def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: launch_options.Nodes = None,
    gpus: launch_options.Gpus = None,
    launcher: launch_options.By = launch_options.Launcher.torchrun,
    head: launch_options.Head = None,
    run_id: launch_options.RunId = None,
    node_rank: launch_options.NodeRank = None,
    hostfile: launch_options.Hostfile = None,
    script: launch_options.Script = None,
    stop_seconds: launch_options.StopSeconds = None,
    dry_run: launch_options.DryRun = False,
) -> None:
    """Start all ranks of a run; what `--help` says stands in `launch_options.py`."""
    with user_errors():
        run_config = load_config(config, overrides or ())
        where = launch_options.Where(nodes, launcher, gpus, head, run_id, node_rank, hostfile, script, stop_seconds)
        command = launching.plan_launch(run_config, config, overrides or (), where)
        if dry_run:
            typer.echo(str(command))
            return
        print(redacted(str(command)), file=sys.stderr, flush=True)
        launching.start(command)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A run that is to start here.")] = None,
    overrides: Overrides = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Examine all ranks together.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[int | None, typer.Option(min=1, help="With --distributed: seconds to wait for a rank.")] = None,
) -> None:
    """Say whether training can start here: packages, GPUs, network, limits, disks; with CONFIG also what it needs."""
    with user_errors():
        from dpo_dist.cli.doctoring import examine

        raise typer.Exit(examine(config, overrides or (), cache_dir(), distributed, as_json, timeout, quiet_imports))


@app.command()
def precompute(config: ConfigPath, overrides: Overrides = None) -> None:
    """Store the reference's log-probabilities of all data for later runs. Alone, or once per rank, as `train`.

    Runs with reference.source=cache or auto find them, whatever their loss, learning rate, folder and number of ranks.
    """
    with user_errors():
        run_config = load_config(config, overrides or ())
        quiet_imports()
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
    with user_errors():
        quiet_imports()
        from dpo_dist.cli.exporting import run_export

        typer.echo(run_export(checkpoint, out, trust_remote_code, merged, base, cache_dir()))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or a folder of them.")],
    metric: Annotated[list[str] | None, typer.Option(help="What to show; may be given several times.")] = None,
    by: Annotated[str | None, typer.Option(help="The metric to sort by, the best first; that shown first.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The held-out set whose values are shown; the first.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with all values.")] = False,
) -> None:
    """Show what runs differ in and what came of it, in one table: the held-out values of the step that was exported."""
    with user_errors():
        from dpo_dist.cli import comparing

        if as_csv and as_json:
            raise typer.BadParameter("--csv and --json are two forms; give one of them")
        form = "csv" if as_csv else "json" if as_json else "table"
        typer.echo(comparing.compare(folders, metric or [], by, dataset, form))


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
    with user_errors():
        quiet_imports()
        from dpo_dist.demo import demo_model_folder

        typer.echo(demo_model_folder(cache_dir()))
