"""Group normalisation (Wu and He 2018) and SiLU in one pass, as they precede every convolution of a diffusion UNet.

    u = (h - mean) / deviation,  out = z / (1 + exp(-z)),  z = weight u + bias,     h = x + shift

mean and variance (biased, plus eps) are those of a group of neighbouring channels in one image. The weights are constants,
since a model under examination is frozen: only x, mean and deviation are kept for the gradient of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from seal_fast.ops import backends
from seal_fast.ops._arguments import check_constant, check_tensor, computed_in, only
from seal_fast.ops._launch import SUFFIXES, launch
from seal_fast.ops.dispatch import Implementation, Op

_refuse = only(torch.float32, torch.bfloat16)


def _grouped(x: Tensor, shift: Tensor | None, groups: int) -> Tensor:
    """h as [N, groups, channels of a group, pixels]."""
    h = x.to(computed_in(x))
    if shift is not None:
        h = h + shift.to(h.dtype)[:, :, None, None]
    return h.reshape(len(x), groups, -1, x.shape[2] * x.shape[3])


def _per_group(channels: Tensor, like: Tensor) -> Tensor:
    """Values of channels [C] in a shape that broadcasts with `_grouped`."""
    return channels.to(like.dtype).view(1, like.shape[1], -1, 1)


def reference_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """out [N,C,H,W] in the dtype of x, and mean and 1 / deviation [N,groups,2]; see `group_norm_silu`."""
    h = _grouped(x, shift, groups)
    mean = h.mean((2, 3))
    stats = torch.stack([mean, (h.var((2, 3), correction=0) + eps).rsqrt()], dim=2)
    u = (h - stats[:, :, 0, None, None]) * stats[:, :, 1, None, None]
    out = silu(u * _per_group(weight, h) + _per_group(bias, h))
    return out.view(x.shape).to(x.dtype, memory_format=torch.channels_last), stats


def reference_group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, stats: Tensor, groups: int
) -> Tensor:
    """The gradient of x for the gradient `grad` of out."""
    h, scale = _grouped(x, shift, groups), stats[:, :, 1, None, None]
    u = (h - stats[:, :, 0, None, None]) * scale
    z = u * _per_group(weight, h) + _per_group(bias, h)
    s = z.sigmoid()
    along_u = _per_group(weight, h) * grad.to(h.dtype).reshape(h.shape) * s * (1 + z * (1 - s))
    centred = along_u - along_u.mean((2, 3), keepdim=True) - u * (along_u * u).mean((2, 3), keepdim=True)
    return (centred * scale).view(x.shape).to(x.dtype, memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _new_stats(x: Tensor, groups: int) -> Tensor:
    return x.new_empty(len(x), groups, 2, dtype=computed_in(x))


def _workspace(x: Tensor) -> Tensor:
    return torch.empty(len(x), 4, x.shape[1])


def _sizes(x: Tensor, groups: int) -> dict[str, float]:
    images, channels, height, width = x.shape
    return {"images": images, "pixels": height * width, "channels": channels, "groups": groups}


def _run_forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    out, stats, workspace = _like(x), _new_stats(x, groups), _workspace(x)
    tensors = {"x": x, "shift": shift, "weight": weight, "bias": bias, "stats": stats, "workspace": workspace, "out": out}
    numbers = _sizes(x, groups)
    numbers["eps"] = eps
    launch(f"group_norm_silu_{SUFFIXES[x.dtype]}", tensors, numbers)
    return out, stats


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, stats: Tensor, groups: int
) -> Tensor:
    grad, x = _dense(grad), _dense(x)
    x_grad, workspace = _like(x), _workspace(x)
    tensors = {"x": x, "shift": shift, "weight": weight, "bias": bias, "stats": stats, "workspace": workspace}
    tensors |= {"grad": grad, "x_grad": x_grad}
    launch(f"group_norm_silu_backward_{SUFFIXES[x.dtype]}", tensors, _sizes(x, groups))
    return x_grad


group_norm_silu_op = Op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps) -> (Tensor, Tensor)",
    [
        Implementation("cpu", _run_forward, backends.CPU.missing, _refuse),
        Implementation("reference", reference_group_norm_silu),
    ],
    fake=lambda x, weight, bias, shift, groups, eps: (_like(x), _new_stats(x, groups)),
)
group_norm_silu_backward_op = Op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? shift, Tensor stats, int groups)"
    " -> Tensor",
    [
        Implementation("cpu", _run_backward, backends.CPU.missing, _refuse),
        Implementation("reference", reference_group_norm_silu_backward),
    ],
    fake=lambda grad, x, *_: _like(x),
)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float) -> Tensor:
        out, stats = group_norm_silu_op(x, weight, bias, shift, groups, eps)
        ctx.groups = groups
        ctx.save_for_backward(x, weight, bias, shift, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, shift, stats = ctx.saved_tensors
        x_grad = group_norm_silu_backward_op(grad, x, weight, bias, shift, stats, ctx.groups)
        shift_grad = x_grad.sum((2, 3), dtype=shift.dtype) if ctx.needs_input_grad[3] else None
        return x_grad if ctx.needs_input_grad[0] else None, None, None, shift_grad, None, None


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None = None) -> Tensor:
    """SiLU of the group normalisation of x + shift.

    Args:
        x: [N,C,H,W], any floating point dtype; channels-last, or it is copied to be so.
        weight: [C], constant.
        bias: [C], constant.
        groups: a divisor of C.
        eps: added to the variance.
        shift: [N,C], added to every pixel; None for none. UNets add the embedding of the timestep here.

    Returns:
        [N,C,H,W] in the dtype of x, channels-last; differentiable once in x and shift. Half precision is computed in float32.

    Raises:
        ValueError: shapes or dtypes that do not match, or weights that require gradients.
    """
    check_tensor("x", x, ("N", "C", "H", "W"))
    if x.numel() == 0:
        raise ValueError(f"x must have no size 0, but is {list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the channels: {groups}, {x.shape[1]} channels")
    check_tensor("weight", weight, x.shape[1:2], x)
    check_tensor("bias", bias, x.shape[1:2], x)
    check_tensor("shift", shift, x.shape[:2], x)
    if torch.is_grad_enabled():
        check_constant("weight", weight)
        check_constant("bias", bias)
    dtype = computed_in(x)
    weight, bias = weight.to(dtype).contiguous(), bias.to(dtype).contiguous()
    shift = None if shift is None else shift.to(dtype).contiguous()
    return _GroupNormSilu.apply(x, weight, bias, shift, groups, eps)
