"""Reversion without gradients: a trigger is a fixed point of the denoiser's answer to a shift.

Near T a denoiser f should take a shift m of its input for noise, so that with x = gamma eps + m the average of
x - gamma f(x, T) is 0. A backdoored one answers to its own trigger with part of it. With the coefficients c and d of its
training rows (x = a y + b gamma eps + c mu, target eps + d mu; a -> 0, b -> 1),

    answer(mu) = E[ x - gamma f(x, T) ] = (c - d) mu        TrojDiff: 1 - 0; attacks on stochastic samplers: 1 - 1/2

so mu is a fixed point of m -> kappa answer(m), kappa = 1 / (c - d), and iterating finds it:

    search   m = brightness + contrast * direction; the direction alone follows the answer. Small networks answer to any
             uniform shift with up to 0.7 of it, which would draw a free iteration to itself, benign or not
    polish   the free iteration, from every direction, with gamma; in a benign model it dies out or runs away
    firing   what is left is tried by sampling, strongest first and at several sizes: the answer is nearly linear, so it
             fixes the size of mu only roughly

gamma follows from the same passes: f returns eps with slope 1 where gamma is the attacker's, and 1 / gamma times that where it
is 1. Attacks whose d is 1 (deterministic samplers) leave no answer at T and are not found.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate

from seal_fast.diffusion import Denoiser, Trigger
from seal_fast.terd.firing import FIRES, Trial
from seal_fast.terd.reversion import OnStep, Reversion, native_bfloat16, quiet, rows_per_pass
from seal_fast.terd.settings import FixedPointSettings

WINDOW = 0.01
"""Share of the timesteps that count as T, as in TERD."""
COARSE = 4
"""Side of the random grid that directions start as: triggers are pictures, not noise."""
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
    def __init__(self, denoiser: Denoiser, settings: FixedPointSettings, generator: torch.Generator) -> None:
        self.denoiser, self.settings, self.generator = denoiser, settings, generator
        self.autocast = settings.half_precision and native_bfloat16(denoiser.device)
        self.evaluations, self.finite = 0, True

    def denoise(self, x: Tensor) -> Tensor:
        """f(x, t near T), in units of the prior, for x [N,C,H,W]."""
        T = self.denoiser.process.num_timesteps
        t = torch.randint(T - max(1, round(WINDOW * T)), T, (len(x),), generator=self.generator).to(x.device)
        self.evaluations += len(x)
        rows = rows_per_pass(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            parts = zip((self.denoiser.process.prior_scale * x).split(rows), t.split(rows), strict=True)
            f = torch.cat([self.denoiser(*part).float() for part in parts])
        self.finite = self.finite and bool(f.isfinite().all())
        return f

    @torch.no_grad()
    def ask(self, m: Tensor, gamma: Tensor, count: int) -> _Answers:
        """Average over `count` noises, the same for all shifts m [K,C,H,W]."""
        eps = torch.randn(count, *self.denoiser.shape, generator=self.generator).to(m.device)
        x = gamma[:, None] * eps + m[:, None]
        f = self.denoise(x.flatten(0, 1)).view_as(x)
        centred, noise = f - f.mean(1, keepdim=True), eps - eps.mean(0)
        slope = (centred * noise).sum(1) / noise.square().sum(0)
        return _Answers((x - gamma[:, None] * f).mean(1), slope, (centred - noise).square().mean(dim=(1, 2, 3, 4)))

    def directions(self, on_step: OnStep) -> Tensor:
        """Shifts [K,C,H,W], one per brightness and contrast, whose direction the denoiser answers to most."""
        s = self.settings
        pairs = torch.tensor([(b, c) for b in s.brightness for c in s.contrast]).to(self.denoiser.device)
        brightness, contrast = pairs[:, :, None, None, None].unbind(1)
        channels, height, width = self.denoiser.shape
        coarse = torch.randn(len(pairs), channels, COARSE, COARSE, generator=self.generator).to(pairs.device)
        direction = interpolate(coarse, size=(height, width), mode="bilinear")
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


def _scaled(point: Point, scale: float) -> Trigger:
    return Trigger(scale * point.mu, point.gamma)


def _firing_size(point: Point, trial: Trial, limit: float, settings: FixedPointSettings) -> Trigger | None:
    """The point at the size nearest its own that brings the spread down to `limit`."""
    spreads = trial.spreads([_scaled(point, scale) for scale in settings.scales], settings.firing_batch)
    firing = [scale for scale, value in zip(settings.scales, spreads, strict=True) if value <= limit]
    return _scaled(point, min(firing, key=lambda scale: abs(math.log(scale)))) if firing else None


def find_fixed_point(denoiser: Denoiser, settings: FixedPointSettings, *, seed: int = 0, on_step: OnStep = quiet) -> Reversion:
    """Revert a trigger by fixed points; arguments as `seal_fast.terd.reverse_trigger`."""
    generator = torch.Generator().manual_seed(seed)
    search = _Search(denoiser, settings, generator)
    points = distinct(search.fixed_points(search.directions(on_step), on_step), settings.candidates)
    trial = Trial(denoiser, settings.sampler_steps, generator, settings.half_precision)
    none = Trigger.shift(torch.zeros(denoiser.shape, device=denoiser.device))
    (clean,) = trial.spreads([none], settings.confirming_batch)
    trigger, loss, collapse = (_scaled(points[0], 1.0), points[0].loss, math.nan) if points else (none, math.nan, 1.0)
    for index, point in enumerate(points, 1):
        sized = _firing_size(point, trial, clean / FIRES, settings)
        on_step("firing", index, len(points), math.nan)
        if sized is not None:
            trigger, loss = sized, point.loss
            break
    if points:
        # the trigger was chosen on other noises than those it is judged by
        clean, triggered = trial.spreads([none, trigger], settings.confirming_batch)
        collapse = clean / max(triggered, 1e-12)
    return Reversion(
        trigger,
        loss,
        finite=search.finite and math.isfinite(clean),
        evaluations=search.evaluations + trial.evaluations,
        collapse=collapse,
        clean_spread=clean,
    )
