// cross_attention: per batch b and head h, with P = softmax(scale q k^T) over the keys,
//     out = P v,    maps[b,t,m] = mean over h of P[b,h,m,token t]
// and for gradients dO of out and dA of maps, dA scattered to its tokens:
//     G = dO v^T + dA / H,  dS = P (G - rowsum(P G)),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO
//
// The probabilities of at most kTile queries are a tile that stays in cache: keys are its rows and queries its columns. So the
// sums of the softmax run over vectors and never across lanes, a row of the tile is a piece of a row of the maps, and no key is
// padded. The backward pass recomputes the tile. Results do not depend on the number of threads: forward, one task owns a block of
// queries for all heads; backward, one task owns a fixed slice of queries of one head, and slices are added in order.
//
// The softmax, the maps and all sums are float. What enters a product is packed by cells.h: bfloat16 stays bfloat16 where the
// processor multiplies it, and then P and dS are rounded to it too.
#include "cross_attention.h"

#include "cross_attention_workspace.h"
#include "cells.h"
#include "exponential.h"

namespace {

using namespace seal_fast;

// Queries of a slice.
constexpr int64_t kSlice = 1024;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// kVectors columns of vectors of a tile, from logits to 2^(factor (logit - largest)); `inverse` gets 1 / their sum.
template <int kVectors>
inline void exponentials(float* tile, int64_t keys, float factor, float* inverse) {
    Floats top[kVectors], sum[kVectors] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) top[j] = load(tile + j * kFloats);
    for (int64_t n = 1; n < keys; ++n) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const Floats logit = load(tile + n * kTile + j * kFloats);
            top[j] = top[j] > logit ? top[j] : logit;
        }
    }
    for (int64_t n = 0; n < keys; ++n) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            float* at = tile + n * kTile + j * kFloats;
            const Floats e = exp2_nonpositive((load(at) - top[j]) * factor);
            sum[j] += e;
            store(at, e);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(inverse + j * kFloats, 1.0f / sum[j]);
}

void exponentials(float* tile, int64_t keys, int64_t width, float factor, float* inverse) {
    int64_t m = 0;
    for (; m + 4 * kFloats <= width; m += 4 * kFloats) exponentials<4>(tile + m, keys, factor, inverse + m);
    for (; m < width; m += kFloats) exponentials<1>(tile + m, keys, factor, inverse + m);
}

template <class T>
T* rows_of(Heads<T> x, int64_t head, int64_t heads, int64_t start) {
    return x.data + head / heads * x.strides[kBatch] + head % heads * x.strides[kHead] + start * x.strides[kRow];
}

