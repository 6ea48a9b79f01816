"""One Adam step as a function of tensors, so that an iteration with one can be recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS, EPSILON = (0.9, 0.999), 1e-8


def initial_moments(variables: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for each variable: its first and its second moment, in its shape, and the number of steps, []."""
    return [zero for x in variables for zero in (torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(()))]


def adam_step(
    variables: Sequence[Tensor], gradients: Sequence[Tensor], moments: Sequence[Tensor], rate: float
) -> tuple[Tensor, ...]:
    """The variables after one step, then their moments, as copies.

    Args:
        variables: any number of tensors.
        gradients: one per variable.
        moments: three per variable, as `initial_moments` returns them.
        rate: learning rate.
    """
    moved, new = ([x.detach().clone() for x in tensors] for tensors in (variables, moments))
    adam(
        moved,
        list(gradients),
        exp_avgs=new[0::3],
        exp_avg_sqs=new[1::3],
        max_exp_avg_sqs=[],
        state_steps=new[2::3],
        # the GPU reads the number of steps itself: a CUDA graph cannot wait for it
        capturable=moved[0].is_cuda,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=rate,
        weight_decay=0,
        eps=EPSILON,
        maximize=False,
    )
    return *moved, *new
