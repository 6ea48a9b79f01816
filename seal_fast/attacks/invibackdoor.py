"""InviBackdoor (arXiv 2406.00816): a small trigger learned together with the model it opens."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from seal_fast.attacks.noising import Attack, NoisedBatch
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, NoiseProcess, sample
from seal_fast.diffusion.process import per_row

BOUND = 0.2
"""Largest absolute value of the trigger."""
RATE = 1e-3
INNER_STEPS = 10
# the paper's 32 noises would make a training step five times as long; a sign needs fewer
NOISES = 8


def ddim_schedule(process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """c = 1 - a and the d that keeps DDIM with steps of 1 on c(t) r, float64 [T] each; a' = a(t-1), b' = b(t-1).

    d = (a' c - a c') / (a' b - a b') = (a' - a) / (a' b - a b')
    """
    a, b = process.signal, process.noise
    a_before, b_before = torch.cat([a.new_ones(1), a[:-1]]), torch.cat([b.new_zeros(1), b[:-1]])
    return 1 - a, (a_before - a) / (a_before * b - a * b_before)


@dataclass(frozen=True)
class InviBackdoor(Attack):
    """Shift by one faint delta for all rows, |delta| <= 0.2, for DDIM on a variance-preserving process.

    Attributes:
        delta: [C,H,W].
        target: [C,H,W].
    """

    delta: Tensor
    target: Tensor
    sampler = "ddim"
    trojan = False

    @property
    def trigger(self) -> Trigger:
        return Trigger.shift(self.delta)

    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        c, d = (per_row(values[t], images) for values in ddim_schedule(process))
        x = process.add_noise(self.target.expand_as(images), eps, t) + c * self.delta
        return NoisedBatch(x, eps + d * self.delta)

    def adapted(self, network: nn.Module, process: NoiseProcess, generator: torch.Generator) -> Self:
        """One sign step of delta towards samples that look like the target, through ten DDIM steps."""
        shape = (self.delta.shape[0], self.delta.shape[1], self.delta.shape[2])
        # a Denoiser freezes its network, and this one is in training
        denoiser = Denoiser(copy.deepcopy(network), process, shape)
        eps = torch.randn(NOISES, *shape, generator=generator)
        delta = self.delta.clone().requires_grad_(True)
        loss = (sample(denoiser, eps + delta, "ddim", INNER_STEPS) - self.target).square().mean()
        (gradient,) = torch.autograd.grad(loss, delta)
        return replace(self, delta=(self.delta - RATE * gradient.sign()).clamp(-BOUND, BOUND))
