"""Launches every kernel at odd sizes, forward and backward, for a tool that watches memory or shared memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu.every_kernel

Without that variable torch's tensors lie in common blocks, and what one writes into its neighbour goes unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.device import device
from seal_fast import ops

SIZES = ((1, 1, 1), (6, 2, 51), (4, 4, 1023), (70, 3, 257))
"""Items, triggers and dimensions."""
STEP = ops.StepCoefficients(1.25, 1.5, 0.75, -1.75, from_mu=0.5, from_fresh=2.0)
LAYERS = (
    (torch.float32, (1, 2, 19, 9, 20)),
    (torch.float16, (2, 3, 70, 77, 40)),
    (torch.bfloat16, (1, 1, 33, 128, 160)),
    (torch.bfloat16, (1, 2, 17, 1, 59)),
)
"""Dtype, and batches, heads, queries, keys and dimensions of a head."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=device())


def elementwise(items: int, triggers: int, dims: int) -> None:
    x, eps, z = (drawn(items, dims).requires_grad_() for _ in range(3))
    mu, gamma = drawn(dims).requires_grad_(), drawn(dims).abs().requires_grad_()
    loss = ops.reversed_loss(x, eps, z)
    step = ops.sampler_step(x, eps, STEP, mu=mu, gamma=gamma, fresh=z, limit=1.0)
    torch.autograd.grad(loss + step.sum(), [x, eps, z, mu, gamma])
    triggers_mu, triggers_gamma = drawn(triggers, dims), drawn(triggers, dims).abs()
    ops.gaussian_log_ratio(x, triggers_mu, triggers_gamma)
    ops.gaussian_kl_stats(triggers_mu, triggers_gamma)


def attention(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    b, h, m, n, d = shape
    q, k, v = (drawn(b, h, rows, d).to(dtype).requires_grad_() for rows in (m, n, n))
    chosen = torch.tensor([0, n - 1, 0], device=device())
    for tokens in (None, chosen):
        out, maps = ops.cross_attention(q, k, v, tokens)
        torch.autograd.grad(out.float().sum() + maps.square().sum(), [q, k, v])


def main(sizes: Sequence[tuple[int, int, int]] = SIZES) -> None:
    for items, triggers, dims in sizes:
        elementwise(items, triggers, dims)
    for layer in LAYERS:
        attention(*layer)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print("every kernel was launched")


if __name__ == "__main__":
    main()
