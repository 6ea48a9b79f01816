"""3 x 3 convolution with the gradient of the input, against torch's (oneDNN), on layers of the zoo and of DDPM.

python -m pytest benchmarks/bench_winograd_convolution.py --benchmark-json=results.json
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.interleaved import compare
from seal_fast.ops import WinogradWeight, winograd_convolution
from seal_fast.training import native_bfloat16

SHAPES = {
    "32x16x32x32 to 16": (32, 16, 16, 32),
    "32x32x16x16 to 32": (32, 32, 32, 16),
    "32x96x16x16 to 32": (32, 96, 32, 16),
    "32x64x8x8 to 64": (32, 64, 64, 8),
    "16x128x32x32 to 128": (16, 128, 128, 32),
    "16x512x8x8 to 256": (16, 512, 256, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_winograd_convolution(benchmark: BenchmarkFixture, shape: str, dtype: torch.dtype) -> None:
    """Input and output of both contenders are in `dtype`, channels-last. Frozen weights are laid out or transformed before.
    `flops` are those of the plain sum."""
    if dtype == torch.bfloat16 and not native_bfloat16(torch.device("cpu")):
        pytest.skip("this processor does not multiply bfloat16, so torch's convolution emulates it")
    generator = torch.Generator().manual_seed(0)
    images, channels, filters, side = SHAPES[shape]
    x, grad = (
        torch.randn(images, c, side, side, generator=generator).to(dtype, memory_format=torch.channels_last)
        for c in (channels, filters)
    )
    weight, bias = torch.randn(filters, channels, 3, 3, generator=generator), torch.randn(filters, generator=generator)
    laid_out, same = weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)
    transformed = WinogradWeight(weight)

    def contender(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        leaf = x.detach().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf), leaf, grad)

    benchmark.group = f"winograd_convolution {shape} {str(dtype).removeprefix('torch.')}"
    contenders = {
        "torch_conv2d": contender(lambda leaf: conv2d(leaf, laid_out, same, padding=1)),
        "op": contender(lambda leaf: winograd_convolution(leaf, transformed, bias)),
    }
    flops = 2 * 2 * 9 * channels * filters * side * side * images
    compare(benchmark, contenders, max(1, 2**29 // flops), shape=shape, flops=flops)
