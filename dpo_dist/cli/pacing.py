"""What measures a run while it trains, and what is said of it at the end."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.recomputing import Recomputation
from dpo_dist.distributed import Ranks
from dpo_dist.engine import TrainingEngine
from dpo_dist.model import model_cost
from dpo_dist.pace import Advice, Pace, Stopwatch, peak_flops
from dpo_dist.packing import CostModel
from dpo_dist.phases import listening
from dpo_dist.profiling import StepProfiler
from dpo_dist.reference import Source
from dpo_dist.run import Run

logger = logging.getLogger(__name__)


def pace_of(
    prepared: Prepared, ranks: Ranks, policy: TrainingEngine, source: Source, recomputation: Recomputation
) -> Pace:
    """What measures a run. Where no data sheet of the device is known, its speed is measured now.

    Args:
        prepared: the run.
        ranks: where this process stands.
        policy: says what is computed in.
        source: of the reference.
        recomputation: what `settle_recomputation` gave.
    """
    config, steps = prepared.config, prepared.num_steps
    reference_cost = _reference_cost(prepared, source)
    # One that follows the policy cannot be cached.
    is_cacheable = reference_cost is not None and not config.reference.sync_ref_model
    advice = Advice(
        recomputed=(recomputation.count, recomputation.num_layers),
        is_chosen=config.model.gradient_checkpointing is True,
        passes=prepared.sampler.examples_seen(steps) / len(prepared.dataset) if is_cacheable else 0.0,
        stage=prepared.deepspeed.get("zero_optimization", {}).get("stage", 0),
        num_devices=ranks.world_size,
    )
    peak = peak_flops(ranks.device, policy.dtype)
    return Pace(Stopwatch(ranks.device), peak, ranks.world_size, prepared.cost, reference_cost, advice)


def _reference_cost(prepared: Prepared, source: Source) -> CostModel | None:
    """Of a reference that is computed in every step."""
    if source not in ("live", "adapter_off"):
        return None
    if prepared.same_base:
        return prepared.cost
    return model_cost(prepared.reference_config, prepared.config.model.trust_remote_code)


@contextmanager
def measuring(run: Run) -> Iterator[None]:
    """Inside, the run's steps are timed, and some of them traced; at the end the first rank says what time went to."""
    log, folder = run.config.log, Path(run.config.train.output_dir) / "profile"
    with ExitStack() as stack:
        profiler = StepProfiler(folder, log.profile_steps if run.ranks.is_first else (), run.ranks.device)
        stack.callback(profiler.stop)
        for listener in (profiler.begin, run.pace.stopwatch, profiler.end):
            stack.enter_context(listening(listener))
        yield
    if run.ranks.is_first and (text := run.pace.verdict()):
        logger.info(text)
