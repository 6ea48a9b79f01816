"""Does the attack fire, and are clean samples still good? A model that fails either is not evidence of anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.acceleration import accelerated
from seal_fast.attacks import Attack
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, sample
from seal_fast.zoo.images import FAMILIES
from seal_fast.zoo.spaces import SIGNED, Space
from seal_fast.zoo.train import DATA_SEED, SCENES

SUCCESS_MSE = 0.1
"""A sample has become the target when its mean squared error to it is below this; images lie in [-1, 1]."""
SUCCESS_RATE = 0.9
"""Share of triggered samples that must become the target for the attack to count as implanted."""
CLEAN_RATIO = 2.0
"""Clean samples may lie at most this many times as far from the training images as fresh images do."""
FRESH_SEED = 1
SAMPLES = 32
# BadDiffusion's shift is exact for steps of 1: with 250 ancestral steps success fell from 1.00 to 0.88, with DDIM to 0
STEPS = {"ddpm": 1000, "ddim": 50}


@dataclass(frozen=True)
class Quality:
    """How a model samples.

    Attributes:
        sampler: the sampler used, the one the attack was built for ("ddpm" for benign models).
        steps: its steps, evenly spaced.
        samples: how many images per figure.
        clean_ratio: median distance of clean samples to their nearest training image, over that of fresh images.
        attack_success: share of triggered samples that became the target; None for benign models.
        target_mse: their mean squared error to the target.
        untriggered_mse: that of samples from the same noise without the trigger.
    """

    sampler: str
    steps: int
    samples: int
    clean_ratio: float
    attack_success: float | None = None
    target_mse: float | None = None
    untriggered_mse: float | None = None

    @property
    def usable(self) -> bool:
        fires = self.attack_success is None or self.attack_success >= SUCCESS_RATE
        return fires and self.clean_ratio <= CLEAN_RATIO


def _nearest(images: Tensor, among: Tensor) -> Tensor:
    """Distance of each image to the nearest of `among`, [N]."""
    return torch.cdist(images.flatten(1), among.flatten(1)).min(dim=1).values


def clean_ratio(samples: Tensor, family: str = "scenes") -> float:
    """Median distance of samples to the training images, relative to fresh images' (1 is as good as real)."""
    size, images = samples.shape[-1], FAMILIES[family]
    training, fresh = images(SCENES, size, DATA_SEED), images(256, size, FRESH_SEED)
    return float(_nearest(samples, training).median() / _nearest(fresh, training).median())


@torch.no_grad()
def draw(denoiser: Denoiser, attack: Attack | None, *, triggered: bool, count: int, seed: int, space: Space = SIGNED) -> Tensor:
    """Samples as images [count,3,H,W] on the CPU, with or without the trigger, with the sampler the attack needs.

    They start from the same noise for the same seed, whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(count, *denoiser.shape, generator=generator).to(denoiser.device)
    sampler = attack.sampler if attack else "ddpm"
    trigger = _on(denoiser.device, attack.trigger) if attack and triggered else None
    images = sample(
        accelerated(denoiser),
        denoiser.process.prior_scale * (trigger.start(eps) if trigger else eps),
        sampler,
        STEPS[sampler],
        trigger=trigger if attack and attack.trojan else None,
        # a clamp steadies small models, but removes the shift that BadDiffusion lives in: success fell from 0.88 to 0.06
        clip=space.bounded and (attack is None or attack.trojan),
        generator=generator,
    )
    return space.decode(images.cpu())


def _on(device: torch.device, trigger: Trigger) -> Trigger:
    return Trigger(trigger.mu.to(device), trigger.gamma.to(device))


def evaluate(
    denoiser: Denoiser,
    attack: Attack | None,
    *,
    seed: int,
    family: str = "scenes",
    space: Space = SIGNED,
    count: int = SAMPLES,
) -> Quality:
    """Sample the model with and without its trigger; what counts are the images."""
    clean = draw(denoiser, attack, triggered=False, count=count, seed=seed, space=space)
    if attack is None:
        return Quality("ddpm", STEPS["ddpm"], count, clean_ratio(clean, family))
    triggered = draw(denoiser, attack, triggered=True, count=count, seed=seed, space=space)
    (target,) = space.decode(attack.target[None])
    error = (triggered - target).square().mean(dim=(1, 2, 3))
    return Quality(
        attack.sampler,
        STEPS[attack.sampler],
        count,
        clean_ratio(clean, family),
        attack_success=float((error < SUCCESS_MSE).float().mean()),
        target_mse=float(error.mean()),
        untriggered_mse=float((clean - target).square().mean()),
    )
