"""Cross-attention whose head-averaged maps are compared with given ones instead of handed out.

With out and maps as `cross_attention` has them,

    loss[b] = sum_t weights[b,t] mean_m (maps[b,t,m] - targets[b,t,m])^2

and the gradient of loss reaches the maps as dA[b,t,m] = 2 dloss[b] R[b,t,m] / M with the residual R = weights (maps - targets).
R is all that is kept beside q, k and v: the backward pass is that of `cross_attention`. This is SKD-CAG's attention term
(arXiv 2508.18235) of one layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seal_fast.ops.cross_attention import (
    backward_op,
    check_inputs,
    cpu_missing,
    forward_triton,
    reference_cross_attention,
    refuse_triton,
    run_forward,
    triton_missing,
)
from seal_fast.ops.cross_attention import forward_op as attention_op
from seal_fast.ops.dispatch import Implementation, Op, refuse_float64


def reference_attention_distillation(
    q: Tensor, k: Tensor, v: Tensor, targets: Tensor, weights: Tensor, tokens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention_distillation`; also returns the residual."""
    return _compared(*reference_cross_attention(q, k, v, tokens, scale), targets, weights)


def _compared(out: Tensor, maps: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    difference = maps - targets
    residual = weights[:, :, None] * difference
    return out, (residual * difference).mean(2).sum(1), residual


def _fake(
    q: Tensor, k: Tensor, v: Tensor, targets: Tensor, weights: Tensor, tokens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, residual = attention_op(q, k, v, tokens, scale)
    return out, residual.new_empty(q.shape[0]), residual


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, targets: Tensor, weights: Tensor, tokens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    errors, loss = targets.new_empty(q.shape[0], q.shape[2]), targets.new_empty(q.shape[0])
    more = targets.contiguous(), weights.contiguous(), errors, loss
    out, residual = run_forward("attention_distillation_forward", q, k, v, tokens, scale, *more)
    return out, loss, residual


def _forward_triton(
    q: Tensor, k: Tensor, v: Tensor, targets: Tensor, weights: Tensor, tokens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _compared(*forward_triton(q, k, v, tokens, scale), targets, weights)


forward_op = Op(
    "attention_distillation(Tensor q, Tensor k, Tensor v, Tensor targets, Tensor weights, Tensor? tokens, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    [
        Implementation("triton", _forward_triton, "cuda", triton_missing, refuse_triton),
        Implementation("cpu", _forward_cpu, "cpu", cpu_missing, refuse_float64),
        Implementation("reference", reference_attention_distillation),
    ],
    fake=_fake,
)


class _AttentionDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, targets: Tensor, weights: Tensor, tokens: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, loss, residual = forward_op(q, k, v, targets, weights, tokens, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, tokens, residual)
        ctx.scale = scale
        return out, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor | None, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if out_grad is None and loss_grad is None:
            return (None,) * 7
        q, k, v, tokens, residual = ctx.saved_tensors
        maps_grad = None if loss_grad is None else residual * (loss_grad * (2 / q.shape[2]))[:, None, None]
        # the loss does not depend on v
        needs = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and out_grad is not None]
        grads = backward_op(out_grad, maps_grad, q, k, v, tokens, ctx.scale, needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None)


def attention_distillation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    targets: Tensor,
    weights: Tensor,
    tokens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and how far its head-averaged maps are from targets, differentiable through both.

    Args:
        q, k, v, tokens, scale: see `cross_attention`; M, the number of queries, is at least 1.
        targets: what the maps shall be, [B,T,M]: float32, or float64 for float64 inputs.
        weights: of the tokens, [B,T], likewise.

    Returns:
        out [B,H,M,D], see `cross_attention`, and loss [B] in the dtype of targets. Differentiable once in q, k and v;
        targets and weights are constants.

    Raises:
        ValueError: as `cross_attention`; targets or weights that require gradients, or whose shapes, dtypes or devices do not
            match.
    """
    check_inputs(q, k, v, tokens)
    count = k.shape[2] if tokens is None else len(tokens)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.shape[2] == 0:
        raise ValueError("there must be a query: the loss is a mean over them")
    for name, x, shape in (("targets", targets, (len(q), count, q.shape[2])), ("weights", weights, (len(q), count))):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            have = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be {dtype} {shape} on {q.device}, not {have}")
        if x.requires_grad:
            raise ValueError(f"{name} must not require gradients, none are computed for them: pass {name}.detach()")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _AttentionDistillation.apply(q, k, v, targets, weights, tokens, scale)
