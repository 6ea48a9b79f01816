"""Counter-based normal noise: a number is a function of (seed, draw, row, dimension), the same on every backend.

    words = Philox4x32-10(counter = (dimension // 4, row, draw, 0), key = (seed low, seed high))
    normals 0, 1 = Box-Muller(words 0, 1)        normals 2, 3 = Box-Muller(words 2, 3)
    Box-Muller(r, s) = sqrt(-2 log u) (cos, sin)(2 pi v),        u = (r + 1/2) / 2^32,  v = (s + 1/2) / 2^32

Philox is by Salmon et al. ("Parallel random numbers: as easy as 1, 2, 3", SC 2011). Nothing is carried from number to number,
so noise never needs to be stored: whoever knows the seed makes it again. The words are exact everywhere; the kernels' normals
are within 2e-6 of the float64 reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seal_fast.ops import native
from seal_fast.ops.dispatch import Op
from seal_fast.ops.rows import check_rows, implementations, stream

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: int) -> Tensor:
    """Four words int64 [..., 4] in 0 ... 2^32 - 1, from a counter of four (broadcast against each other) and a 64-bit key."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    words = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        # the product wraps around in int64, which leaves its bits right
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ key[0], p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ key[1], p0 & _WORD
        key = [(word + step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack([c0, c1, c2, c3], -1)


def reference_counter_normal(like: Tensor, seed: int, draw: int) -> Tensor:
    """[R,D] in dtype and on the device of `like` [R,D], computed in float64."""
    rows, dims = like.shape
    blocks = torch.arange((dims + 3) // 4, device=like.device)
    words = philox((blocks, torch.arange(rows, device=like.device)[:, None], draw, 0), seed)
    radius, angle = ((words.double() + 0.5) / 2**32).unflatten(-1, (2, 2)).unbind(-1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return normals.flatten(1)[:, :dims].to(like.dtype)


def signed(seed: int) -> int:
    """The 64 bits of a seed as torch's schemas hold them."""
    return (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)


def check_seed(**words: int) -> None:
    """Raises ValueError unless seed fits 64 bits and everything else 32."""
    for name, value in words.items():
        bits = 64 if name == "seed" else 32
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in 0 ... 2^{bits} - 1, not {value}")


def _counter_normal_cpu(like: Tensor, seed: int, draw: int) -> Tensor:
    out = torch.empty_like(like)
    native.CPU.module.counter_normal(out.data_ptr(), seed, draw, *out.shape, torch.get_num_threads())
    return out


def _counter_normal_cuda(like: Tensor, seed: int, draw: int) -> Tensor:
    out = torch.empty_like(like)
    if out.numel():
        native.CUDA.module.counter_normal(out.data_ptr(), seed, draw, *out.shape, out.device.index, stream(out))
    return out


counter_normal_op = Op(
    "counter_normal(Tensor like, int seed, int draw) -> Tensor",
    implementations(_counter_normal_cuda, _counter_normal_cpu, reference_counter_normal),
    fake=lambda like, seed, draw: torch.empty_like(like),
)


def counter_normal(like: Tensor, seed: int, draw: int = 0) -> Tensor:
    """Standard normal noise in the shape of `like` [R, ...], on its device.

    Args:
        like: any floating point tensor of at least two dimensions; only shape, dtype and device are read.
        seed: 0 ... 2^64 - 1. Different seeds and different draws give independent noise.
        draw: 0 ... 2^32 - 1, which of many noises of one seed.

    Returns:
        As `like`. A row depends on its index and on seed and draw only, not on how many rows there are. The largest number is
        6.8; half precision is rounded from float32.

    Raises:
        ValueError: `like` is no such tensor, or seed or draw is out of range.
    """
    check_rows(like)
    check_seed(seed=seed, draw=draw)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = torch.empty(len(like), like[0:1].numel() if len(like) else 1, dtype=dtype, device=like.device)
    return counter_normal_op(rows, signed(seed), draw).to(like.dtype).view(like.shape)
