"""cross_attention: seal-fast against plain torch with maps, compiled or not, and against torch's fused attention without maps.

    python -m pytest benchmarks/bench_cross_attention.py --benchmark-json=results.json

Compare results of one run only. `gemm_share` is the rate of the matrix products as a share of the machine's matrix rate in the
same dtype. There are two products forward and five more backward (one of them the recomputed logits), 2 B H M N D FLOP each.

Memory is what torch's allocator hands out; the kernels' workspaces come from it too. For one layer, `kept_bytes` is what lives
between the forward and the backward pass, inputs and results included, and `peak_bytes` the most at any time in a training
step. For a model, `largest_batch` is the batch at which the kept bytes of all text cross-attention layers, plus what the worst
layer needs above them for a while, make 8 GB (8e9 bytes). Weights and other layers are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from seal_fast.ops import cross_attention

BATCH = 2
"""One prompt with guidance."""
LAYERS = {
    "sd15 64x64": (BATCH, 8, 64 * 64, 77, 40),
    "sd15 32x32": (BATCH, 8, 32 * 32, 77, 80),
    "sd15 16x16": (BATCH, 8, 16 * 16, 77, 160),
    "sd15 8x8": (BATCH, 8, 8 * 8, 77, 160),
    "sd21 96x96": (BATCH, 5, 96 * 96, 77, 64),
    "sd21 48x48": (BATCH, 10, 48 * 48, 77, 64),
    "sd21 24x24": (BATCH, 20, 24 * 24, 77, 64),
    "sd21 12x12": (BATCH, 20, 12 * 12, 77, 64),
    "sdxl 64x64": (BATCH, 10, 64 * 64, 77, 64),
    "sdxl 32x32": (BATCH, 20, 32 * 32, 77, 64),
}
"""B, H, M, N, D of the text cross-attention of Stable Diffusion 1.5 at 512 pixels, 2.1 at 768 and XL at 1024."""
MODELS = {
    "sd15": {"sd15 64x64": 5, "sd15 32x32": 5, "sd15 16x16": 5, "sd15 8x8": 1},
    "sd21": {"sd21 96x96": 5, "sd21 48x48": 5, "sd21 24x24": 5, "sd21 12x12": 1},
    "sdxl": {"sdxl 64x64": 10, "sdxl 32x32": 60},
}
"""How many layers of each size they have."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUDGET = 8e9
SEED = 0

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return cross_attention(q, k, v)


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)
    return p @ v, p.mean(1).transpose(1, 2)


_compiled_eager = torch.compile(eager, dynamic=False)


def compiled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return _compiled_eager(q, k, v)


def fused_without_maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (scaled_dot_product_attention(q, k, v),)


METHODS: dict[str, Attention] = {f.__name__: f for f in (kernel, eager, compiled, fused_without_maps)}
CASES = [
    pytest.param(layer, dtype, method, id=f"{layer}-{dtype}-{method}")
    for layer in LAYERS
    for dtype in DTYPES
    for method in METHODS
    # compiling takes seconds: the largest layer of each model speaks for it
    if method != "compiled" or layer in [next(iter(layers)) for layers in MODELS.values()]
]


@pytest.fixture(autouse=True)
def _compile_afresh() -> None:
    """Compiled for the shapes of each test alone: torch gives up on a function that meets too many."""
    torch.compiler.reset()


def inputs(layer: str, dtype: str, requires_grad: bool) -> list[Tensor]:
    """q, k, v as a UNet makes them: heads of joined rows."""
    b, h, m, n, d = LAYERS[layer]
    generator = torch.Generator().manual_seed(SEED)
    joined = [torch.randn(b, rows, h, d, generator=generator, dtype=DTYPES[dtype]) for rows in (m, n, n)]
    return [x.transpose(1, 2).requires_grad_(requires_grad) for x in joined]


def gradients(method: Attention, layer: str, dtype: str) -> list[Tensor]:
    """Gradients for a method's results, in the layout of a UNet and a loss: heads of joined rows, maps as they are."""
    out, *maps = method(*inputs(layer, dtype, requires_grad=False))
    b, h, m, _, d = LAYERS[layer]
    return [torch.randn(b, m, h, d).to(out.dtype).transpose(1, 2), *(torch.randn_like(y) for y in maps)]


