"""One step of any sampler that evaluates the denoiser once per step: DDIM, DPM-Solver++, ancestral; with TrojDiff's trigger.

At x = a x0 + b n the denoiser predicts eps. With a trigger (mu, gamma) the noise is n = gamma eps + mu (TrojDiff, Chen et al.,
CVPR 2023), so the clean image is

    x0 = (x - b n) / a                                    clamped to [-limit, limit]

and since n is determined by x and x0, every such step is

    out = from_x x + from_image x0 + from_mu mu + from_fresh gamma z + from_previous p

with fresh noise z (ancestral sampling) and the image p of the step before (DPM-Solver++). The coefficients decide which sampler
the step belongs to, see `seal_fast.diffusion.samplers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seal_fast.ops._arguments import check_tensor, computed_in, only
from seal_fast.ops._launch import launch
from seal_fast.ops.dispatch import Op, compiled_implementations


class StepCoefficients(NamedTuple):
    """The coefficients of one step, see above. a must not be 0."""

    a: float
    b: float
    from_x: float
    from_image: float
    from_mu: float = 0.0
    from_fresh: float = 0.0
    from_previous: float = 0.0


class _Rounded(NamedTuple):
    """`StepCoefficients` in the dtype of the images: scalars on the CPU, which mix with tensors of any device."""

    a: Tensor
    b: Tensor
    from_x: Tensor
    from_image: Tensor
    from_mu: Tensor
    from_fresh: Tensor
    from_previous: Tensor


def _rounded(coefficients: Sequence[float], like: Tensor) -> _Rounded:
    return _Rounded(*torch.tensor(coefficients, dtype=like.dtype, device="cpu").unbind())


def _image(x: Tensor, eps: Tensor, c: _Rounded, mu: Tensor | None, gamma: Tensor | None) -> Tensor:
    """x0 before the clamp."""
    noise = eps if gamma is None else gamma * eps
    return (x - c.b * (noise if mu is None else noise + mu)) / c.a


def reference_sampler_step(
    x: Tensor,
    eps: Tensor,
    coefficients: Sequence[float],
    mu: Tensor | None,
    gamma: Tensor | None,
    fresh: Tensor | None,
    previous: Tensor | None,
    limit: float,
) -> Tensor:
    """[N,D] in the dtype of x, from batches [N,D], and mu and gamma [D]; see `sampler_step`."""
    c = _rounded(coefficients, x)
    out = c.from_x * x + c.from_image * _image(x, eps, c, mu, gamma).clamp(-limit, limit)
    if mu is not None:
        out = out + c.from_mu * mu
    if fresh is not None:
        out = out + c.from_fresh * (fresh if gamma is None else gamma * fresh)
    if previous is not None:
        out = out + c.from_previous * previous
    return out


def _run_kernel(
    x: Tensor,
    eps: Tensor,
    coefficients: Sequence[float],
    mu: Tensor | None,
    gamma: Tensor | None,
    fresh: Tensor | None,
    previous: Tensor | None,
    limit: float,
) -> Tensor:
    out = torch.empty_like(x)
    if out.numel():
        tensors = {"x": x, "eps": eps, "mu": mu, "gamma": gamma, "fresh": fresh, "previous": previous, "out": out}
        numbers = dict(zip(StepCoefficients._fields, coefficients, strict=True))
        numbers["items"], numbers["dims"] = x.shape
        numbers["limit"] = limit
        launch("sampler_step", tensors, numbers)
    return out


sampler_step_op = Op(
    "sampler_step(Tensor x, Tensor eps, float[] coefficients, Tensor? mu, Tensor? gamma, Tensor? fresh, Tensor? previous, "
    "float limit) -> Tensor",
    compiled_implementations(_run_kernel, reference_sampler_step, only(torch.float32)),
    fake=lambda x, *_: torch.empty_like(x),
)


class _SamplerStep(torch.autograd.Function):
    """The step is linear in everything but gamma, so its backward pass is a handful of products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, coefficients: StepCoefficients, *others: Any) -> Tensor:
        *tensors, limit = others
        ctx.coefficients, ctx.limit = coefficients, limit
        ctx.save_for_backward(x, eps, *tensors)
        return sampler_step_op(x, eps, coefficients, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, eps, mu, gamma, fresh, _ = ctx.saved_tensors
        need_x, need_eps, _, need_mu, need_gamma, need_fresh, need_previous, _ = ctx.needs_input_grad
        c = _rounded(ctx.coefficients, x)
        image = c.from_image / c.a * grad
        if ctx.limit < math.inf:
            image = image * (_image(x, eps, c, mu, gamma).abs() <= ctx.limit)
        noise, fresh_grad = -c.b * image, c.from_fresh * grad
        gamma_grad = None
        if need_gamma:
            gamma_grad = (noise * eps if fresh is None else noise * eps + fresh_grad * fresh).sum(0)
        return (
            c.from_x * grad + image if need_x else None,
            (noise if gamma is None else noise * gamma) if need_eps else None,
            None,
            (noise + c.from_mu * grad).sum(0) if need_mu else None,
            gamma_grad,
            (fresh_grad if gamma is None else fresh_grad * gamma) if need_fresh else None,
            c.from_previous * grad if need_previous else None,
            None,
        )


def sampler_step(
    x: Tensor,
    eps: Tensor,
    coefficients: StepCoefficients,
    *,
    mu: Tensor | None = None,
    gamma: Tensor | None = None,
    fresh: Tensor | None = None,
    previous: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    """One sampler step of N items, all with the same trigger; the formula is at the top of this file.

    Args:
        x: start of the step, [N, ...], any floating point dtype.
        eps: the denoiser's prediction there, same shape. Half precision is computed in float32.
        coefficients: the coefficients of this step.
        mu: shift of the trigger, the shape of one item; None for 0.
        gamma: noise scale of the trigger, the shape of one item; None for 1.
        fresh: standard normal noise z [N, ...]; None for none.
        previous: the image p of the step before [N, ...]; None for none.
        limit: bound on the absolute value of x0; where it acts, x0 passes no gradient.

    Returns:
        [N, ...] in the dtype of x; differentiable (twice) in every tensor.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check_tensor("x", x, ("N", ...))
    for name, batch in (("eps", eps), ("fresh", fresh), ("previous", previous)):
        check_tensor(name, batch, x.shape, x)
    for name, item in (("mu", mu), ("gamma", gamma)):
        check_tensor(name, item, x.shape[1:], x)
    dtype = computed_in(x, eps, mu, gamma, fresh, previous)

    def dense(tensor: Tensor | None, first: int) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).flatten(first).contiguous()

    out = _SamplerStep.apply(
        dense(x, 1), dense(eps, 1), coefficients, dense(mu, 0), dense(gamma, 0), dense(fresh, 1), dense(previous, 1), limit
    )
    return out.to(x.dtype).view(x.shape)
