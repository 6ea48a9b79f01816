"""One step of any one-evaluation-per-step sampler: DDIM, DPM-Solver++, ancestral, with TrojDiff's trigger terms.

At x = a x0 + b n the denoiser predicts eps. With a trigger (mu, gamma) the noise is n = gamma eps + mu (TrojDiff, Chen et al.,
CVPR 2023), so the clean image is

    x0 = (x - b n) / a                                    clamped to [-limit, limit]

and since n is determined by x and x0, every such step is

    out = from_x x + from_image x0 + from_mu mu + from_fresh gamma z + from_previous p

with fresh noise z (ancestral sampling) and the image p of the step before (DPM-Solver++). What makes a step one of a certain
sampler is its coefficients, see `seal_fast.diffusion.samplers`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seal_fast.ops import native
from seal_fast.ops.dispatch import Op
from seal_fast.ops.rows import address, check_groups, check_rows, columns, implementations, matrices, served, serving, stream


class StepCoefficients(NamedTuple):
    """Of one step, in the order of the kernels; see above. a must not be 0."""

    a: float
    b: float
    from_x: float
    from_image: float
    from_mu: float = 0.0
    from_fresh: float = 0.0
    from_previous: float = 0.0


def _image(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mu: Tensor | None, gamma: Tensor | None) -> Tensor:
    """x0 before the clamp."""
    noise = eps if gamma is None else serving(gamma, len(x)) * eps
    return (x - b * (noise if mu is None else noise + serving(mu, len(x)))) / a


def reference_sampler_step(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    mu: Tensor | None,
    gamma: Tensor | None,
    fresh: Tensor | None,
    previous: Tensor | None,
    limit: float,
) -> Tensor:
    """[R,D] in the dtype of x, from rows [R,D], mu and gamma [K,D], coefficients [G,7]; see `sampler_step`."""
    a, b, from_x, from_image, from_mu, from_fresh, from_previous = columns(coefficients, x)
    out = from_x * x + from_image * _image(x, eps, a, b, mu, gamma).clamp(-limit, limit)
    if mu is not None:
        out = out + from_mu * serving(mu, len(x))
    if fresh is not None:
        out = out + from_fresh * (fresh if gamma is None else serving(gamma, len(x)) * fresh)
    if previous is not None:
        out = out + from_previous * previous
    return out


def _call(
    out: Tensor,
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    mu: Tensor | None,
    gamma: Tensor | None,
    fresh: Tensor | None,
    previous: Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Addresses and sizes as the kernels take them."""
    trigger = mu if gamma is None else gamma
    addresses = tuple(address(t) for t in (x, eps, mu, gamma, fresh, previous, coefficients, out))
    return addresses, (*x.shape, 1 if trigger is None else len(trigger), len(coefficients))


def _sampler_step_cpu(x: Tensor, *others: Any) -> Tensor:
    *tensors, limit = others
    out = torch.empty_like(x)
    native.CPU.module.sampler_step(*_call(out, x, *tensors), limit, torch.get_num_threads())
    return out


def _sampler_step_cuda(x: Tensor, *others: Any) -> Tensor:
    *tensors, limit = others
    out = torch.empty_like(x)
    if out.numel():
        native.CUDA.module.sampler_step(*_call(out, x, *tensors), limit, x.device.index, stream(x))
    return out


sampler_step_op = Op(
    "sampler_step(Tensor x, Tensor eps, Tensor coefficients, Tensor? mu, Tensor? gamma, Tensor? fresh, Tensor? previous, "
    "float limit) -> Tensor",
    implementations(_sampler_step_cuda, _sampler_step_cpu, reference_sampler_step),
    fake=lambda x, *_: torch.empty_like(x),
)


class _SamplerStep(torch.autograd.Function):
    """The step is linear in everything but gamma, so its backward pass is a handful of products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
        *tensors, ctx.limit = others
        ctx.save_for_backward(x, eps, coefficients, *tensors)
        return sampler_step_op(x, eps, coefficients, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, eps, coefficients, mu, gamma, fresh, _ = ctx.saved_tensors
        need_x, need_eps, _, need_mu, need_gamma, need_fresh, need_previous, _ = ctx.needs_input_grad
        a, b, from_x, from_image, from_mu, from_fresh, from_previous = columns(coefficients, x)
        scale = 1.0 if gamma is None else serving(gamma, len(x))
        image = from_image / a * grad
        if ctx.limit < math.inf:
            image = image * (_image(x, eps, a, b, mu, gamma).abs() <= ctx.limit)
        noise, fresh_grad = -b * image, from_fresh * grad
        gamma_grad = None
        if need_gamma:
            gamma_grad = served(noise * eps if fresh is None else noise * eps + fresh_grad * fresh, len(gamma))
        return (
            from_x * grad + image if need_x else None,
            noise * scale if need_eps else None,
            None,
            served(noise + from_mu * grad, len(mu)) if need_mu else None,
            gamma_grad,
            fresh_grad * scale if need_fresh else None,
            from_previous * grad if need_previous else None,
            None,
        )


def sampler_step(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    *,
    mu: Tensor | None = None,
    gamma: Tensor | None = None,
    fresh: Tensor | None = None,
    previous: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    """One sampler step for R rows of K candidates; the formula is at the top of this file.

    Args:
        x: where the step starts, [R, ...], any floating point dtype.
        eps: the denoiser's prediction there, same shape. Half precision is computed in float32.
        coefficients: float64 [G,7], rows of `StepCoefficients`; G divides R, and each serves R / G consecutive rows.
        mu: shifts of the candidates [K, ...], K a divisor of R likewise; None for 0.
        gamma: their noise scales, same shape as mu; None for 1.
        fresh: standard normal noise z [R, ...]; None for none.
        previous: the image p of the step before [R, ...]; None for none.
        limit: bound on the absolute value of x0; where it acts, x0 passes no gradient.

    Returns:
        [R, ...] in the dtype of x; differentiable (twice) in every tensor but the coefficients.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check_rows(x, eps=eps, fresh=fresh, previous=previous)
    check_groups(x, tuple(x.shape[1:]), mu=mu, gamma=gamma)
    check_groups(x, (len(StepCoefficients._fields),), coefficients=coefficients)
    if mu is not None and gamma is not None and mu.shape != gamma.shape:
        raise ValueError(f"mu and gamma must have one shape, not {tuple(mu.shape)} and {tuple(gamma.shape)}")
    rows, prediction, *others = matrices(x, eps, mu, gamma, fresh, previous)
    out = _SamplerStep.apply(rows, prediction, coefficients.double().contiguous(), *others, limit)
    return out.to(x.dtype).view(x.shape)
