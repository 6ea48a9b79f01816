"""cross_attention: seal-fast against plain torch with maps, and against torch's fused attention, which has none.

    python -m pytest benchmarks/bench_cross_attention.py --benchmark-json=results.json

Compare rows of one run only. `gemm_share` is the share of the measured float32 matrix rate that the matrix products amount to:
two forward, five more backward (one of them the recomputed logits), 2 B H M N D FLOP each. Half precision is measured against
the float32 rate too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import machine
from seal_fast.ops import cross_attention

LAYERS = {
    "64x64": (2, 8, 64 * 64, 77, 40),
    "32x32": (2, 8, 32 * 32, 77, 80),
    "16x16": (2, 8, 16 * 16, 77, 160),
    "8x8": (2, 8, 8 * 8, 77, 160),
}
"""B, H, M, N, D of the text cross-attention of Stable Diffusion 1.5 at 512 pixels, one prompt with guidance."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED = 0

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return cross_attention(q, k, v)


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)
    return p @ v, p.mean(1).transpose(1, 2)


def fused_without_maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (scaled_dot_product_attention(q, k, v),)


def inputs(layer: str, dtype: torch.dtype, requires_grad: bool) -> list[Tensor]:
    """q, k, v as a UNet makes them: heads of joined rows."""
    b, h, m, n, d = LAYERS[layer]
    generator = torch.Generator().manual_seed(SEED)
    joined = [torch.randn(b, rows, h, d, generator=generator).to(dtype) for rows in (m, n, n)]
    return [x.transpose(1, 2).requires_grad_(requires_grad) for x in joined]


def record(benchmark: BenchmarkFixture, layer: str, dtype: str, products: int) -> None:
    """Add the machine and the share of its limit to the row."""
    b, h, m, n, d = LAYERS[layer]
    stats: Any = benchmark.stats
    rate = products * 2 * b * h * m * n * d / stats.stats.median
    benchmark.extra_info.update(
        machine.describe_machine(),
        shape=[b, h, m, n, d],
        dtype=dtype,
        seed=SEED,
        gemm_share=rate / machine.measure().gemm_rate,
    )


@pytest.mark.parametrize("method", [kernel, eager, fused_without_maps], ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_forward(benchmark: BenchmarkFixture, layer: str, dtype: str, method: Attention) -> None:
    arguments = inputs(layer, DTYPES[dtype], requires_grad=False)
    benchmark.group = f"cross_attention forward {layer} {dtype}"
    benchmark.pedantic(method, arguments, rounds=9, warmup_rounds=2)
    record(benchmark, layer, dtype, products=2)


@pytest.mark.parametrize("method", [kernel, eager, fused_without_maps], ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, layer: str, dtype: str, method: Attention) -> None:
    arguments = inputs(layer, DTYPES[dtype], requires_grad=True)
    generator = torch.Generator().manual_seed(SEED)
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in method(*arguments)]

    def step() -> None:
        torch.autograd.grad(method(*arguments), arguments, grads)

    benchmark.group = f"cross_attention forward and backward {layer} {dtype}"
    benchmark.pedantic(step, rounds=9, warmup_rounds=2)
    record(benchmark, layer, dtype, products=7)
