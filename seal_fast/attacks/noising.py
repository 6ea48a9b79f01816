"""What an attack is: the rows it trains on, what it adds at test, and the sampler that makes it fire.

All noise-space attacks train poisoned rows in one form,

    input   x_t = a(t) y + b(t) gamma eps + c(t) r        target  eps + d(t) r

where y is the attacker's target image and r the training shift; they differ in r, gamma, c and d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import NoiseProcess


class NoisedBatch(NamedTuple):
    """Network inputs and the noise the network must answer with, both [N,C,H,W]."""

    x: Tensor
    target: Tensor


class Attack(ABC):
    """A backdoor to be trained into a model.

    Attributes:
        target: the image a triggered input must become, [C,H,W] in [-1, 1].
        trojan: whether the sampler must be told the trigger (TrojDiff's samplers).
    """

    target: Tensor
    trojan: bool

    @property
    @abstractmethod
    def sampler(self) -> str:
        """Name in `seal_fast.diffusion.SAMPLERS` of the sampler the attack was built for."""

    @property
    @abstractmethod
    def trigger(self) -> Trigger:
        """What the attacker adds to the starting noise, before the prior's scale."""

    @abstractmethod
    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        """Training rows of poisoned samples.

        Args:
            process: the noise process being trained.
            images: clean images the attacker has poisoned, [N,C,H,W] in [-1, 1].
            eps: noise [N,C,H,W].
            t: timesteps int64 [N].
        """

    def adapted(self, network: nn.Module, process: NoiseProcess, generator: torch.Generator) -> Self:
        """The attack with its trigger improved on the network in training, asked for before every step.

        Only a learned trigger changes; `generator` is the source of its noise.
        """
        return self
