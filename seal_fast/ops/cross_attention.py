"""Cross-attention that also returns its maps: the attention that each place of the image pays to each text token.

With P = softmax(scale q k^T) over the N keys, per batch and head,

    out = P v                        maps[b,t,m] = mean over heads of P[b,h,m,tokens[t]]

and, for gradients dO of out and dA of maps (dA scattered to its tokens, zero elsewhere),

    G = dO v^T + dA / H              dS = P (G - rowsum(P G))
    dq = scale dS k                  dk = scale dS^T q                  dv = P^T dO

The average over heads is what prompt-to-prompt (Hertz et al., ICLR 2023) edits and what SKD-CAG (arXiv 2508.18235) compares.
The kernels recompute P in the backward pass, a few queries at a time, so no [B,H,M,N] is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seal_fast.ops import backends
from seal_fast.ops._arguments import check_tensor, computed_in, only
from seal_fast.ops._launch import SUFFIXES, launch
from seal_fast.ops.dispatch import Implementation, Op

Maybe = Tensor | None

_refuse_dtype = only(torch.float32, torch.bfloat16, torch.float16)


def reference_cross_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float) -> tuple[Tensor, Tensor]:
    """See `cross_attention`. Half precision is computed in float32."""
    p = _probabilities(q, k, scale)
    maps = _select(p.mean(1), tokens).transpose(1, 2).contiguous()
    return _like(q, p @ v.to(p.dtype)), maps


def reference_cross_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out_grad: Maybe, maps_grad: Maybe, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each empty unless `needs` asks for it. A gradient that is None counts as zero."""
    p = _probabilities(q, k, scale)
    q_grad, k_grad, v_grad = (x.new_empty(0) for x in (q, k, v))
    if needs[0] or needs[1]:
        g = torch.zeros_like(p) if out_grad is None else out_grad.to(p.dtype) @ v.to(p.dtype).transpose(2, 3)
        if maps_grad is not None:
            g = g + _scatter(maps_grad.transpose(1, 2) / q.shape[1], tokens, k.shape[2])[:, None]
        logit_grad = scale * p * (g - (p * g).sum(3, keepdim=True))
        q_grad = _like(q, logit_grad @ k.to(p.dtype)) if needs[0] else q_grad
        k_grad = _like(k, logit_grad.transpose(2, 3) @ q.to(p.dtype)) if needs[1] else k_grad
    if needs[2]:
        v_grad = _empty(v).zero_() if out_grad is None else _like(v, p.transpose(2, 3) @ out_grad.to(p.dtype))
    return q_grad, k_grad, v_grad


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype = computed_in(q)
    return torch.softmax(scale * (q.to(dtype) @ k.to(dtype).transpose(2, 3)), dim=3)


def _empty(x: Tensor) -> Tensor:
    """An empty tensor like x [B,H,M,D], in the memory order [B,M,H,D]: joining the heads, the next step, then takes no copy."""
    batches, heads, rows, dims = x.shape
    return x.new_empty(batches, rows, heads, dims).transpose(1, 2)


def _like(x: Tensor, values: Tensor) -> Tensor:
    return _empty(x).copy_(values)


def _select(maps: Tensor, tokens: Maybe) -> Tensor:
    return maps if tokens is None else maps.index_select(2, _in_range(tokens, maps.shape[2]))


def _scatter(grad: Tensor, tokens: Maybe, keys: int) -> Tensor:
    if tokens is None:
        return grad
    return grad.new_zeros(*grad.shape[:2], keys).index_add_(2, _in_range(tokens, keys), grad)


def _in_range(tokens: Tensor, keys: int) -> Tensor:
    """The tokens; ValueError unless all of them are keys. On a GPU the indexing itself checks, since this would wait for it."""
    if tokens.device.type == "cpu" and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < keys:
        raise ValueError(f"tokens must lie in 0 ... {keys - 1}, not {tokens.tolist()}")
    return tokens


