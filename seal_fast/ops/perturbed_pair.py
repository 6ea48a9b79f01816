"""Two noised inputs that share image and timestep: what TERD's reversed loss (arXiv 2409.05294) is taken at.

    x_i = a x0 + b gamma eps_i + c mu        i = 1, 2

The noises are `counter_normal`'s draws 0 and 1 of a seed. The loss needs their difference only, so they are made where they are
used and never stored; the backward pass makes them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seal_fast.ops import native
from seal_fast.ops.counter_normal import check_seed, counter_normal_op, reference_counter_normal, signed
from seal_fast.ops.dispatch import Op
from seal_fast.ops.rows import address, check_groups, check_rows, columns, implementations, matrices, served, serving, stream


class PerturbedPair(NamedTuple):
    """Both noised inputs [2,R,...], and the difference of their noises eps_1 - eps_2 [R,...]."""

    inputs: Tensor
    difference: Tensor


def reference_perturbed_pair(x0: Tensor, mu: Tensor, gamma: Tensor, coefficients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """[2,R,D] and [R,D] in the dtype of x0, from x0 [R,D], mu and gamma [K,D], coefficients [G,3]; see `perturbed_pair`."""
    a, b, c = columns(coefficients, x0)
    first, second = (reference_counter_normal(x0, seed, draw) for draw in (0, 1))
    shifted, scale = a * x0 + c * serving(mu, len(x0)), b * serving(gamma, len(x0))
    return torch.stack([shifted + scale * first, shifted + scale * second]), first - second


def _outputs(x0: Tensor) -> tuple[Tensor, Tensor]:
    return x0.new_empty(2, *x0.shape), torch.empty_like(x0)


def _call(*tensors: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Addresses and sizes as the kernels take them, of all arguments and results."""
    x0, mu, _, coefficients, _, _ = tensors
    return tuple(map(address, tensors)), (*x0.shape, len(mu), len(coefficients))


def _perturbed_pair_cpu(x0: Tensor, mu: Tensor, gamma: Tensor, coefficients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    outputs = _outputs(x0)
    native.CPU.module.perturbed_pair(*_call(x0, mu, gamma, coefficients, *outputs), seed, torch.get_num_threads())
    return outputs


def _perturbed_pair_cuda(x0: Tensor, mu: Tensor, gamma: Tensor, coefficients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    outputs = _outputs(x0)
    if x0.numel():
        call = _call(x0, mu, gamma, coefficients, *outputs)
        native.CUDA.module.perturbed_pair(*call, seed, x0.device.index, stream(x0))
    return outputs


perturbed_pair_op = Op(
    "perturbed_pair(Tensor x0, Tensor mu, Tensor gamma, Tensor coefficients, int seed) -> (Tensor, Tensor)",
    implementations(_perturbed_pair_cuda, _perturbed_pair_cpu, reference_perturbed_pair),
    fake=lambda x0, *_: _outputs(x0),
)


class _PerturbedPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, mu: Tensor, gamma: Tensor, coefficients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(coefficients)
        ctx.seed, ctx.candidates = seed, len(mu)
        inputs, difference = perturbed_pair_op(x0, mu, gamma, coefficients, seed)
        ctx.mark_non_differentiable(difference)
        return inputs, difference

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (coefficients,) = ctx.saved_tensors
        need_x0, need_mu, need_gamma, _, _ = ctx.needs_input_grad
        total = grad.sum(0)
        a, b, c = columns(coefficients, total)
        gamma_grad = None
        if need_gamma:
            first, second = (counter_normal_op(total.detach(), ctx.seed, draw) for draw in (0, 1))
            gamma_grad = served(b * (grad[0] * first + grad[1] * second), ctx.candidates)
        mu_grad = served(c * total, ctx.candidates) if need_mu else None
        return a * total if need_x0 else None, mu_grad, gamma_grad, None, None


def perturbed_pair(x0: Tensor, mu: Tensor, gamma: Tensor, coefficients: Tensor, seed: int) -> PerturbedPair:
    """Noise R images twice, for K candidates; the formula is at the top of this file.

    Args:
        x0: images [R, ...], any floating point dtype.
        mu: shifts of the candidates [K, ...], K a divisor of R; each serves R / K consecutive rows.
        gamma: their noise scales, same shape.
        coefficients: float64 [G,3], a, b and c; G divides R likewise. With a timestep per row, G = R.
        seed: 0 ... 2^64 - 1, of the noise; row r gets the same whatever R is.

    Returns:
        The inputs, differentiable (twice) in x0, mu and gamma, and the difference of the noises, in the dtype of x0. Half
        precision is computed in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or a seed out of range.
    """
    check_rows(x0)
    check_groups(x0, tuple(x0.shape[1:]), mu=mu, gamma=gamma)
    check_groups(x0, (3,), coefficients=coefficients)
    check_seed(seed=seed)
    if mu.shape != gamma.shape:
        raise ValueError(f"mu and gamma must have one shape, not {tuple(mu.shape)} and {tuple(gamma.shape)}")
    inputs, difference = _PerturbedPair.apply(*matrices(x0, mu, gamma), coefficients.double().contiguous(), signed(seed))
    return PerturbedPair(inputs.to(x0.dtype).view(2, *x0.shape), difference.to(x0.dtype).view(x0.shape))
