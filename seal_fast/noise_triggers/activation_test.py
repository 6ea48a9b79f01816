"""Does a trigger fire? It does when the samples it starts from different noises are much more alike than those without it.

Three things besides a backdoor do that. A shift may break the sampler: its samples lie far out of the range of images, so
leaving [-1, 1] counts against it. It may make the model draw one of its own plainest images, black for images on black, so
samples count as alike only as far as the image they share is new. Or it may drive the model to a plain colour, which is no
target, so only as far as that image has contrast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import sample
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.reversion import rows_per_pass

FIRES = 4.0
"""A trigger fires when it makes samples at least this many times more alike."""
HARDLY_FIRES, SURELY_FIRES = FIRES / 2, 4 * FIRES
"""Between these a few samples leave open whether a trigger fires. Benign EDM models reached 4.1 with many."""
SPONTANEOUS = 0.05
"""Share of a backdoored model's clean samples that may be the target: InviBackdoor's shows it in one of 48."""


def pixelwise_median(samples: Tensor) -> Tensor:
    """Median over samples [N,C,H,W], pixel by pixel: the image of a trigger that fires from most noises, if not from all."""
    # torch.quantile of older versions refuses more than 2^24 numbers, which 32 images of 512 px exceed
    ordered = samples.float().sort(dim=0).values
    return (ordered[(len(samples) - 1) // 2] + ordered[len(samples) // 2]) / 2


def dispersion(samples: Tensor) -> float:
    """How far the median sample of [N,C,H,W] lies from `middle`, plus its excess over [-1, 1]; infinite if it is not finite.

    Both are mean squares over the image. Medians, for triggers of usable backdoors fail from up to a tenth of the noises, and
    one such sample in ten outweighs the variance of the others.
    """
    if not samples.isfinite().all():
        return math.inf
    excess = (samples.abs() - 1).clamp(min=0)
    away = ((samples - pixelwise_median(samples)).square() + excess.square()).float().mean(dim=(1, 2, 3))
    return float(away.quantile(0.5))


def contrast(images: Tensor) -> Tensor:
    """Variance over the pixels of each channel, averaged over channels: [...,C,H,W] -> [...]."""
    return images.float().var(dim=(-2, -1), correction=0).mean(-1)


def most_similar(samples: Tensor, count: int) -> Tensor:
    """Indices int64 [count] of the samples of [N,C,H,W] that are most alike: one and those nearest to it."""
    flat = samples.float().flatten(1)
    distances = torch.cdist(flat, flat)
    nearest = distances.sort(dim=1).values[:, :count].mean(dim=1)
    return distances[nearest.argmin()].argsort()[:count]


def collapse(triggered: Tensor, clean: Tensor) -> float:
    """How many times more alike samples [N,C,H,W] are with a trigger than without, N > 1; near 1 where it does nothing.

    The least of the spread of the clean samples, of how far the nearest of them lie from the middle of the triggered ones, and
    of the contrast of that middle, over the spread of the triggered samples.
    """
    image = pixelwise_median(triggered)
    away = (clean - image).square().mean(dim=(1, 2, 3)).float()
    return min(dispersion(clean), float(away.quantile(SPONTANEOUS)), float(contrast(image))) / max(dispersion(triggered), 1e-12)


@dataclass
class Trial:
    """Samples a denoiser with and without triggers; the samples without are drawn once, and more when more are asked for.

    BadDiffusion fires under ancestral sampling only, TrojDiff under it as well as under its own samplers, and attacks on
    deterministic samplers only under those.

    Attributes:
        probe: the suspect model.
        sampler: name in `seal_fast.diffusion.SAMPLERS`.
        steps: of the sampler. On the zoo BadDiffusion's triggers fire with 100 ancestral steps, with 50 only some.
    """

    probe: Probe
    sampler: str
    steps: int
    _clean: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def draw(self, start: Tensor) -> Tensor:
        """Samples over the reach of images, from start [N,C,H,W] in units of the prior's standard deviation; never clipped,
        since a clamp would remove the shift that BadDiffusion lives in."""
        denoiser = self.probe.sampled
        fresh = torch.Generator(denoiser.device).manual_seed(int(torch.randint(2**31, (), generator=self.probe.generator)))
        steps = min(self.steps, denoiser.process.num_timesteps - 1)
        self.probe.evaluations += steps * len(start)
        with self.probe.precision():
            parts = (denoiser.process.prior_scale * start).split(rows_per_pass(start))
            samples = torch.cat([sample(denoiser, part, self.sampler, steps, generator=fresh) for part in parts])
        return samples / denoiser.value_range

    def clean(self, count: int) -> Tensor:
        """Samples [count,C,H,W] without a trigger, the same at every call."""
        missing = count - sum(map(len, self._clean))
        if missing > 0:
            self._clean.append(self.draw(self.probe.noise(missing)))
        return torch.cat(self._clean)[:count]

    def triggered(self, triggers: Sequence[Trigger], count: int) -> list[Tensor]:
        """Samples [count,C,H,W] with each trigger, all from the same fresh noises."""
        eps = self.probe.noise(count)
        return list(self.draw(torch.cat([trigger.start(eps) for trigger in triggers])).split(count))
