"""What a run proves about itself before the first update.

noise.py  what rounding explains of the difference between two evaluations
blame.py  whose fault it is that two evaluations differ
proof.py  engines and layouts compared on the first micro-batch; the first loss; ranks agree on the step
"""

from dpo_dist.selfcheck.proof import Proof, check_agreement, check_first_loss, prove

__all__ = ["Proof", "check_agreement", "check_first_loss", "prove"]
