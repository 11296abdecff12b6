"""Policy and reference in memory.

fit.py           whether a folder's files fit its configuration
operations.py    what a token costs in a forward pass
slices.py        under ZeRO-3 every rank reads the slices it owns
scoring.py       weights in memory, sharded as they are read, that answer with log-probabilities
packed.py        what the decoder is handed: a micro-batch's tokens, and virtual ones
own_forward.py   what the architecture's own class says of one sequence
probe.py         an architecture tried on a small random model
adapted.py       an adapter inside a model, and the model without it
quantization.py  frozen weights in four bits
compiled.py      decoder layers by torch.compile
recomputation.py  which layers compute their activations again in backward
liger.py         fused norms, MLPs and rotations, by a package
"""

from dpo_dist.model.adapted import Adapter, base_name
from dpo_dist.model.compiled import Compilations, compiled_classes
from dpo_dist.model.fit import Fit, find_fit
from dpo_dist.model.liger import require_liger
from dpo_dist.model.operations import model_cost
from dpo_dist.model.own_forward import own_kernel, rewritten_by
from dpo_dist.model.probe import Probe, try_architecture
from dpo_dist.model.quantization import four_bits
from dpo_dist.model.recomputation import Recomputation
from dpo_dist.model.scoring import ScoringModel, load_model, sharded_loading
from dpo_dist.model.slices import node_groups

__all__ = [
    "Adapter",
    "Compilations",
    "Fit",
    "Probe",
    "Recomputation",
    "ScoringModel",
    "base_name",
    "compiled_classes",
    "find_fit",
    "four_bits",
    "load_model",
    "model_cost",
    "node_groups",
    "own_kernel",
    "require_liger",
    "rewritten_by",
    "sharded_loading",
    "try_architecture",
]