def _fake(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float) -> tuple[Tensor, Tensor]:
    count = k.shape[2] if tokens is None else tokens.shape[0]
    return _empty(q), q.new_empty(q.shape[0], count, q.shape[2], dtype=computed_in(q))


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out_grad: Maybe, maps_grad: Maybe, needs: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(_empty(x) if need else x.new_empty(0) for x, need in zip((q, k, v), needs, strict=True))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _launch(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Maybe,
    scale: float,
    heads: dict[str, Maybe],
    maps: dict[str, Maybe],
) -> None:
    """Run a compiled kernel on q, k, v and tensors of its own, which have heads or are maps."""
    batches, count, queries, dims = q.shape
    keys = k.shape[2]
    numbers: dict[str, Any] = {"batches": batches, "heads": count, "queries": queries, "keys": keys, "dims": dims}
    numbers["map_rows"] = keys if tokens is None else len(tokens)
    backward = kernel == "cross_attention_backward"
    floats = backends.CPU.module.cross_attention_workspace(numbers, backward, torch.get_num_threads())
    heads = {"q": q, "k": k, "v": v, **heads}
    tensors = {**heads, **maps, "tokens": tokens, "workspace": torch.empty(floats, dtype=torch.float32)}
    numbers["scale"] = scale
    for name, x in heads.items():
        numbers[f"{name}_strides"] = (0, 0, 0, 0) if x is None else x.stride()
    launch(f"{kernel}_{SUFFIXES[q.dtype]}", tensors, numbers)


