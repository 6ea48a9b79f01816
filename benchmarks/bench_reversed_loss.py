"""The reversed loss and its gradient against the plain torch lines it replaces.

python -m pytest benchmarks/bench_reversed_loss.py --benchmark-json=results.json
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.interleaved import compare
from seal_fast.ops import reversed_loss

SHAPES = {"16x3x16x16": (16, 3, 16, 16), "16x3x64x64": (16, 3, 64, 64), "8x3x256x256": (8, 3, 256, 256)}


def torch_lines(predictions: Tensor, eps: Tensor) -> Tensor:
    first, second = (eps - predictions).unbind(0)
    return 0.5 * (first - second).square().sum(dim=(1, 2, 3)).mean()


def op(predictions: Tensor, eps: Tensor) -> Tensor:
    """Computing the difference of the noises is part of the time."""
    return reversed_loss(predictions[0], predictions[1], eps[0] - eps[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_reversed_loss(benchmark: BenchmarkFixture, shape: str) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, eps = torch.randn(2, 2, *SHAPES[shape], generator=generator)
    predictions.requires_grad_()

    def contender(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(predictions, eps), predictions)

    benchmark.group = f"reversed_loss {shape}"
    contenders = {loss.__name__: contender(loss) for loss in (torch_lines, op)}
    compare(benchmark, contenders, max(1, 2**18 // eps.numel()), shape=shape)
