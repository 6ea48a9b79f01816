"""gaussian_log_ratio: seal-fast against its reference and against two matrix products.

    python -m pytest benchmarks/bench_gaussian.py --benchmark-json=results.json

Compare results of one run only. `read_share` is the share of the measured read bandwidth that reading the inputs once amounts
to, `gemm_share` the share of the measured float32 matrix rate at 4 FLOP per (input, trigger, dimension).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import machine
from seal_fast.ops import gaussian_kl_stats, gaussian_log_ratio
from seal_fast.ops.gaussian import reference_gaussian_kl_stats

CASES = {
    "10000x1 3x32x32": (10_000, 1, (3, 32, 32)),
    "10000x16 3x32x32": (10_000, 16, (3, 32, 32)),
    "256x16 3x256x256": (256, 16, (3, 256, 256)),
}
SEED = 0


def kernel(x: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    return gaussian_log_ratio(x, mu, gamma)


def reference(x: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEAL_FAST_BACKEND", "reference")
        return gaussian_log_ratio(x, mu, gamma)


def two_products(x: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    """The expanded square A x^2 + B x + C as matrix products: the strongest form plain torch has, and the least precise."""
    x, mu, gamma = x.flatten(1), mu.flatten(1), gamma.flatten(1)
    precision = gamma.square().reciprocal()
    constant = -(gamma.log() + mu.square() * precision / 2).sum(1)
    return x.square() @ ((1 - precision) / 2).T + x @ (mu * precision).T + constant


def record(benchmark: BenchmarkFixture, shape: list[int], bytes_read: int, flops: int = 0) -> None:
    """Add the machine and the shares of its limits to the result."""
    limits = machine.measure()
    stats: Any = benchmark.stats
    seconds = stats.stats.median
    benchmark.extra_info.update(
        machine.describe_machine(), shape=shape, seed=SEED, read_share=bytes_read / seconds / limits.read_bandwidth
    )
    if flops:
        benchmark.extra_info["gemm_share"] = flops / seconds / limits.gemm_rate


@pytest.mark.parametrize("method", [kernel, reference, two_products], ids=lambda m: m.__name__)
@pytest.mark.parametrize("case", CASES)
def test_log_ratio(benchmark: BenchmarkFixture, case: str, method: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    n, k, shape = CASES[case]
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(n, *shape, generator=generator)
    mu = torch.randn(k, *shape, generator=generator) / 10
    gamma = 0.5 + torch.rand(k, *shape, generator=generator)
    benchmark.group = f"gaussian_log_ratio {case}"
    benchmark.pedantic(method, (x, mu, gamma), rounds=5, warmup_rounds=1)
    record(benchmark, [n, k, *shape], bytes_read=x.nbytes, flops=4 * k * x.numel())


@pytest.mark.parametrize("method", [gaussian_kl_stats, reference_gaussian_kl_stats], ids=["kernel", "reference"])
def test_kl_stats(benchmark: BenchmarkFixture, method: Callable[[Tensor, Tensor], object]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    mu = torch.randn(16, 3 * 256 * 256, generator=generator)
    gamma = 0.5 + torch.rand(16, 3 * 256 * 256, generator=generator)
    benchmark.group = "gaussian_kl_stats 16 3x256x256"
    benchmark.pedantic(method, (mu, gamma), rounds=7, warmup_rounds=1)
    record(benchmark, [16, 3, 256, 256], bytes_read=mu.nbytes + gamma.nbytes)
