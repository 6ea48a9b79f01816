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

MAX_DIMENSIONS = 160
MAX_KEYS = 128
PROGRAMS = 256
"""Wanted of the kernel of dk and dv, about two per multiprocessor of a large GPU. Fixed, so that all GPUs sum alike."""

Maybe = Tensor | None

_INTEGERS = ("H", "M", "N", "T", "ROWS", *(f"{x}_{axis}" for x in ("q", "k", "v", "out", "grad") for axis in ("b", "h", "row")))
"""Never specialised on: one compiled kernel serves all sizes and choices of tokens of a head's size."""


@triton.jit
def _head(base, b, h, batch_stride, head_stride, ALIGNED: tl.constexpr):
    """Pointer to one head. ALIGNED divides all strides, and the compiler learns it here."""
    return base + tl.multiple_of(b * batch_stride.to(tl.int64) + h * head_stride.to(tl.int64), ALIGNED)


@triton.jit
def _tile(head, rows, row_stride, ROWS, columns, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to these rows and columns of a head, and which of them are inside."""
    offsets = tl.multiple_of(rows.to(tl.int64) * row_stride, ALIGNED)
    return head + offsets[:, None] + columns[None, :], (rows[:, None] < ROWS) & (columns[None, :] < D)


@triton.jit
def _load(head, rows, row_stride, ROWS, columns, D: tl.constexpr, ALIGNED: tl.constexpr):
    pointers, inside = _tile(head, rows, row_stride, ROWS, columns, D, ALIGNED)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(head, x, rows, row_stride, ROWS, columns, D: tl.constexpr, ALIGNED: tl.constexpr):
    pointers, inside = _tile(head, rows, row_stride, ROWS, columns, D, ALIGNED)
    tl.store(pointers, x.to(head.dtype.element_ty), mask=inside)


@triton.jit
def _cuts(K1: tl.constexpr, K2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Numbers of the keys in both tiles, and of the columns in both."""
    return tl.arange(0, K1), K1 + tl.arange(0, K2), tl.arange(0, D1), D1 + tl.arange(0, D2)


@triton.jit
def _load_pair(head, rows, row_stride, ROWS, c1, c2, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows of a head in two tiles."""
    x1 = _load(head, rows, row_stride, ROWS, c1, D, ALIGNED)
    x2 = _load(head, rows, row_stride, ROWS, c2, D, ALIGNED)
    return x1, x2


@triton.jit
def _load_keys(head, n1, n2, row_stride, N, c1, c2, D: tl.constexpr, ALIGNED: tl.constexpr):
    """All keys or values of a head, in four tiles."""
    x11, x12 = _load_pair(head, n1, row_stride, N, c1, c2, D, ALIGNED)
    x21, x22 = _load_pair(head, n2, row_stride, N, c1, c2, D, ALIGNED)
    return x11, x12, x21, x22


@triton.jit
def _dot(a, b):
    # float32 would otherwise be rounded to tf32
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _product(x1, x2, y1, y2):
    """x y^T over both tiles of the dimensions."""
    return tl.dot(x2, tl.trans(y2), tl.dot(x1, tl.trans(y1), input_precision="ieee"), input_precision="ieee")


@triton.jit
def _softmax(s1, s2, n1, n2, N, scale, KEYS: tl.constexpr):
    """softmax of scale s over the keys, which lie along axis KEYS; n1 and n2 are their numbers, shaped to broadcast."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    s1 = tl.where(n1 < N, s1 * (scale * LOG2_E), -float("inf"))
    s2 = tl.where(n2 < N, s2 * (scale * LOG2_E), -float("inf"))
    top = tl.expand_dims(tl.maximum(tl.max(s1, KEYS), tl.max(s2, KEYS)), KEYS)
    p1, p2 = tl.exp2(s1 - top), tl.exp2(s2 - top)
    share = tl.expand_dims(1.0 / (tl.sum(p1, KEYS) + tl.sum(p2, KEYS)), KEYS)
    return p1 * share, p2 * share


@triton.jit
def _logit_grad(p1, p2, g1, g2, KEYS: tl.constexpr):
    """p (g - sum of p g over the keys), which lie along axis KEYS."""
    total = tl.expand_dims(tl.sum(p1 * g1, KEYS) + tl.sum(p2 * g2, KEYS), KEYS)
    return p1 * (g1 - total), p2 * (g2 - total)


@triton.jit
def _map_rows(slot, n, N):
    """The last row of the maps that shows each key, -1 for none; without a choice all keys have their own."""
    return tl.where(n < N, n, -1) if slot is None else tl.load(slot + n, mask=n < N, other=-1)


@triton.jit
def _map_tile(maps, rows, m, M):
    """Pointers to rows and queries of maps, which broadcast, and which of them are inside."""
    return maps + rows.to(tl.int64) * M + m, (rows >= 0) & (m < M)


@triton.jit
def _store_maps(maps, a, slot, before, n, m, N, M):
    """Columns n of a [m,n] to the rows of maps that show them."""
    rows = _map_rows(slot, n, N)
    if before is None:
        pointers, inside = _map_tile(maps, rows[None, :], m[:, None], M)
        tl.store(pointers, a, mask=inside)
    else:
        # more than one turn only where a token was chosen more than once
        while tl.max(rows, 0) >= 0:
            pointers, inside = _map_tile(maps, rows[None, :], m[:, None], M)
            tl.store(pointers, a, mask=inside)
            rows = tl.load(before + rows, mask=rows >= 0, other=-1)


@triton.jit
def _load_maps_grad(maps_grad, H, slot, before, n, m, N, M):
    """[n,m], the gradient of every head's probabilities: the sum of the rows that show the key, over H."""
    rows = _map_rows(slot, n, N)
    if before is None:
        pointers, inside = _map_tile(maps_grad, rows[:, None], m[None, :], M)
        g = tl.load(pointers, mask=inside, other=0.0)
    else:
        g = tl.zeros([n.shape[0], m.shape[0]], tl.float32)
        while tl.max(rows, 0) >= 0:
            pointers, inside = _map_tile(maps_grad, rows[:, None], m[None, :], M)
            g += tl.load(pointers, mask=inside, other=0.0)
            rows = tl.load(before + rows, mask=rows >= 0, other=-1)
    return g * (1.0 / H)


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
    n1, n2, c1, c2 = _cuts(K1, K2, D1, D2)
    a1 = tl.zeros([BLOCK, K1], tl.float32)
    a2 = tl.zeros([BLOCK, K2], tl.float32)
    for h in range(H):
        q1, q2 = _load_pair(_head(q, b, h, q_b, q_h, ALIGNED), m, q_row, M, c1, c2, D, ALIGNED)
        k11, k12, k21, k22 = _load_keys(_head(k, b, h, k_b, k_h, ALIGNED), n1, n2, k_row, N, c1, c2, D, ALIGNED)
        s1, s2 = _product(q1, q2, k11, k12), _product(q1, q2, k21, k22)
        p1, p2 = _softmax(s1, s2, n1[None, :], n2[None, :], N, scale, 1)
        a1 += p1
        a2 += p2
        v11, v12, v21, v22 = _load_keys(_head(v, b, h, v_b, v_h, ALIGNED), n1, n2, v_row, N, c1, c2, D, ALIGNED)
        p1, p2 = p1.to(v11.dtype), p2.to(v11.dtype)
        out_head = _head(out, b, h, out_b, out_h, ALIGNED)
        _store(out_head, _dot(p1, v11) + _dot(p2, v21), m, out_row, M, c1, D, ALIGNED)
        _store(out_head, _dot(p1, v12) + _dot(p2, v22), m, out_row, M, c2, D, ALIGNED)
    maps += b * T * M
    _store_maps(maps, a1 * (1.0 / H), slot, before, n1, m, N, M)
    _store_maps(maps, a2 * (1.0 / H), slot, before, n2, m, N, M)


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
    n1, n2, c1, c2 = _cuts(K1, K2, D1, D2)
    if maps_grad is None:
        a1 = tl.zeros([BLOCK, K1], tl.float32)
        a2 = tl.zeros([BLOCK, K2], tl.float32)
    else:
        a1 = tl.trans(_load_maps_grad(maps_grad + b * T * M, H, slot, before, n1, m, N, M))
        a2 = tl.trans(_load_maps_grad(maps_grad + b * T * M, H, slot, before, n2, m, N, M))
    for h in range(H):
        g1, g2 = a1, a2
        if out_grad is not None:
            o1, o2 = _load_pair(_head(out_grad, b, h, out_b, out_h, ALIGNED), m, out_row, M, c1, c2, D, ALIGNED)
            v11, v12, v21, v22 = _load_keys(_head(v, b, h, v_b, v_h, ALIGNED), n1, n2, v_row, N, c1, c2, D, ALIGNED)
            g1 += _product(o1, o2, v11, v12)
            g2 += _product(o1, o2, v21, v22)
        q1, q2 = _load_pair(_head(q, b, h, q_b, q_h, ALIGNED), m, q_row, M, c1, c2, D, ALIGNED)
        k11, k12, k21, k22 = _load_keys(_head(k, b, h, k_b, k_h, ALIGNED), n1, n2, k_row, N, c1, c2, D, ALIGNED)
        s1, s2 = _product(q1, q2, k11, k12), _product(q1, q2, k21, k22)
        p1, p2 = _softmax(s1, s2, n1[None, :], n2[None, :], N, scale, 1)
        s1, s2 = _logit_grad(p1, p2, g1, g2, 1)
        s1, s2 = s1.to(k11.dtype), s2.to(k11.dtype)
        grad_head = _head(q_grad, b, h, grad_b, grad_h, ALIGNED)
        _store(grad_head, scale * (_dot(s1, k11) + _dot(s2, k21)), m, grad_row, M, c1, D, ALIGNED)
        _store(grad_head, scale * (_dot(s1, k12) + _dot(s2, k22)), m, grad_row, M, c2, D, ALIGNED)


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
    n1, n2, c1, c2 = _cuts(K1, K2, D1, D2)
    columns = first_column + tl.arange(0, SLICE)
    k11, k12, k21, k22 = _load_keys(_head(k, b, h, k_b, k_h, ALIGNED), n1, n2, k_row, N, c1, c2, D, ALIGNED)
    q_head = _head(q, b, h, q_b, q_h, ALIGNED)
    if out_grad is not None:
        o_head = _head(out_grad, b, h, out_b, out_h, ALIGNED)
        v11, v12, v21, v22 = _load_keys(_head(v, b, h, v_b, v_h, ALIGNED), n1, n2, v_row, N, c1, c2, D, ALIGNED)
    k1 = tl.zeros([K1, SLICE], tl.float32)
    k2 = tl.zeros([K2, SLICE], tl.float32)
    v1 = tl.zeros([K1, SLICE], tl.float32)
    v2 = tl.zeros([K2, SLICE], tl.float32)
    start = tl.program_id(0) * ROWS
    for block in range(start, tl.minimum(start + ROWS, M), BLOCK):
        m = block + tl.arange(0, BLOCK)
        q1, q2 = _load_pair(q_head, m, q_row, M, c1, c2, D, ALIGNED)
        s1, s2 = _product(k11, k12, q1, q2), _product(k21, k22, q1, q2)
        p1, p2 = _softmax(s1, s2, n1[:, None], n2[:, None], N, scale, 0)
        if out_grad is not None:
            o1, o2 = _load_pair(o_head, m, out_row, M, c1, c2, D, ALIGNED)
        # what is spoiled in the keys or values would spoil the sums even from queries that are not there
        there = m[None, :] < M
        if v_sums is not None:
            o = _load(o_head, m, out_row, M, columns, D, ALIGNED)
            v1 += _dot(tl.where(there, p1, 0.0).to(o.dtype), o)
            v2 += _dot(tl.where(there, p2, 0.0).to(o.dtype), o)
        if k_sums is not None:
            g1 = tl.zeros([K1, BLOCK], tl.float32)
            g2 = tl.zeros([K2, BLOCK], tl.float32)
            if maps_grad is not None:
                g1 += _load_maps_grad(maps_grad + b * T * M, H, slot, before, n1, m, N, M)
                g2 += _load_maps_grad(maps_grad + b * T * M, H, slot, before, n2, m, N, M)
            if out_grad is not None:
                g1 += _product(v11, v12, o1, o2)
                g2 += _product(v21, v22, o1, o2)
            s1, s2 = _logit_grad(p1, p2, g1, g2, 0)
            x = _load(q_head, m, q_row, M, columns, D, ALIGNED)
            k1 += _dot(tl.where(there, s1, 0.0).to(x.dtype), x)
            k2 += _dot(tl.where(there, s2, 0.0).to(x.dtype), x)
    offset = ((tl.program_id(0).to(tl.int64) * tl.num_programs(2) + b) * N * H + h) * D
    if k_sums is not None:
        _store(k_sums + offset, scale * k1, n1, H * D, N, columns, D, 1)
        _store(k_sums + offset, scale * k2, n2, H * D, N, columns, D, 1)
    if v_sums is not None:
        _store(v_sums + offset, v1, n1, H * D, N, columns, D, 1)
        _store(v_sums + offset, v2, n2, H * D, N, columns, D, 1)


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut.

    Attributes:
        queries: of a program at a time.
        warps: of a program.
        columns: of dk and dv that a program sums; 0 for the other kernels.
    """

    queries: int
    warps: int = 4
    columns: int = 0


def configuration(kernel: str, D: int, N: int, dtype: torch.dtype) -> Tiles:
    """The tiles of "forward", "query_grad" or "key_value_grad", for N keys of D dimensions.

    Chosen for what the compiler says (docs/results.md): the largest that do not spill in half precision on sm_90. float32 has
    no tensor cores that round like it, and spills least with few queries and many warps.
    """
    queries = {"forward": 64, "query_grad": 64 if D <= 64 else 16, "key_value_grad": 32}[kernel]
    columns = {"key_value_grad": 64 if D <= 64 else 32}.get(kernel, 0)
    if D > 80 or N > 80 or dtype == torch.float32:
        queries, columns = 16, min(columns, 32)
    return Tiles(queries, 8 if D > 128 or dtype == torch.float32 else 4, columns)


def _constants(tiles: Tiles, q: Tensor, k: Tensor, *strided: Maybe) -> dict[str, int]:
    """Dimensions as D1 + D2 and keys as K1 + K2, none below the 16 that a matrix product needs; see `_head` for ALIGNED."""
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
    """A kernel and all it is called with. The table of compiled kernels is made from these too."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, int]
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}

    def __call__(self) -> None:
        if all(self.grid):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def forward(q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, out: Tensor, maps: Tensor) -> list[Launch]:
    """What fills out, of any strides, and maps, which is contiguous. All rows are dense."""
    links, launches = _link_tokens(tokens, k)
    tiles = configuration("forward", q.shape[3], k.shape[2], q.dtype)
    arguments = (q, k, v, *links, out, maps, scale, *_sizes(q, k, tokens), *_all_strides(q, k, v, out))
    constants = _constants(tiles, q, k, v, out)
    return [*launches, Launch(forward_kernel, _blocks(tiles, q), arguments, constants, tiles.warps)]


def backward(
    out_grad: Maybe, maps_grad: Maybe, q: Tensor, k: Tensor, v: Tensor, tokens: Maybe, scale: float, *wanted: Maybe
) -> list[Launch]:
    """What fills the wanted q_grad, k_sums and v_sums, each or None. maps_grad is contiguous, all other rows are dense.

    k_sums and v_sums are float32 [query_slices(q, k),B,N,H,D]; their sums over the slices are dk and dv. v_sums needs out_grad.
    """
    q_grad, k_sums, v_sums = wanted
    links, launches = _link_tokens(tokens if maps_grad is not None else None, k)
    given, sizes = (out_grad, maps_grad, q, k, v, *links), _sizes(q, k, tokens)
    if q_grad is not None:
        tiles = configuration("query_grad", q.shape[3], k.shape[2], q.dtype)
        arguments = (*given, q_grad, scale, *sizes, *_all_strides(out_grad, q, k, v, q_grad))
        constants = _constants(tiles, q, k, v, out_grad, q_grad)
        launches.append(Launch(query_grad_kernel, _blocks(tiles, q), arguments, constants, tiles.warps))
    if k_sums is not None or v_sums is not None:
        tiles = configuration("key_value_grad", q.shape[3], k.shape[2], q.dtype)
        slices, rows = _split_queries(tiles, q)
        sums = (*given, k_sums, v_sums, scale, *sizes, rows, *_all_strides(out_grad, q, k, v))
        grid = (slices, q.shape[1] * triton.cdiv(q.shape[3], tiles.columns), q.shape[0])
        constants = {**_constants(tiles, q, k, v, out_grad), "SLICE": tiles.columns}
        launches.append(Launch(key_value_grad_kernel, grid, sums, constants, tiles.warps))
    return launches


def _blocks(tiles: Tiles, q: Tensor) -> tuple[int, int]:
    return triton.cdiv(q.shape[2], tiles.queries), q.shape[0]


def query_slices(q: Tensor, k: Tensor) -> int:
    """Into how many partial sums `backward` cuts dk and dv; depends on shapes and dtype only."""
    return _split_queries(configuration("key_value_grad", q.shape[3], k.shape[2], q.dtype), q)[0]


def _split_queries(tiles: Tiles, q: Tensor) -> tuple[int, int]:
    """How many slices of how many queries."""
    batches, heads, queries, dimensions = q.shape
    blocks = triton.cdiv(queries, tiles.queries)
    wanted = triton.cdiv(PROGRAMS, batches * heads * triton.cdiv(dimensions, tiles.columns))
    per_slice = triton.cdiv(blocks, min(blocks, wanted))
    return triton.cdiv(blocks, per_slice), per_slice * tiles.queries


def _link_tokens(tokens: Maybe, k: Tensor) -> tuple[tuple[Maybe, Maybe], list[Launch]]:
    """slot and before of `link_tokens_kernel`, and the launch that fills them."""
    if tokens is None:
        return (None, None), []
    N, T, block = k.shape[2], len(tokens), 128
    slot, before = (torch.empty(count, dtype=torch.int32, device=k.device) for count in (N, T))
    launch = Launch(link_tokens_kernel, (triton.cdiv(max(N, T), block),), (tokens, slot, before, T, N), {"BLOCK": block}, 4)
    return (slot, before), [launch]


def _sizes(q: Tensor, k: Tensor, tokens: Maybe) -> tuple[int, ...]:
    return q.shape[1], q.shape[2], k.shape[2], k.shape[2] if tokens is None else len(tokens)


def _all_strides(*tensors: Maybe) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in _strides(x))