// Asks the second-level cache for a row: rows of a head lie too far apart for the processor to foresee them.
template <class T>
inline void prefetch_row(Heads<T> x, int64_t head, int64_t row, const AttentionShape& s) {
    const T* data = rows_of(x, head, s.heads, row);
    for (int64_t d = 0; d < s.dims; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(data + d, 0, 2);
}

template <class Call, class Cell>
void pack_head(const Call& call, bool backward, const Packed<Cell>& packed, int64_t head) {
    const AttentionShape& s = call.shape;
    const auto *k = rows_of(call.k, head, s.heads, 0), *v = rows_of(call.v, head, s.heads, 0);
    pack_rows(k, call.k.strides[kRow], s.keys, s.keys, s.dims, packed.key_rows[head]);
    if (backward)
        pack_rows(v, call.v.strides[kRow], s.keys, s.keys, s.dims, packed.values[head]);
    else
        pack_columns(v, call.v.strides[kRow], s.keys, s.dims, packed.values[head]);
    const bool both = packed.key_columns.data != packed.key_rows.data;
    if (both) pack_columns(k, call.k.strides[kRow], s.keys, s.dims, packed.key_columns[head]);
    if (call.scale >= 0) return;
    for (int64_t i = 0; i < packed.key_rows.size; ++i) negate(packed.key_rows[head].data[i]);
    for (int64_t i = 0; both && i < packed.key_columns.size; ++i) negate(packed.key_columns[head].data[i]);
}

// tile = left x^T for `rows` rows x of a tensor, which is left in x_rows. Columns are rounded up to whole vectors of rows
// that are zero; returns how many there are.
template <class T, class Cell>
int64_t multiply_rows(const AttentionShape& s, Matrix<Cell> left, const T* x, int64_t x_stride, int64_t rows,
                      Matrix<Cell> x_rows, Matrix<float> tile, const Scratch<Cell>& scratch) {
    const int64_t width = ceil_div(rows, kFloats) * kFloats, steps = cells<Cell>(s.dims);
    pack_rows(x, x_stride, rows, width, s.dims, x_rows);
    transpose(x_rows, scratch.transposed, width, steps);
    multiply<false>(left, scratch.transposed, tile, s.keys, width, steps);
    return width;
}

// Exponentials of `rows` queries against all keys of a head in scratch.tile, 1 / their sums in scratch.inverse; the queries
// remain in scratch.query_rows. Returns the columns in use, rounded up to whole vectors of queries that are zero.
template <class Call, class Cell>
int64_t recompute_tile(const Call& call, const Packed<Cell>& packed, int64_t head, int64_t start, int64_t rows,
                       const Scratch<Cell>& scratch) {
    const AttentionShape& s = call.shape;
    const auto* q = rows_of(call.q, head, s.heads, start);
    const int64_t width =
        multiply_rows(s, packed.key_rows[head], q, call.q.strides[kRow], rows, scratch.query_rows, scratch.tile, scratch);
    const double factor = (call.scale < 0 ? -call.scale : call.scale) * kLog2E;
    exponentials(scratch.tile.data, s.keys, width, static_cast<float>(factor), scratch.inverse);
    return width;
}

// Adds the probabilities of the chosen tokens, or sets the maps to them for the first head.
template <class Cell>
void add_maps(const AttentionShape& s, const int64_t* tokens, int64_t width, bool first, const Scratch<Cell>& scratch) {
    for (int64_t t = 0; t < s.map_rows; ++t) {
        const float* from = scratch.tile.data + (tokens ? tokens[t] : t) * kTile;
        float* to = scratch.maps.data + t * kTile;
        for (int64_t m = 0; m < width; m += kFloats) {
            const Floats p = load(from + m) * load(scratch.inverse + m);
            store(to + m, first ? p : load(to + m) + p);
        }
    }
}

// The mean over heads.
template <class T, class Cell>
void write_maps(const AttentionForward<T>& call, int64_t batch, int64_t start, int64_t rows, const Scratch<Cell>& scratch) {
    const AttentionShape& s = call.shape;
    const float share = 1.0f / float(s.heads);
    for (int64_t t = 0; t < s.map_rows; ++t)
        convert(scratch.maps.data + t * kTile, share, rows, call.maps + (batch * s.map_rows + t) * s.queries + start);
}

// All heads of `rows` queries of one batch.
template <class T, class Cell>
void forward_queries(const AttentionForward<T>& call, const Packed<Cell>& packed, int64_t batch, int64_t start, int64_t rows,
                     const Scratch<Cell>& scratch) {
    const AttentionShape& s = call.shape;
    for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t head = batch * s.heads + h;
        const int64_t width = recompute_tile(call, packed, head, start, rows, scratch);
        // with each head a share of the next block, all heads of a row at once: mostly they lie side by side
        const int64_t ahead = smaller(rows, s.queries - start - rows);
        for (int64_t m = h * ahead / s.heads; m < (h + 1) * ahead / s.heads; ++m)
            for (int64_t other = 0; other < s.heads; ++other)
                prefetch_row(call.q, batch * s.heads + other, start + rows + m, s);
        add_maps(s, call.tokens, width, h == 0, scratch);
        const Matrix<Cell> tile = packed_columns(scratch.tile, s.keys, width, scratch.packed);
        multiply<true>(tile, packed.values[head], scratch.product, rows, s.dims, cells<Cell>(s.keys));
        T* out = rows_of(call.out, head, s.heads, start);
        for (int64_t m = 0; m < rows; ++m)
            convert(scratch.product.data + m * scratch.product.stride, scratch.inverse[m], s.dims,
                    out + m * call.out.strides[kRow]);
    }
    write_maps(call, batch, start, rows, scratch);
}

