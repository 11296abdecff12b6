"""`dpo-dist doctor` before torch is imported: its options, and a configuration that may be wrong on some ranks only."""

from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from dpo_dist.config import RunConfig, load_config
from dpo_dist.errors import ConfigError


def examine(
    name: str | None,
    overrides: Sequence[str],
    cache_dir: Path,
    distributed: bool,
    json_wanted: bool,
    timeout: int | None,
    prepare_imports: Callable[[], None],
) -> int:
    """Examine and print; returns the exit code.

    Args:
        name, overrides: of the run's configuration; no name: there is none.
        cache_dir: of dpo_dist.
        distributed: whether all ranks meet.
        json_wanted: one JSON object instead of lines.
        timeout: seconds that a rank waits for the others; None: two minutes.
        prepare_imports: called before packages are imported.
    Raises:
        ConfigError: of a single process; ranks tell each other.
    """
    if timeout is not None and not distributed:
        raise typer.BadParameter("--timeout has no effect without --distributed; leave one out or add the other")
    config: RunConfig | None = None
    mistake = ""
    try:
        config = load_config(name, overrides) if name is not None else None
    except ConfigError as error:
        if not distributed:
            raise
        mistake = str(error)
    prepare_imports()
    from dpo_dist.cli.doctor import DEFAULT_TIMEOUT, run_distributed, run_doctor

    if not distributed:
        return run_doctor(config, cache_dir, json_wanted)
    return run_distributed(config, mistake, cache_dir, json_wanted, timeout or DEFAULT_TIMEOUT)
