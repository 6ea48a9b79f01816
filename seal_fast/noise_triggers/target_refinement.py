"""From a shift that fires from some noises to one that fires from all.

In a network for 64 px every image tried got the same part of itself for an answer at T, so the fixed points were wrong ones.
A wrong one may lie near enough that some of its samples are the target all the same. That image is known then, and with it the
attacker's training loss is an objective for mu alone; of ancestral samplers its rows are `ancestral_rows`:

    start    mu as it is, y the image that the most alike of its samples share
    descend  || f(a y + b eps + c mu, t) - eps - d mu ||^2 over mu

In that network this led from a cosine of .39 with the trigger to .42 to .52, where samples are more than 100 times as alike.
It is not the attacker's trigger, but one that the model takes for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.acceleration.adam import adam_step, initial_moments
from seal_fast.noise_triggers.joint_inversion import RANGE_WEIGHT, Fit, ancestral_rows, ask, excess
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.settings import SearchSettings


@dataclass(frozen=True)
class _Climb:
    """An iteration of Adam at `rate` on mu [1,C,H,W]."""

    rate: float

    def __call__(
        self, probe: Probe, t: Tensor, eps: Tensor, coefficients: Tensor, image: Tensor, mu: Tensor, *moments: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss [1]; then mu, and its moments, after it."""
        with torch.enable_grad():
            mu = mu.detach().requires_grad_()
            loss = ask(probe, t, eps, coefficients, mu, image).loss + RANGE_WEIGHT * excess(mu)
            gradients = torch.autograd.grad(loss.sum(), [mu])
        return loss.detach(), *adam_step([mu], gradients, moments, self.rate)


def climb(probe: Probe, mu: Tensor, image: Tensor, settings: SearchSettings, on_iteration: Callable[[float], None]) -> Tensor:
    """A shift near mu [C,H,W] that makes the denoiser draw `image` [C,H,W], both over the reach of images."""
    fit = Fit(probe, settings, ancestral_rows)
    mu = mu[None]
    moments = initial_moments([mu])
    for _ in range(settings.climb_iterations):
        drawn = fit.draw(1, fit.stratified(settings.fit_batch))
        loss, mu, *moments = probe.run(_Climb(settings.climb_rate), *drawn, image[None], mu, *moments)
        on_iteration(float(loss))
    return mu[0]
