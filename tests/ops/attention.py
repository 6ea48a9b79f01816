"""What the tests of every implementation of cross_attention share: inputs, plain torch, and the bound on the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALVES = {torch.bfloat16: "bf16", torch.float16: "f16"}
SUFFIXES = {torch.float32: "f32", **HALVES}
FLOAT_EPSILON = 2.0**-24

Attention = Callable[..., tuple[Tensor, Tensor]]


def draw(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    b, h, m, n, d = shape
    return [torch.randn(b, h, rows, d, generator=generator, dtype=torch.float64).to(device, dtype) for rows in (m, n, n)]


def plain(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What users write today, in the dtype of the arguments."""
    p = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)
    maps = p.mean(1).transpose(1, 2)
    return p @ v, maps if tokens is None else maps[:, tokens]


def with_grads(
    attention: Attention, inputs: list[Tensor], tokens: Tensor | None, weights: Sequence[Tensor | None]
) -> list[Tensor]:
    """out, maps and the gradients of q, k, v for the given gradients of out and maps; None leaves an output out of the loss."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = attention(*leaves, tokens)
    used = [(y, w.to(y.dtype)) for y, w in zip(results, weights, strict=True) if w is not None]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [w for _, w in used], allow_unused=True)
    filled = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves, strict=True)]
    return [*(y.detach() for y in results), *filled]


def assert_at_most_twice_the_error_of_plain(
    attention: Attention,
    inputs: list[Tensor],
    tokens: Tensor | None,
    out_grad: Tensor | None,
    maps_grad: Tensor | None,
) -> None:
    """Results and gradients, both against plain torch in float64."""
    (b, h, m, _), n, dtype = inputs[0].shape, inputs[1].shape[2], inputs[0].dtype
    got = with_grads(attention, inputs, tokens, (out_grad, maps_grad))
    usual = with_grads(plain, inputs, tokens, (out_grad, maps_grad))
    exact = with_grads(plain, [x.double() for x in inputs], tokens, (out_grad, maps_grad))
    assert [y.dtype for y in got] == [dtype, torch.float32, dtype, dtype, dtype]
    # errors are equal on average, but the fewer rows there are the more their ratio scatters, and plain torch may be exact
    luck = FLOAT_EPSILON * (4 + 100 / (b * h * m) ** 0.5)
    for name, ours, theirs, want in zip(("out", "maps", "q", "k", "v"), got, usual, exact, strict=True):
        assert ours.shape == want.shape
        error, allowed = (ours.double() - want).norm(), 2 * (theirs.double() - want).norm()
        assert error <= allowed + luck * (want.norm() + (n == 1 or m == 1)), name


def views(generator: torch.Generator, shape: Sequence[int], device: str = "cpu") -> dict[str, list[Tensor]]:
    """q, k and v with the strides that callers make."""
    b, h, m, n, d = shape

    def fresh(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    def joined(rows: int) -> Tensor:
        return fresh(b, rows, h * d).view(b, rows, h, d).transpose(1, 2)

    shared = fresh(1, 1, n, d).expand(b, h, n, d)
    return {
        "heads of joined rows": [joined(rows) for rows in (m, n, n)],
        "keys and values in one": [joined(m), *fresh(b, n, 2, h, d).permute(2, 0, 3, 1, 4).unbind(0)],
        "every second row": [fresh(b, h, 2 * r, d + 5)[:, :, ::2, 5:] for r in (m, n, n)],
        "dimensions not dense": [fresh(b, h, d, rows).transpose(2, 3) for rows in (m, n, n)],
        "shared by heads": [joined(m), shared, shared],
    }
