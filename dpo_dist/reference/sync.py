"""A live reference that follows the policy (TR-DPO).

Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment", arXiv:2404.09656, eq. 4: every so many
updates reference <- alpha * policy + (1 - alpha) * reference. Under ZeRO-3 both engines hold the same slice of each
parameter, so nothing travels.
"""

import logging

import torch
from jaxtyping import Shaped
from torch import Tensor

from dpo_dist.engine import InferenceEngine, TrainingEngine
from dpo_dist.errors import ConfigError

_LOGGER = logging.getLogger(__name__)
CHUNK = 1 << 24  # elements that are mixed at once: what float32 copies of them take bounds the memory


class ReferenceSync:
    """Mixes the policy's weights into the reference's when that is due.

    Args:
        policy: whose weights are taken, as the model computes with them: the optimizer's float32 ones are not.
        reference: whose weights are overwritten, in their own dtype. Buffers stay as they are.
        alpha: `reference.ref_model_mixup_alpha`, share of the policy; 1 copies it.
        every: `reference.ref_model_sync_steps`, updates between two synchronisations.

    Raises:
        ConfigError: the two models do not have the same parameters, or one keeps its own where they cannot be reached.
    """

    def __init__(self, policy: TrainingEngine, reference: InferenceEngine, alpha: float, every: int) -> None:
        self.policy, self.reference, self.alpha, self.every = policy, reference, alpha, every
        _require_alike(policy, reference)

    def __call__(self, step: int) -> bool:
        """After update `step`, counted from 1: synchronise if it is due, and say whether it was.

        Every rank must call it. It sends nothing; the reference's next forward gathers again what was kept whole.
        """
        if step % self.every:
            return False
        policy = dict(self.policy.named_shares())
        for name, share in self.reference.named_shares():
            mix(share, policy[name], self.alpha)
        self.reference.shares_have_changed()
        _LOGGER.info("step %d: the reference is synchronised with the policy", step)
        return True


@torch.no_grad()
def mix(reference: Shaped[Tensor, " n"], policy: Shaped[Tensor, " n"], alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, in float32, rounded once to the reference's dtype."""
    for own, other in zip(reference.split(CHUNK), policy.split(CHUNK), strict=True):
        taken = other.to(own.device)
        if alpha < 1:
            taken = alpha * taken.float() + (1 - alpha) * own.float()
        own.copy_(taken)


def _require_alike(policy: TrainingEngine, reference: InferenceEngine) -> None:
    on_disk = [engine for engine in (policy, reference) if engine.is_on_disk]
    if on_disk:
        raise ConfigError(
            "reference.sync_ref_model=true does not work with weights on NVMe; let zero_optimization.offload_param of "
            "the DeepSpeed file name cpu, or leave it out"
        )
    theirs, own = policy.whole_shapes(), reference.whole_shapes()
    differing = sorted(name for name in theirs.keys() | own.keys() if theirs.get(name) != own.get(name))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"reference.sync_ref_model=true needs a reference with the policy's parameters, and {len(differing)} "
            f"differ: {name} is {theirs.get(name, 'none')} in the policy and {own.get(name, 'none')} in the reference; "
            "let model.reference_name_or_path name a model of the same architecture, or leave it out"
        )
    sizes = {name: len(share) for name, share in policy.named_shares()}
    for name, share in reference.named_shares():
        # Both are partitioned by the same DeepSpeed file over the same ranks.
        assert len(share) == sizes[name], f"{name}: {len(share)} elements here, {sizes[name]} in the policy"
