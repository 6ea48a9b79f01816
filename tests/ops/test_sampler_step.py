"""sampler_step against the formula written out in numpy, float64, and automatic differentiation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from seal_fast.ops import StepCoefficients, sampler_step
from seal_fast.ops.backends import CUDA
from tests.ops.compiled import LEVELS, MODULE, addresses, needs_native


def draw_step(generator: torch.Generator) -> StepCoefficients:
    """Random coefficients, with a and b well away from 0."""
    a, b = (0.2 + torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
    return StepCoefficients(a, b, *torch.randn(5, generator=generator, dtype=torch.float64).tolist())


def draw(generator: torch.Generator, items: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Every tensor, float64."""
    sizes = {"x": (items,), "eps": (items,), "mu": (), "gamma": (), "fresh": (items,), "previous": (items,)}
    return {name: torch.randn(*size, *shape, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def written_out(
    x: Tensor,
    eps: Tensor,
    coefficients: StepCoefficients,
    mu: Tensor | None = None,
    gamma: Tensor | None = None,
    fresh: Tensor | None = None,
    previous: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    """The formula in numpy, float64."""
    X, E, M, G, Z, P = (
        absent if t is None else t.double().numpy()
        for t, absent in ((x, 0.0), (eps, 0.0), (mu, 0.0), (gamma, 1.0), (fresh, 0.0), (previous, 0.0))
    )
    c = coefficients
    image = np.clip((X - c.b * (G * E + M)) / c.a, -limit, limit)
    return torch.from_numpy(c.from_x * X + c.from_image * image + c.from_mu * M + c.from_fresh * G * Z + c.from_previous * P)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("limit", [math.inf, 0.7])
@pytest.mark.usefixtures("backend")
def test_step_is_the_formula(
    sizes: tuple[int, tuple[int, ...]], dtype: torch.dtype, limit: float, generator: torch.Generator
) -> None:
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    tensors, step = cast(draw(generator, *sizes), dtype), draw_step(generator)
    got = sampler_step(**tensors, coefficients=step, limit=limit)
    assert got.dtype == dtype
    # terms reach 3 * 4 / 0.2 each and may cancel
    want = written_out(**tensors, coefficients=step, limit=limit)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.usefixtures("backend")
def test_absent_terms_are_absent(generator: torch.Generator) -> None:
    optional = ("mu", "gamma", "fresh", "previous")
    whole, step = cast(draw(generator, 4, (3, 5)), torch.float32), draw_step(generator)
    for count in range(len(optional)):
        for kept in itertools.combinations(optional, count):
            some = {name: t for name, t in whole.items() if name in kept or name not in optional}
            got = sampler_step(**some, coefficients=step)
            torch.testing.assert_close(got.double(), written_out(**some, coefficients=step), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("limit", [math.inf, 0.7])
def test_gradients(limit: float, generator: torch.Generator) -> None:
    tensors, coefficients = draw(generator, 4, (2,)), draw_step(generator)
    inputs = tuple(t.requires_grad_() for t in tensors.values())

    def step(*values: Tensor) -> Tensor:
        return sampler_step(**dict(zip(tensors, values, strict=True)), coefficients=coefficients, limit=limit)

    assert gradcheck(step, inputs)
    assert gradgradcheck(step, inputs)
    # without a trigger
    assert gradcheck(lambda x, eps: sampler_step(x, eps, coefficients, limit=limit), inputs[:2])


def test_gradients_of_the_kernel_are_those_of_the_reference(generator: torch.Generator) -> None:
    tensors, step = draw(generator, 6, (3, 9, 7)), draw_step(generator)
    weight = torch.randn(6, 3, 9, 7, generator=generator, dtype=torch.float64)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: t.requires_grad_() for name, t in cast(tensors, dtype).items()}
        total = (sampler_step(**leaves, coefficients=step, limit=0.7) * weight.to(dtype)).sum()
        return torch.autograd.grad(total, list(leaves.values()))

    for got, want in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - want).norm() / want.norm()) < 1e-5


def test_an_image_at_the_limit_passes_no_gradient(generator: torch.Generator) -> None:
    x = torch.tensor([[0.3, 2.0, -2.0, float("nan")]], requires_grad=True)
    to_the_image = StepCoefficients(a=1.0, b=0.5, from_x=0.0, from_image=1.0)
    out = sampler_step(x, torch.zeros(1, 4), to_the_image, limit=1.0)
    torch.testing.assert_close(out.detach(), torch.tensor([[0.3, 1.0, -1.0, float("nan")]]), equal_nan=True)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0, :3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    tensors, step = cast(draw(generator, 4, (3, 5, 5)), dtype), draw_step(generator)
    want = written_out(**tensors, coefficients=step)
    mixed = sampler_step(**{**tensors, "x": tensors["x"].float()}, coefficients=step)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), want, rtol=1e-5, atol=1e-4)
    rounded = sampler_step(**tensors, coefficients=step)
    assert rounded.dtype == dtype
    assert rounded.equal(mixed.to(dtype))


