"""What a run proves about itself before the first update.

comparison.py  two evaluations of the same completions, over all ranks
blame.py       whose fault it is that two evaluations differ
own_forward.py  the packed forward against the architecture's own
proof.py       engines and layouts compared on the first micro-batch; the first loss; ranks agree on the step
"""

from dpo_dist.selfcheck.proof import Proof, check_agreement, check_first_loss, prove

__all__ = ["Proof", "check_agreement", "check_first_loss", "prove"]
