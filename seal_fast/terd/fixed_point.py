"""Reversion without gradients: a trigger is a fixed point of the denoiser's answer to a shift.

Near T a denoiser f should take a shift m of its input for noise, so that with x = gamma eps + m the average of
x - gamma f(x, T) is 0. A backdoored one answers to its own trigger with part of it. With the coefficients c and d of its
training rows (x = a y + b gamma eps + c mu, target eps + d mu; a -> 0, b -> 1),

    answer(mu) = E[ x - gamma f(x, T) ] = (c - d) mu        TrojDiff: 1 - 0; attacks on stochastic samplers: 1 - 1/2

so mu is a fixed point of m -> kappa answer(m), kappa = 1 / (c - d), and iterating finds it:

    search   m = brightness + contrast * direction; the direction alone follows the answer. Small networks answer to any
             uniform shift with up to 0.7 of it, which would draw a free iteration to itself, benign or not
    polish   the free iteration, from every direction, with gamma; in a benign model it dies out or runs away

The answer is nearly linear, so it fixes the size of mu only roughly. gamma follows from the same passes: f returns eps with
slope 1 where gamma is the attacker's, and 1 / gamma times that where it is 1. Attacks on deterministic samplers have c - d = 0
and leave no answer at T: see `seal_fast.terd.poisoned_rows`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from seal_fast.terd.probe import Probe
from seal_fast.terd.reversion import OnStep, quiet
from seal_fast.terd.settings import FixedPointSettings

WINDOW = 0.01
"""Share of the timesteps that count as T, as in TERD."""
GAMMA_WINDOW = 5
"""Side of the neighbourhood gamma is averaged over: one pixel's slope is a poor estimate from a batch of 16."""
GAMMA_RATE = 0.7
SMALLEST_GAMMA = 0.05
NARROW = 0.9
"""Below this gamma narrows the noise."""
DUPLICATE = 0.95
"""Fixed points of at least this cosine are one."""


class Point(NamedTuple):
    """A fixed point: mu and gamma [C,H,W], and the variance of f's error in eps there."""

    mu: Tensor
    gamma: Tensor
    loss: float

    @property
    def strength(self) -> float:
        """Power of mu over the error, which orders the candidates."""
        return float(self.mu.square().mean()) / max(self.loss, 1e-12)

    @property
    def gamma_at_mu(self) -> float:
        """Mean of gamma where mu acts, weighted by its power."""
        return float((self.mu.square() * self.gamma).sum() / self.mu.square().sum())


def _rms(m: Tensor) -> Tensor:
    return m.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _unit_contrast(m: Tensor) -> Tensor:
    """m [K,C,H,W] without the mean of each channel, at root mean square 1."""
    m = m - m.mean(dim=(2, 3), keepdim=True)
    return m / _rms(m).clamp(min=1e-12)


class _Answers(NamedTuple):
    """What K shifts got back: answer and slope of f in eps [K,C,H,W], and the variance of f's error [K]."""

    answer: Tensor
    slope: Tensor
    loss: Tensor


class _Search:
    def __init__(self, probe: Probe, settings: FixedPointSettings) -> None:
        self.probe, self.settings = probe, settings

    def denoise(self, x: Tensor) -> Tensor:
        """f(x, t near T), in units of the prior, for x [N,C,H,W]."""
        process = self.probe.denoiser.process
        T = process.num_timesteps
        t = torch.randint(T - max(1, round(WINDOW * T)), T, (len(x),), generator=self.probe.generator).to(x.device)
        return self.probe(process.prior_scale * x, t)

    @torch.no_grad()
    def ask(self, m: Tensor, gamma: Tensor, count: int) -> _Answers:
        """Average over `count` noises, the same for all shifts m [K,C,H,W]."""
        eps = self.probe.noise(count)
        x = gamma[:, None] * eps + m[:, None]
        f = self.denoise(x.flatten(0, 1)).view_as(x)
        centred, noise = f - f.mean(1, keepdim=True), eps - eps.mean(0)
        slope = (centred * noise).sum(1) / noise.square().sum(0)
        return _Answers((x - gamma[:, None] * f).mean(1), slope, (centred - noise).square().mean(dim=(1, 2, 3, 4)))

    def directions(self, on_step: OnStep) -> Tensor:
        """Shifts [K,C,H,W], one per brightness and contrast, whose direction the denoiser answers to most."""
        s = self.settings
        pairs = torch.tensor([(b, c) for b in s.brightness for c in s.contrast]).to(self.probe.denoiser.device)
        brightness, contrast = pairs[:, :, None, None, None].unbind(1)
        direction = self.probe.coarse_pictures(len(pairs))
        ones = torch.ones_like(direction)
        for iteration in range(1, s.search_iterations + 1):
            shift = brightness + contrast * _unit_contrast(direction)
            direction, _, loss = self.ask(shift, ones, s.search_batch)
            on_step("search", iteration, s.search_iterations, float(loss.mean()))
        return brightness + contrast * _unit_contrast(direction)

    def fixed_points(self, m: Tensor, on_step: OnStep) -> list[Point]:
        """Where the free iteration from shifts m [K,C,H,W] neither dies out nor runs away."""
        s = self.settings
        points = []
        total = s.polish_iterations * len(s.kappas)
        for index, kappa in enumerate(s.kappas):
            mu, gamma = m, torch.ones_like(m)
            for iteration in range(1, s.polish_iterations + 1):
                answer, slope, loss = self.ask(mu, gamma, s.polish_batch)
                # one that runs away would overflow: it goes on from 0, and ends as one that died out
                mu = torch.where(_rms(answer) < s.largest, kappa * answer, 0.0)
                gamma = self.next_gamma(gamma, slope)
                on_step("polish", index * s.polish_iterations + iteration, total, float(loss.mean()))
            alive = ((_rms(mu) > s.smallest) & (_rms(mu) < s.largest)).flatten()
            found = [Point(mu[i], gamma[i], float(loss[i])) for i in alive.nonzero().flatten().tolist()]
            # only TrojDiff narrows the noise, and its kappa is 1: with another its mu comes out enlarged
            points += [point for point in found if kappa == 1 or point.gamma_at_mu > NARROW]
        return points

    def next_gamma(self, gamma: Tensor, slope: Tensor) -> Tensor:
        """gamma towards the value at which f's slope in eps is 1."""
        pad = GAMMA_WINDOW // 2
        local = avg_pool2d(slope.mean(1, keepdim=True), GAMMA_WINDOW, 1, pad, count_include_pad=False)
        return (gamma * local.clamp(0.5, 2.0) ** -GAMMA_RATE).clamp(SMALLEST_GAMMA, 1.0)


def distinct(points: list[Point], count: int) -> list[Point]:
    """The `count` strongest points of which no two are one."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: p.strength, reverse=True):
        if all(float(cosine_similarity(point.mu.flatten(), other.mu.flatten(), dim=0)) < DUPLICATE for other in kept):
            kept.append(point)
    return kept[:count]


def fixed_points(probe: Probe, settings: FixedPointSettings, on_step: OnStep = quiet) -> list[Point]:
    """The strongest distinct fixed points, at most `settings.candidates`."""
    search = _Search(probe, settings)
    return distinct(search.fixed_points(search.directions(on_step), on_step), settings.candidates)
