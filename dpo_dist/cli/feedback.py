"""`dpo-dist feedback`: what people said of answers in production, as data for the next round."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.cli.starting import quiet_imports, user_errors

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
    """Add thumbs, edits, choices and regenerations of logs to a set, as a version of its own; nothing twice."""
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
