"""What measures a run while it trains, and what is said of it at the end."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dpo_dist.cli.prepare import Prepared
from dpo_dist.distributed import Ranks
from dpo_dist.engine import TrainingEngine
from dpo_dist.pace import Advice, Pace, Stopwatch, peak_flops
from dpo_dist.phases import listening
from dpo_dist.profiling import StepProfiler
from dpo_dist.reference import Source
from dpo_dist.run import Run

logger = logging.getLogger(__name__)


def pace_of(
    prepared: Prepared, ranks: Ranks, policy: TrainingEngine, source: Source, recomputed: tuple[int, int]
) -> Pace:
    """What measures a run. Where no data sheet of the device is known, its speed is measured now.

    Args:
        prepared: the run.
        ranks: where this process stands.
        policy: says what is computed in.
        source: of the reference.
        recomputed: what `settle_recomputation` gave.
    """
    examples, steps = len(prepared.dataset), prepared.num_steps
    advice = Advice(
        recomputed=recomputed,
        passes=prepared.sampler.examples_seen(steps) / examples if source in ("live", "adapter_off") else 0.0,
        stage=prepared.deepspeed.get("zero_optimization", {}).get("stage", 0),
        num_devices=ranks.world_size,
    )
    return Pace(Stopwatch(ranks.device), peak_flops(ranks.device, policy.dtype), ranks.world_size, advice)


@contextmanager
def measuring(run: Run) -> Iterator[None]:
    """Inside, the run's steps are timed, and some of them traced; at the end the first rank says what time went to."""
    with ExitStack() as stack:
        stack.enter_context(listening(run.pace.stopwatch))
        if run.ranks.is_first and run.config.log.profile_steps:
            folder = Path(run.config.train.output_dir) / "profile"
            stack.enter_context(listening(StepProfiler(folder, run.config.log.profile_steps, run.ranks.device)))
        yield
    if run.ranks.is_first and (text := run.pace.verdict()):
        logger.info(text)
