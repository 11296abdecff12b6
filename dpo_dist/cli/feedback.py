"""`dpo-dist feedback`: what people said of answers in production, as data for the next round."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.cli.starting import quiet_imports, user_errors


class Reference(StrEnum):
    """What a round is compared with."""

    last = "last"
    first = "first"


app = typer.Typer(help="Collect what people said of answers in production, and train on it.", no_args_is_help=True)


@app.command()
def add(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG...", help="JSON Lines or JSON, plain, .gz or .zst.")],
    to: Annotated[Path, typer.Option(help="The folder of the set; made if it is not there.")],
    columns: Annotated[
        list[str] | None, typer.Option(help="Where a column is: prompt=request.messages. May be given several times.")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="How much rows of a kind count: regeneration=0.5; several may be given.")
    ] = None,
    as_text: Annotated[bool, typer.Option("--text", help="Leave strings as they are, no messages.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out events that cannot be used.")] = False,
) -> None:
    """Add thumbs, edits, choices, rankings and regenerations of logs to a set, as one version; nothing twice."""
    with user_errors():
        quiet_imports()
        from dpo_dist.cli.feeding import run_add

        typer.echo(run_add(logs, to, columns or [], weight or [], as_text, skip_bad))


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="The folder of a set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the versions of a set: when they were added, from which logs, and what they hold."""
    with user_errors():
        quiet_imports()
        from dpo_dist.cli.feeding import describe

        typer.echo(describe(folder, as_json))


def round_(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file whose data.train is a set of feedback.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values in the place of the file's."),
    ] = None,
    reference: Annotated[
        Reference, typer.Option(help="What a round is compared with: the model it begins with, or the first round's.")
    ] = Reference.last,
    max_drop: Annotated[
        float, typer.Option(min=0.0, help="Share of the held-out pairs of old feedback that a round may cost.")
    ] = 0.02,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of this machine; all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and start nothing.")] = False,
) -> None:
    """Train one round on all feedback so far, from the last round's model, and say whether the old is kept."""
    with user_errors():
        from dpo_dist.cli.launch_options import Where
        from dpo_dist.cli.round_running import run_round

        raise typer.Exit(run_round(config, overrides or (), reference.value, max_drop, Where(gpus=gpus), dry_run))
