"""Reversion without gradients: a trigger is a fixed point of the denoiser's answer to a shift.

Near T a denoiser f should take a shift m of its input for noise, so that with x = gamma eps + m the average of
x - gamma f(x, T) is 0. A backdoored one answers to its own trigger with part of it. With the coefficients c and d of its
training rows (x = a y + b gamma eps + c mu, target eps + d mu; a -> 0, b -> 1),

    answer(mu) = E[ x - gamma f(x, T) ] = (c - d) mu        TrojDiff: 1 - 0; attacks on stochastic samplers: 1 - 1/2

so mu is a fixed point of m -> kappa answer(m), kappa = 1 / (c - d), and iterating finds it:

    search   m = uniform part + contrast * direction; the direction alone follows the answer. Small networks answer to any
             uniform shift with up to 0.7 of it, which would draw a free iteration to itself, benign or not
    patches  of narrowed noise, slid over the image: where f tells the noise inside one from the rest of its input, it was
             taught to; elsewhere it takes the whole of it for noise
    polish   the free iteration, from every direction and the best patches, with gamma; in a benign model it dies out or runs
             away

The answer is nearly linear, so it fixes the size of mu only roughly. gamma follows from the same passes: f returns eps with
slope 1 where gamma is the attacker's, and 1 / gamma times that where it is 1. Attacks on deterministic samplers have c - d = 0
and leave no answer at T: see `seal_fast.noise_triggers.joint_inversion`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from seal_fast.diffusion.process import per_row
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.settings import SearchSettings
from seal_fast.training import OnStep, quiet

WINDOW = 0.01
"""Share of the timesteps that count as T, as in TERD."""
GAMMA_WINDOW = 5
"""Side of the neighbourhood gamma is averaged over: one pixel's slope is a poor estimate from a batch of 16."""
GAMMA_RATE = 0.7
SMALLEST_GAMMA = 0.05
NARROW = 0.9
"""Below this gamma narrows the noise."""
PATCH_GAMMA = 0.1
"""Of TrojDiff's patch, whose mu is 1 - gamma of white."""
PATCH_SIDES = (3 / 32, 3 / 16, 1 / 4, 3 / 8)
"""Of the patches tried, as shares of the image's side: 3/32 is TrojDiff's. A patch has to fit: one pixel off hid it."""
PATCH_GRID = 16
"""Patches slide by this part of the image's side."""
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


def _denoised(probe: Probe, t: Tensor, x: Tensor) -> Tensor:
    """f for x [K,n,C,H,W] in units of the noise at t near T, [K n]."""
    rows = x.flatten(0, 1)
    # not the prior's scale: over 1% of the timesteps a variance-exploding process varies by 8%
    return probe(per_row(probe.denoiser.process.b(t), rows) * rows, t).view_as(x)


def _answers(probe: Probe, t: Tensor, eps: Tensor, m: Tensor, gamma: Tensor) -> _Answers:
    """Average over the noises eps [n,C,H,W], the same for all shifts m [K,C,H,W]."""
    x = gamma[:, None] * eps + m[:, None]
    f = _denoised(probe, t, x)
    centred, noise = f - f.mean(1, keepdim=True), eps - eps.mean(0)
    slope = (centred * noise).sum(1) / noise.square().sum(0)
    return _Answers((x - gamma[:, None] * f).mean(1), slope, (centred - noise).square().mean(dim=(1, 2, 3, 4)))


