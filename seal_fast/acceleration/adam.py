"""A step of Adam as a function, so that an iteration that holds one is a function of tensors and can be recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS, EPSILON = (0.9, 0.999), 1e-8


def initial_moments(variables: Sequence[Tensor]) -> list[Tensor]:
    """For each variable its first and its second moment, in its shape, and the number of steps, []; all 0."""
    return [zero for x in variables for zero in (torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(()))]


def adam_step(
    variables: Sequence[Tensor], gradients: Sequence[Tensor], moments: Sequence[Tensor], rate: float
) -> tuple[Tensor, ...]:
    """The variables after a step, then their moments, as many as were given of both; those given stay as they are."""
    moved, new = ([x.detach().clone() for x in tensors] for tensors in (variables, moments))
    adam(
        moved,
        list(gradients),
        exp_avgs=new[0::3],
        exp_avg_sqs=new[1::3],
        max_exp_avg_sqs=[],
        state_steps=new[2::3],
        # on the GPU the number of steps is read there, since nothing may wait for it
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
