"""Triton kernels of cross_attention; the formulas stand in seal_fast/ops/cross_attention.py.

A program sees all keys of its queries at once, at most MAX_KEYS, so a softmax, its gradient and the row sums in it need one
pass, and nothing is kept from forward to backward but q, k and v. A tile can only be a power of two: the keys are cut into
K1 + K2 (64 + 16 for the 77 tokens of CLIP) and the dimensions of a head into D1 + D2, which spares the registers of 128 keys
and of 64 or 256 dimensions. Tiles x1 and x2 are cut along one of the two, x11, x12, x21 and x22 along keys and dimensions.

Sums are float32 and run in an order that depends on shapes only. Operands of products are rounded to the dtype of q, so
gradients of float16 need loss scaling, as they do in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_attention_tiles import (
    cuts,
    dot,
    head_of,
    load_keys,
    load_maps_grad,
    load_pair,
    load_tile,
    logit_grad,
    softmax,
    store_maps,
    store_tile,
    transposed_product,
)

MAX_DIMENSIONS = 160
MAX_KEYS = 128
PROGRAMS = 256
"""How many programs the kernel of dk and dv should have: about two per multiprocessor of a large GPU. The number is fixed, so
that all GPUs sum in the same order."""

Maybe = Tensor | None

_INTEGERS = ("H", "M", "N", "T", "ROWS", *(f"{x}_{axis}" for x in ("q", "k", "v", "out", "grad") for axis in ("b", "h", "row")))
"""Arguments that Triton does not specialise on: one compiled kernel serves all sizes and choices of tokens of a head's size."""


