"""group_norm_silu against torch's group_norm and silu in float64, and automatic differentiation of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import group_norm, silu

from seal_fast.ops import group_norm_silu
from seal_fast.ops.group_norm_silu import group_norm_silu_op, reference_group_norm_silu
from tests.ops.compiled import LEVELS, MODULE, addresses, error, needs_native

# images, groups, channels of a group, height, width
SHAPES = {
    "one channel": (1, 1, 1, 1, 9),
    "less than a vector": (3, 1, 5, 3, 1),
    "the zoo's": (2, 8, 4, 16, 16),
    "a vector and a part": (5, 3, 7, 9, 5),
    "six vectors": (1, 4, 24, 7, 11),
    "eight vectors": (2, 8, 16, 6, 6),
    "many pixels": (2, 1, 3, 40, 37),
}
EPS = 1e-6


def draw(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in `dtype`, channels-last; weight, bias and shift."""
    images, groups, width, *sides = shape
    channels = groups * width
    loc = 3 * torch.randn(images, channels, 1, 1, generator=generator, dtype=torch.float64)
    x = loc + torch.randn(images, channels, *sides, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    shift = torch.randn(images, channels, generator=generator, dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last), weight, bias, shift


def written_out(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int) -> Tensor:
    return silu(group_norm(x.double() + shift[:, :, None, None], groups, weight, bias, EPS))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
    ids=str,
)
def test_values_and_gradient_are_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, generator: torch.Generator
) -> None:
    x, weight, bias, shift = draw(generator, shape, dtype)
    exact, got_x = x.double().requires_grad_(), x.requires_grad_()
    want = written_out(exact, weight, bias, shift, shape[1])
    got = group_norm_silu(got_x, weight, bias, shape[1], EPS, shift)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) < tolerance

    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(dtype)
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())
    (got_grad,) = torch.autograd.grad(got, got_x, grad)
    assert got_grad.dtype == dtype
    # what is left of a gradient after its averages were taken out is smaller than what was rounded
    assert error(got_grad, want_grad) < 10 * tolerance


def test_gradients_of_input_and_shift(generator: torch.Generator) -> None:
    x, weight, bias, shift = draw(generator, (2, 2, 3, 3, 2))
    x, shift = x.requires_grad_(), shift.requires_grad_()
    assert gradcheck(lambda x, shift: group_norm_silu(x, weight, bias, 2, EPS, shift), (x, shift))


def test_without_shift_is_a_shift_of_zero(generator: torch.Generator) -> None:
    x, weight, bias, shift = draw(generator, (3, 4, 8, 5, 5), torch.float32)
    plain = group_norm_silu(x, weight, bias, 4, EPS)
    torch.testing.assert_close(plain, group_norm_silu(x, weight, bias, 4, EPS, torch.zeros_like(shift)))


def test_layout_of_the_input_does_not_matter(generator: torch.Generator) -> None:
    x, weight, bias, shift = draw(generator, (3, 4, 8, 5, 5), torch.float32)
    assert group_norm_silu(x.contiguous(), weight, bias, 4, EPS, shift).equal(group_norm_silu(x, weight, bias, 4, EPS, shift))


def test_a_large_mean_costs_no_precision(generator: torch.Generator) -> None:
    """Sums of squares about 0 would leave nothing of the variance."""
    x = (1e4 + torch.randn(2, 32, 16, 16, generator=generator)).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32), torch.zeros(32)
    want = written_out(x, ones.double(), zeros.double(), torch.zeros(2, 32), 4)
    # x itself is known to 1e-3 of its deviation
    assert error(group_norm_silu(x, ones, zeros, 4, EPS), want) < 1e-2


