"""TERD's reversed loss (arXiv 2409.05294) of two predictions f for inputs that differ in their noise only, per candidate:

    L = mean over rows of 1/2 || r ||^2,        r = (eps_1 - f_1) - (eps_2 - f_2) = difference - (f_1 - f_2)

r is also the gradient, up to signs and the mean: the pass that sums it up keeps it, and the backward pass only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seal_fast.ops import native
from seal_fast.ops.dispatch import Op
from seal_fast.ops.rows import address, check_rows, implementations, matrices, stream


def reference_reversed_loss(first: Tensor, second: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 ||r||^2 float64 [R], and r [R,D] in the dtype of the arguments, all [R,D]."""
    residual = difference - (first - second)
    return residual.double().square().sum(1) / 2, residual


def _outputs(first: Tensor) -> tuple[Tensor, Tensor]:
    return first.new_empty(len(first), dtype=torch.float64), torch.empty_like(first)


def _reversed_loss_cpu(first: Tensor, second: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    outputs = _outputs(first)
    addresses = tuple(address(t) for t in (first, second, difference, *outputs))
    native.CPU.module.reversed_loss(addresses, *first.shape, torch.get_num_threads())
    return outputs


def _reversed_loss_cuda(first: Tensor, second: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    outputs = _outputs(first)
    if first.numel():
        addresses = tuple(address(t) for t in (first, second, difference, *outputs))
        native.CUDA.module.reversed_loss(addresses, *first.shape, first.device.index, stream(first))
    return outputs


reversed_loss_op = Op(
    "reversed_loss(Tensor first, Tensor second, Tensor difference) -> (Tensor, Tensor)",
    implementations(_reversed_loss_cuda, _reversed_loss_cpu, reference_reversed_loss),
    fake=lambda first, second, difference: _outputs(first),
)


class _ReversedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, difference: Tensor) -> Tensor:
        losses, residual = reversed_loss_op(first, second, difference)
        ctx.save_for_backward(residual)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        need_first, need_second, need_difference = ctx.needs_input_grad
        scaled = grad.to(residual.dtype)[:, None] * residual
        return -scaled if need_first else None, scaled if need_second else None, scaled if need_difference else None


def reversed_loss(first: Tensor, second: Tensor, difference: Tensor, candidates: int = 1) -> Tensor:
    """The loss of K candidates with R / K consecutive rows each.

    Args:
        first: predictions for the first inputs [R, ...], any floating point dtype.
        second: those for the second, same shape.
        difference: of the noises, eps_1 - eps_2, same shape.
        candidates: K, a divisor of R, which must not be 0.

    Returns:
        [K], float64 if an argument is, else float32; squares are summed in float64. Differentiable once in all three.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or candidates that do not divide the rows.
    """
    check_rows(first, second=second, difference=difference)
    if candidates < 1 or len(first) == 0 or len(first) % candidates:
        raise ValueError(f"candidates must divide the rows, of which there must be some: {candidates}, {len(first)} rows")
    rows = matrices(first, second, difference)
    losses = _ReversedLoss.apply(*rows).unflatten(0, (candidates, -1)).mean(1)
    return losses if torch.float64 in (first.dtype, second.dtype, difference.dtype) else losses.float()