// G = dO v^T + dA / H in scratch.tile_grad.
template <class T, class Cell>
void probability_grad(const AttentionBackward<T>& call, Matrix<Cell> values, int64_t head, int64_t start, int64_t rows,
                      const Scratch<Cell>& scratch) {
    const AttentionShape& s = call.shape;
    if (call.out_grad.data) {
        const T* grad = rows_of(call.out_grad, head, s.heads, start);
        multiply_rows(s, values, grad, call.out_grad.strides[kRow], rows, scratch.grad_rows, scratch.tile_grad, scratch);
    } else {
        clear(scratch.tile_grad.data, s.keys * kTile);
    }
    if (!call.maps_grad) return;
    const float share = 1.0f / static_cast<float>(s.heads);
    for (int64_t t = 0; t < s.map_rows; ++t) {
        const float* from = call.maps_grad + (head / s.heads * s.map_rows + t) * s.queries + start;
        float* to = scratch.tile_grad.data + (call.tokens ? call.tokens[t] : t) * kTile;
        for (int64_t m = 0; m < rows; ++m) to[m] += from[m] * share;
    }
}

// Exponentials become probabilities P, and G becomes dS = P (G - rowsum(P G)).
template <class Cell>
void logit_grad(int64_t keys, int64_t width, const Scratch<Cell>& scratch) {
    for (int64_t m = 0; m < width; m += kFloats) {
        const Floats inverse = load(scratch.inverse + m);
        Floats mean = {};
        for (int64_t n = 0; n < keys; ++n) {
            float* p = scratch.tile.data + n * kTile + m;
            const Floats probability = load(p) * inverse;
            store(p, probability);
            mean += probability * load(scratch.tile_grad.data + n * kTile + m);
        }
        for (int64_t n = 0; n < keys; ++n) {
            float* g = scratch.tile_grad.data + n * kTile + m;
            store(g, load(scratch.tile.data + n * kTile + m) * (load(g) - mean));
        }
    }
}

template <class Cell>
void normalise(int64_t keys, int64_t width, const Scratch<Cell>& scratch) {
    for (int64_t n = 0; n < keys; ++n)
        for (int64_t m = 0; m < width; m += kFloats) {
            float* p = scratch.tile.data + n * kTile + m;
            store(p, load(p) * load(scratch.inverse + m));
        }
}

// At most kTile queries of one head. Gradients of k and v are added to the sums of their slice, or start them.
template <class T, class Cell>
void backward_queries(const AttentionBackward<T>& call, const Packed<Cell>& packed, int64_t head, int64_t start, int64_t rows,
                      Matrix<float> k_sum, Matrix<float> v_sum, bool first, const Scratch<Cell>& scratch) {
    const AttentionShape& s = call.shape;
    const int64_t width = recompute_tile(call, packed, head, start, rows, scratch), steps = cells<Cell>(rows);
    for (int64_t m = start + rows; m < smaller(start + 2 * rows, s.queries); ++m) {
        prefetch_row(call.q, head, m, s);
        if (call.out_grad.data) prefetch_row(call.out_grad, head, m, s);
    }
    const bool needs_logits = call.q_grad.data || call.k_grad.data;
    if (needs_logits) {
        probability_grad(call, packed.values[head], head, start, rows, scratch);
        logit_grad(s.keys, width, scratch);
    } else {
        normalise(s.keys, width, scratch);
    }
    if (call.v_grad.data) {
        const T* grad = rows_of(call.out_grad, head, s.heads, start);
        if (kDepth<Cell> > 1 || !needs_logits)
            pack_columns(grad, call.out_grad.strides[kRow], rows, s.dims, scratch.grad_columns);
        const Matrix<Cell> tile = packed_rows(scratch.tile, s.keys, rows, width, scratch.packed);
        multiply<false>(tile, scratch.grad_columns, v_sum, s.keys, s.dims, steps, !first);
    }
    if (call.k_grad.data) {
        const T* q = rows_of(call.q, head, s.heads, start);
        if (kDepth<Cell> > 1) pack_columns(q, call.q.strides[kRow], rows, s.dims, scratch.query_columns);
        const Matrix<Cell> tile = packed_rows(scratch.tile_grad, s.keys, rows, width, scratch.packed);
        multiply<false>(tile, scratch.query_columns, k_sum, s.keys, s.dims, steps, !first);
    }
    if (call.q_grad.data) {
        const Matrix<Cell> tile = packed_columns(scratch.tile_grad, s.keys, width, scratch.packed);
        multiply<true>(tile, packed.key_columns[head], scratch.product, rows, s.dims, cells<Cell>(s.keys));
        // keys are packed with the sign of the scale
        const double size = call.scale < 0 ? -call.scale : call.scale;
        unpack(scratch.product, size, rows, s.dims, rows_of(call.q_grad, head, s.heads, start), call.q_grad.strides[kRow]);
    }
}

