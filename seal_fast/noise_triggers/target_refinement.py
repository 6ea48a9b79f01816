"""Second proposer: a candidate that activates the backdoor from some noises is refined to one that activates it from all.

In a network for 64 px the response near T was the same fraction of every image we tried, so fixed points carried no information
about the trigger. A wrong fixed point may still lie near enough that some of its samples are the target. The image that its
most similar samples agree on is then taken for the target y, and the attacker's training loss is an objective for mu alone:

    start    mu as it is, y the image of the consensus
    descend  || f(a y + b eps + c mu, t) - eps - d mu ||^2 over mu, with c and d of attacks on ancestral samplers

In that network the cosine similarity with the trigger rose from .39 to between .42 and .52, and the samples became more than
100 times as similar. The result is not the attacker's trigger, but one that the model takes for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from seal_fast.noise_triggers.attack_loss import AttackLoss, OnIteration, ancestral_coefficients, excess, implied_pairs
from seal_fast.noise_triggers.candidates import Candidate, Consensus, Origin, TestResult
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import TARGET_REFINEMENT, SearchSettings


def refine_with_target(probe: Probe, settings: SearchSettings, tried: Sequence[TestResult]) -> Iterator[Candidate]:
    """Refine every candidate whose samples agree on an image, the one with the highest consensus score first."""
    starts = [(result.candidate, result.consensus) for result in tried if result.consensus is not None]
    for candidate, consensus in sorted(starts, key=lambda start: start[1].score, reverse=True):
        yield from _refine(candidate, consensus, probe, settings, tried)


def _refine(
    candidate: Candidate, consensus: Consensus, probe: Probe, settings: SearchSettings, tried: Sequence[TestResult]
) -> Iterator[Candidate]:
    """Refine turn by turn, until the samples that agree get no more similar."""
    s, value_range = settings.refinement, probe.denoiser.value_range
    iteration = itertools.count(1)

    def on_iteration(loss: float) -> None:
        probe.on_step(TARGET_REFINEMENT, next(iteration), s.turns * s.iterations, loss)

    for _ in range(s.turns):
        start = consensus.scale * candidate.mu / value_range
        mu = value_range * refined_mu(probe, start, consensus.image.clamp(-1, 1), settings, on_iteration)
        candidate = replace(candidate, mu=mu, origin=Origin.TARGET_REFINEMENT)
        yield candidate
        result = tried[-1]
        if result.score is None:
            yield replace(candidate, scales=())
        if result.consensus is None or result.consensus.score <= consensus.score:
            return
        consensus = result.consensus


def refined_mu(probe: Probe, mu: Tensor, image: Tensor, settings: SearchSettings, on_iteration: OnIteration) -> Tensor:
    """A shift near mu [C,H,W] that makes the denoiser draw `image` [C,H,W], both in the value range of images."""
    s, loss = settings.refinement, AttackLoss(probe, settings.attack_loss, ancestral_coefficients)
    (mu,) = loss.descend(
        mu_objective, [mu[None]], image[None], rate=s.learning_rate, iterations=s.iterations, on_iteration=on_iteration
    )
    return mu[0]


def mu_objective(
    probe: Probe, t: Tensor, eps: Tensor, coefficients: Tensor, image: Tensor, mu: Tensor, *, range_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss of mu for a known image, with its excess over [-1, 1]."""
    loss = implied_pairs(probe, t, eps, coefficients, mu, image).loss + range_weight * excess(mu)
    return loss, loss.sum()
