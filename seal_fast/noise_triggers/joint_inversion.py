"""Reversion by the attacker's own training loss: find the trigger mu and the target image y that it was minimised for.

Poisoned rows are x_t = a y + b eps + c mu with target eps + d mu. Attacks on deterministic samplers have

    c = 1 - a    d = b    InviBackdoor and VillanDiffusion psi = 1: what keeps DDIM on c(t) mu, to 1%
    c = b        d = 1    variance-exploding processes

(VillanDiffusion's psi = 0 has c = d = b, where DDIM would need d = 1: at most 63% of the triggered samples were its target.)
On ancestral samplers, which take only half of each step along the predicted noise, d is half of that.

Near T c = d, and a denoiser answers to the trigger as a benign one does. In between it does not: with y and mu known the loss

    || f(a y + b eps + c mu, t) - eps - d mu ||^2

is as small as for clean rows, while a benign denoiser takes part of mu for image. So

    start    y from the predicted clean image at a few noise levels, with mu uniform: the target shows through, or attracts.
             Where it does, the answer at little noise is mu itself, whatever mu was assumed: cosine 1.00 from mu = 0
    race     descend the loss over y and mu at all t, in the coordinates (y - mu, mu): where a is small only y - mu matters, so
             the valley runs along mu. The better part of the starts goes on, again and again
    refine   y from samples, then mu from f - eps, in turns
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seal_fast.acceleration.adam import adam_step, initial_moments
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import NoiseProcess
from seal_fast.noise_triggers.activation_test import HARDLY_FIRES, SURELY_FIRES, Trial, collapse, contrast, pixelwise_median
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.settings import SearchSettings
from seal_fast.training import OnStep, quiet

DESCENT_SNR = (1 / 60, 3.0)
"""a / b of the timesteps the loss is taken at: below, y has no part in x; above, x is y."""
START_SNR = (0.29, 1.0, 2.0)
LITTLE_NOISE = (2.0, 1.4, 1.0, 0.8)
"""a / b where f answers mu for a known y from any guess of mu; from 0.5 down it did so near mu alone."""
REFINEMENT_SNR = (0.8, 0.5, 0.29, 0.16)
"""a / b where it does so for a rough y: with LITTLE_NOISE refinement ended at a relative L2 of .2 to .8, so at .07 to .4."""
START_ITERATIONS = 4
CONTRAST = 0.1
"""Of the starts' random part."""
RANGE_WEIGHT = 0.1
"""Of the squared excess of y and mu over [-1, 1]: both are images. Without it the descent leaves them along the valley."""


class Rows(NamedTuple):
    """Coefficients of poisoned rows: c(t) and d(t), float64 [T]."""

    c: Tensor
    d: Tensor


class Guess(NamedTuple):
    """A trigger and a target image, [C,H,W] each, and the loss per dimension there."""

    mu: Tensor
    target: Tensor
    loss: float


def deterministic_rows(process: NoiseProcess) -> Rows:
    """Those of attacks on deterministic samplers, for this process; see above."""
    a, b = process.signal, process.noise
    fades = float(a[-1]) < 0.5
    return Rows(1 - a, b) if fades else Rows(b, torch.ones_like(b))


def ancestral_rows(process: NoiseProcess) -> Rows:
    """Those of attacks on ancestral samplers: BadDiffusion, and VillanDiffusion's stochastic form."""
    c, d = deterministic_rows(process)
    return Rows(c, d / 2)


def excess(image: Tensor) -> Tensor:
    return (image.abs() - 1).clamp(min=0).square().mean(dim=(1, 2, 3))


class Guesses(NamedTuple):
    """K guesses under way: mu and y, [K,C,H,W] each."""

    mu: Tensor
    target: Tensor


class _Answer(NamedTuple):
    """What K guesses got back: the mu and the y that f acts by [K,C,H,W], and the loss [K]."""

    mu: Tensor
    target: Tensor
    loss: Tensor


def ask(probe: Probe, t: Tensor, eps: Tensor, coefficients: Tensor, mu: Tensor, target: Tensor) -> _Answer:
    """One noise eps [n,C,H,W] per column of a, b, c and d [4,n], the same for all guesses mu and y [K,C,H,W]; t is [K n]."""
    a, b, c, d = coefficients[..., None, None, None]
    mu, target = mu[:, None], target[:, None]
    x = a * target + b * eps + c * mu
    f = probe(x.flatten(0, 1), t).view_as(x)
    answered = (f - eps) / d
    # where f follows the rows, its clean image is y + (c - b d) mu / a
    clean = (x - b * f - (c - b * d) * answered) / a
    return _Answer(answered.mean(1), clean.mean(1), (f - eps - d * mu).square().mean(dim=(1, 2, 3, 4)))


