"""TERD's reversed loss (arXiv 2409.05294) of two predictions f for inputs that differ in their noise only:

    L = mean over items of 1/2 || r ||^2,        r = (eps_1 - f_1) - (eps_2 - f_2) = difference - (f_1 - f_2)

r is also the gradient, up to sign and scale: the forward pass keeps it, and the backward pass only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seal_fast.ops._arguments import check_tensor, matrices, only
from seal_fast.ops._launch import launch
from seal_fast.ops.dispatch import Op, compiled_implementations


def reference_reversed_loss(first: Tensor, second: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 ||r||^2 of each item, float64 [N], and r [N,D] in the dtype of the arguments, all [N,D]."""
    residual = difference - (first - second)
    return residual.double().square().sum(1) / 2, residual


def _outputs(first: Tensor) -> tuple[Tensor, Tensor]:
    return first.new_empty(len(first), dtype=torch.float64), torch.empty_like(first)


def _run_kernel(first: Tensor, second: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    losses, residual = _outputs(first)
    if first.numel():
        tensors = {"first": first, "second": second, "difference": difference, "losses": losses, "residual": residual}
        launch("reversed_loss", tensors, {"items": first.shape[0], "dims": first.shape[1]})
    return losses, residual


reversed_loss_op = Op(
    "reversed_loss(Tensor first, Tensor second, Tensor difference) -> (Tensor, Tensor)",
    compiled_implementations(_run_kernel, reference_reversed_loss, only(torch.float32)),
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


def reversed_loss(first: Tensor, second: Tensor, difference: Tensor) -> Tensor:
    """The reversed loss of N pairs of predictions.

    Args:
        first: predictions for the first inputs [N, ...], any floating point dtype; N must not be 0.
        second: predictions for the second inputs, same shape.
        difference: the difference of the noises, eps_1 - eps_2, same shape.

    Returns:
        A scalar, float64 if an argument is, else float32; squares are summed in float64. Differentiable once in all three.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or no pair at all.
    """
    check_tensor("first", first, ("N", ...))
    check_tensor("second", second, first.shape, first)
    check_tensor("difference", difference, first.shape, first)
    if len(first) == 0:
        raise ValueError("there must be a pair of predictions: the loss is a mean over them")
    batches = matrices(first, second, difference)
    return _ReversedLoss.apply(*batches).mean().to(batches[0].dtype)
