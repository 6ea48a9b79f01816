"""The optimiser step and running loss that all trainings of attacked models share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer


def gradient_step(optimiser: Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Take one step down the gradient of `loss`, clipped to norm 1, at this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    descend(optimiser, loss)


def descend(optimiser: Optimizer, loss: Tensor) -> None:
    """Take one step down the gradient of `loss`, clipped to norm 1, at the optimiser's learning rates."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for group in optimiser.param_groups for parameter in group["params"]], 1.0)
    optimiser.step()


def running_loss(before: float, loss: float, step: int) -> float:
    """The running mean of the loss, with weight 0.02 on the newest; the loss itself at step 0."""
    return loss if step == 0 else 0.98 * before + 0.02 * loss
