"""Group normalisation and SiLU, with the gradient of the input, against torch's two ops, on layers of the zoo and of DDPM.

python -m pytest benchmarks/bench_group_norm_silu.py --benchmark-json=results.json
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import group_norm, silu

from benchmarks.interleaved import compare
from seal_fast.ops import group_norm_silu

SHAPES = {"32x64x16x16": (32, 64, 16, 16), "32x128x8x8": (32, 128, 8, 8), "16x256x32x32": (16, 256, 32, 32)}
EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_silu(benchmark: BenchmarkFixture, shape: str, dtype: torch.dtype) -> None:
    """Torch gets the layout that it is faster in, contiguous; ours is channels-last. Both add a shift."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[shape], generator=generator).to(dtype)
    images, channels = x.shape[:2]
    weight, bias = torch.randn(2, channels, generator=generator)
    shift = torch.randn(images, channels, generator=generator).to(dtype)

    def torch_lines(x: Tensor) -> Tensor:
        return silu(group_norm(x + shift[:, :, None, None], 8, weight.to(dtype), bias.to(dtype), EPS))

    def op(x: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, 8, EPS, shift)

    def contender(function: Callable[[Tensor], Tensor], layout: torch.memory_format) -> Callable[[], object]:
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        grad = torch.randn(x.shape, generator=generator).to(dtype).contiguous(memory_format=layout)
        return lambda: torch.autograd.grad(function(leaf), leaf, grad)

    benchmark.group = f"group_norm_silu {shape} {dtype}"
    contenders = {
        "torch_lines": contender(torch_lines, torch.contiguous_format),
        "op": contender(op, torch.channels_last),
    }
    compare(benchmark, contenders, max(1, 2**22 // x.numel()), shape=shape, dtype=str(dtype))
