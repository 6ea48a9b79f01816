"""All ops on every device and in every dtype, against the same call in float64 on the CPU; references on a device of their own.

Memory is poisoned with NaN, inputs are not dense, and on a GPU they come late on a stream of their own: what is not written,
what is read as if it were dense, and what does not wait on its stream all show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from seal_fast import ops
from seal_fast.ops.cross_attention import reference_cross_attention_backward
from seal_fast.ops.gaussian import reference_gaussian_kl_stats, reference_gaussian_log_ratio
from seal_fast.ops.reversed_loss import reference_reversed_loss
from seal_fast.ops.sampler_step import reference_sampler_step
from seal_fast.ops.winograd_convolution import reference_winograd_convolution

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SLEEP = 20_000_000
"""Cycles of the GPU, some 10 ms."""


@dataclass(frozen=True)
class Case:
    """An op as a function of float tensors.

    Attributes:
        leaves: shapes of what gradients are taken in.
        call: from the leaves, and float64 constants on their device, to the results.
        constants: shapes of those.
    """

    leaves: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]
    constants: tuple[tuple[int, ...], ...] = ()


STEP = ops.StepCoefficients(1.25, 1.5, 0.75, -1.75, from_mu=0.5, from_fresh=2.0)


def stepped(x: Tensor, eps: Tensor, mu: Tensor, gamma: Tensor, fresh: Tensor) -> Tensor:
    return ops.sampler_step(x, eps, STEP, mu=mu, gamma=gamma, fresh=fresh, limit=1.5)


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return ops.cross_attention(q, k, v, torch.tensor([1, 8, 1], device=q.device))


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # in half precision the networks keep torch's convolutions
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return ops.winograd_convolution(x.to(dtype), ops.WinogradWeight(weight.to(dtype)), bias.to(dtype))


CASES = {
    "reversed_loss": Case(((6, 1, 33), (6, 1, 33)), lambda one, two: ops.reversed_loss(one, two, torch.ones_like(one))),
    "sampler_step": Case(((6, 3, 37), (6, 3, 37), (3, 37), (3, 37), (6, 3, 37)), stepped),
    "gaussian_log_ratio": Case(((70, 3, 5), (9, 3, 5), (9, 3, 5)), lambda x, mu, g: ops.gaussian_log_ratio(x, mu, 1 + g.abs())),
    "gaussian_kl_stats": Case(((3, 5, 67), (3, 5, 67)), lambda mu, g: tuple(ops.gaussian_kl_stats(mu, 0.5 + g.abs()))),
    "winograd_convolution": Case(((3, 16, 7, 10),), convolved, ((32, 16, 3, 3), (32,))),
    "cross_attention": Case(((2, 3, 17, 20), (2, 3, 9, 20), (2, 3, 9, 20)), attended),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """A stream that is busy for a while."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        yield
    torch.cuda.current_stream().wait_stream(stream)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def results_and_gradients(case: Case, leaves: list[Tensor], constants: list[Tensor]) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in leaves]
    found = case.call(*leaves, *constants)
    results = list(found) if isinstance(found, tuple) else [found]
    open_ = [y for y in results if y.requires_grad]
    if not open_:
        return results
    # weights that differ from place to place, the same for every device and dtype
    weights = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y) for y in open_]
    return [*(y.detach() for y in results), *torch.autograd.grad(open_, leaves, weights)]


@pytest.mark.filterwarnings("ignore:.*slower torch reference.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_float64_on_the_cpu(
    name: str, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    case = CASES[name]
    leaves, constants = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for shapes in (case.leaves, case.constants)
    )
    rounded = [x.to(dtype) for x in leaves]
    with own_stream(device):
        late = [strided(x.to(device)) for x in rounded]
        got = results_and_gradients(case, late, [c.to(device) for c in constants])
    want = results_and_gradients(case, [x.double() for x in rounded], constants)
    assert len(got) == len(want)
    for ours, exact in zip(got, want, strict=True):
        assert ours.device.type == device
        assert float((ours.cpu().double() - exact).norm()) <= TOLERANCE[dtype] * max(1.0, float(exact.norm()))


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="meta")


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [
        (reference_reversed_loss, (on_meta(4, 5), on_meta(4, 5), on_meta(4, 5))),
        (reference_sampler_step, (on_meta(4, 5), on_meta(4, 5), STEP, on_meta(5), on_meta(5), None, None, 1.0)),
        (reference_winograd_convolution, (on_meta(2, 16, 5, 6), on_meta(36, 16, 32), on_meta(32))),
        (reference_gaussian_kl_stats, (on_meta(2, 5), on_meta(2, 5))),
        (reference_gaussian_log_ratio, (on_meta(4, 5), on_meta(2, 5), on_meta(2, 5), on_meta(2))),
        (
            reference_cross_attention_backward,
            (*[on_meta(1, 2, 5, 4)] * 3, None, 0.5, on_meta(1, 2, 5, 4), on_meta(1, 5, 5), [True] * 3),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_references_use_the_device_of_their_arguments_alone(reference: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Tensors without data stand in for those of a GPU: they cannot be read by the host, nor mixed with those of the CPU."""
    found = reference(*arguments)
    for result in found if isinstance(found, tuple) else (found,):
        assert result.device.type == "meta"