// Adds the slices of one head's gradient of keys or values in order, into the first of them, and writes it.
template <class T>
void add_slices(Matrix<float> first, int64_t slices, const AttentionShape& s, double factor, Heads<T> grad, int64_t head) {
    for (int64_t slice = 1; slice < slices; ++slice)
        for (int64_t i = 0; i < s.keys * first.stride; ++i) first.data[i] += first.data[slice * Sums::floats(s) + i];
    unpack(first, factor, s.keys, s.dims, rows_of(grad, head, s.heads, 0), grad.strides[kRow]);
}

}  // namespace

namespace seal_fast {
namespace SEAL_ISA {

int64_t cross_attention_workspace(const AttentionShape& s, bool backward, int threads) {
    const int64_t slices = backward ? ceil_div(s.queries, kSlice) : 0;
    const int64_t packed = larger(Packed<float>::floats(s, backward), Packed<Pair>::floats(s, backward));
    return packed + slices * Sums::floats(s) + threads * Scratch<float>::floats(s);
}

template <class T>
void cross_attention_forward(const AttentionForward<T>& call, int threads) {
    typedef typename CellOf<T>::Type Cell;
    const AttentionShape& s = call.shape;
    const Packed<Cell> packed(call.workspace, s, false);
    float* scratches = call.workspace + Packed<Cell>::floats(s, false);
    const int64_t heads = s.batches * s.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; ++head) pack_head(call, false, packed, head);

    // every thread gets queries before blocks get large: a query's results do not depend on its block
    int64_t block = kTile;
    while (block > kFloats && s.batches * ceil_div(s.queries, block) < threads) block /= 2;
    const int64_t blocks = ceil_div(s.queries, block), tasks = s.batches * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t worker = 0; worker < threads; ++worker) {
        const Scratch<Cell> scratch(scratches + worker * Scratch<Cell>::floats(s), s);
        for (int64_t task = worker * tasks / threads; task < (worker + 1) * tasks / threads; ++task) {
            const int64_t start = task % blocks * block;
            forward_queries(call, packed, task / blocks, start, smaller(block, s.queries - start), scratch);
        }
    }
}

template <class T>
void cross_attention_backward(const AttentionBackward<T>& call, int threads) {
    typedef typename CellOf<T>::Type Cell;
    const AttentionShape& s = call.shape;
    const Packed<Cell> packed(call.workspace, s, true);
    float* sums = call.workspace + Packed<Cell>::floats(s, true);
    const int64_t heads = s.batches * s.heads, slices = ceil_div(s.queries, kSlice), tasks = heads * slices;
    float* scratches = sums + slices * Sums::floats(s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; ++head) pack_head(call, true, packed, head);

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t worker = 0; worker < threads; ++worker) {
        const Scratch<Cell> scratch(scratches + worker * Scratch<Cell>::floats(s), s);
        for (int64_t task = worker * tasks / threads; task < (worker + 1) * tasks / threads; ++task) {
            // the heads of a slice follow one another: they read the same dA, and queries that lie side by side
            const int64_t number = task / s.heads % slices, head = task / s.heads / slices * s.heads + task % s.heads;
            const int64_t begin = number * kSlice, end = smaller(begin + kSlice, s.queries);
            const Sums slice(sums + number * Sums::floats(s), s);
            for (int64_t start = begin; start < end; start += kTile)
                backward_queries(call, packed, head, start, smaller(kTile, end - start), slice.keys[head], slice.values[head],
                                 start == begin, scratch);
        }
    }

    const Sums first(sums, s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; ++head) {
        if (call.k_grad.data) add_slices(first.keys[head], slices, s, call.scale, call.k_grad, head);
        if (call.v_grad.data) add_slices(first.values[head], slices, s, 1.0, call.v_grad, head);
    }
}

#define SEAL_INSTANTIATE(T)                                                                \
    template void cross_attention_forward<T>(const AttentionForward<T>&, int);     \
    template void cross_attention_backward<T>(const AttentionBackward<T>&, int);
SEAL_INSTANTIATE(float)
SEAL_INSTANTIATE(Bfloat16)
SEAL_INSTANTIATE(Float16)

}  // namespace SEAL_ISA
}  // namespace seal_fast
