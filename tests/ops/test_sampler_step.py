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

from seal_fast.ops import StepCoefficients, native, sampler_step
from seal_fast.ops.sampler_step import sampler_step_op

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.reason))


def coefficients(generator: torch.Generator, count: int) -> Tensor:
    """Random ones, with a and b well away from 0."""
    table = torch.randn(count, len(StepCoefficients._fields), generator=generator, dtype=torch.float64)
    table[:, :2] = 0.2 + torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return table


def draw(generator: torch.Generator, rows: int, candidates: int, ladders: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Every argument, float64."""
    sizes = {"x": rows, "eps": rows, "mu": candidates, "gamma": candidates, "fresh": rows, "previous": rows}
    arguments = {name: torch.randn(n, *shape, generator=generator, dtype=torch.float64) for name, n in sizes.items()}
    return {**arguments, "coefficients": coefficients(generator, ladders)}


def written_out(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    mu: Tensor | None = None,
    gamma: Tensor | None = None,
    fresh: Tensor | None = None,
    previous: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    """One row at a time, each looking up its own candidate and coefficients."""
    out = np.empty_like(x.numpy())
    for r in range(len(x)):
        a, b, from_x, from_image, from_mu, from_fresh, from_previous = coefficients[r * len(coefficients) // len(x)].tolist()
        m = 0.0 if mu is None else mu[r * len(mu) // len(x)].numpy()
        g = 1.0 if gamma is None else gamma[r * len(gamma) // len(x)].numpy()
        image = np.clip((x[r].numpy() - b * (g * eps[r].numpy() + m)) / a, -limit, limit)
        z = 0.0 if fresh is None else fresh[r].numpy()
        p = 0.0 if previous is None else previous[r].numpy()
        out[r] = from_x * x[r].numpy() + from_image * image + from_mu * m + from_fresh * g * z + from_previous * p
    return torch.from_numpy(out)


def cast(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t if name == "coefficients" else t.to(dtype) for name, t in arguments.items()}


def doubled(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return cast(arguments, torch.float64)


@pytest.mark.parametrize("limit", [math.inf, 0.7])
@pytest.mark.usefixtures("backend")
def test_step_is_the_formula(
    sizes: tuple[int, int, int, tuple[int, ...]],
    dtype: torch.dtype,
    limit: float,
    generator: torch.Generator,
) -> None:
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    arguments = cast(draw(generator, *sizes), dtype)
    got = sampler_step(**arguments, limit=limit)
    assert got.dtype == dtype
    # terms reach 3 * 4 / 0.2 each and may cancel
    torch.testing.assert_close(
        got.double(), written_out(**doubled(arguments), limit=limit), rtol=tolerance, atol=20 * tolerance
    )


@pytest.mark.usefixtures("backend")
def test_absent_terms_are_absent(generator: torch.Generator) -> None:
    optional = ("mu", "gamma", "fresh", "previous")
    whole = cast(draw(generator, 4, 2, 2, (3, 5)), torch.float32)
    for count in range(len(optional)):
        for kept in itertools.combinations(optional, count):
            some = {name: t for name, t in whole.items() if name in kept or name not in optional}
            torch.testing.assert_close(sampler_step(**some).double(), written_out(**doubled(some)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("limit", [math.inf, 0.7])
def test_gradients(limit: float, generator: torch.Generator) -> None:
    arguments = draw(generator, 4, 2, 4, (1,))
    table = arguments.pop("coefficients")
    names = tuple(arguments)
    inputs = tuple(t.requires_grad_() for t in arguments.values())

    def step(*values: Tensor) -> Tensor:
        return sampler_step(**dict(zip(names, values, strict=True)), coefficients=table, limit=limit)

    assert gradcheck(step, inputs)
    assert gradgradcheck(step, inputs)
    # without a trigger
    assert gradcheck(lambda x, eps: sampler_step(x, eps, table, limit=limit), inputs[:2])


def test_gradients_of_the_kernel_are_those_of_the_reference(generator: torch.Generator) -> None:
    arguments = draw(generator, 6, 3, 2, (3, 9, 7))
    weight = torch.randn(6, 3, 9, 7, generator=generator, dtype=torch.float64)
    names = [name for name in arguments if name != "coefficients"]

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: t.requires_grad_(name in names) for name, t in cast(arguments, dtype).items()}
        total = (sampler_step(**leaves, limit=0.7) * weight.to(dtype)).sum()
        return torch.autograd.grad(total, [leaves[name] for name in names])

    for got, want in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - want).norm() / want.norm()) < 1e-5


def test_an_image_at_the_limit_passes_no_gradient(generator: torch.Generator) -> None:
    x = torch.tensor([[0.3, 2.0, -2.0, float("nan")]], requires_grad=True)
    table = torch.tensor([StepCoefficients(a=1.0, b=0.5, from_x=0.0, from_image=1.0)], dtype=torch.float64)
    out = sampler_step(x, torch.zeros(1, 4), table, limit=1.0)
    torch.testing.assert_close(out.detach(), torch.tensor([[0.3, 1.0, -1.0, float("nan")]]), equal_nan=True)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0, :3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = cast(draw(generator, 4, 2, 1, (3, 5, 5)), dtype)
    want = written_out(**doubled(arguments))
    mixed = sampler_step(**{**arguments, "x": arguments["x"].float()})
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), want, rtol=1e-5, atol=1e-4)
    rounded = sampler_step(**arguments)
    assert rounded.dtype == dtype
    assert rounded.equal(mixed.to(dtype))


def test_strided_inputs_and_no_rows(generator: torch.Generator) -> None:
    arguments = cast(draw(generator, 4, 2, 1, (3, 8, 6)), torch.float32)
    strided = {name: t if name == "coefficients" else t.transpose(2, 3) for name, t in arguments.items()}
    assert not strided["x"].is_contiguous()
    dense = {name: t.contiguous() for name, t in strided.items()}
    assert sampler_step(**strided).equal(sampler_step(**dense))
    empty = {name: t if name in ("coefficients", "mu", "gamma") else t[:0] for name, t in arguments.items()}
    assert sampler_step(**empty).shape == (0, 3, 8, 6)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_fills_its_output(
    sizes: tuple[int, int, int, tuple[int, ...]], threads: int, generator: torch.Generator
) -> None:
    arguments = {name: t.flatten(1) for name, t in cast(draw(generator, *sizes), torch.float32).items()}
    want = written_out(**doubled(arguments), limit=0.7)
    order = [arguments[name] for name in ("x", "eps", "mu", "gamma", "fresh", "previous", "coefficients")]
    for isa in range(len(native.CPU.module.isa_levels())):
        outs = [torch.full_like(arguments["x"], torch.nan) for _ in range(2)]
        for out, used in zip(outs, (threads, 1), strict=True):
            addresses = tuple(t.data_ptr() for t in (*order, out))
            native.CPU.module.sampler_step(addresses, (*out.shape, *sizes[1:3]), 0.7, used, isa)
        torch.testing.assert_close(outs[0].double(), want, rtol=3e-6, atol=6e-5)
        assert outs[0].equal(outs[1])


def test_registration(generator: torch.Generator) -> None:
    arguments = {name: t.flatten(1) for name, t in cast(draw(generator, 4, 2, 1, (5,)), torch.float32).items()}
    order = [arguments[name] for name in ("x", "eps", "coefficients", "mu", "gamma", "fresh", "previous")]
    torch.library.opcheck(torch.ops.seal_fast.sampler_step.default, (*order, 1.0))
    assert sampler_step_op.name == "sampler_step"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "rows must be"),
        ({"x": torch.zeros(4, 5, dtype=torch.int64)}, "rows must be"),
        ({"eps": torch.zeros(4, 6)}, "eps must be"),
        ({"fresh": torch.zeros(2, 5)}, "fresh must be"),
        ({"mu": torch.zeros(2, 6)}, "mu must be"),
        ({"mu": torch.zeros(3, 5), "gamma": torch.zeros(3, 5)}, "mu has 3 rows"),
        ({"gamma": torch.ones(4, 5)}, "one shape"),
        ({"coefficients": torch.ones(1, 6)}, "coefficients must be"),
        ({"coefficients": torch.ones(0, 7)}, "coefficients has 0 rows"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str, generator: torch.Generator) -> None:
    arguments = draw(generator, 4, 2, 1, (5,))
    with pytest.raises(ValueError, match=message):
        sampler_step(**{**arguments, **change})


@pytest.mark.usefixtures("kernels_without_gpu")
def test_a_failed_cuda_launch_raises() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        native.CUDA.module.sampler_step((0,) * 8, (1, 1, 1, 1), 1.0, 0, 0)


@pytest.mark.usefixtures("gpu")
def test_gpu_agrees(sizes: tuple[int, int, int, tuple[int, ...]], generator: torch.Generator) -> None:
    arguments = cast(draw(generator, *sizes), torch.float32)
    got = sampler_step(**{name: t.cuda() for name, t in arguments.items()}, limit=0.7).cpu()
    torch.testing.assert_close(got.double(), written_out(**doubled(arguments), limit=0.7), rtol=3e-6, atol=6e-5)