def test_extreme_inputs(generator: torch.Generator) -> None:
    """SiLU of large numbers is the number or nothing; a NaN stays in its group."""
    x, _, bias, _ = draw(generator, (1, 2, 16, 8, 8), torch.float32)
    large = group_norm_silu(x, torch.full((32,), 1e4), bias, 2, EPS)
    z = group_norm(x, 2, torch.full((32,), 1e4), bias.float(), EPS)
    torch.testing.assert_close(large, torch.where(z > 100, z, large).where(z > -100, 0), rtol=1e-4, atol=1e-30)
    poisoned = x.clone()
    poisoned[0, 3, 2, 2] = torch.nan
    out = group_norm_silu(poisoned, torch.ones(32), bias, 2, EPS)
    assert out[:, :16].isnan().all()
    assert out[:, 16:].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_fills_its_outputs(threads: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    suffix, tolerance = ("f32", 1e-4) if dtype == torch.float32 else ("bf16", 0.05)
    for shape in SHAPES.values():
        x, weight, bias, shift = draw(generator, shape, dtype)
        exact = x.double().requires_grad_()
        want = written_out(exact, weight, bias, shift, shape[1])
        grad = torch.randn(want.shape, generator=generator).to(dtype, memory_format=torch.channels_last)
        (want_grad,) = torch.autograd.grad(want, exact, grad.double())
        weight, bias, shift = weight.float(), bias.float(), shift.float()
        for isa in LEVELS:
            runs = []
            for used in (threads, 1):
                out, x_grad = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
                stats, workspace = torch.full((len(x), shape[1], 2), torch.nan), torch.full((len(x), 4, x.shape[1]), torch.nan)
                given = addresses(x=x, shift=shift, weight=weight, bias=bias, stats=stats, workspace=workspace)
                images, channels, height, width = x.shape
                sizes = {"images": images, "pixels": height * width, "channels": channels, "groups": shape[1]}
                forward = getattr(MODULE, f"group_norm_silu_{suffix}")
                forward({**given, **sizes, **addresses(out=out), "eps": EPS}, used, isa)
                backward = getattr(MODULE, f"group_norm_silu_backward_{suffix}")
                backward({**given, **sizes, **addresses(grad=grad, x_grad=x_grad)}, used, isa)
                runs.append((out, x_grad))
            assert error(runs[0][0], want) < tolerance
            assert error(runs[0][1], want_grad) < 10 * tolerance
            assert all(one.equal(other) for one, other in zip(*runs, strict=True))


def test_statistics(generator: torch.Generator) -> None:
    x, weight, bias, shift = draw(generator, (3, 4, 5, 7, 9), torch.float32)
    arguments = x, weight.float(), bias.float(), shift.float(), 4, EPS
    for stats in (group_norm_silu_op(*arguments)[1], reference_group_norm_silu(*arguments)[1]):
        h = (x.double() + shift[:, :, None, None]).reshape(3, 4, -1)
        torch.testing.assert_close(stats[:, :, 0].double(), h.mean(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats[:, :, 1].double(), (h.var(2, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shifted", [True, False])
def test_registration(shifted: bool, generator: torch.Generator) -> None:
    x, weight, bias, shift = (t.float() for t in draw(generator, (2, 2, 3, 4, 5)))
    x = x.contiguous(memory_format=torch.channels_last)
    added = shift if shifted else None
    torch.library.opcheck(torch.ops.seal_fast.group_norm_silu.default, (x, weight, bias, added, 2, EPS))
    stats = group_norm_silu_op(x, weight, bias, added, 2, EPS)[1]
    torch.library.opcheck(torch.ops.seal_fast.group_norm_silu_backward.default, (x, x, weight, bias, added, stats, 2))


@pytest.mark.parametrize(
    ("x", "weight", "groups", "shift", "message"),
    [
        (torch.zeros(2, 4, 3), torch.ones(4), 2, None, "x must be"),
        (torch.zeros(2, 4, 3, 3, dtype=torch.int64), torch.ones(4), 2, None, "x must be"),
        (torch.zeros(0, 4, 3, 3), torch.ones(4), 2, None, "no size 0"),
        (torch.zeros(2, 4, 3, 3), torch.ones(4), 3, None, "groups must divide"),
        (torch.zeros(2, 4, 3, 3), torch.ones(4), 0, None, "groups must divide"),
        (torch.zeros(2, 4, 3, 3), torch.ones(5), 2, None, "weight must be"),
        (torch.zeros(2, 4, 3, 3), torch.ones(4), 2, torch.zeros(1, 4), "shift must be"),
        (torch.zeros(2, 4, 3, 3), torch.ones(4, requires_grad=True), 2, None, "constant"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, weight: Tensor, groups: int, shift: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(x, weight, torch.zeros(4), groups, EPS, shift)
