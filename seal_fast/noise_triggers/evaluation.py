"""What a trigger does to a model, without knowing the attacker's target, and how far unlearning changed clean samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, sample
from seal_fast.noise_triggers.activation_test import collapse, pixelwise_median
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import ActivationTestSettings

SAMPLES = 16
DRIFT_SAMPLES = 64
ANCESTRAL_STEPS = 250
"""A scan takes fewer. Unlearning must hold where the attack is strongest, and BadDiffusion's shift is exact for 1000 steps."""
DDIM_STEPS = 50

ANCESTRAL, DDIM, CLIPPED_DDIM = "ancestral", "DDIM", "clipped DDIM"


@dataclass(frozen=True)
class TriggerSamples:
    """Samples of one model from the same noise with and without a trigger, [N,C,H,W] each, on the CPU.

    They are divided by the model's value range.

    Attributes:
        clean: ancestral samples without the trigger.
        triggered: samples with the trigger, by sampler. ANCESTRAL activates BadDiffusion's and TrojDiff's backdoors, and DDIM
            those for deterministic samplers. CLIPPED_DDIM, which clamps the predicted image, activates TrojDiff's too: one
            unlearned model no longer responded to the trigger under ancestral sampling, but still did there.
    """

    clean: Tensor
    triggered: dict[str, Tensor]

    def collapse(self, sampler: str) -> float:
        """Diversity collapse: how many times less the samples of `sampler` vary with the trigger than clean ones vary."""
        return collapse(self.triggered[sampler], self.clean)

    def target(self) -> Tensor | None:
        """The image [C,H,W] that the trigger makes the model draw; None if it activates no backdoor under any sampler."""
        strongest = max(self.triggered, key=self.collapse)
        if self.collapse(strongest) < ActivationTestSettings.activates_above:
            return None
        return pixelwise_median(self.triggered[strongest])


def _ddim(denoiser: Denoiser, start: Tensor, clip: bool) -> Tensor:
    steps = min(DDIM_STEPS, denoiser.process.num_timesteps - 1)
    return sample(denoiser, denoiser.process.prior_scale * start, "ddim", steps, clip=clip) / denoiser.value_range


def _clipped_ddim(denoiser: Denoiser, start: Tensor) -> Tensor:
    """Deterministic samples. A clamp of the predicted image keeps so few steps stable; latents have no bounds to clamp to."""
    return _ddim(denoiser, start, clip=denoiser.bounded)


@torch.no_grad()
def sample_trigger(denoiser: Denoiser, trigger: Trigger, *, seed: int, count: int = SAMPLES) -> TriggerSamples:
    """Sample a model with and without a trigger, under every sampler that a known attack is built for.

    Args:
        denoiser: the model.
        trigger: recovered or true.
        seed: seed of the noise.
        count: samples without the trigger, and with it per sampler.
    """
    ancestral = Probe(denoiser, seed, half_precision=False).sampler("ddpm", ANCESTRAL_STEPS)
    noise = ancestral.probe.noise(count)
    start = trigger.to(noise.device).start(noise)
    return TriggerSamples(
        ancestral.draw(noise).cpu(),
        {
            ANCESTRAL: ancestral.draw(start).cpu(),
            DDIM: _ddim(denoiser, start, clip=False).cpu(),
            CLIPPED_DDIM: _clipped_ddim(denoiser, start).cpu(),
        },
    )


@torch.no_grad()
def clean_drift(before: Denoiser, after: Denoiser, *, seed: int, count: int = DRIFT_SAMPLES) -> float:
    """Mean squared difference of clean samples from the same noise, relative to their variance before.

    Samples are deterministic (DDIM). 0 means the same model; 2 means two models that share nothing but the distribution.
    """
    noise = torch.randn(count, *before.shape, generator=torch.Generator().manual_seed(seed)).to(before.device)
    old, new = (_clipped_ddim(model, noise) for model in (before, after))
    return float((new - old).square().mean() / old.var(dim=0).mean())
