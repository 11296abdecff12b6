"""DeepSpeed's trace under ZeRO-3: which modules run in which order, by which it gathers ahead and keeps weights."""

import inspect
from typing import Any


def forget_forward_only(deepspeed_engine: Any) -> None:
    """Let the next micro-batch be traced, where what was traced until now had no backward pass. Every rank must.

    By such a trace every weight is let go after its forward and gathered again for its backward, for as long as the
    process lives: DeepSpeed 0.19.8 remembers what to let go for good, though it traces anew when a backward pass comes.

    Args:
        deepspeed_engine: Between two micro-batches, before the first one that is trained on.
    """
    offload = getattr(deepspeed_engine.optimizer, "parameter_offload", None)
    coordinator = None if offload is None else offload.get_param_coordinator()
    if coordinator is None:
        return
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    remembers = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(remembers).nonlocals["func"].cache_clear()
