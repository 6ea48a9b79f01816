"""cross_attention against softmax attention written out in float64, automatic differentiation, and bit patterns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from seal_fast.ops import cross_attention
from seal_fast.ops.cross_attention import forward_op
from tests.ops.attention import (
    FLOAT_EPSILON,
    HALVES,
    SUFFIXES,
    assert_at_most_twice_the_error_of_plain,
    draw,
    plain,
    views,
    with_grads,
)
from tests.ops.compiled import LEVELS, MODULE, addresses, needs_native

# B, H, M, N, D: every head size of Stable Diffusion and an odd one, prompts of one and of many chunks, blocks that are cut off
SHAPES = [
    (2, 3, 100, 77, 40),
    (1, 2, 64, 200, 59),
    (3, 1, 1, 77, 64),
    (1, 5, 7, 128, 80),
    (1, 2, 100, 1, 128),
    (2, 2, 7, 77, 160),
    (1, 1, 1, 1, 1),
    (1, 3, 65, 3, 17),
]


@pytest.mark.parametrize(("loss", "chosen"), [("out", False), ("maps", True), ("both", False), ("both", True)])
@pytest.mark.parametrize("dtype", SUFFIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_plain_torch(
    shape: tuple[int, ...], dtype: torch.dtype, loss: str, chosen: bool, generator: torch.Generator
) -> None:
    b, h, m, n, d = shape
    inputs = draw(generator, shape, dtype)
    # repeated and unordered on purpose
    tokens = torch.randint(n, (5,), generator=generator) if chosen else None
    out_grad = torch.randn(b, h, m, d, generator=generator).to(dtype) if loss != "maps" else None
    maps_grad = torch.randn(b, 5 if chosen else n, m, generator=generator) if loss != "out" else None
    assert_at_most_twice_the_error_of_plain(cross_attention, inputs, tokens, out_grad, maps_grad)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3), (1, 2, 3, 1, 2), (1, 1, 1, 5, 1)])
def test_gradients(shape: tuple[int, ...], chosen: bool, generator: torch.Generator) -> None:
    inputs = [x.requires_grad_() for x in draw(generator, shape, torch.float64)]
    tokens = torch.randint(shape[3], (3,), generator=generator) if chosen else None
    assert gradcheck(lambda q, k, v: cross_attention(q, k, v, tokens, scale=0.7), inputs)
    assert gradcheck(lambda q, k, v: cross_attention(q, k, v, tokens)[0], inputs)
    assert gradcheck(lambda q, k: cross_attention(q, k, inputs[2].detach(), tokens)[1], inputs[:2])


def test_reference_is_softmax_attention(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "reference")
    inputs, tokens = draw(generator, (2, 3, 9, 7, 5), torch.float64), torch.tensor([6, 0, 0])
    for got, want in zip(cross_attention(*inputs, tokens), plain(*inputs, tokens), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@needs_native
def test_float64_is_left_to_the_reference(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="no float64"):
        cross_attention(*draw(generator, (1, 1, 2, 2, 2), torch.float64))


def test_maps_of_all_tokens_sum_to_one(generator: torch.Generator) -> None:
    _, maps = cross_attention(*draw(generator, (2, 8, 70, 77, 40)))
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 70), rtol=1e-6, atol=0.0)


def test_the_exponential_is_precise_over_its_whole_range() -> None:
    """Two keys with logits 0 and x give e^x / (1 + e^x). Rounding x log2(e), and log2(e), costs up to 1.25 |x| epsilon."""
    x = torch.linspace(-86.0, 0.0, 30_000)
    keys = torch.stack([torch.zeros_like(x), x], dim=1)[:, None, :, None]
    _, maps = cross_attention(torch.ones(len(x), 1, 1, 1), keys, torch.zeros_like(keys), torch.tensor([1]), scale=1.0)
    want = torch.sigmoid(x.double())
    error = (maps.flatten().double() / want - 1).abs() / (3 + 1.25 * x.abs())
    assert float(error.max()) < FLOAT_EPSILON


def test_logits_of_any_size(generator: torch.Generator) -> None:
    for scale in (0.0, -0.3, 50.0):
        q, k, v = draw(generator, (1, 2, 33, 77, 40))
        _, maps = cross_attention(q, k, v, scale=scale)
        p = torch.softmax(scale * (q.double() @ k.double().transpose(2, 3)), dim=3)
        # the rounding of a logit becomes the relative error of its exponential
        torch.testing.assert_close(maps.double(), p.mean(1).transpose(1, 2), rtol=0.0, atol=1e-6 * (1 + 10 * abs(scale)))
    # one key takes everything, whatever the others round to
    out, maps = cross_attention(q, k, v, scale=1e30)
    best = (q @ k.transpose(2, 3)).argmax(3)
    torch.testing.assert_close(out, v.gather(2, best[..., None].expand(-1, -1, -1, 40)))
    assert torch.equal(maps.sum(1), torch.ones(1, 33))


@pytest.mark.parametrize("dtype", SUFFIXES)
def test_a_negative_scale(dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs, scale = draw(generator, (1, 2, 35, 77, 19), dtype), -0.3
    weights = torch.randn(1, 2, 35, 19, generator=generator).to(dtype), torch.randn(1, 77, 35, generator=generator)

    def negative(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        return cross_attention(q, k, v, tokens, scale=scale)

    def written_out(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        return plain(scale * 19**0.5 * q, k, v, tokens)

    rounding = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    got = with_grads(negative, inputs, None, weights)
    want = with_grads(written_out, [x.double() for x in inputs], None, weights)
    for ours, exact in zip(got, want, strict=True):
        assert float((ours.double() - exact).norm()) <= rounding * float(exact.norm())


@pytest.mark.parametrize("dtype", HALVES)
def test_maps_of_half_precision_are_not_rounded_to_it(dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = draw(generator, (2, 3, 70, 77, 40), dtype)
    want = plain(*(x.double() for x in inputs))[1]
    torch.testing.assert_close(cross_attention(*inputs)[1].double(), want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), -float("inf")])
def test_spoiled_inputs_spoil_what_they_spoil_in_plain_torch(which: int, spoiler: float, generator: torch.Generator) -> None:
    inputs = draw(generator, (2, 2, 21, 77, 24))
    inputs[which][1, 0, 20, 5] = spoiler
    weights = torch.ones(2, 2, 21, 24), torch.ones(2, 77, 21)
    got, want = with_grads(cross_attention, inputs, None, weights), with_grads(plain, inputs, None, weights)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_strided_inputs(generator: torch.Generator) -> None:
    maps_grad = torch.randn(2, 50, 77, generator=generator).transpose(1, 2)
    out_grad = torch.randn(2, 50, 3 * 24, generator=generator).view(2, 50, 3, 24).transpose(1, 2)
    for name, inputs in views(generator, (2, 3, 50, 77, 24)).items():
        dense = [x.contiguous() for x in inputs]
        got = with_grads(cross_attention, inputs, None, (out_grad, maps_grad))
        want = with_grads(cross_attention, dense, None, (out_grad.contiguous(), maps_grad.contiguous()))
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)), name


def test_heads_of_the_result_join_without_a_copy(generator: torch.Generator) -> None:
    out, _ = cross_attention(*draw(generator, (2, 3, 10, 7, 8)))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chosen", [False, True])
def test_registration(
    chosen: bool, dtype: torch.dtype, backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
    q, k, v = draw(generator, (2, 2, 6, 5, 4), dtype)
    tokens = torch.tensor([4, 1, 1]) if chosen else None
    torch.library.opcheck(torch.ops.seal_fast.cross_attention.default, (q, k, v, tokens, 0.5))
    grads = torch.ones_like(q), torch.ones_like(forward_op(q, k, v, tokens, 0.5)[1])
    cases = [
        (grads[0], grads[1], [True, True, True]),
        (grads[0], None, [True, False, True]),
        (None, grads[1], [False, True, True]),
        (None, None, [True, True, True]),
        (grads[0], grads[1], [False, False, True]),
    ]
    for out_grad, maps_grad, needs in cases:
        arguments = (q, k, v, tokens, 0.5, out_grad, maps_grad, needs)
        torch.library.opcheck(
            torch.ops.seal_fast.cross_attention_backward.default, arguments, test_utils=["test_schema", "test_faketensor"]
        )


class BackwardCalls(TorchDispatchMode):
    """Remembers the last argument of every call of the backward op: which gradients it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.seal_fast.cross_attention_backward.default:
            self.asked.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_needed_gradients_are_computed(dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = draw(generator, (1, 2, 71, 9, 8), dtype)
    full = with_grads(cross_attention, inputs, None, (torch.ones(1, 2, 71, 8), torch.ones(1, 9, 71).cumsum(2)))[2:]
    for needs in itertools.product((False, True), repeat=3):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        out, maps = cross_attention(*leaves)
        if not any(needs):
            assert not out.requires_grad
            continue
        grads = torch.ones_like(out), torch.ones_like(maps).cumsum(2)
        wanted = [x for x in leaves if x.requires_grad]
        with BackwardCalls() as calls:
            got = torch.autograd.grad((out, maps), wanted, grads, allow_unused=True)
        assert calls.asked == [list(needs)]
        assert all(torch.equal(g, f) for g, f in zip(got, itertools.compress(full, needs), strict=True))


def test_maps_alone_give_no_gradient_to_values(generator: torch.Generator) -> None:
    leaves = [x.requires_grad_() for x in draw(generator, (1, 2, 6, 9, 8))]
    cross_attention(*leaves)[1].square().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[2].grad is None


@needs_native
def test_probabilities_are_never_stored(generator: torch.Generator) -> None:
    b, h, m, n, d = shape = (2, 8, 1024, 77, 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        leaves = [x.requires_grad_() for x in draw(generator, shape)]
        cross_attention(*leaves)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in leaves}
    sizes = {"batches": b, "heads": h, "queries": m, "keys": n, "dims": d, "map_rows": n}
    floats = MODULE.cross_attention_workspace
    assert floats(sizes, False, 2) == floats({**sizes, "queries": 64 * m}, False, 2)
    assert floats(sizes, True, 2) < b * h * m * n / 2


def with_strides(**tensors: Tensor) -> dict[str, Any]:
    """Addresses and strides of heads, as kernels take them."""
    return {**addresses(**tensors), **{f"{name}_strides": x.stride() for name, x in tensors.items()}}


def launch(isa: int, threads: int, inputs: list[Tensor], tokens: Tensor, out_grad: Tensor, maps_grad: Tensor) -> list[Tensor]:
    """The kernels alone, in outputs and a workspace full of NaN: out, maps and the gradients of q, k, v."""
    q, k, v = inputs
    batches, heads, queries, dims = q.shape
    shape = {"batches": batches, "heads": heads, "queries": queries, "keys": k.shape[2], "dims": dims, "map_rows": len(tokens)}
    out, maps = torch.full_like(q, torch.nan), torch.full((batches, len(tokens), queries), torch.nan)
    q_grad, k_grad, v_grad = (torch.full_like(x, torch.nan) for x in inputs)
    given = {**shape, **with_strides(q=q, k=k, v=v), **addresses(tokens=tokens), "scale": dims**-0.5}

    def run(direction: str, backward: bool, arguments: dict[str, Any]) -> None:
        workspace = torch.full((MODULE.cross_attention_workspace(shape, backward, threads),), torch.nan)
        kernel = getattr(MODULE, f"cross_attention_{direction}_{SUFFIXES[q.dtype]}")
        kernel({**given, **arguments, **addresses(workspace=workspace)}, threads, isa)

    run("forward", False, {**with_strides(out=out), **addresses(maps=maps)})
    grads = with_strides(out_grad=out_grad, q_grad=q_grad, k_grad=k_grad, v_grad=v_grad)
    run("backward", True, {**grads, **addresses(maps_grad=maps_grad)})
    return [out, maps, q_grad, k_grad, v_grad]


@needs_native
@pytest.mark.parametrize("dtype", SUFFIXES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 1100, 77, 40)])
def test_every_instruction_set_fills_its_outputs_and_does_not_depend_on_threads(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    b, h, m, n, d = shape
    inputs = draw(generator, shape, dtype)
    tokens = torch.randint(n, (4,), generator=generator)
    weights = torch.randn(b, h, m, d, generator=generator).to(dtype), torch.randn(b, 4, m, generator=generator)
    exact = with_grads(plain, [x.double() for x in inputs], tokens, weights)
    rounding = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for isa in LEVELS:
        alone = launch(isa, 1, inputs, tokens, *weights)
        for got, want in zip(alone, exact, strict=True):
            assert float((got.double() - want).norm()) <= rounding * (float(want.norm()) + (n == 1))
        for threads in (2, 3, 7):
            assert all(torch.equal(*pair) for pair in zip(alone, launch(isa, threads, inputs, tokens, *weights), strict=True))


@needs_native
def test_strides_are_four_numbers() -> None:
    q = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match="tuple of 4"):
        launch(0, 1, [q[None], q[None], q[None]], torch.zeros(1, dtype=torch.int64), q, torch.zeros(1, 1, 3))


