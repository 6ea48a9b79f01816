"""The training loss of an attacker, as a function of the trigger mu and the target image y that it was minimised for.

Poisoned samples are x_t = a y + b eps + c mu, and the network is trained to predict eps + d mu for them. Attacks on
deterministic samplers have

    c = 1 - a    d = b    InviBackdoor, and VillanDiffusion with psi = 1: with this d DDIM keeps the shift at c(t) mu, to 1%
    c = b        d = 1    variance-exploding processes

VillanDiffusion with psi = 0 has c = d = b, where DDIM would need d = 1: at most 63% of its triggered samples were the target.
Ancestral samplers take only half of each step along the predicted noise, so attacks on them have half of that d.

With y and mu known the loss

    || f(a y + b eps + c mu, t) - eps - d mu ||^2

is as small as for clean samples, while a benign denoiser takes part of mu for image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seal_fast.acceleration.adam import adam_step, initial_moments
from seal_fast.diffusion import NoiseProcess
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import AttackLossSettings

OnIteration = Callable[[float], None]
"""Called with the loss of every iteration."""


class PoisonedSampleCoefficients(NamedTuple):
    """c(t) and d(t) of poisoned samples, float64 [T]."""

    c: Tensor
    d: Tensor


def deterministic_coefficients(
    process: NoiseProcess, fading_below: float = AttackLossSettings.fading_below
) -> PoisonedSampleCoefficients:
    """Coefficients of attacks on deterministic samplers; the formulas are at the top of this file."""
    a, b = process.signal, process.noise
    fades = float(a[-1]) < fading_below
    return PoisonedSampleCoefficients(1 - a, b) if fades else PoisonedSampleCoefficients(b, torch.ones_like(b))


def ancestral_coefficients(
    process: NoiseProcess, fading_below: float = AttackLossSettings.fading_below
) -> PoisonedSampleCoefficients:
    """Coefficients of attacks on ancestral samplers: BadDiffusion, and VillanDiffusion's stochastic form."""
    c, d = deterministic_coefficients(process, fading_below)
    return PoisonedSampleCoefficients(c, d / 2)


def excess(images: Tensor) -> Tensor:
    """Mean square excess of images [K,C,H,W] over [-1, 1], [K]."""
    return (images.abs() - 1).clamp(min=0).square().mean(dim=(1, 2, 3))


class Pairs(NamedTuple):
    """K pairs of mu and y, [K,C,H,W] each."""

    mu: Tensor
    target: Tensor


class ImpliedPairs(NamedTuple):
    """The mu and the y that the denoiser's output implies, [K,C,H,W] each, and the loss per dimension [K]."""

    mu: Tensor
    target: Tensor
    loss: Tensor


def implied_pairs(probe: Probe, t: Tensor, eps: Tensor, coefficients: Tensor, mu: Tensor, target: Tensor) -> ImpliedPairs:
    """The pairs that the denoiser implies where it is given poisoned samples of K pairs.

    Args:
        probe: the suspect model.
        t: int64 [K n], the n timesteps for every pair.
        eps: [n,C,H,W], one noise per timestep, the same for all pairs.
        coefficients: [4,n], a, b, c and d at each timestep.
        mu: [K,C,H,W].
        target: y, [K,C,H,W].
    """
    a, b, c, d = coefficients[..., None, None, None]
    mu, target = mu[:, None], target[:, None]
    x = a * target + b * eps + c * mu
    f = probe(x.flatten(0, 1), t).view_as(x)
    shift = (f - eps) / d
    # where f follows the poisoned samples, its clean image is y + (c - b d) mu / a
    clean = (x - b * f - (c - b * d) * shift) / a
    return ImpliedPairs(shift.mean(1), clean.mean(1), (f - eps - d * mu).square().mean(dim=(1, 2, 3, 4)))


Objective = Callable[..., tuple[Tensor, Tensor]]
"""Takes the first four arguments of `respond`, fixed tensors, variables, and the keyword range_weight. Returns the losses [K],
and the number [] to minimise."""


