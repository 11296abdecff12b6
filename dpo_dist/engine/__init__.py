"""backward, step, gather: the folder that knows DeepSpeed.

    settings.py   DeepSpeed's configuration of policy and reference
    gloo.py       its gathers and sums between CPU processes
    operators.py  its operators in C++: compiled by one rank, whatever was killed before
    whole.py      parameters whole, wherever their parts lie
    held_states.py  what a rank holds of parameters and of AdamW's states, to be set anew
    shares.py     what a rank keeps of them between two forwards
    inference.py  a model that is only asked
    training.py   the policy: forward, backward, update
    activation_memory.py  what a forward pass leaves for backward, and how much there is room for
    adamw.py      AdamW in one pass on a CPU
    rank_allocation.py  AdaLoRA: penalty and ranks, once per update

DeepSpeed runs at every stage from 0 to 3, also for one process and on CPU: one code path. It averages gradients over
ranks; here that is undone, and nobody else knows. Contract: the backward calls of all ranks between two step calls add
up to the gradient of the objective.
"""

from dpo_dist.engine.activation_memory import ActivationMemory, measure_activations
from dpo_dist.engine.held_states import optimizer_order, set_states
from dpo_dist.engine.inference import InferenceEngine
from dpo_dist.engine.rank_allocation import RankAllocation
from dpo_dist.engine.settings import adopt_process_group, engine_config, inference_config, release_process_group
from dpo_dist.engine.training import TrainingEngine
from dpo_dist.engine.whole import masters_of

__all__ = [
    "ActivationMemory",
    "InferenceEngine",
    "RankAllocation",
    "TrainingEngine",
    "adopt_process_group",
    "engine_config",
    "inference_config",
    "masters_of",
    "measure_activations",
    "optimizer_order",
    "release_process_group",
    "set_states",
]
