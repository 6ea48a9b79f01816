"""Reversion, the search for a trigger through the model: the public function and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seal_fast.acceleration.cuda_graph import capture_graph
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers.candidates import TestResult
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search import search_trigger
from seal_fast.noise_triggers.search_settings import SearchSettings
from seal_fast.noise_triggers.settings import Settings
from seal_fast.noise_triggers.terd import descend_reversed_loss
from seal_fast.training import OnStep, quiet


@dataclass(frozen=True)
class TriedCandidate:
    """One candidate of a search, for the record.

    Attributes:
        origin: its proposer, see `seal_fast.noise_triggers.candidates.Origin`.
        sampler: name of the sampler that it was tested with.
        scale: multiple of mu that the score was measured at; None without a score.
        samples: triggered samples that the score was measured on.
        score: how many times more similar it makes the model's samples; None if pilot samples showed that it does nothing, or
            if the samples are not finite.
        outcome: stable code of why the search ended with it or left it, see `seal_fast.noise_triggers.candidates.Outcome`.
        reason: the same as a sentence.
    """

    origin: str
    sampler: str
    scale: float | None
    samples: int
    score: float | None
    outcome: str
    reason: str


@dataclass(frozen=True)
class Reversion:
    """What a reversion found.

    Attributes:
        trigger: recovered mu and gamma.
        loss: residual per dimension that the reversion ended with: the reversed loss (published), the variance of eps - f at
            the fixed point, or the attacker's training loss; NaN if no iteration ran.
        finite: False if the loss, the trigger or the model's own samples left the floating-point range.
        evaluations: denoiser evaluations spent, counted in images.
        collapse: score of the trigger, how many times more similar it makes the model's samples (see
            `seal_fast.noise_triggers.activation_test`); None if it was not tested.
        clean_dispersion: dispersion of the model's samples without a trigger; None if the trigger was not tested.
        sampler: name in `seal_fast.diffusion.SAMPLERS` of the sampler that it was tested with; None if it was not tested.
        candidates: every candidate that was tested, in order.
    """

    trigger: Trigger
    loss: float
    finite: bool
    evaluations: int
    collapse: float | None = None
    clean_dispersion: float | None = None
    sampler: str | None = None
    candidates: tuple[TriedCandidate, ...] = ()


def reverse_trigger(denoiser: Denoiser, settings: Settings, *, seed: int = 0, on_step: OnStep = quiet) -> Reversion:
    """Search for the trigger that a backdoor in `denoiser` would respond to.

    Args:
        denoiser: the suspect model.
        settings: see `PRESETS`; `TerdSettings` descends TERD's reversed loss, `SearchSettings` searches for a trigger that
            activates a backdoor.
        seed: seed of the start and of all noise.
        on_step: progress callback (stage, iteration, total, loss per dimension).

    Returns:
        The recovered trigger, whether or not the model has a true one: `seal_fast.noise_triggers.calibration` decides what it
        means. A run that left the floating-point range has finite = False.
    """
    if isinstance(settings, SearchSettings):
        probe = Probe(denoiser, seed, settings.half_precision, on_step=on_step)
        return search_reversion(probe, settings)
    record = capture_graph if denoiser.device.type == "cuda" else None
    found = descend_reversed_loss(denoiser, settings, seed=seed, on_step=on_step, record=record)
    return Reversion(found.trigger, found.loss, found.finite, found.evaluations)


def search_reversion(probe: Probe, settings: SearchSettings) -> Reversion:
    """The reversion of the default search."""
    result = search_trigger(probe, settings)
    best = result.best
    return Reversion(
        best.trigger,
        best.candidate.loss,
        finite=probe.finite and (best.clean_dispersion is None or math.isfinite(best.clean_dispersion)),
        evaluations=probe.evaluations,
        collapse=best.score,
        clean_dispersion=best.clean_dispersion,
        sampler=best.candidate.sampler,
        candidates=tuple(map(_record, result.tried)),
    )


def _record(result: TestResult) -> TriedCandidate:
    score = result.score if result.score is not None and math.isfinite(result.score) else None
    candidate, outcome = result.candidate, result.outcome
    return TriedCandidate(
        str(candidate.origin), candidate.sampler, result.scale, result.samples, score, str(outcome), outcome.sentence
    )
