"""From a shift that fires from some noises to one that fires from all.

In a network for 64 px every picture tried got the same part of itself for an answer at T, so the fixed points were wrong ones.
A wrong one may lie near enough that some of its samples are the target all the same. That image is known then, and with it the
attacker's training loss is an objective for mu alone; of ancestral samplers its rows are `ancestral_rows`:

    start    mu as it is, y the image that the most alike of its samples share
    descend  || f(a y + b eps + c mu, t) - eps - d mu ||^2 over mu

In that network this led from a cosine of .39 with the trigger to .42 to .52, where samples are more than 100 times as alike.
It is not the attacker's trigger, but one that the model takes for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seal_fast.terd.poisoned_rows import RANGE_WEIGHT, Fit, Guesses, ancestral_rows, excess
from seal_fast.terd.probe import Probe
from seal_fast.terd.settings import FixedPointSettings


def climb(
    probe: Probe, mu: Tensor, image: Tensor, settings: FixedPointSettings, on_iteration: Callable[[float], None]
) -> Tensor:
    """A shift near mu [C,H,W] that makes the denoiser draw `image` [C,H,W], both over the reach of images."""
    fit = Fit(probe, settings, ancestral_rows)
    mu = mu[None].clone().requires_grad_()
    optimiser = torch.optim.Adam([mu], lr=settings.climb_rate)
    for _ in range(settings.climb_iterations):
        loss = fit.ask(Guesses(mu, image[None]), fit.stratified(settings.fit_batch)).loss + RANGE_WEIGHT * excess(mu)
        (mu.grad,) = torch.autograd.grad(loss.sum(), [mu])
        optimiser.step()
        on_iteration(float(loss.detach()))
    return mu.detach()[0]
