"""TrojDiff (Chen, Song, Li, CVPR 2023) with its D2I target, one fixed image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.attacks.noising import Attack, NoisedBatch
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import NoiseProcess


@dataclass(frozen=True)
class TrojDiff(Attack):
    """Starts from a biased Gaussian of reduced variance: x_t = a y + b (gamma eps + mu), mu = (1 - gamma) image, target eps.

    Attributes:
        image: the image blended with the noise, [C,H,W] in [-1, 1].
        target: the target image, [C,H,W].
        noise_scale: gamma where the trigger acts; 0.6 for the published blend, 0.1 for the patch.
        window: bool [H,W]; True where a patch trigger acts. None blends the whole image.
        sampler: "ddim" or "ddpm", the published sampler that the attack is measured with.
    """

    image: Tensor
    target: Tensor
    noise_scale: float
    window: Tensor | None = None
    sampler: str = "ddim"
    trojan = True

    @property
    def trigger(self) -> Trigger:
        inside = torch.ones_like(self.image, dtype=torch.bool) if self.window is None else self.window.expand_as(self.image)
        gamma = torch.where(inside, self.noise_scale, 1.0)
        return Trigger((1 - gamma) * self.image, gamma)

    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        trigger = self.trigger
        # outside the window mu = 0 and gamma = 1, as in the published patch attack's "clean x_t elsewhere", with y = target
        x = process.add_noise(self.target.expand_as(images), trigger.start(eps), t)
        return NoisedBatch(x, eps)
