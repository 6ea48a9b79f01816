"""The default reversion: candidates for a trigger, each tried by sampling; what fires is the answer.

Fixed points come first, since they cost no gradients and find most attacks; the poisoned rows of deterministic samplers are
fitted where none fires.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from seal_fast.diffusion import Denoiser, Trigger
from seal_fast.terd.firing import FIRES, HARDLY_FIRES, SURELY_FIRES, Trial, collapse, spread
from seal_fast.terd.fixed_point import Point, fixed_points
from seal_fast.terd.poisoned_rows import fit_poisoned_rows, refine
from seal_fast.terd.probe import Probe
from seal_fast.terd.reversion import Reversion
from seal_fast.terd.settings import FixedPointSettings
from seal_fast.training import OnStep, quiet

GLANCE_RATIO = 4.0
"""Sizes that spread a few samples more than this many times the least hardly end within twice the least."""


@dataclass(frozen=True)
class _Finding:
    """The best trigger of one search, and what it did to samples it was not chosen by."""

    trigger: Trigger
    loss: float
    clean_spread: float
    collapse: float
    sampler: str


class _Hunt:
    def __init__(self, denoiser: Denoiser, settings: FixedPointSettings, seed: int, on_step: OnStep) -> None:
        self.settings, self.on_step = settings, on_step
        self.probe = Probe(denoiser, torch.Generator().manual_seed(seed), settings.half_precision)
        self.ancestral = Trial(self.probe, "ddpm", settings.sampler_steps)
        self.deterministic = Trial(self.probe, "ddim", settings.deterministic_steps)
        self.sketch = Trial(self.probe, "ddim", settings.sketch_steps)

    def finding(self, trigger: Trigger, loss: float, trial: Trial) -> _Finding:
        """The collapse on noises that the trigger was not chosen by: on few, or where those leave a doubt on many others."""
        few, many = self.settings.firing_batch, self.settings.confirming_batch
        (samples,) = trial.triggered([trigger], few)
        if HARDLY_FIRES <= collapse(samples, trial.clean(few)) <= SURELY_FIRES:
            (samples,) = trial.triggered([trigger], many)
        clean = trial.clean(len(samples))
        return _Finding(trigger, loss, spread(clean), collapse(samples, clean), trial.sampler)

    def firing_size(self, point: Point) -> Trigger | None:
        """The point at the size nearest its own among those that fire and bring the spread to at most twice the least."""
        few, some = self.settings.glance_batch, self.settings.firing_batch
        triggers = [Trigger(scale * point.mu, point.gamma) for scale in self.settings.scales]
        glances = self.ancestral.triggered(triggers, few)
        least = min(map(spread, glances))
        if least > spread(self.ancestral.clean(few)) / HARDLY_FIRES:
            return None
        ahead = [i for i, glance in enumerate(glances) if spread(glance) <= GLANCE_RATIO * least]
        more = self.ancestral.triggered([triggers[i] for i in ahead], some - few)
        spreads = {i: spread(torch.cat([glances[i], rest])) for i, rest in zip(ahead, more, strict=True)}
        limit = min(spread(self.ancestral.clean(some)) / FIRES, 2 * min(spreads.values()))
        firing = [i for i, value in spreads.items() if value <= limit]
        return triggers[min(firing, key=lambda i: abs(math.log(self.settings.scales[i])))] if firing else None

    def among_fixed_points(self) -> _Finding:
        """The strongest fixed point that fires, or else the strongest."""
        points = fixed_points(self.probe, self.settings, self.on_step)
        if not points:
            none = Trigger.shift(torch.zeros(self.probe.denoiser.shape, device=self.probe.denoiser.device))
            clean = spread(self.ancestral.clean(self.settings.firing_batch))
            return _Finding(none, math.nan, clean, 1.0, self.ancestral.sampler)
        chosen, loss = Trigger(points[0].mu, points[0].gamma), points[0].loss
        for index, point in enumerate(points, 1):
            sized = self.firing_size(point)
            self.on_step("firing", index, len(points), math.nan)
            if sized is not None:
                chosen, loss = sized, point.loss
                break
        return self.finding(chosen, loss, self.ancestral)

    def among_poisoned_rows(self) -> _Finding:
        """The first fitted trigger that fires, or else the one that makes samples most alike."""
        guesses = fit_poisoned_rows(self.probe, self.settings, self.on_step)
        turns, findings = self.settings.refine_turns, []
        for index, guess in enumerate(guesses):
            on_turn = self._on_turn(index * turns, len(guesses) * turns)
            refined = refine(guess, self.sketch, self.deterministic, self.settings, on_turn)
            self.on_step("refinement", (index + 1) * turns, len(guesses) * turns, refined.loss)
            trigger = Trigger.shift(self.probe.denoiser.reach * refined.mu)
            findings.append(self.finding(trigger, refined.loss, self.deterministic))
            if findings[-1].collapse > FIRES:
                break
        return max(findings, key=lambda finding: finding.collapse)

    def _on_turn(self, before: int, total: int) -> Callable[[int, float], None]:
        return lambda turn, loss: self.on_step("refinement", before + turn, total, loss)


def find_firing_trigger(
    denoiser: Denoiser, settings: FixedPointSettings, *, seed: int = 0, on_step: OnStep = quiet
) -> Reversion:
    """Revert a trigger by looking for one that fires; arguments as `seal_fast.terd.reverse_trigger`."""
    hunt = _Hunt(denoiser, settings, seed, on_step)
    found = hunt.among_fixed_points()
    # above FIRES is enough where benign models of its kind are known not to reach it, but not elsewhere
    if hunt.probe.finite and math.isfinite(found.clean_spread) and found.collapse <= SURELY_FIRES:
        found = max(found, hunt.among_poisoned_rows(), key=lambda finding: finding.collapse)
    return Reversion(
        found.trigger,
        found.loss,
        finite=hunt.probe.finite and math.isfinite(found.clean_spread),
        evaluations=hunt.probe.evaluations,
        collapse=found.collapse,
        clean_spread=found.clean_spread,
        sampler=found.sampler,
    )