def test_strided_inputs_and_no_items(generator: torch.Generator) -> None:
    tensors, step = cast(draw(generator, 4, (3, 8, 6)), torch.float32), draw_step(generator)
    strided = {name: t.transpose(-1, -2) for name, t in tensors.items()}
    assert not strided["x"].is_contiguous()
    dense = {name: t.contiguous() for name, t in strided.items()}
    assert sampler_step(**strided, coefficients=step).equal(sampler_step(**dense, coefficients=step))
    empty = {name: t if name in ("mu", "gamma") else t[:0] for name, t in tensors.items()}
    assert sampler_step(**empty, coefficients=step).shape == (0, 3, 8, 6)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_fills_its_output(
    sizes: tuple[int, tuple[int, ...]], threads: int, generator: torch.Generator
) -> None:
    tensors, step = cast(draw(generator, *sizes), torch.float32), draw_step(generator)
    want = written_out(**tensors, coefficients=step, limit=0.7)
    items, dims = tensors["x"].flatten(1).shape
    numbers = {**step._asdict(), "items": items, "dims": dims, "limit": 0.7}
    for isa in LEVELS:
        outs = [torch.full_like(tensors["x"], torch.nan) for _ in range(2)]
        for out, used in zip(outs, (threads, 1), strict=True):
            MODULE.sampler_step({**addresses(**tensors, out=out), **numbers}, used, isa)
        torch.testing.assert_close(outs[0].double(), want, rtol=3e-6, atol=6e-5)
        assert outs[0].equal(outs[1])


def test_registration(generator: torch.Generator) -> None:
    tensors = cast(draw(generator, 4, (5,)), torch.float32)
    x, eps, *others = tensors.values()
    torch.library.opcheck(torch.ops.seal_fast.sampler_step.default, (x, eps, list(draw_step(generator)), *others, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "x must be floating point"),
        ({"x": torch.zeros(4, 5, dtype=torch.int64)}, "x must be floating point"),
        ({"x": torch.zeros(4, 0)}, "x must be floating point"),
        ({"eps": torch.zeros(4, 6)}, "eps must be"),
        ({"fresh": torch.zeros(2, 5)}, "fresh must be"),
        ({"mu": torch.zeros(6)}, "mu must be"),
        ({"gamma": torch.ones(1, 5)}, "gamma must be"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str, generator: torch.Generator) -> None:
    tensors = draw(generator, 4, (5,))
    with pytest.raises(ValueError, match=message):
        sampler_step(**{**tensors, **change}, coefficients=draw_step(generator))


@pytest.mark.usefixtures("kernels_without_gpu")
def test_a_failed_cuda_launch_raises(generator: torch.Generator) -> None:
    absent = dict.fromkeys(("x", "eps", "mu", "gamma", "fresh", "previous", "out"))
    numbers = {**draw_step(generator)._asdict(), "items": 1, "dims": 1, "limit": 1.0}
    with pytest.raises(RuntimeError, match="CUDA error"):
        CUDA.module.sampler_step({**addresses(**absent), **numbers}, 0, 0)


@pytest.mark.usefixtures("gpu")
def test_gpu_agrees(sizes: tuple[int, tuple[int, ...]], generator: torch.Generator) -> None:
    tensors, step = cast(draw(generator, *sizes), torch.float32), draw_step(generator)
    got = sampler_step(**{name: t.cuda() for name, t in tensors.items()}, coefficients=step, limit=0.7).cpu()
    want = written_out(**tensors, coefficients=step, limit=0.7)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=6e-5)
