"""The interface of noise-space attacks: their poisoned training samples, their trigger, and the sampler that activates it.

The poisoned training samples of all noise-space attacks have one form,

    input   x_t = a(t) y + b(t) gamma eps + c(t) r        noise to predict   eps + d(t) r

where y is the attacker's target image and r the training shift. The attacks differ in r, gamma, c and d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import NoiseProcess


def one_step_earlier(values: Tensor, first: float) -> Tensor:
    """The table values(t - 1), [T], of a table values(t); `first` at t = 0."""
    return torch.cat([values.new_full((1,), first), values[:-1]])


class NoisedBatch(NamedTuple):
    """Network inputs and the noise that the network must predict for them, both [N,C,H,W]."""

    x: Tensor
    target: Tensor


class Attack(ABC):
    """A backdoor to train into a model.

    Attributes:
        target: the image that triggered inputs must become, [C,H,W] in [-1, 1].
        trojan: whether the attack is sampled with TrojDiff's samplers, which use the trigger at every step.
    """

    target: Tensor
    trojan: bool

    @property
    @abstractmethod
    def sampler(self) -> str:
        """Name in `seal_fast.diffusion.SAMPLERS` of the sampler that the attack was built for."""

    @property
    @abstractmethod
    def trigger(self) -> Trigger:
        """The trigger that the attacker adds to the starting noise, before the noise is scaled by the prior."""

    @abstractmethod
    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        """Turn clean images into poisoned training samples.

        Args:
            process: the noise process of the model in training.
            images: the clean images to poison, [N,C,H,W] in [-1, 1].
            eps: noise [N,C,H,W].
            t: timesteps int64 [N].
        """

    def adapted(self, network: nn.Module, process: NoiseProcess, generator: torch.Generator) -> Self:
        """The attack with its trigger improved on the network in training; called before every training step.

        Only a learned trigger changes. `generator` is the source of the noise that it is learned on.
        """
        return self
