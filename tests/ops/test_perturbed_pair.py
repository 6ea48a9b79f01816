"""perturbed_pair against its formula with counter_normal's reference noise, and automatic differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from seal_fast.ops import native, perturbed_pair
from seal_fast.ops.counter_normal import reference_counter_normal, signed

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.reason))


def draw(generator: torch.Generator, rows: int, candidates: int, ladders: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """x0, mu, gamma, coefficients, float64."""
    sizes = ((rows, *shape), (candidates, *shape), (candidates, *shape), (ladders, 3))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


def written_out(x0: Tensor, mu: Tensor, gamma: Tensor, coefficients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """One row at a time, in float64, each looking up its own candidate and coefficients."""
    x0, mu, gamma = x0.double(), mu.double(), gamma.double()
    eps = [reference_counter_normal(x0.flatten(1), seed, draw).view_as(x0) for draw in (0, 1)]
    inputs = torch.empty(2, *x0.shape, dtype=torch.float64)
    for r in range(len(x0)):
        a, b, c = coefficients[r * len(coefficients) // len(x0)].tolist()
        k = r * len(mu) // len(x0)
        for i in range(2):
            inputs[i, r] = a * x0[r] + b * gamma[k] * eps[i][r] + c * mu[k]
    return inputs, eps[0] - eps[1]


@pytest.mark.usefixtures("backend")
def test_pair_is_the_formula(
    sizes: tuple[int, int, int, tuple[int, ...]],
    dtype: torch.dtype,
    generator: torch.Generator,
    seed: int,
) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    x0, mu, gamma, coefficients = draw(generator, *sizes)
    arguments = (x0.to(dtype), mu.to(dtype), gamma.to(dtype), coefficients, seed)
    got = perturbed_pair(*arguments)
    for one, want in zip(got, written_out(*arguments), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), want, rtol=tolerance, atol=tolerance)


def test_gradients(generator: torch.Generator, seed: int) -> None:
    *leaves, coefficients = draw(generator, 4, 2, 4, (3,))
    inputs = [t.requires_grad_() for t in leaves]
    assert gradcheck(lambda x0, mu, gamma: perturbed_pair(x0, mu, gamma, coefficients, seed).inputs, inputs)
    assert gradgradcheck(lambda x0, mu, gamma: perturbed_pair(x0, mu, gamma, coefficients, seed).inputs, inputs)
    assert not perturbed_pair(*leaves, coefficients, seed).difference.requires_grad


def test_gradients_of_the_kernel_are_those_of_the_reference(generator: torch.Generator, seed: int) -> None:
    *leaves, coefficients = draw(generator, 6, 3, 6, (3, 9, 7))
    weight = torch.randn(2, 6, 3, 9, 7, generator=generator, dtype=torch.float64)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in leaves]
        return torch.autograd.grad((perturbed_pair(*inputs, coefficients, seed).inputs * weight.to(dtype)).sum(), inputs)

    for got, want in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, generator: torch.Generator, seed: int) -> None:
    *leaves, coefficients = draw(generator, 4, 2, 1, (3, 5))
    half = [t.to(dtype) for t in leaves]
    got = perturbed_pair(*half, coefficients, seed)
    want = perturbed_pair(*(t.float() for t in half), coefficients, seed)
    assert got.inputs.equal(want.inputs.to(dtype))
    assert got.difference.equal(want.difference.to(dtype))


def test_strided_inputs_and_no_rows(generator: torch.Generator) -> None:
    *leaves, coefficients = draw(generator, 4, 2, 1, (3, 8, 6))
    strided = [t.float().transpose(2, 3) for t in leaves]
    assert not strided[0].is_contiguous()
    got, want = perturbed_pair(*strided, coefficients, 3), perturbed_pair(*(t.contiguous() for t in strided), coefficients, 3)
    assert got.inputs.equal(want.inputs)
    assert perturbed_pair(strided[0][:0], *strided[1:], coefficients, 3).inputs.shape == (2, 0, 3, 6, 8)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_fills_its_output(
    sizes: tuple[int, int, int, tuple[int, ...]], threads: int, generator: torch.Generator, seed: int
) -> None:
    *leaves, coefficients = draw(generator, *sizes)
    x0, mu, gamma = (t.float().flatten(1) for t in leaves)
    key = signed(seed)
    want = written_out(x0, mu, gamma, coefficients, seed)
    for isa in range(len(native.CPU.module.isa_levels())):
        runs = [(torch.full((2, *x0.shape), torch.nan), torch.full_like(x0, torch.nan)) for _ in range(2)]
        for outputs, used in zip(runs, (threads, 1), strict=True):
            addresses = tuple(t.data_ptr() for t in (x0, mu, gamma, coefficients, *outputs))
            native.CPU.module.perturbed_pair(addresses, (*x0.shape, *sizes[1:3]), key, used, isa)
        for one, other, exact in zip(*runs, want, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=2e-5, atol=2e-5)
            assert one.equal(other)


def test_registration(generator: torch.Generator) -> None:
    *leaves, coefficients = draw(generator, 4, 2, 1, (5,))
    torch.library.opcheck(torch.ops.seal_fast.perturbed_pair.default, (*(t.float() for t in leaves), coefficients, -3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(4)}, "rows must be"),
        ({"mu": torch.zeros(2, 6)}, "mu must be"),
        ({"mu": torch.zeros(3, 5)}, "mu has 3 rows"),
        ({"gamma": torch.ones(4, 5)}, "one shape"),
        ({"coefficients": torch.ones(1, 2)}, "coefficients must be"),
        ({"coefficients": torch.ones(3, 3)}, "coefficients has 3 rows"),
        ({"seed": -1}, "seed must be"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str, generator: torch.Generator) -> None:
    names = ("x0", "mu", "gamma", "coefficients")
    arguments = dict(zip(names, draw(generator, 4, 2, 1, (5,)), strict=True))
    with pytest.raises(ValueError, match=message):
        perturbed_pair(**{**arguments, "seed": 0, **change})


@pytest.mark.usefixtures("kernels_without_gpu")
def test_a_failed_cuda_launch_raises() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        native.CUDA.module.perturbed_pair((0,) * 6, (1, 1, 1, 1), 0, 0, 0)


@pytest.mark.usefixtures("gpu")
def test_gpu_agrees(sizes: tuple[int, int, int, tuple[int, ...]], generator: torch.Generator, seed: int) -> None:
    *leaves, coefficients = draw(generator, *sizes)
    x0, mu, gamma = (t.float() for t in leaves)
    got = perturbed_pair(x0.cuda(), mu.cuda(), gamma.cuda(), coefficients.cuda(), seed)
    for one, want in zip(got, written_out(x0, mu, gamma, coefficients, seed), strict=True):
        torch.testing.assert_close(one.cpu().double(), want, rtol=2e-5, atol=2e-5)
