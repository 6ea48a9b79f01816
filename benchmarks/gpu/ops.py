"""Every op against plain torch, against torch.compile of it and, where there is one, against the library's own kernel.

`share_of_bandwidth` is the time that the bytes which must move take at the measured bandwidth over the time taken,
`share_of_gemm` likewise with the matrix products and the rate measured in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.bench_cross_attention import LAYERS, MODELS, eager
from benchmarks.bench_gaussian import two_products
from benchmarks.bench_sampler_step import STEP, torch_lines
from benchmarks.gpu.device import DTYPES, Limits, Run, Scale, device, medians
from seal_fast.ops import (
    cross_attention,
    gaussian_kl_stats,
    gaussian_log_ratio,
    reversed_loss,
    sampler_step,
)
from seal_fast.ops.gaussian import reference_gaussian_kl_stats

BATCH = 4
COMPILED = [next(iter(layers)) for layers in MODELS.values()]
"""The largest layer of each model speaks for what takes long to compile."""


@dataclass(frozen=True)
class Case:
    """What runs for one result, and the least that it must do.

    Attributes:
        op: name of the op.
        facts: what else the result says about the case.
        contenders: plain torch first, ours last.
        least_bytes: how many bytes must move.
        flops: FLOP of the matrix products.
        dtype: the dtype of their operands.
    """

    op: str
    facts: dict[str, Any]
    contenders: Mapping[str, Run]
    least_bytes: int
    flops: int = 0
    dtype: str = "float32"


def result(case: Case, limits: Limits, scale: Scale) -> dict[str, Any]:
    taken = medians(case.contenders, scale)
    first, ours = next(iter(taken)), taken["seal_fast"]
    found = {
        "op": case.op,
        **case.facts,
        "dtype": case.dtype,
        "seconds": taken,
        "speedups": {name: seconds / ours for name, seconds in taken.items() if name != "seal_fast"},
        "baseline": first,
        "share_of_bandwidth": case.least_bytes / limits.bandwidth / ours,
    }
    if case.flops:
        found["share_of_gemm"] = case.flops / limits.gemm[case.dtype] / ours
    return found


def compiled(function: Callable[..., Any], scale: Scale) -> Callable[..., Any]:
    """Compile for these shapes alone: torch gives up on a function that meets too many."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, backend="eager" if scale.tiny else "inductor")


def gradients(function: Callable[..., Any], leaves: list[Tensor], *others: Tensor) -> object:
    """Forward and backward."""
    results = function(*leaves, *others)
    outputs = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def attention_cases(scale: Scale) -> Iterator[Case]:
    layers = {"tiny": (1, 2, 16, 7, 8)} if scale.tiny else LAYERS
    for name, (_, h, m, n, d) in layers.items():
        b = 1 if scale.tiny else BATCH
        for dtype in ("float32",) if scale.tiny else ("bfloat16", "float16") if name in COMPILED else ("bfloat16",):
            joined = [torch.randn(b, rows, h, d, device=device()).to(DTYPES[dtype]) for rows in (m, n, n)]
            q, k, v = (x.transpose(1, 2) for x in joined)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            methods: dict[str, Callable[..., Any]] = {
                "eager": eager,
                "sdpa_without_maps": scaled_dot_product_attention,
            }
            if scale.tiny or (name in COMPILED and dtype == "bfloat16"):
                methods["compiled"] = compiled(eager, scale)
            methods["seal_fast"] = cross_attention
            size, product = joined[0].element_size(), b * h * m * n * d
            heads, maps = b * h * d * size, 4 * b * n * m
            facts = {"layer": name, "shape": [b, h, m, n, d]}
            forward = {key: partial(f, q, k, v) for key, f in methods.items()}
            both = {key: partial(gradients, f, leaves) for key, f in methods.items()}
            moved = heads * (2 * m + 2 * n) + maps
            yield Case("cross_attention", {**facts, "pass": "forward"}, forward, moved, 4 * product, dtype)
            moved += heads * (3 * m + 4 * n) + maps
            yield Case("cross_attention", {**facts, "pass": "forward and backward"}, both, moved, 14 * product, dtype)


def gaussian_cases(scale: Scale) -> Iterator[Case]:
    sizes = [(3, 2, (3, 4, 4))] if scale.tiny else [(16_384, 8, (3, 32, 32)), (512, 8, (3, 256, 256))]
    for n, k, shape in sizes:
        x = torch.randn(n, *shape, device=device())
        mu, gamma = torch.randn(k, *shape, device=device()) / 10, 0.5 + torch.rand(k, *shape, device=device())
        methods = {"two_products": two_products, "seal_fast": gaussian_log_ratio}
        contenders = {key: partial(f, x, mu, gamma) for key, f in methods.items()}
        facts = {"shape": [n, k, *shape], "pass": "forward"}
        yield Case("gaussian_log_ratio", facts, contenders, x.nbytes + mu.nbytes + gamma.nbytes)
    k, shape = (2, (3, 4, 4)) if scale.tiny else (64, (3, 256, 256))
    mu, gamma = torch.randn(k, *shape, device=device()), 0.5 + torch.rand(k, *shape, device=device())
    reference, flat = reference_gaussian_kl_stats, (mu.flatten(1), gamma.flatten(1))
    stats = {
        "eager": partial(reference, *flat),
        "compiled": partial(compiled(reference, scale), *flat),
        "seal_fast": partial(gaussian_kl_stats, *flat),
    }
    yield Case("gaussian_kl_stats", {"shape": [k, *shape], "pass": "forward"}, stats, mu.nbytes + gamma.nbytes)


def loss_lines(first: Tensor, second: Tensor, difference: Tensor) -> Tensor:
    return (difference - (first - second)).square().flatten(1).sum(1).mean() / 2


def reversion_cases(scale: Scale) -> Iterator[Case]:
    """The ops of a TERD iteration besides the network, at its own batch and at one that fills the GPU."""
    for items, *shape in [(2, 3, 4, 4)] if scale.tiny else [(16, 3, 32, 32), (64, 3, 256, 256)]:
        facts = {"shape": [items, *shape]}
        x, eps, z = torch.randn(3, items, *shape, device=device())
        mu, gamma = torch.rand(2, *shape, device=device())
        predictions = [y.detach().requires_grad_() for y in (x, eps)]
        functions = {"eager": loss_lines, "compiled": compiled(loss_lines, scale), "seal_fast": reversed_loss}
        losses = {key: partial(gradients, f, predictions, z) for key, f in functions.items()}
        # three are read and the residual is written; the residual is read and two gradients are written
        yield Case("reversed_loss", {**facts, "pass": "forward and backward"}, losses, 7 * x.nbytes)

        steps = {
            "eager": partial(torch_lines, x, eps, z, mu, gamma),
            "compiled": partial(compiled(torch_lines, scale), x, eps, z, mu, gamma),
            "seal_fast": partial(sampler_step, x, eps, STEP, mu=mu, gamma=gamma, fresh=z),
        }
        yield Case("sampler_step", {**facts, "pass": "forward"}, steps, 4 * x.nbytes)


def measure(limits: Limits, scale: Scale) -> Iterator[dict[str, Any]]:
    """Results, one at a time so that a time limit costs only those that are left."""
    for case in gaussian_cases(scale):
        yield result(case, limits, scale)
    for case in reversion_cases(scale):
        yield result(case, limits, scale)
    for case in attention_cases(scale):
        yield result(case, limits, scale)
