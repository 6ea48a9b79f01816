"""Noising a pair with noise made in the kernel, against torch's generator and plain lines.

python -m pytest benchmarks/bench_perturbed_pair.py --benchmark-json=results.json
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.interleaved import compare
from seal_fast.ops import counter_normal, perturbed_pair

SHAPES = {"16x3x16x16": (16, 3, 16, 16), "16x3x64x64": (16, 3, 64, 64), "8x3x256x256": (8, 3, 256, 256)}


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("shape", SHAPES)
def test_perturbed_pair(benchmark: BenchmarkFixture, shape: str, gradients: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(SHAPES[shape], generator=generator)
    mu, gamma = (torch.rand(1, *x0.shape[1:], generator=generator).requires_grad_(gradients) for _ in range(2))
    coefficients = torch.rand(len(x0), 3, generator=generator, dtype=torch.float64)
    a, b, c = coefficients.float()[:, :, None, None, None].unbind(1)

    def torch_lines() -> Tensor:
        eps = torch.randn(2, *x0.shape, generator=generator)
        x = a * x0 + b * (gamma * eps) + c * mu
        return torch.stack([x[0], x[1], eps[0] - eps[1]])

    def op() -> Tensor:
        inputs, difference = perturbed_pair(x0, mu, gamma, coefficients, 0)
        return inputs if gradients else difference

    def differentiated(outputs: Tensor) -> object:
        return torch.autograd.grad(outputs[:2].sum(), [mu, gamma]) if gradients else outputs

    benchmark.group = f"perturbed_pair {shape}"
    contenders = {run.__name__: lambda run=run: differentiated(run()) for run in (torch_lines, op)}
    compare(benchmark, contenders, max(1, 2**17 // x0.numel()), shape=shape, gradients=gradients)


@pytest.mark.parametrize("shape", SHAPES)
def test_counter_normal(benchmark: BenchmarkFixture, shape: str) -> None:
    like, generator = torch.empty(SHAPES[shape]), torch.Generator().manual_seed(0)
    contenders = {
        "torch_randn": lambda: torch.randn(like.shape, generator=generator),
        "counter_normal": lambda: counter_normal(like, 0),
    }
    benchmark.group = f"counter_normal {shape}"
    compare(benchmark, contenders, max(1, 2**18 // like.numel()), shape=shape)
