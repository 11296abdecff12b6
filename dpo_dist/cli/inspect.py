"""`dpo-dist inspect`: what is wrong with the data of a run, as a command."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dpo_dist.cli.starting import ConfigPath, Overrides, cache_dir, importing, quiet_imports, user_errors
from dpo_dist.config import load_config

_OVERRIDE = re.compile(r"[a-z_]+\.[\w.]+=")


class Inspect(TyperCommand):
    """The command, whose option `--model` needs no value; typer knows options with one and options without."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's own."""
        return super().parse_args(ctx, with_model_value(args))


def with_model_value(words: Sequence[str]) -> list[str]:
    """`--model` without a model becomes `--model=`: at the end, before another option, and before a setting."""
    found = []
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        is_bare = word == "--model" and (following.startswith("-") or _OVERRIDE.match(following))
        found.append("--model=" if is_bare else word)
    return found


def inspect(
    config: ConfigPath,
    overrides: Overrides = None,
    near: Annotated[
        float, typer.Option(min=0.3, max=1.0, help="Likeness from which on texts are near duplicates.")
    ] = 0.8,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Ask a model for labels that it contradicts: a folder, a hub id or demo; without PATH the reference.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every row.")] = False,
    fix: Annotated[Path | None, typer.Option(help="Write data.train without faulty rows: OUT.jsonl.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with histograms and examples: OUT.html.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Say what is wrong with the data: repeats, contradictions, near duplicates, leaks, lengths, rows left out.

    Loads no model but for --model; what it tokenises stays in the cache.
    """
    with user_errors():
        run_config = load_config(config, overrides or ())
        quiet_imports()
        with importing():
            from dpo_dist.cli import inspecting
            from dpo_dist.cli.logs import set_up_logging

        set_up_logging()
        wanted = inspecting.Wanted(near, model, as_json, fix, html, overwrite)
        typer.echo(inspecting.report(run_config, cache_dir(), wanted))
