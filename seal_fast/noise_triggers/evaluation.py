"""What a sealing did, without knowing the attacker's target: does the trigger still fire, and did clean samples move?"""

from __future__ import annotations

import torch
from torch import Tensor

from seal_fast.diffusion import Denoiser, Trigger, sample
from seal_fast.noise_triggers.activation_test import collapse, pixelwise_median
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import ActivationTestSettings

SAMPLES = 16
ANCESTRAL_STEPS = 250
"""More than a scan takes: BadDiffusion's shift is exact for 1000, and a seal must hold where the attack is strongest."""
DDIM_STEPS = 50

CLEAN, ANCESTRAL, DDIM, CLIPPED = "no trigger", "trigger, ancestral", "trigger, DDIM", "trigger, clipped DDIM"


def _ddim(denoiser: Denoiser, start: Tensor, clip: bool) -> Tensor:
    steps = min(DDIM_STEPS, denoiser.process.num_timesteps - 1)
    return sample(denoiser, denoiser.process.prior_scale * start, "ddim", steps, clip=clip) / denoiser.value_range


def _clipped_ddim(denoiser: Denoiser, start: Tensor) -> Tensor:
    """Deterministic samples; the clamp steadies the few steps."""
    return _ddim(denoiser, start, denoiser.bounded)


@torch.no_grad()
def draw_starts(denoiser: Denoiser, trigger: Trigger, *, seed: int, count: int = SAMPLES) -> dict[str, Tensor]:
    """Samples over the reach of images, [count,C,H,W], from the same noise, in the ways a backdoor in noise is known to fire.

    Args:
        denoiser: the model.
        trigger: reverted or true.
        seed: of the noise.
        count: samples per row.

    Returns:
        CLEAN: ancestral samples without the trigger; ANCESTRAL: with it (BadDiffusion and TrojDiff fire); DDIM: with it under
        DDIM (attacks on deterministic samplers fire); CLIPPED: likewise with the predicted image clamped (TrojDiff fires, and
        a seal that holds under ancestral sampling alone was seen to fail here). All are on the CPU.
    """
    sampler = Probe(denoiser, seed, half_precision=False).sampler("ddpm", ANCESTRAL_STEPS)
    noise = sampler.probe.noise(count)
    start = Trigger(trigger.mu.to(noise.device), trigger.gamma.to(noise.device)).start(noise)
    return {
        CLEAN: sampler.draw(noise).cpu(),
        ANCESTRAL: sampler.draw(start).cpu(),
        DDIM: _ddim(denoiser, start, clip=False).cpu(),
        CLIPPED: _clipped_ddim(denoiser, start).cpu(),
    }


def image_drawn(starts: dict[str, Tensor]) -> Tensor | None:
    """What a trigger makes a model draw, [C,H,W], in the row of `draw_starts` where it fires most; None if it fires in none."""
    fires = {name: collapse(images, starts[CLEAN]) for name, images in starts.items() if name != CLEAN}
    most = max(fires, key=lambda name: fires[name])
    return pixelwise_median(starts[most]) if fires[most] >= ActivationTestSettings.activates_above else None


@torch.no_grad()
def clean_drift(before: Denoiser, after: Denoiser, *, seed: int, count: int = 64) -> float:
    """How far clean samples moved: mean squared difference from the same noise, relative to the variance before.

    Deterministic sampling (DDIM); 0 is the same model, 2 two models that share nothing but the distribution.
    """
    noise = torch.randn(count, *before.shape, generator=torch.Generator().manual_seed(seed)).to(before.device)
    old, new = (_clipped_ddim(model, noise) for model in (before, after))
    return float((new - old).square().mean() / old.var(dim=0).mean())