@needs_native
def test_an_instruction_set_this_processor_lacks_is_refused() -> None:
    inputs = [torch.zeros(1, 1, 1, 1) for _ in range(3)]
    with pytest.raises(ValueError, match="instruction set"):
        launch(99, 1, inputs, torch.zeros(1, dtype=torch.int64), inputs[0], torch.zeros(1, 1, 1))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_precision_number_passes_through_one_key(dtype: torch.dtype) -> None:
    """With one key its probability is 1, and the result is the value itself; products of bfloat16 leave out subnormals."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 8, 1, 128)
    out, _ = cross_attention(torch.zeros_like(v), torch.zeros_like(v), v)
    subnormal = torch.finfo(torch.bfloat16).tiny
    torch.testing.assert_close(out, v, rtol=0.0, atol=subnormal, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype, generator: torch.Generator) -> None:
    """With two equal keys the result is the mean of two values: exact in float32 unless tiny, then rounded once."""
    bits = torch.randint(-(2**15), 2**15, (64, 8, 2, 128), generator=generator).to(torch.int16)
    # neighbours make ties
    bits[::2, :, 1] = bits[::2, :, 0] ^ 1
    v = bits.view(dtype)
    v = torch.where(v.float().abs() < 1e30, v, torch.zeros_like(v))
    zeros = torch.zeros_like(v)
    out, _ = cross_attention(zeros[:, :, :1], zeros, v)
    want = (v.float() / 2).sum(2, keepdim=True).to(dtype)
    torch.testing.assert_close(out, want, rtol=0.0, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_too_large_for_half_precision_are_infinite(dtype: torch.dtype) -> None:
    q, v = torch.zeros(1, 1, 2, 3, dtype=dtype), torch.ones(1, 1, 1, 3, dtype=dtype, requires_grad=True)
    largest = torch.tensor([1, -1, 0.25], dtype=dtype) * torch.finfo(dtype).max
    cross_attention(q, v.detach(), v)[0].backward(largest.expand(1, 1, 2, 3))
    assert v.grad is not None
    assert v.grad.flatten().tolist() == [float("inf"), -float("inf"), 2 * float(largest[2])]


def test_empty_results(generator: torch.Generator) -> None:
    for shape in ((0, 2, 5, 7, 4), (2, 2, 0, 7, 4)):
        inputs = [x.requires_grad_() for x in draw(generator, shape)]
        out, maps = cross_attention(*inputs)
        assert out.shape == inputs[0].shape
        assert maps.shape == (shape[0], 7, shape[2])
        (out.sum() + maps.sum()).backward()
        assert all(x.grad is not None and not x.grad.any() for x in inputs)
    inputs = draw(generator, (2, 2, 5, 7, 4))
    assert cross_attention(*inputs, torch.zeros(0, dtype=torch.int64))[1].shape == (2, 0, 5)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "tokens", "message"),
    [
        (some(2, 5, 4), some(2, 7, 4), some(2, 7, 4), None, "q must be"),
        (some(1, 2, 5, 4), some(1, 2, 7, 4), some(1, 2, 6, 4), None, "v must be"),
        (some(1, 2, 5, 4), some(1, 1, 7, 4), some(1, 1, 7, 4), None, "k must be"),
        (some(1, 2, 5, 4), some(1, 2, 7, 3), some(1, 2, 7, 3), None, "k must be"),
        (some(1, 2, 5, 4), some(1, 2, 0, 4), some(1, 2, 0, 4), None, "a key"),
        (some(1, 2, 5, 4), some(1, 2, 7, 4, dtype=torch.float64), some(1, 2, 7, 4), None, "k must be"),
        (*(some(1, 2, 5, 4, dtype=torch.int64) for _ in range(3)), None, "q must be floating point"),
        (*(some(1, 2, 5, 4) for _ in range(3)), torch.tensor([0, 5]), "0 ... 4"),
        (*(some(1, 2, 5, 4) for _ in range(3)), torch.tensor([-1]), "0 ... 4"),
        (*(some(1, 2, 5, 4) for _ in range(3)), torch.tensor([0], dtype=torch.int32), "int64"),
        (*(some(1, 2, 5, 4) for _ in range(3)), torch.tensor([[0]]), "tokens must be torch.int64 \\[T\\]"),
    ],
)
def test_bad_arguments_are_named(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_attention(q, k, v, tokens)
