"""reversed_loss against the loss written out in float64, and automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from seal_fast.ops import reversed_loss
from seal_fast.ops.backends import CUDA
from tests.ops.compiled import LEVELS, MODULE, addresses, needs_native


def draw(generator: torch.Generator, items: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Both predictions and the difference of the noises, float64."""
    first, second, difference = torch.randn(3, items, *shape, generator=generator, dtype=torch.float64)
    return first, second, difference


def written_out(first: Tensor, second: Tensor, difference: Tensor) -> Tensor:
    """The loss of each item."""
    first, second, difference = first.double(), second.double(), difference.double()
    # eps_2 = 0 loses nothing: the loss knows the difference only
    return torch.stack([0.5 * ((difference[n] - first[n]) - (0 - second[n])).norm() ** 2 for n in range(len(first))])


@pytest.mark.usefixtures("backend")
def test_loss_is_the_formula(sizes: tuple[int, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    inputs = [t.to(dtype) for t in draw(generator, *sizes)]
    got = reversed_loss(*inputs)
    assert got.shape == ()
    assert got.dtype == dtype
    # of one number near 0 only the sum's size is known to rounding
    torch.testing.assert_close(got.double(), written_out(*inputs).mean(), rtol=tolerance, atol=tolerance)


def test_gradients(generator: torch.Generator) -> None:
    assert gradcheck(reversed_loss, [t.requires_grad_() for t in draw(generator, 6, (3,))])


def test_gradients_of_the_kernel_are_those_of_the_reference(generator: torch.Generator) -> None:
    tensors = draw(generator, 6, (3, 9, 7))

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(reversed_loss(*leaves), leaves)

    for got, want in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - want).norm() / want.norm()) < 1e-5


def test_half_precision_predictions_are_computed_in_float32(generator: torch.Generator) -> None:
    first, second, difference = draw(generator, 4, (3, 20))
    half = first.bfloat16().requires_grad_(), second.bfloat16().requires_grad_(), difference.float()
    got = reversed_loss(*half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), written_out(*(t.detach() for t in half)).mean(), rtol=1e-5, atol=0)
    got.backward()
    want = ((half[0] - half[1]).detach().double() - difference) / 4
    assert half[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(half[0].grad.double(), want, rtol=0.02, atol=0.02)


def test_sums_of_many_squares_keep_their_precision(generator: torch.Generator) -> None:
    """A float32 running sum over 2^20 like terms would lose three digits."""
    first = 1 + 1e-3 * torch.rand(1, 2**20, generator=generator)
    zero = torch.zeros_like(first)
    torch.testing.assert_close(reversed_loss(first, zero, zero).double(), written_out(first, zero, zero)[0], rtol=2e-7, atol=0)


def test_strided_inputs(generator: torch.Generator) -> None:
    strided = [t.float().transpose(2, 3) for t in draw(generator, 4, (3, 8, 6))]
    assert not strided[0].is_contiguous()
    assert reversed_loss(*strided).equal(reversed_loss(*(t.contiguous() for t in strided)))


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_fills_its_output(
    sizes: tuple[int, tuple[int, ...]], threads: int, generator: torch.Generator
) -> None:
    first, second, difference = (t.float().flatten(1) for t in draw(generator, *sizes))
    want = written_out(first, second, difference)
    items, dims = first.shape
    for isa in LEVELS:
        runs = []
        for used in (threads, 1):
            losses, residual = torch.full((items,), torch.nan, dtype=torch.float64), torch.full_like(first, torch.nan)
            tensors = addresses(first=first, second=second, difference=difference, losses=losses, residual=residual)
            MODULE.reversed_loss({**tensors, "items": items, "dims": dims}, used, isa)
            runs.append((losses, residual))
        torch.testing.assert_close(runs[0][0], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(runs[0][1], difference - (first - second), rtol=1e-6, atol=1e-6)
        assert all(one.equal(other) for one, other in zip(*runs, strict=True))


def test_registration(generator: torch.Generator) -> None:
    torch.library.opcheck(torch.ops.seal_fast.reversed_loss.default, tuple(t.float() for t in draw(generator, 4, (5,))))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4,), (4,), (4,)), "first must be"),
        (((4, 5), (4, 6), (4, 5)), "second must be"),
        (((4, 5), (4, 5), (2, 5)), "difference must be"),
        (((0, 5), (0, 5), (0, 5)), "there must be a pair"),
    ],
)
def test_bad_arguments_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reversed_loss(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.usefixtures("kernels_without_gpu")
def test_a_failed_cuda_launch_raises() -> None:
    tensors = addresses(first=None, second=None, difference=None, losses=None, residual=None)
    with pytest.raises(RuntimeError, match="CUDA error"):
        CUDA.module.reversed_loss({**tensors, "items": 1, "dims": 1}, 0, 0)


@pytest.mark.usefixtures("gpu")
def test_gpu_agrees(sizes: tuple[int, tuple[int, ...]], generator: torch.Generator) -> None:
    inputs = [t.float() for t in draw(generator, *sizes)]
    got = reversed_loss(*(t.cuda() for t in inputs)).cpu()
    torch.testing.assert_close(got.double(), written_out(*inputs).mean(), rtol=1e-5, atol=1e-5)
