"""Reversion by the attacker's own training loss: find the trigger mu and the target image y that it was minimised for.

Poisoned rows are x_t = a y + b eps + c mu with target eps + d mu. Attacks on deterministic samplers have

    c = 1 - a    d = b    InviBackdoor and VillanDiffusion psi = 1: what keeps DDIM on c(t) mu, to 1%
    c = b        d = b    VillanDiffusion psi = 0, as published (DDIM would need d = 1)
    c = b        d = 1    variance-exploding processes

Near T c = d, and a denoiser answers to the trigger as a benign one does. In between it does not: with y and mu known the loss

    || f(a y + b eps + c mu, t) - eps - d mu ||^2

is as small as for clean rows, while a benign denoiser takes part of mu for image. So

    start    y from the predicted clean image at one t, with mu uniform: in a backdoored model the target shows through
    descend  the loss over y and mu at all t, in the coordinates (y - mu, mu): where a is small only y - mu matters, so the
             valley runs along mu
    refine   y from samples, then mu from f - eps, in turns: once y is known the answer is mu itself
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seal_fast.diffusion import NoiseProcess, Trigger
from seal_fast.diffusion.process import per_row
from seal_fast.terd.firing import Trial, middle
from seal_fast.terd.probe import Probe
from seal_fast.terd.reversion import OnStep, quiet
from seal_fast.terd.settings import FixedPointSettings

DESCENT_SNR = (1 / 60, 3.0)
"""a / b of the timesteps the loss is taken at: below, y has no part in x; above, x is y."""
START_SNR = 0.29
REFINEMENT_SNR = (0.8, 0.5, 0.29, 0.16)
START_ITERATIONS = 4
CONTRAST = 0.1
"""Of the starts' random part."""
RANGE_WEIGHT = 0.1
"""Of the squared excess of y and mu over [-1, 1]: both are pictures. Without it the descent leaves them along the valley."""


class Rows(NamedTuple):
    """One family of poisoned rows: c(t) and d(t), float64 [T]."""

    c: Tensor
    d: Tensor


class Guess(NamedTuple):
    """A trigger and a target image, [C,H,W] each, and the loss per dimension there."""

    mu: Tensor
    target: Tensor
    loss: float
    rows: Rows

    @property
    def relative_loss(self) -> float:
        """Over the power of mu: for mu = 0 the loss is that of clean rows, which is small as well."""
        return self.loss / max(float(self.mu.square().mean()), 1e-12)


def deterministic_rows(process: NoiseProcess) -> list[Rows]:
    """The families of attacks on deterministic samplers, for this process; see above."""
    a, b = process.signal, process.noise
    fades = float(a[-1]) < 0.5
    return [Rows(1 - a, b), Rows(b, b)] if fades else [Rows(b, torch.ones_like(b))]


def _at(process: NoiseProcess, snr: float) -> int:
    """The timestep whose a / b is nearest."""
    return int((process.signal / process.noise).log().sub(torch.tensor(snr).log()).abs().argmin())


def _excess(picture: Tensor) -> Tensor:
    return (picture.abs() - 1).clamp(min=0).square().mean(dim=(1, 2, 3))


class _Answer(NamedTuple):
    """What K guesses [K,C,H,W] got back: the mu and the y that f acts by, and the loss [K]."""

    mu: Tensor
    target: Tensor
    loss: Tensor