def _search_iteration(
    probe: Probe, t: Tensor, eps: Tensor, uniform: Tensor, contrast: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """The next directions, and the losses [K]."""
    shift = uniform + contrast * _unit_contrast(direction)
    answer, _, loss = _answers(probe, t, eps, shift, torch.ones_like(shift))
    return answer, loss


def _polish_iteration(
    probe: Probe, t: Tensor, eps: Tensor, kappa: Tensor, mu: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The next mu and gamma, and the losses [K]."""
    answer, slope, loss = _answers(probe, t, eps, mu, gamma)
    return kappa * answer, _next_gamma(gamma, slope), loss


def _next_gamma(gamma: Tensor, slope: Tensor) -> Tensor:
    """gamma towards the value at which f's slope in eps is 1."""
    pad = GAMMA_WINDOW // 2
    local = avg_pool2d(slope.mean(1, keepdim=True), GAMMA_WINDOW, 1, pad, count_include_pad=False)
    return (gamma * local.clamp(0.5, 2.0) ** -GAMMA_RATE).clamp(SMALLEST_GAMMA, 1.0)


def _missed(probe: Probe, t: Tensor, eps: Tensor, inside: Tensor, mu: Tensor, gamma: Tensor) -> tuple[Tensor]:
    """Share [K] of what patches mu, gamma [K,C,H,W] change of the noise `inside` them, [K,1,H,W], that f misses."""
    x = gamma[:, None] * eps + mu[:, None]
    f = _denoised(probe, t, x)
    error, done = (((y - eps) * inside[:, None]).square().sum(dim=(1, 2, 3, 4)) for y in (f, x))
    return (error / done,)


class _Search:
    def __init__(self, probe: Probe, settings: SearchSettings) -> None:
        self.probe, self.settings = probe, settings

    def draw(self, shifts: int, count: int) -> tuple[Tensor, Tensor]:
        """Timesteps near T for `count` noises of every shift, int64 [shifts count], and the noises."""
        eps, T = self.probe.noise(count), self.probe.denoiser.process.num_timesteps
        return torch.randint(T - max(1, round(WINDOW * T)), T, (shifts * count,), generator=self.probe.generator), eps

    def uniform_shifts(self) -> tuple[Tensor, Tensor]:
        """Uniform parts [K,C,1,1] of the shifts searched from, grey and coloured, and the contrasts [K,1,1,1] beside them."""
        s = self.settings
        channels, device = self.probe.denoiser.shape[0], self.probe.denoiser.device
        grey = [([b] * channels, contrast) for b in s.brightness for contrast in s.contrast]
        signs = [sign for sign in itertools.product((-1, 1), repeat=channels) if len(set(sign)) > 1]
        uniform, contrast = zip(*grey, *(([s.colour * one for one in sign], s.colour) for sign in signs), strict=True)
        return torch.tensor(uniform, device=device)[..., None, None], torch.tensor(contrast, device=device)[:, None, None, None]

    def directions(self, on_step: OnStep) -> Tensor:
        """Shifts [K,C,H,W], one per uniform part and contrast, whose direction the denoiser answers to most."""
        s = self.settings
        uniform, contrast = self.uniform_shifts()
        direction = self.probe.coarse_images(len(uniform))
        for iteration in range(1, s.search_iterations + 1):
            drawn = self.draw(len(uniform), s.search_batch)
            direction, loss = self.probe.run(_search_iteration, *drawn, uniform, contrast, direction)
            on_step("search", iteration, s.search_iterations, float(loss.mean()))
        return uniform + contrast * _unit_contrast(direction)

    def patches(self) -> tuple[Tensor, Tensor]:
        """The patches mu, gamma [K,C,H,W] of which least is missed."""
        channels, height, width = self.probe.denoiser.shape
        best: list[tuple[float, Tensor, Tensor]] = []
        for share in PATCH_SIDES:
            inside = windows(height, width, share).to(self.probe.denoiser.device)
            gamma = (1 - (1 - PATCH_GAMMA) * inside).expand(-1, channels, -1, -1)
            for colour in (-1, 1):
                mu = colour * (1 - gamma)
                drawn = self.draw(len(mu), self.settings.patch_batch)
                (missed,) = self.probe.run(_missed, *drawn, inside, mu, gamma)
                best += [(float(missed[i]), mu[i], gamma[i]) for i in missed.argsort()[: self.settings.patches].tolist()]
        best = sorted(best, key=lambda patch: patch[0])[: self.settings.patches]
        return torch.stack([mu for _, mu, _ in best]), torch.stack([gamma for _, _, gamma in best])

    def polished(self, mu: Tensor, gamma: Tensor, kappa: float, on_iteration: Callable[[float], None]) -> list[Point]:
        """Where the free iteration from mu, gamma [K,C,H,W] neither dies out nor runs away."""
        s, starts = self.settings, len(mu)
        loss, largest = mu.new_zeros(starts), s.largest * self.probe.denoiser.value_range
        for _ in range(s.polish_iterations):
            if left := len(mu):
                t, eps = self.draw(left, s.polish_batch)
                t, mu, gamma = (self.probe.padded(x, starts * len(x) // left) for x in (t, mu, gamma))
                following = self.probe.run(_polish_iteration, t, eps, torch.tensor(kappa), mu, gamma)
                mu, gamma, loss = (x[:left] for x in following)
                # one that has died out would go on as noise, and one that runs away would overflow
                alive = ((_rms(mu) > s.smallest) & (_rms(mu) < kappa * largest)).flatten()
                mu, gamma, loss = mu[alive], gamma[alive], loss[alive]
            on_iteration(float(loss.mean()))
        return [Point(mu[i], gamma[i], float(loss[i])) for i in (_rms(mu) < largest).flatten().nonzero().flatten().tolist()]

    def fixed_points(self, m: Tensor, on_step: OnStep) -> list[Point]:
        """Those reached from shifts m [K,C,H,W] and from patches, for every kappa."""
        s = self.settings
        iteration, total = itertools.count(1), s.polish_iterations * len(s.kappas)

        def on_iteration(loss: float) -> None:
            on_step("polish", next(iteration), total, loss)

        starts = [(m, torch.ones_like(m)), self.patches()]
        points = []
        for kappa in sorted(s.kappas, reverse=True):
            mu, gamma = (torch.cat(parts) for parts in zip(*starts, strict=True))
            for point in self.polished(mu, gamma, kappa, on_iteration):
                if kappa == 1 or point.gamma_at_mu > NARROW:
                    points.append(point)
                else:
                    # only TrojDiff narrows the noise, and its kappa is 1: this one is enlarged, but more starts lead to it
                    starts.append((point.mu[None] / kappa, point.gamma[None]))
        return points


def windows(height: int, width: int, share: float) -> Tensor:
    """Squares of `share` of the image's shorter side, at all places of a grid and along all edges: 1 inside, [K,1,H,W]."""
    side, step = max(1, round(share * min(height, width))), max(1, min(height, width) // PATCH_GRID)
    tops, lefts = (sorted({*range(0, length - side, step), length - side}) for length in (height, width))
    inside = torch.zeros(len(tops) * len(lefts), 1, height, width)
    for index, (top, left) in enumerate(itertools.product(tops, lefts)):
        inside[index, :, top : top + side, left : left + side] = 1
    return inside


def distinct(points: list[Point], count: int) -> list[Point]:
    """The `count` strongest points of which no two are one."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: p.strength, reverse=True):
        if all(float(cosine_similarity(point.mu.flatten(), other.mu.flatten(), dim=0)) < DUPLICATE for other in kept):
            kept.append(point)
    return kept[:count]


def fixed_points(probe: Probe, settings: SearchSettings, on_step: OnStep = quiet) -> list[Point]:
    """The strongest distinct fixed points, at most `settings.candidates`."""
    search = _Search(probe, settings)
    return distinct(search.fixed_points(search.directions(on_step), on_step), settings.candidates)
