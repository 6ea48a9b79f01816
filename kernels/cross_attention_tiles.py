"""Parts of the Triton kernels of cross_attention: tiles of heads and of maps, and softmax over two tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_of(base, b, h, batch_stride, head_stride, ALIGNED: tl.constexpr):
    """Pointer to one head. ALIGNED divides all strides, and the compiler learns it here."""
    return base + tl.multiple_of(b * batch_stride.to(tl.int64) + h * head_stride.to(tl.int64), ALIGNED)


@triton.jit
def tile_of(head, rows, row_stride, ROWS, columns, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to these rows and columns of a head, and which of them are inside."""
    offsets = tl.multiple_of(rows.to(tl.int64) * row_stride, ALIGNED)
    return head + offsets[:, None] + columns[None, :], (rows[:, None] < ROWS) & (columns[None, :] < D)


@triton.jit
def load_tile(head, rows, row_stride, ROWS, columns, D: tl.constexpr, ALIGNED: tl.constexpr):
    pointers, inside = tile_of(head, rows, row_stride, ROWS, columns, D, ALIGNED)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(head, x, rows, row_stride, ROWS, columns, D: tl.constexpr, ALIGNED: tl.constexpr):
    pointers, inside = tile_of(head, rows, row_stride, ROWS, columns, D, ALIGNED)
    tl.store(pointers, x.to(head.dtype.element_ty), mask=inside)


@triton.jit
def cuts(K1: tl.constexpr, K2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Numbers of the keys in both tiles, and of the columns in both."""
    return tl.arange(0, K1), K1 + tl.arange(0, K2), tl.arange(0, D1), D1 + tl.arange(0, D2)


@triton.jit
def load_pair(head, rows, row_stride, ROWS, c1, c2, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows of a head in two tiles."""
    x1 = load_tile(head, rows, row_stride, ROWS, c1, D, ALIGNED)
    x2 = load_tile(head, rows, row_stride, ROWS, c2, D, ALIGNED)
    return x1, x2


@triton.jit
def load_keys(head, n1, n2, row_stride, N, c1, c2, D: tl.constexpr, ALIGNED: tl.constexpr):
    """All keys or values of a head, in four tiles."""
    x11, x12 = load_pair(head, n1, row_stride, N, c1, c2, D, ALIGNED)
    x21, x22 = load_pair(head, n2, row_stride, N, c1, c2, D, ALIGNED)
    return x11, x12, x21, x22


@triton.jit
def dot(a, b):
    # float32 would otherwise be rounded to tf32
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def transposed_product(x1, x2, y1, y2):
    """x y^T over both tiles of the dimensions."""
    return tl.dot(x2, tl.trans(y2), tl.dot(x1, tl.trans(y1), input_precision="ieee"), input_precision="ieee")


@triton.jit
def softmax(s1, s2, n1, n2, N, scale, KEYS: tl.constexpr):
    """softmax of scale s over the keys, which lie along axis KEYS; n1 and n2 are their numbers, shaped to broadcast."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    s1 = tl.where(n1 < N, s1 * (scale * LOG2_E), -float("inf"))
    s2 = tl.where(n2 < N, s2 * (scale * LOG2_E), -float("inf"))
    top = tl.expand_dims(tl.maximum(tl.max(s1, KEYS), tl.max(s2, KEYS)), KEYS)
    p1, p2 = tl.exp2(s1 - top), tl.exp2(s2 - top)
    share = tl.expand_dims(1.0 / (tl.sum(p1, KEYS) + tl.sum(p2, KEYS)), KEYS)
    return p1 * share, p2 * share


@triton.jit
def logit_grad(p1, p2, g1, g2, KEYS: tl.constexpr):
    """p (g - sum of p g over the keys), which lie along axis KEYS."""
    total = tl.expand_dims(tl.sum(p1 * g1, KEYS) + tl.sum(p2 * g2, KEYS), KEYS)
    return p1 * (g1 - total), p2 * (g2 - total)


@triton.jit
def map_rows(slot, n, N):
    """The last row of the maps that shows each key, -1 for none; without a choice all keys have their own."""
    return tl.where(n < N, n, -1) if slot is None else tl.load(slot + n, mask=n < N, other=-1)


@triton.jit
def map_tile(maps, rows, m, M):
    """Pointers to rows and queries of maps, which broadcast, and which of them are inside."""
    return maps + rows.to(tl.int64) * M + m, (rows >= 0) & (m < M)


@triton.jit
def store_maps(maps, a, slot, before, n, m, N, M):
    """Columns n of a [m,n] to the rows of maps that show them."""
    rows = map_rows(slot, n, N)
    if before is None:
        pointers, inside = map_tile(maps, rows[None, :], m[:, None], M)
        tl.store(pointers, a, mask=inside)
    else:
        # more than one turn only where a token was chosen more than once
        while tl.max(rows, 0) >= 0:
            pointers, inside = map_tile(maps, rows[None, :], m[:, None], M)
            tl.store(pointers, a, mask=inside)
            rows = tl.load(before + rows, mask=rows >= 0, other=-1)


@triton.jit
def load_maps_grad(maps_grad, H, slot, before, n, m, N, M):
    """[n,m], the gradient of every head's probabilities: the sum of the rows that show the key, over H."""
    rows = map_rows(slot, n, N)
    if before is None:
        pointers, inside = map_tile(maps_grad, rows[:, None], m[None, :], M)
        g = tl.load(pointers, mask=inside, other=0.0)
    else:
        g = tl.zeros([n.shape[0], m.shape[0]], tl.float32)
        while tl.max(rows, 0) >= 0:
            pointers, inside = map_tile(maps_grad, rows[:, None], m[None, :], M)
            g += tl.load(pointers, mask=inside, other=0.0)
            rows = tl.load(before + rows, mask=rows >= 0, other=-1)
    return g * (1.0 / H)
