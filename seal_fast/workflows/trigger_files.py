"""What a scan keeps of a recovered trigger: its file, an image of it, and samples with and without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import Reversion
from seal_fast.noise_triggers.probe import Probe
from seal_fast.report.figures import draw_samples, draw_trigger

TRIGGER_FILE = "trigger.safetensors"
SAMPLES = "samples.png"
IMAGES = 4
IMAGE_STEPS = 100
"""Sampling steps, as many as the search tests its candidates with."""


def save_trigger(reversion: Reversion, denoiser: Denoiser, sha256: str, folder: Path) -> None:
    """Write the trigger with the scale of the model's prior and the digest of its weights, as `seal-fast detect` reads it."""
    trigger = replace(reversion.trigger, prior_scale=denoiser.process.prior_scale)
    trigger.save(folder / TRIGGER_FILE, {"model_sha256": sha256})


def save_images(reversion: Reversion, denoiser: Denoiser, seed: int, folder: Path) -> None:
    """Write trigger.png and samples.png."""
    draw_trigger(reversion.trigger, folder / "trigger.png")
    images = sample_images(denoiser, reversion.trigger, seed, reversion.sampler or "ddpm")
    draw_samples(images, folder / SAMPLES)


def sample_images(denoiser: Denoiser, trigger: Trigger, seed: int, sampler: str = "ddpm") -> dict[str, torch.Tensor]:
    """Samples [N,C,H,W] from clean noise, and from the same noise with the trigger: the difference is the trigger's effect."""
    noise = torch.randn(IMAGES, *denoiser.shape, generator=torch.Generator().manual_seed(seed)).to(denoiser.device)

    def draw(start: torch.Tensor) -> torch.Tensor:
        return Probe(denoiser, seed + 1, half_precision=True).sampler(sampler, IMAGE_STEPS).draw(start).cpu()

    return {"clean noise": draw(noise), "noise with the recovered trigger": draw(trigger.start(noise))}
