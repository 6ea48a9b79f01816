"""What an attack is: the rows it trains on, what it adds at test, and the sampler that makes it fire.

All noise-space attacks train poisoned rows in one form,

    input   x_t = a(t) y + b(t) gamma eps + c(t) r        target  eps + d(t) r

where y is the attacker's target image and r the training shift; they differ in r, gamma, c and d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from seal_fast.diffusion import VP, Trigger


class NoisedBatch(NamedTuple):
    """Network inputs and regression targets of one training step, both [N,C,H,W]."""

    x: Tensor
    target: Tensor


class Attack(ABC):
    """A backdoor to be trained into a model.

    Attributes:
        target: the image a triggered input must become, [C,H,W] in [-1, 1].
        sampler: name in `seal_fast.diffusion.SAMPLERS` the attack was built for.
        trojan: whether that sampler must be told the trigger (TrojDiff's samplers).
    """

    target: Tensor
    sampler: str
    trojan: bool

    @property
    @abstractmethod
    def trigger(self) -> Trigger:
        """What the attacker adds to the starting noise."""

    @abstractmethod
    def poison(self, process: VP, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        """Training rows of poisoned samples.

        Args:
            process: the noise process being trained.
            images: clean images the attacker has poisoned, [N,C,H,W] in [-1, 1].
            eps: noise [N,C,H,W].
            t: timesteps int64 [N].
        """