class _Fit:
    def __init__(self, probe: Probe, rows: Rows, settings: FixedPointSettings) -> None:
        self.probe, self.rows, self.settings = probe, rows, settings
        self.process = probe.denoiser.process
        snr = self.process.signal / self.process.noise
        self.window = ((snr >= DESCENT_SNR[0]) & (snr <= DESCENT_SNR[1])).nonzero().flatten()

    def stratified(self, count: int) -> Tensor:
        """`count` timesteps spread over the window, int64."""
        places = (torch.arange(count) + torch.rand(count, generator=self.probe.generator)) / count
        return self.window[(places * len(self.window)).long()]

    def ask(self, mu: Tensor, target: Tensor, t: Tensor) -> _Answer:
        """One noise per timestep t [n], the same for all guesses mu, target [K,C,H,W]."""
        a, b, c, d = (per_row(v[t], mu) for v in (self.process.signal, self.process.noise, *self.rows))
        eps = self.probe.noise(len(t))
        x = a * target[:, None] + b * eps + c * mu[:, None]
        f = self.probe(x.flatten(0, 1), t.to(x.device).repeat(len(mu))).view_as(x)
        answered = (f - eps) / d
        # where f follows the rows, its clean image is y + (c - b d) mu / a
        clean = (x - b * f - (c - b * d) * answered) / a
        return _Answer(answered.mean(1), clean.mean(1), (f - eps - d * mu[:, None]).square().mean(dim=(1, 2, 3, 4)))

    @torch.no_grad()
    def start(self) -> tuple[Tensor, Tensor]:
        """mu and y [K,C,H,W], one per brightness."""
        s = self.settings
        brightness = torch.tensor(s.fit_brightness, device=self.probe.denoiser.device)[:, None, None, None]
        mu = brightness + CONTRAST * self.probe.coarse_pictures(len(s.fit_brightness))
        target = torch.zeros_like(mu)
        t = torch.full((s.fit_batch,), _at(self.process, START_SNR))
        for _ in range(START_ITERATIONS):
            target = self.ask(mu, target, t).target.clamp(-1, 1)
        return mu, target

    def descend(self, mu: Tensor, target: Tensor, iterations: int, on_iteration: Callable[[float], None]) -> list[Guess]:
        """Adam on every pair mu, target [K,C,H,W], best first."""
        s = self.settings
        difference = (target - mu).requires_grad_()
        mu = mu.clone().requires_grad_()
        optimiser = torch.optim.Adam([mu, difference], lr=s.fit_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, 0.05 * s.fit_rate)
        for _ in range(iterations):
            loss = self.ask(mu, difference + mu, self.stratified(s.fit_batch)).loss
            # the logarithm lets every start go at its own pace
            objective = (loss + RANGE_WEIGHT * (_excess(difference + mu) + _excess(mu))).log().sum()
            mu.grad, difference.grad = torch.autograd.grad(objective, [mu, difference])
            optimiser.step()
            schedule.step()
            on_iteration(float(loss.detach().mean()))
        pairs = zip(mu.detach(), (difference + mu).detach(), strict=True)
        return sorted((Guess(m, y, self.loss(m, y), self.rows) for m, y in pairs), key=lambda guess: guess.relative_loss)

    def best(self, on_iteration: Callable[[float], None]) -> Guess:
        """Where the descent ends that is ahead of the others after a race from all starts."""
        s = self.settings
        leaders = self.descend(*self.start(), s.race_iterations, on_iteration)[: s.raced]
        mu, target = torch.stack([g.mu for g in leaders]), torch.stack([g.target for g in leaders])
        return self.descend(mu, target, s.fit_iterations, on_iteration)[0]

    @torch.no_grad()
    def answered(self, mu: Tensor, target: Tensor) -> Tensor:
        """mu [C,H,W] as f answers it for this target."""
        s = self.settings
        levels = torch.tensor([_at(self.process, snr) for snr in REFINEMENT_SNR])
        t = levels.repeat_interleave(s.refine_batch)
        for _ in range(s.refine_iterations):
            mu = self.ask(mu[None], target[None], t).mu[0].clamp(-1, 1)
        return mu

    @torch.no_grad()
    def loss(self, mu: Tensor, target: Tensor) -> float:
        """Over the whole window, for one guess [C,H,W]."""
        return float(self.ask(mu[None], target[None], self.stratified(4 * self.settings.refine_batch)).loss)


def fit_poisoned_rows(probe: Probe, settings: FixedPointSettings, on_step: OnStep = quiet) -> list[Guess]:
    """The best guess of every family of rows."""
    families = deterministic_rows(probe.denoiser.process)
    total = len(families) * (settings.race_iterations + settings.fit_iterations)
    iteration = itertools.count(1)

    def on_iteration(loss: float) -> None:
        on_step("descent", next(iteration), total, loss)

    return [_Fit(probe, rows, settings).best(on_iteration) for rows in families]


def refine(
    guess: Guess, trial: Trial, probe: Probe, settings: FixedPointSettings, on_turn: Callable[[float], None] = lambda loss: None
) -> Guess:
    """The guess of least loss on the way of alternating between y and mu, sampled in `trial`."""
    fit = _Fit(probe, guess.rows, settings)
    best, mu = guess._replace(loss=math.inf), guess.mu
    for _ in range(settings.refine_turns):
        samples = trial.draw(Trigger.shift(mu).start(trial.noise(settings.firing_batch)))
        target = middle(samples).clamp(-1, 1)
        if not target.isfinite().all():
            # the guess broke the sampler, which says nothing against the model
            break
        loss = fit.loss(mu, target)
        if loss < best.loss:
            best = Guess(mu, target, loss, guess.rows)
        mu = fit.answered(mu, target)
        on_turn(loss)
    return best
