"""Third proposer: find the trigger mu and the target image y of attacks on deterministic samplers together.

Near T such an attack has c = d, and its denoiser responds to the trigger as a benign one does. At lower noise it does not;
`seal_fast.noise_triggers.attack_loss` has the coefficients and the loss.

    start      y is the predicted clean image at a few noise levels, with a nearly uniform mu: the target shows through, or
               attracts. If y is close to the target, the response at low noise equals mu for any assumed mu (cosine similarity
               1.00 even from mu = 0)
    halving    the loss is descended over y and mu at all t, in the coordinates (y - mu, mu): where a is small only y - mu
               matters, so the valley of the loss runs along mu. The better part of the pairs goes on, again and again
    alternate  y is taken from samples, then mu from f - eps, in turns
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.noise_triggers.activation_test import collapse, contrast, pixelwise_median
from seal_fast.noise_triggers.attack_loss import (
    AttackLoss,
    OnIteration,
    Pairs,
    deterministic_coefficients,
    excess,
    implied_pairs,
)
from seal_fast.noise_triggers.candidates import Candidate, Origin, TestResult, best_of
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import ALTERNATION, JOINT_INVERSION, SearchSettings


class Pair(NamedTuple):
    """A trigger and a target image, [C,H,W] each, and the loss per dimension there."""

    mu: Tensor
    target: Tensor
    loss: float


def invert_jointly(probe: Probe, settings: SearchSettings, tried: Sequence[TestResult]) -> Iterator[Candidate]:
    """Invert the model, unless its predictions or its own samples are not finite."""
    clean_dispersion = best_of(tried).clean_dispersion if tried else None
    if not probe.finite or (clean_dispersion is not None and not math.isfinite(clean_dispersion)):
        return
    inversion = JointInversion(probe, settings)
    pairs = inversion.pairs()
    total = len(pairs) * settings.inversion.alternations
    for index, pair in enumerate(pairs):
        done = index * settings.inversion.alternations
        alternation = itertools.count(done + 1)

        def on_alternation(loss: float, alternation: Iterator[int] = alternation) -> None:
            probe.on_step(ALTERNATION, next(alternation), total, loss)

        refined = inversion.alternate(pair, on_alternation)
        probe.on_step(ALTERNATION, done + settings.inversion.alternations, total, refined.loss)
        mu = probe.denoiser.value_range * refined.mu
        origin, accept_above = Origin.JOINT_INVERSION, settings.inversion.accept_above
        yield Candidate(mu, torch.ones_like(mu), refined.loss, origin, "ddim", accept_above)


def joint_objective(
    probe: Probe, t: Tensor, eps: Tensor, coefficients: Tensor, mu: Tensor, difference: Tensor, *, range_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss of mu and y = difference + mu. The logarithm lets every pair descend at its own pace."""
    target = difference + mu
    loss = implied_pairs(probe, t, eps, coefficients, mu, target).loss
    return loss, (loss + range_weight * (excess(target) + excess(mu))).log().sum()


