"""attention_distillation against softmax attention and the loss written out, in float64 and by automatic differentiation."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from seal_fast.ops import attention_distillation, cross_attention, native

# B, H, M, N, D
SHAPES = [(2, 3, 100, 77, 40), (1, 2, 64, 200, 59), (3, 1, 1, 77, 64), (1, 2, 67, 1, 8), (2, 2, 7, 3, 160)]
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    targets: Tensor
    weights: Tensor
    tokens: Tensor | None

    def in_dtype(self, dtype: torch.dtype, maps: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in self[:3]), self.targets.to(maps), self.weights.to(maps), self.tokens)


def draw(generator: torch.Generator, shape: tuple[int, ...], chosen: bool) -> Case:
    b, h, m, n, d = shape
    rows = [torch.randn(b, h, r, d, generator=generator, dtype=torch.float64) for r in (m, n, n)]
    tokens = torch.randint(n, (5,), generator=generator) if chosen else None
    count = 5 if chosen else n
    targets = torch.rand(b, count, m, generator=generator, dtype=torch.float64)
    # a weight may be zero or negative
    weights = torch.randn(b, count, generator=generator, dtype=torch.float64)
    weights[:, 0] = 0
    return Case(*rows, targets, weights, tokens)


def written_out(case: Case) -> tuple[Tensor, Tensor]:
    q, k, v, targets, weights, tokens = case
    p = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)
    maps = p.mean(1).transpose(1, 2)
    maps = maps if tokens is None else maps[:, tokens]
    return p @ v, torch.einsum("bt,btm->b", weights, (maps - targets).square()) / q.shape[2]


def fused(case: Case) -> tuple[Tensor, Tensor]:
    return attention_distillation(*case)


def with_grads(attention: object, case: Case, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor]:
    """out, loss, and the gradients of q, k and v for gradients of out and loss."""
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    results = attention(Case(*leaves, *case[3:]))  # type: ignore[operator]
    used = [(y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if g is not None]
    got = torch.autograd.grad([y for y, _ in used], leaves, [g for _, g in used], allow_unused=True)
    return [
        *(y.detach() for y in results),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(got, leaves, strict=True)),
    ]


@pytest.mark.parametrize("loss", ["out", "loss", "both"])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("dtype", SUFFIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, chosen: bool, loss: str, generator: torch.Generator
) -> None:
    case = draw(generator, shape, chosen).in_dtype(dtype, torch.float32)
    exact = case.in_dtype(torch.float64, torch.float64)
    out_grad = torch.randn(case.q.shape, generator=generator).to(dtype) if loss != "loss" else None
    # so large that the loss matters beside out
    loss_grad = 1e3 * torch.randn(shape[0], generator=generator) if loss != "out" else None
    got = with_grads(fused, case, (out_grad, loss_grad))
    want = with_grads(written_out, exact, (out_grad, loss_grad))
    assert [y.dtype for y in got] == [dtype, torch.float32, dtype, dtype, dtype]
    # with one key nothing depends on q and k
    largest = float(max(y.norm() for y in want[2:]))
    for name, ours, theirs in zip(("out", "loss", "q", "k", "v"), got, want, strict=True):
        assert ours.shape == theirs.shape
        # weights of both signs may cancel in the loss
        least = {"loss": 1.0, "q": largest, "k": largest}.get(name, 0.0)
        rounding = ROUNDING[torch.float32 if name == "loss" else dtype]
        assert float((ours.double() - theirs).norm()) <= rounding * max(float(theirs.norm()), least), name


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3), (1, 2, 3, 1, 2), (1, 1, 1, 5, 1)])
def test_gradients_of_the_reference(shape: tuple[int, ...], chosen: bool, generator: torch.Generator) -> None:
    case = draw(generator, shape, chosen)
    leaves = [x.requires_grad_() for x in case[:3]]
    assert gradcheck(lambda q, k, v: attention_distillation(q, k, v, *case[3:]), leaves)
    for got, want in zip(fused(case), written_out(case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_targets_that_are_met_cost_nothing(generator: torch.Generator) -> None:
    q, k, v = (x.float().requires_grad_() for x in draw(generator, (2, 3, 70, 9, 8), False)[:3])
    out, maps = cross_attention(q, k, v)
    own, loss = attention_distillation(q, k, v, maps.detach(), torch.ones(2, 9))
    assert torch.equal(own, out)
    assert float(loss.detach().max()) < 1e-13
    assert float(torch.autograd.grad(loss.sum(), q)[0].abs().max()) < 1e-7


def test_zero_weights(generator: torch.Generator) -> None:
    q, k, v, targets, weights, _ = draw(generator, (2, 3, 70, 9, 8), False).in_dtype(torch.float32, torch.float32)
    q.requires_grad_()
    _, loss = attention_distillation(q, k, v, targets, torch.zeros_like(weights))
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), q)[0].any()


def test_no_tokens(generator: torch.Generator) -> None:
    q, k, v = draw(generator, (2, 3, 70, 9, 8), False).in_dtype(torch.float32, torch.float32)[:3]
    nothing = torch.zeros(0, dtype=torch.int64)
    out, loss = attention_distillation(q, k, v, torch.zeros(2, 0, 70), torch.zeros(2, 0), nothing)
    assert torch.equal(out, cross_attention(q, k, v)[0])
    assert not loss.any()


@pytest.mark.parametrize("which", range(5))
def test_nan_spoils_its_batch_alone(which: int, generator: torch.Generator) -> None:
    case = draw(generator, (2, 2, 21, 7, 24), False).in_dtype(torch.float32, torch.float32)
    case[which].view(2, -1)[1, 3] = torch.nan
    leaves = [x.requires_grad_() for x in case[:3]]
    out, loss = fused(case)
    assert bool(loss[1].isnan()) == (which != 2)
    assert bool(out[1].isnan().any()) == (which < 3)
    for x in (out, loss, *torch.autograd.grad(out.sum() + loss.sum(), leaves)):
        assert x[0].isfinite().all()


def test_only_what_is_needed_is_kept_and_computed(generator: torch.Generator) -> None:
    case = draw(generator, (2, 3, 70, 9, 8), False).in_dtype(torch.float32, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        leaves = [x.requires_grad_() for x in case[:3]]
        out, loss = fused(case)
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in (*leaves, case.targets))
    full = torch.autograd.grad(out.sum() + loss.sum(), leaves)
    for needed in range(3):
        alone = [x.detach().requires_grad_(i == needed) for i, x in enumerate(case[:3])]
        out, loss = attention_distillation(*alone, *case[3:])
        assert torch.equal(torch.autograd.grad(out.sum() + loss.sum(), alone[needed])[0], full[needed])
    q, k, v = (x.detach().requires_grad_() for x in case[:3])
    attention_distillation(q, k, v, *case[3:])[1].sum().backward()
    assert q.grad is not None
    assert v.grad is None
    assert not attention_distillation(q.detach(), k.detach(), v.detach(), *case[3:])[1].requires_grad


def test_strided_inputs(generator: torch.Generator) -> None:
    case = draw(generator, (2, 3, 50, 9, 8), False).in_dtype(torch.float32, torch.float32)
    strided = Case(
        *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in case[:3]),
        case.targets.transpose(1, 2).contiguous().transpose(1, 2),
        case.weights.t().contiguous().t(),
        None,
    )
    grads = torch.randn(case.q.shape, generator=generator), torch.randn(2, generator=generator)
    for got, want in zip(with_grads(fused, strided, grads), with_grads(fused, case, grads), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chosen", [False, True])
def test_registration(
    chosen: bool, dtype: torch.dtype, backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
    case = draw(generator, (2, 2, 6, 5, 4), chosen)
    case = case.in_dtype(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(torch.ops.seal_fast.attention_distillation.default, (*case, 0.5))


def test_it_compiles_in_one_piece(generator: torch.Generator) -> None:
    case = draw(generator, (2, 2, 20, 5, 8), True).in_dtype(torch.float32, torch.float32)

    def step(case: Case) -> tuple[Tensor, Tensor]:
        out, loss = attention_distillation(2 * case.q, *case[1:])
        return out.relu(), loss.sqrt()

    case = case._replace(weights=case.weights.abs())
    grads = torch.randn(case.q.shape, generator=generator), torch.randn(2, generator=generator)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, want in zip(with_grads(compiled, case, grads), with_grads(step, case, grads), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.reason))
@pytest.mark.parametrize("dtype", SUFFIXES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 1100, 77, 40)])
def test_every_instruction_set_fills_its_outputs_and_does_not_depend_on_threads(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    b, _, m, _, d = shape
    case = draw(generator, shape, True).in_dtype(dtype, torch.float32)
    exact = case.in_dtype(torch.float64, torch.float64)
    module = native.CPU.module

    def heads(x: Tensor) -> tuple[int, ...]:
        return (x.data_ptr(), *x.stride()[:3])

    def launch(isa: int, threads: int) -> list[Tensor]:
        size = (*shape, 5)
        out = torch.full_like(case.q, torch.nan)
        residual, errors, loss = (torch.full(s, torch.nan) for s in ((b, 5, m), (b, m), (b,)))
        workspace = torch.full((module.cross_attention_workspace(size, False, threads),), torch.nan)
        inputs = (*map(heads, case[:3]), case.tokens.data_ptr(), d**-0.5, heads(out), residual.data_ptr())
        more = (x.data_ptr() for x in (case.targets, case.weights, errors, loss, workspace))
        getattr(module, f"attention_distillation_forward_{SUFFIXES[dtype]}")(size, *inputs, *more, threads, isa)
        return [out, loss, residual]

    for isa in range(len(module.isa_levels())):
        alone = launch(isa, 1)
        for got, want in zip(alone, written_out(exact), strict=False):
            assert float((got.double() - want).norm()) <= ROUNDING[dtype] * max(1.0, float(want.norm()))
        p = torch.softmax(exact.q @ exact.k.transpose(2, 3) * d**-0.5, dim=3).mean(1).transpose(1, 2)
        want = exact.weights[:, :, None] * (p[:, exact.tokens] - exact.targets)
        torch.testing.assert_close(alone[2].double(), want, rtol=1e-4, atol=1e-5)
        for threads in (2, 3, 7):
            assert all(torch.equal(*pair) for pair in zip(alone, launch(isa, threads), strict=True))


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("rows", "targets", "weights", "message"),
    [
        (5, some(1, 7, 4), some(1, 7), "targets must be torch.float32 \\(1, 7, 5\\)"),
        (5, some(1, 7, 5, dtype=torch.float64), some(1, 7), "targets must be torch.float32"),
        (5, some(1, 7, 5), some(7), "weights must be torch.float32 \\(1, 7\\)"),
        (5, some(1, 7, 5).requires_grad_(), some(1, 7), "targets must not require gradients"),
        (5, some(1, 7, 5), some(1, 7).requires_grad_(), "weights.detach()"),
        (0, some(1, 7, 0), some(1, 7), "a query"),
    ],
)
def test_bad_arguments_are_named(rows: int, targets: Tensor, weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_distillation(some(1, 2, rows, 4), some(1, 2, 7, 4), some(1, 2, 7, 4), targets, weights)
