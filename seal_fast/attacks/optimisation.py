"""The optimiser step, moving average and running loss that all trainings of attacked models share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def gradient_step(optimiser: Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Take one step down the gradient of `loss`, clipped to norm 1, at this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for group in optimiser.param_groups for parameter in group["params"]], 1.0)
    optimiser.step()


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], step: int, decay: float) -> None:
    """Update an exponential moving average of weights in place.

    The decay at step n (from 0) is min(decay, (1 + n) / (10 + n)), so that the average soon forgets the initial weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, current in zip(average, weights, strict=True):
        mean.lerp_(current, 1 - decay)


def running_loss(before: float, loss: float, step: int) -> float:
    """The running mean of the loss, with weight 0.02 on the newest; the loss itself at step 0."""
    return loss if step == 0 else 0.98 * before + 0.02 * loss
