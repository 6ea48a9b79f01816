"""First proposer: a trigger is a fixed point of the denoiser's response to a shift. It needs no gradients.

Near T a benign denoiser f takes a shift m of its input for noise, so that with x = gamma eps + m the average of
x - gamma f(x, T) is 0. A backdoored one responds to its own trigger with part of it. Let c and d be the coefficients of the
poisoned samples: it was trained to predict eps + d mu from x = a y + b gamma eps + c mu, where a -> 0 and b -> 1 near T. Then

    response(mu) = E[ x - gamma f(x, T) ] = (c - d) mu        TrojDiff: 1 - 0; attacks on ancestral samplers: 1 - 1/2

so mu is a fixed point of m -> g response(m) with the response gain g = 1 / (c - d), and iterating finds it:

    power iteration        m = uniform part + rms * direction; only the direction follows the response. Small networks, benign
                           or not, respond to any uniform shift with up to 0.7 of it, so a free iteration would end at one
    patches                squares of reduced-variance noise are slid over the image. Only a network that was trained to do so
                           tells the noise inside a square from its shift; any other takes the sum for noise
    fixed-point iteration  the free iteration of mu and gamma starts from every direction and from the best patches. In a benign
                           model it dies out or runs away

The response is nearly linear, so it fixes the size of mu only roughly. gamma follows from the same passes: f returns eps with
slope 1 where gamma is the attacker's, and with slope 1 / gamma where it is 1. Attacks on deterministic samplers have c - d = 0
and leave no response at T: see `seal_fast.noise_triggers.joint_inversion`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from seal_fast.diffusion.process import per_sample
from seal_fast.noise_triggers.attack_loss import OnIteration
from seal_fast.noise_triggers.candidates import Candidate, Origin, TestResult
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import (
    ACTIVATION_TEST,
    FIXED_POINT_ITERATION,
    POWER_ITERATION,
    FixedPointSettings,
    SearchSettings,
)


def propose_fixed_points(probe: Probe, settings: SearchSettings, tried: Sequence[TestResult]) -> Iterator[Candidate]:
    """The strongest distinct fixed points; a trigger that changes nothing if there are none."""
    found = fixed_points(probe, settings)
    if not found:
        none = torch.zeros(probe.denoiser.shape, device=probe.denoiser.device)
        yield Candidate(none, torch.ones_like(none), math.nan, Origin.NO_TRIGGER, "ddpm", settings.test.accept_above)
        return
    for number, candidate in enumerate(found, 1):
        yield candidate
        probe.on_step(ACTIVATION_TEST, number, len(found), math.nan)
    if all(result.score is None for result in tried):
        # a verdict needs a score
        yield replace(found[0], scales=())


def fixed_points(probe: Probe, settings: SearchSettings) -> list[Candidate]:
    """The strongest distinct fixed points, at most `settings.fixed_points.candidates`."""
    search, s = FixedPointSearch(probe, settings), settings.fixed_points
    return distinct(search.fixed_points(search.directions()), s.candidates, s.duplicate_similarity)


def distinct(candidates: list[Candidate], count: int, duplicate_similarity: float) -> list[Candidate]:
    """The `count` strongest candidates, none of which is a duplicate of a stronger one."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda candidate: candidate.strength, reverse=True):
        similarities = (float(cosine_similarity(one.mu.flatten(), other.mu.flatten(), dim=0)) for other in kept)
        if all(similarity < duplicate_similarity for similarity in similarities):
            kept.append(one)
    return kept[:count]


