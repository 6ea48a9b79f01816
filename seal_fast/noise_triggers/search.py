"""The default reversion: candidates for a trigger, each tried by sampling; what fires is the answer.

Fixed points come first, since they cost no gradients and find most attacks. Where none fires, those whose samples share an
image in part are climbed from, and then the poisoned rows of deterministic samplers are fitted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers.activation_test import (
    FIRES,
    HARDLY_FIRES,
    SURELY_FIRES,
    Trial,
    collapse,
    dispersion,
    most_similar,
    pixelwise_median,
)
from seal_fast.noise_triggers.fixed_points import NARROW, Point, fixed_points
from seal_fast.noise_triggers.joint_inversion import fit_poisoned_rows, refine
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.reversion import Reversion
from seal_fast.noise_triggers.settings import SearchSettings
from seal_fast.noise_triggers.target_refinement import climb
from seal_fast.training import OnStep, quiet

GLANCE_RATIO = 4.0
"""Sizes that spread a few samples more than this many times the least hardly end within twice the least."""


@dataclass(frozen=True)
class _Finding:
    """The best trigger of one search, and what it did to samples it was not chosen by."""

    trigger: Trigger
    loss: float
    clean_dispersion: float
    collapse: float
    sampler: str


class _Sharing(NamedTuple):
    """A point some of whose samples share an image, [C,H,W], and how much more alike those are than clean samples."""

    point: Point
    image: Tensor
    collapse: float


class Hunt:
    """One search of one denoiser, part by part."""

    def __init__(self, denoiser: Denoiser, settings: SearchSettings, seed: int, on_step: OnStep) -> None:
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
        return _Finding(trigger, loss, dispersion(clean), collapse(samples, clean), trial.sampler)

    def glances(self, point: Point) -> list[Tensor]:
        """A few samples of the point at every size, from the same noises."""
        triggers = [Trigger(scale * point.mu, point.gamma) for scale in self.settings.scales]
        return self.ancestral.triggered(triggers, self.settings.glance_batch)

    def firing_size(self, point: Point, glances: list[Tensor]) -> Trigger | None:
        """The point at the size nearest its own among those that fire and bring the spread to at most twice the least."""
        few, some = self.settings.glance_batch, self.settings.firing_batch
        triggers = [Trigger(scale * point.mu, point.gamma) for scale in self.settings.scales]
        least = min(map(dispersion, glances))
        if least > dispersion(self.ancestral.clean(few)) / HARDLY_FIRES:
            return None
        ahead = [i for i, glance in enumerate(glances) if dispersion(glance) <= GLANCE_RATIO * least]
        more = self.ancestral.triggered([triggers[i] for i in ahead], some - few)
        spreads = {i: dispersion(torch.cat([glances[i], rest])) for i, rest in zip(ahead, more, strict=True)}
        limit = min(dispersion(self.ancestral.clean(some)) / FIRES, 2 * min(spreads.values()))
        firing = [i for i, value in spreads.items() if value <= limit]
        return triggers[min(firing, key=lambda i: abs(math.log(self.settings.scales[i])))] if firing else None

    def among_fixed_points(self) -> _Finding:
        """The strongest fixed point that surely fires, or one climbed to from those that nearly do, or else what fires most."""
        points = fixed_points(self.probe, self.settings, self.on_step)
        if not points:
            none = Trigger.shift(torch.zeros(self.probe.denoiser.shape, device=self.probe.denoiser.device))
            clean = dispersion(self.ancestral.clean(self.settings.firing_batch))
            return _Finding(none, math.nan, clean, 1.0, self.ancestral.sampler)
        findings, near = [], []
        for index, point in enumerate(points, 1):
            glances = self.glances(point)
            sized = self.firing_size(point, glances)
            self.on_step("firing", index, len(points), math.nan)
            if sized is not None:
                findings.append(self.finding(sized, point.loss, self.ancestral))
                if findings[-1].collapse > SURELY_FIRES:
                    return findings[-1]
            shared = self.sharing(point, glances)
            if shared is not None:
                near.append(shared)
        if not findings:
            findings.append(self.finding(Trigger(points[0].mu, points[0].gamma), points[0].loss, self.ancestral))
        for sharing in sorted(near, key=lambda sharing: sharing.collapse, reverse=True):
            findings.append(self.climbed(sharing))
            if findings[-1].collapse > SURELY_FIRES:
                break
        return max(findings, key=lambda finding: finding.collapse)

    def sharing(self, point: Point, glances: list[Tensor]) -> _Sharing | None:
        """The image that the most alike of a point's samples share, if that is a new one; the noise must not be narrowed."""
        if point.gamma_at_mu <= NARROW:
            return None
        samples = torch.cat(glances)
        chosen = most_similar(samples, self.settings.sharing)
        value = collapse(samples[chosen], self.ancestral.clean(self.settings.firing_batch))
        scale = self.settings.scales[int(chosen.median()) // self.settings.glance_batch]
        return (
            _Sharing(point._replace(mu=scale * point.mu), pixelwise_median(samples[chosen]), value)
            if value > HARDLY_FIRES
            else None
        )

    def climbed(self, sharing: _Sharing) -> _Finding:
        """Where climbing leads to, turn by turn, until it surely fires or a turn makes its samples no more alike."""
        s, value_range = self.settings, self.probe.denoiser.value_range
        for turn in range(s.climb_turns):
            on_iteration = self._on_iteration("climb", turn * s.climb_iterations, s.climb_turns * s.climb_iterations)
            mu = value_range * climb(self.probe, sharing.point.mu / value_range, sharing.image.clamp(-1, 1), s, on_iteration)
            point = sharing.point._replace(mu=mu)
            glances = self.glances(point)
            sized = self.firing_size(point, glances)
            found = self.finding(sized or Trigger(point.mu, point.gamma), point.loss, self.ancestral)
            if found.collapse > SURELY_FIRES:
                break
            shared = self.sharing(point, glances)
            if shared is None or shared.collapse <= sharing.collapse:
                break
            sharing = shared
        return found

    def among_poisoned_rows(self) -> _Finding:
        """The first fitted trigger that fires, or else the one that makes samples most alike."""
        guesses = fit_poisoned_rows(self.probe, self.settings, self.on_step)
        turns, findings = self.settings.refine_turns, []
        for index, guess in enumerate(guesses):
            on_turn = self._on_iteration("refinement", index * turns, len(guesses) * turns)
            refined = refine(guess, self.sketch, self.deterministic, self.settings, on_turn)
            self.on_step("refinement", (index + 1) * turns, len(guesses) * turns, refined.loss)
            trigger = Trigger.shift(self.probe.denoiser.value_range * refined.mu)
            findings.append(self.finding(trigger, refined.loss, self.deterministic))
            if findings[-1].collapse > FIRES:
                break
        return max(findings, key=lambda finding: finding.collapse)

    def _on_iteration(self, stage: str, before: int, total: int) -> Callable[[float], None]:
        iteration = itertools.count(before + 1)
        return lambda loss: self.on_step(stage, next(iteration), total, loss)


def find_firing_trigger(denoiser: Denoiser, settings: SearchSettings, *, seed: int = 0, on_step: OnStep = quiet) -> Reversion:
    """Revert a trigger by looking for one that fires; arguments as `seal_fast.noise_triggers.reverse_trigger`."""
    hunt = Hunt(denoiser, settings, seed, on_step)
    found = hunt.among_fixed_points()
    # above FIRES is enough where benign models of its kind are known not to value_range it, but not elsewhere
    if hunt.probe.finite and math.isfinite(found.clean_dispersion) and found.collapse <= SURELY_FIRES:
        found = max(found, hunt.among_poisoned_rows(), key=lambda finding: finding.collapse)
    return Reversion(
        found.trigger,
        found.loss,
        finite=hunt.probe.finite and math.isfinite(found.clean_dispersion),
        evaluations=hunt.probe.evaluations,
        collapse=found.collapse,
        clean_dispersion=found.clean_dispersion,
        sampler=found.sampler,
    )
