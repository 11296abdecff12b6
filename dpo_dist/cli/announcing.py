"""What `train` says of a run before its models are loaded."""

import logging

from dpo_dist.cli.describe import counted, describe_adapter
from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.remarks import remarks
from dpo_dist.distributed import Ranks
from dpo_dist.packing import StepPlan
from dpo_dist.tokenization import describe_notes

logger = logging.getLogger(__name__)


def announce(prepared: Prepared, plan: StepPlan, ranks: Ranks) -> None:
    """Log what was decided, what was left out and what is seldom meant; the first rank does."""
    if not ranks.is_first:
        return
    kernel, kernel_reason = prepared.attention
    shared, sharing_reason = prepared.sharing
    stage = prepared.deepspeed.get("zero_optimization", {}).get("stage", 0)
    where = f"{counted(ranks.world_size, 'rank')} on {ranks.device.type}"
    logger.info("%s, ZeRO stage %d, %s", where, stage, prepared.config.model.dtype)
    logger.info("attention kernel %s: %s", kernel, kernel_reason)
    logger.info("prompts are computed %s: %s", "once" if shared else "once per completion", sharing_reason)
    if prepared.config.adapter.is_used:
        logger.info("adapter: %s", describe_adapter(prepared))
    disabled = prepared.model_config.disabled_dropout
    logger.info("dropout is off%s", f" (the model had {disabled})" if disabled else "")
    examples, steps = counted(len(prepared.dataset), "example"), counted(prepared.num_steps, "step")
    logger.info("%s, %s of %d", examples, steps, len(plan.examples))
    for remark in remarks(prepared, plan):
        logger.warning(remark)
    for name, dataset in prepared.datasets.items():
        for note in describe_notes(dataset.notes, len(dataset)):
            logger.warning("%s: %s", name, note)
    if prepared.dataset.bad_rows:
        logger.info("rows left out: %s", prepared.dataset.bad_rows)
    if prepared.dataset.ignored_columns:
        logger.info("columns ignored: %s", ", ".join(prepared.dataset.ignored_columns))
