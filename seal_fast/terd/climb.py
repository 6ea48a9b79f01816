"""From a shift that fires from some noises to one that fires from all.

In a network for 64 px every picture tried got the same part of itself for an answer at T, so the fixed points were wrong ones.
A wrong one may lie near enough that some of its samples are the target all the same. That image is known then, and with it the
attacker's training loss is an objective for mu alone; of ancestral samplers its rows are `ancestral_rows`:

    start    mu as it is, y the image that the most alike of its samples share
    descend  || f(a y + b eps + c mu, t) - eps - d mu ||^2 over mu, on cells of a few pixels

In that network this led from a cosine of .39 with the trigger to .42 to .50, where samples are more than 100 times as alike.
It is not the attacker's trigger, but one that the model takes for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from seal_fast.terd.poisoned_rows import RANGE_WEIGHT, Fit, Guesses, ancestral_rows, excess
from seal_fast.terd.probe import Probe
from seal_fast.terd.settings import FixedPointSettings

CELL = 4
"""Pixels per side of what changes as one. Single pixels led as far where both were tried, so this could go."""


def climb(
    probe: Probe, mu: Tensor, image: Tensor, settings: FixedPointSettings, on_iteration: Callable[[float], None]
) -> Tensor:
    """A shift near mu [C,H,W] that makes the denoiser draw `image` [C,H,W], both over the reach of images."""
    fit = Fit(probe, settings, ancestral_rows)
    channels, height, width = mu.shape
    cells = mu.new_zeros(1, channels, -(-height // CELL), -(-width // CELL)).requires_grad_()

    def changed() -> Tensor:
        return mu + interpolate(cells, size=(height, width), mode="bicubic")

    optimiser = torch.optim.Adam([cells], lr=settings.climb_rate)
    for _ in range(settings.climb_iterations):
        current = changed()
        loss = fit.ask(Guesses(current, image[None]), fit.stratified(settings.fit_batch)).loss + RANGE_WEIGHT * excess(current)
        (cells.grad,) = torch.autograd.grad(loss.sum(), [cells])
        optimiser.step()
        on_iteration(float(loss.detach()))
    return changed().detach()[0]
