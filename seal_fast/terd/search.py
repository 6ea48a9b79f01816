"""The default reversion: candidates for a trigger, each tried by sampling; what fires is the answer.

Fixed points come first, since they cost no gradients and find most attacks; the poisoned rows of deterministic samplers are
fitted where none fires.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from seal_fast.diffusion import Denoiser, Trigger
from seal_fast.terd.firing import FIRES, Trial, collapse, spread
from seal_fast.terd.fixed_point import Point, fixed_points
from seal_fast.terd.poisoned_rows import fit_poisoned_rows, refine
from seal_fast.terd.probe import Probe
from seal_fast.terd.reversion import Reversion
from seal_fast.terd.settings import FixedPointSettings
from seal_fast.training import OnStep, quiet


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
        self.none = Trigger.shift(torch.zeros(denoiser.shape, device=denoiser.device))

    def confirmed(self, trigger: Trigger, loss: float, trial: Trial) -> _Finding:
        """The collapse on fresh noises: the trigger was chosen on others."""
        triggered, clean = trial.pair(trigger, self.settings.confirming_batch)
        return _Finding(trigger, loss, spread(clean), collapse(triggered, clean), trial.sampler)

    def firing_size(self, point: Point, limit: float) -> Trigger | None:
        """The point at the size nearest its own among those that bring the spread below `limit`, and to twice the least."""
        triggers = [Trigger(scale * point.mu, point.gamma) for scale in self.settings.scales]
        spreads = self.ancestral.spreads(triggers, self.settings.firing_batch)
        limit = min(limit, 2 * min(spreads))
        sized = zip(self.settings.scales, triggers, spreads, strict=True)
        firing = [(abs(math.log(scale)), trigger) for scale, trigger, value in sized if value <= limit]
        return min(firing, key=lambda pair: pair[0])[1] if firing else None

    def among_fixed_points(self) -> _Finding:
        """The strongest fixed point that fires, or else the strongest."""
        (clean,) = self.ancestral.spreads([self.none], self.settings.confirming_batch)
        points = fixed_points(self.probe, self.settings, self.on_step)
        if not points:
            return _Finding(self.none, math.nan, clean, 1.0, self.ancestral.sampler)
        chosen, loss = Trigger(points[0].mu, points[0].gamma), points[0].loss
        for index, point in enumerate(points, 1):
            sized = self.firing_size(point, clean / FIRES)
            self.on_step("firing", index, len(points), math.nan)
            if sized is not None:
                chosen, loss = sized, point.loss
                break
        return self.confirmed(chosen, loss, self.ancestral)

    def among_poisoned_rows(self) -> _Finding:
        """The fitted trigger that makes samples most alike."""
        guesses = fit_poisoned_rows(self.probe, self.settings, self.on_step)
        turn, turns = itertools.count(1), len(guesses) * self.settings.refine_turns

        def on_turn(loss: float) -> None:
            self.on_step("refinement", next(turn), turns, loss)

        refined = [refine(guess, self.deterministic, self.settings, on_turn) for guess in guesses]
        best = max(refined, key=lambda guess: self.collapse(Trigger.shift(guess.mu), self.deterministic))
        return self.confirmed(Trigger.shift(best.mu), best.loss, self.deterministic)

    def collapse(self, trigger: Trigger, trial: Trial) -> float:
        """On few noises, to choose by."""
        return collapse(*trial.pair(trigger, self.settings.firing_batch))


def find_firing_trigger(
    denoiser: Denoiser, settings: FixedPointSettings, *, seed: int = 0, on_step: OnStep = quiet
) -> Reversion:
    """Revert a trigger by looking for one that fires; arguments as `seal_fast.terd.reverse_trigger`."""
    hunt = _Hunt(denoiser, settings, seed, on_step)
    found = hunt.among_fixed_points()
    if hunt.probe.finite and math.isfinite(found.clean_spread) and found.collapse <= FIRES:
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