@triton.jit(do_not_specialize=["T", "N"], debug=True)
def link_tokens_kernel(tokens, slot, before, T, N, BLOCK: tl.constexpr):
    """slot[n]: the last t with tokens[t] = n. before[t]: the one before t with the same token. -1 where there is none."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(tokens + i, mask=i < T, other=-1)
    last = tl.full([BLOCK], -1, tl.int32)
    previous = tl.full([BLOCK], -1, tl.int32)
    for t in range(T):
        token = tl.load(tokens + t)
        tl.device_assert((token >= 0) & (token < N), "tokens must be keys")
        last = tl.where(token == i, t, last)
        previous = tl.where((token == mine) & (i > t), t, previous)
    tl.store(slot + i, last, mask=i < N)
    tl.store(before + i, previous, mask=i < T)


# fmt: off
@triton.jit(do_not_specialize=_INTEGERS)
def forward_kernel(
    q, k, v, slot, before, out, maps,
    scale, H, M, N, T,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, out_b, out_h, out_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    # fmt: on
    """BLOCK queries of all heads, so that the maps are summed in registers: grid (blocks of queries, batches)."""
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n1, n2, c1, c2 = cuts(K1, K2, D1, D2)
    a1 = tl.zeros([BLOCK, K1], tl.float32)
    a2 = tl.zeros([BLOCK, K2], tl.float32)
    for h in range(H):
        q1, q2 = load_pair(head_of(q, b, h, q_b, q_h, ALIGNED), m, q_row, M, c1, c2, D, ALIGNED)
        k11, k12, k21, k22 = load_keys(head_of(k, b, h, k_b, k_h, ALIGNED), n1, n2, k_row, N, c1, c2, D, ALIGNED)
        s1, s2 = transposed_product(q1, q2, k11, k12), transposed_product(q1, q2, k21, k22)
        p1, p2 = softmax(s1, s2, n1[None, :], n2[None, :], N, scale, 1)
        a1 += p1
        a2 += p2
        v11, v12, v21, v22 = load_keys(head_of(v, b, h, v_b, v_h, ALIGNED), n1, n2, v_row, N, c1, c2, D, ALIGNED)
        p1, p2 = p1.to(v11.dtype), p2.to(v11.dtype)
        out_head = head_of(out, b, h, out_b, out_h, ALIGNED)
        store_tile(out_head, dot(p1, v11) + dot(p2, v21), m, out_row, M, c1, D, ALIGNED)
        store_tile(out_head, dot(p1, v12) + dot(p2, v22), m, out_row, M, c2, D, ALIGNED)
    maps += b * T * M
    store_maps(maps, a1 * (1.0 / H), slot, before, n1, m, N, M)
    store_maps(maps, a2 * (1.0 / H), slot, before, n2, m, N, M)


# fmt: off
@triton.jit(do_not_specialize=_INTEGERS)
def query_grad_kernel(
    out_grad, maps_grad, q, k, v, slot, before, q_grad,
    scale, H, M, N, T,
    out_b, out_h, out_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, grad_b, grad_h, grad_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    # fmt: on
    """dq of BLOCK queries of all heads, so that maps_grad is read once: grid (blocks of queries, batches)."""
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n1, n2, c1, c2 = cuts(K1, K2, D1, D2)
    if maps_grad is None:
        a1 = tl.zeros([BLOCK, K1], tl.float32)
        a2 = tl.zeros([BLOCK, K2], tl.float32)
    else:
        a1 = tl.trans(load_maps_grad(maps_grad + b * T * M, H, slot, before, n1, m, N, M))
        a2 = tl.trans(load_maps_grad(maps_grad + b * T * M, H, slot, before, n2, m, N, M))
    for h in range(H):
        g1, g2 = a1, a2
        if out_grad is not None:
            o1, o2 = load_pair(head_of(out_grad, b, h, out_b, out_h, ALIGNED), m, out_row, M, c1, c2, D, ALIGNED)
            v11, v12, v21, v22 = load_keys(head_of(v, b, h, v_b, v_h, ALIGNED), n1, n2, v_row, N, c1, c2, D, ALIGNED)
            g1 += transposed_product(o1, o2, v11, v12)
            g2 += transposed_product(o1, o2, v21, v22)
        q1, q2 = load_pair(head_of(q, b, h, q_b, q_h, ALIGNED), m, q_row, M, c1, c2, D, ALIGNED)
        k11, k12, k21, k22 = load_keys(head_of(k, b, h, k_b, k_h, ALIGNED), n1, n2, k_row, N, c1, c2, D, ALIGNED)
        s1, s2 = transposed_product(q1, q2, k11, k12), transposed_product(q1, q2, k21, k22)
        p1, p2 = softmax(s1, s2, n1[None, :], n2[None, :], N, scale, 1)
        s1, s2 = logit_grad(p1, p2, g1, g2, 1)
        s1, s2 = s1.to(k11.dtype), s2.to(k11.dtype)
        grad_head = head_of(q_grad, b, h, grad_b, grad_h, ALIGNED)
        store_tile(grad_head, scale * (dot(s1, k11) + dot(s2, k21)), m, grad_row, M, c1, D, ALIGNED)
        store_tile(grad_head, scale * (dot(s1, k12) + dot(s2, k22)), m, grad_row, M, c2, D, ALIGNED)


# fmt: off
@triton.jit(do_not_specialize=_INTEGERS)
def key_value_grad_kernel(
    out_grad, maps_grad, q, k, v, slot, before, k_sums, v_sums,
    scale, H, M, N, T, ROWS,
    out_b, out_h, out_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    SLICE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    # fmt: on
    """What ROWS queries add to SLICE columns of dk and dv, [slices of queries,B,N,H,D]: grid (slices of queries, heads x slices
    of columns, B). Keys are the rows of all tiles."""
    h = tl.program_id(1) % H
    first_column = tl.program_id(1) // H * SLICE
    b = tl.program_id(2).to(tl.int64)
    n1, n2, c1, c2 = cuts(K1, K2, D1, D2)
    columns = first_column + tl.arange(0, SLICE)
    k11, k12, k21, k22 = load_keys(head_of(k, b, h, k_b, k_h, ALIGNED), n1, n2, k_row, N, c1, c2, D, ALIGNED)
    q_head = head_of(q, b, h, q_b, q_h, ALIGNED)
    if out_grad is not None:
        o_head = head_of(out_grad, b, h, out_b, out_h, ALIGNED)
        v11, v12, v21, v22 = load_keys(head_of(v, b, h, v_b, v_h, ALIGNED), n1, n2, v_row, N, c1, c2, D, ALIGNED)
    k1 = tl.zeros([K1, SLICE], tl.float32)
    k2 = tl.zeros([K2, SLICE], tl.float32)
    v1 = tl.zeros([K1, SLICE], tl.float32)
    v2 = tl.zeros([K2, SLICE], tl.float32)
    start = tl.program_id(0) * ROWS
    for block in range(start, tl.minimum(start + ROWS, M), BLOCK):
        m = block + tl.arange(0, BLOCK)
        q1, q2 = load_pair(q_head, m, q_row, M, c1, c2, D, ALIGNED)
        s1, s2 = transposed_product(k11, k12, q1, q2), transposed_product(k21, k22, q1, q2)
        p1, p2 = softmax(s1, s2, n1[:, None], n2[:, None], N, scale, 0)
        if out_grad is not None:
            o1, o2 = load_pair(o_head, m, out_row, M, c1, c2, D, ALIGNED)
        # a NaN in keys or values would reach the sums even through queries past the end
        there = m[None, :] < M
        if v_sums is not None:
            o = load_tile(o_head, m, out_row, M, columns, D, ALIGNED)
            v1 += dot(tl.where(there, p1, 0.0).to(o.dtype), o)
            v2 += dot(tl.where(there, p2, 0.0).to(o.dtype), o)
        if k_sums is not None:
            g1 = tl.zeros([K1, BLOCK], tl.float32)
            g2 = tl.zeros([K2, BLOCK], tl.float32)
            if maps_grad is not None:
                g1 += load_maps_grad(maps_grad + b * T * M, H, slot, before, n1, m, N, M)
                g2 += load_maps_grad(maps_grad + b * T * M, H, slot, before, n2, m, N, M)
            if out_grad is not None:
                g1 += transposed_product(v11, v12, o1, o2)
                g2 += transposed_product(v21, v22, o1, o2)
            s1, s2 = logit_grad(p1, p2, g1, g2, 0)
            x = load_tile(q_head, m, q_row, M, columns, D, ALIGNED)
            k1 += dot(tl.where(there, s1, 0.0).to(x.dtype), x)
            k2 += dot(tl.where(there, s2, 0.0).to(x.dtype), x)
    offset = ((tl.program_id(0).to(tl.int64) * tl.num_programs(2) + b) * N * H + h) * D
    if k_sums is not None:
        store_tile(k_sums + offset, scale * k1, n1, H * D, N, columns, D, 1)
        store_tile(k_sums + offset, scale * k2, n2, H * D, N, columns, D, 1)
    if v_sums is not None:
        store_tile(v_sums + offset, v1, n1, H * D, N, columns, D, 1)
        store_tile(v_sums + offset, v2, n2, H * D, N, columns, D, 1)


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut.

    Attributes:
        queries: how many a program takes at a time.
        warps: how many a program has.
        columns: how many columns of dk and dv a program sums; 0 for the other kernels.
    """

    queries: int
    warps: int = 4
    columns: int = 0


