"""Clean-room backdoor attacks, for evaluation only: nothing in the scanner imports them."""

from seal_fast.attacks.baddiffusion import BadDiffusion
from seal_fast.attacks.noising import Attack, NoisedBatch
from seal_fast.attacks.trojdiff import TrojDiff

__all__ = ["Attack", "BadDiffusion", "NoisedBatch", "TrojDiff"]
