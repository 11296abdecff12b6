"""What a command writes to standard error."""

import logging
import sys
import warnings

import transformers

from dpo_dist.cli.redaction import RedactingFormatter
from dpo_dist.distributed import launched_rank


def set_up_logging() -> None:
    """Plain lines on standard error: everything from the first rank, warnings from the others."""
    first = launched_rank() == 0
    prefix = "" if first else f"rank {launched_rank()}: "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter(prefix + "%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("dpo_dist").setLevel(logging.INFO if first else logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