def configuration(kernel: str, D: int, N: int, dtype: torch.dtype) -> Tiles:
    """The tiles of "forward", "query_grad" or "key_value_grad", for N keys of D dimensions.

    They are the largest tiles that the compiler does not spill in half precision on sm_90 (docs/results.md). float32 has no
    tensor cores that round like it, and spills least with few queries and many warps.
    """
    queries = {"forward": 64, "query_grad": 64 if D <= 64 else 16, "key_value_grad": 32}[kernel]
    columns = {"key_value_grad": 64 if D <= 64 else 32}.get(kernel, 0)
    if D > 80 or N > 80 or dtype == torch.float32:
        queries, columns = 16, min(columns, 32)
    return Tiles(queries, 8 if D > 128 or dtype == torch.float32 else 4, columns)


def _constants(tiles: Tiles, q: Tensor, k: Tensor, *strided: Maybe) -> dict[str, int]:
    """Dimensions as D1 + D2 and keys as K1 + K2, none below the 16 that a matrix product needs; see `head_of` for ALIGNED."""
    D = q.shape[3]
    d1 = max(16, triton.next_power_of_2(D) // 2)
    # of a product with 16 queries and 16 columns every warp would do the whole
    d2 = max(32 if tiles.queries == 16 else 16, triton.next_power_of_2(max(D - d1, 1)))
    # loads of 16 bytes, where heads and rows start at multiples of them
    vector = 16 // q.element_size()
    aligned = all(stride % vector == 0 for x in (q, k, *strided) for stride in _strides(x))
    cuts = {"D": D, "D1": d1, "D2": d2, "K1": 64, "K2": 16 if k.shape[2] <= 80 else 64}
    return {**cuts, "BLOCK": tiles.queries, "ALIGNED": vector if aligned else 1}


def _strides(x: Maybe) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


@dataclass(frozen=True)
class Launch:
    """A kernel and its arguments by name. The table of compiled kernels is made from these too."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, int]
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}

    def __call__(self) -> None:
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def forward(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out: Tensor, maps: Tensor) -> list[Launch]:
    """Launches that fill out, of any strides, and maps, which is contiguous. All rows are dense."""
    links, launches = _link_tokens(tokens, k)
    tiles = configuration("forward", q.shape[3], k.shape[2], q.dtype)
    tensors = {"q": q, "k": k, "v": v, **links, "out": out, "maps": maps}
    arguments = {**tensors, "scale": scale, **_sizes(q, k, tokens), **_all_strides(q=q, k=k, v=v, out=out)}
    constants = _constants(tiles, q, k, v, out)
    return [*launches, Launch(forward_kernel, _blocks(tiles, q), arguments, constants, tiles.warps)]


def backward(
    q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out_grad: Maybe, maps_grad: Maybe, *wanted: Maybe
) -> list[Launch]:
    """Launches that fill the wanted q_grad, k_sums and v_sums, each or None. maps_grad is contiguous, all other rows are dense.

    k_sums and v_sums are float32 [query_slices(q, k),B,N,H,D]; their sums over the slices are dk and dv. v_sums needs out_grad.
    """
    q_grad, k_sums, v_sums = wanted
    links, launches = _link_tokens(tokens if maps_grad is not None else None, k)
    given = {"out_grad": out_grad, "maps_grad": maps_grad, "q": q, "k": k, "v": v, **links, "scale": scale}
    given = {**given, **_sizes(q, k, tokens), **_all_strides(out=out_grad, q=q, k=k, v=v)}
    if q_grad is not None:
        tiles = configuration("query_grad", q.shape[3], k.shape[2], q.dtype)
        arguments = {**given, "q_grad": q_grad, **_all_strides(grad=q_grad)}
        constants = _constants(tiles, q, k, v, out_grad, q_grad)
        launches.append(Launch(query_grad_kernel, _blocks(tiles, q), arguments, constants, tiles.warps))
    if k_sums is not None or v_sums is not None:
        tiles = configuration("key_value_grad", q.shape[3], k.shape[2], q.dtype)
        slices, rows = _split_queries(tiles, q)
        sums = {**given, "k_sums": k_sums, "v_sums": v_sums, "ROWS": rows}
        grid = (slices, q.shape[1] * triton.cdiv(q.shape[3], tiles.columns), q.shape[0])
        constants = {**_constants(tiles, q, k, v, out_grad), "SLICE": tiles.columns}
        launches.append(Launch(key_value_grad_kernel, grid, sums, constants, tiles.warps))
    return launches


def _blocks(tiles: Tiles, q: Tensor) -> tuple[int, int]:
    return triton.cdiv(q.shape[2], tiles.queries), q.shape[0]


def query_slices(q: Tensor, k: Tensor) -> int:
    """How many partial sums of dk and dv `backward` fills. The number depends on shapes and dtype only."""
    return _split_queries(configuration("key_value_grad", q.shape[3], k.shape[2], q.dtype), q)[0]


def _split_queries(tiles: Tiles, q: Tensor) -> tuple[int, int]:
    """The number of slices, and the number of queries in each."""
    batches, heads, queries, dimensions = q.shape
    blocks = triton.cdiv(queries, tiles.queries)
    wanted = triton.cdiv(PROGRAMS, batches * heads * triton.cdiv(dimensions, tiles.columns))
    per_slice = triton.cdiv(blocks, min(blocks, wanted))
    return triton.cdiv(blocks, per_slice), per_slice * tiles.queries


def _link_tokens(tokens: Maybe, k: Tensor) -> tuple[dict[str, Maybe], list[Launch]]:
    """The tensors slot and before of `link_tokens_kernel`, and the launch that fills them."""
    if tokens is None:
        return {"slot": None, "before": None}, []
    N, T, block = k.shape[2], len(tokens), 128
    links: dict[str, Maybe] = {
        name: torch.empty(count, dtype=torch.int32, device=k.device) for name, count in (("slot", N), ("before", T))
    }
    arguments = {"tokens": tokens, **links, "T": T, "N": N}
    return links, [Launch(link_tokens_kernel, (triton.cdiv(max(N, T), block),), arguments, {"BLOCK": block}, 4)]


def _sizes(q: Tensor, k: Tensor, tokens: Maybe) -> dict[str, int]:
    return {"H": q.shape[1], "M": q.shape[2], "N": k.shape[2], "T": k.shape[2] if tokens is None else len(tokens)}


def _all_strides(**tensors: Maybe) -> dict[str, int]:
    axes = ("b", "h", "row")
    return {f"{name}_{axis}": s for name, x in tensors.items() for axis, s in zip(axes, _strides(x), strict=True)}