@dataclass(frozen=True)
class AdamIteration:
    """One Adam step. Equal ones share a CUDA graph, so the objective is a function of a module.

    Attributes:
        objective: what is minimised.
        variables: number of tensors that it is minimised over.
        rate: learning rate.
        range_weight: weight of the excess of images over [-1, 1].
    """

    objective: Objective
    variables: int
    rate: float
    range_weight: float

    def gradients(self, probe: Probe, t: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The losses [K], and the gradient of every variable. The last inputs are the variables."""
        fixed, variables = inputs[: -self.variables], inputs[-self.variables :]
        with torch.enable_grad():
            variables = tuple(x.detach().requires_grad_() for x in variables)
            loss, objective = self.objective(probe, t, *fixed, *variables, range_weight=self.range_weight)
            return loss.detach(), torch.autograd.grad(objective, variables)

    def __call__(self, probe: Probe, t: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The losses [K], the variables after the step, and their moments. The last inputs are the variables and moments."""
        first_moment = len(inputs) - 3 * self.variables
        inputs, moments = inputs[:first_moment], inputs[first_moment:]
        loss, gradients = self.gradients(probe, t, *inputs)
        return loss, *adam_step(inputs[-self.variables :], gradients, moments, self.rate)


class AttackLoss:
    """The loss for mu and y in [-1, 1]. The denoiser sees both times its value range, so a, c and d are scaled by that range.

    Args:
        probe: the suspect model.
        settings: numbers of the loss.
        coefficients: a function of the noise process and `AttackLossSettings.fading_below`, `deterministic_coefficients` or
            `ancestral_coefficients`.

    Raises:
        ValueError: no timestep of the process lies in the window of the settings.
    """

    def __init__(
        self,
        probe: Probe,
        settings: AttackLossSettings,
        coefficients: Callable[[NoiseProcess, float], PoisonedSampleCoefficients],
    ) -> None:
        self.probe, self.settings = probe, settings
        process, value_range = probe.denoiser.process, probe.denoiser.value_range
        c, d = coefficients(process, settings.fading_below)
        self.signal, self.noise, self.c, self.d = value_range * process.signal, process.noise, value_range * c, value_range * d
        self.snr = self.signal / self.noise
        low, high = settings.snr_window
        self.window = ((self.snr >= low) & (self.snr <= high)).nonzero().flatten()
        if not len(self.window):
            raise ValueError(f"the noise process has no timestep whose signal-to-noise ratio a / b lies in [{low:g}, {high:g}]")

    def timestep_at(self, snr: float) -> int:
        """The timestep whose a / b is nearest."""
        return int(self.snr.log().sub(torch.tensor(snr).log()).abs().argmin())

    def stratified(self, count: int) -> Tensor:
        """Random timesteps, one from each of `count` equal parts of the window, int64."""
        places = (torch.arange(count) + self.probe.noise_source.uniform(count)) / count
        return self.window[(places * len(self.window)).long()]

    def draw(self, pairs: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments t, eps and coefficients of `respond`, for `pairs` pairs and the timesteps t [n]."""
        coefficients = torch.stack([values[t] for values in (self.signal, self.noise, self.c, self.d)]).float()
        return t.repeat(pairs), self.probe.noise(len(t)), coefficients

    def implied_pairs(self, pairs: Pairs, t: Tensor) -> ImpliedPairs:
        """The response to pairs, with one noise per timestep t [n]; all pairs share the noises."""
        return ImpliedPairs(*self.probe.run(implied_pairs, *self.draw(len(pairs.mu), t), *pairs))

    def descend(
        self,
        objective: Objective,
        variables: Sequence[Tensor],
        *fixed: Tensor,
        rate: float,
        iterations: int,
        on_iteration: OnIteration,
    ) -> list[Tensor]:
        """The variables [K,C,H,W] after Adam steps, each at fresh timesteps and noises."""
        iteration = AdamIteration(objective, len(variables), rate, self.settings.range_weight)
        state = [*variables, *initial_moments(variables)]
        for _ in range(iterations):
            drawn = self.draw(len(variables[0]), self.stratified(self.settings.timesteps))
            loss, *state = self.probe.run(iteration, *drawn, *fixed, *state)
            on_iteration(float(loss.mean()))
        return state[: len(variables)]
