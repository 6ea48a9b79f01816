"""Does a candidate activate a backdoor? It does if its samples, from different noises, are much more similar than clean ones.

A shift without a backdoor can make samples similar too, in three ways:

    broken sampler   the samples lie far outside the range of images; so values outside [-1, 1] count against the trigger
    no new image     the model draws one of its own plainest images, for instance black if it draws on black; so samples count
                     as similar only as far as the image they share is new
    plain colour     it is no target; so samples count as similar only as far as the image they share has contrast

Testing is sequential, and stops as soon as the result is decided:

    pilots   a few samples at every scale show most candidates that do nothing
    scale    more samples choose, among the scales that activate a backdoor, the one nearest 1
    score    fresh samples measure the trigger at that scale: a few, and many where a few leave a doubt
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from seal_fast.noise_triggers.candidates import Candidate, Consensus, Outcome, TestResult
from seal_fast.noise_triggers.probe import Probe, TriggeredSampler
from seal_fast.noise_triggers.search_settings import ActivationTestSettings


def pixelwise_median(samples: Tensor) -> Tensor:
    """Median over samples [N,C,H,W], pixel by pixel: the target, if a trigger activates the backdoor from most noises."""
    # torch.quantile of older versions refuses more than 2^24 numbers, which 32 images of 512 px exceed
    ordered = samples.float().sort(dim=0).values
    return (ordered[(len(samples) - 1) // 2] + ordered[len(samples) // 2]) / 2


def dispersion(samples: Tensor) -> float:
    """Median over samples [N,C,H,W] of the mean square distance from their pixelwise median, plus that from [-1, 1].

    It is infinite if a sample is not finite. Medians are used since triggers of usable backdoors fail from up to a tenth of the
    noises, and one such sample in ten outweighs the variance of the others.
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
    """Indices int64 [count] of the most similar samples of [N,C,H,W]: one sample and those nearest to it."""
    flat = samples.float().flatten(1)
    distances = torch.cdist(flat, flat)
    nearest = distances.sort(dim=1).values[:, :count].mean(dim=1)
    return distances[nearest.argmin()].argsort()[:count]


def collapse(triggered: Tensor, clean: Tensor, target_fraction: float = ActivationTestSettings.target_fraction) -> float:
    """How many times more similar samples [N,C,H,W] are with a trigger than without, N > 1; near 1 where it does nothing.

    It is the smallest of three numbers, divided by the dispersion of the triggered samples: the dispersion of the clean
    samples, the quantile `target_fraction` of their mean square distances from the pixelwise median of the triggered samples,
    and the contrast of that median.
    """
    image = pixelwise_median(triggered)
    away = (clean - image).square().mean(dim=(1, 2, 3)).float()
    least = min(dispersion(clean), float(away.quantile(target_fraction)), float(contrast(image)))
    return least / max(dispersion(triggered), 1e-12)


class ActivationTest:
    """Tests candidates one after the other.

    Args:
        probe: the suspect model.
        settings: numbers of the test.
    """

    def __init__(self, probe: Probe, settings: ActivationTestSettings) -> None:
        self.settings = settings
        self.samplers = {
            "ddpm": probe.sampler("ddpm", settings.ancestral_steps),
            "ddim": probe.sampler("ddim", settings.deterministic_steps),
        }

    def __call__(self, candidate: Candidate) -> TestResult:
        if candidate.changes_nothing:
            clean = self.samplers[candidate.sampler].clean(self.settings.samples)
            return TestResult(candidate, Outcome.NO_TRIGGER, 1.0, 1.0, dispersion(clean))
        if not candidate.scales:
            return self.measured(candidate, 1.0)
        pilots = self.pilots(candidate)
        scale = self.active_scale(candidate, pilots)
        result = TestResult(candidate, scale) if isinstance(scale, Outcome) else self.measured(candidate, scale)
        return result if result.accepted else replace(result, consensus=self.consensus(candidate, pilots))

    def pilots(self, candidate: Candidate) -> list[Tensor]:
        """A few samples at every scale, from the same noises."""
        triggers = [candidate.trigger(scale) for scale in candidate.scales]
        return self.samplers[candidate.sampler].triggered(triggers, self.settings.pilot_samples)

    def active_scale(self, candidate: Candidate, pilots: list[Tensor]) -> float | Outcome:
        """The scale nearest 1 among those that activate a backdoor and whose dispersion is near the smallest one."""
        s, sampler = self.settings, self.samplers[candidate.sampler]
        smallest = min(map(dispersion, pilots))
        if smallest > dispersion(sampler.clean(s.pilot_samples)) / s.reject_below:
            return Outcome.DISPERSED_PILOTS
        kept = [i for i, pilot in enumerate(pilots) if dispersion(pilot) <= s.pilot_dispersion_ratio * smallest]
        more = sampler.triggered([candidate.trigger(candidate.scales[i]) for i in kept], s.samples - s.pilot_samples)
        dispersions = {
            candidate.scales[i]: dispersion(torch.cat([pilots[i], rest])) for i, rest in zip(kept, more, strict=True)
        }
        limit = dispersion(sampler.clean(s.samples)) / s.activates_above
        limit = min(limit, s.dispersion_ratio * min(dispersions.values()))
        active = [scale for scale, value in dispersions.items() if value <= limit]
        return min(active, key=lambda scale: abs(math.log(scale))) if active else Outcome.NO_ACTIVE_SCALE

    def measured(self, candidate: Candidate, scale: float) -> TestResult:
        """The score, from noises that had no part in the choice of the scale."""
        s, sampler = self.settings, self.samplers[candidate.sampler]
        (samples,) = sampler.triggered([candidate.trigger(scale)], s.samples)
        if s.reject_below <= self.score(samples, sampler) <= s.accept_above:
            (samples,) = sampler.triggered([candidate.trigger(scale)], s.confirming_samples)
        score, clean = self.score(samples, sampler), sampler.clean(len(samples))
        left = Outcome.REJECTED if score < s.reject_below else Outcome.UNDECIDED
        outcome = Outcome.ACCEPTED if score > candidate.accept_above else left
        return TestResult(candidate, outcome, scale, score, dispersion(clean), len(samples))

    def score(self, samples: Tensor, sampler: TriggeredSampler) -> float:
        return collapse(samples, sampler.clean(len(samples)), self.settings.target_fraction)

    def consensus(self, candidate: Candidate, pilots: list[Tensor]) -> Consensus | None:
        """The new image that the most similar pilot samples agree on; None without one, and for reduced-variance noise."""
        s = self.settings
        if candidate.gamma_at_mu <= s.reduced_variance_below:
            return None
        samples = torch.cat(pilots)
        chosen = most_similar(samples, s.consensus_size)
        score = collapse(samples[chosen], self.samplers[candidate.sampler].clean(s.samples), s.target_fraction)
        if not score > s.reject_below:
            return None
        scale = candidate.scales[int(chosen.median()) // s.pilot_samples]
        return Consensus(pixelwise_median(samples[chosen]), score, scale)
