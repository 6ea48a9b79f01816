"""winograd_convolution against torch's convolution in float64, and automatic differentiation of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import conv2d

from seal_fast.ops import WinogradWeight, winograd_convolution
from seal_fast.ops.winograd_convolution import winograd_convolution_op
from tests.ops.compiled import LEVELS, MODULE, addresses, error, needs_native

# images, channels, filters, height, width
SHAPES = {
    "one pixel": (1, 16, 16, 1, 1),
    "a part of a tile": (3, 16, 48, 3, 2),
    "the zoo's": (5, 32, 64, 16, 16),
    "odd sides": (2, 80, 16, 9, 13),
    "one block and a tile": (49, 16, 32, 4, 4),
    "wide": (2, 96, 112, 6, 7),
    "one row": (4, 32, 16, 1, 37),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and a bias in `dtype`."""
    images, channels, filters, *sides = shape
    sizes = (images, channels, *sides), (filters, channels, 3, 3), (filters,)
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)], ids=str)
def test_values_and_gradient_are_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, with_bias: bool, generator: torch.Generator
) -> None:
    x, weight, bias = draw(shape, dtype, generator)
    exact, got_x = x.double().requires_grad_(), x.requires_grad_()
    want = conv2d(exact, weight.double(), bias.double() if with_bias else None, padding=1)
    got = winograd_convolution(got_x, WinogradWeight(weight), bias if with_bias else None)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) < tolerance

    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(dtype)
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())
    (got_grad,) = torch.autograd.grad(got, got_x, grad)
    assert got_grad.dtype == dtype
    assert error(got_grad, want_grad) < tolerance


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_only_input_and_output_of_bfloat16_are_rounded(shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Under autocast too, where a weight that was transformed in bfloat16 would be wrong by far more."""
    x, weight, bias = draw(shape, torch.float32, generator)
    x, frozen = x.bfloat16(), WinogradWeight(weight)
    exact = conv2d(x.double(), weight.double(), bias.double(), padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = winograd_convolution(x, frozen, bias)
    assert got.dtype == torch.bfloat16
    # half a unit of the last place, of a number below the next power of two
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2e-4 * float(exact.square().mean().sqrt()))


def test_gradient_of_the_input(generator: torch.Generator) -> None:
    x, weight, bias = draw((1, 16, 16, 3, 5), torch.float64, generator)
    frozen = WinogradWeight(weight)
    assert gradcheck(lambda x: winograd_convolution(x, frozen, bias), (x.requires_grad_(),))


def test_layout_of_the_input_does_not_matter(generator: torch.Generator) -> None:
    x, weight, bias = draw((3, 16, 32, 5, 6), torch.float32, generator)
    frozen = WinogradWeight(weight)
    out = winograd_convolution(x, frozen, bias)
    assert out.equal(winograd_convolution(x.contiguous(memory_format=torch.channels_last), frozen, bias))


def test_images_are_computed_apart(generator: torch.Generator) -> None:
    """A NaN stays in its image, and what an image becomes does not depend on those beside it."""
    x, weight, bias = draw((7, 16, 32, 11, 5), torch.float32, generator)
    frozen = WinogradWeight(weight)
    out = winograd_convolution(x, frozen, bias)
    alone = torch.cat([winograd_convolution(one, frozen, bias) for one in x.split(1)])
    assert out.equal(alone)
    x[2, 3, 4, 1] = torch.nan
    poisoned = winograd_convolution(x, frozen, bias)
    assert poisoned[2].isnan().any()
    rest = [0, 1, 3, 4, 5, 6]
    assert poisoned[rest].equal(out[rest])


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "suffix", "tolerance"), [(torch.float32, "f32", 2e-4), (torch.bfloat16, "bf16", 2e-2)], ids=str
)
def test_every_instruction_set_fills_its_output(
    dtype: torch.dtype, suffix: str, tolerance: float, threads: int, generator: torch.Generator
) -> None:
    launch = getattr(MODULE, f"winograd_convolution_{suffix}")
    for shape in SHAPES.values():
        x, weight, bias = draw(shape, torch.float32, generator)
        x = x.to(dtype, memory_format=torch.channels_last)
        images, channels, filters, height, width = shape
        want = conv2d(x.double(), weight.double(), bias.double(), padding=1)
        transformed = WinogradWeight(weight).forward
        for isa in LEVELS:
            runs = []
            for used in (threads, 1):
                out = torch.full_like(want, torch.nan, dtype=dtype, memory_format=torch.channels_last)
                floats = MODULE.winograd_workspace(channels, filters, used)
                workspace = torch.full((floats + 64,), torch.nan)
                tensors = addresses(x=x, weight=transformed, bias=bias, out=out, workspace=workspace)
                sizes = {"images": images, "height": height, "width": width, "channels": channels, "filters": filters}
                launch({**tensors, **sizes}, used, isa)
                assert workspace[floats:].isnan().all()
                runs.append(out)
            assert error(runs[0], want) < tolerance
            assert runs[0].equal(runs[1])


@pytest.mark.parametrize("with_bias", [True, False])
def test_registration(with_bias: bool, generator: torch.Generator) -> None:
    x, weight, bias = draw((2, 16, 32, 5, 3), torch.float32, generator)
    arguments = x, WinogradWeight(weight).forward, bias if with_bias else None
    torch.library.opcheck(torch.ops.seal_fast.winograd_convolution.default, arguments)
    assert winograd_convolution_op(*arguments).shape == (2, 32, 5, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((16, 8, 3, 3), torch.float32, "multiples of 16"),
        ((24, 16, 3, 3), torch.float32, "multiples of 16"),
        ((16, 16, 1, 1), torch.float32, "multiples of 16"),
        ((16, 16, 3), torch.float32, "multiples of 16"),
        ((16,), torch.float32, "multiples of 16"),
        ((16, 16, 3, 3), torch.int64, "floating point"),
    ],
)
def test_bad_weights_are_named(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinogradWeight(torch.zeros(shape, dtype=dtype))


def test_a_weight_that_is_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze it"):
        WinogradWeight(torch.zeros(16, 16, 3, 3, requires_grad=True))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 16, 3), None, "x must be"),
        (torch.zeros(2, 32, 3, 3), None, "x must be"),
        (torch.zeros(0, 16, 3, 3), None, "no size 0"),
        (torch.zeros(2, 16, 3, 3, dtype=torch.float64), None, "both be float32"),
        (torch.zeros(2, 16, 3, 3, dtype=torch.float16), None, "both be float32"),
        (torch.zeros(2, 16, 3, 3, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16), "bias must be"),
        (torch.zeros(2, 16, 3, 3), torch.zeros(16), "bias must be"),
        (torch.zeros(2, 16, 3, 3), torch.zeros(32, dtype=torch.float64), "bias must be"),
        (torch.zeros(2, 16, 3, 3), torch.zeros(32, requires_grad=True), "freeze it"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        winograd_convolution(x, WinogradWeight(torch.zeros(32, 16, 3, 3)), bias)