def _prepared(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    """q, k and v with dense rows, and tokens dense and in range."""
    tokens = None if tokens is None else _in_range(tokens, k.shape[2]).contiguous()
    return _dense_rows(q), _dense_rows(k), _dense_rows(v), tokens


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, tokens = _prepared(q, k, v, tokens)
    out, maps = _fake(q, k, v, tokens, scale)
    _launch("cross_attention_forward", q, k, v, tokens, scale, {"out": out}, {"maps": maps})
    return out, maps


def _forward_triton(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, tokens = _prepared(q, k, v, tokens)
    out, maps = _fake(q, k, v, tokens, scale)
    _run(backends.triton_kernels("cross_attention").forward(q, k, v, tokens, scale, out, maps), q)
    return out, maps


def _run(launches: list[Callable[[], None]], like: Tensor) -> None:
    with torch.cuda.device_of(like):
        for each in launches:
            each()


Fill = Callable[..., None]
"""Fills gradients of q, k and v. It is called with the arguments of the backward op, rows dense and maps_grad contiguous, but
instead of `needs` with the three gradients, None where nobody needs one."""


def _backward(
    fill: Fill,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Maybe,
    scale: float,
    out_grad: Maybe,
    maps_grad: Maybe,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    q, k, v, tokens = _prepared(q, k, v, tokens)
    out_grad = None if out_grad is None else _dense_rows(out_grad)
    maps_grad = None if maps_grad is None else maps_grad.contiguous()
    grads = [_empty(x) if need else None for x, need in zip((q, k, v), needs, strict=True)]
    if q.numel() == 0 or (out_grad is None and maps_grad is None):
        return tuple(x.new_empty(0) if grad is None else grad.zero_() for x, grad in zip((q, k, v), grads, strict=True))
    if out_grad is None and grads[2] is not None:
        grads[2].zero_()
    fill(q, k, v, tokens, scale, out_grad, maps_grad, *grads[:2], None if out_grad is None else grads[2])
    return tuple(x.new_empty(0) if grad is None else grad for x, grad in zip((q, k, v), grads, strict=True))


def _fill_cpu(
    q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out_grad: Maybe, maps_grad: Maybe, *grads: Maybe
) -> None:
    q_grad, k_grad, v_grad = grads
    heads = {"out_grad": out_grad, "q_grad": q_grad, "k_grad": k_grad, "v_grad": v_grad}
    _launch("cross_attention_backward", q, k, v, tokens, scale, heads, {"maps_grad": maps_grad})


def _fill_triton(
    q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out_grad: Maybe, maps_grad: Maybe, *grads: Maybe
) -> None:
    kernels = backends.triton_kernels("cross_attention")
    batches, heads, keys, dims = k.shape
    partial_shape = kernels.query_slices(q, k), batches, keys, heads, dims
    sums = [None if grad is None else k.new_empty(partial_shape, dtype=torch.float32) for grad in grads[1:]]
    _run(kernels.backward(q, k, v, tokens, scale, out_grad, maps_grad, grads[0], *sums), q)
    for grad, slices in zip(grads[1:], sums, strict=True):
        if grad is not None and slices is not None:
            grad.copy_(slices.sum(0).transpose(1, 2))


def _triton_missing() -> str | None:
    return backends.triton_missing("cross_attention")


def _refuse_triton(q: Tensor, k: Tensor, *_: Any) -> str | None:
    limits = backends.triton_kernels("cross_attention")
    if k.shape[2] > limits.MAX_KEYS:
        return f"its kernels take up to {limits.MAX_KEYS} keys, not {k.shape[2]}"
    if q.shape[3] > limits.MAX_DIMENSIONS:
        return f"its kernels take heads of up to {limits.MAX_DIMENSIONS} dimensions, not {q.shape[3]}"
    return _refuse_dtype(q)


forward_op = Op(
    "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? tokens, float scale) -> (Tensor, Tensor)",
    [
        Implementation("triton", _forward_triton, _triton_missing, _refuse_triton),
        Implementation("cpu", _forward_cpu, backends.CPU.missing, _refuse_dtype),
        Implementation("reference", reference_cross_attention),
    ],
    fake=_fake,
)
backward_op = Op(
    "cross_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? tokens, float scale, Tensor? out_grad, Tensor? maps_grad, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    [
        Implementation("triton", partial(_backward, _fill_triton), _triton_missing, _refuse_triton),
        Implementation("cpu", partial(_backward, _fill_cpu), backends.CPU.missing, _refuse_dtype),
        Implementation("reference", reference_cross_attention_backward),
    ],
    fake=_fake_backward,
)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, tokens)
        ctx.scale = scale
        return forward_op(q, k, v, tokens, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Maybe, maps_grad: Maybe) -> tuple[Maybe, ...]:
        if out_grad is None and maps_grad is None:
            return (None,) * 5
        q, k, v, tokens = ctx.saved_tensors
        # maps do not depend on v
        needs = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and out_grad is not None]
        grads = backward_op(q, k, v, tokens, ctx.scale, out_grad, maps_grad, needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its head-averaged maps, differentiable through both.

    Args:
        q: queries [B,H,M,D]: float32, bfloat16, float16 or float64. Strides are free, but rows that are not dense are copied;
            those of a view of [B,M,H*D] are dense.
        k: keys [B,H,N,D], dtype and device of q.
        v: values [B,H,N,D], dtype and device of q.
        tokens: int64 [T], the keys whose maps are returned, in any order, repeats allowed; None for all N.
        scale: factor on q k^T; None for 1 / sqrt(D).

    Returns:
        out [B,H,M,D] in the dtype of q, and maps [B,T,M], the attention that each place pays to each token, averaged over
        heads: float32, or float64 for float64 inputs. Differentiable once in q, k and v; gradients that nobody needs are not
        computed. Sums are float32 for half precision. out lies in memory as [B,M,H,D].

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or a token that is not a key (on a GPU the indexing fails).
    """
    check_tensor("q", q, ("B", "H", "M", "D"))
    check_tensor("k", k, (*q.shape[:2], "N", q.shape[3]), q, q.dtype)
    check_tensor("v", v, k.shape, q, q.dtype)
    check_tensor("tokens", tokens, ("T",), q, torch.int64)
    if 0 in (q.shape[1], q.shape[3], k.shape[2]):
        raise ValueError(f"there must be a head, a dimension and a key: q {list(q.shape)}, k {list(k.shape)}")
    return _CrossAttention.apply(q, k, v, tokens, q.shape[3] ** -0.5 if scale is None else scale)