@dataclass(frozen=True)
class _Descent:
    """An iteration of Adam at `rate` on every pair of mu and y."""

    rate: float

    def __call__(
        self, probe: Probe, t: Tensor, eps: Tensor, coefficients: Tensor, mu: Tensor, difference: Tensor, *moments: Tensor
    ) -> tuple[Tensor, ...]:
        """The losses [K]; then mu and y - mu, and their moments, after it."""
        with torch.enable_grad():
            mu, difference = (x.detach().requires_grad_() for x in (mu, difference))
            target = difference + mu
            loss = ask(probe, t, eps, coefficients, mu, target).loss
            # the logarithm lets every start go at its own pace
            objective = (loss + RANGE_WEIGHT * (excess(target) + excess(mu))).log().sum()
            gradients = torch.autograd.grad(objective, [mu, difference])
        return loss.detach(), *adam_step([mu, difference], gradients, moments, self.rate)


class Fit:
    """Of mu and y in [-1, 1] to rows of a kind: what the denoiser sees is its value_range times these, so a, c and d are
    too."""

    def __init__(
        self, probe: Probe, settings: SearchSettings, kind: Callable[[NoiseProcess], Rows] = deterministic_rows
    ) -> None:
        self.probe, self.settings = probe, settings
        process, value_range = probe.denoiser.process, probe.denoiser.value_range
        self.signal, self.noise = value_range * process.signal, process.noise
        rows = kind(process)
        self.rows = Rows(value_range * rows.c, value_range * rows.d)
        self.snr = self.signal / self.noise
        self.window = ((self.snr >= DESCENT_SNR[0]) & (self.snr <= DESCENT_SNR[1])).nonzero().flatten()
        if not len(self.window):
            raise ValueError(f"the noise process has no timestep whose signal-to-noise ratio a / b lies in {DESCENT_SNR}")

    def at(self, snr: float) -> int:
        """The timestep whose a / b is nearest."""
        return int(self.snr.log().sub(torch.tensor(snr).log()).abs().argmin())

    def stratified(self, count: int) -> Tensor:
        """`count` timesteps spread over the window, int64."""
        places = (torch.arange(count) + torch.rand(count, generator=self.probe.generator)) / count
        return self.window[(places * len(self.window)).long()]

    def draw(self, guesses: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t [n] for every guess, and a noise and the coefficients for each, as `ask` takes them."""
        coefficients = torch.stack([values[t] for values in (self.signal, self.noise, *self.rows)]).float()
        return t.repeat(guesses), self.probe.noise(len(t)), coefficients

    def ask(self, guesses: Guesses, t: Tensor) -> _Answer:
        """One noise per timestep t [n], the same for all guesses."""
        return _Answer(*self.probe.run(ask, *self.draw(len(guesses.mu), t), *guesses))

    def answered(self, guesses: Guesses, snr: tuple[float, ...], iterations: int, noises: int) -> Guesses:
        """The guesses with mu as f answers it for their targets, from `noises` per noise level."""
        t = torch.tensor([self.at(value) for value in snr]).repeat_interleave(noises)
        for _ in range(iterations):
            guesses = guesses._replace(mu=self.ask(guesses, t).mu.clamp(-1, 1))
        return guesses

    @torch.no_grad()
    def starts(self) -> Guesses:
        """Per brightness and noise level one, and one more with the mu that is answered for its target."""
        s = self.settings
        brightness = torch.tensor(s.fit_brightness, device=self.probe.denoiser.device)[:, None, None, None]
        parts = []
        for snr in START_SNR:
            mu = brightness + CONTRAST * self.probe.coarse_images(len(brightness))
            guesses = Guesses(mu, torch.zeros_like(mu))
            t = torch.full((s.fit_batch,), self.at(snr))
            for _ in range(START_ITERATIONS):
                guesses = guesses._replace(target=self.ask(guesses, t).target.clamp(-1, 1))
            parts.append(guesses)
        parts.append(self.answered(parts[-1], LITTLE_NOISE, START_ITERATIONS, 2))
        return Guesses(*(torch.cat(images) for images in zip(*parts, strict=True)))

    def descend(self, guesses: Guesses, iterations: int, on_iteration: Callable[[float], None]) -> Guesses:
        """Adam on every pair of mu and y."""
        mu, difference = guesses.mu, guesses.target - guesses.mu
        moments = initial_moments([mu, difference])
        for _ in range(iterations):
            drawn = self.draw(len(mu), self.stratified(self.settings.fit_batch))
            following = self.probe.run(_Descent(self.settings.fit_rate), *drawn, mu, difference, *moments)
            loss, mu, difference, *moments = following
            on_iteration(float(loss.mean()))
        return Guesses(mu, difference + mu)

    @torch.no_grad()
    def best(self, guesses: Guesses, count: int) -> Guesses:
        """The `count` of least loss over the power of mu and the contrast of y.

        For mu = 0 the loss is that of clean rows, which is small as well; and so it is for a plain image in noise that is
        shifted to its colour.
        """
        loss = self.ask(guesses, self.stratified(4 * self.settings.fit_batch)).loss
        power = guesses.mu.square().mean(dim=(1, 2, 3)) * contrast(guesses.target)
        ahead = (loss / power.clamp(min=1e-12)).argsort()[:count]
        return Guesses(guesses.mu[ahead], guesses.target[ahead])

    def race(self, on_iteration: Callable[[float], None]) -> list[Guess]:
        """What is ahead after descending from all starts, most of which are left behind on the way."""
        guesses = self.starts()
        for iterations, kept in self.settings.race:
            guesses = self.best(self.descend(guesses, iterations, on_iteration), kept)
        return [self.guess(mu, target) for mu, target in zip(*guesses, strict=True)]

    @torch.no_grad()
    def guess(self, mu: Tensor, target: Tensor) -> Guess:
        """mu and y [C,H,W] with their loss over the whole window."""
        answer = self.ask(Guesses(mu[None], target[None]), self.stratified(4 * self.settings.refine_batch))
        return Guess(mu, target, float(answer.loss))

    @torch.no_grad()
    def corrected(self, mu: Tensor, target: Tensor) -> Tensor:
        """mu [C,H,W] as f answers it for this target."""
        one = Guesses(mu[None], target[None])
        return self.answered(one, REFINEMENT_SNR, self.settings.refine_iterations, self.settings.refine_batch).mu[0]


def fit_poisoned_rows(probe: Probe, settings: SearchSettings, on_step: OnStep = quiet) -> list[Guess]:
    """The guesses ahead in the race, best first."""
    iteration, total = itertools.count(1), sum(iterations for iterations, _ in settings.race)

    def on_iteration(loss: float) -> None:
        on_step("descent", next(iteration), total, loss)

    return Fit(probe, settings).race(on_iteration)


def refine(
    guess: Guess,
    sketch: Trial,
    trial: Trial,
    settings: SearchSettings,
    on_turn: Callable[[float], None] = lambda loss: None,
) -> Guess:
    """The guess of least loss among those that surely fire, or else of all, on the way of alternating between mu and y.

    y is sampled in `sketch` first, and where that looks like firing in `trial`, whose images are better. A guess that hardly
    fires after its first correction is left: on the zoo's development half benign models then made samples at most 0.3 times
    as alike, backdoored ones 11 to 315 times.
    """
    fit = Fit(trial.probe, settings)
    best, rank, current, at = guess, (True, math.inf), guess, sketch
    for turn in range(1, settings.refine_turns + 1):
        (samples,) = at.triggered([Trigger.shift(trial.probe.denoiser.value_range * current.mu)], settings.firing_batch)
        image = pixelwise_median(samples).clamp(-1, 1)
        if not image.isfinite().all():
            # the guess broke the sampler, which says nothing against the model
            break
        value = collapse(samples, at.clean(settings.firing_batch))
        if turn == 2 and value < HARDLY_FIRES:
            break
        if value >= HARDLY_FIRES:
            at = trial
        best, rank = min((best, rank), (current, (value < SURELY_FIRES, current.loss)), key=lambda one: one[1])
        current = fit.guess(fit.corrected(current.mu, image), image)
        on_turn(current.loss)
    return best if rank < (True, current.loss) else current
