"""`dpo-dist precompute`: fill the cache of reference log-probabilities, and train nothing."""

import logging
from datetime import timedelta
from pathlib import Path

from dpo_dist.cli.describe import counted, facts
from dpo_dist.cli.prepare import prepare
from dpo_dist.cli.sources import fill_cache, open_reference_cache, require_reference
from dpo_dist.config import RunConfig
from dpo_dist.distributed import StopRequest, process_group
from dpo_dist.engine import adopt_process_group, release_process_group
from dpo_dist.selfcheck import check_agreement

logger = logging.getLogger(__name__)


def run_precompute(config: RunConfig, cache_dir: Path) -> None:
    """Score every completion of all data sets under the reference; what is stored already is left as it is."""
    require_reference(config)
    prepared = prepare(config, cache_dir)
    timeout = timedelta(seconds=config.parallel.ddp_timeout)
    with process_group(timeout, release_process_group) as ranks:
        adopt_process_group()
        check_agreement(facts(prepared, prepared.first_plan(ranks.world_size)))
        cache = open_reference_cache(prepared, ranks, cache_dir)
        found, missing = cache.num_found, cache.num_missing
        if ranks.is_first:
            where = f"{counted(ranks.world_size, 'rank')} on {ranks.device.type}"
            logger.info("%s: %s found, %d to be computed in %s", where, counted(found, "value"), missing, cache.folder)
        fill_cache(prepared, ranks, cache, StopRequest())  # signals end it at once: every stored row is whole
        if ranks.is_first:
            logger.info("%s: all %s stored", cache.folder, counted(found + missing, "value"))