class JointInversion:
    """Inversion of one model.

    Args:
        probe: the suspect model.
        settings: settings of the search.

    Raises:
        ValueError: the noise process has no timestep in the window of the loss.
    """

    def __init__(self, probe: Probe, settings: SearchSettings) -> None:
        self.probe, self.settings, self.test = probe, settings.inversion, settings.test
        self.timesteps = settings.attack_loss.timesteps
        self.loss = AttackLoss(probe, settings.attack_loss, deterministic_coefficients)

    def pairs(self) -> list[Pair]:
        """The pairs that successive halving leaves, best first."""
        iteration, total = itertools.count(1), sum(iterations for iterations, _ in self.settings.halving)

        def on_iteration(loss: float) -> None:
            self.probe.on_step(JOINT_INVERSION, next(iteration), total, loss)

        pairs = self.starts()
        for iterations, kept in self.settings.halving:
            pairs = self.best(self.descend(pairs, iterations, on_iteration), kept)
        return [self.pair(mu, target) for mu, target in zip(*pairs, strict=True)]

    @torch.no_grad()
    def starts(self) -> Pairs:
        """One pair per initial mean and noise level, and one more per mean, whose mu is the response to its target."""
        s = self.settings
        means = torch.tensor(s.initial_means, device=self.probe.denoiser.device)[:, None, None, None]
        parts = []
        for snr in s.start_snr:
            mu = means + s.initial_rms * self.probe.coarse_images(len(means), s.coarse_grid)
            pairs = Pairs(mu, torch.zeros_like(mu))
            t = torch.full((self.timesteps,), self.loss.timestep_at(snr))
            for _ in range(s.start_iterations):
                pairs = pairs._replace(target=self.loss.implied_pairs(pairs, t).target.clamp(-1, 1))
            parts.append(pairs)
        parts.append(self.with_response(parts[-1], s.low_noise_snr, s.start_iterations, s.low_noise_noises))
        return Pairs(*(torch.cat(images) for images in zip(*parts, strict=True)))

    def with_response(self, pairs: Pairs, snr: Sequence[float], iterations: int, noises: int) -> Pairs:
        """The pairs with mu replaced by the response to their targets, averaged over `noises` per noise level."""
        t = torch.tensor([self.loss.timestep_at(value) for value in snr]).repeat_interleave(noises)
        for _ in range(iterations):
            pairs = pairs._replace(mu=self.loss.implied_pairs(pairs, t).mu.clamp(-1, 1))
        return pairs

    def descend(self, pairs: Pairs, iterations: int, on_iteration: OnIteration) -> Pairs:
        """The pairs after Adam steps on mu and y."""
        mu, difference = self.loss.descend(
            joint_objective,
            [pairs.mu, pairs.target - pairs.mu],
            rate=self.settings.learning_rate,
            iterations=iterations,
            on_iteration=on_iteration,
        )
        return Pairs(mu, difference + mu)

    @torch.no_grad()
    def best(self, pairs: Pairs, count: int) -> Pairs:
        """The `count` pairs with the smallest loss, divided by the power of mu and by the contrast of y.

        The loss alone does not rank pairs. It is small for mu = 0, where it is that of clean samples, and for a plain image in
        noise that is shifted to its colour.
        """
        loss = self.loss.implied_pairs(pairs, self.loss.stratified(self.settings.ranking_factor * self.timesteps)).loss
        power = pairs.mu.square().mean(dim=(1, 2, 3)) * contrast(pairs.target)
        ahead = (loss / power.clamp(min=1e-12)).argsort()[:count]
        return Pairs(pairs.mu[ahead], pairs.target[ahead])

    @torch.no_grad()
    def pair(self, mu: Tensor, target: Tensor) -> Pair:
        """mu and y [C,H,W] with their loss over the whole window."""
        t = self.loss.stratified(self.settings.ranking_factor * self.settings.trigger_noises)
        return Pair(mu, target, float(self.loss.implied_pairs(Pairs(mu[None], target[None]), t).loss))

    @torch.no_grad()
    def corrected(self, mu: Tensor, target: Tensor) -> Tensor:
        """mu [C,H,W] replaced by the response to this target."""
        s, one = self.settings, Pairs(mu[None], target[None])
        return self.with_response(one, s.trigger_snr, s.trigger_iterations, s.trigger_noises).mu[0]

    def alternate(self, pair: Pair, on_alternation: OnIteration = lambda loss: None) -> Pair:
        """Refine a pair; returns the one of the smallest loss among those that clearly activate a backdoor, or else among all.

        Each turn samples y and then corrects mu for it. Samples take few steps until a pair looks active, then more. A pair
        that hardly activates after its first correction is dropped: on the zoo's development half the diversity collapse was
        then at most 0.3 for benign models, and 11 to 315 for backdoored ones.
        """
        s, test = self.settings, self.test
        sampler = self.probe.sampler("ddim", s.preview_steps)
        best, rank, current = pair, (True, math.inf), pair
        for turn in range(1, s.alternations + 1):
            mu = self.probe.denoiser.value_range * current.mu
            (samples,) = sampler.triggered([Trigger.shift(mu)], test.samples)
            target = pixelwise_median(samples).clamp(-1, 1)
            if not target.isfinite().all():
                # the pair broke the sampler, which says nothing against the model
                break
            score = collapse(samples, sampler.clean(test.samples), test.target_fraction)
            if turn == 2 and score < test.reject_below:
                break
            if score >= test.reject_below:
                sampler = self.probe.sampler("ddim", test.deterministic_steps)
            best, rank = min((best, rank), (current, (score < test.accept_above, current.loss)), key=lambda one: one[1])
            current = self.pair(self.corrected(current.mu, target), target)
            on_alternation(current.loss)
        return best if rank < (True, current.loss) else current
