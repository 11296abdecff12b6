"""`dpo-dist sample`: completions of a model, ranked by a judge or a reward model, as data for the next round."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.cli.starting import cache_dir, importing, quiet_imports, user_errors


def sample(
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS", help="A data set of any kind; its prompts are read.")],
    model: Annotated[
        str, typer.Option(help="A folder, a hub id or demo; with --server the name that the server knows it by.")
    ],
    out: Annotated[Path, typer.Option(help="The file to make: OUT.jsonl.")],
    num_completions: Annotated[int, typer.Option("-k", min=2, help="Completions per prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="What logits are divided by, above 0.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Another one gives other completions.")] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts at a time, each with all completions; requests at a time.")
    ] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first rows only.")] = None,
    server: Annotated[str | None, typer.Option(help="Sample from an OpenAI-compatible server: its URL.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Rank with a judge on an OpenAI-compatible server: its URL.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The name that this server knows the judge by.")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Rank with a reward model in this process: a folder or a hub id.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for a request to a server.")] = 300.0,
    as_text: Annotated[bool, typer.Option("--text", help="Leave strings as they are, no messages.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that belongs to the model.")
    ] = False,
) -> None:
    """Sample completions for each prompt and let a judge or a reward model rank them.

    Begun again, it goes on where it ended. The environment variable OPENAI_API_KEY is sent to both servers if it is
    set.
    """
    with user_errors():
        quiet_imports()
        with importing():
            from dpo_dist.cli import generating
            from dpo_dist.cli.logs import set_up_logging

        set_up_logging()
        servers = generating.Servers(server, judge, judge_model, os.environ.get("OPENAI_API_KEY"), timeout)
        reading = generating.Reading(prompts, limit, as_text, skip_bad)
        how = generating.Settings("", num_completions, max_new_tokens, temperature, top_p, seed)
        wanted = generating.Wanted(reading, model, trust_remote_code, out, how, batch_size, servers, reward_model)
        typer.echo(generating.run_sample(wanted, cache_dir()))