def train(method: Attention, arguments: list[Tensor], grads: list[Tensor]) -> None:
    torch.autograd.grad(method(*arguments), arguments, grads)


def record(benchmark: BenchmarkFixture, layer: str, dtype: str, products: int) -> None:
    """Add the machine and the share of its limit to the result."""
    b, h, m, n, d = LAYERS[layer]
    stats: Any = benchmark.stats
    rate = products * 2 * b * h * m * n * d / stats.stats.median
    limits = machine.measure()
    limit = {"float32": limits.gemm_rate, "bfloat16": limits.bfloat16_gemm_rate}[dtype]
    benchmark.extra_info.update(
        machine.describe_machine(), shape=[b, h, m, n, d], dtype=dtype, seed=SEED, gemm_share=rate / limit
    )


@pytest.mark.parametrize(("layer", "dtype", "method"), CASES)
def test_forward(benchmark: BenchmarkFixture, layer: str, dtype: str, method: str) -> None:
    arguments = inputs(layer, dtype, requires_grad=False)
    benchmark.group = f"cross_attention forward {layer} {dtype}"
    benchmark.pedantic(METHODS[method], arguments, rounds=15, warmup_rounds=3)
    record(benchmark, layer, dtype, products=2)


@pytest.mark.parametrize(("layer", "dtype", "method"), CASES)
def test_forward_and_backward(benchmark: BenchmarkFixture, layer: str, dtype: str, method: str) -> None:
    arguments = inputs(layer, dtype, requires_grad=True)
    benchmark.group = f"cross_attention forward and backward {layer} {dtype}"
    grads = gradients(METHODS[method], layer, dtype)
    benchmark.pedantic(train, (METHODS[method], arguments, grads), rounds=11, warmup_rounds=3)
    record(benchmark, layer, dtype, products=7)


@dataclass(frozen=True)
class Memory:
    """Kept and peak bytes, see the top of this file."""

    kept: int
    peak: int


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that torch's allocator has handed out since the beginning, after each change; the last with the result alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def memory(method: Attention, layer: str, dtype: str) -> Memory:
    """The memory of a training step on one layer."""

    def forward() -> object:
        arguments = inputs(layer, dtype, requires_grad=True)
        return arguments, method(*arguments)

    def step() -> None:
        train(method, inputs(layer, dtype, requires_grad=True), grads)

    grads = gradients(method, layer, dtype)
    # whatever is made once is made before
    step()
    return Memory(kept=allocations(forward)[-1], peak=max(allocations(step)))


def largest_batch(method: Attention, model: str, dtype: str) -> int:
    """See the top of this file."""
    layers = {layer: memory(method, layer, dtype) for layer in MODELS[model]}
    kept = sum(MODELS[model][layer] * needed.kept for layer, needed in layers.items())
    passing = max(needed.peak - needed.kept for needed in layers.values())
    return int(BUDGET * BATCH / (kept + passing))


@pytest.mark.parametrize(("layer", "dtype", "method"), CASES)
def test_memory(benchmark: BenchmarkFixture, layer: str, dtype: str, method: str) -> None:
    """The time in this result is how long the measurement took."""
    benchmark.group = f"cross_attention memory {layer} {dtype}"
    needed = benchmark.pedantic(memory, (METHODS[method], layer, dtype), rounds=1)
    benchmark.extra_info.update(machine.describe_machine(), shape=list(LAYERS[layer]), dtype=dtype)
    benchmark.extra_info.update(kept_bytes=needed.kept, peak_bytes=needed.peak)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_largest_batch(benchmark: BenchmarkFixture, model: str, dtype: str) -> None:
    """The time in this result is how long the measurement took."""
    benchmark.group = f"cross_attention largest batch {model} {dtype}"
    ours = benchmark.pedantic(largest_batch, (kernel, model, dtype), rounds=1)
    benchmark.extra_info.update(machine.describe_machine(), model=model, dtype=dtype, budget_bytes=BUDGET)
    benchmark.extra_info.update(largest_batch=ours, eager_largest_batch=largest_batch(eager, model, dtype))
