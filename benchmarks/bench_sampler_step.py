"""One sampler step against the plain torch lines it replaces, without gradients and forward and backward.

python -m pytest benchmarks/bench_sampler_step.py --benchmark-json=results.json
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.interleaved import compare
from seal_fast.ops import StepCoefficients, sampler_step

SHAPES = {"16x3x16x16": (16, 3, 16, 16), "16x3x64x64": (16, 3, 64, 64), "8x3x256x256": (8, 3, 256, 256)}
HERE, THERE, FRESH = (0.6, 0.8), (0.8, 0.6), 0.1
KEPT = (THERE[1] ** 2 - FRESH**2) ** 0.5
STEP = StepCoefficients(*HERE, KEPT / HERE[1], THERE[0] - KEPT / HERE[1] * HERE[0], from_mu=THERE[1] - KEPT, from_fresh=FRESH)


def torch_lines(x: Tensor, eps: Tensor, z: Tensor, mu: Tensor | float, gamma: Tensor | float) -> Tensor:
    """An ancestral step with TrojDiff's terms."""
    n = gamma * eps + mu
    x0 = (x - HERE[1] * n) / HERE[0]
    return THERE[0] * x0 + THERE[1] * mu + KEPT * (n - mu) + gamma * FRESH * z


def op(x: Tensor, eps: Tensor, z: Tensor, mu: Tensor | float, gamma: Tensor | float) -> Tensor:
    shift, scale = (v if isinstance(v, Tensor) else None for v in (mu, gamma))
    return sampler_step(x, eps, STEP, mu=shift, gamma=scale, fresh=z)


def differentiated(step: Callable[..., Tensor], x: Tensor, eps: Tensor, z: Tensor, trigger: list[Tensor]) -> object:
    leaves = [t.detach().requires_grad_() for t in (x, eps, *trigger)]
    mu, gamma = leaves[2:] if trigger else (0.0, 1.0)
    return torch.autograd.grad(step(leaves[0], leaves[1], z, mu, gamma).sum(), leaves)


@pytest.mark.parametrize("triggered", [False, True], ids=["plain", "trojan"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sampler_step(benchmark: BenchmarkFixture, shape: str, gradients: bool, triggered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, eps, z = torch.randn(3, *SHAPES[shape], generator=generator)
    trigger = list(torch.rand(2, *SHAPES[shape][1:], generator=generator)) if triggered else []

    def contender(step: Callable[..., Tensor]) -> Callable[[], object]:
        if gradients:
            return lambda: differentiated(step, x, eps, z, trigger)
        return lambda: step(x, eps, z, *(trigger or (0.0, 1.0)))

    benchmark.group = f"sampler_step {shape}"
    contenders = {step.__name__: contender(step) for step in (torch_lines, op)}
    compare(benchmark, contenders, max(1, 2**18 // x.numel()), shape=shape, gradients=gradients, triggered=triggered)
