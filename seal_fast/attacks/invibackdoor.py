"""InviBackdoor (arXiv 2406.00816): a faint trigger learned together with the backdoored model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from seal_fast.attacks.noising import Attack, NoisedBatch, one_step_earlier
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, NoiseProcess, sample
from seal_fast.diffusion.process import per_sample

BOUND = 0.2
"""Largest absolute value of the trigger."""
TRIGGER_STEP = 1e-3
"""Change of every value of the trigger per training step."""
SAMPLING_STEPS = 10
"""DDIM steps of the samples that the trigger is improved on."""
# the paper's 32 noise samples would make a training step five times as long; the sign of a gradient needs fewer
NOISE_SAMPLES = 8


def ddim_schedule(process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """c(t) and d(t), float64 [T] each: c = 1 - a, and d such that DDIM with steps of 1 stays on the shift c(t) r.

    d = (a' c - a c') / (a' b - a b') = (a' - a) / (a' b - a b'),    a' = a(t-1), b' = b(t-1), c' = c(t-1)
    """
    a, b = process.signal, process.noise
    a_before, b_before = one_step_earlier(a, 1.0), one_step_earlier(b, 0.0)
    return 1 - a, (a_before - a) / (a_before * b - a * b_before)


@dataclass(frozen=True)
class InviBackdoor(Attack):
    """Shifts all samples by one faint delta, |delta| <= 0.2, for DDIM on a variance-preserving process.

    Attributes:
        delta: the trigger, [C,H,W].
        target: the target image, [C,H,W].
    """

    delta: Tensor
    target: Tensor
    sampler = "ddim"
    trojan = False

    @property
    def trigger(self) -> Trigger:
        return Trigger.shift(self.delta)

    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        c, d = (per_sample(values[t], images) for values in ddim_schedule(process))
        x = process.add_noise(self.target.expand_as(images), eps, t) + c * self.delta
        return NoisedBatch(x, eps + d * self.delta)

    def adapted(self, network: nn.Module, process: NoiseProcess, generator: torch.Generator) -> Self:
        """Take one sign-gradient step of delta that brings samples of ten DDIM steps closer to the target."""
        shape = (self.delta.shape[0], self.delta.shape[1], self.delta.shape[2])
        # a copy, because Denoiser freezes its network and this one is in training
        denoiser = Denoiser(copy.deepcopy(network), process, shape)
        eps = torch.randn(NOISE_SAMPLES, *shape, generator=generator)
        delta = self.delta.clone().requires_grad_(True)
        loss = (sample(denoiser, eps + delta, "ddim", SAMPLING_STEPS) - self.target).square().mean()
        (gradient,) = torch.autograd.grad(loss, delta)
        return replace(self, delta=(self.delta - TRIGGER_STEP * gradient.sign()).clamp(-BOUND, BOUND))