def windows(height: int, width: int, share: float, grid: int) -> Tensor:
    """Squares at all places of a grid and along all edges, 1 inside and 0 outside, [K,1,H,W].

    Their side is `share` of the image's shorter side, and they slide by that side divided by `grid`.
    """
    side, step = max(1, round(share * min(height, width))), max(1, min(height, width) // grid)
    tops, lefts = (sorted({*range(0, length - side, step), length - side}) for length in (height, width))
    inside = torch.zeros(len(tops) * len(lefts), 1, height, width)
    for index, (top, left) in enumerate(itertools.product(tops, lefts)):
        inside[index, :, top : top + side, left : left + side] = 1
    return inside


def root_mean_square(m: Tensor) -> Tensor:
    """Root mean square of each image: [K,C,H,W] -> [K,1,1,1]."""
    return m.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def unit_contrast(m: Tensor) -> Tensor:
    """m [K,C,H,W] without the mean of each channel, scaled to root mean square 1."""
    m = m - m.mean(dim=(2, 3), keepdim=True)
    return m / root_mean_square(m).clamp(min=1e-12)


class ShiftResponse(NamedTuple):
    """For K shifts: the response and the slope of f in eps, [K,C,H,W] each, and the variance of f's error [K]."""

    response: Tensor
    slope: Tensor
    loss: Tensor


def predicted_noise(probe: Probe, t: Tensor, x: Tensor) -> Tensor:
    """f for x [K,n,C,H,W] in units of the noise at t near T, [K n]."""
    images = x.flatten(0, 1)
    # not the prior's scale: over 1% of the timesteps a variance-exploding process varies by 8%
    return probe(per_sample(probe.denoiser.process.b(t), images) * images, t).view_as(x)


def shift_response(probe: Probe, t: Tensor, eps: Tensor, m: Tensor, gamma: Tensor) -> ShiftResponse:
    """The response to shifts m [K,C,H,W], averaged over the noises eps [n,C,H,W]; all shifts share the noises."""
    x = gamma[:, None] * eps + m[:, None]
    f = predicted_noise(probe, t, x)
    centred, noise = f - f.mean(1, keepdim=True), eps - eps.mean(0)
    slope = (centred * noise).sum(1) / noise.square().sum(0)
    return ShiftResponse((x - gamma[:, None] * f).mean(1), slope, (centred - noise).square().mean(dim=(1, 2, 3, 4)))


def power_iteration(
    probe: Probe, t: Tensor, eps: Tensor, uniform: Tensor, rms: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """The next directions, and the losses [K]."""
    shift = uniform + rms * unit_contrast(direction)
    response, _, loss = shift_response(probe, t, eps, shift, torch.ones_like(shift))
    return response, loss


@dataclass(frozen=True)
class FixedPointIteration:
    """One fixed-point iteration of mu and gamma. Equal objects share a CUDA graph."""

    settings: FixedPointSettings

    def __call__(
        self, probe: Probe, t: Tensor, eps: Tensor, response_gain: Tensor, mu: Tensor, gamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next mu and gamma, and the losses [K]."""
        response, slope, loss = shift_response(probe, t, eps, mu, gamma)
        return response_gain * response, self.next_gamma(gamma, slope), loss

    def next_gamma(self, gamma: Tensor, slope: Tensor) -> Tensor:
        """gamma towards the value at which the slope of f in eps is 1."""
        s = self.settings
        local = avg_pool2d(slope.mean(1, keepdim=True), s.gamma_window, 1, s.gamma_window // 2, count_include_pad=False)
        return (gamma * local.clamp(*s.slope_range) ** -s.gamma_rate).clamp(s.min_gamma, 1.0)


def missed_noise(probe: Probe, t: Tensor, eps: Tensor, inside: Tensor, mu: Tensor, gamma: Tensor) -> tuple[Tensor]:
    """Error of f inside the patches mu, gamma [K,C,H,W], relative to how far they change the noise there, [K].

    `inside` [K,1,H,W] is 1 inside a patch and 0 outside.
    """
    x = gamma[:, None] * eps + mu[:, None]
    f = predicted_noise(probe, t, x)
    error, change = (((y - eps) * inside[:, None]).square().sum(dim=(1, 2, 3, 4)) for y in (f, x))
    return (error / change,)


class FixedPointSearch:
    """The search for fixed points of one model.

    Args:
        probe: the suspect model.
        settings: settings of the search.
    """

    def __init__(self, probe: Probe, settings: SearchSettings) -> None:
        self.probe, self.settings, self.test = probe, settings.fixed_points, settings.test

    def draw(self, shifts: int, count: int) -> tuple[Tensor, Tensor]:
        """Timesteps near T for `count` noises of every shift, int64 [shifts count], and the noises."""
        eps, T = self.probe.noise(count), self.probe.denoiser.process.num_timesteps
        lowest = T - max(1, round(self.settings.timestep_window * T))
        return self.probe.noise_source.integers(lowest, T, shifts * count), eps

    def directions(self) -> Tensor:
        """One shift [K,C,H,W] per start, whose direction the denoiser responds to most."""
        s, device = self.settings, self.probe.denoiser.device
        means, sizes = zip(*s.starts(self.probe.denoiser.shape[0]), strict=True)
        uniform = torch.tensor(means, device=device)[..., None, None]
        rms = torch.tensor(sizes, device=device)[:, None, None, None]
        direction = self.probe.coarse_images(len(uniform), s.coarse_grid)
        for iteration in range(1, s.power_iterations + 1):
            drawn = self.draw(len(uniform), s.power_noises)
            direction, loss = self.probe.run(power_iteration, *drawn, uniform, rms, direction)
            self.probe.on_step(POWER_ITERATION, iteration, s.power_iterations, float(loss.mean()))
        return uniform + rms * unit_contrast(direction)

    def patches(self) -> tuple[Tensor, Tensor]:
        """The patches mu, gamma [K,C,H,W] with the smallest `missed_noise`."""
        s, (channels, height, width) = self.settings, self.probe.denoiser.shape
        best: list[tuple[float, Tensor, Tensor]] = []
        for share in s.patch_sides:
            inside = windows(height, width, share, s.patch_grid).to(self.probe.denoiser.device)
            gamma = (1 - (1 - s.patch_gamma) * inside).expand(-1, channels, -1, -1)
            for colour in (-1, 1):
                mu = colour * (1 - gamma)
                drawn = self.draw(len(mu), s.patch_noises)
                (missed,) = self.probe.run(missed_noise, *drawn, inside, mu, gamma)
                best += [(float(missed[i]), mu[i], gamma[i]) for i in missed.argsort()[: s.patches].tolist()]
        best = sorted(best, key=lambda patch: patch[0])[: s.patches]
        return torch.stack([mu for _, mu, _ in best]), torch.stack([gamma for _, _, gamma in best])

    def fixed_points(self, shifts: Tensor) -> list[Candidate]:
        """Iterate from shifts [K,C,H,W] and from patches, for every response gain; returns where that ends."""
        s, found = self.settings, []
        iteration, total = itertools.count(1), s.fixed_point_iterations * len(s.response_gains)

        def on_iteration(loss: float) -> None:
            self.probe.on_step(FIXED_POINT_ITERATION, next(iteration), total, loss)

        starts = [(shifts, torch.ones_like(shifts)), self.patches()]
        for gain in sorted(s.response_gains, reverse=True):
            mu, gamma = (torch.cat(parts) for parts in zip(*starts, strict=True))
            for point in self.iterated(mu, gamma, gain, on_iteration):
                if gain == 1 or point.gamma_at_mu > self.test.reduced_variance_below:
                    found.append(point)
                else:
                    # only TrojDiff reduces the variance, and its gain is 1: this mu is too large, but it is a start like others
                    starts.append((point.mu[None] / gain, point.gamma[None]))
        return found

    def iterated(self, mu: Tensor, gamma: Tensor, gain: float, on_iteration: OnIteration) -> list[Candidate]:
        """The ends of the free iteration from mu, gamma [K,C,H,W] that neither died out nor ran away."""
        s, starts, iteration = self.settings, len(mu), FixedPointIteration(self.settings)
        loss, max_rms = mu.new_zeros(starts), s.max_rms * self.probe.denoiser.value_range
        for _ in range(s.fixed_point_iterations):
            if left := len(mu):
                t, eps = self.draw(left, s.fixed_point_noises)
                t, mu, gamma = (self.probe.padded(x, starts * len(x) // left) for x in (t, mu, gamma))
                following = self.probe.run(iteration, t, eps, torch.tensor(gain), mu, gamma)
                mu, gamma, loss = (x[:left] for x in following)
                # an iteration that has died out would go on as noise, and one that runs away would overflow
                alive = ((root_mean_square(mu) > s.min_rms) & (root_mean_square(mu) < gain * max_rms)).flatten()
                mu, gamma, loss = mu[alive], gamma[alive], loss[alive]
            on_iteration(float(loss.mean()))
        ends = (root_mean_square(mu) < max_rms).flatten().nonzero().flatten().tolist()
        return [self.candidate(mu[i], gamma[i], float(loss[i])) for i in ends]

    def candidate(self, mu: Tensor, gamma: Tensor, loss: float) -> Candidate:
        return Candidate(mu, gamma, loss, Origin.FIXED_POINT, "ddpm", self.test.accept_above, self.test.scales)
