"""Clean-room backdoor attacks, for evaluation only: nothing in the scanner imports them.

The noise-space attacks are exported here. The attacks on text-to-image models are modules: badt2i, rickrolling, eviledit.
"""

from seal_fast.attacks.invibackdoor import InviBackdoor
from seal_fast.attacks.noising import Attack, NoisedBatch
from seal_fast.attacks.trojdiff import TrojDiff
from seal_fast.attacks.villandiffusion import VillanDiffusion

__all__ = ["Attack", "InviBackdoor", "NoisedBatch", "TrojDiff", "VillanDiffusion"]
